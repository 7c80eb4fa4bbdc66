"""Who may do what with a key: key policies, identity policies and grants, decided as AWS KMS does.

    1. a Deny that matches, in the key policy or in a policy of the caller   -> denied
    2. the key policy allows the caller itself                               -> allowed
       the key policy allows the caller's account, and a policy of the caller allows
       a grant names the caller as grantee, lists the operation, its constraints hold
    3. otherwise                                                             -> denied

A caller of another account needs a policy of its own in cases of the key policy.  An account's
root user needs none.  A key policy without a statement for the account leaves the account's own
policies void, which no other AWS service does: never take an identity policy's Allow for enough.

A policy is parsed and compiled once for a text (``_compile`` remembers it); statements are then
found by action.  Sources: AWS KMS Developer Guide, "Key policies", "Grants", "Troubleshooting
key access"; IAM User Guide, "Policy elements"; texts of AccessDeniedException as AWS sends them.
"""

from __future__ import annotations

import json
import re
import time as time_module
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal

from streamcrypt.kms.conditions import (
    RESOURCE,
    Condition,
    Context,
    Values,
    all_of,
    always,
    arn_match,
    compile_conditions,
    malformed,
    resource_condition,
    wildcard_match,
)
from streamcrypt.kms.errors import KmsError

Value = str | bool | int | float | datetime | Sequence[str]
"""A condition key's value; a sequence for the multi-valued keys."""

KEY_POLICY_LIMIT: Final = 32_768
"""Bytes of a key policy (resource quota)."""


# --- the question ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: a user, a role or its session, an account's root, or a service (``x.amazonaws.com``)."""

    arn: str
    policies: tuple[str, ...] = ()
    """The identity policies (JSON) that the caller's account attached to it; root needs none."""
    role: str | None = None
    """ARN of the role of a session; derived from ``arn`` where the role has no path."""
    access_key_id: str | None = None
    via_service: str | None = None
    """``sagemaker.us-east-1.amazonaws.com`` when that service calls on behalf of the principal."""
    source_ip: str = "127.0.0.1"
    user_agent: str = "streamcrypt"
    tags: Mapping[str, str] = field(default_factory=dict)
    """aws:PrincipalTag/*"""
    conditions: Mapping[str, Value] = field(default_factory=dict)
    """Further condition keys: aws:PrincipalOrgID, aws:SourceArn, aws:SourceAccount, aws:SecureTransport …"""

    @property
    def account(self) -> str:
        """The twelve digits; '' for a service."""
        return _identity(self.arn, self.role).account


ROOT: Final = Caller("arn:aws:iam::000000000000:root")


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What conditions may ask about a key.  Build one per key and keep it."""

    arn: str
    spec: str = "SYMMETRIC_DEFAULT"
    usage: str = "ENCRYPT_DECRYPT"
    origin: str = "AWS_KMS"
    multi_region: bool = False
    multi_region_key_type: str | None = None
    """PRIMARY or REPLICA"""
    aliases: tuple[str, ...] = ()
    """Names: ``alias/ml``"""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grant:
    """A grant as the evaluator sees it; the store keeps name, tokens and dates beside it."""

    grant_id: str
    grantee: str
    """ARN of a user, role, session or account's root; or a service (``dynamodb.us-west-2.amazonaws.com``)."""
    operations: frozenset[str]
    """``Decrypt``, ``ReEncryptFrom`` …"""
    retiring: str | None = None
    issuing_account: str = ""
    """The twelve digits of the account that created the grant."""
    equals: Mapping[str, str] | None = None
    subset: Mapping[str, str] | None = None
    source_arn: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the evaluator."""

    caller: Caller
    action: str
    """``kms:Decrypt``; for ReEncrypt ask twice: ``kms:ReEncryptFrom``, ``kms:ReEncryptTo``."""
    key: KeyFacts | None = None
    """The key; None for IAM-only actions (CreateKey, ListKeys, GenerateRandom …) and for an alias's own permission."""
    resource: str = ""
    """ARN where it is not the key's: an alias ARN.  Default: the key's ARN, ``*`` without a key."""
    encryption_context: Mapping[str, str] | None = None
    """The context of the request (ReEncryptFrom: the source's); CreateGrant takes it from ``new_grant``."""
    conditions: Mapping[str, Value] = field(default_factory=dict)
    """Condition keys of this operation by AWS's names: ``{"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    "kms:RequestAlias": "alias/ml", "kms:SigningAlgorithm": …, "aws:TagKeys": […], "aws:RequestTag/team": …}``.
    What follows from the other fields (spec, usage, tags, caller, grant) need not be repeated here."""
    new_grant: Grant | None = None
    """kms:CreateGrant only: the grant that is asked for."""
    time: float | None = None
    """Unix seconds, for aws:CurrentTime; None: the clock."""


