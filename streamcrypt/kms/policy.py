"""Who may do what with a key: key policies, identity policies and grants, decided as AWS KMS does.

    1. a Deny that matches, in the key policy or in a policy of the caller   -> denied
    2. the key policy allows the caller itself                               -> allowed
       the key policy allows the caller's account, and a policy of the caller allows
       a grant names the caller as grantee, lists the operation, its constraints hold
    3. otherwise                                                             -> denied

A caller of another account needs a policy of its own in cases of the key policy.  An account's
root user needs none.  A key policy without a statement for the account leaves the account's own
policies void, which no other AWS service does: never take an identity policy's Allow for enough.

A policy is parsed and compiled once for a text (``_compile`` remembers it).  Statements are then
found by action and asked together, by what they read of a request (``_About``).

Sources: AWS KMS Developer Guide, "Key policies", "Grants", "Troubleshooting
key access"; IAM User Guide, "Policy elements"; texts of AccessDeniedException as AWS sends them.
"""

from __future__ import annotations

import json
import re
import time as time_module
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Literal

from streamcrypt.kms.conditions import (
    RESOURCE,
    Context,
    Test,
    Values,
    all_hold,
    arn_match,
    compile_conditions,
    compile_resource,
    malformed,
    read,
    wildcard_match,
)
from streamcrypt.kms.errors import KmsError
from streamcrypt.tuples import NamedTuple

Value = str | bool | int | float | datetime | Sequence[str]
"""A condition key's value; a sequence for the multi-valued keys."""

KEY_POLICY_LIMIT: Final = 32_768
"""Bytes of a key policy (resource quota)."""


# --- the question ---------------------------------------------------------------------------------


class Caller(NamedTuple):
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
    tags: Mapping[str, str] = MappingProxyType({})
    """aws:PrincipalTag/*"""
    conditions: Mapping[str, Value] = MappingProxyType({})
    """Further condition keys: aws:PrincipalOrgID, aws:SourceArn, aws:SourceAccount, aws:SecureTransport …"""

    @property
    def account(self) -> str:
        """The twelve digits; '' for a service."""
        return _identity(self.arn, self.role).account


ROOT: Final = Caller("arn:aws:iam::000000000000:root")


class KeyFacts(NamedTuple):
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
    tags: Mapping[str, str] = MappingProxyType({})


class Grant(NamedTuple):
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


class Request(NamedTuple):
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
    conditions: Mapping[str, Value] = MappingProxyType({})
    """Condition keys of this operation by AWS's names: ``{"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    "kms:RequestAlias": "alias/ml", "kms:SigningAlgorithm": …, "aws:TagKeys": […], "aws:RequestTag/team": …}``.
    What follows from the other fields (spec, usage, tags, caller, grant) need not be repeated here."""
    new_grant: Grant | None = None
    """kms:CreateGrant only: the grant that is asked for."""
    time: float | None = None
    """Unix seconds, for aws:CurrentTime; None: the clock."""


Source = Literal["key policy", "identity policy", "grant", ""]


class Decision(NamedTuple):
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
        about = _compile(key_policy, "key").about(action)
        itself, account = about.named(identity)
        applying = about.applying(itself | account, context)
        if denies := applying & about.denies:
            reason = "with an explicit deny in a resource-based policy"
            return Decision(False, "key policy", about.first(denies).label, reason, explicit=True)
        if applying & itself:
            direct = about.first(applying & itself)
        elif applying:
            delegated = about.first(applying)

    own: _Statement | None = None
    for text in caller.policies:
        about = _compile(text, "identity").about(action)
        applying = about.applying(about.named(identity)[0], context)
        if denies := applying & about.denies:
            reason = "with an explicit deny in an identity-based policy"
            return Decision(False, "identity policy", about.first(denies).label, reason, explicit=True)
        if own is None and applying:
            own = about.first(applying)
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


def reasons(
    decision: Decision, request: Request, key_policy: str, grants: Iterable[Grant] = ()
) -> tuple[str, ...]:
    """Why a request was denied, in words: the statement that denies it, or the conditions that do not hold."""
    if decision.explicit:
        return (f"{decision.statement} of the {decision.source} denies it",)
    unmet = unmet_conditions(request, key_policy)
    for text in request.caller.policies:
        unmet += unmet_conditions(request, text, "identity")
    return (*unmet, *unmet_constraints(request, grants))


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
        if not about or all_hold(compiled.tests, context):
            continue
        for operator, conditions in statement.get("Condition", {}).items():
            for key, wanted in conditions.items():
                tests = compile_conditions({operator: {key: wanted}}, variables=variables, every_value=True)
                if not all_hold(tests, context):
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
    about = policy.about(again.action)
    itself, account = about.named(identity)
    applying = about.applying(itself | account, context)
    if applying & about.denies or not applying:
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
        if (
            principal is not None
            and not _is_service(principal)
            and re.fullmatch(_PRINCIPAL, principal) is None
        ):
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

