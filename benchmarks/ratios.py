"""The figures of the README: each job against its yardstick in the same round, alternating, medians.

    python benchmarks/ratios.py [--rounds 5] [ROW …]

Rows run one after the other; within a round their variants run in a shuffled order.  A row prints the
median of the ratios over all rounds, the least and the greatest, and what it is to reach.  A run on large
files begins when the disk has taken what the one before left.
``STREAMCRYPT_BENCH_DIR`` says on which file system (about 7 GiB).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import streamcrypt as sc
from streamcrypt.bench.data import put_aside, warm
from streamcrypt.message.header import parse_header

sys.path.insert(0, str(Path(__file__).parent))
from suite.common import (
    KiB,
    MiB,
    bare_loop,
    bare_messages,
    cipher_loop,
    copy_loop,
    cp,
    hash_loop,
    incompressible,
    key_reference,
    make_files,
    read_loop,
    remove,
    wait_for_rest,
    workspace,
)

Variants = dict[str, Callable[[], object]]
Seconds = dict[str, float]


def rounds_of(
    variants: Variants, rounds: int, before: Callable[[str], None] = lambda name: None
) -> list[Seconds]:
    """Seconds of every variant in every round; the first round warms up and does not count."""
    order, measured = list(variants), []
    generator = random.Random(0)
    for number in range(rounds + 1):
        generator.shuffle(order)
        seconds = {}
        for name in order:
            before(name)
            started = time.perf_counter()
            variants[name]()
            seconds[name] = time.perf_counter() - started
        if number:
            measured.append(seconds)
    return measured


def show(
    row: str, target: str, measured: list[Seconds], ratio: Callable[[Seconds], float], note: str = ""
) -> None:
    ratios = sorted(ratio(seconds) for seconds in measured)
    print(
        f"| {row} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {target} | {note} |",
        flush=True,
    )


def _rate(measured: list[Seconds], name: str, length: int) -> str:
    return f"{name} {length / statistics.median(s[name] for s in measured) / 1e9:.2f}"


def large(rounds: int, count: int, length: int, what: str) -> None:
    with workspace() as folder:
        keys = key_reference(folder)
        source = make_files(folder / "source", count, length)
        encrypted = folder / "encrypted"
        sc.encrypt(source, encrypted, keys=keys, workers=2, fsync=False)

        variants: Variants = {
            "copy": lambda: copy_loop(source, folder / "copy"),
            "cp": lambda: cp(source, folder / "cp"),
            "cipher": lambda: cipher_loop(source),
            "read": lambda: read_loop(source),
            "encrypt": lambda: sc.encrypt(source, folder / "encrypt", keys=keys, workers=2, fsync=False),
            "decrypt": lambda: sc.decrypt(encrypted, folder / "decrypt", keys=keys, workers=2, fsync=False),
            "verify": lambda: sc.verify(encrypted, keys=keys, workers=2),
        }

        def before(name: str) -> None:
            for other in (
                "copy",
                "cp",
                "encrypt",
                "decrypt",
            ):  # one output at a time: memory for the page cache
                remove(folder / other)
            wait_for_rest()
            warm(folder, count * length * 5 // 4)

        measured = rounds_of(variants, rounds, before)
        total = count * length
        rates = ", ".join(_rate(measured, name, total) for name in variants) + " GB/s"
        for name in ("encrypt", "decrypt"):
            show(
                f"{name}, {what}: of the ceiling",
                "0.9",
                measured,
                lambda s, n=name: (s["copy"] + s["cipher"]) / s[n],
                rates,
            )
            show(f"{name}, {what}: × cp", "1.2", measured, lambda s, n=name: s["cp"] / s[n])
        show(
            f"verify, {what}: of the ceiling",
            "0.8",
            measured,
            lambda s: (s["read"] + s["cipher"]) / s["verify"],
        )


def row_files(rounds: int) -> None:
    large(rounds, 64, 32 * MiB, "64 files of 32 MiB")


def row_file(rounds: int) -> None:
    large(rounds, 1, 2048 * MiB, "one file of 2 GiB")


def row_small(rounds: int) -> None:
    with workspace() as folder:
        keys = key_reference(folder)
        source = make_files(folder / "source", 10_000, 16 * KiB)
        header = parse_header(sc.encrypt_bytes(b"", keys=keys))[0].serialize()
        variants: Variants = {
            "cp": lambda: cp(source, folder / "cp"),
            "bare": lambda: bare_loop(source, folder / "bare"),
            "messages": lambda: bare_messages(source, folder / "messages", header),
            "encrypt": lambda: sc.encrypt(source, folder / "encrypt", keys=keys, workers=2, fsync=False),
        }
        measured = rounds_of(variants, rounds, lambda name: put_aside(folder / name))
        note = ", ".join(
            f"{n} {statistics.median(s[n] for s in measured) * 100:.0f} µs a file" for n in variants
        )
        show(
            "encrypt, 10,000 files of 16 KiB: × cp -r",
            "1.0",
            measured,
            lambda s: s["cp"] / s["encrypt"],
            note,
        )
        show("encrypt, 10,000 files of 16 KiB: × two processes that read, seal, write and rename", "",
             measured, lambda s: s["bare"] / s["encrypt"])  # fmt: skip
        show("encrypt, 10,000 files of 16 KiB: × two processes that make such messages, and nothing else", "",
             measured, lambda s: s["messages"] / s["encrypt"])  # fmt: skip
        show("two processes that make such messages, and nothing else: × cp -r", "",
             measured, lambda s: s["cp"] / s["messages"])  # fmt: skip


def row_budget(rounds: int) -> None:
    """Where the processor time of a small file goes: what the kernel takes, what the interpreter takes."""
    with workspace() as folder:
        keys = key_reference(folder)
        source = make_files(folder / "source", 10_000, 16 * KiB)
        header = parse_header(sc.encrypt_bytes(b"", keys=keys))[0].serialize()
        variants: Variants = {
            "cp": lambda: cp(source, folder / "cp"),
            "messages": lambda: bare_messages(source, folder / "messages", header),
            "encrypt": lambda: sc.encrypt(source, folder / "encrypt", keys=keys, workers=2, fsync=False),
        }
        spent: dict[str, list[list[float]]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, work in variants.items():
                put_aside(folder / name)
                before = os.times()
                work()
                after = os.times()
                spent[name].append(
                    [100 * (late - early) for early, late in zip(before[:4], after[:4], strict=True)]
                )
        for name, times in spent.items():
            user, system, their_user, their_system = min(times, key=sum)
            print(
                f"| processor time of a file, {name} | {user + system + their_user + their_system:.0f} µs | "
                f"user {user + their_user:.0f}, kernel {system + their_system:.0f} | "
                f"| this process {user + system:.0f}, its workers {their_user + their_system:.0f} |",
                flush=True,
            )
        making = sorted(_making_files(folder / f"made-{number}") for number in range(20))
        print(
            f"| processor time of a new file's name and inode | {making[10]:.0f} µs | "
            f"{making[0]:.0f} to {making[-1]:.0f} | | about 10 where ext4 passes over no freed inodes |",
            flush=True,
        )


def _making_files(folder: Path, count: int = 100) -> float:
    """Processor µs for an empty file."""
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    started = time.thread_time_ns()
    for number in range(count):
        os.close(os.open(f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=descriptor))
    spent = time.thread_time_ns() - started
    os.close(descriptor)
    return spent / count / 1000


def row_signed(rounds: int) -> None:
    with workspace() as folder:
        keys = key_reference(folder)
        source = make_files(folder / "source", 32, 16 * MiB)
        variants: Variants = {
            "hash": lambda: hash_loop(source),
            "copy": lambda: copy_loop(source, folder / "copy"),
            "cipher": lambda: cipher_loop(source),
            "encrypt": lambda: sc.encrypt(
                source, folder / "encrypt", keys=keys, workers=2, sign=True, fsync=False
            ),
        }
        measured = rounds_of(variants, rounds, lambda name: remove(folder / name))
        show("signed, 32 files of 16 MiB: of the SHA-384 rate", "1.0", measured, lambda s: s["hash"] / s["encrypt"],
             ", ".join(_rate(measured, n, 512 * MiB) for n in variants) + " GB/s")  # fmt: skip
        show("signed: of 1 / (1/hash + 1/copy + 1/cipher)", "", measured,
             lambda s: (s["hash"] + s["copy"] + s["cipher"]) / s["encrypt"])  # fmt: skip
        show("that bound: of the SHA-384 rate", "", measured,
             lambda s: s["hash"] / (s["hash"] + s["copy"] + s["cipher"]))  # fmt: skip


_CAT = """
import mmap, os, sys
buffer = memoryview(mmap.mmap(-1, 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
while True:
    done = 0
    while done < len(buffer) and (count := os.readv(0, (buffer[done:],))):
        done += count
    if not done:
        break
    sent = 0
    while sent < done:
        sent += os.write(1, buffer[sent:done])
"""


def row_stream(rounds: int) -> None:
    with workspace() as folder:
        keys = key_reference(folder)
        source = make_files(folder / "source", 1, 1024 * MiB) / "00000"

        def pipe(command: list[str]) -> None:
            with subprocess.Popen(["cat", str(source)], stdout=subprocess.PIPE) as cat:
                with subprocess.Popen(command, stdin=cat.stdout, stdout=subprocess.PIPE) as middle:
                    subprocess.run(["cat"], stdin=middle.stdout, stdout=subprocess.DEVNULL, check=True)
                assert middle.returncode == 0

        encrypting = [sys.executable, "-m", "streamcrypt", "encrypt", "-", "-", "--key", keys, "--quiet"]
        variants: Variants = {
            "loop": lambda: pipe([sys.executable, "-c", _CAT]),
            "encrypt": lambda: pipe(encrypting),
        }
        measured = rounds_of(variants, rounds)
        show("encrypt, standard input to output: of the same loop", "0.8", measured, lambda s: s["loop"] / s["encrypt"],
             ", ".join(_rate(measured, n, 1024 * MiB) for n in variants) + " GB/s")  # fmt: skip


def row_random(rounds: int) -> None:
    with workspace() as folder:
        keys = key_reference(folder)
        path = folder / "message"
        with sc.open(path, "wb", keys=keys, fsync=False) as file:
            for number in range(256):
                file.write(incompressible(MiB, seed=number))
        with sc.open(path, keys=keys) as file:
            reader, descriptor = file.frame_reader(), os.open(path, os.O_RDONLY)
            assert reader is not None
            stride = MiB + 32
            cipher, geometry = file._message.cipher, reader.geometry
            frame, plaintext = memoryview(bytearray(stride)), memoryview(bytearray(MiB))
            places = [(n * 37) % 255 * MiB + 4321 for n in range(200)]

            def by_hand() -> None:
                for place in places:
                    index = place // MiB
                    os.preadv(descriptor, (frame,), geometry.frame_offset(index))
                    cipher.open_regular(frame, index, MiB, plaintext)
                    bytes(plaintext[place % MiB : place % MiB + 64 * KiB])

            def reads() -> None:
                for place in places:
                    file.seek(place)
                    file.read(64 * KiB)

            measured = rounds_of({"by hand": by_hand, "read": reads}, rounds)
            os.close(descriptor)
        show(
            "random reads of 64 KiB: × the time by hand",
            "at most 1.3",
            measured,
            lambda s: s["read"] / s["by hand"],
        )


def row_startup(rounds: int) -> None:
    with workspace() as folder:
        environment = {**os.environ, "STREAMCRYPT_HOME": str(folder / "home")}
        (folder / "in").write_bytes(bytes(1024))

        script = str(Path(sys.executable).with_name("streamcrypt"))

        def run(*words: str) -> None:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)

        run(script, "kms", "create-key", "--alias", "alias/bench", "--quiet")
        variants: Variants = {
            "python": lambda: run(sys.executable, "-c", "pass"),
            "version": lambda: run(script, "--version"),
            "encrypt": lambda: run(script, "encrypt", str(folder / "in"), str(folder / "out"),
                                   "--key", "local:alias/bench", "--overwrite", "--quiet"),
        }  # fmt: skip
        measured = rounds_of(variants, 3 * rounds)
        note = ", ".join(f"{n} {statistics.median(s[n] for s in measured) * 1e3:.0f} ms" for n in variants)
        show(
            "--version: × an empty Python",
            "at most 2.5",
            measured,
            lambda s: s["version"] / s["python"],
            note,
        )
        show(
            "encrypt 1 KiB, local key: × an empty Python",
            "at most 6",
            measured,
            lambda s: s["encrypt"] / s["python"],
        )


def row_sdk(rounds: int) -> None:
    """The official SDK for Python, suite 0x0478, raw AES keyring of its own."""
    try:
        sdk = _Sdk()
    except ImportError as error:
        print(f"| official SDK | skipped: {error.name} is not installed | | | |")
        return
    with workspace() as folder:
        keys = key_reference(folder)
        sdk.use((folder / "wrapping.key").read_bytes())
        source = make_files(folder / "source", 1, 256 * MiB) / "00000"
        out, message, plain = folder / "out", folder / "message", folder / "plain"
        variants: Variants = {
            "documented 4 KiB": lambda: sdk.encrypt_file(source, out, 4 * KiB, 8 * KiB),
            "documented 1 MiB": lambda: sdk.encrypt_file(source, out, MiB, 8 * KiB),
            "tuned": lambda: sdk.encrypt_file(source, out, MiB, MiB),
            "encrypt": lambda: sc.encrypt(source, out, keys=keys, workers=2, fsync=False),
        }

        def before(name: str) -> None:
            for made in (out, plain):
                remove(made)
            warm(folder, 320 * MiB)

        measured = rounds_of(variants, rounds, before)
        note = ", ".join(_rate(measured, n, 256 * MiB) for n in variants) + " GB/s"
        show("encrypt 256 MiB: × SDK, documented loop, 4 KiB frames", "10", measured,
             lambda s: s["documented 4 KiB"] / s["encrypt"], note)  # fmt: skip
        show("encrypt 256 MiB: × SDK, tuned by hand", "2", measured, lambda s: s["tuned"] / s["encrypt"])
        sc.encrypt(source, message, keys=keys, fsync=False)
        small_frames = folder / "small-frames"
        sc.encrypt(source, small_frames, keys=keys, fsync=False, frame_size=4 * KiB)
        variants = {
            "documented 4 KiB": lambda: sdk.decrypt_file(small_frames, plain, 8 * KiB),
            "tuned": lambda: sdk.decrypt_file(message, plain, MiB),
            "decrypt": lambda: sc.decrypt(message, plain, keys=keys, workers=2, fsync=False),
        }
        measured = rounds_of(variants, rounds, before)
        note = ", ".join(_rate(measured, n, 256 * MiB) for n in variants) + " GB/s"
        show("decrypt 256 MiB: × SDK, documented loop, 4 KiB frames", "10", measured,
             lambda s: s["documented 4 KiB"] / s["decrypt"], note)  # fmt: skip
        show("decrypt 256 MiB: × SDK, tuned by hand", "2", measured, lambda s: s["tuned"] / s["decrypt"])
        plaintext = incompressible(4 * KiB)
        small = sc.encrypt_bytes(plaintext, keys=keys)
        cache = sc.DataKeyCache()

        def repeat(work: Callable[[], object]) -> Callable[[], None]:
            return lambda: [work() for _ in range(500)] and None

        variants = {
            "SDK encrypt": repeat(lambda: sdk.encrypt(plaintext)),
            "SDK decrypt": repeat(lambda: sdk.decrypt(small)),
            "encrypt": repeat(lambda: sc.encrypt_bytes(plaintext, keys=keys)),
            "encrypt, cached": repeat(lambda: sc.encrypt_bytes(plaintext, keys=keys, cache=cache)),
            "decrypt": repeat(lambda: sc.decrypt_bytes(small, keys=keys)),
        }
        measured = rounds_of(variants, rounds)
        note = ", ".join(f"{n} {statistics.median(s[n] for s in measured) * 2e3:.0f} µs" for n in variants)
        show(
            "messages of 4 KiB, encrypt: × SDK",
            "4",
            measured,
            lambda s: s["SDK encrypt"] / s["encrypt"],
            note,
        )
        show("messages of 4 KiB, encrypt, cached key: × SDK", "4", measured,
             lambda s: s["SDK encrypt"] / s["encrypt, cached"])  # fmt: skip
        show("messages of 4 KiB, decrypt: × SDK", "4", measured, lambda s: s["SDK decrypt"] / s["decrypt"])


class _Sdk:
    def __init__(self) -> None:
        warnings.simplefilter("ignore")
        import aws_encryption_sdk
        from aws_encryption_sdk.identifiers import (
            AlgorithmSuite,
            CommitmentPolicy,
            EncryptionKeyType,
            WrappingAlgorithm,
        )
        from aws_encryption_sdk.internal.crypto.wrapping_keys import WrappingKey
        from aws_encryption_sdk.key_providers.raw import RawMasterKeyProvider

        self._client = aws_encryption_sdk.EncryptionSDKClient(
            commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
        )
        self._suite = AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY
        sdk = self

        class Provider(RawMasterKeyProvider):
            provider_id = "bench"

            def _get_raw_key(self, key_id):
                return WrappingKey(
                    wrapping_algorithm=WrappingAlgorithm.AES_256_GCM_IV12_TAG16_NO_PADDING,
                    wrapping_key=sdk._key,
                    wrapping_key_type=EncryptionKeyType.SYMMETRIC,
                )

        self._provider_class = Provider

    def use(self, key: bytes) -> None:
        self._key = key
        self._provider = self._provider_class()
        self._provider.add_master_key("key")

    def encrypt(self, plaintext: bytes) -> bytes:
        return self._client.encrypt(source=plaintext, key_provider=self._provider, algorithm=self._suite)[0]

    def decrypt(self, message: bytes) -> bytes:
        return self._client.decrypt(source=message, key_provider=self._provider)[0]

    def encrypt_file(self, source: Path, target: Path, frame: int, chunk: int) -> None:
        with source.open("rb") as reading, target.open("wb") as writing, self._client.stream(
            mode="e", source=reading, key_provider=self._provider, algorithm=self._suite, frame_length=frame,
            line_length=chunk,
        ) as stream:  # fmt: skip
            while data := stream.read(chunk):
                writing.write(data)

    def decrypt_file(self, source: Path, target: Path, chunk: int) -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            with self._client.stream(mode="d", source=reading, key_provider=self._provider) as stream:
                while data := stream.read(chunk):
                    writing.write(data)


ROWS = {name.removeprefix("row_"): work for name, work in list(globals().items()) if name.startswith("row_")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    # An installed package has its bytecode; a checkout gets it by the first run, unless this is set.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    print(
        "| what | median | least to greatest | to reach | figures |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    for name in arguments.rows or ROWS:
        ROWS[name](arguments.rounds)


if __name__ == "__main__":
    main()
