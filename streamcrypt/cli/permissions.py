"""The least that a role needs of a key, as an identity policy, a key policy or grants.

    role         on the first --key   on every other --key   on --from-key (default: all --key)
    encrypt      GenerateDataKey      Encrypt                –
    decrypt      –                    –                      Decrypt, on every --key
    loader       –                    –                      Decrypt, on every --key
    rekey        GenerateDataKey      Encrypt                Decrypt
    wrap         Encrypt              Encrypt                –: a further key of encrypt or rekey, by itself
    resume       –                    –                      Decrypt, on the first --key: an interrupted
                 encrypt or rekey opens what it finds in its destination before it takes it over
    ray          –                    –                      Decrypt, on the first --key: the nodes of a
                 cluster get the data keys of encrypt and rekey wrapped, and unwrap them themselves
    sagemaker    CreateGrant, for AWS resources only, and DescribeKey, on every --key: what SageMaker
                 asks of the caller and of the execution role for encrypted volumes (VolumeKmsKeyId)
    sagemaker-output  GenerateDataKey and Decrypt, through S3 only, on every --key: what the execution
                 role needs so that the artefact is stored under the key (OutputDataConfig.KmsKeyId).
                 S3 names its own encryption context (aws:s3:arn), so --context says nothing about it
    branch-keys  Decrypt, GenerateDataKeyWithoutPlaintext, ReEncryptFrom and ReEncryptTo on the KMS key
                 of a hierarchy: key: to make and rotate branch keys

A key that is named by an alias or a key ID also takes DescribeKey, where its ARN must be known:
to decrypt.  A loader takes no key reference: the message names the key.  A hierarchy: key takes Decrypt
on the KMS key, for its own branch key alone, and dynamodb:GetItem on that branch key's rows, whatever
the role; branch-keys also takes dynamodb:PutItem.  --sign-manifest takes Sign and GetPublicKey.  A source on S3
takes ListBucket and GetObject, a destination also PutObject, what its multipart uploads take when they are
broken off, and DeleteObject for our own records below _streamcrypt/.  These
are the calls that the commands make; tests run every command under exactly these policies, and under
one action less.

Sources: Amazon SageMaker AI Developer Guide, "Use AWS KMS permissions" (the SageMaker rows); Amazon S3
User Guide, "Multipart upload API and permissions" (a multipart upload under a KMS key takes Decrypt); Amazon
DynamoDB Developer Guide, "Using IAM with DynamoDB transactions" and "Using IAM policy conditions for
fine-grained access control".
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from streamcrypt.kms.policy import GRANT_OPERATIONS, default_key_policy

Role = Literal[
    "encrypt",
    "wrap",
    "decrypt",
    "rekey",
    "loader",
    "resume",
    "ray",
    "sagemaker",
    "sagemaker-output",
    "branch-keys",
]
ROLES: Final[tuple[Role, ...]] = (
    "encrypt", "wrap", "decrypt", "rekey", "loader", "resume", "ray", "sagemaker", "sagemaker-output", "branch-keys",
)  # fmt: skip
# Of jobs that other roles name: alone they would let nothing be done.
_ADDED: Final[Mapping[str, frozenset[str]]] = {
    "resume": frozenset({"encrypt", "rekey"}),
    "ray": frozenset({"encrypt", "decrypt", "rekey"}),
}

# Operations whose permissions may be bound to an encryption context.
_WITH_CONTEXT: Final = frozenset(
    {
        "kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey", "kms:GenerateDataKeyWithoutPlaintext",
        "kms:ReEncryptFrom", "kms:ReEncryptTo",
    }
)  # fmt: skip
_SAGEMAKER: Final = ("kms:CreateGrant", "kms:DescribeKey")
_SAGEMAKER_OUTPUT: Final = ("kms:Decrypt", "kms:GenerateDataKey")
_BRANCH_KEYS: Final = (
    "kms:Decrypt", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncryptFrom", "kms:ReEncryptTo",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BranchKeyRows:
    """Where a branch key lies: its id, the logical name of its table, and the table's ARN ('' for SQLite)."""

    branch_key_id: str
    logical_name: str
    table_arn: str


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A key as a job names it.  ``by_arn`` is false for an alias or a key ID."""

    arn: str
    by_arn: bool = True
    kind: Literal["kms", "kms-rsa", "ecdh", "hierarchy", "signing"] = "kms"
    public_key_known: bool = False
    """kms-rsa, ecdh: the public key is in a file, so that none is asked for."""
    branch_key: BranchKeyRows | None = None
    """hierarchy: ``arn`` is that of the KMS key that wraps the branch key."""


@dataclass(frozen=True, slots=True)
class Permission:
    """One action on one resource, and under which condition."""

    action: str
    resource: str
    condition: dict[str, Any] = field(default_factory=dict)
    constraint: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same as a grant has it."""