# Patterns are text: `re` compiles each when it is first used, not when the module is imported.
_PRINCIPAL = (
    r"arn:aws[a-z-]*:(?:iam::\d{12}:(?:root|(?:user|role)/[\w+=,.@/-]+)"
    r"|sts::\d{12}:(?:assumed-role/[\w+=,.@-]+/[\w+=,.@-]+|federated-user/[\w+=,.@-]+))"
)
_ACCOUNT = r"(?:arn:aws[a-z-]*:iam::)?(\d{12})(?::root)?"


class _Identity(NamedTuple):
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
    account = re.fullmatch(_ACCOUNT, principal)
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

    __slots__ = ("_filled", "_request")

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request
        self._filled = False

    def named(self, keys: tuple[str, ...]) -> tuple[Values, ...]:
        """The values of keys that begin with _NAMED: absent is what the request itself does not name."""
        if not self._filled:
            self._fill()
        return tuple(map(self.get, keys))

    def __missing__(self, key: str) -> Values:
        if not self._filled:
            self._fill()
            return self[key]
        resolve = _CONDITION_KEYS.get(key)
        values = self[key] = None if resolve is None else _values(resolve(self._request))
        return values

    def _fill(self) -> None:
        """What the request itself names: the pairs of its encryption context, tags, further condition keys."""
        request = self._request
        self._filled = True
        for prefix, mapping in _CONDITION_KEY_FAMILIES.items():
            for name, text in mapping(request).items():
                key = prefix + name.lower()
                held = self.get(key)
                # "The condition key is not case sensitive": pairs that differ in case only are all meant.
                self[key] = text if held is None else (*((held,) if isinstance(held, str) else held), text)
        for given in (request.caller.conditions, request.conditions):
            for name, value in given.items():
                self[name.lower()] = _values(value)


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
_NAMED: Final = tuple(_CONDITION_KEY_FAMILIES)


# --- policies, compiled ---------------------------------------------------------------------------

_Kind = Literal["key", "identity"]
_ELEMENTS: Final = {"Version", "Id", "Statement"}
_STATEMENT_ELEMENTS: Final = {
    "Sid", "Effect", "Principal", "NotPrincipal", "Action", "NotAction", "Resource", "NotResource", "Condition",
}  # fmt: skip


class _Statement(NamedTuple):
    label: str
    allow: bool
    principals: frozenset[str]
    """Names as in ``_Identity``; ``*`` in identity policies, which mean who they are attached to."""
    spares: bool
    """NotPrincipal: the statement means everyone but ``principals``."""
    covers: Callable[[str], bool]
    """Whether the statement is about an action (lower case)."""
    tests: tuple[Test, ...]
    """Resource and conditions."""

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


class _Policy:
    """The statements of a policy; those about one action are looked up once."""

    def __init__(self, statements: Sequence[_Statement]) -> None:
        self._statements = statements
        self._about: dict[str, _About] = {}

    def about(self, action: str) -> _About:
        found = self._about.get(action)
        if found is None:
            lower = action.lower()
            found = self._about[action] = _About([s for s in self._statements if s.covers(lower)])
        return found


class _About:
    """The statements of a policy about one action, in the policy's order; each is a bit of the masks below.

    All statements that read the same of a request are asked together (``_Column``), and what the
    answer was is remembered, so that a hundred statements cost little more than one.
    """

    __slots__ = ("_columns", "_conditional", "_named", "_pairs", "_statements", "denies")

    def __init__(self, statements: Sequence[_Statement]) -> None:
        self._statements = statements
        self._named: dict[tuple[str, str], tuple[int, int]] = {}
        self.denies = 0
        readers: dict[tuple[str, ...], dict[Test, int]] = {}
        for number, statement in enumerate(statements):
            self.denies |= 0 if statement.allow else 1 << number
            for test in statement.tests:
                asking = readers.setdefault(test.keys, {})
                asking[test] = asking.get(test, 0) | 1 << number
        columns = [_Column(keys, tests) for keys, tests in readers.items()]
        pairs = [column for column in columns if len(column.keys) == 1 and column.keys[0].startswith(_NAMED)]
        self._pairs = _Columns(pairs) if pairs else None
        self._columns = sorted(
            (column for column in columns if column not in pairs), key=lambda c: len(c.keys)
        )
        self._conditional = 0
        for column in columns:
            self._conditional |= column.bits

    def named(self, identity: _Identity) -> tuple[int, int]:
        """The statements that name the caller itself, and those that name its account."""
        key = (identity.arn, identity.principal_arn)
        masks = self._named.get(key)
        if masks is None:
            itself = account = 0
            for number, statement in enumerate(self._statements):
                match = statement.names(identity)
                itself |= (match == _ITSELF) << number
                account |= (match == _ITS_ACCOUNT) << number
            if len(self._named) >= 1024:  # many sessions of one role: forget, do not grow
                self._named.clear()
            masks = self._named[key] = itself, account
        return masks

    def applying(self, mask: int, context: _RequestContext) -> int:
        """Those of ``mask`` whose resource and conditions hold."""
        if not mask & self._conditional:
            return mask
        # Requests differ most in their encryption context: asked first, it leaves least to ask.
        if self._pairs is not None and mask & self._pairs.bits:
            mask ^= self._pairs.failing(mask & self._pairs.bits, context.named(self._pairs.keys))
        for column in self._columns:
            if asked := mask & column.bits:
                mask ^= column.failing(asked, read(column.keys, context))
        return mask

    def first(self, mask: int) -> _Statement:
        """The first statement of ``mask`` in the policy's order."""
        return self._statements[(mask & -mask).bit_length() - 1]