Source = Literal["key policy", "identity policy", "grant", ""]


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer, with the rule that gave it.

    ``source`` and ``statement`` (the Sid, or ``statement 3``; a grant's id) name what allowed or
    explicitly denied; of an implicit denial ``source`` is where the Allow is missing ('' where AWS
    does not tell: a caller of another account).  ``reason`` is AWS's wording of a denial.
    """

    allowed: bool
    source: Source
    statement: str
    reason: str
    explicit: bool = False
    """A Deny statement matched."""

    def message(self, request: Request, *, by_ciphertext: bool = False) -> str:
        """The text of AccessDeniedException; ``by_ciphertext``: the key was found by the blob, not by KeyId."""
        if self.source == "" and not self.allowed:
            resource = "this resource"
        elif by_ciphertext:
            resource = "the resource associated with this ciphertext"
        else:
            resource = f"resource: {_resource_of(request)}"
        caller = request.caller.arn
        return f"User: {caller} is not authorized to perform: {request.action} on {resource} {self.reason}"


# --- the answer -----------------------------------------------------------------------------------


def evaluate(request: Request, key_policy: str | None, grants: Iterable[Grant] = ()) -> Decision:
    """Whether ``request`` is allowed.

    ``key_policy`` is None for actions that only identity policies decide, and for a key that does
    not exist: a caller of another account then gets the answer that tells nothing.  Raises
    MalformedPolicyDocumentException for a policy that :func:`check_key_policy` would refuse.
    """
    caller, action = request.caller, request.action
    identity = _identity(caller.arn, caller.role)
    context = _RequestContext(request)

    direct: _Statement | None = None
    delegated: _Statement | None = None
    if key_policy is not None:
        denies, allows = _compile(key_policy, "key").about(action, identity)
        for _, statement in denies:
            if statement.applies(context):
                reason = "with an explicit deny in a resource-based policy"
                return Decision(False, "key policy", statement.label, reason, explicit=True)
        for match, statement in allows:
            if (match == _ITSELF or delegated is None) and statement.applies(context):
                if match == _ITSELF:
                    direct = statement
                    break
                delegated = statement

    own: _Statement | None = None
    for text in caller.policies:
        denies, allows = _compile(text, "identity").about(action, identity)
        for _, statement in denies:
            if statement.applies(context):
                reason = "with an explicit deny in an identity-based policy"
                return Decision(False, "identity policy", statement.label, reason, explicit=True)
        if own is None:
            own = next((statement for _, statement in allows if statement.applies(context)), None)
    own_allows = own is not None or identity.is_root

    no_own = f"because no identity-based policy allows the {action} action"
    if request.key is None:
        if own_allows:
            return Decision(True, "identity policy", own.label if own else "account root", "")
        return Decision(False, "identity policy", "", no_own)

    foreign = identity.account != "" and identity.account != _account_of(request.key.arn)
    by_key_policy = direct or delegated
    if by_key_policy is not None and (own_allows or (by_key_policy is direct and not foreign)):
        decisive = by_key_policy if direct or own is None else own
        return Decision(
            True, "key policy" if decisive is by_key_policy else "identity policy", decisive.label, ""
        )
    operation = action.partition(":")[2]
    for grant in grants:
        if operation not in grant.operations:
            continue
        match = _names_principal(grant.grantee, identity)
        if (match == _ITSELF or (match and own_allows)) and _grant_covers(grant, request, context):
            return Decision(True, "grant", grant.grant_id, "")
    if by_key_policy is not None:
        return Decision(False, "identity policy", "", no_own)
    if foreign:
        return Decision(False, "", "", _TELLS_NOTHING)
    return Decision(False, "key policy", "", f"because no resource-based policy allows the {action} action")


_TELLS_NOTHING: Final = (
    "because the resource does not exist in this Region, no resource-based policies allow access, "
    "or a resource-based policy explicitly denies access"
)


def unknown_key_message(caller: Caller, action: str) -> str:
    """AccessDeniedException's text for a caller of another account and a key that does not exist."""
    return f"User: {caller.arn} is not authorized to perform: {action} on this resource {_TELLS_NOTHING}"


def grant_applies(grant: Grant, request: Request) -> bool:
    """Whether the grant covers the request by itself: grantee, operation and constraints."""
    identity = _identity(request.caller.arn, request.caller.role)
    names_itself = _names_principal(grant.grantee, identity) == _ITSELF
    return names_itself and _grant_covers(grant, request, _RequestContext(request))


def may_retire(caller: Caller, grant: Grant, key_arn: str) -> bool:
    """Whether ``caller`` may retire the grant.

    So may its retiring principal, its grantee where it lists RetireGrant, and the account that
    created it; an account (as creator or retiring principal) lets its identity policies decide.
    """
    identity = _identity(caller.arn, caller.role)
    if "RetireGrant" in grant.operations and _names_principal(grant.grantee, identity) == _ITSELF:
        return True
    matches = {_names_principal(grant.retiring, identity)} if grant.retiring else set()
    if grant.issuing_account:
        matches.add(_names_principal(f"arn:aws:iam::{grant.issuing_account}:root", identity))
    if _ITSELF in matches:
        return True
    if _ITS_ACCOUNT not in matches:
        return False
    return evaluate(Request(caller, "kms:RetireGrant", resource=key_arn), None).allowed


# --- why not ---------------------------------------------------------------------------------------


def unmet_conditions(request: Request, text: str, kind: Literal["key", "identity"] = "key") -> list[str]:
    """The conditions that keep a policy's Allow statements from the request, in words.

    Only statements that name the caller and the action: without their conditions they would allow
    it.  Empty: no condition is to blame, the Allow itself is missing (or nothing is).
    """
    identity = _identity(request.caller.arn, request.caller.role)
    context = _RequestContext(request)
    document = _parse_document(text)
    statements = document["Statement"] if isinstance(document["Statement"], list) else [document["Statement"]]
    variables = document.get("Version") == "2012-10-17"
    unmet = []
    for number, statement in enumerate(statements, 1):
        compiled = _compile_statement(statement, f"statement {number}", kind, variables=variables)
        about = compiled.allow and compiled.names(identity) and compiled.covers(request.action.lower())
        if not about or compiled.applies(context):
            continue
        for operator, tests in statement.get("Condition", {}).items():
            for key, wanted in tests.items():
                test = compile_conditions({operator: {key: wanted}}, variables=variables, every_value=True)
                if not test(context):
                    has = context[key.lower()]
                    unmet.append(
                        f"{compiled.label}: {operator} {key} {json.dumps(wanted)}, and the request has {has!r}"
                    )
    return unmet


def unmet_constraints(request: Request, grants: Iterable[Grant]) -> list[str]:
    """The grants that name the caller and the operation but whose constraints do not fit, in words."""
    identity = _identity(request.caller.arn, request.caller.role)
    context = _RequestContext(request)
    operation = request.action.partition(":")[2]
    unmet = []
    for grant in grants:
        named = operation in grant.operations and _names_principal(grant.grantee, identity)
        if named and not _grant_covers(grant, request, context):
            wanted = dict(grant.equals) if grant.equals is not None else dict(grant.subset or {})
            kind = "exactly" if grant.equals is not None else "at least"
            unmet.append(f"grant {grant.grant_id[:12]}…: {kind} {json.dumps(wanted)} as encryption context")
    return unmet


# --- what may become a policy or a grant ----------------------------------------------------------


def default_key_policy(account: str) -> str:
    """The policy of a key that was created without one: the account's own policies decide."""
    statement = {
        "Sid": "Enable IAM User Permissions",
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
        "Action": "kms:*",
        "Resource": "*",
    }
    return json.dumps({"Version": "2012-10-17", "Id": "key-default-1", "Statement": [statement]})


def check_key_policy(text: str, request: Request, *, bypass_lockout_check: bool = False) -> None:
    """KmsError unless ``text`` may become the policy of ``request.key``.

    Syntax, principals and size; and the lockout check: the caller of ``request`` (whose action is
    ignored) must be able to call PutKeyPolicy afterwards, itself or through its account.
    """
    if len(text.encode()) > KEY_POLICY_LIMIT:
        raise KmsError("LimitExceededException", f"The key policy exceeds {KEY_POLICY_LIMIT} bytes.")
    policy = _compile(text, "key")
    if bypass_lockout_check:
        return
    caller = request.caller
    again = Request(caller, "kms:PutKeyPolicy", request.key, conditions={"kms:PolicyName": "default"})
    identity, context = _identity(caller.arn, caller.role), _RequestContext(again)
    denies, allows = policy.about(again.action, identity)
    if any(deny.applies(context) for _, deny in denies) or not any(
        allow.applies(context) for _, allow in allows
    ):
        raise malformed("The new key policy will not allow you to update the key policy in the future.")


def check_identity_policy(text: str) -> None:
    """MalformedPolicyDocumentException unless ``text`` is an identity policy."""
    _compile(text, "identity")


_SYMMETRIC_OPERATIONS: Final = frozenset(
    {
        "Decrypt", "Encrypt", "ReEncryptFrom", "ReEncryptTo", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext",
        "GenerateDataKeyPair", "GenerateDataKeyPairWithoutPlaintext",
    }
)  # fmt: skip
_OPERATIONS_OF_USAGE: Final = {
    "ENCRYPT_DECRYPT": frozenset({"Decrypt", "Encrypt", "ReEncryptFrom", "ReEncryptTo", "GetPublicKey"}),
    "SIGN_VERIFY": frozenset({"Sign", "Verify", "GetPublicKey"}),
    "GENERATE_VERIFY_MAC": frozenset({"GenerateMac", "VerifyMac"}),
    "KEY_AGREEMENT": frozenset({"DeriveSharedSecret", "GetPublicKey"}),
    "ENCAPSULATE_DECAPSULATE": frozenset({"Encapsulate", "Decapsulate", "GetPublicKey"}),
}
_OPERATIONS_OF_EVERY_KEY: Final = frozenset({"CreateGrant", "RetireGrant", "DescribeKey"})

GRANT_OPERATIONS: Final = _SYMMETRIC_OPERATIONS.union(
    _OPERATIONS_OF_EVERY_KEY, *_OPERATIONS_OF_USAGE.values()
)
"""Every operation that a grant may list."""


def check_new_grant(grant: Grant, key: KeyFacts) -> None:
    """KmsError (ValidationException, InvalidArnException) unless ``grant`` suits the key.

    The texts for operations and constraints are ours: AWS documents the rules, not the wording.
    """
    for principal in (grant.grantee, grant.retiring):
        if principal is not None and not _is_service(principal) and _PRINCIPAL.fullmatch(principal) is None:
            raise KmsError("InvalidArnException", f"Invalid Arn {principal}")
    if (
        _is_service(grant.grantee)
        and grant.source_arn is None
        and grant.subset is None
        and grant.equals is None
    ):
        raise KmsError("ValidationException", "A grant to a service principal needs a constraint.")
    if not grant.operations:
        raise KmsError("ValidationException", "A grant needs at least one operation.")
    symmetric = key.spec == "SYMMETRIC_DEFAULT"
    possible = _SYMMETRIC_OPERATIONS if symmetric else _OPERATIONS_OF_USAGE[key.usage]
    impossible = grant.operations - possible - _OPERATIONS_OF_EVERY_KEY
    if impossible:
        names = ", ".join(sorted(impossible))
        what = f"KeySpec {key.spec} and KeyUsage {key.usage}"
        raise KmsError("ValidationException", f"Operations [{names}] are not valid for a key of {what}.")
    for constraint in (grant.equals, grant.subset):
        if constraint is None:
            continue
        if not symmetric:
            raise KmsError(
                "ValidationException", "Encryption context constraints need a symmetric encryption key."
            )
        if len(constraint) > 8:
            raise KmsError(
                "ValidationException", "A grant constraint holds at most 8 encryption context pairs."
            )
        if any(len(value) > 384 for value in constraint.values()):
            raise KmsError("ValidationException", "A grant constraint's value has at most 384 characters.")


# --- principals -----------------------------------------------------------------------------------

_NOBODY: Final = 0
_ITS_ACCOUNT: Final = 1
_ITSELF: Final = 2

_PRINCIPAL = re.compile(
    r"arn:aws[a-z-]*:(?:iam::\d{12}:(?:root|(?:user|role)/[\w+=,.@/-]+)"
    r"|sts::\d{12}:(?:assumed-role/[\w+=,.@-]+/[\w+=,.@-]+|federated-user/[\w+=,.@-]+))"
)
_ACCOUNT = re.compile(r"(?:arn:aws[a-z-]*:iam::)?(\d{12})(?::root)?")


@dataclass(frozen=True, slots=True)
class _Identity:
    """The names under which a policy may mean a caller."""

    arn: str
    account: str
    names: frozenset[str]
    """The caller itself: its ARN, for a session also its role's; and ``*``."""
    is_root: bool
    principal_arn: str
    """aws:PrincipalArn: for a session the role's ARN."""

    @property
    def chain(self) -> frozenset[str]:
        """What a NotPrincipal must list to spare the caller: itself, its role, its account."""
        return (self.names - {"*"}) | ({self.account} if self.account else set())


@lru_cache(maxsize=4096)
def _identity(arn: str, role: str | None) -> _Identity:
    parts = arn.split(":", 5)
    if len(parts) < 6:
        return _Identity(arn, "", frozenset({arn, "*"}), False, arn)
    partition, account, resource = parts[1], parts[4], parts[5]
    if resource == "root":
        return _Identity(arn, account, frozenset({account, "*"}), True, arn)
    if resource.startswith("assumed-role/"):
        role = role or f"arn:{partition}:iam::{account}:role/{resource.split('/')[1]}"
        return _Identity(arn, account, frozenset({arn, role, "*"}), False, role)
    return _Identity(arn, account, frozenset({arn, "*"}), False, arn)


def _is_service(principal: str) -> bool:
    return principal.endswith((".amazonaws.com", ".amazonaws.com.cn")) and ":" not in principal


def _names_principal(principal: str, identity: _Identity) -> int:
    """How ``principal`` (an ARN, twelve digits, a service) means the caller: itself, its account, or not."""
    name = _canonical(principal)
    if name in identity.names:
        return _ITSELF
    return _ITS_ACCOUNT if name == identity.account else _NOBODY


@lru_cache(maxsize=4096)
def _canonical(principal: str) -> str:
    """A principal as policies are compiled with it: an account is its twelve digits."""
    account = _ACCOUNT.fullmatch(principal)
    return account[1] if account else principal


def _account_of(arn: str) -> str:
    parts = arn.split(":", 5)
    return parts[4] if len(parts) == 6 else ""


def _resource_of(request: Request) -> str:
    return request.resource or (request.key.arn if request.key else "*")


# --- grants ---------------------------------------------------------------------------------------


def _grant_covers(grant: Grant, request: Request, context: Context) -> bool:
    operation = request.action.partition(":")[2]
    if operation not in grant.operations:
        return False
    if grant.source_arn is not None:
        source = context["aws:sourcearn"]
        if not isinstance(source, str) or not arn_match(grant.source_arn)(source):
            return False
    if operation == "CreateGrant":
        return request.new_grant is not None and _is_narrower(request.new_grant, grant)
    if operation in ("DescribeKey", "RetireGrant"):  # constraints do not apply to these
        return True
    given = request.encryption_context or {}
    if grant.equals is not None and dict(given) != dict(grant.equals):
        return False
    return grant.subset is None or grant.subset.items() <= given.items()


def _is_narrower(child: Grant, parent: Grant) -> bool:
    """CreateGrant by way of a grant: "equally restrictive or more restrictive" in operations and constraints."""
    if not child.operations <= parent.operations:
        return False
    if parent.source_arn is not None and child.source_arn != parent.source_arn:
        return False
    if parent.equals is not None and (child.equals is None or dict(child.equals) != dict(parent.equals)):
        return False
    if parent.subset is None:
        return True
    return any(
        constraint is not None and parent.subset.items() <= constraint.items()
        for constraint in (child.equals, child.subset)
    )


# --- condition keys of a request ------------------------------------------------------------------


class _RequestContext(dict[str, Values]):
    """Condition keys (lower case) to the request's values, worked out when a condition first asks."""

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request

    def __missing__(self, key: str) -> Values:
        values = self._find(key)
        self[key] = values
        return values

    def _find(self, key: str) -> Values:
        request = self._request
        for given in (request.conditions, request.caller.conditions):
            for name, value in given.items():
                if name.lower() == key:
                    return _values(value)
        resolve = _CONDITION_KEYS.get(key)
        if resolve is not None:
            return _values(resolve(request))
        for prefix, mapping in _CONDITION_KEY_FAMILIES.items():
            if key.startswith(prefix):
                wanted = key[len(prefix) :]
                # "The condition key is not case sensitive": pairs that differ in case only are all meant.
                return _values([value for name, value in mapping(request).items() if name.lower() == wanted])
        return None


def _values(value: Value | None) -> Values:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, int | float):
        return str(value)
    values = tuple(value)
    return values[0] if len(values) == 1 else values or None


