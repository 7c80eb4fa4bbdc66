"""Records of measured runs: one row per run, with everything needed to repeat and to judge it.

    Cell     a configuration: operation, sizes, frame length, workers, cache, KMS, storage
    Record   one run of a cell: seconds, bytes, KMS calls and latencies, memory, yardsticks, noise
    Machine  where it ran: what matters for speed, and nothing that names a host, a user or a path

On disk: JSON lines while a sweep runs (a line per run, so that an interrupted sweep loses nothing),
Parquet when it is done, with the machine and the versions in the file's metadata.  ``SCHEMA`` numbers
the layout; a reader refuses another number instead of guessing.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = 1
MIB: Final = 1 << 20
OURS: Final = "streamcrypt"


class RecordsError(ValueError):
    """Records that cannot be used: another schema, another machine, or not records at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One configuration.  Sizes in bytes, times in seconds, rates per second; None: no limit."""

    operation: str = "encrypt"  # encrypt, decrypt, verify, rekey, read, epoch
    engine: str = OURS  # or sdk, sdk-tuned, cp, copy (bench/peers.py)
    files: int = 16
    file_size: int = 4 * MIB  # mean
    distribution: str = "constant"  # constant, lognormal, pareto, own
    spread: float = 0.0  # sigma of the lognormal, shape of the Pareto distribution
    sizes: tuple[int, ...] | None = None  # of the distribution "own": spread evenly over the files
    frame_size: int = MIB
    workers: int = 1
    signed: bool = False
    fsync: bool = False
    storage: str = "memory"  # memory, disk, store
    store_latency: float = 0.0  # of a request to the store
    store_bandwidth: int | None = None  # bytes a second that one request moves
    reader: str = "parquet"  # of an epoch: parquet (torch.ParquetDataset in a DataLoader), open (sc.open)
    cache: bool = True
    cache_max_age: float | None = None
    cache_max_messages: int | None = None
    cache_max_bytes: int | None = None
    kms_latency: float = 0.0
    kms_quota: float | None = None
    kms_errors: float = 0.0  # share of the calls that the KMS refuses
    seed: int = 1

    def __post_init__(self) -> None:
        if self.sizes is not None:  # JSON and Parquet know lists only
            object.__setattr__(self, "sizes", tuple(self.sizes))

    @property
    def hash(self) -> str:
        """Twelve digits that name the configuration."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def label(self) -> str:
        """The configuration as a person would say it."""
        from streamcrypt.units import format_size

        parts = [
            self.operation + (f" by {self.reader}" if self.operation == "epoch" else ""),
            f"{self.files} × {format_size(self.file_size)}",
            f"frame {format_size(self.frame_size)}",
            f"{self.workers} workers",
        ]
        if self.engine != OURS:
            parts.insert(0, self.engine)
        if self.sizes is not None:
            digest = hashlib.sha256(json.dumps(self.sizes).encode()).hexdigest()[:4]
            parts.append(
                f"own sizes {format_size(min(self.sizes))} to {format_size(max(self.sizes))} ({digest})"
            )
        elif self.distribution != "constant":
            parts.append(f"{self.distribution} {self.spread:g}")
        if self.storage != "memory":
            parts.append(self.storage + (" + fsync" if self.fsync else ""))
        if self.storage == "store" and self.store_latency:
            parts.append(f"requests {self.store_latency * 1000:g} ms")
        if self.storage == "store" and self.store_bandwidth:
            parts.append(f"requests {format_size(self.store_bandwidth)}/s")
        if self.signed:
            parts.append("signed")
        if not self.cache:
            parts.append("no cache")
        for name, value in (("messages", self.cache_max_messages), ("age", self.cache_max_age)):
            if value is not None:
                parts.append(f"max {name} {value:g}")
        if self.kms_latency:
            parts.append(f"KMS {self.kms_latency * 1000:g} ms")
        if self.kms_quota:
            parts.append(f"quota {self.kms_quota:g}/s")
        if self.kms_errors:
            parts.append(f"{self.kms_errors:.2g} of the KMS calls fail")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a cell.  ``yardstick_s`` holds the seconds of the same round's yardsticks:
    ``copy`` (the same files without a cipher), ``cipher`` (the same bytes in memory), ``read``; of an
    epoch ``plain`` (the same loader over the same data in plain)."""

    session: str
    round: int
    cell: Cell
    started: str  # UTC, ISO 8601
    wall_s: float
    cpu_s: float = 0.0
    parent_cpu_s: float = 0.0  # of cpu_s, what was not worker processes
    kernel_cpu_s: float = 0.0  # of cpu_s, what the kernel took: copies, pages, names
    faults: int = 0  # pages that were missing, and were made (major_faults: read from a disk)
    major_faults: int = 0
    waits: int = 0  # times that a thread gave up its core, for a device, a lock or a message
    preemptions: int = 0  # times that its core was taken from it
    bytes_in: int = 0
    bytes_out: int = 0
    files: int = 0
    frames: int = 0
    kms_calls: dict[str, int] = field(default_factory=dict)
    kms_latency_ms: list[float] = field(default_factory=list)  # every sample
    kms_wait_s: float = 0.0
    throttled: int = 0
    kms_failed: int = 0  # answers of the KMS's own faults
    cache_hits: int = 0
    cache_misses: int = 0
    evictions: dict[str, int] = field(default_factory=dict)
    peak_rss: int = 0  # bytes, parent and workers together
    yardstick_s: dict[str, float] = field(default_factory=dict)
    noise: list[str] = field(default_factory=list)  # why this run is not to be trusted
    error: str | None = None

    @property
    def rate(self) -> float:
        """Plaintext bytes per second."""
        return self.bytes_in / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def yardstick(self) -> float:
        """Seconds of the same work without a cipher, in the same round; 0 where it was not measured."""
        return self.yardstick_s.get("plain") or self.yardstick_s.get("copy") or 0.0

    @property
    def calls(self) -> int:
        return sum(self.kms_calls.values())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Record:
        """RecordsError when a field is missing or unknown."""
        try:
            return cls(**{**row, "cell": Cell(**row["cell"])})
        except (TypeError, KeyError) as error:
            raise RecordsError(f"not a record of schema {SCHEMA}: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine as far as speed depends on it.  No host name, user, path or address."""

    cpu: str
    cores: int
    flags: tuple[str, ...]
    memory: int
    kernel: str
    python: str
    openssl: str
    versions: dict[str, str]
    virtual: bool

    @property
    def id(self) -> str:
        """Eight digits from what does not change between runs: processor, cores, memory."""
        stable = json.dumps([self.cpu, self.cores, sorted(self.flags), round(self.memory / (1 << 30))])
        return hashlib.sha256(stable.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        virtual = ", virtual" if self.virtual else ""
        return f"{self.cpu}, {self.cores} cores{virtual} ({self.id})"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "flags": list(self.flags)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Machine:
        try:
            return cls(**{**row, "flags": tuple(row["flags"])})
        except (TypeError, KeyError) as error:
            raise RecordsError(f"not a machine of schema {SCHEMA}: {error}") from error


def usable_cores() -> int:
    """Processors that this process may use: affinity and the control group's quota, not just their number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def this_machine() -> Machine:
    """The fingerprint of the machine that this process runs on."""
    from importlib import metadata

    from cryptography.hazmat.backends.openssl.backend import backend

    cpu, virtual = platform.processor() or platform.machine(), False
    flags: tuple[str, ...] = ()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        cpu = fields.get("model name", cpu)
        present = set(fields.get("flags", fields.get("Features", "")).split())
        flags = tuple(
            sorted(present & {"aes", "vaes", "pclmulqdq", "vpclmulqdq", "avx2", "avx512f", "sha_ni", "pmull"})
        )
        virtual = "hypervisor" in present
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    versions = {}
    for package in ("streamcrypt", "cryptography", "boto3", "pyarrow", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=cpu,
        cores=usable_cores(),
        flags=flags,
        memory=memory,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        openssl=backend.openssl_version_text(),
        versions=versions,
        virtual=virtual,
    )


@dataclass(frozen=True, slots=True)
class Records:
    """The runs of one or more sessions on one machine, oldest first."""

    machine: Machine
    runs: tuple[Record, ...]

    @property
    def date(self) -> str:
        """The day of the last run."""
        return max((run.started for run in self.runs), default="")[:10]

    def usable(self) -> list[Record]:
        """Runs that ended without an error."""
        return [run for run in self.runs if run.error is None]

    def of_jobs(self) -> Records:
        """The runs that a plan's model is about: our engine on files, a KMS that answers."""
        return Records(
            self.machine,
            tuple(
                run
                for run in self.runs
                if run.cell.engine == OURS
                and run.cell.storage in ("memory", "disk")
                and run.cell.operation != "epoch"
                and not run.cell.kms_errors
            ),
        )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append_line(path: Path, record: Record) -> None:
    """Add one run to a JSON lines file; on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record.to_json()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check_schema(schema: Any, place: str) -> None:
    if schema != SCHEMA:
        raise RecordsError(
            f"{place}: records of schema {schema!r}, this version reads {SCHEMA}; "
            "measure again with `streamcrypt bench`"
        )


def write_json(path: Path, records: Records) -> None:
    """One JSON object: what `bench calibrate` writes and what a plan ships with."""
    document = {
        "schema": SCHEMA,
        "machine": records.machine.to_json(),
        "runs": [run.to_json() for run in records.runs],
    }
    path.write_text(json.dumps(document, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")


def write_parquet(path: Path, records: Records) -> None:
    """One row per run, the cell's fields as columns ``cell_…``; machine and schema in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {}
    for run in records.runs:
        row = run.to_json()
        cell = row.pop("cell")
        row |= {f"cell_{name}": value for name, value in cell.items()}
        for name in ("kms_calls", "evictions", "yardstick_s"):
            row[name] = json.dumps(row[name])
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    table = pa.table(columns)
    metadata = {
        "streamcrypt.schema": str(SCHEMA),
        "streamcrypt.machine": json.dumps(records.machine.to_json()),
    }
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def _read_parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RecordsError(f"{path}: not a Parquet file: {error}") from error
    metadata = table.schema.metadata or {}
    schema = metadata.get(b"streamcrypt.schema", b"").decode()
    _check_schema(int(schema) if schema.isdigit() else schema, str(path))
    runs = []
    for row in table.to_pylist():
        cell = {name.removeprefix("cell_"): row.pop(name) for name in list(row) if name.startswith("cell_")}
        for name in ("kms_calls", "evictions", "yardstick_s"):
            row[name] = json.loads(row[name])
        runs.append(Record.from_json({**row, "cell": cell}))
    return Records(Machine.from_json(json.loads(metadata[b"streamcrypt.machine"])), tuple(runs))


def read(path: Path) -> Records:
    """Records from a ``.json`` or ``.parquet`` file, or from a sweep's folder.

    RecordsError when they are of another schema or no records at all.
    """
    if path.is_dir():
        return read_folder(path)
    if not path.exists():
        raise RecordsError(f"{path}: no such file; `streamcrypt bench calibrate` makes one")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordsError(f"{path}: not records: {error}") from error
    if not isinstance(document, dict) or not {"machine", "runs"} <= document.keys():
        raise RecordsError(f"{path}: not records of `streamcrypt bench`")
    _check_schema(document.get("schema"), str(path))
    return Records(
        Machine.from_json(document["machine"]), tuple(Record.from_json(run) for run in document["runs"])
    )


def read_lines(path: Path) -> list[Record]:
    """The runs of a JSON lines file; a last line that was cut off by an interruption is left out."""
    runs = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                runs.append(Record.from_json(json.loads(line)))
    return runs


def read_folder(folder: Path) -> Records:
    """A sweep's folder: ``machine.json`` and ``runs.jsonl``."""
    try:
        head = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordsError(f"{folder}: not the folder of a sweep: {error}") from error
    _check_schema(head.get("schema"), str(folder))
    return Records(Machine.from_json(head["machine"]), tuple(read_lines(folder / "runs.jsonl")))


def by_cell(runs: Iterable[Record]) -> dict[str, list[Record]]:
    """Runs grouped by their cell's hash, in order of first appearance."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run.cell.hash, []).append(run)
    return groups


def median(values: Sequence[float]) -> float:
    """The middle value; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(values: Sequence[float]) -> float:
    """Median absolute deviation over the median: the noise of a figure, 0.05 is 5 %."""
    middle = median(values)
    return median([abs(value - middle) for value in values]) / middle if middle else 0.0
