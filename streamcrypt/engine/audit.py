"""A line of the audit file: who did what with which message, and how it ended.  No secret is in it."""

from __future__ import annotations

import functools
import os
from typing import Any

from streamcrypt.errors import StreamcryptError
from streamcrypt.keys.keyring import KMS_PROVIDER, KMS_RSA_PROVIDER, describe_wrapped_key, printable
from streamcrypt.message.header import EncryptedDataKey, parse_header


def audit_line(
    operation: str, path: str, header: bytes | None, plaintext_length: int, error: StreamcryptError | None
) -> dict[str, Any]:
    """The line for one object; ``header`` is the header of its message, or what is known to begin with it."""
    from datetime import UTC, datetime

    line: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(),
        "caller": _caller(),
        "operation": operation,
        "path": path,
        "outcome": "done" if error is None else type(error).__name__,
    }
    if error is not None:
        line["error"] = str(error)
    if header is None:
        return line
    try:
        found, _ = parse_header(header, max_encrypted_data_keys=None)
    except StreamcryptError:
        return line  # what failed was no message
    return line | {
        "message_id": found.message_id.hex(),
        "context": dict(found.context),
        "keys": [_name_of(key) for key in found.encrypted_data_keys],
        "bytes": plaintext_length,
    }


def _name_of(key: EncryptedDataKey) -> str:
    """The ARN of a KMS's key, as its own log has it; in words what has none."""
    if key.provider_id in (KMS_PROVIDER, KMS_RSA_PROVIDER):
        return printable(key.info)
    return describe_wrapped_key(key)


@functools.cache
def _caller() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())
