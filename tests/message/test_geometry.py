"""Geometry: where frames lie is arithmetic, and the arithmetic has one answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from families import craft
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamcrypt.errors import IntegrityError, LimitExceededError
from streamcrypt.message.frames import Geometry
from streamcrypt.message.header import parse_header
from streamcrypt.message.suites import MAX_FRAMES, MAX_WRITTEN_FRAME_LENGTH

F = 64
SIZES = [0, 1, F - 1, F, F + 1, 2 * F - 1, 2 * F, 2 * F + 1, 7 * F, 7 * F + 13]


def reader(message: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: message[offset : offset + length]


def geometry_of(message: bytes) -> Geometry:
    header, _ = parse_header(message)
    return Geometry.of_message(header, len(message), reader(message))


@given(st.integers(20, 10_000), st.integers(1, 2**31 - 1), st.integers(0, 2**60), st.booleans())
@settings(deadline=None, max_examples=500)
def test_for_plaintext(header_length, frame_length, plaintext_length, signed):
    assume(plaintext_length // frame_length < MAX_FRAMES)
    geometry = Geometry.for_plaintext(header_length, frame_length, plaintext_length, signed=signed)
    assert geometry.plaintext_length == plaintext_length
    assert 0 <= geometry.final_length < frame_length  # ours is never full
    assert geometry.frames == plaintext_length // frame_length + 1
    assert geometry.frame_offset(0) == header_length
    assert geometry.frames_end(geometry.frames) == geometry.body_end
    assert geometry.message_length - geometry.body_end == (105 if signed else 0)
    assert geometry.body_end == (header_length + plaintext_length + 32 * geometry.regular_frames + 40)


@given(st.integers(1, 300), st.integers(0, 5000), st.data())
@settings(deadline=None, max_examples=500)
def test_frames_covering(frame_length, plaintext_length, data):
    """Exactly the frames that hold a byte of the range: none missing, none too many."""
    full = data.draw(st.booleans()) and plaintext_length and plaintext_length % frame_length == 0
    regular, final = divmod(plaintext_length, frame_length)
    geometry = (
        Geometry(100, frame_length, regular - 1, frame_length)
        if full
        else Geometry(100, frame_length, regular, final)
    )
    assert geometry.plaintext_length == plaintext_length
    start = data.draw(st.integers(0, plaintext_length))
    stop = data.draw(st.integers(start, plaintext_length))
    first, last = geometry.frames_covering(start, stop)
    covering = [
        index
        for index in range(geometry.frames)
        if geometry.plaintext_range(index, index + 1)[0] < stop
        and geometry.plaintext_range(index, index + 1)[1] > start
    ]
    assert list(range(first, last)) == (covering if start < stop else [])


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
@pytest.mark.parametrize("full_final", [False, True], ids=["empty final", "full final"])
@pytest.mark.parametrize("size", SIZES)
def test_of_message(suite_id, full_final, size):
    parts = craft.assemble(craft.Draft(suite_id, bytes(size), F, full_final=full_final and size > 0))
    message = parts.join()
    geometry = geometry_of(message)
    assert geometry.plaintext_length == size
    assert geometry.frames == len(parts.frames)
    assert geometry.message_length == len(message)
    assert geometry.footer_length == len(parts.footer)
    offset = len(parts.header + parts.authentication)
    for index, frame in enumerate(parts.frames):
        assert geometry.frame_offset(index) == offset
        offset += len(frame)
        assert geometry.frames_end(index + 1) == offset


@pytest.mark.parametrize("frame_length", [1, 2, 3, 16, 71, 105, 106, 107])
def test_of_signed_messages_with_tiny_frames(frame_length):
    """The footer's length is found by looking, also where frames are shorter than a footer."""
    for suite_id in craft.SIGNED:
        for size in (0, 1, frame_length, 5 * frame_length, 150):
            for full_final in (False, True):
                draft = craft.Draft(suite_id, bytes(size), frame_length, full_final=full_final and size > 0)
                message = craft.assemble(draft).join()
                assert geometry_of(message).plaintext_length == size


