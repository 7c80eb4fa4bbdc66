"""Which cells are measured, in which order, and what two sweeps say about each other.

A sweep goes in rounds: every cell once, in a new seeded order, then all again.  So a slow minute of
the machine falls on all cells and not on one.  Each run is written to ``runs.jsonl`` when it ends; a
sweep that was interrupted goes on where it stopped.  A run on a busy machine is repeated up to three
times, and kept and marked when it stays noisy, never dropped.
"""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import math
import random
import subprocess
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from streamcrypt.bench.data import own_sizes
from streamcrypt.bench.measure import Bench, refusal
from streamcrypt.bench.peers import ENGINES
from streamcrypt.bench.records import (
    SCHEMA,
    Cell,
    Record,
    Records,
    RecordsError,
    append_line,
    by_cell,
    median,
    read_folder,
    read_lines,
    spread,
    this_machine,
    write_parquet,
)
from streamcrypt.engine.run import PROCESSES_PAY, interpreter_seconds, way_of_working
from streamcrypt.units import parse_duration, parse_size

KIB: Final = 1 << 10
MIB: Final = 1 << 20
ATTEMPTS: Final = 3
THRESHOLD: Final = 0.03  # a smaller change is no finding

_SIZES: Final = frozenset({"file_size", "frame_size", "cache_max_bytes", "store_bandwidth"})
_COUNTED: Final = frozenset({"files", "frame_size", "workers", "cache_max_messages"})
# Rates and limits with which no job would end; "none" leaves them out.
_ABOVE_NOTHING: Final = frozenset({"kms_quota", "store_bandwidth", "cache_max_age"})
_DURATIONS: Final = frozenset({"cache_max_age", "kms_latency", "store_latency"})
_FIELDS: Final = {field.name: field for field in dataclasses.fields(Cell)}


class SweepError(ValueError):
    """A sweep that cannot be run as it is described."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Cells and how often each is run."""

    cells: tuple[Cell, ...]
    rounds: int
    seed: int = 1
    first_round: int = 0  # those before it are another sweep's


def parse_value(axis: str, text: Any) -> Any:
    """One value of an axis from a word or a TOML value; SweepError says what is wrong with it.

    A value of ``sizes`` is the several fields of a Cell that a distribution is.
    """
    field = _FIELDS.get(axis)
    if field is None:
        raise SweepError(f"{axis!r} is not an axis; the axes are {', '.join(_FIELDS)}")
    try:
        if axis == "sizes":
            return own_sizes(text)
        if isinstance(text, str) and text.lower() == "none":
            return None
        if axis in _SIZES:
            value: Any = parse_size(text)
        elif axis in _DURATIONS:
            value = parse_duration(text)
        elif field.type == "bool":
            if text not in (True, False, "true", "false", "yes", "no"):
                raise ValueError(f"{text!r} is not yes or no")
            value = text in (True, "true", "yes")
        elif field.type in ("int", "int | None"):
            value = _number(int, text)
        elif field.type in ("float", "float | None"):
            value = _number(float, text)
        else:
            value = str(text)
    except (TypeError, ValueError) as error:
        raise SweepError(f"axis {axis}: {error}") from error
    if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
        raise SweepError(f"axis {axis}: {text!r} is negative")
    if axis in _COUNTED and value < 1:
        raise SweepError(f"axis {axis}: {text!r} is not at least 1")
    if axis in _ABOVE_NOTHING and value == 0:
        raise SweepError(f"axis {axis}: 0 lets no job finish; write a value above it, or none for no limit")
    if axis == "kms_errors" and value >= 1:
        raise SweepError(f"axis {axis}: {text!r} is not a share below 1; no job would finish")
    return value


def _number(kind: type[int] | type[float], text: Any) -> int | float:
    try:
        value = kind(text)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a {'whole ' if kind is int else ''}number")
    return value


