"""A plan against measurement: configurations that the fit has not seen, committed before the run.

The file holds the cells and the seed they were drawn with.  Every one is measured (only a run that
failed is left out, and counted), predicted from the records alone, and put beside two naive planners:
bytes over the best measured rate, and the nearest measured cell scaled by its bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from streamcrypt.bench import data, sweep
from streamcrypt.bench.records import Cell, Record, Records, RecordsError, by_cell, median, this_machine
from streamcrypt.plan import predict as planner
from streamcrypt.plan.model import best_rate, nearest, work_of

REPEATS: Final = 10  # runs of one cell, for the machine's own noise floor
ROUNDS: Final = 3
UNLIMITED: Final = 1e9  # calls a second

_FAMILY: Final = {"cpu": "cpu", "file-overhead": "cpu", "start-up": "cpu", "network": "storage"}


def write_held_out(path: Path, cells: Sequence[Cell], seed: int) -> None:
    """The file to commit before anything is measured."""
    lines = ",\n".join("  " + json.dumps(dataclasses.asdict(cell)) for cell in cells)
    path.write_text(f'{{"seed": {seed}, "cells": [\n{lines}\n]}}\n', encoding="utf-8")


def read_held_out(path: Path) -> tuple[Cell, ...]:
    """The cells of such a file; SweepError when it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Cell(**cell) for cell in document["cells"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise sweep.SweepError(f"{path}: not a file of held-out configurations: {error}") from error


def job_of(cell: Cell) -> planner.Job:
    """The job that a cell is, as a plan would be asked for it."""
    lengths = data.sizes(cell.files, cell.file_size, cell.distribution, cell.spread, cell.seed)
    limits = {
        "cache_max_age": cell.cache_max_age,
        "cache_max_messages": cell.cache_max_messages,
        "cache_max_bytes": cell.cache_max_bytes,
    }
    return planner.Job(
        bytes=sum(lengths),
        files=len(lengths),
        sizes=planner.Sizes.listing(lengths),
        operation=cell.operation,
        signed=cell.signed,
        frame_size=cell.frame_size,
        workers=cell.workers,
        fsync=cell.fsync,
        storage=cell.storage,
        cache=cell.cache,
        kms_latency=cell.kms_latency,
        kms_quota=cell.kms_quota or UNLIMITED,
        **{name: value for name, value in limits.items() if value is not None},  # type: ignore[arg-type]
    )


def family(limit: str) -> str:
    """cpu, storage or kms: what a measurement can tell apart."""
    return _FAMILY.get(limit, limit.partition("-")[0])


def measured_family(run: Record, cores: int) -> str:
    """What decided a run: most of its time in KMS calls, or the cores busy, or neither (the storage)."""
    if run.throttled or run.kms_wait_s > run.wall_s / 2:
        return "kms"
    parallel = work_of(run, cores).parallel
    return "cpu" if run.cpu_s > 0.6 * parallel * run.wall_s else "storage"


def validate(
    cells: Sequence[Cell],
    records: Records,
    out: Path | None = None,
    *,
    work: Path | None = None,
    budget: float = 600.0,
    repeats: int = REPEATS,
    rounds: int = ROUNDS,
    progress: Callable[[int, int, Record], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure the cells within ``budget`` seconds and judge the plan by them; ``out`` goes on where it was.

    RecordsError when the records are of another machine.
    """
    import tempfile

    here = this_machine()
    if here.id != records.machine.id:
        raise RecordsError(
            f"the records are of {records.machine.name}, this is {here.name}: a plan is validated where its rates "
            "were measured; run `streamcrypt bench calibrate --storage disk,memory` here and give it as --records"
        )
    cores = records.machine.cores
    with tempfile.TemporaryDirectory(prefix="streamcrypt-validate-") as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        started = clock()
        options: dict[str, Any] = {"work": work, "yardsticks": False, "progress": progress}
        middle = sorted(cells, key=lambda cell: cell.files * cell.file_size)[len(cells) // 2]
        floor_runs = sweep.run(
            sweep.Sweep((middle,), repeats), folder / "floor", budget=budget / 4, **options
        ).usable()
        left = max(1.0, budget - (clock() - started))
        measured = sweep.run(sweep.Sweep(tuple(cells), rounds), folder / "cells", budget=left, **options)
    return judge(measured, records, [run.wall_s for run in floor_runs], planned=len(cells), cores=cores)


def judge(
    measured: Records, records: Records, floor_walls: Sequence[float], *, planned: int, cores: int
) -> dict[str, Any]:
    """The table and its summary, from what was measured and what the records predict."""
    rows = []
    for runs in by_cell(measured.usable()).values():
        cell = runs[0].cell
        wall = median([run.wall_s for run in runs])
        prediction = planner.predict(job_of(cell), records)
        predicted = prediction.estimate.seconds
        known = records.usable()
        rate = best_rate(known, cell.operation)
        families = [measured_family(run, cores) for run in runs]
        rows.append(
            {
                "label": cell.label(),
                "runs": len(runs),
                "measured": wall,
                "predicted": predicted,
                "error": predicted / wall - 1,
                "interval": list(prediction.interval),
                "covered": prediction.interval[0] <= wall <= prediction.interval[1],
                "limit": family(prediction.estimate.limit),
                "limit_measured": max(set(families), key=families.count),
                "calls_predicted": round(prediction.estimate.calls),
                "calls_measured": round(median([float(run.calls) for run in runs])),
                "exact_calls": cell.cache_max_age is None,
                "by_best_rate": (cell.files * cell.file_size / rate) / wall - 1 if rate else math.nan,
                "by_nearest": nearest(known, cell, cell.files * cell.file_size) / wall - 1,
                "noisy": sum(1 for run in runs if run.noise),
            }
        )
    floor = [abs(wall / median(list(floor_walls)) - 1) for wall in floor_walls]
    return {
        "machine": records.machine.name,
        "records_date": records.date,
        "measured_date": measured.date,
        "planned": planned,
        "measured": len(rows),
        "failed": sorted({run.error for run in measured.runs if run.error is not None}),
        "floor": {"runs": len(floor), "median": median(floor), "p90": _quantile(floor, 0.9)},
        "summary": _summary(rows),
        "rows": rows,
    }


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {}

    def errors(name: str) -> dict[str, float]:
        values = [abs(row[name]) for row in rows]
        return {"median": median(values), "p90": _quantile(values, 0.9), "max": max(values)}

    return {
        "plan": errors("error"),
        "by_best_rate": errors("by_best_rate"),
        "by_nearest": errors("by_nearest"),
        "bias": median([row["error"] for row in rows]),
        "within_20": sum(abs(row["error"]) <= 0.2 for row in rows) / len(rows),
        "coverage_80": sum(row["covered"] for row in rows) / len(rows),
        "limit_right": sum(row["limit"] == row["limit_measured"] for row in rows) / len(rows),
        "calls_exact": sum(row["calls_predicted"] == row["calls_measured"] for row in rows) / len(rows),
        "noisy": sum(row["noisy"] > 0 for row in rows),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: summary first, then every row, misses included."""
    summary, floor = result["summary"], result["floor"]
    lines = [
        f"Machine: {result['machine']}; rates measured {result['records_date']}, "
        f"held-out runs {result['measured_date']}.",
        f"{result['measured']} of {result['planned']} configurations measured; "
        f"failed: {', '.join(result['failed']) or 'none'}.",
        "",
    ]
    if not summary:
        return "\n".join(lines)
    lines += [
        "| seconds, absolute error | median | p90 | max |",
        "| --- | --- | --- | --- |",
    ]
    names = {"plan": "plan", "by_best_rate": "bytes over best rate", "by_nearest": "nearest cell, scaled"}
    for name, label in names.items():
        figures = summary[name]
        lines.append(f"| {label} | {figures['median']:.1%} | {figures['p90']:.1%} | {figures['max']:.0%} |")
    lines += [
        f"| noise floor: one configuration {floor['runs']} times | {floor['median']:.1%} | {floor['p90']:.1%} | |",
        "",
        f"Within 20 %: {summary['within_20']:.0%}. Bias: {summary['bias']:+.1%}. 80 % intervals that hold the "
        f"measurement: {summary['coverage_80']:.0%}. Limiting resource right: {summary['limit_right']:.0%}. "
        f"KMS calls exact: {summary['calls_exact']:.0%}. Configurations with a noisy run: {summary['noisy']}.",
        "",
        "| configuration | measured s | predicted s | error | 80 % interval "
        "| limit: predicted, measured | KMS calls: predicted, measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(result["rows"], key=lambda row: -abs(row["error"])):
        low, high = row["interval"]
        mark = "" if row["covered"] else " *"
        lines.append(
            f"| {row['label']} | {row['measured']:.3f} | {row['predicted']:.3f} | {row['error']:+.0%} | "
            f"{low:.3f}–{high:.3f}{mark} | {row['limit']}, {row['limit_measured']} | "
            f"{row['calls_predicted']}, {row['calls_measured']} |"
        )
    return "\n".join(lines)
