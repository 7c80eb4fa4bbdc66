"""Audit: every call becomes one compact row, and an event in CloudTrail's shape only when it is read.

    audit   id | time | operation | caller | key | error | detail
            key: the ARNs of the keys used, separated by a space; detail: JSON, see ``row``

A row costs a few microseconds and one INSERT, so that a call of the embedded KMS can afford it;
``event`` spends what the CloudTrail form costs when somebody looks.  No plaintext, ciphertext,
signature, import or grant token ever enters a row: what is not known to be harmless stays out.

Source: AWS KMS Developer Guide, "Logging AWS KMS API calls with AWS CloudTrail" (2025 form).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from streamcrypt.errors import SourceError
from streamcrypt.kms.errors import new_uuid
from streamcrypt.kms.policy import Caller
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    operation TEXT NOT NULL,
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    error TEXT,
    detail TEXT NOT NULL
)"""
INTO: Final = "INSERT INTO audit (time, operation, caller, key, error, detail)"
INSERT: Final = f"{INTO} VALUES (?, ?, ?, ?, ?, ?)"
"""Takes what ``row`` and ``service_row`` return."""
COLUMNS: Final = ("id", "time", "operation", "caller", "key", "error", "detail")
"""What ``Filter.select`` reads and ``event`` expects."""

Row = tuple[Any, ...]

# The members of requests that CloudTrail shows.  By name, not by exclusion: a blob that came as text, a
# token, or a member that nobody knows (a misspelt Plaintext) stays out.
_LOGGED: Final = frozenset(
    {
        "AliasName", "BypassPolicyLockoutSafetyCheck", "Constraints", "CustomKeyStoreId", "CustomerMasterKeySpec",
        "Description", "DestinationEncryptionAlgorithm", "DestinationEncryptionContext", "DestinationKeyId", "DryRun",
        "DryRunModifiers", "EncapsulationAlgorithm", "EncryptionAlgorithm", "EncryptionContext", "ExpirationModel",
        "GrantId", "GranteePrincipal", "GranteeServicePrincipal", "ImportType", "IncludeKeyMaterial",
        "KeyAgreementAlgorithm", "KeyId", "KeyMaterialDescription", "KeyMaterialId", "KeyPairSpec", "KeySpec",
        "KeyUsage", "Limit", "MacAlgorithm", "Marker", "MessageType", "MultiRegion", "Name", "NumberOfBytes",
        "Operations", "Origin", "PendingWindowInDays", "Policy", "PolicyName", "PrimaryRegion", "ReplicaRegion",
        "ResourceOwners", "RetiringPrincipal", "RetiringServicePrincipal", "RotationPeriodInDays", "SigningAlgorithm",
        "SourceEncryptionAlgorithm", "SourceEncryptionContext", "SourceKeyId", "TagKeys", "Tags", "TargetKeyId",
        "ValidTo", "WrappingAlgorithm", "WrappingKeySpec", "XksKeyId",
    }
)  # fmt: skip
# Members of responses that CloudTrail records under responseElements; cryptographic operations have none.
_RESPONSE_ELEMENTS: Final = {
    "CreateKey": ("KeyMetadata",),
    "ReplicateKey": ("ReplicaKeyMetadata", "ReplicaPolicy", "ReplicaTags"),
    "CreateGrant": ("GrantId", "KeyId"),
    "ScheduleKeyDeletion": ("KeyId", "KeyState", "DeletionDate", "PendingWindowInDays"),
    "CancelKeyDeletion": ("KeyId",),
    "RotateKeyOnDemand": ("KeyId",),
    "ImportKeyMaterial": ("KeyId", "KeyMaterialId"),
    "DeleteImportedKeyMaterial": ("KeyId", "KeyMaterialId"),
}
_CHANGING: Final = (
    "Create", "Delete", "Update", "Put", "Enable", "Disable", "Schedule", "Cancel", "Rotate", "Import",
    "Replicate", "Revoke", "Retire", "Tag", "Untag",
)  # fmt: skip
# CloudTrail shows the algorithm also when the request left it to its default.
_DEFAULTS: Final = {
    "Encrypt": {"encryptionAlgorithm": "SYMMETRIC_DEFAULT"},
    "Decrypt": {"encryptionAlgorithm": "SYMMETRIC_DEFAULT"},
    "ReEncrypt": {
        "sourceEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        "destinationEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
    },
}
_CONTEXTS: Final = frozenset(
    {
        "EncryptionContext", "SourceEncryptionContext", "DestinationEncryptionContext",
        "EncryptionContextEquals", "EncryptionContextSubset",
    }
)  # fmt: skip
_SERVICE_CALLER: Final = "AWS Internal"
_EVENT_IDS: Final = "5f1cf7ac-6f5b-4f0b-9d2e-0a4c3c1be5d1"  # ours: event ids follow from request ids