def with_fields(cell: Cell, values: Mapping[str, Any]) -> Cell:
    """The cell with these values of axes."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= value if name == "sizes" and value is not None else {name: value}
    return dataclasses.replace(cell, **fields)


def grid(axes: Mapping[str, Sequence[Any]], base: Cell | None = None) -> tuple[Cell, ...]:
    """Every combination of the axes' values."""
    names = list(axes)
    start = base or Cell()
    combined = itertools.product(*(axes[name] for name in names))
    return _distinct(with_fields(start, dict(zip(names, values, strict=True))) for values in combined)


def one_at_a_time(axes: Mapping[str, Sequence[Any]], base: Cell | None = None) -> tuple[Cell, ...]:
    """The first value of every axis, and each other value alone."""
    start = with_fields(base or Cell(), {name: values[0] for name, values in axes.items()})
    singles = (with_fields(start, {name: value}) for name, values in axes.items() for value in values[1:])
    return _distinct([start, *singles])


def latin_hypercube(
    axes: Mapping[str, Sequence[Any]], count: int, seed: int, base: Cell | None = None
) -> tuple[Cell, ...]:
    """``count`` cells whose values cover every axis evenly; the same for the same seed."""
    from scipy.stats import qmc

    sample = qmc.LatinHypercube(d=len(axes), rng=np.random.default_rng(seed)).random(count)
    cells = []
    for row in sample.tolist():
        chosen = {
            name: values[min(len(values) - 1, int(place * len(values)))]
            for (name, values), place in zip(axes.items(), row, strict=True)
        }
        cells.append(with_fields(base or Cell(), chosen))
    return _distinct(cells)


def _distinct(cells: Iterator[Cell] | Sequence[Cell]) -> tuple[Cell, ...]:
    return tuple({cell.hash: cell for cell in cells}.values())


def preset(name: str) -> Sweep:
    """``quick`` (under a minute), ``standard`` (some minutes), ``full`` (an hour and more)."""
    if name == "quick":
        axes: dict[str, Sequence[Any]] = {
            "operation": ["encrypt", "decrypt"],
            "frame_size": [64 * KIB, MIB],
            "workers": [1, 2],
        }
        return Sweep(grid(axes, Cell(files=16, file_size=8 * MIB)), 2)
    if name == "standard":
        large = grid(
            {
                "operation": ["encrypt", "decrypt", "verify", "rekey"],
                "frame_size": [4 * KIB, 64 * KIB, MIB],
                "workers": [1, 2],
            },
            Cell(files=32, file_size=16 * MIB),
        )
        small = grid(
            {"operation": ["encrypt", "decrypt"], "workers": [1, 2]}, Cell(files=1000, file_size=16 * KIB)
        )
        keys = grid(
            {"cache_max_messages": [1, 10, 100], "kms_latency": [0.005, 0.02]},
            Cell(files=200, file_size=MIB, workers=2),
        )
        reads = grid(
            {"frame_size": [4 * KIB, 64 * KIB, MIB]}, Cell(operation="read", files=8, file_size=32 * MIB)
        )
        engines = grid(
            {"operation": ["encrypt", "decrypt"], "engine": ["streamcrypt", *ENGINES]},
            Cell(files=16, file_size=16 * MIB, frame_size=64 * KIB, workers=2),
        )
        epochs = grid(
            {"reader": ["parquet", "open"], "workers": [1, 2]},
            Cell(operation="epoch", files=16, file_size=16 * MIB),
        )
        stores = grid(
            {"operation": ["encrypt", "decrypt", "verify"], "store_latency": [0.0, 0.02]},
            Cell(storage="store", files=16, file_size=8 * MIB, workers=8),
        )
        return Sweep(_distinct(large + small + keys + reads + engines + epochs + stores), 5)
    if name == "full":
        wide = grid(
            {
                "operation": ["encrypt", "decrypt", "verify", "rekey"],
                "frame_size": [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB],
                "workers": [1, 2, 4],
                "signed": [False, True],
                "storage": ["memory", "disk"],
            },
            Cell(files=32, file_size=16 * MIB),
        )
        failing = grid(
            {"kms_errors": [0.0, 0.05, 0.2], "cache_max_messages": [1, 10]},
            Cell(files=200, file_size=MIB, workers=2, kms_latency=0.005),
        )
        skewed = grid(
            {"distribution": ["lognormal"], "operation": ["encrypt", "decrypt"], "workers": [1, 2, 4]},
            Cell(files=400, file_size=MIB, spread=1.2),
        )
        narrow = grid(
            {"operation": ["encrypt", "decrypt", "verify"], "store_bandwidth": [20_000_000, 80_000_000]},
            Cell(storage="store", files=16, file_size=8 * MIB, workers=8, store_latency=0.02),
        )
        cells = preset("standard").cells + wide + failing + skewed + narrow
        return Sweep(_distinct(cells), 5)
    raise SweepError(f"{name!r} is not a preset; choose quick, standard or full")