def _encryption_context(request: Request) -> Mapping[str, str]:
    if request.new_grant is not None:
        return {**(request.new_grant.subset or {}), **(request.new_grant.equals or {})}
    return request.encryption_context or {}


def _constraint_type(grant: Grant) -> str | None:
    if grant.equals is not None:
        return "EncryptionContextEquals"
    return "EncryptionContextSubset" if grant.subset is not None else None


def _principal_type(caller: Caller) -> str | None:
    resource = caller.arn.split(":", 5)[-1]
    kinds = {
        "root": "Account",
        "user": "User",
        "assumed-role": "AssumedRole",
        "federated-user": "FederatedUser",
    }
    return kinds.get(resource.partition("/")[0])


def _user_name(caller: Caller) -> str | None:
    return caller.arn.rpartition("/")[2] if ":user/" in caller.arn else None


def _seconds(request: Request) -> float:
    return time_module.time() if request.time is None else request.time


def _of_key(attribute: str) -> Callable[[Request], Value | None]:
    return lambda request: None if request.key is None else getattr(request.key, attribute)


def _of_grant(find: Callable[[Grant], Value | None]) -> Callable[[Request], Value | None]:
    return lambda request: None if request.new_grant is None else find(request.new_grant)


def _grant_is_for_aws_resource(request: Request) -> bool | None:
    if request.action not in ("kms:CreateGrant", "kms:ListGrants", "kms:RevokeGrant"):
        return None
    return request.caller.via_service is not None or _is_service(request.caller.arn)


