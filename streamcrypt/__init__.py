"""streamcrypt: encrypted datasets, tensors and streams in the AWS Encryption SDK's message format."""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it as true; importing `typing` for it would cost 3 ms
if TYPE_CHECKING:
    from streamcrypt.api import (
        Inspection,
        decrypt,
        decrypt_bytes,
        encrypt,
        encrypt_bytes,
        erase,
        inspect,
        open,
        rekey,
        verify,
    )
    from streamcrypt.engine.job import Failure, Progress, Report
    from streamcrypt.errors import (
        ContextMismatchError,
        DestinationError,
        FormatError,
        IntegrityError,
        KeyAccessError,
        KeyUnavailableError,
        LimitExceededError,
        SourceError,
        StreamcryptError,
        TemporaryError,
        WrappedKeyError,
    )
    from streamcrypt.fs import filesystem
    from streamcrypt.keys.cache import DataKeyCache
    from streamcrypt.kms import kms_client

__version__ = "0.1.0"

__all__ = [
    "ContextMismatchError",
    "DataKeyCache",
    "DestinationError",
    "Failure",
    "FormatError",
    "Inspection",
    "IntegrityError",
    "KeyAccessError",
    "KeyUnavailableError",
    "LimitExceededError",
    "Progress",
    "Report",
    "SourceError",
    "StreamcryptError",
    "TemporaryError",
    "WrappedKeyError",
    "decrypt",
    "decrypt_bytes",
    "encrypt",
    "encrypt_bytes",
    "erase",
    "filesystem",
    "inspect",
    "kms_client",
    "open",
    "rekey",
    "verify",
]

# Where a public name lives.  It is imported when it is first asked for: `streamcrypt --version` and a
# worker process need none of them (benchmarks/README.md, "start-up").
_HOMES = {
    "streamcrypt.api": (
        "Inspection", "decrypt", "decrypt_bytes", "encrypt", "encrypt_bytes", "erase", "inspect", "open", "rekey",
        "verify",
    ),
    "streamcrypt.engine.job": ("Failure", "Progress", "Report"),
    "streamcrypt.errors": (
        "ContextMismatchError", "DestinationError", "FormatError", "IntegrityError", "KeyAccessError",
        "KeyUnavailableError", "LimitExceededError", "SourceError", "StreamcryptError", "TemporaryError",
        "WrappedKeyError",
    ),
    "streamcrypt.fs": ("filesystem",),
    "streamcrypt.keys.cache": ("DataKeyCache",),
    "streamcrypt.kms": ("kms_client",),
}  # fmt: skip


if not TYPE_CHECKING:  # a type checker must know the names above, and no others

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                from importlib import import_module

                value = getattr(import_module(home), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