def from_toml(path: Path) -> Sweep:
    """A sweep from a file::

    design = "grid"          # or "one-at-a-time", or "lhs" with count = 40
    rounds = 5
    seed = 1
    [base]                   # what all cells share
    file_size = "4MiB"
    [axes]
    frame_size = ["64KiB", "1MiB"]
    workers = [1, 2]
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SweepError(f"{path}: {error}") from error
    unknown = set(document) - {"design", "rounds", "seed", "base", "axes", "count"}
    if unknown:
        raise SweepError(f"{path}: unknown {', '.join(sorted(unknown))}")
    given = document.get("axes", {})
    if not given:
        raise SweepError(f"{path}: no [axes]")
    axes = {name: [parse_value(name, value) for value in _list(values)] for name, values in given.items()}
    try:
        rounds, seed, count = (
            int(document.get(*word)) for word in (("rounds", 5), ("seed", 1), ("count", 40))
        )
    except (TypeError, ValueError) as error:
        raise SweepError(f"{path}: rounds, seed and count are whole numbers: {error}") from error
    shared = {name: parse_value(name, value) for name, value in document.get("base", {}).items()}
    return design(
        str(document.get("design", "grid")),
        axes,
        with_fields(Cell(seed=seed), shared),
        rounds=rounds,
        seed=seed,
        count=count,
    )


def _list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def design(
    name: str, axes: Mapping[str, Sequence[Any]], base: Cell, *, rounds: int, seed: int, count: int
) -> Sweep:
    """Axes into cells, by the name of a design."""
    if rounds < 1:
        raise SweepError(f"rounds is {rounds}: a sweep that measures nothing says nothing")
    if "sizes" in axes and (twice := {"file_size", "distribution", "spread"} & set(axes)):
        raise SweepError(f"sizes says {', '.join(sorted(twice))} already; leave one of them out")
    if name == "grid":
        return Sweep(grid(axes, base), rounds, seed)
    if name == "one-at-a-time":
        return Sweep(one_at_a_time(axes, base), rounds, seed)
    if name == "lhs":
        return Sweep(latin_hypercube(axes, count, seed, base), rounds, seed)
    raise SweepError(f"{name!r} is not a design; choose grid, one-at-a-time or lhs")


def possible(sweep: Sweep) -> tuple[Sweep, list[tuple[Cell, str]]]:
    """What of the sweep can be measured here, and the other cells with the reason.

    SweepError where nothing can.
    """
    refused = [(cell, reason) for cell in sweep.cells if (reason := refusal(cell)) is not None]
    without = {cell.hash for cell, _ in refused}
    left = tuple(cell for cell in sweep.cells if cell.hash not in without)
    if not left:
        raise SweepError(refused[0][1] if refused else "the sweep has no cells")
    return dataclasses.replace(sweep, cells=left), refused


def calibration(storages: Sequence[str] = ("disk",), *, cores: int = 2) -> Sweep:
    """The cells from which a plan's rates are fitted: about six minutes for two storages and one round.

    Many small files give the cost of a file, small frames that of a frame, large files that of a byte, middling
    ones what lies between; each with one worker and with as many as there are cores, since their ratio is the
    contention, and with so many that the engine takes processes for workers.  Twice as many workers as cores
    say what threads wait for each other, and what waits for a disk at once.  What does not depend on the storage
    (frames, signatures, data keys, starting workers) is measured on the first one only, memory if it is there.
    What one thread does alone is measured once, whatever the number of workers asked for.
    """
    # Clearly below the number of small files from which on workers are processes, clearly above it, far above.
    turn = PROCESSES_PAY / interpreter_seconds(1, 1)
    many, more, most = ((min(20_000, round(times * turn)), 8 * KIB, MIB) for times in (0.55, 1.5, 3.5))
    large, middle, spans = (32, 24 * MIB, MIB), (400, 2 * MIB, MIB), (2, 384 * MIB, MIB)
    frames = (math.ceil(1.1 * PROCESSES_PAY / interpreter_seconds(1, 1025)), 4 * MIB, 4 * KIB)
    short, between, handed = (
        (2000, 64 * KIB, 16 * KIB),
        (800, 640 * KIB, 256 * KIB),
        (3500, 48 * KIB, 16 * KIB),
    )
    cells: list[Cell] = []

    def add(shape: tuple[int, int, int], **fields: Any) -> None:
        files, size, frame = shape
        cell = Cell(files=files, file_size=size, frame_size=frame, **fields)
        counted = files * (size // frame + 1)
        if cell.workers == 1 or (
            way_of_working(files, counted, files * size, cell.workers, flushed=cell.fsync) != "alone"
        ):
            cells.append(cell)

    ordered = sorted(set(storages), key=lambda storage: storage != "memory")
    for storage, workers, operation in itertools.product(
        ordered, sorted({1, cores}), ("encrypt", "decrypt", "verify", "rekey")
    ):
        fsync = storage == "disk" and operation != "verify"
        common: dict[str, Any] = {
            "storage": storage,
            "workers": workers,
            "operation": operation,
            "fsync": fsync,
        }
        moves = operation in ("encrypt", "decrypt")
        shapes = [many, large]
        if operation != "rekey" and (storage == ordered[0] or moves):
            shapes += [short, between]
        if storage == ordered[0]:
            shapes += [more, frames] + ([middle, spans] if moves else [])
            add((600, 8 * KIB, MIB), cache_max_messages=1, **common | {"fsync": False})
            for signed in (
                ((300, 16 * KIB, MIB), (12, 24 * MIB, MIB)) if operation != "rekey" or workers > 1 else ()
            ):
                add(signed, signed=True, **common | {"fsync": False})
            if workers > 1:
                add(most, **common)
                if operation != "rekey":
                    add(handed, **common)
        elif workers > 1:
            shapes.append(more)
        for shape in shapes:
            add(shape, **common)
        if fsync and (workers == 1 or operation == "encrypt"):
            add(many, **common | {"fsync": False})
            add(large, **common | {"fsync": False})
        if workers > 1 and operation != "rekey":
            for shape in [many, large] + ([frames, between, more, handed] if storage == ordered[0] else []):
                add(shape, **common | {"workers": 2 * workers})
    return Sweep(_distinct(cells), 1)


def held_out(seed: int, storages: Sequence[str] = ("memory", "disk")) -> tuple[Cell, ...]:
    """Configurations outside the calibration grid, by seeded Latin hypercubes: to judge a plan by.

    Frame lengths, sizes, distributions and numbers of workers that calibration has not seen, writes that
    the disk decides; limits of messages with a KMS whose latency or quota decides; limits of age.
    """
    axes: dict[str, Sequence[Any]] = {
        "operation": ["encrypt", "encrypt", "decrypt", "verify"],
        "frame_size": [8 * KIB, 32 * KIB, 128 * KIB, 512 * KIB, 2 * MIB],
        "workers": [1, 2, 3, 4],
        "file_size": [24 * KIB, 100 * KIB, 500 * KIB, 3 * MIB, 12 * MIB],
        "distribution": ["constant", "lognormal", "lognormal", "pareto"],
        "storage": list(storages),
    }
    cells = []
    for number, cell in enumerate(latin_hypercube(axes, 32, seed)):
        # As many bytes as calibration's large cells: a virtual machine takes longer for a byte where a run needs
        # more memory than its host holds ready, and that no rate can say.
        total = 768 * MIB if cell.file_size > 64 * KIB else 256 * MIB
        wide = {"constant": 0.0, "lognormal": 1.0, "pareto": 2.5}[cell.distribution]
        cells.append(
            dataclasses.replace(
                cell,
                files=max(8, min(8000, total // cell.file_size)),
                spread=wide,
                seed=seed + number,
                fsync=cell.storage == "disk" and cell.operation != "verify",
            )
        )
    keyed: dict[str, Sequence[Any]] = {
        "operation": ["encrypt", "encrypt", "decrypt"],
        "workers": [1, 2, 4],
        "file_size": [40 * KIB, 400 * KIB, 1536 * KIB],
        "cache_max_messages": [1, 3, 25, 150],
        "kms_latency": [0.004, 0.012, 0.04],
        "kms_quota": [None, None, 40.0],
    }
    for number, cell in enumerate(latin_hypercube(keyed, 12, seed + 1000)):
        # Long enough to mean something, short enough for a KMS that takes one call at a time.
        slowest = max(cell.kms_latency, 1 / cell.kms_quota if cell.kms_quota else 0.0)
        per_key = cell.cache_max_messages or 1
        most = min(8000, 768 * MIB // cell.file_size)
        files = min(most, max(60, int(4 / slowest * per_key)))
        cells.append(dataclasses.replace(cell, files=files, seed=seed + 1000 + number, storage=storages[0]))
    # Encrypting only: how many data keys an age limit made of a dataset, the dataset alone can tell.  Ages are
    # short because jobs are: some twenty renewals, of which one more or less is no more than chance.
    aged: dict[str, Sequence[Any]] = {
        "workers": [1, 2, 3],
        "file_size": [24 * KIB, 200 * KIB, 1200 * KIB],
        "cache_max_age": [0.06, 0.1, 0.16],
        "kms_latency": [0.004, 0.02],
    }
    for number, cell in enumerate(latin_hypercube(aged, 6, seed + 2000)):
        total = 1536 * MIB if cell.file_size > 64 * KIB else 384 * MIB
        files = total // cell.file_size
        cells.append(dataclasses.replace(cell, files=files, seed=seed + 2000 + number, storage=storages[0]))
    return _distinct(cells)


# -- running


class _Folder:
    """A sweep's folder: this machine's fingerprint, a line for every run that is done, room for more.

    RecordsError when it holds another machine's runs; SweepError while another sweep runs in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = path / "runs.jsonl"
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise SweepError(f"{path}: another sweep is running here") from error
        try:
            self._check_machine()
        except BaseException:
            self._lock.close()
            raise
        _drop_cut_line(self._lines)
        self._done = {(run.round, run.cell.hash) for run in read_lines(self._lines)}

    def _check_machine(self) -> None:
        machine, head = this_machine(), self.path / "machine.json"
        if not head.exists():
            head.write_text(json.dumps({"schema": SCHEMA, "machine": machine.to_json()}), encoding="utf-8")
            return
        known = read_folder(self.path).machine
        if known.id != machine.id:
            raise RecordsError(
                f"{self.path}: measured on {known.name}; this is {machine.name}; use another folder"
            )

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @property
    def done(self) -> int:
        return len(self._done)

    def has(self, round_number: int, cell: Cell) -> bool:
        return (round_number, cell.hash) in self._done

    def add(self, record: Record) -> int:
        """How many runs there are now."""
        append_line(self._lines, record)
        self._done.add((record.round, record.cell.hash))
        return len(self._done)

    def finish(self) -> Records:
        """The runs, also as ``records.parquet``."""
        records = read_folder(self.path)
        if records.runs:
            write_parquet(self.path / "records.parquet", records)
        return records


