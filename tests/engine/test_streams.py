"""One message as a stream: every way to read it, fed whole and by drops, counted, and tampered with."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import threading
import traceback
import tracemalloc

import numpy as np
import pytest
from families import craft, fuzz
from families.craft import Draft
from families.keyrings import CRAFT_KEYRING
from families.sources import MemorySource, dribble

from streamcrypt.errors import IntegrityError, LimitExceededError, StreamcryptError, WrappedKeyError
from streamcrypt.keys.materials import Materials
from streamcrypt.message.frames import Geometry
from streamcrypt.message.header import parse_header
from streamcrypt.message.suites import SIGNED, UNSIGNED, CommitmentPolicy
from streamcrypt.streams import (
    DecryptingFile,
    EncryptingFile,
    MessageWriter,
    OutgoingMessage,
    ReadingRules,
    header_template,
    open_message,
    open_stream,
    seal_message,
)

MATERIALS = Materials(CRAFT_KEYRING)
RULES = ReadingRules(commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT)
F = 256


def outgoing(suite, frame_length=F, context=None):
    materials = MATERIALS.for_encryption(suite, context or {}, None)
    return OutgoingMessage.begin(materials, header_template(materials, frame_length), frame_length)


def sealed(plaintext, suite=UNSIGNED, frame_length=F):
    return seal_message(outgoing(suite, frame_length), plaintext)


def written(plaintext, suite, step, frame_length=F):
    out = bytearray()
    writer = MessageWriter(outgoing(suite, frame_length), out.extend)
    for start in range(0, len(plaintext), step):
        writer.write(plaintext[start : start + step])
    writer.finish()
    assert writer.message_length == len(out)
    assert writer.plaintext_length == len(plaintext)
    return bytes(out)


def whole(message):
    return open_message(message, MATERIALS, RULES)


def streamed(message, step=2**20):
    return b"".join(bytes(chunk) for chunk in open_stream(dribble(message, step), MATERIALS, RULES))


def seekable(message):
    with DecryptingFile(MemorySource(message), MATERIALS, RULES) as file:
        return file.read()


def seekable_and_checked(message):
    with DecryptingFile(MemorySource(message), MATERIALS, RULES) as file:
        if file.header.suite.signed:
            file.verify_signature()
        return file.read()


WAYS_IN = {"bytes": whole, "stream": streamed, "seekable": seekable_and_checked}

SIZES = [0, 1, F - 1, F, F + 1, 2 * F - 1, 2 * F, 2 * F + 1, 9 * F + 77]
STEPS = [1, 100, F - 1, F, F + 1, 10_000]


# ------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("suite", [UNSIGNED, SIGNED], ids=repr)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_by_drops_is_read_by_drops(size, step, suite):
    plaintext = random.Random(size).randbytes(size)
    message = written(plaintext, suite, step)
    assert len(message) == len(sealed(plaintext, suite))
    assert whole(message) == plaintext
    assert seekable_and_checked(message) == plaintext
    for drop in (1, 7, F + 32, 2**20):
        assert streamed(message, drop) == plaintext


@pytest.mark.parametrize("frame_length", [1, 2**10, 2**20, 2**20 + 1, 3 * 2**20])
@pytest.mark.parametrize("suite", [UNSIGNED, SIGNED], ids=repr)
def test_frame_lengths_around_the_batch(frame_length, suite):
    for size in (0, 1000, min(frame_length * 3, 7 * 2**20)):
        plaintext = random.Random(size).randbytes(size)
        message = (
            written(plaintext, suite, 700_001, frame_length)
            if size > 1000
            else sealed(plaintext, suite, frame_length)
        )
        for way in WAYS_IN.values():
            assert way(message) == plaintext


@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
@pytest.mark.parametrize("frame_length", [F, 0], ids=["framed", "unframed"])
@pytest.mark.parametrize("full_final", [False, True], ids=["", "full final"])
def test_all_that_other_writers_make(suite_id, frame_length, full_final):
    for size in SIZES:
        draft = Draft(suite_id, os.urandom(size), frame_length, full_final=full_final and size > 0)
        message = craft.assemble(draft).join()
        for way in WAYS_IN.values():
            assert way(message) == draft.plaintext
        assert streamed(message, 13) == draft.plaintext


# ------------------------------------------------------------------------------ random access


@pytest.mark.parametrize("suite_id", [0x0178, 0x0478, 0x0578], ids=hex)
def test_any_range(suite_id):
    rng = random.Random(3)
    plaintext = rng.randbytes(20 * F + 100)
    message = craft.assemble(Draft(suite_id, plaintext, F)).join()
    with DecryptingFile(MemorySource(message), MATERIALS, RULES) as file, io.BytesIO(plaintext) as model:
        for _ in range(2_000):
            offset, length = rng.randrange(-5, len(plaintext) + 50), rng.randrange(0, 6 * F)
            whence = rng.choice((io.SEEK_SET, io.SEEK_CUR, io.SEEK_END))
            base = {io.SEEK_SET: 0, io.SEEK_CUR: model.tell(), io.SEEK_END: len(plaintext)}[whence]
            offset -= base if whence != io.SEEK_SET else 0
            if base + offset < 0:
                with pytest.raises(ValueError):
                    file.seek(offset, whence)
                continue
            assert file.seek(offset, whence) == model.seek(offset, whence)
            if rng.random() < 0.5:
                assert file.read(length) == model.read(length)
            else:
                ours, theirs = bytearray(length), bytearray(length)
                assert file.readinto(ours) == model.readinto(theirs)
                assert ours == theirs
            assert file.tell() == model.tell()
            start = rng.randrange(len(plaintext))
            assert file.read_at(start, length) == plaintext[start : start + length]


def test_a_range_reads_only_the_frames_that_cover_it():
    plaintext = random.Random(4).randbytes(50 * F + 10)
    message = sealed(plaintext)
    header, _ = parse_header(message)
    geometry = Geometry.of_message(header, len(message))
    rng = random.Random(5)
    for _ in range(300):
        start = rng.randrange(len(plaintext))
        stop = rng.randrange(start, min(len(plaintext), start + 5 * F)) + 1
        source = MemorySource(message)
        with DecryptingFile(source, MATERIALS, RULES) as file:
            opened = len(source.reads)
            assert file.read_at(start, stop - start) == plaintext[start:stop]
        first, last = geometry.frames_covering(start, stop)
        low, high = geometry.frame_offset(first), geometry.frames_end(last)
        read = sorted((offset, offset + length) for offset, length in source.reads[opened:])
        final = geometry.frame_offset(geometry.regular_frames)
        regular_high = min(high, final)
        within = [(begin, end) for begin, end in read if begin < final]
        assert all(low <= begin and end <= regular_high for begin, end in within)
        assert sum(end - begin for begin, end in within) == max(0, regular_high - low), "each frame once"
        # The final frame was kept when the file was opened; at most it is opened once more.
        assert [span for span in read if span not in within] in ([], [(final, geometry.body_end)])
        assert high > final or len(read) == len(within)


def test_opening_reads_the_header_and_the_final_frame_only():
    message = sealed(bytes(1000 * F))
    source = MemorySource(message)
    DecryptingFile(source, MATERIALS, RULES).close()
    assert source.closed
    final = len(message) - 40
    assert all(offset < 4096 + 1 or offset >= final for offset, _ in source.reads)
    assert sum(length for _, length in source.reads) <= 4096 + 40


def test_small_reads_in_order_open_each_frame_once():
    message = sealed(bytes(40 * F))
    source = MemorySource(message)
    with DecryptingFile(source, MATERIALS, RULES) as file:
        opened = len(source.reads)
        while file.read(10):
            pass
        assert len(source.reads) - opened == 40


def test_one_file_serves_many_threads():
    plaintext = random.Random(6).randbytes(60 * F)
    wrong = []
    with DecryptingFile(MemorySource(sealed(plaintext)), MATERIALS, RULES) as file:

        def work(seed):
            rng = random.Random(seed)
            for _ in range(200):
                start = rng.randrange(len(plaintext))
                if file.read_at(start, 3 * F) != plaintext[start : start + 3 * F]:
                    wrong.append(start)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ------------------------------------------------------------------------------ tampering


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
@pytest.mark.parametrize("frame_length", [16, 0], ids=["framed", "unframed"])
@pytest.mark.parametrize("suite_id", [0x0178, 0x0478, 0x0578], ids=hex)
def test_every_flipped_bit_and_every_prefix(suite_id, frame_length, way):
    """Through keyring, stream and file: always a documented class, never plaintext."""
    message = craft.assemble(Draft(suite_id, b"0123456789abcdef" * 2 + b"tail", frame_length)).join()
    way(message)
    altered = bytearray(message)
    for bit in range(8 * len(message)):
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises((IntegrityError, LimitExceededError, WrappedKeyError, StreamcryptError)) as caught:
            way(bytes(altered))
        assert isinstance(caught.value, StreamcryptError)
        altered[bit // 8] ^= 1 << bit % 8
    for length in range(len(message)):
        with pytest.raises(StreamcryptError):
            way(message[:length])


@pytest.mark.parametrize(
    "read", [DecryptingFile.read, lambda file: file.read_at(0, 4 * F)], ids=["read", "read_at"]
)
def test_a_failed_read_leaves_no_plaintext_in_its_traceback(read):
    """Frames before the altered one authenticated, but nobody is to get them."""
    message = bytearray(craft.assemble(Draft(0x0478, bytes(4 * F), F)).join())
    message[-3 * F] ^= 1
    with (
        DecryptingFile(MemorySource(message), MATERIALS, RULES) as file,
        pytest.raises(IntegrityError) as caught,
    ):
        read(file)
    held = [value for frame, _ in traceback.walk_tb(caught.tb) for value in frame.f_locals.values()]
    assert not any(isinstance(value, (memoryview, io.BytesIO)) for value in held)


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
@pytest.mark.parametrize("suite_id", craft.SUITES, ids=hex)
@pytest.mark.parametrize("frame_length", [F, 0], ids=["framed", "unframed"])
def test_bytes_after_the_message(suite_id, frame_length, way):
    message = craft.assemble(Draft(suite_id, bytes(3 * F), frame_length)).join()
    for tail in (b"\0", b"\n", bytes(105), message, craft.counted(os.urandom(103))):
        with pytest.raises(IntegrityError):
            way(message + tail)


@pytest.mark.parametrize("suite_id", [0x0478, 0x0578], ids=hex)
def test_a_stream_gives_out_nothing_that_is_not_authentic(suite_id):
    """Whatever is damaged: what came before the error is a prefix of the plaintext, whole frames of it,
    and never the last frame."""
    rng = random.Random(9)
    plaintext = rng.randbytes(12 * F + 50)
    message = craft.assemble(Draft(suite_id, plaintext, F)).join()
    for _ in range(400):
        damaged = bytearray(message)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        out = b""
        source = dribble(bytes(damaged), rng.choice((17, 300, 10**6)))
        with pytest.raises(StreamcryptError):  # noqa: PT012  (what came before the error is looked at)
            for chunk in open_stream(source, MATERIALS, RULES):
                out += bytes(chunk)
        assert plaintext.startswith(out)
        assert len(out) % F == 0
        assert len(out) <= 12 * F


def test_readinto_never_shows_a_byte_that_was_not_authenticated():
    """A second thread watches the caller's buffer while damaged frames are read into it (RELIABILITY 7)."""
    secret = b"\xa5" * (4 * 2**20)
    message = bytearray(sealed(secret, frame_length=2**20))
    message[-200] ^= 1  # in the fourth frame
    buffer = bytearray(len(secret))
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            if b"\xa5" in buffer[3 * 2**20 :]:
                seen.append(1)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with DecryptingFile(MemorySource(bytes(message)), MATERIALS, RULES) as file:
            for _ in range(30):
                file.seek(0)
                with pytest.raises(IntegrityError):
                    file.readinto(buffer)
    finally:
        stop.set()
        watcher.join()
    assert not seen
    assert b"\xa5" not in buffer[3 * 2**20 :]


