"""streamcrypt: encrypted datasets, tensors and streams in the AWS Encryption SDK's message format."""

from __future__ import annotations

from streamcrypt.api import (
    Inspection,
    decrypt,
    decrypt_bytes,
    encrypt,
    encrypt_bytes,
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
    "inspect",
    "kms_client",
    "open",
    "rekey",
    "verify",
]
