"""Key commitment: one ciphertext that opens under two data keys, and why ours cannot.

The attack is carried out in full.  GHASH is linear, so one free block in the header (in a wrapped key
that no reader understands) and one in the final frame make both tags hold under both content keys.  In a
suite that does not commit the result is a valid message with two plaintexts, one per recipient.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
from families import craft
from families.reader import ANY_SUITE, read_message

from streamcrypt.errors import IntegrityError
from streamcrypt.message.derive import derive_for_reading
from streamcrypt.message.header import parse_header
from streamcrypt.message.suites import SUITES, CommitmentPolicy


class TwoKeyMessage(NamedTuple):
    message: bytes
    keys: tuple[bytes, bytes]
    plaintexts: tuple[bytes, bytes]


def two_key_message(suite_id: int, *, commits_to: int = 0, header_id: int | None = None) -> TwoKeyMessage:
    """A message whose header tag and final frame hold under two data keys."""
    committing = craft.SUITES[suite_id][3]
    keys = (os.urandom(32), os.urandom(32))
    message_id = os.urandom(32 if committing else 16)
    derived = [craft.derive(suite_id, key, message_id) for key in keys]
    content_keys = (derived[0][0], derived[1][0])
    # A filler wrapped key whose ciphertext holds a whole aligned block of the AAD, the free one.
    draft = craft.Draft(
        suite_id,
        frame_length=64,
        data_key=keys[0],
        message_id=message_id,
        edks=[
            craft.wrap_raw_aes(keys[0], {"k": "v"}),
            craft.wrap_raw_aes(keys[1], {"k": "v"}, name="aes-other"),
            ("filler", b"", bytes(48)),
        ],
        commitment=derived[commits_to][1] or None,
        header_id=header_id,
    )
    header = craft.assemble(draft).header
    free = (header.index(craft.counted(bytes(48))) + 2 + 15) // 16 * 16
    header, _, header_tag = craft.collide(content_keys, bytes(12), header, b"", free=free, in_aad=True)

    iv = bytes(11) + b"\x01"
    aad = craft.frame_aad(message_id, craft.FINAL, 1, 64)
    _, body, tag = craft.collide(content_keys, iv, aad, os.urandom(64), free=48, in_aad=False)
    plaintexts = tuple(
        bytes(a ^ b for a, b in zip(body, craft.gcm_keystream(key, iv, 64), strict=True))
        for key in content_keys
    )
    frame = b"\xff\xff\xff\xff" + craft.u32(1) + iv + craft.u32(64) + body + tag
    authentication = header_tag if committing else bytes(12) + header_tag
    return TwoKeyMessage(header + authentication + frame, keys, (plaintexts[0], plaintexts[1]))


def test_the_attack_works_where_nothing_commits():
    """The detector can fail: without commitment both readers get an authentic, different plaintext."""
    attack = two_key_message(0x0178)
    for key, plaintext in zip(attack.keys, attack.plaintexts, strict=True):
        assert read_message(attack.message, key, policy=ANY_SUITE) == plaintext
    assert attack.plaintexts[0] != attack.plaintexts[1]


def test_the_default_policy_refuses_it_before_any_key_is_asked_for():
    attack = two_key_message(0x0178)

    def no_key_may_be_asked_for(header):
        raise AssertionError("the policy comes first")

    with pytest.raises(IntegrityError, match="require-encrypt-allow-decrypt"):
        read_message(
            attack.message,
            no_key_may_be_asked_for,
            policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT,
        )


@pytest.mark.parametrize("commits_to", [0, 1])
def test_a_committing_suite_opens_under_one_key_only(commits_to):
    """Even with every GCM tag solved for both keys, the commitment names one of them."""
    attack = two_key_message(0x0478, commits_to=commits_to)
    assert read_message(attack.message, attack.keys[commits_to]) == attack.plaintexts[commits_to]
    with pytest.raises(IntegrityError, match="does not commit"):
        read_message(attack.message, attack.keys[1 - commits_to])


def test_the_mismatch_is_found_before_the_header_tag_and_the_first_frame():
    attack = two_key_message(0x0478)
    header, end = parse_header(attack.message)
    # derive_for_reading sees header and data key only: no tag has been looked at, no frame opened.
    with pytest.raises(IntegrityError, match="does not commit"):
        derive_for_reading(header, attack.keys[1])
    assert end < len(attack.message)


@pytest.mark.parametrize("flip", range(32))
def test_every_byte_of_the_commitment_counts(flip):
    parts = craft.assemble(craft.Draft(0x0478, b"text"))
    header = bytearray(parts.header)
    header[len(header) - 32 + flip] ^= 1
    parts.header = bytes(header)
    with pytest.raises(IntegrityError, match="does not commit"):
        read_message(parts.join(), parts.data_key)


def test_relabelling_a_two_key_message_as_committing_is_refused():
    """Version 1 bytes under a version 2 suite id, and a version 2 header made from the v1 message's parts."""
    attack = two_key_message(0x0178)
    relabelled = bytearray(attack.message)
    relabelled[2:4] = b"\x04\x78"
    for key in attack.keys:
        with pytest.raises(IntegrityError):
            read_message(bytes(relabelled), key)
    v1, _ = parse_header(attack.message)
    v2_start = b"\x02\x04\x78" + v1.message_id + bytes(16)
    for key in attack.keys:
        with pytest.raises(IntegrityError):
            read_message(v2_start + attack.message[20:], key)


def test_only_committing_suites_are_written():
    assert {suite.id for suite in SUITES.values() if suite.committing} == {0x0478, 0x0578}