def test_a_failed_read_gives_the_next_one_nothing_old():
    plaintext = random.Random(10).randbytes(6 * F)
    message = bytearray(sealed(plaintext))
    _, start = parse_header(message)
    stride = F + 32
    message[start + 2 * stride + 100] ^= 1
    with DecryptingFile(MemorySource(bytes(message)), MATERIALS, RULES) as file:
        for _ in range(3):
            assert file.read_at(F + 5, 10) == plaintext[F + 5 : F + 15]
            with pytest.raises(IntegrityError, match="frame 3"):
                file.read_at(2 * F + 5, 10)
            with pytest.raises(IntegrityError, match="frame 3"):
                file.read_at(2 * F + 5, 10)
            assert file.read_at(3 * F, 10) == plaintext[3 * F : 3 * F + 10]
        position = file.seek(0)
        with pytest.raises(IntegrityError):
            file.read()
        assert file.tell() == position


# ------------------------------------------------------------------------------ bombs


def test_claimed_lengths_cost_nothing():
    """A frame length of 4 GiB, an unframed length of 64 GiB, and a few bytes present (RELIABILITY 4)."""
    bombs = {
        "frames of 2^31 - 1": craft.assemble(Draft(0x0478, b"x", 2**31 - 1)),
        "frames of 2^32 - 1": craft.assemble(Draft(0x0478, b"x", 2**32 - 1)),
        "signed, frames of 2^32 - 1": craft.assemble(Draft(0x0578, b"x", 2**32 - 1)),
    }
    for parts in bombs.values():
        for way in WAYS_IN.values():
            tracemalloc.start()
            assert way(parts.join()) == b"x"
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * 2**20
        # The final frame claims all of its frame length, and holds one byte.
        final = parts.frames[-1]
        claimed = final[:20] + b"\x7f\xff\xff\xff" + final[24:]
        for way in WAYS_IN.values():
            tracemalloc.start()
            with pytest.raises(IntegrityError):
                way(parts.header + parts.authentication + claimed + parts.footer)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * 2**20
    for length in (2**36 - 32, 2**36 - 31, 2**63, 2**64 - 1):
        parts = craft.assemble(Draft(0x0478, b"x", 0))
        body = parts.frames[0]
        claimed = body[:12] + length.to_bytes(8, "big") + body[20:]
        for way in WAYS_IN.values():
            with pytest.raises((IntegrityError, LimitExceededError)):
                way(parts.header + parts.authentication + claimed)