# What follows from the fields of a Request; the keys of single operations come in Request.conditions.
_CONDITION_KEYS: Final[dict[str, Callable[[Request], Value | None]]] = {
    RESOURCE: lambda request: _resource_of(request),
    "kms:calleraccount": lambda request: request.caller.account or None if request.key else None,
    "kms:encryptioncontextkeys": lambda request: tuple(_encryption_context(request)),
    "kms:grantconstrainttype": _of_grant(_constraint_type),
    "kms:granteeprincipal": _of_grant(lambda grant: grant.grantee),
    "kms:grantisforawsresource": _grant_is_for_aws_resource,
    "kms:grantoperations": _of_grant(lambda grant: sorted(grant.operations)),
    "kms:keyorigin": _of_key("origin"),
    "kms:keyspec": _of_key("spec"),
    "kms:keyusage": _of_key("usage"),
    "kms:multiregion": _of_key("multi_region"),
    "kms:multiregionkeytype": _of_key("multi_region_key_type"),
    "kms:resourcealiases": _of_key("aliases"),
    "kms:retiringprincipal": _of_grant(lambda grant: grant.retiring),
    "kms:viaservice": lambda request: request.caller.via_service,
    "aws:currenttime": lambda request: datetime.fromtimestamp(_seconds(request), UTC),
    "aws:epochtime": lambda request: int(_seconds(request)),
    "aws:principalaccount": lambda request: request.caller.account or None,
    "aws:principalarn": lambda request: _identity(request.caller.arn, request.caller.role).principal_arn,
    "aws:principalisawsservice": lambda request: _is_service(request.caller.arn),
    "aws:principalservicename": lambda request: (
        request.caller.arn if _is_service(request.caller.arn) else None
    ),
    "aws:principaltype": lambda request: _principal_type(request.caller),
    "aws:requestedregion": lambda request: _resource_of(request).split(":")[3] if request.key else None,
    "aws:resourceaccount": lambda request: _account_of(_resource_of(request)) or None,
    "aws:sourceip": lambda request: None if request.caller.via_service else request.caller.source_ip,
    "aws:useragent": lambda request: request.caller.user_agent,
    "aws:username": lambda request: _user_name(request.caller),
    "aws:viaawsservice": lambda request: request.caller.via_service is not None,
}
_CONDITION_KEY_FAMILIES: Final[dict[str, Callable[[Request], Mapping[str, str]]]] = {
    "kms:encryptioncontext:": _encryption_context,
    "aws:principaltag/": lambda request: request.caller.tags,
    "aws:resourcetag/": lambda request: request.key.tags if request.key else {},
}


