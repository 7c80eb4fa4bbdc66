"""The header parser: any bytes give a value or a documented error, and never more memory than they justify."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
from families import craft, fuzz
from families.vectors import VECTORS
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcrypt.errors import FormatError, IntegrityError, LimitExceededError
from streamcrypt.message.derive import derive_keys
from streamcrypt.message.frames import FrameCipher
from streamcrypt.message.header import (
    EncryptedDataKey,
    HeaderCutShortError,
    HeaderTemplate,
    authenticate_header,
    parse_alike,
    parse_header,
)
from streamcrypt.message.suites import SIGNED, SUITES, UNSIGNED

SEEDS = fuzz.seeds()
STARTS = [b"\x01\x80" + craft.u16(s) for s in craft.SUITES if s < 0x0400] + [b"\x02\x04\x78", b"\x02\x05\x78"]


@given(st.binary(max_size=400))
@settings(deadline=None, max_examples=300)
def test_any_bytes(data):
    fuzz.header_or_refusal(data)


@given(st.sampled_from(STARTS), st.binary(max_size=300), st.sampled_from([None, 3, 10]))
@settings(deadline=None, max_examples=300)
def test_any_bytes_after_a_good_start(start, data, limit):
    fuzz.header_or_refusal(start + data, limit)


@given(st.sampled_from(SEEDS), st.integers(0, 2**32), st.sampled_from([None, 10]))
@settings(deadline=None, max_examples=300)
def test_damaged_headers(seed, number, limit):
    fuzz.header_or_refusal(fuzz.random_mutation(random.Random(number), seed), limit)


def test_damaged_headers_in_bulk():
    rng = random.Random(20261124)
    accepted = 0
    for _ in range(20_000):
        mutated = fuzz.random_mutation(rng, rng.choice(SEEDS))
        accepted += fuzz.header_or_refusal(mutated, rng.choice((None, 10))) is not None
    assert 0 < accepted < 20_000  # both branches were met


def test_a_header_that_resembles_another_is_what_parsing_it_gives():
    rng = random.Random(20261129)
    taken = left = 0
    for seed in SEEDS:
        known, length = parse_header(seed, max_encrypted_data_keys=None)
        for _ in range(100):
            mutated = fuzz.random_mutation(rng, seed)
            alike = parse_alike(known, mutated)
            left += alike is None
            if alike is not None:
                taken += 1
                assert (alike, length) == parse_header(mutated, max_encrypted_data_keys=None)
        for position in range(length):
            changed = seed[:position] + bytes((seed[position] ^ 1,)) + seed[position + 1 :]
            alike = parse_alike(known, changed)
            own = 3 <= position < 35 or length - 48 <= position  # id; commitment and tag
            assert (alike is not None) == (known.suite.committing and own)
            assert alike is None or alike == parse_header(changed, max_encrypted_data_keys=None)[0]
    assert taken
    assert left


def test_damaged_official_headers(vectors):
    rng = random.Random(5)
    seeds = [v.message[: v.test["header-length"]] for v in VECTORS.values() if "header-length" in v.test]
    for seed in seeds:
        for _ in range(10):
            fuzz.header_or_refusal(fuzz.random_mutation(rng, seed), None)


@pytest.mark.parametrize("seed", SEEDS[::5], ids=range(len(SEEDS[::5])))
def test_every_number_field_made_extreme(seed):
    """0, 1, max - 1, max and the sign bit in every field: refused, or a header that says exactly that."""
    assert fuzz.header_or_refusal(seed) is not None
    for what, mutated in fuzz.field_mutations(seed):
        for limit in (None, 10):
            try:
                fuzz.header_or_refusal(mutated, limit)
            except Exception as error:
                raise AssertionError(what) from error


@pytest.mark.parametrize("seed", SEEDS[::7], ids=range(len(SEEDS[::7])))
def test_every_prefix_asks_for_more(seed):
    """A stream can feed a header byte by byte: each prefix says how much could hold it, never too much."""
    for length in range(len(seed)):
        with pytest.raises(HeaderCutShortError) as caught:
            parse_header(seed[:length])
        assert length < caught.value.needed <= len(seed)
    for tail in (b"", b"x", bytes(100)):
        header, end = parse_header(seed + tail)
        assert (end, header.serialize()) == (len(seed), seed)


def test_growing_by_what_is_needed_ends():
    for seed in SEEDS:
        length, steps = 1, 0
        while True:
            try:
                header, _ = parse_header(seed[:length])
                break
            except HeaderCutShortError as error:
                needed = error.needed
            assert needed > length
            length, steps = needed, steps + 1
        assert header.length == len(seed)
        assert steps < 100


BOMBS = {
    "65,535 keys counted, none there": b"\x02\x04\x78" + bytes(32) + b"\0\0" + b"\xff\xff",
    "context of 65,535 bytes, none there": b"\x02\x04\x78" + bytes(32) + b"\xff\xff",
    "65,535 pairs counted": b"\x02\x04\x78" + bytes(32) + b"\x00\x02\xff\xff",
    "key of 65,535 bytes, none there": b"\x02\x04\x78" + bytes(32) + b"\0\0\0\1\xff\xff",
    "frames of 4 GiB": b"\x02\x04\x78" + bytes(32) + b"\0\0\0\1" + b"\0\1k\0\0\0\0" + b"\2\xff\xff\xff\xff",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_claimed_lengths_allocate_nothing(bomb):
    for limit in (None, 10):
        tracemalloc.start()
        with pytest.raises((FormatError, LimitExceededError)):
            parse_header(bomb, max_encrypted_data_keys=limit)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * 1024


def test_memory_is_bounded_by_the_bytes_present():
    """The densest headers there are: 16,000 pairs, 65,535 wrapped keys."""
    pairs = [(f"{i:x}", "") for i in range(8000)]
    many_pairs = craft.assemble(craft.Draft(stored_context=craft.context_bytes(pairs)))
    many_keys = craft.assemble(craft.Draft(edks=[("", b"", b"")] * 65_535))
    for parts in (many_pairs, many_keys):
        data = parts.header + parts.authentication
        tracemalloc.start()
        started = time.process_time()
        parse_header(data, max_encrypted_data_keys=None)
        elapsed = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * len(data) + 64 * 1024
        assert elapsed < 5  # traced, on a busy machine; 0.1 s otherwise


def test_too_many_keys_are_refused_before_any_is_parsed():
    parts = craft.assemble(craft.Draft(edks=[("x", b"y" * 100, b"z" * 100)] * 11))
    data = parts.header + parts.authentication
    with pytest.raises(LimitExceededError, match="11 encrypted data keys, the limit is 10"):
        parse_header(data)
    count_ends = data.index(b"\0\x0b\0\x01x") + 2
    with pytest.raises(LimitExceededError):  # nothing after the count is needed to refuse it
        parse_header(data[:count_ends])
    assert len(parse_header(data, max_encrypted_data_keys=11)[0].encrypted_data_keys) == 11


def test_headers_of_gigabytes_end_at_a_limit():
    key = craft.counted(b"x") + craft.counted(bytes(65_535)) + craft.counted(bytes(65_535))
    flood = b"\x02\x04\x78" + bytes(32) + b"\0\0" + b"\xff\xff" + key * 129
    with pytest.raises(LimitExceededError, match="header exceeds"):
        parse_header(flood, max_encrypted_data_keys=None)


ODD_STARTS = {
    "nothing": (b"", True),
    "text": (b"hello, world", False),
    "Parquet": (b"PAR1" + bytes(50), False),
    "zeros": (bytes(100), False),
    "Base64, version 1": (b"AYADeJt", False),
    "Base64, version 2": (b"AgR4TmV", False),
    "version 1, other type": (b"\x01\x81" + bytes(50), False),
    "version 3": (b"\x03" + bytes(50), False),
}


@pytest.mark.parametrize(("data", "recognised"), ODD_STARTS.values(), ids=ODD_STARTS)
def test_what_is_not_a_message_is_told_from_what_is_damaged(data, recognised):
    with pytest.raises(FormatError) as caught:
        parse_header(data)
    assert caught.value.recognised is recognised


REFUSED = {
    "suite 0": craft.Draft(header_id=0),
    "unknown suite": craft.Draft(header_id=0x0479),
    "suite of version 1": craft.Draft(header_id=0x0178),
    "no wrapped key": craft.Draft(edks=[]),
    "content type 0": craft.Draft(content_type=3),
    "unframed with a frame length": craft.Draft(content_type=1),
    "framed without one": craft.Draft(frame_length=0, content_type=2),
    "reserved field": craft.Draft(0x0178, reserved=1),
    "IV length": craft.Draft(0x0178, iv_length=16),
    "message type": craft.Draft(0x0178, type=0x81),
    "provider id not UTF-8": craft.Draft(stored_context=b"\0\1\0\1\xff\0\0"),
    "context cut short": craft.Draft(stored_context=b"\0"),
    "zero pairs": craft.Draft(stored_context=b"\0\0"),
}


@pytest.mark.parametrize("draft", REFUSED.values(), ids=REFUSED)
def test_refused_headers(draft):
    parts = craft.assemble(draft)
    with pytest.raises(FormatError):
        parse_header(parts.header + parts.authentication)


def test_provider_id_that_is_not_text():
    header = b"\x02\x04\x78" + bytes(32) + b"\0\0\0\1" + craft.counted(b"\xc3") + bytes(4) + bytes(60)
    with pytest.raises(FormatError, match="provider id"):
        parse_header(header)


# ------------------------------------------------------------------------------ what we write

KEYS = (
    EncryptedDataKey("aws-kms", b"arn:aws:kms:local:000000000000:key/1", b"blob"),
    EncryptedDataKey("é", b"", b""),
)


@pytest.mark.parametrize("suite", [UNSIGNED, SIGNED], ids=repr)
def test_a_message_id_drawn_twice_is_another_content_key_under_another_data_key(suite):
    """As by a virtual machine that is restored (RELIABILITY 23): IVs count from 1 in each message."""
    first, second = (derive_keys(suite, bytes([key]) * 32, b"m" * 32) for key in (1, 2))
    assert first.content_key != second.content_key
    assert first.commitment != second.commitment


@pytest.mark.parametrize("suite", [UNSIGNED, SIGNED], ids=repr)
@pytest.mark.parametrize("unstored", [{}, {"only": "authenticated"}], ids=["stored", "unstored"])
def test_a_written_header_is_read_back(suite, unstored):
    template = HeaderTemplate(suite, {"a": "1", "ü": ""}, KEYS, 4096, unstored)
    keys = derive_keys(suite, bytes(32), b"m" * 32)
    cipher = FrameCipher(keys.content_key, b"m" * 32)
    data = template.seal(b"m" * 32, keys.commitment, cipher.aead)
    header, end = parse_header(data)
    assert end == len(data) == template.length == header.length
    assert (header.suite, header.context, header.encrypted_data_keys) == (suite, {"a": "1", "ü": ""}, KEYS)
    assert (header.framed, header.frame_length, header.message_id) == (True, 4096, b"m" * 32)
    authenticate_header(header, cipher.aead, unstored)
    with pytest.raises(IntegrityError):
        authenticate_header(header, cipher.aead, {**unstored, "more": ""})
    if unstored:
        with pytest.raises(IntegrityError):
            authenticate_header(header, cipher.aead)


def test_the_written_header_is_the_one_that_the_specification_gives():
    """Byte for byte what the independent writer makes."""
    for suite_id in (0x0478, 0x0578):
        parts = craft.assemble(craft.Draft(suite_id, frame_length=4096, unstored={"x": "y"}))
        header, _ = parse_header(parts.header + parts.authentication)
        template = HeaderTemplate(header.suite, header.context, header.encrypted_data_keys, 4096, {"x": "y"})
        cipher = FrameCipher(parts.content_key, parts.message_id)
        sealed = template.seal(parts.message_id, header.commitment, cipher.aead)
        assert sealed == parts.header + parts.authentication


@pytest.mark.parametrize("suite", [s for s in SUITES.values() if not s.committing], ids=repr)
def test_no_header_of_a_suite_that_does_not_commit_is_written(suite):
    with pytest.raises(ValueError, match="never written"):
        HeaderTemplate(suite, {}, KEYS, 4096)


def test_limits_on_writing():
    with pytest.raises(LimitExceededError):
        HeaderTemplate(UNSIGNED, {}, (), 4096)
    with pytest.raises(LimitExceededError):
        HeaderTemplate(UNSIGNED, {}, KEYS[:1] * 65_536, 4096)
    with pytest.raises(LimitExceededError):
        HeaderTemplate(UNSIGNED, {"k": "v" * 65_535}, KEYS, 4096)
    with pytest.raises(LimitExceededError):
        HeaderTemplate(UNSIGNED, {}, (EncryptedDataKey("p", bytes(65_536), b""),), 4096)
