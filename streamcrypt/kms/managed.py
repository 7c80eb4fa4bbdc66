"""AWS managed keys: the aliases ``alias/aws/SERVICE`` exist, and nobody but AWS changes them.

The alias of a service is listed from the beginning; its key is made at the first use.  Its
policy is the one that AWS gives: principals of the account may use the key through the
service, and directly only read about it.
"""

from __future__ import annotations

import json
from typing import Final

from streamcrypt.kms import material
from streamcrypt.kms.errors import new_uuid
from streamcrypt.kms.store import Key, Material, Store

PREFIX: Final = "alias/aws/"

SERVICES: Final = (
    "acm", "backup", "codecommit", "dynamodb", "ebs", "elasticfilesystem", "es", "fsx", "glue", "kinesis",
    "lambda", "lightsail", "rds", "redshift", "s3", "sagemaker", "secretsmanager", "sns", "sqs", "ssm", "xray",
)  # fmt: skip

_AUTOMATIC_ROTATION: Final = 365 * 86400.0


def is_managed_alias(name: str) -> bool:
    return name.removeprefix(PREFIX) in SERVICES and name.startswith(PREFIX)


def ensure_key(store: Store, account: str, region: str, name: str, now: float) -> str:
    """The id of the key behind ``alias/aws/…``, made now when this is the first use."""
    with store.transaction():
        existing = store.alias_target(account, region, name)
        if existing is not None:
            return existing
        service = name.removeprefix(PREFIX)
        key_id = new_uuid()
        fresh = material.generate(material.SPECS[material.SYMMETRIC])
        identity = material.material_id(key_id, fresh)
        key = Key(
            account=account,
            region=region,
            id=key_id,
            created=now,
            manager="AWS",
            description=f"Default key that protects my {service} data when no other key is defined",
            key_policy=_policy(service, account, region),
            rotation_period=365,
            rotation_next=now + _AUTOMATIC_ROTATION,
            rotation_start=now,
            materials=[Material(identity, now, sealed=store.seal_material(account, key_id, identity, fresh))],
        )
        store.save_key(key)
        store.put_alias(account, region, name, key_id, now)
        return key_id


def _policy(service: str, account: str, region: str) -> str:
    use = {
        "Sid": f"Allow access through {service} for all principals in the account that are authorized to use it",
        "Effect": "Allow",
        "Principal": {"AWS": "*"},
        "Action": [
            "kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:CreateGrant",
            "kms:DescribeKey",
        ],
        "Resource": "*",
        "Condition": {
            "StringEquals": {"kms:CallerAccount": account, "kms:ViaService": f"{service}.{region}.amazonaws.com"}
        },
    }  # fmt: skip
    read = {
        "Sid": "Allow direct access to key metadata to the account",
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
        "Action": ["kms:Describe*", "kms:Get*", "kms:List*", "kms:RevokeGrant"],
        "Resource": "*",
    }
    return json.dumps({"Version": "2012-10-17", "Id": f"auto-{service}-1", "Statement": [use, read]})
