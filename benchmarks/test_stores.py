"""Jobs onto and from an object store against what obstore alone moves, of the same objects in the same run.

    python -m pytest benchmarks/test_stores.py -s

The store is streamcrypt/bench/s3server.py in a process of its own, in memory: without latency, the hardest case for
the ratio, because nothing but work is waited for; and with 10 ms before each answer.  obstore alone moves the
sealed objects with as many threads as a job has workers.  Two more yardsticks stand beside it: "unsigned", obstore
with bodies left out of the signatures, as a job sends them; and the shortest loops that Python allows: out, "cipher"
seals 1 MiB at a time under one key, without headers, manifest or conditions; in, "by hand" opens the job's own messages
(keys derived, commitment, the header's tag, every frame) into files that appear when they are whole, without a
manifest, other data keys or errors.  They are what the work itself leaves of obstore's speed where nothing is waited
for.
Variants are taken in turns in an order that is shuffled each round; a ratio is that of medians.  The last rows are the
share of a whole job that a resumed one spends on finding that everything is done.
``STREAMCRYPT_STORE_ROUNDS`` (default 5), ``STREAMCRYPT_STORE_FILES`` (how many of 16 KiB; 4,000),
``STREAMCRYPT_BENCH_DIR`` (where local files lie; 2.5 GiB).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.constant_time import bytes_eq
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from suite.common import KiB, MiB, key_reference, make_files, remove, workspace

import streamcrypt as sc
from streamcrypt.engine.job import STORE_WORKERS
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import decrypting_keyring
from streamcrypt.message.header import parse_header
from streamcrypt.system import c_call

pytest.importorskip("obstore", reason="STORES ARE NOT MEASURED: obstore is missing (extra: stores)")

pytestmark = pytest.mark.timeout(0)

ROUNDS = int(os.environ.get("STREAMCRYPT_STORE_ROUNDS", "5"))
AT_EMPTY_PATH = 0x1000
SMALL_FILES = int(os.environ.get("STREAMCRYPT_STORE_FILES", "4000"))
KINDS = {"large": (12, 64 * MiB), "middle": (768, MiB), "small": (SMALL_FILES, 16 * KiB)}


@pytest.fixture(scope="module", params=[0, 10], ids=lambda latency: f"{latency} ms")
def store(request: pytest.FixtureRequest) -> Iterator[Any]:
    """obstore's own client of the bucket, for what obstore alone does."""
    command = [sys.executable, "-m", "streamcrypt.bench.s3server", "--latency", f"{request.param}ms"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    port = json.loads(server.stdout.readline())["port"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "bench")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "bench")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        from obstore.store import S3Store

        yield S3Store(
            "bench", config={"endpoint": f"http://127.0.0.1:{port}"}, client_options={"allow_http": True}
        )
    server.communicate(b"")


class Data:
    """Files, and the sealed objects of them, on a disk and in the store."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.keys = key_reference(folder)
        self.source = make_files(folder / "source", *KINDS[kind])
        self.sealed = folder / "sealed"
        sc.encrypt(self.source, self.sealed, keys=self.keys, fsync=False)
        sc.encrypt(self.source, f"s3://bench/{kind}", keys=self.keys, overwrite=True)
        self.names = sorted(path.name for path in self.source.iterdir())


@pytest.fixture(scope="module", params=KINDS)
def data(request: pytest.FixtureRequest, store: Any) -> Iterator[Data]:
    with workspace() as folder:
        yield Data(folder, request.param)


class Spent(NamedTuple):
    """Medians; processor time is that of all threads, obstore's own too, and not the server's."""

    seconds: float
    processor: float


def in_turns(variants: dict[str, Callable[[], object]], before: Callable[[], None]) -> dict[str, Spent]:
    """What each variant takes; the first round warms up."""
    spent: dict[str, list[Spent]] = {name: [] for name in variants}
    generator = random.Random(0)
    for number in range(ROUNDS + 1):
        order = list(variants)
        generator.shuffle(order)
        for name in order:
            before()
            started, worked = time.perf_counter(), time.process_time()
            variants[name]()
            if number:
                spent[name].append(Spent(time.perf_counter() - started, time.process_time() - worked))
    return {name: Spent(*map(statistics.median, zip(*found, strict=True))) for name, found in spent.items()}


def each(names: list[str], work: Callable[[str], object]) -> None:
    with ThreadPoolExecutor(STORE_WORKERS) as threads:
        for _ in threads.map(work, names):
            pass


def unsigned() -> Any:
    """obstore's client again, but what a request sends is not hashed to sign it."""
    from obstore.store import S3Store

    return S3Store(
        "bench",
        config={"endpoint": os.environ["AWS_ENDPOINT_URL_S3"], "unsigned_payload": True},
        client_options={"allow_http": True},
    )


