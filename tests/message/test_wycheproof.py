"""Wycheproof through our own paths: AES-GCM, HKDF and ECDSA as the message format uses them.

The format fixes the shape of AAD, salt and info, so few vectors fit a path of ours as they stand.  The
others first prove the second implementation of ``families.craft``, which then judges our path on the
same key, IV and text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from families import craft
from families.vectors import WYCHEPROOF

from streamcrypt.errors import IntegrityError
from streamcrypt.message.derive import derive_keys
from streamcrypt.message.footer import Verifier
from streamcrypt.message.frames import FrameCipher
from streamcrypt.message.header import Header, authenticate_header
from streamcrypt.message.suites import SUITES, AlgorithmSuite


def cases(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group in json.loads((WYCHEPROOF / name).read_text())["testGroups"]:
        for test in group["tests"]:
            yield (
                group,
                {
                    key: bytes.fromhex(value)
                    if isinstance(value, str) and key not in ("result", "comment")
                    else value
                    for key, value in test.items()
                },
            )


def header_with(suite: AlgorithmSuite, body: bytes, iv: bytes, tag: bytes) -> Header:
    return Header(suite, bytes(suite.message_id_length), {}, (), True, 1, b"", body, iv, tag)


def test_aes_gcm_of_the_format_shape(vectors):
    """12-byte IV, 16-byte tag: the header's tag for empty texts, an unframed body for the others."""
    ran = {"header": 0, "body": 0}
    for group, test in cases("aes_gcm_test.json"):
        if group["ivSize"] != 96 or group["tagSize"] != 128:
            continue
        valid = test["result"] == "valid"
        key, iv, aad, text = test["key"], test["iv"], test["aad"], test["msg"]
        assert (craft.gcm_tag(key, iv, aad, test["ct"]) == test["tag"]) == valid, test["tcId"]
        if not text:
            header = header_with(SUITES[0x0178], aad, iv, test["tag"])
            if valid:
                authenticate_header(header, AESGCM(key))
            else:
                with pytest.raises(IntegrityError):
                    authenticate_header(header, AESGCM(key))
            ran["header"] += 1
            continue
        # The same key, IV and text under the AAD that the format prescribes; an invalid vector's
        # tag is off by some bits, and so is ours.
        message_id = os.urandom(32)
        own_aad = craft.frame_aad(message_id, craft.SINGLE, 1, len(text))
        damage = bytes(
            a ^ b for a, b in zip(craft.gcm_tag(key, iv, aad, test["ct"]), test["tag"], strict=True)
        )
        tag = bytes(a ^ b for a, b in zip(craft.gcm_tag(key, iv, own_aad, test["ct"]), damage, strict=True))
        body = iv + len(text).to_bytes(8, "big") + test["ct"] + tag
        if valid:
            assert FrameCipher(key, message_id).open_unframed(body) == text, test["tcId"]
        else:
            with pytest.raises(IntegrityError):
                FrameCipher(key, message_id).open_unframed(body)
        ran["body"] += 1
    assert ran["header"] == 4
    assert ran["body"] >= 150


@pytest.mark.parametrize("name", ["sha256", "sha384", "sha512"])
def test_hkdf(vectors, name):
    """Wycheproof proves the second implementation; both then derive the same keys for every suite."""
    proven = direct = 0
    for _, test in cases(f"hkdf_{name}_test.json"):
        if test["result"] != "valid" or test["size"] > 255 * hashes_size(name):
            continue
        assert craft.hkdf(name, test["salt"], test["ikm"], test["info"], test["size"]) == test["okm"]
        proven += 1
        if not test["salt"] and len(test["info"]) >= 2 and test["size"] == len(test["ikm"]):
            # Shaped like a derivation of ours: no salt, the suite's id in front of the message id.
            kdf_hash = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
            suite = AlgorithmSuite(
                int.from_bytes(test["info"][:2], "big"), 1, len(test["ikm"]), kdf_hash[name]
            )
            assert derive_keys(suite, test["ikm"], test["info"][2:]).content_key == test["okm"]
            direct += 1
        for suite in SUITES.values():
            if suite.kdf_hash is not None and suite.kdf_hash.name == name:
                data_key = test["ikm"].ljust(suite.key_length, b"\x5c")[: suite.key_length]
                message_id = test["okm"].ljust(suite.message_id_length, b"\xc5")[: suite.message_id_length]
                keys = derive_keys(suite, data_key, message_id)
                assert (keys.content_key, keys.commitment) == craft.derive(suite.id, data_key, message_id)
    assert proven >= 75
    assert direct >= 1


def hashes_size(name: str) -> int:
    return {"sha256": 32, "sha384": 48, "sha512": 64}[name]


@pytest.mark.parametrize(
    ("file", "suite_id"),
    [("ecdsa_secp256r1_sha256_test.json", 0x0214), ("ecdsa_secp384r1_sha384_test.json", 0x0578)],
)
def test_ecdsa_footer(vectors, file, suite_id):
    ran = 0
    for group, test in cases(file):
        key: Any = serialization.load_der_public_key(bytes.fromhex(group["publicKeyDer"]))
        verifier = Verifier(SUITES[suite_id], key)
        half = len(test["msg"]) // 2
        verifier.update(test["msg"][:half])
        verifier.update(test["msg"][half:])
        footer = craft.counted(test["sig"])
        if test["result"] == "valid":
            verifier.verify(footer)
        else:
            with pytest.raises(IntegrityError):
                verifier.verify(footer)
        ran += 1
    assert ran >= 480
