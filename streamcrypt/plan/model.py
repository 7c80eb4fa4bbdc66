"""Rates fitted to measured runs: how long a host takes for files, bytes, frames, signatures and data keys.

    wall = start + [processes] u + workers·w
           + [alone, threads] files·a + frames·f                      one at a time: the interpreter's lock
           + [threads] files·a'·(1 - 1/workers)
           + [processes] files·b·(d + (1 - d)/P) + frames·f/P         P = usable workers
           + [encrypt] files above 256 KiB or a frame·o       one by one, not in columns; [processes] /P
           + bytes·(c_serial + c/P)
           + [fsync] files·(t_serial + t/P) + bytes·t_B
           + [signed] files·(s_serial + s/P) + bytes·s_B/P
           + keys·k

Whether the workers are processes, threads or one thread alone is the engine's own choice
(``engine.run.way_of_working``); alone P is 1.
d is the parent's share of the work on a small file, from the processor seconds of parent and workers: on
one machine, whose processes are always as many as its cores, the wall clock cannot tell the two apart.
Every coefficient is at least zero (non-negative least squares, each cell weighted by 1/wall, so that
the fit minimises relative errors).  One fit has all runs of an operation: what depends on the storage
(files, bytes) has a coefficient for each, the rest is shared, so that a few cells determine it.  The
terms over P are work that the workers share; the serial ones are what contention leaves undivided: the
parent's work per file, a disk, a memory bus.  Their ratio is the contention of Amdahl's law and of
Gunther's universal scalability law, term by term.

The same is fitted to the processor seconds, without the division by P: what the cores had to do says
what limits a job.

Runs in which a KMS with latency or quota took part are left out: that wait is the queue's
(``closed.py``), not the host's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from streamcrypt.bench.data import sizes_of
from streamcrypt.bench.records import Cell, Record, Records, by_cell, median, spread
from streamcrypt.engine.run import SAMPLE, interpreter_seconds, way_of_working
from streamcrypt.engine.spans import BATCH_BYTES, BATCH_FILES, SMALL_LENGTH, SPAN_LENGTH, SPLIT_LENGTH

# In the order of the coefficients.
TERMS: Final = (
    "start", "starting", "process", "file_lock", "file_contended", "file_serial", "file", "single", "frame",
    "byte_serial", "byte", "sync_serial", "sync", "sync_byte", "signature_serial", "signature", "hash", "key",
)  # fmt: skip
CPU_TERMS: Final = (
    "start", "process", "file_lock", "file_contended", "file", "single", "frame", "byte", "sync", "sync_byte",
    "signature", "hash", "key",
)  # fmt: skip
_OF_STORAGE: Final = frozenset(("file_lock", "file", "byte_serial", "byte"))
_SERIAL, _FILE = TERMS.index("file_serial"), TERMS.index("file")
# The parent's share where the records do not say it: benchmarks/README.md, "small files".
_PARENTS_SHARE: Final = 0.3
_SMALL: Final = 64 << 10  # bytes; of such a file the bytes hardly count

Vector = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class ModelError(ValueError):
    """The records do not allow a fit: nothing measured for this operation, or too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one host has to do, as the model counts it."""

    files: float
    bytes: float
    frames: float
    workers: int
    cores: int
    fsync: bool = False
    signed: bool = False  # signed messages are not cut into spans
    keys: float = 1.0  # data keys that are asked for
    singles: float = 0.0  # files that do not travel in columns: encrypted one by one
    apart: bool = False  # the workers are processes, whatever there is to do: a cluster's
    on_store: bool = False

    @property
    def tasks(self) -> float:
        """What the engine hands to workers, one by one: batches of small files, files, spans of large ones."""
        size = self.bytes / max(self.files, 1)
        if size > SPLIT_LENGTH and not self.signed:
            return max(self.files, self.bytes / SPAN_LENGTH)
        return min(self.files, max(self.files / self.batch, self.bytes / BATCH_BYTES))

    @property
    def batch(self) -> int:
        """Most files that travel to a worker together; engine.run makes them fewer where there are few."""
        return int(max(1, min(BATCH_FILES, self.files // (4 * self.workers))))

    @property
    def list_files(self) -> int:
        """Files of a list that a worker gets: a batch, or as many as have the bytes of one."""
        size = self.bytes / max(self.files, 1)
        return max(1, min(self.batch, int(BATCH_BYTES / size))) if size else self.batch

    @property
    def parallel(self) -> float:
        """Workers' worth of work that goes on at once: no more than cores, and the last round is rarely full."""
        if self.alone:
            return 1.0
        workers = max(1, min(self.workers, self.cores))
        tasks = max(1, round(self.tasks))
        return tasks / math.ceil(tasks / workers) if tasks < 4 * workers else float(workers)

    @property
    def way(self) -> str:
        """What the engine takes for workers: alone, threads, processes."""
        if self.apart:
            return "processes"
        share = min(1.0, SAMPLE / max(self.files, 1))
        return way_of_working(
            self.files * share, self.frames * share, self.bytes * share, self.workers,
            flushed=self.fsync, on_store=self.on_store,
        )  # fmt: skip

    @property
    def processes(self) -> bool:
        """Whether workers are processes."""
        return self.way == "processes"

    @property
    def alone(self) -> bool:
        """Whether one thread works, in turns with the engine's own."""
        return self.way == "alone"

    def lanes(self, cpu_seconds: float) -> float:
        """Cores that ``cpu_seconds`` of this work keep busy; in threads the interpreter's part goes one at a time."""
        if self.processes or cpu_seconds <= 0:
            return self.parallel
        alone = min(1.0, interpreter_seconds(self.files, self.frames) / cpu_seconds)
        return 1 + (self.parallel - 1) * (1 - alone)

    @property
    def _contended(self) -> float:
        """Files for which threads wait for each other."""
        return self.files * (1 - 1 / self.workers) if self.way == "threads" else 0.0

    def features(self) -> Vector:
        """One number for each of TERMS; the prediction is their product with the coefficients."""
        n, p = self.files, self.parallel
        lock, free = (0.0, 1.0) if self.processes else (1.0, 0.0)
        sync, signed = float(self.fsync), float(self.signed)
        return np.array([
            1.0, free, free * self.workers, lock * n, self._contended, free * n, free * n / p,
            self.singles * (lock + free / p), self.frames * (lock + free / p), self.bytes, self.bytes / p,
            sync * n, sync * n / p, sync * self.bytes, signed * n, signed * n / p, signed * self.bytes / p,
            self.keys,
        ])  # fmt: skip

    def cpu_features(self) -> Vector:
        """One number for each of CPU_TERMS."""
        n, sync, signed = self.files, float(self.fsync), float(self.signed)
        lock, free = (0.0, 1.0) if self.processes else (1.0, 0.0)
        return np.array([
            1.0, free * self.workers, lock * n, self._contended, free * n, self.singles,
            self.frames, self.bytes, sync * n, sync * self.bytes, signed * n, signed * self.bytes, self.keys,
        ])  # fmt: skip


