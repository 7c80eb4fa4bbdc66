"""The header of a message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncryptedDataKey:
    """A data key as one keyring wrapped it."""

    provider_id: str
    info: bytes
    ciphertext: bytes