def _plain(value: object) -> Any:
    """JSON's way out for what it does not know: a date becomes text, anything else (a blob) nothing."""
    return value.isoformat() if isinstance(value, datetime) else None


_encode = json.JSONEncoder(separators=(",", ":"), skipkeys=True, check_circular=False, default=_plain).encode


def row(
    time: float,
    operation: str,
    caller: Caller,
    request: Mapping[str, Any],
    response: Mapping[str, Any] | None,
    *,
    request_id: str,
    keys: Sequence[str] = (),
    key_spec: str | None = None,
    region: str = "local",
    error: str | None = None,
    message: str | None = None,
    tls: bool | str = False,
) -> Row:
    """The row of one call, for INSERT; a few microseconds.

    ``request`` and ``response`` in boto3's shapes; ``keys`` the ARNs of the keys used (ReEncrypt:
    source, destination); ``error`` the exception's name; ``tls`` the protocol version where the
    door knows it.
    """
    detail: dict[str, Any] = {
        "id": request_id,
        "region": region,
        "parameters": {
            name: value for name, value in request.items() if name in _LOGGED and value.__class__ is not bytes
        },
        "ip": caller.source_ip,
        "agent": caller.user_agent,
    }
    if key_spec is not None:
        detail["spec"] = key_spec
    if caller.access_key_id is not None:
        detail["access_key"] = caller.access_key_id
    if caller.via_service is not None:
        detail["via"] = caller.via_service
    if caller.role is not None:
        detail["role"] = caller.role
    if tls:
        detail["tls"] = tls
    if message is not None:
        detail["message"] = message
    if response is not None:
        elements = _RESPONSE_ELEMENTS.get(operation)
        if elements is not None:
            detail["response"] = {name: response[name] for name in elements if name in response}
        elif "KeyMaterialId" in response:
            detail["material"] = response["KeyMaterialId"]
    return time, operation, caller.arn, " ".join(keys), error, _encode(detail)


def service_row(time: float, event_name: str, key: str, *, region: str = "local") -> Row:
    """The row of what KMS did by itself: ``DeleteKey`` at the end of the window, ``RotateKey``."""
    return time, event_name, _SERVICE_CALLER, key, None, _encode({"id": new_uuid(), "region": region})


def event(row: Row) -> dict[str, Any]:
    """The CloudTrail event of a row that was read with ``Filter.select``."""
    import uuid

    _, time, operation, caller_arn, key_text, error, detail_text = row
    detail = json.loads(detail_text)
    keys = key_text.split()
    by_service = caller_arn == _SERVICE_CALLER
    account = _account(keys[0]) if keys else _account(caller_arn)
    parameters = {**_DEFAULTS.get(operation, {}), **_camel(detail.get("parameters", {}))}
    made: dict[str, Any] = {
        "eventVersion": "1.11",
        "userIdentity": (
            {"accountId": account, "invokedBy": _SERVICE_CALLER}
            if by_service
            else _user_identity(caller_arn, detail)
        ),
        "eventTime": datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "eventSource": "kms.amazonaws.com",
        "eventName": operation,
        "awsRegion": detail["region"],
        "sourceIPAddress": detail.get("ip", _SERVICE_CALLER),
        "userAgent": detail.get("agent", _SERVICE_CALLER),
        "requestParameters": parameters or None,
        "responseElements": _camel(detail["response"]) if "response" in detail else None,
        "requestID": detail["id"],
        "eventID": str(uuid.uuid5(uuid.UUID(_EVENT_IDS), detail["id"])),
        "readOnly": not operation.startswith(_CHANGING),
        "resources": [{"accountId": _account(arn), "type": "AWS::KMS::Key", "ARN": arn} for arn in keys],
        "eventType": "AwsServiceEvent" if by_service else "AwsApiCall",
        "managementEvent": True,
        "recipientAccountId": account,
        "eventCategory": "Management",
    }
    if error is not None:
        # AccessDenied is the one code that CloudTrail shortens.
        made["errorCode"] = "AccessDenied" if error == "AccessDeniedException" else error
        made["errorMessage"] = detail.get("message", "")
    additional = {"keyMaterialId": detail.get("material"), "keySpec": detail.get("spec")}
    if any(additional.values()):
        # keySpec is ours: with it the cost of a call follows from its event alone.
        made["additionalEventData"] = {name: value for name, value in additional.items() if value}
    if isinstance(detail.get("tls"), str):
        made["tlsDetails"] = {"tlsVersion": detail["tls"]}
    return made