def test_a_flood_of_wrapped_keys_by_drops_ends_soon():
    """65,535 wrapped keys with the limit lifted, arriving in small pieces: work in proportion to the bytes."""
    parts = craft.assemble(Draft(0x0478, b"x", F, edks=[("p", b"i" * 8, b"c" * 8)] * 65_535))
    rules = ReadingRules(max_encrypted_data_keys=None)
    materials = Materials(CRAFT_KEYRING, max_encrypted_data_keys=None)
    with pytest.raises(StreamcryptError):
        list(open_stream(dribble(parts.join(), 64), materials, rules))
    with pytest.raises(LimitExceededError):
        list(open_stream(dribble(parts.join(), 64), MATERIALS, RULES))


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
def test_damaged_headers_through_the_whole_way_in(way):
    rng = random.Random(11)
    good = [craft.assemble(Draft(suite_id, bytes(40), F)).join() for suite_id in craft.SUITES]
    for _ in range(1_500):
        message = rng.choice(good)
        mutated = fuzz.random_mutation(rng, message)
        if mutated == message:
            continue
        with pytest.raises(StreamcryptError):
            way(mutated)


# ------------------------------------------------------------------------------ writing fails


class FailingTarget:
    """A Target whose disk is full after ``room`` bytes, and has room again later."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.published = self.discarded = False

    def write_at(self, offset, data):
        if offset + len(data) > self.room:
            self.room = 10**9
            raise OSError(28, "No space left on device")

    def flush(self):
        pass

    def publish(self, *, overwrite):
        self.published = True

    def discard(self):
        self.discarded = True


@pytest.mark.parametrize("room", [1500, 40_000])
def test_a_write_that_failed_is_never_published(room):
    """Also when the caller swallows the error and closes as if nothing had happened."""
    target = FailingTarget(room)
    file = EncryptingFile(target, outgoing(UNSIGNED), overwrite=False, durable=True)
    failures = 0
    for _ in range(10):
        try:
            file.write(bytes(2**20))
        except (OSError, ValueError):
            failures += 1
    assert failures
    with contextlib.suppress(OSError, ValueError):
        file.close()
    assert not target.published
    assert target.discarded


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32])
def test_places_that_are_numpy_integers(kind):
    """As from an array of offsets: what is computed from them does not overflow."""
    plaintext = bytes(random.Random(3).randbytes(70_000))
    with DecryptingFile(MemorySource(sealed(plaintext)), MATERIALS, RULES) as file:
        assert file.seek(kind(100)) == 100
        assert file.read(kind(20)) == plaintext[100:120]
        assert file.read(kind(120)) == plaintext[120:240]
        file.seek(65_500)
        assert file.read(kind(100)) == plaintext[65_500:65_600]
        assert file.tell() == 65_600
        assert file.read_at(kind(100), kind(120)) == plaintext[100:220]
        for wrong in (1.5, "1"):
            with pytest.raises(TypeError):
                file.seek(wrong)
            with pytest.raises(TypeError):
                file.read(wrong)
        with pytest.raises(ValueError):
            file.read_at(-1, 5)
        assert file.tell() == 65_600


def test_arrays_without_rows():
    target = FailingTarget(10**9)
    with EncryptingFile(target, outgoing(UNSIGNED), overwrite=False, durable=True) as file:
        assert file.write(np.empty((0, 5))) == 0
        assert file.write(np.ones((2, 5))) == 80
    with DecryptingFile(MemorySource(sealed(b"abc")), MATERIALS, RULES) as file:
        assert file.readinto(np.empty((3, 0))) == 0
        assert file.read() == b"abc"


def test_what_an_encrypting_file_promises():
    for ending in ("close", "discard", "raise", "forget"):
        target = FailingTarget(10**9)
        file = EncryptingFile(target, outgoing(UNSIGNED), overwrite=False, durable=True)
        assert file.write(b"abc") == 3
        assert file.tell() == 3
        if ending == "close":
            file.close()
            file.close()
        elif ending == "discard":
            file.discard()
            file.close()
        elif ending == "raise":
            with pytest.raises(KeyError), file:
                raise KeyError
        else:
            del file
            gc.collect()
        assert target.published == (ending == "close")
        assert target.discarded or ending == "close"
        if ending != "forget":
            assert file.closed
            with pytest.raises(ValueError):
                file.write(b"x")


@pytest.mark.parametrize("durable", [False, True])
def test_a_name_is_made_durable_after_it_was_given(durable):
    target, order = FailingTarget(10**9), []
    target.flush = lambda: order.append("flush")
    target.publish = lambda *, overwrite: order.append("publish")
    EncryptingFile(
        target,
        outgoing(UNSIGNED),
        overwrite=False,
        durable=durable,
        sync_name=lambda: order.append("name"),
    ).close()
    assert order == (["flush", "publish", "name"] if durable else ["publish"])
