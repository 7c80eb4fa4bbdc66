"""One request on its way through KMS's checks, in AWS's order.

    shape -> cross-field rules -> key resolution -> authorization -> key state
          -> key usage and algorithm -> the cryptography -> the answer of a dry run

An operation is a function of a Call.  The Call knows who asks, where and when, and refuses in
AWS's words; whatever it resolved goes into the audit row, also when the call then fails.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NoReturn, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC

from streamcrypt.kms import managed, material, policy
from streamcrypt.kms.errors import KmsError, refuse
from streamcrypt.kms.store import Key, Material, Store, key_arn

DEFAULT_ACCOUNT: Final = "000000000000"

# Patterns are text: `re` compiles each when it is first used, not when the module is imported.
_KEY_ID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32}"
_ARN: Final = r"arn:aws[a-z0-9-]*:kms:([^:]*):([0-9]{12}):(key|alias)/(.+)"

# Operations that a principal of another account may use (AWS's guide, "cross-account use").
_CROSS_ACCOUNT: Final = frozenset(
    {
        "CreateGrant", "Decapsulate", "Decrypt", "DeriveSharedSecret", "DescribeKey", "Encapsulate", "Encrypt",
        "GenerateDataKey", "GenerateDataKeyPair", "GenerateDataKeyPairWithoutPlaintext",
        "GenerateDataKeyWithoutPlaintext", "GenerateMac", "GetKeyRotationStatus", "GetPublicKey", "ListGrants",
        "ReEncrypt", "RetireGrant", "RevokeGrant", "Sign", "Verify", "VerifyMac",
    }
)  # fmt: skip

_GRANT_TOKEN_VERSION: Final = b"\x01"
_GRANT_ID_LENGTH: Final = 32
_TOKEN_NONCE_LENGTH: Final = 16
_TOKEN_MAC_LENGTH: Final = 32

_T = TypeVar("_T")


class Call:
    """A request, its circumstances, and the checks that it must pass.

    ``grant_delay``: seconds until a new grant works without its token; AWS says "usually within five
    minutes".  ``prepared`` is material made before the transaction began, because making it takes
    long.  ``keys`` are those that this call resolved, for the audit row.
    """

    __slots__ = (
        "caller",
        "grant_delay",
        "keys",
        "now",
        "operation",
        "prepared",
        "region",
        "request",
        "store",
    )

    def __init__(
        self,
        store: Store,
        operation: str,
        request: dict[str, Any],
        caller: policy.Caller,
        region: str,
        now: float,
        *,
        grant_delay: float = 0.0,
        prepared: bytes = b"",
    ) -> None:
        self.store = store
        self.operation = operation
        self.request = request
        self.caller = caller
        self.region = region
        self.now = now
        self.grant_delay = grant_delay
        self.prepared = prepared
        self.keys: list[Key] = []

    @property
    def account(self) -> str:
        return self.caller.account or DEFAULT_ACCOUNT

    # -- resolution --------------------------------------------------------------------------

    def resolve(self, reference: str, *, action: str | None = None, aliases: bool = True) -> Key:
        """The key that ``reference`` names; NotFoundException or AccessDeniedException as AWS answers."""
        region, account, kind, name = _parse(reference, self.region, self.account, aliases)
        if region != self.region:
            refuse("NotFoundException", f"Invalid arn {region}")
        if account != self.account and self.operation not in _CROSS_ACCOUNT:
            raise self._denied(action)
        key_id: str | None = name
        if kind == "alias":
            key_id = self.store.alias_target(account, region, name)
            if key_id is None and managed.is_managed_alias(name) and account == self.account:
                key_id = managed.ensure_key(self.store, account, region, name, self.now)
            if key_id is None:
                if account != self.account:
                    raise self._denied(action)
                alias_arn = f"arn:aws:kms:{region}:{account}:{name}"
                refuse("NotFoundException", f"Alias {alias_arn} is not found.")
        key = self.store.key(account, region, key_id or "")
        if key is None:
            if account != self.account:
                raise self._denied(action)
            refuse("NotFoundException", f"Key '{key_arn(account, region, key_id or '')}' does not exist")
        self.keys.append(key)
        return key

    def key_of_blob(self, key_id: str, action: str) -> Key:
        """The key that a ciphertext names; a stranger cannot tell an absent key from a forbidden one."""
        for account in self.store.owners(key_id):
            key = self.store.key(account, self.region, key_id)
            if key is not None:
                self.keys.append(key)
                return key
        raise self._denied(action, by_ciphertext=True)

    def _denied(self, action: str | None, *, by_ciphertext: bool = False) -> KmsError:
        text = policy.unknown_key_message(self.caller, action or f"kms:{self.operation}")
        if by_ciphertext:
            text = text.replace(" on this resource ", " on the resource associated with this ciphertext ")
        return KmsError("AccessDeniedException", text)

    # -- authorization -----------------------------------------------------------------------

    def authorize(
        self,
        key: Key,
        action: str | None = None,
        *,
        context: Mapping[str, str] | None = None,
        conditions: Mapping[str, policy.Value] | None = None,
        new_grant: policy.Grant | None = None,
        reference: str | None = None,
        by_ciphertext: bool = False,
    ) -> None:
        """AccessDeniedException unless key policy, identity policies or grants allow the action."""
        asked = dict(conditions) if conditions else {}
        if reference is not None and "alias/" in reference:
            asked["kms:RequestAlias"] = reference[reference.index("alias/") :]
        request = policy.Request(
            self.caller,
            action or f"kms:{self.operation}",
            key=key.facts,
            encryption_context=context,
            conditions=asked,
            new_grant=new_grant,
            time=self.now,
        )
        grants: Sequence[policy.Grant] = ()
        if key.grants or self.request.get("GrantTokens"):
            grants = [record.grant for record in self._effective_grants(key)]
        decision = policy.evaluate(request, key.key_policy, grants)
        if not decision.allowed:
            error = KmsError("AccessDeniedException", decision.message(request, by_ciphertext=by_ciphertext))
            error.reasons = policy.reasons(decision, request, key.key_policy, grants)
            raise error

    def authorize_account(
        self,
        action: str | None = None,
        *,
        resource: str = "*",
        conditions: Mapping[str, policy.Value] | None = None,
    ) -> None:
        """The same for what identity policies alone decide: CreateKey, ListKeys, an alias's own permission."""
        request = policy.Request(
            self.caller,
            action or f"kms:{self.operation}",
            resource=resource,
            conditions=conditions or {},
            time=self.now,
        )
        decision = policy.evaluate(request, None)
        if not decision.allowed:
            refuse("AccessDeniedException", decision.message(request))

    def _effective_grants(self, key: Key) -> list[Any]:
        tokens = {self.read_grant_token(token) for token in self.request.get("GrantTokens") or ()}
        return [
            record
            for record in key.grants
            if record.created + self.grant_delay <= self.now or record.grant.grant_id in tokens
        ]

    def new_grant_token(self, grant_id: str) -> str:
        body = _GRANT_TOKEN_VERSION + bytes.fromhex(grant_id) + os.urandom(_TOKEN_NONCE_LENGTH)
        return base64.urlsafe_b64encode(body + self._token_mac(body)).decode().rstrip("=")

    def read_grant_token(self, token: str) -> str:
        """The grant that a token stands for; InvalidGrantTokenException for what is no token of ours."""
        from cryptography.hazmat.primitives.constant_time import bytes_eq

        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except ValueError:
            refuse("InvalidGrantTokenException", "The grant token is not valid.")
        body, given = raw[:-_TOKEN_MAC_LENGTH], raw[-_TOKEN_MAC_LENGTH:]
        whole = len(_GRANT_TOKEN_VERSION) + _GRANT_ID_LENGTH + _TOKEN_NONCE_LENGTH
        if len(body) != whole or not bytes_eq(self._token_mac(body), given):
            refuse("InvalidGrantTokenException", "The grant token is not valid.")
        return body[1 : 1 + _GRANT_ID_LENGTH].hex()

    def _token_mac(self, body: bytes) -> bytes:
        mac = HMAC(self.store.secret(b"grant token"), hashes.SHA256())
        mac.update(body)
        return mac.finalize()

    # -- state, usage, algorithm -----------------------------------------------------------------

    def require_enabled(self, key: Key) -> None:
        """DisabledException or KMSInvalidStateException unless the key may be used."""
        if key.state in ("Enabled", "Updating"):
            return
        if key.state == "Disabled":
            refuse("DisabledException", f"{key.arn} is disabled.")
        self.refuse_state(key)

    def refuse_state(self, key: Key) -> NoReturn:
        words = {
            "PendingDeletion": "is pending deletion",
            "PendingReplicaDeletion": "is pending deletion",
            "PendingImport": "is pending import",
            "Creating": "is creating",
            "Updating": "is updating",
            "Unavailable": "is unavailable",
            "Disabled": "is disabled",
        }
        refuse("KMSInvalidStateException", f"{key.arn} {words[key.state]}.")

    def require_not_pending_deletion(self, key: Key) -> None:
        if key.state in ("PendingDeletion", "PendingReplicaDeletion"):
            self.refuse_state(key)

    def require_usage(self, key: Key, usage: str, operation: str | None = None) -> None:
        if key.usage != usage:
            refuse(
                "InvalidKeyUsageException",
                f"{key.arn} key usage is {key.usage} which is not valid for {operation or self.operation}.",
            )

    def require_algorithm(self, key: Key, algorithm: str) -> None:
        if algorithm not in material.SPECS[key.spec].usages[key.usage]:
            refuse(
                "InvalidKeyUsageException", f"Algorithm {algorithm} is incompatible with key spec {key.spec}."
            )

    # -- material ----------------------------------------------------------------------------------

    def current_material(self, key: Key) -> Material:
        current = key.current
        if current is None or current.sealed is None:
            refuse("KMSInvalidStateException", f"{key.arn} is pending import.")
        return current

    def open(self, key: Key, generation: Material | None = None) -> bytes:
        return self.store.open_material(key, generation or self.current_material(key))

    # -- pages -------------------------------------------------------------------------------------

    def page_limit(self, *, default: int, most: int) -> int:
        limit = int(self.request.get("Limit") or default)
        if limit > most:
            refuse(
                "ValidationException",
                f"1 validation error detected: Value '{limit}' at 'limit' failed to satisfy constraint: "
                f"Member must have value less than or equal to {most}",
            )
        return limit

    def marker(self) -> str:
        """Where the last page ended: the name of its last entry."""
        given = self.request.get("Marker")
        if given is None:
            return ""
        try:
            text = base64.urlsafe_b64decode(given).decode()
        except ValueError:
            text = ""
        operation, _, place = text.partition(" ")
        if operation != self.operation or not place:
            refuse("InvalidMarkerException", "The marker is not valid.")
        return place

    def page(
        self, entries: Sequence[tuple[str, _T]], *, default: int, most: int, member: str
    ) -> dict[str, Any]:
        """One page of entries that are sorted by the name in front of each."""
        limit, after = self.page_limit(default=default, most=most), self.marker()
        rest = [entry for entry in entries if entry[0] > after]
        response: dict[str, Any] = {
            member: [value for _, value in rest[:limit]],
            "Truncated": len(rest) > limit,
        }
        if len(rest) > limit:
            text = f"{self.operation} {rest[limit - 1][0]}"
            response["NextMarker"] = base64.urlsafe_b64encode(text.encode()).decode()
        return response


def timestamp(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


@lru_cache(maxsize=1024)
def _parse(reference: str, region: str, account: str, aliases: bool) -> tuple[str, str, str, str]:
    """Region, account, "key" or "alias", and the id or the alias name with its prefix."""
    if reference.startswith("arn:"):
        match = re.fullmatch(_ARN, reference)
        if match is None:
            refuse("InvalidArnException", f"Invalid arn {reference}")
        region, account, kind, name = match.groups()
        if kind == "alias":
            name = f"alias/{name}"
        elif not re.fullmatch(_KEY_ID, name):
            refuse("NotFoundException", f"Invalid keyId '{name}'")
    elif reference.startswith("alias/"):
        kind, name = "alias", reference
    elif re.fullmatch(_KEY_ID, reference):
        kind, name = "key", reference
    else:
        refuse("NotFoundException", f"Invalid keyId '{reference}'")
    if kind == "alias" and not aliases:
        refuse("NotFoundException", f"Invalid keyId '{reference}'")
    return region, account, kind, name
