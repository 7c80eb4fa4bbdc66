"""Tampered messages, each by name, of every suite: refused with one of our documented classes.

Where the tamperer holds the signing key (``resigned``) the footer is made to hold again, so that it is
the frames' own authentication that refuses.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from families import craft
from families.craft import Draft, Parts
from families.reader import read_message

from streamcrypt.errors import IntegrityError, LimitExceededError
from streamcrypt.message.suites import SUITES, CommitmentPolicy

F = 32
PLAINTEXT = bytes(range(3 * F + 10))
REFUSALS = (IntegrityError, LimitExceededError)


def message_of(suite_id: int, **changes) -> Parts:
    return craft.assemble(Draft(suite_id, PLAINTEXT, F, **changes))


def with_frames(parts: Parts, frames: list[bytes]) -> Parts:
    return replace(parts, frames=frames)


def renumbered(frame: bytes, sequence: int) -> bytes:
    """The frame with another number in front and as its IV."""
    final = frame[:4] == b"\xff\xff\xff\xff"
    start = 4 if final else 0
    iv = bytes(8) + craft.u32(sequence)
    return frame[:start] + craft.u32(sequence) + iv + frame[start + 16 :]


def in_order(frames: list[bytes], first: int) -> list[bytes]:
    return [renumbered(frame, sequence) for sequence, frame in enumerate(frames, first)]


def shortened(final: bytes) -> bytes:
    """A final frame whose last ciphertext byte is gone, with the length to match."""
    length = int.from_bytes(final[20:24], "big")
    return final[:20] + craft.u32(length - 1) + final[24 : 24 + length - 1] + final[24 + length :]


def other_of(parts: Parts) -> Parts:
    """Another message under the same data key."""
    return craft.assemble(Draft(parts.suite_id, PLAINTEXT, F, data_key=parts.data_key))


def final_from_regular(parts: Parts) -> list[bytes]:
    first = parts.frames[0]
    final = b"\xff\xff\xff\xff" + first[:16] + craft.u32(F) + first[16:]
    return [final]


def regular_from_final(parts: Parts) -> list[bytes]:
    draft = Draft(
        parts.suite_id,
        PLAINTEXT[: 2 * F],
        F,
        full_final=True,
        data_key=parts.data_key,
        message_id=parts.message_id,
    )
    frames = craft.assemble(draft).frames
    final = frames[-1]
    return [frames[0], final[4:20] + final[24:], parts.frames[2], parts.frames[3]]


FRAME_TAMPERINGS = {
    "frames swapped": lambda p: [p.frames[1], p.frames[0], *p.frames[2:]],
    "frames swapped and renumbered": lambda p: [renumbered(p.frames[1], 1), renumbered(p.frames[0], 2), *p.frames[2:]],
    "first frame dropped": lambda p: p.frames[1:],
    "middle frame dropped": lambda p: [p.frames[0], *p.frames[2:]],
    "middle frame dropped, rest renumbered": lambda p: [p.frames[0], *in_order(p.frames[2:], 2)],
    "frame repeated": lambda p: [p.frames[0], *p.frames],
    "frame repeated and renumbered": lambda p: in_order([p.frames[0], *p.frames], 1),
    "final frame dropped": lambda p: p.frames[:-1],
    "all frames dropped": lambda p: [],
    "only the final frame": lambda p: p.frames[-1:],
    "final frame repeated": lambda p: [*p.frames, p.frames[-1]],
    "final frame first": lambda p: [p.frames[-1], *p.frames[:-1]],
    "a regular frame after the final one": lambda p: [*p.frames, renumbered(p.frames[0], 5)],
    "regular frame made final": final_from_regular,
    "final frame made regular": regular_from_final,
    "frame of another message": lambda p: [other_of(p).frames[0], *p.frames[1:]],
    "final frame of another message": lambda p: [*p.frames[:-1], other_of(p).frames[-1]],
    "body of another message": lambda p: other_of(p).frames,
    "final frame cut short": lambda p: [*p.frames[:-1], p.frames[-1][:-1]],
    "final length made shorter": lambda p: [*p.frames[:-1], shortened(p.frames[-1])],
}  # fmt: skip


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
@pytest.mark.parametrize("tamper", FRAME_TAMPERINGS.values(), ids=FRAME_TAMPERINGS)
def test_frames(suite_id, tamper):
    parts = message_of(suite_id)
    assert read_message(parts.join(), parts.data_key) == PLAINTEXT
    tampered = with_frames(parts, tamper(parts))
    with pytest.raises(IntegrityError):
        read_message(tampered.join(), parts.data_key)
    if suite_id in craft.SIGNED:
        with pytest.raises(IntegrityError):
            read_message(tampered.resigned().join(), parts.data_key)


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
@pytest.mark.parametrize("frame_length", [F, 0], ids=["framed", "unframed"])
@pytest.mark.parametrize("tail", [b"\0", b"\n", b"\0\0", bytes(105), "itself", "footer"], ids=str)
def test_bytes_after_the_message(suite_id, frame_length, tail):
    parts = craft.assemble(Draft(suite_id, PLAINTEXT, frame_length))
    message = parts.join()
    if tail == "footer":
        tail = craft.counted(os.urandom(103))
    with pytest.raises(IntegrityError):
        read_message(message + (message if tail == "itself" else tail), parts.data_key)


# ------------------------------------------------------------------------------ downgrade


def relabel(message: bytes, suite_id: int) -> bytes:
    at = 2 if message[0] == 1 else 1
    return message[:at] + craft.u16(suite_id) + message[at + 2 :]


@pytest.mark.parametrize("claimed", craft.SUITES, ids=hex)
@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_another_suite_id(suite_id, claimed):
    """Every suite under every other suite's id, footer kept and footer removed."""
    if claimed == suite_id:
        return
    parts = message_of(suite_id)
    key = parts.data_key.ljust(32, b"\0")[: SUITES[claimed].key_length]
    for changed in (parts, replace(parts, footer=b""), replace(parts, footer=bytes(105))):
        with pytest.raises(IntegrityError):
            read_message(relabel(changed.join(), claimed), key)


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_another_version(suite_id):
    parts = message_of(suite_id)
    message = parts.join()
    version = 3 - message[0]
    start = b"\x01\x80" if version == 1 else b"\x02"
    for rest in (message[1:], message[2:], message[3:]):
        for changed in (start + rest, bytes((version,)) + rest):
            with pytest.raises(REFUSALS):
                read_message(changed, parts.data_key)


