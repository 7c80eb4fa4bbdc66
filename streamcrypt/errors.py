"""The errors of streamcrypt.  A caller needs to catch one class, StreamcryptError.

    StreamcryptError
    ├── IntegrityError                 something did not authenticate: tampered, truncated, swapped
    │   ├── FormatError                the bytes are not a message, or break the format
    │   └── WrappedKeyError (*)        a wrapped data key, or the context bound to it, was altered
    ├── KeyAccessError                 a key could not be used; .code is KMS's own error code
    │   ├── WrappedKeyError (*)
    │   ├── ContextMismatchError       the encryption context is not the one that was asked for
    │   └── KeyUnavailableError (+)    throttled, or the KMS is out of reach: worth a retry
    ├── TemporaryError                 worth a retry
    │   └── KeyUnavailableError (+)
    ├── LimitExceededError             a limit of the format, or one that the caller set
    ├── SourceError                    a source cannot be read, or changed while it was read
    └── DestinationError               a destination exists, or cannot be written

Errors cross process boundaries: every class here survives pickling with its attributes.
No error carries key material, plaintext, or a value that a check expected.
"""

from __future__ import annotations

from typing import Any


class StreamcryptError(Exception):
    """Base of every error that streamcrypt raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[StreamcryptError], args: tuple[Any, ...], state: dict[str, Any]) -> StreamcryptError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class IntegrityError(StreamcryptError):
    """Something did not authenticate: it was tampered with, truncated, or swapped."""


class FormatError(IntegrityError):
    """The bytes are not a message of the AWS Encryption SDK, or break its format.

    ``recognised`` is true when they begin like a message: then damage or tampering is
    likelier than a wrong file.
    """

    def __init__(self, message: str, *, recognised: bool = True) -> None:
        super().__init__(message)
        self.recognised = recognised


class KeyAccessError(StreamcryptError):
    """A key could not be used.

    ``code`` is KMS's own error code (``AccessDeniedException``, ``DisabledException`` …), or
    None where no KMS was asked; ``operation`` is the KMS operation; ``key`` names the key.
    """

    def __init__(
        self, message: str, *, code: str | None = None, operation: str | None = None, key: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.operation = operation
        self.key = key


class WrappedKeyError(KeyAccessError, IntegrityError):
    """A wrapped data key did not open: it, or the encryption context bound to it, was altered."""


class ContextMismatchError(KeyAccessError):
    """The message's encryption context does not hold the pairs that the caller requires."""


class TemporaryError(StreamcryptError):
    """A failure that a later attempt may not meet: throttling, or a service out of reach."""


class KeyUnavailableError(KeyAccessError, TemporaryError):
    """The KMS throttled the call or could not be reached; worth a retry."""


class LimitExceededError(StreamcryptError):
    """A limit of the message format, or one that the caller set, would be exceeded."""


class SourceError(StreamcryptError):
    """A source cannot be read, is of the wrong kind, or changed while it was read."""


class DestinationError(StreamcryptError):
    """A destination exists already, is of the wrong kind, or cannot be written."""