def work_of(run: Record, cores: int) -> Work:
    """What a recorded run had to do."""
    return Work(
        files=run.files,
        bytes=run.bytes_in,
        frames=run.frames,
        workers=run.cell.workers,
        cores=cores,
        fsync=run.cell.fsync,
        signed=run.cell.signed,
        keys=max(run.kms_calls.values(), default=1),
        singles=sum(size >= alone_from(run.cell.frame_size) for size in sizes_of(run.cell))
        if run.cell.operation == "encrypt"
        else 0,
        on_store=run.cell.storage == "store",
    )


def alone_from(frame_size: int) -> int:
    """Bytes from which on a file is encrypted for itself (engine.run)."""
    return min(frame_size, SMALL_LENGTH)


def kind_of(cell: Cell) -> tuple[str, bool, str]:
    """What a naive planner must not mix up."""
    return cell.operation, cell.signed, cell.storage


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients of an operation on a storage, with what is needed to say how sure they are."""

    coefficients: Vector
    cpu: Vector  # for processor seconds, in the order of CPU_TERMS
    resampled: tuple[Vector, ...]  # refits to runs drawn with replacement
    residuals: tuple[float, ...]  # measured / predicted - 1, of runs
    noise: float | None  # spread of repeated runs of one cell; None where none was repeated
    runs: int
    largest_workers: int
    memory: int  # of the machine, in bytes

    def seconds(self, work: Work) -> float:
        """Predicted wall-clock seconds of ``work`` with no KMS to wait for."""
        return float(self.coefficients @ work.features())

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds per term."""
        products = (self.coefficients * work.features()).tolist()
        return dict(zip(TERMS, products, strict=True))

    @property
    def contention(self) -> float:
        """The share of the work per byte that more workers do not shorten (alpha of the scalability law)."""
        serial, shared = self.coefficients[TERMS.index("byte_serial")], self.coefficients[TERMS.index("byte")]
        total = float(serial + shared)
        return float(serial) / total if total else 0.0


