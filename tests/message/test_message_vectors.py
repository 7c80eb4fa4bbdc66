"""Published vectors against ``streamcrypt.message`` alone; the whole ways in are tests/test_vectors.py."""

from __future__ import annotations

import base64

import pytest
from families import vectors as published
from families.reader import ANY_SUITE, read_message
from families.vectors import VECTORS, Vector, vectors_with

from streamcrypt.errors import FormatError, IntegrityError, LimitExceededError
from streamcrypt.message.derive import derive_keys
from streamcrypt.message.frames import Geometry, unframed_length
from streamcrypt.message.header import Header, parse_header
from streamcrypt.message.suites import CommitmentPolicy

# What is wrong with these is seen by the keyring or by the materials, which are above this layer.
ABOVE = (
    "wrapping key is wrong",
    "matches the key name",
    "wrapped under another context",
    "public key",
    "public-key",
)


def read(vector: Vector, message: bytes) -> bytes:
    supplied = vector.supplied_context

    def data_key(header: Header) -> bytes:
        return published.data_key(vector.keyring, header, {**header.context, **supplied})

    header, _ = parse_header(message, max_encrypted_data_keys=None)
    policy = vector.options.get("commitment-policy")
    return read_message(
        message,
        data_key,
        policy=ANY_SUITE if policy is None else CommitmentPolicy[policy],
        max_encrypted_data_keys=vector.options.get("max-encrypted-data-keys"),
        unstored={name: value for name, value in supplied.items() if name not in header.context},
    )


def test_vectors_are_here(vectors):
    assert len(vectors_with("plaintext")) >= 297
    assert len(vectors_with("error")) >= 128
    assert len(vectors_with("inspect-only")) >= 90


@pytest.mark.parametrize("vector", vectors_with("plaintext"), ids=repr)
def test_plaintext(vector):
    assert read(vector, vector.message) == vector.plaintext


@pytest.mark.parametrize("vector", vectors_with("plaintext", "inspect-only"), ids=repr)
def test_structure_without_a_key(vector):
    message, test = vector.message, vector.test
    header, length = parse_header(message, max_encrypted_data_keys=None)
    assert f"{header.suite.id:04x}" == test["suite"]
    assert ("framed" if header.framed else "unframed") == test["content"]
    assert header.frame_length == test["frame-length"]
    assert header.context == test["encryption-context"]
    assert [key.provider_id for key in header.encrypted_data_keys] == test["encrypted-data-keys"]
    assert length == header.length == test["header-length"]
    assert header.serialize() == message[:length]
    if header.framed:
        geometry = Geometry.of_message(header, len(message), lambda at, n: message[at : at + n])
        assert geometry.plaintext_length == test["plaintext-size"]
        assert geometry.message_length == len(message)
    else:
        assert unframed_length(message[length:]) == test["plaintext-size"]


@pytest.mark.parametrize(
    "vector",
    [v for v in vectors_with("error") if not any(words in v.test["reason"] for words in ABOVE)],
    ids=repr,
)
def test_error(vector):
    with pytest.raises((IntegrityError, LimitExceededError)):
        read(vector, vector.message)


@pytest.mark.parametrize("vector", [v for v in VECTORS.values() if "commitment-base64" in v.test], ids=repr)
def test_commitment_and_content_key(vector):
    header, _ = parse_header(vector.message)
    keys = derive_keys(header.suite, base64.b64decode(vector.keyring["data-key-base64"]), header.message_id)
    if vector.expect == "error":  # two data keys, one ciphertext: the message commits to the other one
        assert keys.commitment != header.commitment
        return
    assert keys.commitment == header.commitment == base64.b64decode(vector.test["commitment-base64"])
    if "content-encryption-key-base64" in vector.test:
        assert keys.content_key == base64.b64decode(vector.test["content-encryption-key-base64"])


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS.values() if v.test.get("exhaustive-mutations")], ids=repr
)
def test_every_prefix_and_every_flipped_bit_is_refused(vector):
    message = vector.message
    header, _ = parse_header(message)
    data_key = published.data_key(vector.keyring, header, dict(header.context))
    for length in range(len(message)):
        with pytest.raises(IntegrityError):
            read_message(message[:length], data_key)
    altered = bytearray(message)
    for bit in range(8 * len(message)):
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises((IntegrityError, LimitExceededError)):
            read_message(bytes(altered), data_key)
        altered[bit // 8] ^= 1 << bit % 8
    assert read_message(message, data_key) == vector.plaintext


def test_base64_text_is_named(vectors):
    vector = VECTORS["craft-0178-base64"]
    with pytest.raises(FormatError, match="Base64") as caught:
        parse_header(vector.message)
    assert not caught.value.recognised
