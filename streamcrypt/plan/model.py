"""Rates fitted to measured runs: how long a host takes for files, bytes and frames.

    wall = start + files·(a_serial + a/P) + bytes·(c_serial + c_B/P) + frames·c_F/P
           + [fsync] files·(t_serial + t/P) + [fsync] bytes·t_B + workers·w         P = usable workers

Every coefficient is at least zero (non-negative least squares, each run weighted by 1/wall, so that
the fit minimises relative errors).  The terms over P are work that the workers share; the serial ones
are what contention leaves undivided: the parent's work per file, a disk, a memory bus.  Their ratio
is the contention of Amdahl's law and of Gunther's universal scalability law, term by term.

Runs in which a KMS with latency or quota took part are left out: that wait is the queue's
(``closed.py``), not the host's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from streamcrypt.bench.records import Cell, Record, Records, by_cell, median, spread
from streamcrypt.engine.spans import BATCH_BYTES, BATCH_FILES, SPAN_LENGTH, SPLIT_LENGTH

# In the order of the coefficients.
TERMS: Final = (
    "start", "file_serial", "file", "byte_serial", "byte", "frame",
    "sync_serial", "sync", "sync_byte", "worker",
)  # fmt: skip

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
    splits: bool = True  # messages may be cut into spans (not signed ones)

    @property
    def tasks(self) -> float:
        """What the engine hands to workers, one by one: batches of small files, files, spans of large ones."""
        size = self.bytes / max(self.files, 1)
        if size > SPLIT_LENGTH and self.splits:
            return max(self.files, self.bytes / SPAN_LENGTH)
        return min(self.files, max(self.files / self.batch, self.bytes / BATCH_BYTES))

    @property
    def batch(self) -> int:
        """Small files that travel to a worker together; engine.run makes them fewer where there are few."""
        return int(max(1, min(BATCH_FILES, self.files // (4 * self.workers))))

    @property
    def parallel(self) -> float:
        """Workers' worth of work that goes on at once: no more than cores, and the last round is rarely full."""
        workers = max(1, min(self.workers, self.cores))
        tasks = max(1, round(self.tasks))
        return tasks / math.ceil(tasks / workers) if tasks < 4 * workers else float(workers)

    def features(self) -> Vector:
        """One number for each of TERMS; the prediction is their product with the coefficients."""
        p = self.parallel
        sync = 1.0 if self.fsync else 0.0
        return np.array([
            1.0, self.files, self.files / p, self.bytes, self.bytes / p, self.frames / p,
            sync * self.files, sync * self.files / p, sync * self.bytes, float(self.workers),
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
        splits=not run.cell.signed,
    )


def kind_of(cell: Cell) -> tuple[str, bool, str]:
    """Runs of one kind share their coefficients."""
    return cell.operation, cell.signed, cell.storage


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients of one kind of run, with what is needed to say how sure they are."""

    coefficients: Vector
    resampled: tuple[Vector, ...]  # refits to runs drawn with replacement
    residuals: tuple[float, ...]  # measured / predicted - 1, of cells left out of their own fit
    noise: float | None  # spread of repeated runs of one cell; None where none was repeated
    runs: int
    largest_workers: int

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
        serial, shared = self.coefficients[3], self.coefficients[4]
        total = float(serial + shared)
        return float(serial) / total if total else 0.0


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
    """Coefficients for one kind of run.  ModelError when fewer than four cells of it were measured."""
    runs = [
        run
        for run in records.usable()
        if kind_of(run.cell) == (operation, signed, storage)
        and run.cell.kms_latency == 0
        and run.cell.kms_quota is None
        and run.wall_s > 0
    ]
    cells = by_cell(runs)
    if len(cells) < 4:
        raise ModelError(
            f"the records have {len(cells)} configurations of {operation}"
            f"{' with signature' if signed else ''} on {storage}, a fit needs 4; run `streamcrypt bench calibrate`"
        )
    cores = records.machine.cores
    names = list(cells)
    features = np.array([work_of(cells[name][0], cores).features() for name in names])
    # The unit of replication is a run, the figure of a cell is its median.
    walls = np.array([median([run.wall_s for run in cells[name]]) for name in names])
    coefficients = _solve(features, walls)

    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(100):
        chosen = rng.integers(0, len(names), len(names))
        drawn = np.array([rng.choice([run.wall_s for run in cells[names[i]]]) for i in chosen])
        resampled.append(_solve(features[chosen], drawn))

    residuals = []
    for left_out in range(len(names)):
        others = np.arange(len(names)) != left_out
        predicted = float(_solve(features[others], walls[others]) @ features[left_out])
        if predicted > 0:
            residuals += [run.wall_s / predicted - 1 for run in cells[names[left_out]]]
    repeated = [spread([run.wall_s for run in group]) for group in cells.values() if len(group) > 1]
    return Fit(
        coefficients,
        tuple(resampled),
        tuple(sorted(residuals)),
        median(repeated) if repeated else None,
        len(runs),
        max(run.cell.workers for run in runs),
    )


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
    """The coefficients in readable units, for ``--json`` and for the report."""
    return {
        "coefficients": dict(zip(TERMS, found.coefficients.tolist(), strict=True)),
        "contention": found.contention,
        "noise": found.noise,
        "runs": found.runs,
        "largest_workers": found.largest_workers,
    }