class Cipher:
    """Objects of frames of 1 MiB under one key."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.aead = AESGCM(os.urandom(32))

    def frames(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            for number in itertools.count():
                chunk = file.read(MiB)
                if not chunk:
                    return
                yield self.aead.encrypt(number.to_bytes(12, "big"), chunk, None)

    def put(self, path: Path) -> None:
        import obstore

        one = path.stat().st_size <= MiB
        obstore.put(self.store, f"cipher/{path.name}", next(self.frames(path)) if one else self.frames(path))


class ByHand:
    """Messages of one data key in frames of 1 MiB, opened and written as a job does and with nothing else."""

    def __init__(self, store: Any, data: Data, folder: Path) -> None:
        import obstore

        self.store, self.kind = store, data.kind
        first = bytes(obstore.get(store, f"{data.kind}/{data.names[0]}").bytes())
        self.known, _ = parse_header(first)
        self.data_key = (
            Materials(decrypting_keyring(data.keys))
            .for_decryption(self.known.suite, self.known.context, self.known.encrypted_data_keys)
            .data_key
        )
        self.folder = os.open(folder, os.O_RDONLY)
        self.room = threading.local()

    def fetch(self, name: str) -> None:
        import obstore

        data = memoryview(obstore.get(self.store, f"{self.kind}/{name}").bytes())
        known, stop = self.known.body, len(self.known.body)
        body, tag = bytes(data[:stop]), data[stop : stop + 16]
        assert body[:3] == known[:3]
        assert body[35:-32] == known[35:-32]
        message_id = body[3:35]
        content = HMAC(HKDF.extract(SHA512(), message_id, self.data_key), SHA512())
        commitment = content.copy()
        content.update(known[1:3] + b"DERIVEKEY\x01")
        commitment.update(b"COMMITKEY\x01")
        assert bytes_eq(commitment.finalize()[:32], body[-32:])
        aead = AESGCM(content.finalize()[:32])
        aead.decrypt(bytes(12), tag, body)
        plaintext = getattr(self.room, "plaintext", memoryview(b""))
        if len(plaintext) < len(data):
            plaintext = self.room.plaintext = memoryview(bytearray(len(data)))
        frames = data[stop + 16 :]
        regular, rest = divmod(len(frames) - 40, MiB + 32)
        for index in range(regular):
            frame = frames[index * (MiB + 32) : (index + 1) * (MiB + 32)]
            aad = message_id + b"AWSKMSEncryptionClient Frame" + struct.pack(">IQ", index + 1, MiB)
            aead.decrypt_into(frame[4:16], frame[16:], aad, plaintext[index * MiB : (index + 1) * MiB])
        frame, length = frames[regular * (MiB + 32) :], regular * MiB + rest
        aad = message_id + b"AWSKMSEncryptionClient Final Frame" + struct.pack(">IQ", regular + 1, rest)
        aead.decrypt_into(frame[8:20], frame[24:], aad, plaintext[regular * MiB : length])
        file = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.folder)
        os.pwrite(file, plaintext[:length], 0)
        assert c_call("linkat", file, b"", self.folder, name.encode(), AT_EMPTY_PATH) == 0
        os.close(file)

    def close(self) -> None:
        os.close(self.folder)


def show(what: str, data: Data, spent: dict[str, Spent], ours: str) -> float:
    count, length = KINDS[data.kind]
    of = {name: found.seconds / spent[ours].seconds for name, found in spent.items()}
    rates = ", ".join(
        f"{name} {count * length / found.seconds / 1e6:.0f} MB/s, {1e6 * found.processor / count:.0f} µs of processor"
        for name, found in spent.items()
    )
    print(
        f"\n{what}, {count} of {length // KiB} KiB: {of['obstore']:.2f} of obstore alone, "
        f"{of['loop']:.2f} of the shortest loop ({rates})"
    )
    return of["obstore"]


def test_encrypt_onto_a_store(store: Any, data: Data) -> None:
    import obstore

    def alone() -> None:
        each(data.names, lambda name: obstore.put(store, f"alone/{name}", data.sealed / name))

    def ours() -> None:
        sc.encrypt(data.source, "s3://bench/ours", keys=data.keys, overwrite=True)

    as_ours = unsigned()
    cipher = Cipher(as_ours)
    spent = in_turns(
        {
            "obstore": alone,
            "unsigned": lambda: each(
                data.names, lambda name: obstore.put(as_ours, f"alone/{name}", data.sealed / name)
            ),
            "loop": lambda: each(data.names, lambda name: cipher.put(data.source / name)),
            "encrypt": ours,
        },
        lambda: None,
    )
    assert show("encrypt onto a store", data, spent, "encrypt") >= 0.8


def test_decrypt_from_a_store(store: Any, data: Data) -> None:
    import obstore

    out = data.folder / "out"

    def fetch(name: str) -> None:
        with (out / name).open("wb") as file:
            for chunk in obstore.get(store, f"{data.kind}/{name}").stream(min_chunk_size=4 * MiB):
                file.write(chunk)

    def alone() -> None:
        out.mkdir()
        each(data.names, fetch)

    def ours() -> None:
        sc.decrypt(f"s3://bench/{data.kind}", out, keys=data.keys, fsync=False)

    def by_hand() -> None:
        out.mkdir()
        hand = ByHand(store, data, out)
        each(data.names, hand.fetch)
        hand.close()

    spent = in_turns({"obstore": alone, "loop": by_hand, "decrypt": ours}, lambda: remove(out))
    assert show("decrypt from a store", data, spent, "decrypt") >= 0.8


class Clock:
    """What a job takes beyond its work: beyond the time from its first task to its last outcome."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from streamcrypt.engine.run import _Run

        choose, drive = _Run._choose_pool, _Run.drive

        def begin(run: _Run, *sample: Any) -> Any:
            self._work = self._now()
            return choose(run, *sample)

        def end(run: _Run, *work: Any) -> None:
            drive(run, *work)
            if self._work is not None:
                self._worked = self._since(self._work)

        patch.setattr(_Run, "_choose_pool", begin)
        patch.setattr(_Run, "drive", end)

    def time(self, job: Callable[[], object]) -> tuple[Spent, Spent]:
        """What it takes, and without its work."""
        self._work, self._worked = None, Spent(0.0, 0.0)
        started = self._now()
        job()
        whole = self._since(started)
        return whole, Spent(*(of_all - of_work for of_all, of_work in zip(whole, self._worked, strict=True)))

    def _now(self) -> Spent:
        return Spent(time.perf_counter(), time.process_time())

    def _since(self, before: Spent) -> Spent:
        return Spent(*(now - then for now, then in zip(self._now(), before, strict=True)))