def permissions(
    roles: Collection[str],
    keys: Sequence[KeyUse],
    from_keys: Sequence[KeyUse] = (),
    *,
    signing_key: KeyUse | None = None,
    context: Mapping[str, str] | None = None,
    exact_context: bool = False,
) -> list[Permission]:
    """What the roles need, each action on each resource once for each condition."""
    needed: dict[tuple[str, str, str], Permission] = {}

    def need(key: KeyUse, *actions: str) -> None:
        for action in actions:
            found = _bound(key, action, dict(context or {}), exact=exact_context)
            needed[action, found.resource, json.dumps(found.condition)] = found

    for role, jobs in _ADDED.items():
        if role in roles and not jobs & set(roles):
            raise ValueError(f"{role} is an addition to a job; write --for {sorted(jobs)[0]},{role}")
    for role in roles:
        if role in ("encrypt", "rekey", "wrap"):
            for number, key in enumerate(keys):
                need(key, *_to_wrap(key, first=number == 0 and role != "wrap"))
        if role in ("decrypt", "loader", "rekey"):
            for key in (from_keys or keys) if role == "rekey" else keys:
                named = role != "loader" and (role == "decrypt" or bool(from_keys))
                need(key, *_to_unwrap(key, named=named))
        if role in ("resume", "ray") and keys and {"encrypt", "rekey"} & set(roles):
            need(keys[0], *_to_unwrap(keys[0], named=True))
        if role == "sagemaker":
            for key in keys:
                need(key, *_SAGEMAKER)
        if role == "sagemaker-output":
            for key in keys:
                for action in _SAGEMAKER_OUTPUT:
                    service = {
                        "StringEquals": {"kms:ViaService": f"s3.{key.arn.split(':')[3]}.amazonaws.com"}
                    }
                    needed[action, key.arn, json.dumps(service)] = Permission(action, key.arn, service)
        if role == "branch-keys":
            for key in keys:
                if key.branch_key is None:
                    raise ValueError("branch-keys is about hierarchy: keys; name one with its &kms=KEY-ARN")
                need(key, *_BRANCH_KEYS, "dynamodb:GetItem", "dynamodb:PutItem")
    if signing_key is not None:
        need(signing_key, "kms:Sign", "kms:GetPublicKey")
    # An embedded table needs no permission.
    return [permission for permission in needed.values() if permission.resource]


def of_source(url: str, partition: str) -> list[Permission]:
    """What reading a dataset, or one object, from S3 takes."""
    bucket, below = _in_s3(url, partition)
    return [
        Permission("s3:ListBucket", bucket),
        *(Permission("s3:GetObject", f"{bucket}/{place}") for place in below),
    ]