def _drop_cut_line(lines: Path) -> None:
    """Take away what an interruption left of the last line: the next run begins a line of its own."""
    if lines.exists():
        with lines.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


def order(sweep: Sweep, round_number: int) -> list[Cell]:
    """The cells of one round, in their own seeded order."""
    cells = list(sweep.cells)
    random.Random(f"{sweep.seed} {round_number}").shuffle(cells)  # noqa: S311 - an order, no secret
    return cells


def run(
    sweep: Sweep,
    folder: Path,
    *,
    work: Path | None = None,
    timeout: float = 120.0,
    yardsticks: bool = True,
    budget: float | None = None,
    attempts: int = ATTEMPTS,
    progress: Callable[[int, int, Record], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Records:
    """Run the sweep into ``folder``, or go on with the one that is there.

    RecordsError when the folder holds another machine's runs.  ``budget`` seconds stop it between two
    runs; calling again goes on.  At the end ``records.parquet`` is written beside the lines.
    """
    if not sweep.cells:
        raise SweepError("the sweep has no cells")
    total = len(sweep.cells) * sweep.rounds
    session = _session()
    started = clock()
    with _Folder(folder) as kept, Bench(work, timeout=timeout, yardsticks=yardsticks) as bench:
        for round_number, cell in _rounds(sweep):
            if kept.has(round_number, cell):
                continue
            if budget is not None and clock() - started > budget:
                break
            record = _quietest(bench, cell, session, round_number, attempts)
            done = kept.add(record)
            if progress is not None:
                progress(done, total, record)
        return kept.finish()


def run_against(
    sweep: Sweep,
    baseline: Path,
    folder: Path,
    *,
    work: Path | None = None,
    timeout: float = 120.0,
    attempts: int = ATTEMPTS,
    progress: Callable[[int, int, Record], None] | None = None,
) -> tuple[Records, Records]:
    """Run every cell with the streamcrypt of the folder ``baseline`` and with this one, in turns.

    Runs of one round and cell follow one another, the first of them by chance: what the machine does
    meanwhile, both see.  They go into ``folder``/old and ``folder``/new, and go on where they were.
    """
    total = 2 * len(sweep.cells) * sweep.rounds
    session = _session()
    with (
        _Folder(folder / "old") as old,
        _Folder(folder / "new") as new,
        Bench(work, timeout=timeout, yardsticks=False) as bench,
    ):
        for round_number, cell in _rounds(sweep):
            sides: list[tuple[_Folder, Path | None]] = [(old, baseline), (new, None)]
            if random.Random(f"{sweep.seed} {round_number} {cell.hash}").random() < 0.5:  # noqa: S311 - an order
                sides.reverse()
            for kept, tree in sides:
                if kept.has(round_number, cell):
                    continue
                record = _quietest(bench, cell, session, round_number, attempts, tree)
                kept.add(record)
                if progress is not None:
                    progress(old.done + new.done, total, record)
        return old.finish(), new.finish()


def _session() -> str:
    return f"{random.SystemRandom().getrandbits(32):08x}"


def _rounds(sweep: Sweep) -> Iterator[tuple[int, Cell]]:
    for round_number in range(sweep.first_round, sweep.rounds):
        for cell in order(sweep, round_number):
            yield round_number, cell


def _quietest(
    bench: Bench, cell: Cell, session: str, round_number: int, attempts: int, tree: Path | None = None
) -> Record:
    """The first run without noise, or the last of so many."""
    for _ in range(attempts):
        record = bench.run(cell, session=session, round_number=round_number, tree=tree)
        if not record.noise or record.error is not None:
            break
    return record


@contextlib.contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """The package as it was at a commit, branch or tag of this checkout, in a folder for the while.

    SweepError when this is no git checkout or it has no such commit.
    """
    import streamcrypt

    root = Path(streamcrypt.__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="streamcrypt-baseline-") as folder:
        try:
            found = subprocess.run(
                ["git", "-C", str(root), "archive", "--format=tar", ref, "streamcrypt"],  # noqa: S607 - git is found by PATH
                capture_output=True,
                check=False,
            )
        except OSError as error:
            raise SweepError(f"a baseline from git needs git: {error.strerror}") from error
        if found.returncode != 0:
            reason = found.stderr.decode(errors="replace").strip().splitlines() or ["git archive failed"]
            raise SweepError(
                f"no streamcrypt of {ref!r} to compare with: {reason[-1]}; run in a git checkout of streamcrypt, "
                "installed with pip install -e"
            )
        with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder, filter="data")
        compileall.compile_dir(folder, quiet=2)  # as an installed package: no run pays for it
        yield Path(folder)


# -- comparing


@dataclass(frozen=True, slots=True)
class Comparison:
    """One cell in two sweeps: the ratio new/old of seconds, its interval, and what may be said."""

    cell: Cell
    old_s: float
    new_s: float
    ratio: float
    interval: tuple[float, float]
    interval_kind: str  # "95 %" or "min-max"
    verdict: str  # faster, slower, no evidence, too noisy
    runs: int

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "cell": dataclasses.asdict(self.cell), "label": self.cell.label()}


