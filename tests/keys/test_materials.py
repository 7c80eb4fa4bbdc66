"""Materials: contexts, signing keys, limits."""

from __future__ import annotations

import base64
import copy
import os
import pickle

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from streamcrypt.errors import IntegrityError, LimitExceededError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.keyring import MultiKeyring
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.raw import RawAesKeyring
from streamcrypt.message.suites import SIGNED, SUITES, UNSIGNED

KEYRING = RawAesKeyring("namespace", "name", b"\x5a" * 32)
CONTEXT = {"Project": "CustomerChurn"}


class CountingKeyring(RawAesKeyring):
    """A raw AES keyring that counts."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.generated = 0
        self.unwrapped = 0

    def generate(self, suite, context):
        self.generated += 1
        return super().generate(suite, context)

    def unwrap(self, suite, context, encrypted_data_keys):
        self.unwrapped += 1
        return super().unwrap(suite, context, encrypted_data_keys)


def counting() -> CountingKeyring:
    return CountingKeyring("namespace", "name", b"\x5a" * 32)


@pytest.mark.parametrize("suite", SUITES.values(), ids=repr)
def test_round_trip(suite):
    made = Materials(KEYRING).for_encryption(suite, CONTEXT, 100)
    read = Materials(KEYRING).for_decryption(suite, made.context, made.encrypted_data_keys)
    assert read.data_key == made.data_key
    assert dict(read.context) == dict(made.context)
    if not suite.signed:
        assert dict(made.context) == CONTEXT
        assert made.signing_key is None
        assert read.verification_key is None
        return
    point = base64.b64decode(made.context["aws-crypto-public-key"])
    assert len(point) == {256: 33, 384: 49}[suite.curve.key_size]
    signature = made.signing_key.sign(b"message", ec.ECDSA(suite.signature_hash))
    read.verification_key.verify(signature, b"message", ec.ECDSA(suite.signature_hash))


def test_the_public_key_is_bound_to_the_wrapped_key():
    made = Materials(KEYRING).for_encryption(SIGNED, CONTEXT, 100)
    other = Materials(KEYRING).for_encryption(SIGNED, CONTEXT, 100)
    with pytest.raises(IntegrityError):
        Materials(KEYRING).for_decryption(SIGNED, other.context, made.encrypted_data_keys)


def encoded(key: ec.EllipticCurvePrivateKey, form: PublicFormat = PublicFormat.CompressedPoint) -> str:
    return base64.b64encode(key.public_key().public_bytes(Encoding.X962, form)).decode()


P384 = ec.generate_private_key(ec.SECP384R1())
BAD_PUBLIC_KEYS = {
    "absent": None,
    "empty": "",
    "not Base64": "***",
    "Base64 without padding": encoded(P384).rstrip("=") + "A",
    "with a newline": encoded(P384) + "\n",
    "a point of P-256": encoded(ec.generate_private_key(ec.SECP256R1())),
    "uncompressed": encoded(P384, PublicFormat.UncompressedPoint),
    "cut short": base64.b64encode(base64.b64decode(encoded(P384))[:-1]).decode(),
    "x beyond the field": base64.b64encode(b"\x02" + b"\xff" * 48).decode(),
    "infinity": base64.b64encode(b"\x00" + bytes(48)).decode(),
}


@pytest.mark.parametrize("public_key", BAD_PUBLIC_KEYS.values(), ids=BAD_PUBLIC_KEYS)
def test_bad_public_keys_are_refused_before_a_key_is_used(public_key):
    keyring = counting()
    context = {} if public_key is None else {"aws-crypto-public-key": public_key}
    made = Materials(keyring).for_encryption(SIGNED, {}, 1)
    with pytest.raises(IntegrityError, match="public key"):
        Materials(keyring).for_decryption(SIGNED, context, made.encrypted_data_keys)
    assert keyring.unwrapped == 0


def test_unsigned_with_a_public_key_is_refused():
    made = Materials(KEYRING).for_encryption(SIGNED, {}, 1)
    with pytest.raises(IntegrityError, match="unsigned"):
        Materials(KEYRING).for_decryption(UNSIGNED, made.context, made.encrypted_data_keys)


@pytest.mark.parametrize("name", ["aws-crypto-public-key", "aws-crypto-", "aws-crypto-x"])
def test_reserved_names_are_refused(name):
    keyring = counting()
    for cache in (None, DataKeyCache()):
        with pytest.raises(ValueError, match="reserved"):
            Materials(keyring, cache=cache).for_encryption(UNSIGNED, {name: "x"}, 1)
    assert keyring.generated == 0


@pytest.mark.parametrize("context", [{"a": 1}, {1: "a"}, {"a": None}, {"a": b"x"}])
def test_a_context_maps_text_to_text(context):
    with pytest.raises(TypeError):
        Materials(KEYRING).for_encryption(UNSIGNED, context, 1)


def test_limit_of_wrapped_keys():
    eleven = MultiKeyring(KEYRING, [KEYRING] * 10)
    with pytest.raises(LimitExceededError, match="11 encrypted data keys"):
        Materials(eleven).for_encryption(UNSIGNED, {}, 1)
    made = Materials(eleven, max_encrypted_data_keys=None).for_encryption(UNSIGNED, {}, 1)
    keyring = counting()
    with pytest.raises(LimitExceededError, match="limit is 10"):
        Materials(keyring).for_decryption(UNSIGNED, {}, made.encrypted_data_keys)
    assert keyring.unwrapped == 0
    with pytest.raises(ValueError, match="at least 1"):
        Materials(keyring, max_encrypted_data_keys=0)


def test_cached_data_keys_share_their_signing_key():
    cache = DataKeyCache()
    made = [Materials(KEYRING, cache=cache).for_encryption(SIGNED, CONTEXT, 10) for _ in range(3)]
    assert made[0] is made[1] is made[2]
    assert cache.stats()["misses"] == 1


def test_what_separates_cache_entries():
    keyring, cache = counting(), DataKeyCache()
    materials = Materials(keyring, cache=cache)
    materials.for_encryption(UNSIGNED, CONTEXT, 1)
    materials.for_encryption(SUITES[0x0178], CONTEXT, 1)
    materials.for_encryption(UNSIGNED, {**CONTEXT, "b": ""}, 1)
    materials.for_encryption(UNSIGNED, {"Project": "customerchurn"}, 1)
    Materials(RawAesKeyring("namespace", "name", os.urandom(32)), cache=cache).for_encryption(
        UNSIGNED, CONTEXT, 1
    )
    assert cache.stats()["hits"] == 0
    materials.for_encryption(UNSIGNED, dict(CONTEXT), 1)
    Materials(counting(), cache=cache).for_encryption(UNSIGNED, CONTEXT, 1)  # the same key, another object
    assert cache.stats()["hits"] == 2


@pytest.mark.parametrize("suite", [SUITES[0x0014], SUITES[0x0046], SUITES[0x0078]], ids=repr)
def test_suites_without_a_derivation_are_never_cached(suite):
    keyring, cache = counting(), DataKeyCache()
    materials = Materials(keyring, cache=cache)
    made = [materials.for_encryption(suite, CONTEXT, 1) for _ in range(3)]
    assert len({each.data_key for each in made}) == 3
    for _ in range(3):
        materials.for_decryption(suite, CONTEXT, made[0].encrypted_data_keys)
    assert keyring.unwrapped == 3
    assert cache.stats()["hits"] == 0


def test_decryption_entries():
    keyring, cache = counting(), DataKeyCache(max_messages=1, max_bytes=0)
    materials = Materials(keyring, cache=cache)
    made = materials.for_encryption(UNSIGNED, CONTEXT, 1)
    for _ in range(5):
        materials.for_decryption(UNSIGNED, CONTEXT, made.encrypted_data_keys)
    assert keyring.unwrapped == 1
    with pytest.raises(IntegrityError):
        materials.for_decryption(UNSIGNED, {}, made.encrypted_data_keys)


def test_materials_keep_their_secrets():
    made = Materials(KEYRING).for_encryption(SIGNED, CONTEXT, 1)
    read = Materials(KEYRING).for_decryption(SIGNED, made.context, made.encrypted_data_keys)
    for materials in (made, read):
        shown = repr(materials) + str(materials)
        assert made.data_key.hex() not in shown
        assert repr(made.data_key)[2:-1] not in shown
        assert "signing_key" not in shown
        for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="holds keys"):
                duplicate(materials)
    with pytest.raises(TypeError):
        made.context["more"] = "x"


def test_materials_sign():
    made = Materials(KEYRING).for_encryption(SIGNED, CONTEXT, 1)
    assert isinstance(made.signing_key.curve, ec.SECP384R1)
    assert isinstance(made.suite.signature_hash, hashes.SHA384)
