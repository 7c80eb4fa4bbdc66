"""KMS's own errors: the code, the HTTP status, the text, in botocore's shape.

A ``KmsError`` is what the embedded KMS raises at the in-process door.  The other two doors
carry the same code, status and text: botocore makes its ``ClientError`` from them.
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

# Codes that AWS marks as faults of the service; every other code is the caller's, status 400.
_SERVICE_FAULTS = frozenset(
    {"DependencyTimeoutException", "KMSInternalException", "KeyUnavailableException", "InternalFailure"}
)


class KmsError(Exception):
    """A KMS operation was refused.

    ``code`` is AWS's exception name, ``message`` AWS's text (None where AWS sends none),
    ``status`` the HTTP status, ``operation_name`` the operation in AWS's CamelCase.
    ``response`` has the shape of ``botocore.exceptions.ClientError.response``.
    """

    def __init__(self, code: str, message: str | None = None, *, operation_name: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.operation_name = operation_name
        self.request_id = ""
        self.reasons: tuple[str, ...] = ()
        """What the caller in this process may know beyond AWS's text: the statement that denies, the conditions
        that do not hold.  No other door tells it."""

    @property
    def status(self) -> int:
        return 500 if self.code in _SERVICE_FAULTS else 400

    @property
    def response(self) -> dict[str, Any]:
        error = {"Code": self.code, "Message": self.message or ""}
        metadata = {"HTTPStatusCode": self.status, "RequestId": self.request_id}
        response: dict[str, Any] = {"Error": error, "ResponseMetadata": metadata}
        if self.message is not None:
            response["message"] = self.message
        return response

    def __str__(self) -> str:
        operation = f" ({self.operation_name})" if self.operation_name else ""
        return f"{self.code}{operation}: {self.message}" if self.message else f"{self.code}{operation}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.code, self.message, self.operation_name, self.request_id)


def _rebuild(code: str, message: str | None, operation_name: str, request_id: str) -> KmsError:
    error = KmsError(code, message, operation_name=operation_name)
    error.request_id = request_id
    return error


def new_uuid() -> str:
    """A random UUID (version 4, RFC 9562) as text; uuid.uuid4() takes five times as long, on every call."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return uuid_text(f"{digits[:12]}4{digits[13:16]}{variant}{digits[17:]}")


def uuid_text(digits: str) -> str:
    """32 hexadecimal digits as the text of a UUID."""
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def refuse(code: str, message: str | None = None) -> NoReturn:
    """Raise the KmsError of this code and text."""
    raise KmsError(code, message)
