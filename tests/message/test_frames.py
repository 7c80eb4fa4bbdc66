"""Frames: sealed as the specification says, opened only when authentic, and nothing left behind otherwise."""

from __future__ import annotations

import os
import random
import threading

import pytest
from families import craft
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcrypt.errors import FormatError, IntegrityError
from streamcrypt.message.footer import Signer, Verifier, parse_footer
from streamcrypt.message.frames import (
    FINAL_OVERHEAD,
    REGULAR_OVERHEAD,
    FrameCipher,
    unframed_length,
)
from streamcrypt.message.suites import SIGNED

F = 64
KEY, ID = bytes(range(32)), bytes(range(100, 132))


def sealed(plaintext: bytes, index: int = 0, frame_length: int = F) -> bytearray:
    frames = bytearray(len(plaintext) // frame_length * (frame_length + REGULAR_OVERHEAD))
    assert FrameCipher(KEY, ID).seal_regular(plaintext, index, frame_length, memoryview(frames)) == len(
        frames
    )
    return frames


@given(st.integers(1, 200), st.integers(0, 6), st.integers(0, 2**32 - 10), st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_the_bytes_are_the_specification_s(frame_length, count, index, tail):
    """Against the independent writer, for any number of frames from any place on."""
    plaintext = random.Random(index).randbytes(count * frame_length)
    tail = tail[:frame_length]
    cipher = FrameCipher(KEY, ID)
    regular = sealed(plaintext, index, frame_length)
    final = bytearray(FINAL_OVERHEAD + len(tail))
    assert cipher.seal_final(tail, index + count, memoryview(final)) == len(final)
    draft = craft.Draft(
        0x0478, plaintext + tail, frame_length, first_sequence=index + 1, full_final=bool(tail)
    )
    if tail or not count:
        expected = b"".join(craft.seal_body(draft, cipher.aead, ID))
        assert bytes(regular + final) == expected
    opened = bytearray(len(plaintext))
    assert cipher.open_regular(regular, index, frame_length, memoryview(opened)) == len(plaintext)
    assert opened == plaintext
    ending = bytearray(frame_length)
    assert cipher.open_final(final, index + count, frame_length, memoryview(ending)) == len(tail)
    assert ending[: len(tail)] == tail


def test_an_iv_is_its_frame_s_number():
    frames = sealed(bytes(5 * F), index=70_000)
    stride = F + REGULAR_OVERHEAD
    ivs = [bytes(frames[i * stride + 4 : i * stride + 16]) for i in range(5)]
    assert ivs == [bytes(8) + craft.u32(70_001 + i) for i in range(5)]


def test_a_frame_that_does_not_authenticate_leaves_nothing_in_the_caller_s_buffer():
    """``decrypt_into`` leaves its output when the tag fails; 10^4 damaged frames show that we wipe it."""
    rng = random.Random(7)
    cipher = FrameCipher(KEY, ID)
    secret = b"\xa5" * (3 * F)
    good = bytes(sealed(secret))
    stride = F + REGULAR_OVERHEAD
    for _ in range(10_000):
        damaged = bytearray(good)
        at = rng.randrange(len(damaged))
        damaged[at] ^= 1 << rng.randrange(8)
        broken = at // stride
        target = bytearray(b"\x11" * (3 * F))
        with pytest.raises(IntegrityError):
            cipher.open_regular(damaged, 0, F, memoryview(target))
        assert target[: broken * F] == secret[: broken * F]  # the frames before it were authentic
        after = bytes(target[broken * F :])
        assert b"\xa5" not in after
        assert after in (bytes(F) + b"\x11" * (len(after) - F), b"\x11" * len(after))


def test_nor_does_the_final_frame():
    rng = random.Random(8)
    cipher = FrameCipher(KEY, ID)
    final = bytearray(FINAL_OVERHEAD + 50)
    cipher.seal_final(b"\xa5" * 50, 3, memoryview(final))
    for _ in range(2_000):
        damaged = bytearray(final)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        target = bytearray(b"\x11" * F)
        with pytest.raises(IntegrityError):
            cipher.open_final(damaged, 3, F, memoryview(target))
        assert b"\xa5" not in target


def test_one_cipher_serves_many_threads():
    cipher = FrameCipher(KEY, ID)
    plaintext = os.urandom(16 * 4096)
    frames = bytearray(16 * (4096 + REGULAR_OVERHEAD))
    cipher.seal_regular(plaintext, 0, 4096, memoryview(frames))
    wrong = []

    def work():
        target = bytearray(len(plaintext))
        for _ in range(50):
            cipher.open_regular(frames, 0, 4096, memoryview(target))
            if target != plaintext:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_all_pairwise_swaps_of_64_frames_are_refused():
    cipher = FrameCipher(KEY, ID)
    count, size = 64, 16
    stride = size + REGULAR_OVERHEAD
    frames = sealed(os.urandom(count * size), frame_length=size)
    target = memoryview(bytearray(count * size))
    pieces = [bytes(frames[i * stride : (i + 1) * stride]) for i in range(count)]
    for i in range(count):
        for j in range(i):
            swapped = list(pieces)
            swapped[i], swapped[j] = pieces[j], pieces[i]
            with pytest.raises(IntegrityError):
                cipher.open_regular(b"".join(swapped), 0, size, target)
            # Renumbered to look right, they still do not authenticate.
            swapped[i] = craft.u32(i + 1) + swapped[i][4:]
            swapped[j] = craft.u32(j + 1) + swapped[j][4:]
            with pytest.raises(IntegrityError):
                cipher.open_regular(b"".join(swapped), 0, size, target)


def test_a_frame_of_another_message_under_the_same_key_is_refused():
    """Suites without a derivation share the content key: the message id in the AAD tells them apart."""
    other = bytearray(F + REGULAR_OVERHEAD)
    FrameCipher(KEY, b"o" * 32).seal_regular(bytes(F), 0, F, memoryview(other))
    with pytest.raises(IntegrityError):
        FrameCipher(KEY, ID).open_regular(other, 0, F, memoryview(bytearray(F)))


FINAL_DAMAGE = {
    "empty": lambda frame: b"",
    "cut": lambda frame: frame[: FINAL_OVERHEAD - 1],
    "one byte short": lambda frame: frame[:-1],
    "one byte long": lambda frame: frame + b"\0",
    "no mark": lambda frame: b"\xff\xff\xff\xfe" + frame[4:],
    "other number": lambda frame: frame[:4] + craft.u32(9) + frame[8:],
    "length + 1": lambda frame: frame[:20] + craft.u32(51) + frame[24:],
    "length 2^32 - 1": lambda frame: frame[:20] + b"\xff" * 4 + frame[24:],
}


@pytest.mark.parametrize("damage", FINAL_DAMAGE.values(), ids=FINAL_DAMAGE)
def test_damaged_final_frames(damage):
    cipher = FrameCipher(KEY, ID)
    final = bytearray(FINAL_OVERHEAD + 50)
    cipher.seal_final(bytes(50), 3, memoryview(final))
    cipher.open_final(final, 3, F, memoryview(bytearray(F)))
    with pytest.raises(IntegrityError):
        cipher.open_final(damage(bytes(final)), 3, F, memoryview(bytearray(F)))


def test_a_final_frame_longer_than_the_frame_length():
    cipher = FrameCipher(KEY, ID)
    final = bytearray(FINAL_OVERHEAD + F + 1)
    cipher.seal_final(bytes(F + 1), 0, memoryview(final))
    with pytest.raises(IntegrityError):
        cipher.open_final(final, 0, F, memoryview(bytearray(2 * F)))


def test_unframed_bodies_state_no_more_than_the_cipher_allows():
    with pytest.raises(FormatError):
        unframed_length(bytes(12) + (2**36 - 31).to_bytes(8, "big"))
    assert unframed_length(bytes(12) + (2**36 - 32).to_bytes(8, "big")) == 2**36 - 32
    for body in (b"", bytes(35), bytes(12) + (1).to_bytes(8, "big") + bytes(16)):
        with pytest.raises(IntegrityError):
            FrameCipher(KEY, ID).open_unframed(body)


# ---------------------------------------------------------------------------------- footer


def test_footers_have_the_length_that_was_planned():
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    for i in range(40):
        signer = Signer(SIGNED, key)
        signer.update(b"message ")
        signer.update(bytes([i]))
        footer = signer.footer()
        assert len(footer) == 105
        verifier = Verifier(SIGNED, key.public_key())
        verifier.update(b"message " + bytes([i]))
        verifier.verify(footer)


FOOTER_DAMAGE = {
    "missing": lambda footer: b"",
    "one byte": lambda footer: footer[:1],
    "cut": lambda footer: footer[:-1],
    "byte after it": lambda footer: footer + b"\0",
    "length + 1": lambda footer: craft.u16(104) + footer[2:],
    "empty signature": lambda footer: b"\0\0",
    "zeros": lambda footer: footer[:2] + bytes(103),
    "length 65,535": lambda footer: b"\xff\xff" + footer[2:],
}


@pytest.mark.parametrize("damage", FOOTER_DAMAGE.values(), ids=FOOTER_DAMAGE)
def test_damaged_footers(damage):
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    signer = Signer(SIGNED, key)
    signer.update(b"message")
    footer = signer.footer()
    verifier = Verifier(SIGNED, key.public_key())
    verifier.update(b"message")
    with pytest.raises(IntegrityError):
        verifier.verify(damage(footer))


@given(st.binary(max_size=120))
@settings(deadline=None)
def test_any_footer_bytes(data):
    try:
        signature, length = parse_footer(data)
    except FormatError:
        return
    assert data[:length] == craft.counted(signature)