def _relative(run: Record) -> float:
    """Seconds in units of the same round's yardstick, so that a slower minute cancels; else plain seconds."""
    return run.wall_s / run.yardstick if run.yardstick > 0 else run.wall_s


def bootstrap_median(values: Sequence[float], seed: int = 1) -> tuple[tuple[float, float], str]:
    """A 95 % interval of the median; with fewer than 8 values their minimum and maximum."""
    if len(values) < 8 or min(values) == max(values):
        return (min(values), max(values)), "min-max"
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.array(values),), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return (float(found.low), float(found.high)), "95 %"


def verdict(ratio: float, interval: tuple[float, float]) -> str:
    """What a ratio of seconds with its interval allows to be said."""
    low, high = interval
    if high < 1 and ratio < 1 - THRESHOLD:
        return "faster"
    if low > 1 and ratio > 1 + THRESHOLD:
        return "slower"
    return "no evidence" if high - low <= 0.10 else "too noisy"


def compare(old: Records, new: Records, *, cross_machine: bool = False) -> list[Comparison]:
    """Cell by cell, in pairs of runs of the same round.  RecordsError for two machines."""
    if old.machine.id != new.machine.id and not cross_machine:
        raise RecordsError(
            f"the two were measured on different machines ({old.machine.name}; {new.machine.name}); "
            "add --cross-machine to compare them all the same"
        )
    before = by_cell(old.usable())
    found = []
    for name, runs in by_cell(new.usable()).items():
        others = {run.round: run for run in before.get(name, [])}
        pairs = [(others[run.round], run) for run in runs if run.round in others]
        if not pairs:
            continue
        use_yardstick = all(a.yardstick and b.yardstick for a, b in pairs)
        ratios = [_relative(b) / _relative(a) if use_yardstick else b.wall_s / a.wall_s for a, b in pairs]
        interval, kind = bootstrap_median(ratios)
        ratio = median(ratios)
        said = verdict(ratio, interval)
        if len(pairs) < 3 and said in ("faster", "slower"):
            said = "too noisy"  # one or two runs prove nothing
        found.append(
            Comparison(
                runs[0].cell,
                median([a.wall_s for a, _ in pairs]),
                median([b.wall_s for _, b in pairs]),
                ratio,
                interval,
                kind,
                said,
                len(pairs),
            )
        )
    return found