_Matchers = dict[Callable[[str], Any], list[tuple[int, Callable[[Any], Any], bool]]]
"""How a text is read -> the tests of what was read: statements, matcher, whether it is negated."""


class _Column:
    """The tests of many statements that read the same of a request."""

    __slots__ = ("_failing", "_matchers", "_tests", "bits", "keys")

    def __init__(self, keys: tuple[str, ...], tests: Mapping[Test, int]) -> None:
        self.keys = keys
        self._tests = tests
        self._matchers: dict[tuple[Values, ...], _Matchers | None] = {}
        self._failing: dict[tuple[int, Any], int] = {}
        self.bits = 0
        for bits in tests.values():
            self.bits |= bits

    def failing(self, asked: int, value: Any) -> int:
        """The statements of ``asked`` with a test that does not hold of ``value``."""
        failing = self._failing.get((asked, value))
        if failing is None:
            failing = self._ask(asked, value) & asked
            _remember(self._failing, (asked, value), failing)
        return failing

    def _ask(self, asked: int, value: Any) -> int:
        text, variables = (value, ()) if len(self.keys) == 1 else (value[0], value[1:])
        matchers = self._matchers_for(variables) if text.__class__ is str else None
        failing = 0
        if matchers is None:
            for test, bits in self._tests.items():
                if bits & asked and not test.holds(value):
                    failing |= bits
            return failing
        for prepare, tests in matchers.items():
            given = prepare(text)
            for bits, matches, negated in tests:
                if bits & asked and (given is None or not matches(given)) is not negated:
                    failing |= bits
        return failing

    def _matchers_for(self, variables: tuple[Values, ...]) -> _Matchers | None:
        """What asks one text, which is read once for all tests that read it alike; None where a test asks otherwise."""
        if variables in self._matchers:
            return self._matchers[variables]
        matchers: _Matchers = {}
        for test, bits in self._tests.items():
            if test.matcher_for is None:
                _remember(self._matchers, variables, None)
                return None
            matches = test.matcher_for(*variables)
            matchers.setdefault(test.prepare, []).append((bits, matches, test.negated))
        _remember(self._matchers, variables, matchers)
        return matchers


class _Columns:
    """Columns that read pairs by their name, most of which no request has: a hundred names are one question."""

    __slots__ = ("_columns", "_failing", "bits", "keys")

    def __init__(self, columns: Sequence[_Column]) -> None:
        self._columns = columns
        self._failing: dict[tuple[int, tuple[Values, ...]], int] = {}
        self.keys = tuple(column.keys[0] for column in columns)
        self.bits = 0
        for column in columns:
            self.bits |= column.bits

    def failing(self, asked: int, values: tuple[Values, ...]) -> int:
        """The statements of ``asked`` with a test that does not hold of its pair's value."""
        failing = self._failing.get((asked, values))
        if failing is None:
            failing = 0
            for column, value in zip(self._columns, values, strict=True):
                if left := asked & column.bits & ~failing:
                    failing |= column.failing(left, value)
            _remember(self._failing, (asked, values), failing)
        return failing


def _remember(answers: dict[Any, Any], question: Any, answer: Any) -> None:
    if len(answers) >= _REMEMBERED:  # values that never come again (a time): forget, do not grow
        answers.clear()
    answers[question] = answer


_REMEMBERED: Final = 64


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
    tests = compile_conditions(statement.get("Condition", {}), variables=variables, every_value=allow)
    resource = compile_resource(resources, negated=spared_resources, variables=variables)
    return _Statement(
        label=sid or label,
        allow=allow,
        principals=_principals(statement, kind),
        spares="NotPrincipal" in statement,
        covers=_covers(actions, spared_actions) if resources else _covers((), False),
        tests=tests if resource is None else (*tests, resource),
    )


def _covers(patterns: Sequence[str], negated: bool) -> Callable[[str], bool]:
    """Which actions; without a pattern none: a statement without Action or Resource has no effect."""
    # Actions ignore case: AWS KMS Developer Guide, "Permissions reference".
    matches = [wildcard_match(pattern.lower()) for pattern in patterns]
    if not matches:
        return lambda _: False
    return lambda action: any(match(action) for match in matches) != negated


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
            if value == "*" or re.fullmatch(_ACCOUNT, value) or re.fullmatch(_PRINCIPAL, value):
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
