"""The least that a role needs of a key, as an identity policy, a key policy or grants.

    role       on the first --key   on every other --key   on --from-key (default: all --key)
    encrypt    GenerateDataKey      Encrypt                –
    decrypt    –                    –                      Decrypt, on every --key
    loader     –                    –                      Decrypt, on every --key
    rekey      GenerateDataKey      Encrypt                Decrypt
    sagemaker  CreateGrant, for AWS resources only, and DescribeKey, on every --key: what SageMaker
               asks of the caller and of the execution role for encrypted volumes

A key that is named by an alias or a key ID also takes DescribeKey, where its ARN must be known:
to decrypt.  A loader takes no key reference: the message names the key.  These are the calls that the
commands make; tests run every command under exactly these policies, and under one action less.

Source of the SageMaker rows: Amazon SageMaker AI Developer Guide, "Use AWS KMS permissions".
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from streamcrypt.kms.policy import GRANT_OPERATIONS, default_key_policy

Role = Literal["encrypt", "decrypt", "rekey", "loader", "sagemaker"]
ROLES: Final[tuple[Role, ...]] = ("encrypt", "decrypt", "rekey", "loader", "sagemaker")

# Operations whose permissions may be bound to an encryption context.
_WITH_CONTEXT: Final = frozenset({"kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey"})
_SAGEMAKER: Final = frozenset({"kms:CreateGrant", "kms:DescribeKey"})


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A key as a job names it.  ``by_arn`` is false for an alias or a key ID."""

    arn: str
    by_arn: bool = True
    kind: Literal["kms", "kms-rsa", "ecdh"] = "kms"
    public_key_known: bool = False
    """kms-rsa, ecdh: the public key is in a file, so that none is asked for."""


def needed_actions(
    roles: Collection[str], keys: Sequence[KeyUse], from_keys: Sequence[KeyUse] = ()
) -> dict[str, frozenset[str]]:
    """Key ARN -> the actions that the roles need on it."""
    actions: dict[str, set[str]] = defaultdict(set)
    for role in roles:
        if role in ("encrypt", "rekey"):
            for number, key in enumerate(keys):
                actions[key.arn] |= _to_wrap(key, first=number == 0)
        if role in ("decrypt", "loader", "rekey"):
            for key in (from_keys or keys) if role == "rekey" else keys:
                actions[key.arn] |= _to_unwrap(
                    key, named=role != "loader" and (role == "decrypt" or bool(from_keys))
                )
        if role == "sagemaker":
            for key in keys:
                actions[key.arn] |= _SAGEMAKER
    return {arn: frozenset(found) for arn, found in actions.items()}


def _to_wrap(key: KeyUse, *, first: bool) -> set[str]:
    if key.kind == "kms":
        return {"kms:GenerateDataKey" if first else "kms:Encrypt"}
    if key.kind == "kms-rsa":
        return set() if key.public_key_known else {"kms:GetPublicKey"}
    return {"kms:DeriveSharedSecret", "kms:GetPublicKey"}


def _to_unwrap(key: KeyUse, *, named: bool) -> set[str]:
    if key.kind == "kms":
        return {"kms:Decrypt"} if key.by_arn or not named else {"kms:Decrypt", "kms:DescribeKey"}
    if key.kind == "kms-rsa":
        return {"kms:Decrypt"}
    return {"kms:DeriveSharedSecret", "kms:GetPublicKey"}


def statements(
    actions: Mapping[str, frozenset[str]],
    kinds: Mapping[str, str],
    *,
    roles: Collection[str],
    context: Mapping[str, str],
    exact_context: bool = False,
    via_service: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Allow statements, one for each set of actions and conditions; Resource names key ARNs."""
    only_for_resources = _SAGEMAKER if "sagemaker" in roles else frozenset()
    resources: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for arn, found in actions.items():
        bound = found & _WITH_CONTEXT if context and kinds.get(arn, "kms") == "kms" else frozenset()
        granting = found & only_for_resources & {"kms:CreateGrant"}
        for sort, part in (("data", bound), ("grants", granting), ("keys", found - bound - granting)):
            if part:
                resources[tuple(sorted(part)), sort].append(arn)
    made = []
    sids = {
        "data": "StreamcryptData",
        "keys": "StreamcryptKeys",
        "grants": "StreamcryptGrantsForAWSResources",
    }
    for (names, sort), arns in sorted(resources.items()):
        condition: dict[str, Any] = {}
        if sort == "data":
            condition = _context_condition(context, exact=exact_context)
        if sort == "grants":
            condition = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
        if via_service:
            services = list(via_service) if len(via_service) > 1 else via_service[0]
            condition.setdefault("StringEquals", {})["kms:ViaService"] = services
        statement: dict[str, Any] = {
            "Sid": sids[sort],
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


def _context_condition(context: Mapping[str, str], *, exact: bool) -> dict[str, Any]:
    # "${" would begin a policy variable; "${$}{" is the way to write it.
    pairs = {f"kms:EncryptionContext:{name}": value.replace("${", "${$}{") for name, value in context.items()}
    condition: dict[str, Any] = {"StringEquals": pairs}
    if exact:
        # A signed message adds this pair by itself.
        names = [*context, "aws-crypto-public-key"]
        condition["ForAllValues:StringEquals"] = {"kms:EncryptionContextKeys": names}
    return condition


def identity_policy(made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The policy to attach to a user or role."""
    return {"Version": "2012-10-17", "Statement": list(made)}


def key_policy(made: Sequence[Mapping[str, Any]], principal: str, account: str) -> dict[str, Any]:
    """The policy of one key: the account's administrators keep it, ``principal`` gets the statements."""
    default = json.loads(default_key_policy(account))
    own = [{**statement, "Principal": {"AWS": principal}, "Resource": "*"} for statement in made]
    return {"Version": default["Version"], "Statement": [*default["Statement"], *own]}


def grants(
    actions: Mapping[str, frozenset[str]],
    kinds: Mapping[str, str],
    principal: str,
    context: Mapping[str, str],
    *,
    exact_context: bool = False,
) -> list[dict[str, Any]]:
    """CreateGrant requests, for boto3 or ``aws kms create-grant --cli-input-json``.

    ValueError for an action that no grant can give.
    """
    requests = []
    for arn, found in sorted(actions.items()):
        operations = sorted(action.removeprefix("kms:") for action in found)
        impossible = set(operations) - GRANT_OPERATIONS
        if impossible:
            raise ValueError(f"no grant can give {', '.join(sorted(impossible))}; use a policy")
        request: dict[str, Any] = {"KeyId": arn, "GranteePrincipal": principal, "Operations": operations}
        if context and kinds.get(arn, "kms") == "kms":
            kind = "EncryptionContextEquals" if exact_context else "EncryptionContextSubset"
            request["Constraints"] = {kind: dict(context)}
        requests.append(request)
    return requests