@given(st.integers(1, 200), st.integers(0, 2000), st.integers(-60, 60))
@settings(deadline=None, max_examples=300)
def test_other_lengths_fit_nothing_or_another_size(frame_length, size, change):
    """Cut or extended, the length alone never gives the old plaintext size: the final frame decides."""
    parts = craft.assemble(craft.Draft(0x0478, b"", frame_length))
    header, length = parse_header(parts.header + parts.authentication)
    whole = Geometry.for_plaintext(length, frame_length, size).message_length
    assume(change != 0)
    try:
        geometry = Geometry.of_message(header, whole + change)
    except IntegrityError:
        return
    # A full final frame holds as much as a regular one and an empty final frame: the frames differ.
    assert (geometry.regular_frames, geometry.final_length) != divmod(size, frame_length)
    assert geometry.message_length == whole + change


@pytest.mark.parametrize("suite_id", [0x0478, 0x0578], ids=hex)
def test_every_truncation_is_noticed_or_ends_at_no_final_frame(suite_id):
    parts = craft.assemble(craft.Draft(suite_id, bytes(3 * F), F))
    message = parts.join()
    header, start = parse_header(message)
    for length in range(start, len(message)):
        cut = message[:length]
        try:
            geometry = Geometry.of_message(header, length, reader(cut))
        except IntegrityError:
            continue
        final = geometry.frame_offset(geometry.regular_frames)
        assert suite_id == 0x0478
        assert cut[final : final + 4] != b"\xff\xff\xff\xff"


def test_looking_for_the_footer_reads_little():
    """Whatever the size: some hundred bytes are read to find the end of a signed message."""
    message = craft.assemble(craft.Draft(0x0578, bytes(200 * 1024), 1024)).join()
    header, _ = parse_header(message)
    reads = []

    def read_at(offset, length):
        reads.append(length)
        return message[offset : offset + length]

    assert Geometry.of_message(header, len(message), read_at).plaintext_length == 200 * 1024
    assert len(reads) <= 4
    assert sum(reads) <= 100


def test_a_huge_claimed_message_is_not_walked():
    """Frames of one byte in 2^60 bytes: the candidates are bounded by the footer, not by the message."""
    parts = craft.assemble(craft.Draft(0x0578, b"", 1))
    header, _ = parse_header(parts.join())
    looks = []

    def read_at(offset, length):
        looks.append(offset)
        return bytes(length)

    with pytest.raises(IntegrityError):
        Geometry.of_message(header, 2**60, read_at)
    assert len(looks) <= 6


LIMITS = {
    "frame length 0": (0, 1),
    "frame length 2^31": (MAX_WRITTEN_FRAME_LENGTH + 1, 1),
    "2^32 frames": (1, MAX_FRAMES),
}


@pytest.mark.parametrize(("frame_length", "size"), LIMITS.values(), ids=LIMITS)
def test_limits_on_writing(frame_length, size):
    with pytest.raises(LimitExceededError):
        Geometry.for_plaintext(100, frame_length, size)


def test_the_largest_message_that_may_be_written():
    assert Geometry.for_plaintext(100, 1, MAX_FRAMES - 1).frames == MAX_FRAMES
    assert Geometry.for_plaintext(100, MAX_WRITTEN_FRAME_LENGTH, 2**61).frames == 2**30 + 1


def test_more_frames_than_the_format_has_numbers_for_are_refused_on_reading():
    parts = craft.assemble(craft.Draft(0x0478, b"", 1))
    header, length = parse_header(parts.join())
    most = length + 33 * (MAX_FRAMES - 1) + 40
    assert Geometry.of_message(header, most).frames == MAX_FRAMES
    with pytest.raises(IntegrityError):
        Geometry.of_message(header, most + 33)