@pytest.mark.parametrize("state", ["finished", "all done", "half done"])
@pytest.mark.parametrize("where", ["disk", "disk without fsync", "store"])
def test_a_resumed_job_soon_knows_what_is_done(
    store: Any, data: Data, where: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole job; and its resuming when it had ended, was broken off at its end, or at its half.

    Finding what is done is what a resumed job takes beyond what any job takes: beyond a new job on a folder of what is
    left (of nothing, or of the other half), with its start, clients and manifest, and beyond looking at the sources
    that are done.  Of both jobs the work itself does not count, from the first task to the last outcome: it is the
    same, and of half a job far longer than what is looked for.  With looking at the sources the share is printed too.
    """
    from streamcrypt.engine.run import _Run
    from streamcrypt.storage import LocalTree

    place = "s3://bench/resumed" if where == "store" else data.folder / "resumed"
    options: dict[str, Any] = {"keys": data.keys, "fsync": where == "disk"}
    done = data.names[: len(data.names) // 2] if state == "half done" else data.names
    left = data.folder / "left"
    remove(left)
    left.mkdir()
    for name in data.names[len(done) :]:
        os.link(data.source / name, left / name)

    def clear() -> None:
        if where != "store":
            remove(data.folder / "resumed")
        else:
            import obstore

            for objects in obstore.list(store, "resumed/"):
                obstore.delete(store, [found["path"] for found in objects])

    def break_off(run: _Run, destination: object) -> None:
        raise KeyboardInterrupt

    def job(source: Path, names: list[str] | None = None, *, resume: bool = False) -> None:
        report = sc.encrypt(source, place, files=names, resume=resume, **options)
        assert report.skipped == (len(done) if resume else 0)

    def minus(one: Spent, other: Spent) -> Spent:
        return Spent(*(mine - theirs for mine, theirs in zip(one, other, strict=True)))

    whole, finding, looking, beyond = [], [], [], []
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        for _ in range(ROUNDS):
            clear()
            _, others = clock.time(lambda: job(left))
            clear()
            whole.append(clock.time(lambda: job(data.source))[0])
            if state != "finished":
                clear()
                with monkeypatch.context() as broken:
                    broken.setattr(_Run, "_finish", break_off)
                    with pytest.raises(KeyboardInterrupt):
                        job(data.source, None if done == data.names else done)
            beyond.append(minus(clock.time(lambda: job(data.source, resume=True))[1], others))
            tree = LocalTree(str(data.source))
            looked = clock.time(lambda tree=tree: sum(1 for _ in tree.walk()))[0]
            looking.append(Spent(*(spent * len(done) / len(data.names) for spent in looked)))
            finding.append(minus(beyond[-1], looking[-1]))
    clear()
    count, length = KINDS[data.kind]
    shares = []
    for field in Spent._fields:
        all_of_it, *parts = (
            statistics.median(getattr(spent, field) for spent in some)
            for some in (whole, finding, looking, beyond)
        )
        a_file = [1e6 * seconds / count for seconds in (*parts, all_of_it)]
        shares.append([part / all_of_it for part in parts])
        print(
            f"\nresumed job, {where}, {state}, {count} files of {length // KiB} KiB, {field}: "
            f"{100 * shares[-1][0]:.1f} %, with looking at the sources {100 * shares[-1][2]:.1f} % "
            f"({a_file[0]:.1f} and {a_file[1]:.1f} of {a_file[3]:.0f} µs a file)"
        )
    # Without fsync a small file takes so little that listing it alone is a good part of 5 %.
    assert shares[0][0] < (0.05 if where != "disk without fsync" or length > 16 * KiB else 0.2)