@pytest.mark.parametrize("suite_id", craft.SIGNED, ids=hex)
@pytest.mark.parametrize("frame_length", [F, 0], ids=["framed", "unframed"])
def test_a_signature_cannot_be_taken_off(suite_id, frame_length):
    parts = craft.assemble(Draft(suite_id, PLAINTEXT, frame_length))
    other_key = craft.assemble(Draft(suite_id, PLAINTEXT, frame_length)).signing_key
    for changed in (
        replace(parts, footer=b""),
        replace(parts, footer=b"\0\0"),
        replace(parts, footer=parts.footer[:-1]),
        replace(parts, footer=parts.footer[:1]),
        replace(parts, signing_key=other_key).resigned(),  # signed by someone else
    ):
        with pytest.raises(IntegrityError):
            read_message(changed.join(), parts.data_key)


def test_every_bit_of_a_signed_body_is_under_the_signature():
    """Someone who holds the data key reseals a frame; the signature notices."""
    parts = message_of(0x0578)
    draft = Draft(0x0578, bytes(len(PLAINTEXT)), F, data_key=parts.data_key, message_id=parts.message_id)
    forged = replace(parts, frames=craft.assemble(draft).frames)
    with pytest.raises(IntegrityError, match="signature"):
        read_message(forged.join(), parts.data_key)
    assert read_message(forged.resigned().join(), parts.data_key) == bytes(len(PLAINTEXT))


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_another_content_type(suite_id):
    """Framed relabelled as unframed and the other way round, with the frame length to match."""
    for frame_length in (F, 0):
        parts = craft.assemble(Draft(suite_id, PLAINTEXT, frame_length))
        committed = 32 if parts.header[0] == 2 else 0
        end = len(parts.header) - committed
        v1 = 5 if parts.header[0] == 1 else 0
        type_at = end - 4 - v1 - 1
        assert parts.header[type_at] == (2 if frame_length else 1)
        header = bytearray(parts.header)
        header[type_at] = 3 - header[type_at]
        header[end - 4 : end] = craft.u32(0 if frame_length else F)
        changed = replace(parts, header=bytes(header))
        with pytest.raises(IntegrityError):
            read_message(changed.join(), parts.data_key)


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_the_default_policy(suite_id):
    parts = message_of(suite_id)
    policy = CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
    if craft.SUITES[suite_id][3]:
        assert read_message(parts.join(), parts.data_key, policy=policy) == PLAINTEXT
    else:
        with pytest.raises(IntegrityError):
            read_message(parts.join(), parts.data_key, policy=policy)


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_unstored_pairs_must_be_the_writer_s(suite_id):
    parts = craft.assemble(Draft(suite_id, PLAINTEXT, F, unstored={"a": "1", "b": "2"}))
    assert read_message(parts.join(), parts.data_key, unstored={"b": "2", "a": "1"}) == PLAINTEXT
    for wrong in ({}, {"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "b": "2", "c": ""}, {"A": "1", "b": "2"}):
        with pytest.raises(IntegrityError):
            read_message(parts.join(), parts.data_key, unstored=wrong)


# ------------------------------------------------------------------------------ exhaustive


@pytest.mark.parametrize("frame_length", [16, 0], ids=["framed", "unframed"])
@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_every_flipped_bit_and_every_prefix(suite_id, frame_length):
    """RELIABILITY items 1 and 2: all of them refused, with a documented class, whatever the bit."""
    plaintext = b"0123456789abcdef" * 2 + b"tail"
    parts = craft.assemble(Draft(suite_id, plaintext, frame_length))
    message, key = parts.join(), parts.data_key
    assert read_message(message, key) == plaintext
    altered = bytearray(message)
    for bit in range(8 * len(message)):
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(REFUSALS):
            read_message(bytes(altered), key, max_encrypted_data_keys=10)
        altered[bit // 8] ^= 1 << bit % 8
    for length in range(len(message)):
        with pytest.raises(REFUSALS):
            read_message(message[:length], key)
    # The same with the signature made to hold again for the truncated and the flipped body.
    if suite_id in craft.SIGNED:
        body = b"".join(parts.frames)
        for position in range(0, len(body), 3):
            flipped = bytearray(body)
            flipped[position] ^= 0x10
            with pytest.raises(REFUSALS):
                read_message(with_frames(parts, [bytes(flipped)]).resigned().join(), key)
            with pytest.raises(REFUSALS):
                read_message(with_frames(parts, [body[:position]]).resigned().join(), key)


@pytest.mark.parametrize("full_final", [False, True], ids=["empty final", "full final"])
@pytest.mark.parametrize("random_ivs", [False, True], ids=["counted ivs", "random ivs"])
@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
def test_what_old_writers_made_is_read(suite_id, full_final, random_ivs):
    for size in (F, 2 * F, 2 * F + 1):
        draft = Draft(suite_id, bytes(size), F, full_final=full_final, random_ivs=random_ivs)
        if craft.SUITES[suite_id][0] == 1:
            draft.header_iv = os.urandom(12)
        parts = craft.assemble(draft)
        assert read_message(parts.join(), parts.data_key) == bytes(size)
