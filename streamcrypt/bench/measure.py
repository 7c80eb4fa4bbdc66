"""One cell, measured: a job of its own in a fresh process, with the yardsticks of the same minute.

    refusal(cell)       why it cannot be measured here, by the name of what is missing
    Bench.run(cell)     in the sweep's process: makes the files, starts the child and its store, watches them
    python -m …         in the child: one encrypt, decrypt, verify, rekey, random reads or epoch, timed

The child is stopped with all its workers when it exceeds its time limit, and a child that dies is a
record with an error, never a wait.  Seconds count the call alone: no interpreter start, no import, no
making of files; workers started by the call are in it.

Yardsticks: ``copy`` moves the same bytes the same way without a cipher, ``cipher`` seals them in
memory, ``read`` only reads; an epoch has ``plain``, the same loader over the same data in plain.  They
say what the machine could give at that moment, and their spread is the session's noise.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from streamcrypt.bench import data, peers
from streamcrypt.bench.records import OURS, Cell, Record, now, usable_cores
from streamcrypt.engine.job import peak_memory

_POLL: Final = 0.1  # seconds between looks at the child's memory
_KEEP: Final = 4 << 30  # bytes of test data kept between cells
RANDOM_READS: Final = 200
RANDOM_LENGTH: Final = 64 << 10
STORAGES: Final = ("memory", "disk", "store")
OPERATIONS: Final = ("encrypt", "decrypt", "verify", "rekey", "read", "epoch")
READERS: Final = ("parquet", "open")
_DECRYPTED: Final = "SELECT count(*) FROM audit WHERE operation = 'Decrypt' AND error IS NULL"


def refusal(cell: Cell) -> str | None:
    """Why ``cell`` cannot be measured here, in one line; None where it can."""
    if cell.operation not in OPERATIONS:
        return f"{cell.operation!r} cannot be measured; choose {', '.join(OPERATIONS)}"
    if cell.storage not in STORAGES:
        return f"{cell.storage!r} is not a storage; choose {', '.join(STORAGES)}"
    if cell.engine != OURS:
        return peers.refusal(cell)
    if cell.storage == "store":
        if cell.operation == "epoch":
            return "an epoch is read from storage memory or disk"
        if find_spec("obstore") is None:
            return "storage store needs obstore: pip install 'streamcrypt[stores]'"
    if cell.operation == "epoch":
        if cell.reader not in READERS:
            return f"{cell.reader!r} is not a reader; choose {', '.join(READERS)}"
        if cell.reader == "parquet":
            for module in ("torch", "pyarrow", "fsspec"):
                if find_spec(module) is None:
                    return (
                        f"an epoch by torch.ParquetDataset needs {module}: pip install 'streamcrypt[torch]'"
                    )
            if cell.kms_latency or cell.kms_quota or cell.kms_errors:
                return "the loader's workers ask a KMS of their own: its latency, quota and errors are not shaped"
    return None


class MeasureError(RuntimeError):
    """The measurement itself cannot go on: no room, no such storage."""


@dataclass(frozen=True, slots=True)
class _Weather:
    """What else the machine was doing, from the kernel's counters."""

    steal: float
    total: float
    swapped: int

    @classmethod
    def now(cls) -> _Weather:
        try:
            fields = [float(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
            swapped = 0
            for line in Path("/proc/vmstat").read_text().splitlines():
                if line.startswith("pswpin "):
                    swapped = int(line.split()[1])
            return cls(fields[7] if len(fields) > 7 else 0.0, sum(fields[:8]), swapped)
        except (OSError, ValueError, IndexError):
            return cls(0.0, 0.0, 0)

    def noise(self, before: _Weather) -> list[str]:
        found = []
        elapsed = self.total - before.total
        if elapsed > 0 and (self.steal - before.steal) / elapsed > 0.01:
            found.append(f"steal {(self.steal - before.steal) / elapsed:.0%}")
        if self.swapped > before.swapped:
            found.append("swapping")
        return found


def busy() -> list[str]:
    """Why a run that starts now would be noisy: other work on the cores."""
    try:
        import psutil

        # The load average lags by a minute and would count our own last cell.
        used = sum(psutil.cpu_percent(interval=0.2, percpu=True)) / 100
    except ImportError:
        used = os.getloadavg()[0]
    cores = usable_cores()
    return [f"other work: {used:.1f} of {cores} cores"] if used > 0.35 * cores else []


class Bench:
    """Runs cells below a folder of its own; use as a context manager, the folder goes at the end."""

    def __init__(self, work: Path | None = None, *, timeout: float = 120.0, yardsticks: bool = True) -> None:
        self._timeout = timeout
        self._yardsticks = yardsticks
        self._stack = contextlib.ExitStack()
        self._places: dict[str, Path] = {}
        self._work = work.resolve() if work is not None else None
        self._datasets: dict[tuple[Any, ...], tuple[Path, int]] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _place(self, storage: str) -> Path:
        """A temporary folder on this kind of storage."""
        if storage not in self._places:
            if storage == "memory":
                base = Path("/dev/shm")  # noqa: S108 - the memory file system itself
                if not base.is_dir():
                    raise MeasureError(
                        "there is no memory file system at /dev/shm; measure with storage disk"
                    )
            elif storage in STORAGES:  # the store keeps its objects in its own memory
                base = self._work or Path(tempfile.gettempdir())
            else:
                raise MeasureError(f"{storage!r} is not a storage; choose {', '.join(STORAGES)}")
            made = tempfile.TemporaryDirectory(prefix="streamcrypt-bench-", dir=base)
            self._places[storage] = Path(self._stack.enter_context(made))
            data.spread_out(self._places[storage])
        return self._places[storage]

    def _dataset(self, cell: Cell) -> Path:
        """The cell's plain files; made once and kept while there is room."""
        tables = cell.operation == "epoch" and cell.reader == "parquet"
        lengths = tuple(data.sizes_of(cell))
        key = (lengths, cell.seed, cell.storage, tables)
        if key not in self._datasets:
            need = sum(lengths)
            while self._datasets and sum(size for _, size in self._datasets.values()) + need > _KEEP:
                oldest = next(iter(self._datasets))
                self._discard(self._datasets.pop(oldest)[0], storage=oldest[2])
            folder = self._place(cell.storage) / f"plain-{cell.hash}"
            if folder.exists():
                shutil.rmtree(folder)
            write = data.write_tables if tables else data.write
            self._datasets[key] = (folder, write(folder, list(lengths), cell.seed))
            if cell.storage == "disk":
                os.sync()  # else the run pays for flushing its own source
        return self._datasets[key][0]

    def _discard(self, folder: Path, storage: str) -> None:
        """Give its room back; on a disk without making the next cell pay for it."""
        if storage == "disk":
            data.put_aside(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def run(
        self, cell: Cell, *, session: str = "", round_number: int = 0, tree: Path | None = None
    ) -> Record:
        """One run of ``cell``.  What goes wrong in the child is the record's ``error``.

        ``tree``: a folder whose streamcrypt is measured instead of this one.
        """
        source = self._dataset(cell)
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self._place(cell.storage)))
        try:
            noise = busy()
            before = _Weather.now()
            started = now()
            with _store(cell, source) as store:
                answer, peak = self._child(cell, source, folder, tree, store)
            noise += _Weather.now().noise(before)
        finally:
            self._discard(folder, cell.storage)
        if "error" in answer:
            answer = {"error": answer["error"], "wall_s": 0.0}
        answer["peak_rss"] = max(peak, answer.get("peak_rss", 0))
        return Record(session=session, round=round_number, cell=cell, started=started, noise=noise, **answer)

    def _child(
        self, cell: Cell, source: Path, folder: Path, tree: Path | None, store: dict[str, str]
    ) -> tuple[dict[str, Any], int]:
        usual = asdict(Cell())
        question = {
            # What is as usual is left out: another version may not know the newer fields.
            "cell": {name: value for name, value in asdict(cell).items() if value != usual[name]},
            "source": str(source),
            "folder": str(folder),
            "yardsticks": self._yardsticks,
        }
        environment = {**os.environ, "STREAMCRYPT_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"}
        if store:
            environment = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
            environment |= store
        if tree is not None:
            environment["PYTHONPATH"] = str(tree)
        process = subprocess.Popen(
            [sys.executable, "-m", "streamcrypt.bench.measure"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=tree,  # -m looks there first
            start_new_session=True,
        )
        watch = _PeakMemory(process.pid)
        late = False
        try:
            output, errors = process.communicate(json.dumps(question).encode(), timeout=self._timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # The whole session of the child: its workers too.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if late:
                process.communicate()
            process.wait()
        peak = watch.stop()
        if late:
            return {"error": f"not done after {self._timeout:g} s"}, peak
        if process.returncode != 0:
            lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
            return {"error": f"exit {process.returncode}: {lines[-1]}"}, peak
        answer: dict[str, Any] = json.loads(output)
        return answer, peak


@contextlib.contextmanager
def _store(cell: Cell, source: Path) -> Iterator[dict[str, str]]:
    """The environment of an object store that holds the cell's plain files, in a process of its own."""
    if cell.storage != "store":
        yield {}
        return
    command = [sys.executable, "-m", "streamcrypt.bench.s3server", "--load", str(source)]
    command += ["--latency", f"{cell.store_latency:.9f}s"]
    if cell.store_bandwidth:
        command += ["--bandwidth", str(cell.store_bandwidth)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise MeasureError("the store of a cell did not start")
            yield {
                "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{json.loads(line)['port']}",
                "AWS_ACCESS_KEY_ID": "benchmark",
                "AWS_SECRET_ACCESS_KEY": "benchmark",
                "AWS_REGION": "us-east-1",
            }
        finally:
            server.kill()


class _PeakMemory:
    """The largest resident memory of a process and its descendants together, looked at now and then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            import psutil
        except ImportError:
            return
        while not self._done.wait(_POLL):
            total = 0
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(self._pid)
                for one in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += one.memory_info().rss
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


# -- in the child


def main() -> int:
    """Read one question from standard input, measure, answer on standard output."""
    question = json.load(sys.stdin)
    cell = Cell(**question["cell"])
    answer = measure(cell, Path(question["source"]), Path(question["folder"]), question["yardsticks"])
    json.dump(answer, sys.stdout)
    return 0


def measure(cell: Cell, source: Path, folder: Path, yardsticks: bool) -> dict[str, Any]:
    """Prepare, time the one call, and say what it did: the fields of a Record."""
    prepared = (peers.prepare if cell.engine != OURS else prepare)(cell, source, folder)
    _settle(cell, source, folder)
    before = _used()
    start = time.perf_counter()
    report = prepared.call()
    wall = time.perf_counter() - start
    used = {name: value - before[name] for name, value in _used().items()}
    outcome = report if isinstance(report, dict) else report.to_json()
    if outcome.get("failed"):
        raise RuntimeError(f"{len(outcome['failed'])} files failed, first: {outcome['failed'][0]['error']}")
    lengths = [path.stat().st_size for path in source.iterdir()]
    found = outcome.get("cache") or {"hits": 0, "misses": 0, "evictions": {}}
    answer: dict[str, Any] = {
        "wall_s": wall,
        **used,
        "bytes_in": outcome.get("plain", sum(lengths)),
        "bytes_out": outcome.get("bytes_out", 0),
        "files": len(lengths),
        "frames": sum(length // cell.frame_size + 1 for length in lengths) if prepared.seals else 0,
        **prepared.asked(),
        "cache_hits": found["hits"],
        "cache_misses": found["misses"],
        "evictions": found["evictions"],
        "peak_rss": peak_memory(),
    }
    if yardsticks:
        shutil.rmtree(folder / "target", ignore_errors=True)
        if prepared.plain is not None:
            answer["yardstick_s"] = {"plain": _seconds(prepared.plain)}
        else:
            answer["yardstick_s"] = run_yardsticks(cell, source, folder / "copy")
    return answer


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepare(cell: Cell, source: Path, folder: Path) -> peers.Prepared:
    """Our own engine, everything but the one call done."""
    import streamcrypt as sc
    from streamcrypt.bench.shaped import ShapedKms
    from streamcrypt.keys.kms import KmsKeyring
    from streamcrypt.kms import open_service

    service = open_service(folder / "home")
    arn = service.create_key(Description="benchmark")["KeyMetadata"]["Arn"]
    kms = ShapedKms(
        service, latency=cell.kms_latency, quota=cell.kms_quota, errors=cell.kms_errors, seed=cell.seed
    )
    keyring = KmsKeyring(kms, arn)

    plain: Any = source
    encrypted: Any = folder / "encrypted"
    target: Any = folder / "target"
    if cell.storage == "store":
        plain, encrypted, target = (f"s3://bench/{name}" for name in ("plain", "encrypted", "target"))
    common: dict[str, Any] = {"workers": cell.workers, "fsync": cell.fsync}
    sealing: dict[str, Any] = {
        "context": peers.CONTEXT, "sign": cell.signed, "frame_size": cell.frame_size,
    }  # fmt: skip
    if cell.operation != "encrypt":
        # The keys of what is read follow the cell's own cache limits; they come from a KMS in no hurry.
        fast = KmsKeyring(service, arn)
        sc.encrypt(plain, encrypted, keys=fast, cache=_cache(cell), **common, **sealing)

    cache = _cache(cell)
    prepared = peers.Prepared(lambda: None, lambda: peers.asked_of(kms))
    if cell.operation == "encrypt":
        prepared.call = lambda: sc.encrypt(plain, target, keys=keyring, cache=cache, **common, **sealing)
    elif cell.operation == "decrypt":
        prepared.call = lambda: sc.decrypt(encrypted, target, keys=keyring, cache=cache, **common)
    elif cell.operation == "verify":
        prepared.call = lambda: sc.verify(encrypted, keys=keyring, cache=cache, workers=cell.workers)
    elif cell.operation == "rekey":
        del sealing["context"]
        prepared.call = lambda: sc.rekey(
            encrypted, target, keys=keyring, from_keys=keyring, cache=cache, **common, **sealing
        )
    elif cell.operation == "read":
        names = sorted(path.name for path in source.iterdir())
        prepared.call = lambda: _random_reads(f"{encrypted}", names, keyring, cache, cell)
    elif cell.operation == "epoch" and cell.reader == "open":

        def opened(path: Path) -> Any:
            return sc.open(encrypted / path.name, keys=keyring, cache=cache)

        paths = sorted(source.iterdir())
        prepared.call = lambda: _read_all(paths, opened, cell.workers)
        prepared.plain = lambda: _read_all(paths, lambda path: path.open("rb", buffering=0), cell.workers)
    elif cell.operation == "epoch":
        return _epoch(cell, source, encrypted, arn, service)
    else:
        raise ValueError(f"{cell.operation!r} cannot be measured")
    return prepared


def _epoch(cell: Cell, source: Path, encrypted: Path, arn: str, service: Any) -> peers.Prepared:
    """A DataLoader's epoch over encrypted Parquet files; its workers ask the embedded KMS themselves."""
    import fsspec
    from torch.utils.data import DataLoader

    from streamcrypt.torch import ParquetDataset

    limits: dict[str, Any] = {} if cell.cache_max_age is None else {"cache_max_age": cell.cache_max_age}
    ours = ParquetDataset(encrypted, keys=f"local:{arn}", context=peers.CONTEXT, **limits)
    plain = ParquetDataset(source, filesystem=fsspec.filesystem("file"))
    size = sum(path.stat().st_size for path in source.iterdir())

    def rows(dataset: Any) -> int:
        return sum(
            len(batch["x0"]) for batch in DataLoader(dataset, batch_size=None, num_workers=cell.workers)
        )

    def epoch() -> dict[str, Any]:
        rows(ours)
        return {"plain": size, "bytes_out": size}

    def asked() -> dict[str, Any]:
        return {"kms_calls": {"Decrypt": service.store.query(_DECRYPTED)[0][0]}}

    return peers.Prepared(epoch, asked, plain=lambda: rows(plain))


def _read_all(paths: list[Path], opened: Callable[[Path], Any], workers: int) -> dict[str, Any]:
    """Every file once, whole, by so many threads."""

    def read(path: Path) -> int:
        with opened(path) as file:
            return len(file.read())

    with ThreadPoolExecutor(workers) as threads:
        total = sum(threads.map(read, paths))
    return {"plain": total, "bytes_out": total}


def _settle(cell: Cell, source: Path, folder: Path) -> None:
    """Pay what the preparation owes before the clock starts, so that no run pays for the one before.

    Data that wait to be written are written, and memory for what the call will write is warmed: no more than the
    system lets wait for a disk.
    """
    if cell.storage == "disk":
        os.sync()
    if cell.operation in ("encrypt", "decrypt", "rekey"):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        total = sum(path.stat().st_size for path in source.iterdir())
        data.warm(folder, min(total + total // 4, free // 8))


def _cache(cell: Cell) -> Any:
    """The cell's cache policy, as the public API takes it."""
    import streamcrypt as sc

    if not cell.cache:
        return False
    limits: dict[str, Any] = {
        "max_age": cell.cache_max_age,
        "max_messages": cell.cache_max_messages,
        "max_bytes": cell.cache_max_bytes,
    }
    return sc.DataKeyCache(**{name: value for name, value in limits.items() if value is not None})


def _used() -> dict[str, Any]:
    """What the system says of this process, and of its children that have ended: fields of a Record."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in both),
        "parent_cpu_s": both[0].ru_utime + both[0].ru_stime,
        "kernel_cpu_s": sum(one.ru_stime for one in both),
        "faults": sum(one.ru_minflt for one in both),
        "major_faults": sum(one.ru_majflt for one in both),
        "waits": sum(one.ru_nvcsw for one in both),
        "preemptions": sum(one.ru_nivcsw for one in both),
    }


def _random_reads(folder: str, names: list[str], keyring: Any, cache: Any, cell: Cell) -> dict[str, Any]:
    """Ranges at seeded places of seeded files, each file opened anew."""
    import streamcrypt as sc

    rng = random.Random(cell.seed)  # noqa: S311 - places to read, no secret
    read = 0
    for _ in range(RANDOM_READS):
        with sc.open(f"{folder}/{rng.choice(names)}", keys=keyring, cache=cache) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(rng.randrange(max(1, size - RANDOM_LENGTH)))
            read += len(file.read(RANDOM_LENGTH))
    return {"plain": read, "bytes_out": read, "cache": cache.stats() if cache else None}


def run_yardsticks(cell: Cell, source: Path, copy: Path) -> dict[str, float]:
    """Seconds for the same files and threads without a cipher, for the cipher alone, for reading alone."""
    paths = sorted(source.iterdir())
    copy.mkdir()

    def spread_over_threads(work: Callable[[Path], None]) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(cell.workers) as threads:
            for _ in threads.map(work, paths):
                pass
        return time.perf_counter() - start

    def copy_one(path: Path) -> None:
        peers.copy_file(path, copy / path.name, fsync=cell.fsync)

    def read_one(path: Path) -> None:
        buffer = peers.buffer()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    copying, reading = _by_obstore() if cell.storage == "store" else (copy_one, read_one)
    seconds = {"copy": spread_over_threads(copying), "read": spread_over_threads(reading)}
    shutil.rmtree(copy)
    seconds["cipher"] = _cipher_alone(paths, cell)
    return seconds


def _by_obstore() -> tuple[Callable[[Path], None], Callable[[Path], None]]:
    """The object of a plain file moved within the store, and fetched."""
    import obstore
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    store = S3Store("bench", config={"endpoint": endpoint}, client_options={"allow_http": True})

    def fetch(path: Path) -> Any:
        return obstore.get(store, f"plain/{path.name}").bytes()

    def copy_one(path: Path) -> None:
        obstore.put(store, f"copy/{path.name}", fetch(path))

    def read_one(path: Path) -> None:
        fetch(path)

    return copy_one, read_one


def _cipher_alone(paths: list[Path], cell: Cell) -> float:
    """The same bytes sealed from and into memory, frame by frame; measured on 256 MiB and scaled."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    total = sum(path.stat().st_size for path in paths)
    frame = min(cell.frame_size, 4 << 20)
    count = max(1, min(total, 256 << 20) // frame)
    each = max(1, count // cell.workers)

    def seal(_: int) -> None:
        cipher = AESGCM(bytes(32))
        plain, sealed = bytearray(frame), bytearray(frame + 16)
        for number in range(each):
            cipher.encrypt_into(number.to_bytes(12, "big"), plain, b"", sealed)

    start = time.perf_counter()
    with ThreadPoolExecutor(cell.workers) as threads:
        list(threads.map(seal, range(cell.workers)))
    return (time.perf_counter() - start) * total / (each * cell.workers * frame)


if __name__ == "__main__":
    sys.exit(main())
