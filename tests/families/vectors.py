"""The published AWS Encryption SDK vectors (shared/vectors/esdk), and their data keys without keyrings.

``VECTORS`` is empty where the folder is absent; the fixture ``vectors`` then skips, loudly.  The data
keys are unwrapped here by a second implementation, written from the format's description, so that the
message format can be tested without ``streamcrypt.keys``; test_vectors.py uses the real keyrings.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from families import craft

from streamcrypt.message.header import EncryptedDataKey, Header

_REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("STREAMCRYPT_VECTORS", _REPOSITORY.parent / "shared" / "vectors")) / "esdk"
WYCHEPROOF = FOLDER.parent / "wycheproof"


@dataclass(frozen=True)
class Vector:
    name: str
    test: dict[str, Any]

    def __repr__(self) -> str:
        return self.name

    @property
    def message(self) -> bytes:
        return self.path.read_bytes()

    @property
    def path(self) -> Path:
        return FOLDER / self.test["ciphertext"].removeprefix("file://")

    @property
    def plaintext(self) -> bytes:
        return (FOLDER / self.test["plaintext"].removeprefix("file://")).read_bytes()

    @property
    def expect(self) -> str:
        return str(self.test["expect"])

    @property
    def keyring(self) -> dict[str, Any]:
        return dict(self.test["keyring"])

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.test.get("options", {}))

    @property
    def supplied_context(self) -> dict[str, str]:
        """The pairs that the caller supplies on reading."""
        return dict(self.test.get("reproduced-encryption-context", {}))


def _load() -> dict[str, Vector]:
    manifest = FOLDER / "manifest.json"
    if not manifest.is_file():
        return {}
    tests = json.loads(manifest.read_text())["tests"]
    return {name: Vector(name, test) for name, test in sorted(tests.items())}


VECTORS = _load()


def vectors_with(*expectations: str) -> list[Vector]:
    return [vector for vector in VECTORS.values() if vector.expect in expectations]


@cache
def keys() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "keys.json").read_text()))


def symmetric_key(name: str) -> bytes:
    return base64.b64decode(keys()[name]["base64"])


_HASHES = {
    "oaep-sha1": hashes.SHA1(),
    "oaep-sha256": hashes.SHA256(),
    "oaep-sha384": hashes.SHA384(),
    "oaep-sha512": hashes.SHA512(),
}


class NoDataKeyError(Exception):
    """None of the encrypted data keys opens with the keyring of the vector."""


def data_key(keyring: dict[str, Any], header: Header, context: dict[str, str]) -> bytes:
    """The data key of a message, by this file's own unwrapping; ``context`` is the full map."""
    kind = keyring["type"]
    if kind == "data-key":
        return base64.b64decode(keyring["data-key-base64"])
    for child in keyring["keyrings"] if kind == "multi" else [keyring]:
        for wrapped in header.encrypted_data_keys:
            try:
                return _UNWRAP[child["type"]](child, wrapped, context)
            except Exception:
                continue
    raise NoDataKeyError


def _raw_aes(keyring: dict[str, Any], wrapped: EncryptedDataKey, context: dict[str, str]) -> bytes:
    name = keyring["name"].encode()
    start = name + craft.u32(128) + craft.u32(12)
    assert wrapped.provider_id == keyring["namespace"]
    assert wrapped.info[:-12] == start
    aead = AESGCM(symmetric_key(keyring["key"]))
    return aead.decrypt(wrapped.info[-12:], wrapped.ciphertext, craft.context_bytes(context))


@cache
def private_key(name: str, which: str) -> Any:  # loading checks the key, which takes longer than using it
    return serialization.load_pem_private_key(keys()[name][which].encode(), None)


def _raw_rsa(keyring: dict[str, Any], wrapped: EncryptedDataKey, context: dict[str, str]) -> bytes:
    assert (wrapped.provider_id, wrapped.info) == (keyring["namespace"], keyring["name"].encode())
    key = private_key(keyring["key"], "private-pem")
    if keyring["padding"] == "pkcs1":
        return bytes(key.decrypt(wrapped.ciphertext, padding.PKCS1v15()))
    algorithm = _HASHES[keyring["padding"]]
    return bytes(key.decrypt(wrapped.ciphertext, padding.OAEP(padding.MGF1(algorithm), algorithm, None)))


def _counter_kdf(name: str, key: bytes, label: bytes, context: bytes, length: int) -> bytes:
    blocks = []
    for i in range(1, 5):
        blocks.append(hmac.digest(key, craft.u32(i) + label + b"\0" + context + craft.u32(8 * length), name))
    return b"".join(blocks)[:length]


def _raw_ecdh(keyring: dict[str, Any], wrapped: EncryptedDataKey, context: dict[str, str]) -> bytes:
    info, material = wrapped.info, keys()[keyring["key"]]
    assert (wrapped.provider_id, info[0]) == ("raw-ecdh", 1)
    length = int.from_bytes(info[1:5], "big")
    recipient, sender = info[5 : 5 + length], info[9 + length :]
    private = private_key(keyring["key"], "recipient-private-pem")
    peer = ec.EllipticCurvePublicKey.from_encoded_point(private.curve, sender)
    salt, commitment, sealed = wrapped.ciphertext[:32], wrapped.ciphertext[32:64], wrapped.ciphertext[64:]
    fixed = b"\0".join(
        (
            b"ecdh-key-derivation",
            material["curve"].encode(),
            b"HMAC_SHA384",
            sender + recipient,
            b"\x01",
            craft.context_bytes(context),
        )
    )
    output = _counter_kdf("sha384", private.exchange(ec.ECDH(), peer), fixed, salt, 64)
    assert output[:32] == commitment
    return AESGCM(output[32:]).decrypt(bytes(12), sealed, fixed)


def _hierarchy(keyring: dict[str, Any], wrapped: EncryptedDataKey, context: dict[str, str]) -> bytes:
    assert wrapped.provider_id == "aws-kms-hierarchy"
    blob = wrapped.ciphertext
    salt, iv, version, sealed = blob[:16], blob[16:28], blob[28:44], blob[44:]
    label = b"aws-kms-hierarchy"
    key = _counter_kdf("sha256", symmetric_key(keyring["key"]), label, salt, 32)
    aad = label + wrapped.info + version + craft.context_bytes(context)
    return AESGCM(key).decrypt(iv, sealed, aad)


_UNWRAP = {"raw-aes": _raw_aes, "raw-rsa": _raw_rsa, "raw-ecdh": _raw_ecdh, "hierarchy": _hierarchy}