def compare_exit_code(comparisons: Sequence[Comparison]) -> int:
    """0 no regression, 1 a regression, 5 nothing in common or everything too noisy."""
    if any(one.verdict == "slower" for one in comparisons):
        return 1
    if not comparisons or all(one.verdict == "too noisy" for one in comparisons):
        return 5
    return 0


def summary(records: Records) -> list[dict[str, Any]]:
    """A row per cell: median seconds and rate, spread, KMS calls, memory, share of the yardstick's rate.

    ``of_copy`` is against a copy of the same files, None where none was made; of an epoch against the same
    loader over plain files.
    """
    rows = []
    for runs in by_cell(records.usable()).values():
        wall = median([run.wall_s for run in runs])
        copies = [run.yardstick for run in runs if run.yardstick]
        rows.append(
            {
                "cell": runs[0].cell.hash,
                "label": runs[0].cell.label(),
                "runs": len(runs),
                "noisy": sum(1 for run in runs if run.noise),
                "seconds": wall,
                "bytes_per_second": median([run.rate for run in runs]),
                "spread": spread([run.wall_s for run in runs]),
                "of_copy": median(copies) / wall if copies and wall else None,
                "yardstick": "plain" if runs[0].yardstick_s.get("plain") else "copy",
                "kms_calls": median([float(run.calls) for run in runs]),
                "peak_rss": max(run.peak_rss for run in runs),
            }
        )
    return rows