def of_destination(url: str, partition: str, *, signed: bool = False) -> list[Permission]:
    """What writing one takes; ``signed``: the signed manifest of what was there before is removed."""
    bucket, below = _in_s3(url, partition)
    needed = of_source(url, partition)
    for place in below:
        for action in ("s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"):
            needed.append(Permission(action, f"{bucket}/{place}"))
    removed = ["uploads/*", "journal/*", *(["manifest.s*"] if signed else [])]
    folder = below[-1].removesuffix("*")
    needed += [Permission("s3:DeleteObject", f"{bucket}/{folder}_streamcrypt/{name}") for name in removed]
    if len(below) > 1:  # perhaps one object, whose upload is on record in the folder above it
        records = f"{bucket}/{''.join(below[0].rpartition('/')[:2])}_streamcrypt/uploads/*"
        needed += [Permission(f"s3:{verb}Object", records) for verb in ("Get", "Put", "Delete")]
    return needed


def _in_s3(url: str, partition: str) -> tuple[str, list[str]]:
    """The bucket's ARN, and what belongs to the URL in it: an object, what is below a folder, or either."""
    if not url.startswith("s3://"):
        raise ValueError(f"{url}: only S3 takes IAM policies of AWS; write s3://BUCKET/KEY")
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise ValueError(f"{url}: names no bucket")
    # Policy variables are the way to write what is special in an ARN.
    name = re.sub(r"[*?$]", r"${\g<0>}", key.rstrip("/"))
    folder = f"{name}/*" if name else "*"
    return f"arn:{partition}:s3:::{bucket}", [folder] if not name or key.endswith("/") else [name, folder]


def actions_by_resource(needed: Sequence[Permission]) -> dict[str, list[str]]:
    """ARN -> the actions on it."""
    found: dict[str, set[str]] = defaultdict(set)
    for permission in needed:
        found[permission.resource].add(permission.action)
    return {arn: sorted(actions) for arn, actions in sorted(found.items())}


def _to_wrap(key: KeyUse, *, first: bool) -> Sequence[str]:
    if key.kind == "kms":
        return ("kms:GenerateDataKey" if first else "kms:Encrypt",)
    if key.kind == "kms-rsa":
        named = () if key.by_arn else ("kms:DescribeKey",)  # the message must name the key by its ARN
        return named if key.public_key_known else (*named, "kms:GetPublicKey")
    if key.kind == "hierarchy":
        return ("kms:Decrypt", "dynamodb:GetItem")
    return ("kms:DeriveSharedSecret", "kms:GetPublicKey")


def _to_unwrap(key: KeyUse, *, named: bool) -> Sequence[str]:
    if key.kind in ("kms", "kms-rsa"):
        return ("kms:Decrypt",) if key.by_arn or not named else ("kms:Decrypt", "kms:DescribeKey")
    if key.kind == "hierarchy":
        return ("kms:Decrypt", "dynamodb:GetItem")
    return ("kms:DeriveSharedSecret", "kms:GetPublicKey")


def _bound(key: KeyUse, action: str, context: dict[str, str], *, exact: bool) -> Permission:
    """The permission under the narrowest condition that the commands meet."""
    rows = key.branch_key
    if action.startswith("dynamodb:"):
        assert rows is not None
        leading = {"dynamodb:LeadingKeys": [rows.branch_key_id]}
        return Permission(action, rows.table_arn, {"ForAllValues:StringEquals": leading})
    if action == "kms:CreateGrant":
        return Permission(action, key.arn, {"Bool": {"kms:GrantIsForAWSResource": "true"}})
    if action not in _WITH_CONTEXT:
        return Permission(action, key.arn)
    if rows is not None:
        # KMS sees the branch key's row as context, and the dataset's context not at all.
        pairs = {"branch-key-id": rows.branch_key_id, "tablename": rows.logical_name}
        return Permission(
            action, key.arn, _context_condition(pairs, exact=False), {"EncryptionContextSubset": pairs}
        )
    if not context or key.kind != "kms":
        return Permission(action, key.arn)
    kind = "EncryptionContextEquals" if exact else "EncryptionContextSubset"
    return Permission(action, key.arn, _context_condition(context, exact=exact), {kind: context})