class _Design:
    """One fit for all runs of an operation: columns that storages share, and columns of each."""

    def __init__(self, terms: Sequence[str], storages: Sequence[str]) -> None:
        self.terms = terms
        self.columns = [
            (term, storage) for term in terms for storage in (storages if term in _OF_STORAGE else ("",))
        ]

    def row(self, features: Vector, storage: str) -> list[float]:
        values = dict(zip(self.terms, features.tolist(), strict=True))
        return [values[term] if place in ("", storage) else 0.0 for term, place in self.columns]

    def coefficients(self, solution: Vector, storage: str) -> Vector:
        """The solution's part for one storage, in the order of the terms."""
        found = {
            term: value
            for (term, place), value in zip(self.columns, solution.tolist(), strict=True)
            if place in ("", storage)
        }
        return np.array([found[term] for term in self.terms])


def _solve(features: Vector, walls: Vector) -> Vector:
    from scipy.optimize import nnls

    weighted = features / walls[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    used = scale > 0
    solution = np.zeros(features.shape[1])
    if used.any():
        # Columns of equal length: bytes are 10^9 where files are 10^2.
        found, _ = nnls(weighted[:, used] / scale[used], np.ones(len(walls)), maxiter=1000)
        solution[used] = found / scale[used]
    return solution


def fit(
    records: Records, operation: str, *, signed: bool = False, storage: str = "memory", seed: int = 1
) -> Fit:
    """Coefficients for an operation on a storage.

    ModelError when fewer than four cells of it were measured, or signed messages are asked for and fewer
    than two cells had any.
    """
    runs = [
        run
        for run in records.usable()
        if run.cell.operation == operation
        and run.cell.kms_latency == 0
        and run.cell.kms_quota is None
        and run.wall_s > 0
    ]
    cells = by_cell(runs)
    names = list(cells)
    kinds = [cells[name][0].cell for name in names]
    known = sum(cell.storage == storage for cell in kinds)
    with_signature = sum(cell.signed for cell in kinds)
    if known < 4 or (signed and with_signature < 2):
        raise ModelError(
            f"the records have {known} configurations of {operation} on {storage}"
            f"{f', {with_signature} with signature' if signed else ''}, a fit needs 4"
            f"{' and 2' if signed else ''}; run `streamcrypt bench calibrate`"
        )
    cores = records.machine.cores
    works = [work_of(cells[name][0], cores) for name in names]
    design = _Design(TERMS, sorted({cell.storage for cell in kinds}))
    share = _parents_share(runs, cores)
    rows = zip(works, kinds, strict=True)
    features = np.array([design.row(_tied(work.features(), share), cell.storage) for work, cell in rows])

    def solved(rows: Vector, seconds: Vector) -> Vector:
        return _untied(design.coefficients(_solve(rows, seconds), storage), share)

    # The unit of replication is a run, the figure of a cell is its median.
    walls = np.array([median([run.wall_s for run in cells[name]]) for name in names])
    coefficients = solved(features, walls)

    # Of every cell as many runs as it has, drawn with replacement; every cell stays, for some terms have one.
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(100):
        drawn = [rng.choice([run.wall_s for run in cells[name]], len(cells[name])).tolist() for name in names]
        resampled.append(solved(features, np.array([median(walls_of) for walls_of in drawn])))

    # An error of a fit that saw the cell is too small, of one that did not too large (it is asked beyond
    # its cells): half-way between the two.
    residuals = []
    known_to_fit = features @ _solve(features, walls)
    for left_out, cell in enumerate(kinds):
        if cell.storage != storage or (cell.signed and not signed):
            continue
        others = np.arange(len(names)) != left_out
        if np.any((features[left_out] > 0) & ~np.any(features[others] > 0, axis=0)):
            continue  # the only one with this kind of work: the others cannot say what it costs
        unseen = float(_solve(features[others], walls[others]) @ features[left_out])
        if unseen > 0:
            predicted = math.sqrt(unseen * float(known_to_fit[left_out]))
            residuals += [run.wall_s / predicted - 1 for run in cells[names[left_out]]]
    repeated = [spread([run.wall_s for run in group]) for group in cells.values() if len(group) > 1]
    return Fit(
        coefficients,
        _fit_cpu([run for run in runs if run.cpu_s > 0], storage, cores),
        tuple(resampled),
        tuple(sorted(residuals)),
        median(repeated) if repeated else None,
        len(runs),
        max(run.cell.workers for run in runs),
        records.machine.memory,
    )


def _parents_share(runs: Sequence[Record], cores: int) -> float:
    """What the parent does of the work on small files while the workers are processes."""
    shares = [
        run.parent_cpu_s / run.cpu_s
        for run in runs
        if run.parent_cpu_s > 0 and run.cell.file_size <= _SMALL and work_of(run, cores).processes
    ]
    return median(shares) if shares else _PARENTS_SHARE


def _tied(features: Vector, share: float) -> Vector:
    """The features with the parent's and the workers' part of a file as one."""
    tied = features.copy()
    tied[_FILE] = share * features[_SERIAL] + (1 - share) * features[_FILE]
    tied[_SERIAL] = 0.0
    return tied


def _untied(coefficients: Vector, share: float) -> Vector:
    """The other way round, for coefficients."""
    whole = coefficients[_FILE]
    coefficients[_SERIAL], coefficients[_FILE] = share * whole, (1 - share) * whole
    return coefficients


def _fit_cpu(runs: Sequence[Record], storage: str, cores: int) -> Vector:
    """Coefficients for processor seconds; zeros where none were recorded."""
    groups = list(by_cell(runs).values())
    design = _Design(CPU_TERMS, sorted({group[0].cell.storage for group in groups} | {storage}))
    if not groups:
        return np.zeros(len(CPU_TERMS))
    features = np.array(
        [design.row(work_of(group[0], cores).cpu_features(), group[0].cell.storage) for group in groups]
    )
    seconds = np.array([median([run.cpu_s for run in group]) for group in groups])
    return design.coefficients(_solve(features, seconds), storage)


def scalability(workers: Sequence[int], rates: Sequence[float]) -> tuple[float, float]:
    """Contention and coherency (alpha, beta) of the universal scalability law for measured rates.

    X(N) = X(1)·N / (1 + alpha·(N - 1) + beta·N·(N - 1)).  With fewer than six numbers of workers
    beta stays 0 (Amdahl's law): three points bend any curve.
    """
    from scipy.optimize import least_squares

    if len(workers) != len(rates) or len(workers) < 2:
        raise ModelError("the scalability law needs the rates of two or more numbers of workers")
    n, x = np.array(workers, float), np.array(rates, float)
    with_beta = len(set(workers)) >= 6

    def miss(parameters: Vector) -> Vector:
        single, alpha = parameters[0], parameters[1]
        beta = parameters[2] if with_beta else 0.0
        return np.asarray(single * n / (1 + alpha * (n - 1) + beta * n * (n - 1)) / x - 1)

    start = [float(x[np.argmin(n)] / n.min()), 0.05] + ([0.001] if with_beta else [])
    high = [np.inf, 1.0] + ([1.0] if with_beta else [])
    found = least_squares(miss, start, bounds=([0.0] * len(start), high)).x
    return float(found[1]), float(found[2]) if with_beta else 0.0


def best_workers(alpha: float, beta: float) -> float:
    """The number of workers beyond which more make it slower; infinite without coherency."""
    return math.sqrt((1 - alpha) / beta) if beta > 0 else math.inf


def best_rate(runs: Iterable[Record], operation: str) -> float:
    """The highest measured bytes per second of an operation: the naive planner's figure."""
    return max(
        (run.rate for run in runs if run.cell.operation == operation and run.error is None), default=0.0
    )


def nearest(runs: Sequence[Record], cell: Cell, total: float) -> float:
    """Seconds by the other naive planner: the measured cell nearest in its logarithms, scaled by bytes."""

    def distance(other: Cell) -> float:
        pairs = [
            (other.file_size, cell.file_size),
            (other.frame_size, cell.frame_size),
            (other.workers, cell.workers),
            (other.files, cell.files),
        ]
        far = sum((math.log(max(a, 1)) - math.log(max(b, 1))) ** 2 for a, b in pairs)
        return far + 100 * (kind_of(other) != kind_of(cell)) + 10 * (other.fsync != cell.fsync)

    groups = by_cell(run for run in runs if run.error is None and run.cell.operation == cell.operation)
    if not groups:
        raise ModelError(f"nothing measured for {cell.operation}")
    chosen = min(groups.values(), key=lambda group: distance(group[0].cell))
    wall = median([run.wall_s for run in chosen])
    return wall * total / max(chosen[0].bytes_in, 1)


def describe(found: Fit) -> dict[str, Any]:
    """The coefficients in seconds per unit, for ``--json`` and for the report."""
    return {
        "coefficients": dict(zip(TERMS, found.coefficients.tolist(), strict=True)),
        "cpu_coefficients": dict(zip(CPU_TERMS, found.cpu.tolist(), strict=True)),
        "contention": found.contention,
        "noise": found.noise,
        "runs": found.runs,
        "largest_workers": found.largest_workers,
    }
