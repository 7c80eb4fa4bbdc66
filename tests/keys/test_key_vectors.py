"""Wrapped keys of the published vectors, opened by our keyrings and by an independent unwrapping.

Origin of the vectors: shared/vectors/esdk/README.md and shared/vectors/wycheproof/README.md.
"""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key
from families import vectors as published

from streamcrypt.errors import IntegrityError, KeyAccessError, WrappedKeyError
from streamcrypt.keys.ecdh import RawEcdhKeyring
from streamcrypt.keys.hierarchy import BranchKey, HierarchyKeyring
from streamcrypt.keys.keyring import Keyring, MultiKeyring
from streamcrypt.keys.materials import Materials, read_public_key
from streamcrypt.keys.raw import RawAesKeyring, RawRsaKeyring
from streamcrypt.message.header import EncryptedDataKey, parse_header
from streamcrypt.message.suites import SUITES, UNSIGNED

LOCAL = ("raw-aes", "raw-rsa", "raw-ecdh", "hierarchy", "multi")


@dataclass(frozen=True)
class StaticBranchKey:
    """The one branch key of the vectors."""

    key: BranchKey
    identity: str = "vectors"

    def active(self, branch_key_id: str) -> BranchKey:
        return self.key

    def version(self, branch_key_id: str, version: uuid.UUID) -> BranchKey:
        if (branch_key_id, version) != (self.key.branch_key_id, self.key.version):
            raise KeyAccessError("another version")
        return self.key


@cache
def private_key(name: str, which: str):
    return load_pem_private_key(published.keys()[name][which].encode(), None)


def keyring_of(spec: dict) -> Keyring:
    material = published.keys().get(spec.get("key"), {})
    match spec["type"]:
        case "multi":
            return MultiKeyring(None, [keyring_of(child) for child in spec["keyrings"]])
        case "raw-aes":
            return RawAesKeyring(spec["namespace"], spec["name"], base64.b64decode(material["base64"]))
        case "raw-rsa":
            key = private_key(spec["key"], "private-pem")
            return RawRsaKeyring(spec["namespace"], spec["name"], private_key=key, padding=spec["padding"])
        case "raw-ecdh":
            key = private_key(spec["key"], "recipient-private-pem")
            sender = load_der_public_key(base64.b64decode(material["sender-public-der-base64"]))
            return RawEcdhKeyring(key, sender if spec["schema"] == "static" else None)
        case "hierarchy":
            branch_key = BranchKey(
                material["branch-key-id"],
                uuid.UUID(material["version"]),
                base64.b64decode(material["base64"]),
            )
            return HierarchyKeyring(StaticBranchKey(branch_key), material["branch-key-id"])
    raise AssertionError(spec)


def header_of(vector: published.Vector):
    header, _ = parse_header(vector.message, max_encrypted_data_keys=None)
    return header, dict(header.context) | vector.supplied_context


OPENING = [vector for vector in published.vectors_with("plaintext") if vector.keyring["type"] in LOCAL]


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("vector", OPENING, ids=str)
def test_published_wrapped_keys_open(vector):
    header, context = header_of(vector)
    expected = published.data_key(vector.keyring, header, context)
    materials = Materials(keyring_of(vector.keyring), max_encrypted_data_keys=None)
    opened = materials.for_decryption(header.suite, context, header.encrypted_data_keys)
    assert opened.data_key == expected
    assert (opened.verification_key is not None) == header.suite.signed


@pytest.mark.usefixtures("vectors")
@pytest.mark.parametrize("kind", ["raw-ecdh", "hierarchy", "raw-aes"])
def test_published_wrapped_keys_with_one_bit_flipped(kind):
    for vector in [vector for vector in OPENING if vector.keyring["type"] == kind][:4]:
        header, context = header_of(vector)
        keyring = keyring_of(vector.keyring)
        (wrapped,) = header.encrypted_data_keys[:1]
        for place in range(len(wrapped.ciphertext)):
            blob = bytearray(wrapped.ciphertext)
            blob[place] ^= 1
            altered = EncryptedDataKey(wrapped.provider_id, wrapped.info, bytes(blob))
            with pytest.raises((WrappedKeyError, KeyAccessError)):
                keyring.unwrap(header.suite, context, [altered])


