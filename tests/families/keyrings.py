"""The keyrings of the published vectors, from ``streamcrypt.keys``."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from families import craft, vectors

from streamcrypt.keys.keyring import Keyring, MultiKeyring
from streamcrypt.keys.raw import RawAesKeyring, RawRsaKeyring
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import AlgorithmSuite

CRAFT_KEYRING = RawAesKeyring(craft.NAMESPACE, craft.NAME, craft.WRAPPING_KEY)
"""Opens what ``families.craft`` writes."""


class GivenDataKey(Keyring):
    """A plaintext data key, as if a key service had answered with it."""

    def __init__(self, data_key: bytes) -> None:
        self._data_key = data_key

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        raise NotImplementedError

    def unwrap(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
    ) -> bytes:
        return self._data_key


def keyring_of(keyring: dict[str, Any]) -> Keyring:
    kind = keyring["type"]
    if kind == "multi":
        return MultiKeyring(None, [keyring_of(child) for child in keyring["keyrings"]])
    if kind == "data-key":
        return GivenDataKey(base64.b64decode(keyring["data-key-base64"]))
    if kind == "raw-rsa":
        return _raw_rsa(keyring["namespace"], keyring["name"], keyring["key"], keyring["padding"])
    if kind == "raw-aes":
        return RawAesKeyring(keyring["namespace"], keyring["name"], vectors.symmetric_key(keyring["key"]))
    if kind == "hierarchy":
        return _hierarchy(keyring["key"])
    return _ecdh(keyring["key"], keyring["schema"])


@cache
def _raw_rsa(namespace: str, name: str, key: str, padding: str) -> Keyring:
    private = vectors.private_key(key, "private-pem")
    return RawRsaKeyring(namespace, name, private_key=private, padding=padding)
