"""Seeded inputs and yardsticks, shared by asv, pytest-benchmark and ratios.py.

Inputs come from a seed and are only ever added to, so that results stay comparable.  A yardstick is
the same work without streamcrypt, on the same files, by the same number of threads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KiB, MiB = 2**10, 2**20
WORKERS = 2
_STEP = MiB
_PIECE = 256 * KiB
_SPAN = 32 * MiB


def incompressible(length: int, seed: int = 0) -> bytes:
    """``length`` bytes that no file system can store in less."""
    return np.random.default_rng(seed).bytes(length)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder that is removed afterwards; STREAMCRYPT_BENCH_DIR says where (default: the temporary folder)."""
    folder = Path(tempfile.mkdtemp(prefix="streamcrypt-bench-", dir=os.environ.get("STREAMCRYPT_BENCH_DIR")))
    # What lies in it may begin anywhere on an ext4, away from files that others removed (bench.data.put_aside).
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["chattr", "+T", str(folder)], check=False, stderr=subprocess.DEVNULL)
    inner = folder / "work"
    inner.mkdir()
    try:
        yield inner
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def key_reference(folder: Path) -> str:
    """A raw AES wrapping key: the key service is not what is measured."""
    path = folder / "wrapping.key"
    if not path.exists():
        path.write_bytes(os.urandom(32))
        path.chmod(0o600)
    return f"raw-aes:bench/key@{path}"


def make_files(folder: Path, count: int, length: int) -> Path:
    """``count`` files of ``length`` bytes."""
    folder.mkdir()
    block = incompressible(min(length, 32 * MiB), seed=count)
    for number in range(count):
        with (folder / f"{number:05}").open("wb") as file:
            for start in range(0, length, len(block)):
                file.write(block[: min(len(block), length - start)])
    return folder


