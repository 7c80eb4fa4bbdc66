"""Sizes: what one tells (RELIABILITY 33); a message of 1 TiB, sparse, read at the frames that are real (30)."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from families import craft
from families.keyrings import CRAFT_KEYRING as KEYS

import streamcrypt as sc
from streamcrypt.cli import main

FRAME = 2**20
SIZE = 2**40 + 12_345
OVERHEAD = 4 + 12 + 16


def write_sparse_message(path: Path, size: int, indexes: list[int]) -> dict[int, bytes]:
    """A message of which only these regular frames and the final one were ever written."""
    parts = craft.assemble(craft.Draft(0x0478, b"", FRAME))
    aead = AESGCM(parts.content_key)
    head = parts.header + parts.authentication
    count, rest = divmod(size, FRAME)
    written = {index: struct.pack(">Q", index) * (FRAME // 8) for index in indexes}
    with path.open("wb") as file:
        file.write(head)
        for index, plaintext in written.items():
            sequence = index + 1
            iv = struct.pack(">QI", 0, sequence)
            aad = craft.frame_aad(parts.message_id, craft.FRAME, sequence, FRAME)
            file.seek(len(head) + index * (FRAME + OVERHEAD))
            file.write(craft.u32(sequence) + iv + aead.encrypt(iv, plaintext, aad))
        sequence, plaintext = count + 1, b"e" * rest
        iv = struct.pack(">QI", 0, sequence)
        sealed = aead.encrypt(iv, plaintext, craft.frame_aad(parts.message_id, craft.FINAL, sequence, rest))
        file.seek(len(head) + count * (FRAME + OVERHEAD))
        file.write(b"\xff\xff\xff\xff" + craft.u32(sequence) + iv + craft.u32(rest) + sealed)
    return written


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_a_length_tells_nothing_but_the_plaintext_s(size: int, sign: bool) -> None:
    """Nothing is compressed, and no signature is shorter than another."""
    plaintexts = bytes(size), os.urandom(size), (b"again and again " * size)[:size]
    lengths = [
        len(sc.encrypt_bytes(plaintext, keys=KEYS, sign=sign, frame_size=4096))
        for plaintext in plaintexts * 3
    ]
    assert len(set(lengths)) == 1


def test_any_place_of_a_message_of_1_tib(tmp_path: Path) -> None:
    last = SIZE // FRAME - 1
    path = tmp_path / "huge"
    try:
        written = write_sparse_message(path, SIZE, [0, 1, 2**16, 2**19 + 7, last])
    except OSError as error:
        pytest.skip(f"THIS FILE SYSTEM HAS NO FILES OF 1 TiB: {error}")
    assert path.stat().st_size > SIZE
    assert sc.inspect(path).plaintext_size == SIZE
    with sc.open(path, keys=KEYS) as file:
        assert file.seek(0, io.SEEK_END) == SIZE
        for index, plaintext in written.items():
            file.seek(index * FRAME + 1000)
            assert file.read(5000) == plaintext[1000:6000]
        file.seek((last + 1) * FRAME - 10)  # over the border into the final frame
        assert file.read() == written[last][-10:] + b"e" * (SIZE % FRAME)
        file.seek(3 * FRAME)  # a hole of the file: nobody ever sealed it
        with pytest.raises(sc.IntegrityError, match="frame"):
            file.read(1)


def test_a_range_of_it_from_the_command_line(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path, key = tmp_path / "huge", tmp_path / "key"
    key.write_bytes(craft.WRAPPING_KEY)
    key.chmod(0o600)
    try:
        written = write_sparse_message(path, SIZE, [2**19])
    except OSError as error:
        pytest.skip(f"THIS FILE SYSTEM HAS NO FILES OF 1 TiB: {error}")
    start = 2**19 * FRAME + 100
    reference = f"raw-aes:{craft.NAMESPACE}/{craft.NAME}@{key}"
    assert main(["cat", str(path), "--range", f"{start}:{start + 50}", "--key", reference]) == 0
    assert capfdbinary.readouterr().out == written[2**19][100:150]