def _user_identity(arn: str, detail: Mapping[str, Any]) -> dict[str, Any]:
    account = _account(arn)
    if not account:
        return {"type": "AWSService", "invokedBy": arn}
    resource = arn.split(":", 5)[5]
    kind, _, name = resource.partition("/")
    import hashlib

    # Unique ids belong to IAM; ours are made from the ARN, so that equal principals have equal ids.
    unique = base64.b32encode(hashlib.sha256(arn.encode()).digest()).decode()[:17]
    identity: dict[str, Any] = {"type": "Root", "principalId": account, "arn": arn, "accountId": account}
    if kind == "user":
        identity |= {"type": "IAMUser", "principalId": f"AIDA{unique}", "userName": name.rpartition("/")[2]}
    elif kind == "assumed-role":
        role_name, _, session = name.partition("/")
        role = detail.get("role") or f"arn:{arn.split(':')[1]}:iam::{account}:role/{role_name}"
        issuer = {"type": "Role", "arn": role, "accountId": account, "userName": role_name}
        identity |= {
            "type": "AssumedRole",
            "principalId": f"AROA{unique}:{session}",
            "sessionContext": {"sessionIssuer": issuer},
        }
    elif kind == "role":
        identity |= {"type": "Role", "principalId": f"AROA{unique}"}
    elif kind == "federated-user":
        identity |= {"type": "FederatedUser", "principalId": f"{account}:{name}"}
    if "access_key" in detail:
        identity["accessKeyId"] = detail["access_key"]
    if "via" in detail:
        identity["invokedBy"] = detail["via"].partition(".")[0] + ".amazonaws.com"
    return identity


def _camel(value: Any, *, names: bool = True) -> Any:
    """CloudTrail's names begin with a small letter; the names in an encryption context are the caller's own."""
    if isinstance(value, dict):
        return {
            name[:1].lower() + name[1:] if names else name: _camel(inner, names=name not in _CONTEXTS)
            for name, inner in value.items()
        }
    return [_camel(inner) for inner in value] if isinstance(value, list) else value


def _account(arn: str) -> str:
    parts = arn.split(":", 5)
    return parts[4] if len(parts) == 6 else ""


# --- reading --------------------------------------------------------------------------------------


class Filter(NamedTuple):
    """Which events: every given field must match.  Times are Unix seconds."""

    since: float | None = None
    until: float | None = None
    principal: str | None = None
    """A part of the ARN."""
    operation: str | None = None
    key: str | None = None
    """Key ARN or id."""
    context: Mapping[str, str] = MappingProxyType({})
    """Pairs that the encryption context holds."""
    error: str | None = None
    """An error code, ``*`` for any error, '' for success only."""

    def select(self, *, after: int = 0, limit: int | None = None) -> tuple[str, list[Any]]:
        """SQL and parameters for rows of the audit table, oldest first; ``after``: rows with a higher id.

        With ``limit`` the newest that many.
        """
        where, values = ["id > ?"], [after]  # type: tuple[list[str], list[Any]]
        if self.since is not None:
            where.append("time >= ?")
            values.append(self.since)
        if self.until is not None:
            where.append("time < ?")
            values.append(self.until)
        if self.principal is not None:
            where.append("instr(caller, ?)")
            values.append(self.principal)
        if self.operation is not None:
            where.append("operation = ?")
            values.append(self.operation)
        if self.key is not None:
            where.append("instr(key, ?)")
            values.append(self.key)
        if self.error is not None:
            where.append({"": "error IS NULL", "*": "error IS NOT NULL"}.get(self.error, "error = ?"))
            if self.error not in ("", "*"):
                values.append(_exception_name(self.error))
        for name, value in self.context.items():
            alternatives = " OR ".join(_HOLDS_PAIR for _ in _CONTEXT_PATHS)
            where.append(f"({alternatives})")
            for path in _CONTEXT_PATHS:
                values += [path, name, value]
        # The conditions are constants of this module; every value is a parameter.
        columns, condition = ", ".join(COLUMNS), " AND ".join(where)
        if limit is None:
            return f"SELECT {columns} FROM audit WHERE {condition} ORDER BY id", values  # noqa: S608
        newest = f"SELECT {columns} FROM audit WHERE {condition} ORDER BY id DESC LIMIT ?"  # noqa: S608
        return f"SELECT * FROM ({newest}) ORDER BY id", [*values, limit]  # noqa: S608

    def matches(self, event: Mapping[str, Any]) -> bool:
        """Whether a CloudTrail event passes."""
        error = event.get("errorCode")
        if self.error is not None and not (
            error is None
            if self.error == ""
            else error is not None and self.error in ("*", error, _exception_name(error))
        ):
            return False
        if self.operation is not None and event.get("eventName") != self.operation:
            return False
        if self.principal is not None and self.principal not in principal_of(event):
            return False
        if self.key is not None and not any(self.key in key for key in keys_of(event)):
            return False
        if self.since is not None or self.until is not None:
            time = time_of(event)
            if (self.since is not None and time < self.since) or (
                self.until is not None and time >= self.until
            ):
                return False
        contexts = contexts_of(event)
        return all(any(held.get(name) == value for held in contexts) for name, value in self.context.items())


