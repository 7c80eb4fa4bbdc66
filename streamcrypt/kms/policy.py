"""Who may do what with a key: key policies, identity policies and grants, evaluated as AWS KMS does.

SIGNATURES FIRST, for those who call them; the bodies follow within the hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | bool | int | float | Sequence[str]
"""A condition key's value; a sequence for the multi-valued keys."""


class PolicyError(Exception):
    """A policy or grant that AWS KMS would refuse: ``code`` and ``message`` as AWS answers (HTTP 400).

    Codes: MalformedPolicyDocumentException, LimitExceededException, ValidationException, InvalidArnException.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.  ``arn`` is a user, an assumed-role session, an account's root, or a service (``x.amazonaws.com``)."""

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
    """Further condition keys of the request: aws:PrincipalOrgID, aws:SourceArn, aws:SourceAccount …"""

    @property
    def account(self) -> str:
        """The twelve digits ('' for a service)."""
        raise NotImplementedError


ROOT = Caller("arn:aws:iam::000000000000:root")


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What conditions may ask about a key.  Plain values; build one per key and keep it."""

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
    """A principal ARN, or a service principal."""
    operations: frozenset[str]
    """``Decrypt``, ``ReEncryptFrom`` …"""
    retiring: str | None = None
    issuing_account: str = ""
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
    """ARN where it is not the key's: an alias ARN; ``*`` where there is none.  Default: the key's ARN."""
    encryption_context: Mapping[str, str] | None = None
    """None: the operation takes none.  {}: it takes one and none was sent."""
    conditions: Mapping[str, Value] = field(default_factory=dict)
    """Keys of this operation by AWS's names: ``{"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    "kms:RequestAlias": "alias/ml", "kms:GrantOperations": [...], "kms:SigningAlgorithm": …}``."""
    new_grant: Grant | None = None
    """kms:CreateGrant only: the grant asked for, so that a parent grant's limits can be checked."""
    time: float | None = None
    """Unix seconds, for aws:CurrentTime; None: the clock."""


Source = Literal["key policy", "identity policy", "grant", "account root", ""]


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer.  ``allowed``; ``source`` of the decision; ``statement`` (Sid or index) or grant id; ``reason`` in AWS's words."""

    allowed: bool
    reason: str
    """``because no resource-based policy allows the kms:Decrypt action`` …; for an allow, which rule allowed."""
    source: Source = ""
    statement: str = ""

    def message(self, request: Request, *, by_ciphertext: bool = False) -> str:
        """The text of AccessDeniedException; ``by_ciphertext``: Decrypt or ReEncryptFrom without a KeyId."""
        raise NotImplementedError


def evaluate(request: Request, key_policy: str | None, grants: Iterable[Grant] = ()) -> Decision:
    """Whether ``request`` is allowed.  ``key_policy`` None: the key does not exist, or there is none (IAM-only actions)."""
    raise NotImplementedError


def unknown_key_message(caller: Caller, action: str) -> str:
    """AccessDeniedException's text for a caller of another account and a key that does not exist."""
    raise NotImplementedError


def default_key_policy(account: str) -> str:
    """The policy of a key that was created without one: the account's IAM policies decide."""
    raise NotImplementedError


def check_key_policy(text: str, request: Request, *, bypass_lockout_check: bool = False) -> None:
    """PolicyError unless ``text`` may become a key policy: syntax, principals, size, and the lockout check:
    the caller of ``request`` (its action is ignored) must be able to PutKeyPolicy afterwards."""
    raise NotImplementedError


def check_identity_policy(text: str) -> None:
    """PolicyError(MalformedPolicyDocumentException) unless ``text`` is an identity policy."""
    raise NotImplementedError


def check_new_grant(grant: Grant, key: KeyFacts) -> None:
    """PolicyError(ValidationException, InvalidArnException) unless ``grant`` suits the key: principals, operations
    that the key's spec and usage can do, constraints only on symmetric keys (at most 8 pairs, values to 384)."""
    raise NotImplementedError


def may_retire(caller: Caller, grant: Grant) -> bool:
    """Retiring principal, the grantee of a grant with RetireGrant, or the account that issued the grant."""
    raise NotImplementedError


def grant_applies(grant: Grant, caller: Caller, operation: str, context: Mapping[str, str] | None) -> bool:
    """Whether a grant alone covers this call (without IAM)."""
    raise NotImplementedError