def total_length(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


_REST = 64 * MiB  # not yet written back, by anybody
_PATIENCE = 10.0  # seconds: others may write all the time


def wait_for_rest() -> None:
    """Until the disk has taken what was written and removed: a run that begins earlier waits for it meanwhile."""
    os.sync()
    deadline = time.monotonic() + _PATIENCE
    while _unwritten() > _REST and time.monotonic() < deadline:
        time.sleep(0.1)


def _unwritten() -> int:
    """Bytes of the page cache that are on no disk yet."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("Dirty", "Writeback")) * KiB


# -- yardsticks


def copy_loop(source: Path, target: Path, workers: int = WORKERS) -> None:
    """The engine's loop without the cipher: preadv into a reused buffer, pwrite."""
    target.mkdir()

    def work(span: tuple[Path, int, int]) -> None:
        path, start, stop = span
        buffer = _buffer()
        reading = os.open(path, os.O_RDONLY)
        writing = os.open(target / path.name, os.O_WRONLY | os.O_CREAT, 0o600)
        for offset in range(start, stop, _STEP):
            count = os.preadv(reading, (buffer,), offset)
            for begin in range(0, count, _PIECE):  # as the engine writes plaintext
                os.pwrite(writing, buffer[begin : min(begin + _PIECE, count)], offset + begin)
        os.close(reading)
        os.close(writing)

    _in_threads(work, _spans(source), workers)


def read_loop(source: Path, workers: int = WORKERS) -> None:
    def work(span: tuple[Path, int, int]) -> None:
        path, start, stop = span
        buffer = _buffer()
        reading = os.open(path, os.O_RDONLY)
        for offset in range(start, stop, _STEP):
            os.preadv(reading, (buffer,), offset)
        os.close(reading)

    _in_threads(work, _spans(source), workers)


def cipher_loop(source: Path, workers: int = WORKERS) -> None:
    """As many bytes through AES-256-GCM, in cache, frames of 1 MiB."""
    cipher = AESGCM(os.urandom(32))

    def work(span: tuple[Path, int, int]) -> None:
        _, start, stop = span
        plaintext, sealed = _buffer(), memoryview(bytearray(_STEP + 16))
        for number, _ in enumerate(range(start, stop, _STEP)):
            cipher.encrypt_into(number.to_bytes(12, "big"), plaintext, b"", sealed)

    _in_threads(work, _spans(source), workers)


def hash_loop(source: Path, workers: int = WORKERS) -> None:
    """As many bytes through SHA-384, whole files side by side."""
    from cryptography.hazmat.primitives import hashes

    def work(path: Path) -> None:
        digest, buffer = hashes.Hash(hashes.SHA384()), _buffer()
        for _ in range(0, path.stat().st_size, _STEP):
            digest.update(buffer)
        digest.finalize()

    _in_threads(work, sorted(source.iterdir()), workers)


_BARE = """
import os, sys
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
source, target, part, parts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for name in sorted(os.listdir(source))[part::parts]:
    reading = os.open(f"{source}/{name}", os.O_RDONLY)
    plaintext = os.read(reading, os.fstat(reading).st_size)
    os.close(reading)
    sealed = AESGCM(os.urandom(32)).encrypt(bytes(12), plaintext, b"")
    writing = os.open(f"{target}/.{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(writing, sealed)
    os.close(writing)
    os.rename(f"{target}/.{name}", f"{target}/{name}")
"""


def bare_loop(source: Path, target: Path, workers: int = WORKERS) -> None:
    """The least that Python can do for small files: processes that read, seal, write and rename, nothing else."""
    target.mkdir()
    running = [
        subprocess.Popen([sys.executable, "-c", _BARE, str(source), str(target), str(part), str(workers)])
        for part in range(workers)
    ]
    assert [process.wait() for process in running] == [0] * workers


# The header is that of a message of ours; id, commitment and tag are this message's own.  Each call is made
# for 16 files before the next one, as the engine does: one file after the other took a fifth more.
_BARE_MESSAGES = """
import os, struct, sys
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
source, target, header, part, parts = *sys.argv[1:3], bytes.fromhex(sys.argv[3]), *map(int, sys.argv[4:6])
sha512, zero, data_key, together = SHA512(), bytes(12), os.urandom(32), 16
reading_from, writing_to = (os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in (source, target))
start, middle, prefix = header[:3], header[35:-48], len(header) + 24
iv = bytes(11) + b"\\x01"
buffers = [memoryview(bytearray(2**15)) for _ in range(2 * together)]
def state(status):
    return status.st_size, status.st_mtime_ns, status.st_ino
names = sorted(os.listdir(source))[part::parts]
for step in range(0, len(names), together):
    files = names[step : step + together]
    reading = [os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=reading_from) for name in files]
    opened = [state(os.fstat(descriptor)) for descriptor in reading]
    plaintexts = [buffer[:size] for buffer, (size, _, _) in zip(buffers, opened)]
    for descriptor, plaintext in zip(reading, plaintexts):
        assert os.preadv(descriptor, (plaintext,), 0) == len(plaintext)
    for name, was in zip(files, opened):
        assert was == state(os.stat(name, dir_fd=reading_from, follow_symlinks=False))
    for descriptor in reading:
        os.close(descriptor)
    messages = []
    for plaintext, buffer in zip(plaintexts, buffers[together:]):
        message_id = os.urandom(32)
        content = HMAC(HKDF.extract(sha512, message_id, data_key), sha512)
        commitment = content.copy()
        content.update(b"\\x04\\x78DERIVEKEY\\x01")
        commitment.update(b"COMMITKEY\\x01")
        cipher = AESGCM(content.finalize()[:32])
        body = b"".join((start, message_id, middle, commitment.finalize()[:32]))
        length = len(plaintext)
        message = buffer[: prefix + length + 16]
        message[:prefix] = b"".join((
            body, cipher.encrypt(zero, b"", body), struct.pack(">II12sI", 0xFFFFFFFF, 1, iv, length)
        ))
        aad = message_id + b"AWSKMSEncryptionClient Final Frame" + struct.pack(">IQ", 1, length)
        cipher.encrypt_into(iv, plaintext, aad, message[prefix:])
        messages.append(message)
    writing = [os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o600, dir_fd=writing_to) for _ in files]
    for descriptor, message in zip(writing, messages):
        os.pwrite(descriptor, message, 0)
    for descriptor, name in zip(writing, files):
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=writing_to, follow_symlinks=True)
    for descriptor in writing:
        os.close(descriptor)
"""


def bare_messages(source: Path, target: Path, header: bytes, workers: int = WORKERS) -> None:
    """The least that Python can do for what is asked: small files into messages, with derived keys, header,
    commitment, a source that did not change, and a name only when whole."""
    target.mkdir()
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _BARE_MESSAGES,
                str(source),
                str(target),
                header.hex(),
                str(part),
                str(workers),
            ]
        )
        for part in range(workers)
    ]
    assert [process.wait() for process in running] == [0] * workers


def cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)


def _spans(source: Path) -> list[tuple[Path, int, int]]:
    spans = []
    for path in sorted(source.iterdir()):
        length = path.stat().st_size
        spans += [(path, start, min(start + _SPAN, length)) for start in range(0, length, _SPAN)]
    return spans


_local = threading.local()


def _buffer() -> memoryview:
    """Memory that begins a page, as the engine's does; older commits are measured with this, too."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(mmap.mmap(-1, _STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    buffer: memoryview = _local.buffer
    return buffer


def _in_threads(work: Callable[[Any], None], items: Iterable[Any], workers: int) -> None:
    remaining, lock = iter(items), threading.Lock()

    def run() -> None:
        while True:
            with lock:
                item = next(remaining, None)
            if item is None:
                return
            work(item)

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
