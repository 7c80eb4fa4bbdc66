"""Who may call over HTTP: principals of the local account, their policies, their access keys.

A new user has no identity policy, as in AWS: what it may do is what key policies and grants
give it.  The account's root user needs none.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from typing import Final

from streamcrypt.kms import policy
from streamcrypt.kms.call import DEFAULT_ACCOUNT
from streamcrypt.kms.store import AccessKey, Store

_USER_NAME: Final = re.compile(r"[\w+=,.@-]{1,64}", re.ASCII)
_ACCOUNT: Final = re.compile(r"[0-9]{12}", re.ASCII)


def principal_arn(name: str | None, account: str = DEFAULT_ACCOUNT) -> str:
    """The ARN of a user by its name, or of what already is an ARN; None is the account's root."""
    if name is None or name == "root":
        return f"arn:aws:iam::{account}:root"
    if name.startswith("arn:"):
        if not policy.Caller(name).account:
            raise ValueError(f"{name!r} is not the ARN of a user, role or session")
        return name
    if not _USER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a user name: letters, digits and +=,.@_- only, at most 64")
    return f"arn:aws:iam::{account}:user/{name}"


def access_key(store: Store, arn: str, *, policies: Sequence[str] | None = None) -> AccessKey:
    """The access key of a principal, made when there is none.

    ``policies`` (JSON documents) replace the principal's identity policies; None leaves them.
    """
    for text in policies or ():
        policy.check_identity_policy(text)
    with store.transaction():
        record = store.principal(arn) or {"policies": []}
        if policies is not None:
            record["policies"] = list(policies)
        store.put_principal(arn, record)
        existing = store.access_keys_of(arn)
        if not existing:
            made = AccessKey(_new_id(), base64.b64encode(os.urandom(30)).decode(), policy.Caller(arn))
            store.put_access_key(made, store.clock())
            existing = [made.id]
    found = store.access_key(existing[0])
    if found is None:
        raise RuntimeError("internal error: an access key vanished")
    return found


def session_key(
    store: Store, arn: str, *, expires: float, role: str | None = None, policies: Sequence[str] = ()
) -> AccessKey:
    """Temporary credentials of a role session (``arn:aws:sts::ACCOUNT:assumed-role/NAME/SESSION``)."""
    for text in policies:
        policy.check_identity_policy(text)
    token = base64.b64encode(os.urandom(96)).decode()
    secret = base64.b64encode(os.urandom(30)).decode()
    made = AccessKey(_new_id("ASIA"), secret, policy.Caller(arn, role=role), token, expires)
    with store.transaction():
        store.put_principal(arn, {"policies": list(policies), "role": role})
        store.put_access_key(made, store.clock())
    found = store.access_key(made.id)
    if found is None:
        raise RuntimeError("internal error: an access key vanished")
    return found


def _new_id(prefix: str = "AKIA") -> str:
    """Twenty characters, as AWS's: the prefix and Base32."""
    return prefix + base64.b32encode(os.urandom(10)).decode()
