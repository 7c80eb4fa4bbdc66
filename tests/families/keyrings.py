"""The keyrings of the published vectors, from ``streamcrypt.keys``."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from families import craft, vectors

from streamcrypt.keys.ecdh import RawEcdhKeyring
from streamcrypt.keys.hierarchy import BranchKey, HierarchyKeyring
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


class GivenBranchKey:
    """A branch key store that holds one version of one branch key, in clear."""

    def __init__(self, material: dict[str, Any]) -> None:
        self.identity = material["branch-key-id"]
        self._key = BranchKey(
            material["branch-key-id"], uuid.UUID(material["version"]), base64.b64decode(material["base64"])
        )

    def active(self, branch_key_id: str) -> BranchKey:
        return self._key

    def version(self, branch_key_id: str, version: uuid.UUID) -> BranchKey:
        assert (branch_key_id, version) == (self._key.branch_key_id, self._key.version)
        return self._key


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
        material = vectors.keys()[keyring["key"]]
        return HierarchyKeyring(GivenBranchKey(material), material["branch-key-id"])
    # Static or not, a recipient opens with its private key alone (vectors, README).
    return RawEcdhKeyring(vectors.private_key(keyring["key"], "recipient-private-pem"))


@cache
def _raw_rsa(namespace: str, name: str, key: str, padding: str) -> Keyring:
    private = vectors.private_key(key, "private-pem")
    return RawRsaKeyring(namespace, name, private_key=private, padding=padding)