@pytest.mark.usefixtures("vectors")
def test_the_senders_key_opens_its_own_static_messages():
    opened = 0
    for vector in OPENING:
        if vector.keyring.get("schema") != "static":
            continue
        header, context = header_of(vector)
        name = vector.keyring["key"]
        recipient = base64.b64decode(published.keys()[name]["recipient-public-der-base64"])
        keyring = RawEcdhKeyring(private_key(name, "sender-private-pem"), load_der_public_key(recipient))
        try:
            data_key = keyring.unwrap(header.suite, context, header.encrypted_data_keys)
        except KeyAccessError:  # written by another sender than the one of the key file
            continue
        assert data_key == published.data_key(vector.keyring, header, context)
        opened += 1
    assert opened > 0


@pytest.mark.usefixtures("vectors")
def test_every_published_public_key_is_read():
    read = 0
    for vector in published.vectors_with("plaintext", "inspect-only"):
        header, context = header_of(vector)
        key = read_public_key(header.suite, context)
        assert (key is not None) == header.suite.signed
        read += key is not None
    assert read > 50


# Wycheproof


def wycheproof(vectors: Path, name: str) -> dict:
    return json.loads((vectors / "wycheproof" / f"{name}_test.json").read_text())


OAEP_FILES = {
    "rsa_oaep_2048_sha1_mgf1sha1": "oaep-sha1",
    "rsa_oaep_2048_sha256_mgf1sha256": "oaep-sha256",
    "rsa_oaep_2048_sha384_mgf1sha384": "oaep-sha384",
    "rsa_oaep_4096_sha256_mgf1sha256": "oaep-sha256",
    "rsa_oaep_4096_sha512_mgf1sha512": "oaep-sha512",
}


@pytest.mark.parametrize("name", OAEP_FILES)
def test_wycheproof_rsa_oaep(vectors, name):
    """Opened as wrapped keys.  A message that is no data key (length, label) is refused as one."""
    outcomes = {True: 0, False: 0}
    for group in wycheproof(vectors, name)["testGroups"]:
        key = load_pem_private_key(group["privateKeyPem"].encode(), None)
        keyring = RawRsaKeyring("wycheproof", "key", private_key=key, padding=OAEP_FILES[name])
        for test in group["tests"]:
            message = bytes.fromhex(test["msg"])
            wrapped = EncryptedDataKey("wycheproof", b"key", bytes.fromhex(test["ct"]))
            valid = test["result"] == "valid" and not test["label"]
            suite = next((suite for suite in SUITES.values() if suite.key_length == len(message)), UNSIGNED)
            if valid and len(message) == suite.key_length:
                assert keyring.unwrap(suite, {}, [wrapped]) == message, test
            else:
                with pytest.raises((WrappedKeyError, IntegrityError)):
                    keyring.unwrap(suite, {}, [wrapped])
                if valid:  # right padding, but no data key
                    assert keyring._open(suite, {}, wrapped) == message
            outcomes[valid] += 1
    assert outcomes[True] > 3
    assert outcomes[False] > 10


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("ecdh_secp256r1_ecpoint", ec.SECP256R1()),
        ("ecdh_secp384r1_ecpoint", ec.SECP384R1()),
        ("ecdh_secp521r1_ecpoint", ec.SECP521R1()),
    ],
)
def test_wycheproof_ecdh(vectors, name, curve):
    """A wrapped key made with the shared secret of the test opens; an invalid sender point does not."""
    from streamcrypt.keys import ecdh

    opened = refused = 0
    for group in wycheproof(vectors, name)["testGroups"]:
        for test in group["tests"]:
            value = int(test["private"], 16)
            point = bytes.fromhex(test["public"])
            try:
                private = ec.derive_private_key(value, curve)
            except ValueError:
                continue  # no private key of this curve
            keyring = RawEcdhKeyring(private)
            if test["result"] == "valid" and len(point) > 1:
                sender = ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
                parties = ecdh._Parties(curve, sender=ecdh.compress(sender), recipient=keyring._point)
                blob = ecdh._wrap(parties, bytes.fromhex(test["shared"]), {}, bytes(32))
                wrapped = EncryptedDataKey("raw-ecdh", parties.to_info(), blob)
                assert keyring.unwrap(UNSIGNED, {}, [wrapped]) == bytes(32), test
                opened += 1
            elif test["result"] == "invalid":
                parties = ecdh._Parties(curve, sender=point, recipient=keyring._point)
                blob = ecdh._wrap(parties, bytes.fromhex(test["shared"]) or bytes(32), {}, bytes(32))
                wrapped = EncryptedDataKey("raw-ecdh", parties.to_info(), blob)
                with pytest.raises(KeyAccessError):
                    keyring.unwrap(UNSIGNED, {}, [wrapped])
                refused += 1
    assert opened > 100
    assert refused > 3
