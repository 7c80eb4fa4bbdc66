"""Campaigns on bytes: fuzzed headers, flipped bits (RELIABILITY 1, 3, 7)."""

from __future__ import annotations

import os
import random
import time

import pytest
from families import craft, fuzz
from families.craft import Draft
from families.keyrings import CRAFT_KEYRING
from families.sources import MemorySource, dribble
from families.vectors import VECTORS

from streamcrypt.errors import StreamcryptError
from streamcrypt.keys.materials import Materials
from streamcrypt.message.suites import CommitmentPolicy
from streamcrypt.streams import DecryptingFile, ReadingRules, open_message, open_stream

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

MATERIALS = Materials(CRAFT_KEYRING)
RULES = ReadingRules(commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT)


def test_million_fuzzed_headers(campaign):
    """A value or FormatError/LimitExceededError, in under 50 ms of processor time each."""
    run = campaign("3")
    rng = random.Random(run.seed)
    seeds = fuzz.seeds() + [
        v.message[: v.test["header-length"]] for v in VECTORS.values() if "header-length" in v.test
    ]
    slowest, accepted = 0.0, 0
    for _ in range(run.number(1_000_000)):
        data = fuzz.random_mutation(rng, rng.choice(seeds))
        started = time.thread_time()
        failure = None
        try:
            accepted += fuzz.header_or_refusal(data, rng.choice((None, 10))) is not None
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}; {data.hex()}"
        elapsed = time.thread_time() - started
        slowest = max(slowest, elapsed)
        if elapsed > 0.05:
            failure = f"{elapsed:.3f} s for {data.hex()}"
        run.trial(failure, quiet=True)
    run.notes = {"seeds": len(seeds), "accepted": accepted, "slowest_ms": round(slowest * 1000, 2)}
    run.finish()


def whole(message):
    open_message(message, MATERIALS, RULES)


def streamed(message):
    for _ in open_stream(dribble(message, 500), MATERIALS, RULES):
        pass


def seekable(message):
    with DecryptingFile(MemorySource(message), MATERIALS, RULES) as file:
        if file.header.suite.signed:
            file.verify_signature()
        file.read()


def test_random_flips(campaign):
    """10^5 flipped bits in messages of all suites, framed and unframed, through three ways in."""
    run = campaign("1")
    rng = random.Random(run.seed)
    messages = [
        craft.assemble(Draft(suite_id, os.urandom(size), frame_length)).join()
        for suite_id in craft.SUITES
        for frame_length in (0, 128, 4096)
        for size in (0, 1000, 5000)
    ]
    ways = (whole, streamed, seekable)
    classes: dict[str, int] = {}
    for number in range(run.number(100_000)):
        message = bytearray(rng.choice(messages))
        bit = rng.randrange(8 * len(message))
        message[bit // 8] ^= 1 << bit % 8
        failure = None
        try:
            ways[number % 3](bytes(message))
        except StreamcryptError as error:
            classes[type(error).__name__] = classes.get(type(error).__name__, 0) + 1
        except BaseException as error:
            failure = f"{type(error).__name__} for bit {bit} of {bytes(message).hex()}"
        else:
            failure = f"accepted: bit {bit} of {bytes(message).hex()}"
        run.trial(failure, quiet=True)
    run.notes = {"classes": classes}
    run.finish()


def test_flips_in_a_large_message(campaign):
    """Flipped bits in 100 MiB, found by verifying the frame that holds them."""
    run = campaign("1")
    rng = random.Random(run.seed)
    plaintext = bytes(100 * 2**20)
    message = craft.assemble(Draft(0x0478, plaintext, 2**20)).join()
    data = bytearray(message)
    source = MemorySource(b"")
    source.data, source.size = data, len(data)  # type: ignore[assignment]  # changed under the reader
    header_length = len(message) - 100 * (2**20 + 32) - 40
    for _ in range(run.number(2_000)):
        bit = rng.randrange(8 * header_length, 8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        failure = None
        frame = (bit // 8 - header_length) // (2**20 + 32)
        try:
            with DecryptingFile(source, MATERIALS, RULES) as file:
                file.read_at(min(frame * 2**20, len(plaintext) - 1), 1)
        except StreamcryptError:
            pass
        except BaseException as error:
            failure = f"{type(error).__name__} for bit {bit}"
        else:
            failure = f"accepted: bit {bit}"
        data[bit // 8] ^= 1 << bit % 8
        run.trial(failure, quiet=True)
    run.finish()