def _context_condition(context: Mapping[str, str], *, exact: bool) -> dict[str, Any]:
    # "${" would begin a policy variable; "${$}{" is the way to write it.
    pairs = {f"kms:EncryptionContext:{name}": value.replace("${", "${$}{") for name, value in context.items()}
    condition: dict[str, Any] = {"StringEquals": pairs}
    if exact:
        # A signed message adds this pair by itself.
        names = [*context, "aws-crypto-public-key"]
        condition["ForAllValues:StringEquals"] = {"kms:EncryptionContextKeys": names}
    return condition


def statements(needed: Sequence[Permission], *, via_service: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Allow statements, one for each set of actions and conditions; Resource names ARNs."""
    by_resource: dict[tuple[str, str], set[str]] = defaultdict(set)
    for permission in needed:
        by_resource[permission.resource, json.dumps(permission.condition)].add(permission.action)
    together: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for (resource, text), actions in by_resource.items():
        together[tuple(sorted(actions)), text].append(resource)
    made = []
    for (names, text), arns in sorted(together.items()):
        condition: dict[str, Any] = json.loads(text)
        own_service = "kms:ViaService" in condition.get("StringEquals", {})
        if via_service and names[0].startswith("kms:") and not own_service:
            services = list(via_service) if len(via_service) > 1 else via_service[0]
            condition.setdefault("StringEquals", {})["kms:ViaService"] = services
        statement: dict[str, Any] = {
            "Sid": _sid(names, text),
            "Effect": "Allow",
            "Action": list(names),
            "Resource": sorted(arns) if len(arns) > 1 else arns[0],
        }
        made.append({**statement, "Condition": condition} if condition else statement)
    for number, statement in enumerate(made, 1):
        # Sids are unique within an identity policy.
        if [other["Sid"] for other in made].count(statement["Sid"]) > 1:
            statement["Sid"] = f"{statement['Sid']}{number}"
    return made


def _sid(actions: Sequence[str], condition: str) -> str:
    if actions[0].startswith("dynamodb:"):
        return "StreamcryptBranchKeys"
    if actions[0].startswith("s3:"):
        return "StreamcryptStore"
    if actions[0] == "kms:CreateGrant":
        return "StreamcryptGrantsForAWSResources"
    if "kms:ViaService" in condition:
        return "StreamcryptArtefacts"
    return "StreamcryptData" if "kms:EncryptionContext" in condition else "StreamcryptKeys"


def identity_policy(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The policy to attach to a user or role."""
    return {"Version": "2012-10-17", "Statement": list(made)}


def key_policy(made: Sequence[Mapping[str, Any]], principal: str, account: str) -> dict[str, Any]:
    """The policy of one key: the account's administrators keep it, ``principal`` gets the statements."""
    default = json.loads(default_key_policy(account))
    own = [{**statement, "Principal": {"AWS": principal}, "Resource": "*"} for statement in made]
    return {"Version": default["Version"], "Statement": [*default["Statement"], *own]}


def grants(needed: Sequence[Permission], principal: str) -> list[dict[str, Any]]:
    """CreateGrant requests, for boto3 or ``aws kms create-grant --cli-input-json``.

    One for each key and constraint.  ValueError for an action that no grant can give.
    """
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for permission in needed:
        together[permission.resource, json.dumps(permission.constraint)].append(
            permission.action.removeprefix("kms:")
        )
    requests = []
    for (arn, text), operations in sorted(together.items()):
        impossible = set(operations) - GRANT_OPERATIONS
        if impossible:
            raise ValueError(f"no grant can give {', '.join(sorted(impossible))}; use a policy")
        request: dict[str, Any] = {
            "KeyId": arn,
            "GranteePrincipal": principal,
            "Operations": sorted(operations),
        }
        if text != "{}":
            request["Constraints"] = json.loads(text)
        requests.append(request)
    return requests