_CONTEXT_PATHS: Final = (
    "$.parameters.EncryptionContext",
    "$.parameters.SourceEncryptionContext",
    "$.parameters.DestinationEncryptionContext",
    "$.parameters.Constraints.EncryptionContextEquals",
    "$.parameters.Constraints.EncryptionContextSubset",
)
_HOLDS_PAIR: Final = (
    "EXISTS (SELECT 1 FROM json_each(detail, ?) AS pair WHERE pair.key = ? AND pair.value = ?)"
)


def _exception_name(code: str) -> str:
    return "AccessDeniedException" if code == "AccessDenied" else code


def principal_of(event: Mapping[str, Any]) -> str:
    """The caller's ARN, or the service that called."""
    identity = event.get("userIdentity") or {}
    return str(identity.get("arn") or identity.get("invokedBy") or identity.get("principalId") or "")


def keys_of(event: Mapping[str, Any]) -> list[str]:
    """ARNs of the keys that a call used; where it came to none, the key as the request named it."""
    resources = [str(resource["ARN"]) for resource in event.get("resources") or () if "ARN" in resource]
    parameters = event.get("requestParameters") or {}
    named = [parameters[name] for name in ("keyId", "sourceKeyId", "destinationKeyId") if name in parameters]
    return [arn for arn in resources if ":key/" in arn] or named


def contexts_of(event: Mapping[str, Any]) -> list[dict[str, str]]:
    """The encryption contexts of a call: one, ReEncrypt's two, or those of a grant's constraints."""
    parameters = event.get("requestParameters") or {}
    constraints = parameters.get("constraints") or {}
    found = [parameters.get(name[:1].lower() + name[1:]) for name in sorted(_CONTEXTS)]
    found += [constraints.get("encryptionContextEquals"), constraints.get("encryptionContextSubset")]
    return [context for context in found if context]


def time_of(event: Mapping[str, Any]) -> float:
    """Unix seconds of an event; 0 where it has no readable time."""
    try:
        return datetime.fromisoformat(str(event.get("eventTime"))).timestamp()
    except ValueError:
        return 0.0


def follow(
    read: Callable[[int], Sequence[Row]], wait: Callable[[], bool], *, after: int = 0
) -> Iterator[dict[str, Any]]:
    """Events as they come: ``read(after)`` gives newer rows; when there are none ``wait()`` is called, False ends."""
    while True:
        rows = read(after)
        for found in rows:
            after = found[0]
            yield event(found)
        if not rows and not wait():
            return


def read_cloudtrail(paths: Iterable[Path | str]) -> Iterator[dict[str, Any]]:
    """The KMS events of CloudTrail files, plain or gzip, file by file.

    A file holds ``{"Records": […]}``, an array, one event, or one event a line (after its time, as
    CloudWatch Logs exports them); what ``kms audit --json`` wrote reads the same, and so do the answer
    of ``aws cloudtrail lookup-events`` and events that EventBridge delivered.  A folder means the
    ``.json``, ``.jsonl`` and ``.gz`` files below it.  SourceError names the file that is none of these.
    """
    from pathlib import Path

    for path in paths:
        for file in _files(Path(path)):
            for found in _records(file):
                if found.get("eventSource") == "kms.amazonaws.com":
                    yield found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.name.endswith((".json", ".jsonl", ".gz")) and file.is_file()
    )


def _records(path: Path) -> list[dict[str, Any]]:
    import gzip
    import zlib

    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read as a CloudTrail log: {error}") from error
    try:
        return _flatten(json.loads(text))
    except ValueError:
        pass
    try:
        # Not splitlines(): JSON may hold what that takes for the end of a line.
        lines = (line for line in text.split("\n") if line.strip())
        return [found for line in lines for found in _flatten(json.loads(re.sub(_TIME, "", line, count=1)))]
    except ValueError as error:
        raise SourceError(f"{path}: is not a CloudTrail log: {error}") from error


_TIME: Final = r"^\d{4}-\d\d-\d\dT[\d:.]+Z (?={)"


def _flatten(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        for name in ("Records", "Events", "events"):
            if isinstance(value.get(name), list):
                return _flatten(value[name])
        return [_unwrapped(value)]
    if not isinstance(value, list) or not all(isinstance(inner, dict) for inner in value):
        raise ValueError("no records")
    return [_unwrapped(inner) for inner in value]


def _unwrapped(record: dict[str, Any]) -> dict[str, Any]:
    """The event itself: LookupEvents answers with it as text, EventBridge puts it into another one."""
    inner = record.get("CloudTrailEvent", record.get("detail"))
    if isinstance(inner, str):
        inner = json.loads(inner)
    return inner if isinstance(inner, dict) else record