# --- policies, compiled ---------------------------------------------------------------------------

_Kind = Literal["key", "identity"]
_ELEMENTS: Final = {"Version", "Id", "Statement"}
_STATEMENT_ELEMENTS: Final = {
    "Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Statement:
    label: str
    allow: bool
    principals: frozenset[str]
    """Names as in ``_Identity``; ``*`` in identity policies, which mean who they are attached to."""
    spares: bool
    """NotPrincipal: the statement means everyone but ``principals``."""
    covers: Callable[[str], bool]
    """Whether the statement is about an action (lower case)."""
    applies: Condition
    """Whether resource and conditions hold."""

    def names(self, identity: _Identity) -> int:
        """Whether the statement's principal is the caller itself, its account, or neither."""
        if not self.spares:
            if not identity.names.isdisjoint(self.principals):
                return _ITSELF
            return _ITS_ACCOUNT if identity.account in self.principals else _NOBODY
        # IAM User Guide: a NotPrincipal must also list the account (and the role of a session), or the
        # Deny "might deny access to the entire account".  The reading that permits less, for both effects.
        if self.allow:
            return _NOBODY if not identity.chain.isdisjoint(self.principals) else _ITSELF
        return _NOBODY if identity.chain <= self.principals else _ITSELF


_Matched = tuple[tuple[int, _Statement], ...]
"""Statements, each with how it names the caller (``_ITSELF`` or ``_ITS_ACCOUNT``)."""


class _Policy:
    """The statements of a policy; those about one action and one caller are looked up once."""

    def __init__(self, statements: Sequence[_Statement]) -> None:
        self._statements = statements
        self._found: dict[tuple[str, str, str], tuple[_Matched, _Matched]] = {}

    def about(self, action: str, identity: _Identity) -> tuple[_Matched, _Matched]:
        """The Deny and the Allow statements about an action that name the caller, in the policy's order."""
        key = (action, identity.arn, identity.principal_arn)
        found = self._found.get(key)
        if found is None:
            lower = action.lower()
            named = [(statement.names(identity), statement) for statement in self._statements]
            about = [(match, statement) for match, statement in named if match and statement.covers(lower)]
            denies = tuple(pair for pair in about if not pair[1].allow)
            found = denies, tuple(pair for pair in about if pair[1].allow)
            if len(self._found) >= 1024:  # many sessions of one role: forget, do not grow
                self._found.clear()
            self._found[key] = found
        return found


@lru_cache(maxsize=1024)
def _compile(text: str, kind: _Kind) -> _Policy:
    document = _parse_document(text)
    statements = document["Statement"]
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list) or not statements:
        raise malformed("Policy must have at least one statement.")
    variables = document.get("Version") == "2012-10-17"
    return _Policy(
        [
            _compile_statement(statement, f"statement {number}", kind, variables=variables)
            for number, statement in enumerate(statements, 1)
        ]
    )


def _parse_document(text: str) -> dict[str, Any]:
    # Key policy format: printable characters of Basic Latin and Latin-1 Supplement, tab, LF and CR.
    if any(not (" " <= c <= "~" or "\u00a1" <= c <= "\u00ff" or c in "\t\n\r") for c in text):
        raise malformed("Policy contains a character that is not allowed in policies.")
    try:
        document = json.loads(text, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise malformed("Policy is not valid JSON.") from error
    if not isinstance(document, dict) or "Statement" not in document:
        raise malformed("Policy must be an object with a Statement.")
    unknown = document.keys() - _ELEMENTS
    if unknown:
        raise malformed(f"Policy has an unknown element {min(unknown)}.")
    if document.get("Version", "2008-10-17") not in ("2012-10-17", "2008-10-17"):
        raise malformed("The policy's Version must be 2012-10-17 or 2008-10-17.")
    return document


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise malformed("Policy names an element twice.")
    return mapping


def _compile_statement(statement: Any, label: str, kind: _Kind, *, variables: bool) -> _Statement:
    if not isinstance(statement, dict):
        raise malformed("Statement must be an object or a list of objects.")
    unknown = statement.keys() - _STATEMENT_ELEMENTS
    if unknown:
        raise malformed(f"Policy contains a statement with an unknown element {min(unknown)}.")
    if statement.get("Effect") not in ("Allow", "Deny"):
        raise malformed("Policy contains a statement whose Effect is neither Allow nor Deny.")
    for element in ("Principal", "Action", "Resource"):
        if element in statement and f"Not{element}" in statement:
            raise malformed(f"Policy contains a statement with both {element} and Not{element}.")
    sid = statement.get("Sid", "")
    if not isinstance(sid, str):
        raise malformed("Policy contains a statement whose Sid is not text.")
    allow = statement["Effect"] == "Allow"
    actions, spared_actions = _patterns(statement, "Action")
    resources, spared_resources = _patterns(statement, "Resource")
    if kind == "key":
        _refuse_overly_permissive(statement.get("Condition"))
    # "*" in a key policy is the key; an ARN there means the key only where it is this one.
    resource = _any_of(
        [resource_condition(text, variables=variables) for text in resources], spared_resources
    )
    condition = compile_conditions(statement.get("Condition", {}), variables=variables, every_value=allow)
    return _Statement(
        label=sid or label,
        allow=allow,
        principals=_principals(statement, kind),
        spares="NotPrincipal" in statement,
        # Actions ignore case: AWS KMS Developer Guide, "Permissions reference".
        covers=_any_of([wildcard_match(pattern.lower()) for pattern in actions], spared_actions),
        applies=all_of([test for test in (resource, condition) if test is not always]),
    )


def _any_of(tests: Sequence[Callable[[Any], bool]], negated: bool) -> Callable[[Any], bool]:
    """One test of many; without any, none: a statement without Action or Resource has no effect."""
    if not tests:
        return lambda _: False
    if len(tests) == 1 and not negated:
        return tests[0]
    return lambda given: any(test(given) for test in tests) != negated


def _patterns(statement: dict[str, Any], element: str) -> tuple[list[str], bool]:
    """The texts of Action or NotAction, Resource or NotResource; none where the element is absent."""
    negated = f"Not{element}" in statement
    values = statement.get(f"Not{element}" if negated else element, [])
    texts = [values] if isinstance(values, str) else values
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise malformed(f"Policy contains a statement with an invalid {element}.")
    for text in texts:
        if element == "Action" and text != "*" and ":" not in text:
            raise malformed("Actions must be prefixed with a service: kms:Decrypt.")
        if element == "Resource" and text != "*" and not text.startswith(("arn:", "*")):
            raise malformed(f"Resource {text} must be in ARN format or *.")
    return texts, negated


def _principals(statement: dict[str, Any], kind: _Kind) -> frozenset[str]:
    principal = statement.get("Principal", statement.get("NotPrincipal"))
    if kind == "identity":
        if principal is not None:
            raise malformed("An identity policy cannot name a Principal.")
        return frozenset({"*"})
    if principal is None:
        raise malformed("Policy contains a statement with no principal.")
    if principal == "*":
        return frozenset({"*"})
    if not isinstance(principal, dict) or not principal:
        raise malformed("Policy contains a statement with one or more invalid principals.")
    names = set()
    for type_, values in principal.items():
        for value in values if isinstance(values, list) else [values]:
            names.add(_principal_name(type_, value))
    return frozenset(names)


def _principal_name(type_: str, value: Any) -> str:
    if isinstance(value, str):
        if type_ == "AWS":
            if value == "*" or _ACCOUNT.fullmatch(value) or _PRINCIPAL.fullmatch(value):
                return _canonical(value)
        elif (type_ == "Service" and _is_service(value)) or (
            type_ in ("Federated", "CanonicalUser") and value
        ):
            return value
    # Wildcards in ARNs, unknown types, and the unique ids (AIDA…) that deleted users leave behind.
    raise malformed("Policy contains a statement with one or more invalid principals.")


def _refuse_overly_permissive(condition: Any) -> None:
    """AWS KMS refuses ForAllValues on a pair: it would match requests without any context."""
    for operator, keys in condition.items() if isinstance(condition, dict) else ():
        if operator.startswith("ForAllValues:") and isinstance(keys, dict):
            for key in keys:
                if key.lower().startswith("kms:encryptioncontext:"):
                    raise malformed(
                        "OverlyPermissiveCondition:EncryptionContext: Using the ForAllValues set operator with a "
                        "single-valued condition key matches requests without the specified encryption context or "
                        "with an unspecified encryption context. To fix, remove ForAllValues."
                    )
