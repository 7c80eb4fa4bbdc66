"""A plan against measurement: configurations that the fit has not seen, committed before the run.

The file holds the cells and the seed they were drawn with.  Every one is measured (only a run that
failed is left out, and counted), predicted from the records alone, and put beside two naive planners:
bytes over the best measured rate, and the nearest measured cell scaled by its bytes.  Beside them stands what no
planner can do better than: each run foretold from the other runs of the same configuration, and the noise floor
of each configuration, how far nine in ten of its runs keep to their median.

A virtual disk is not as fast in this hour as in the next.  So the rates can be measured in the same rounds as
the cells, a third of a calibration's cells in each, all in one seeded order.  The fit
sees none of those held out; what an error then says is said of the model, and what records of an earlier hour
miss besides is said of their age.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from streamcrypt.bench import data, sweep
from streamcrypt.bench.records import (
    Cell,
    Record,
    Records,
    RecordsError,
    by_cell,
    median,
    this_machine,
    write_json,
)
from streamcrypt.plan import predict as planner
from streamcrypt.plan.model import best_rate, nearest, work_of

ROUNDS: Final = 10  # runs of one cell: enough for the machine's own noise floor
RATES_EVERY: Final = 3  # rounds: a cell of the calibration is measured in one of so many
KNOWN_LATENCY: Final = 0.1  # spread of the mean of a KMS that answers as it was told
UNLIMITED: Final = 1e9  # calls a second
WITHIN: Final = 0.2  # of the time: a good prediction
BY_AGE: Final = 0.05  # of the calls, where an age limit decides how many there are

_FAMILY: Final = {"cpu": "cpu", "driver": "cpu", "start-up": "cpu", "network": "storage"}


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


def job_of(cell: Cell, cores: int) -> planner.Job:
    """The job that a cell is, as a plan would be asked for it on a machine of so many cores.

    Said, since a plan otherwise takes hosts that have a core for each of its workers.
    """
    lengths = data.sizes_of(cell)
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
        cores=cores,
        fsync=cell.fsync,
        storage=cell.storage,
        cache=cell.cache,
        kms_latency=cell.kms_latency,
        kms_latency_spread=KNOWN_LATENCY,
        kms_quota=cell.kms_quota or UNLIMITED,
        **{name: value for name, value in limits.items() if value is not None},  # type: ignore[arg-type]
    )


def family(limit: str) -> str:
    """cpu, storage or kms: what a measurement can tell apart."""
    return _FAMILY.get(limit, limit.partition("-")[0])


def measured_family(run: Record, cores: int) -> str:
    """What decided a run: the cores that it kept busy, or of the rest of its time the KMS, or the storage.

    A run whose calls were throttled was decided by the quota.  In memory there is no storage to wait for: what
    a core does not do there, it waits for the interpreter's lock and for work that is handed over.
    """
    if run.throttled:
        return "kms"
    busy = run.cpu_s / work_of(run, cores).lanes(run.cpu_s)
    if run.cell.storage == "memory":
        busy = max(busy, run.wall_s - run.kms_wait_s)
    rest = max(0.0, run.wall_s - busy)
    shares = {"cpu": busy, "kms": min(run.kms_wait_s, rest), "storage": max(0.0, rest - run.kms_wait_s)}
    return max(shares, key=lambda name: shares[name])


def validate(
    cells: Sequence[Cell],
    records: Records | None,
    out: Path | None = None,
    *,
    rates: Sequence[Cell] = (),
    work: Path | None = None,
    budget: float = 3600.0,
    rounds: int = ROUNDS,
    attempts: int = sweep.ATTEMPTS,
    progress: Callable[[int, int, Record], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure the cells within ``budget`` seconds and judge the plan by them; ``out`` goes on where it was.

    ``rates`` are cells that are measured in the same rounds, to fit from: their runs become ``out``/machine.json,
    and nothing is judged before all are there.  ``records``, if there are any, are then those of an earlier
    hour, judged beside.  RecordsError when they are of another machine.
    """
    import tempfile

    here = this_machine()
    if records is None and not rates:
        raise RecordsError("a plan is validated with rates: give records, or measure them with the cells")
    if records is not None and here.id != records.machine.id:
        raise RecordsError(
            f"the records are of {records.machine.name}, this is {here.name}: a plan is validated where its rates "
            "were measured; run `streamcrypt bench calibrate --storage disk,memory` here and give it as --records"
        )
    named = {cell.hash for cell in cells}
    rates = tuple({cell.hash: cell for cell in rates if cell.hash not in named}.values())
    in_round = [
        (
            *cells,
            *(cell for place, cell in enumerate(rates) if (place + number) % min(RATES_EVERY, rounds) == 0),
        )
        for number in range(rounds)
    ]
    planned = sum(map(len, in_round))
    with tempfile.TemporaryDirectory(prefix="streamcrypt-validate-") as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        started = clock()
        options: dict[str, Any] = {
            "work": work, "yardsticks": False, "attempts": attempts,
            "progress": None if progress is None else lambda done, _, run: progress(done, planned, run),
        }  # fmt: skip
        for number, chosen in enumerate(in_round):
            found = sweep.run(
                sweep.Sweep(chosen, number + 1, first_round=number),
                folder / "cells",
                budget=budget - (clock() - started),
                **options,
            )
        measured = Records(found.machine, tuple(run for run in found.runs if run.cell.hash in named))
        earlier = records
        if rates:
            wanted = {cell.hash for cell in rates}
            records = Records(found.machine, tuple(run for run in found.runs if run.cell.hash in wanted))
            write_json(folder / "machine.json", records)
    assert records is not None
    done = {(run.round, run.cell.hash) for run in found.runs}
    left_over = sum(
        (number, cell.hash) not in done for number, chosen in enumerate(in_round) for cell in chosen
    )

    def judged(by: Records) -> dict[str, Any]:
        return judge(measured, by, planned=len(cells), cores=here.cores)

    if rates and left_over:
        measured = Records(measured.machine, ())
    # Rates that this folder's rounds have measured may be judged again, by more rounds of the cells alone.
    together = {(run.started, run.cell.hash) for run in found.runs}
    same_rounds = all((run.started, run.cell.hash) in together for run in records.runs)
    result = judged(records) | {"runs_left": left_over, "same_rounds": same_rounds}
    if rates and earlier is not None and result["measured"]:
        result["earlier"] = {"records_date": earlier.date, "summary": judged(earlier)["summary"]}
    return result


def judge(measured: Records, records: Records, *, planned: int, cores: int) -> dict[str, Any]:
    """The table and its summary, from what was measured and what the records predict.

    A prediction is good within 20 %, or within 1.2 times what nine in ten runs of its own cell keep to.
    """
    rows = []
    for runs in by_cell(measured.usable()).values():
        cell = runs[0].cell
        walls = [run.wall_s for run in runs]
        wall, floor = median(walls), _floor(walls)
        job = job_of(cell, cores)
        prediction = planner.predict(job, records)
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
                # A plan is for one run, so runs are what its interval has to hold.
                "covered": sum(prediction.interval[0] <= run.wall_s <= prediction.interval[1] for run in runs)
                / len(runs),
                "limit": family(prediction.estimate.limit),
                "limit_measured": max(set(families), key=families.count),
                "calls_predicted": round(prediction.estimate.calls),
                "calls_measured": round(median([float(run.calls) for run in runs])),
                "calls_at_measured": round(planner.calls_within(job, records, wall)),
                "exact_calls": cell.cache_max_age is None,
                "calls_by_itself": [
                    off <= BY_AGE for off in _from_the_others([float(max(run.calls, 1)) for run in runs])
                ],
                "by_best_rate": (cell.files * cell.file_size / rate) / wall - 1 if rate else math.nan,
                "by_nearest": nearest(known, cell, cell.files * cell.file_size) / wall - 1,
                "by_itself": median(apart) if (apart := _from_the_others(walls)) else None,
                "floor": floor,
                "allowed": max(WITHIN, 1.2 * floor),
                "noisy": sum(1 for run in runs if run.noise),
            }
        )
    return {
        "machine": records.machine.name,
        "records_date": records.date,
        "measured_date": measured.date,
        "planned": planned,
        "measured": len(rows),
        "failed": sorted({run.error for run in measured.runs if run.error is not None}),
        "summary": _summary(rows),
        "rows": rows,
    }


def _from_the_others(values: Sequence[float]) -> list[float]:
    """How far off each is when foretold as the median of the others; none where there are no others."""
    if len(values) < 2:
        return []
    return [
        abs(median([*values[:place], *values[place + 1 :]]) / value - 1) for place, value in enumerate(values)
    ]


def _floor(walls: Sequence[float]) -> float:
    """How far nine in ten runs of one cell are from their median, at most."""
    middle = median(walls)
    # Between two runs where nine in ten is no whole number: of eight runs the last one alone would be all.
    return float(np.quantile([abs(wall / middle - 1) for wall in walls], 0.9))


def _quantile(values: Sequence[float], fraction: float) -> float:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else 0.0


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {}

    def errors(name: str) -> dict[str, float]:  # empty where nothing was repeated
        values = [abs(row[name]) for row in rows if row[name] is not None]
        if not values:
            return {}
        within = sum(value <= WITHIN for value in values) / len(values)
        return {
            "median": median(values),
            "p90": _quantile(values, 0.9),
            "max": max(values),
            "within_20": within,
        }

    def share(held: list[bool]) -> float | None:
        return sum(held) / len(held) if held else None

    aged = [row for row in rows if not row["exact_calls"]]
    return {
        "plan": errors("error"),
        "by_best_rate": errors("by_best_rate"),
        "by_nearest": errors("by_nearest"),
        "by_itself": errors("by_itself"),
        "floor": errors("floor"),
        "bias": median([row["error"] for row in rows]),
        "within_20": share([abs(row["error"]) <= WITHIN for row in rows]),
        "within_allowed": share([abs(row["error"]) <= row["allowed"] for row in rows]),
        "coverage_80": sum(row["covered"] * row["runs"] for row in rows) / sum(row["runs"] for row in rows),
        "coverage_80_medians": share(
            [row["interval"][0] <= row["measured"] <= row["interval"][1] for row in rows]
        ),
        "limit_right": share([row["limit"] == row["limit_measured"] for row in rows]),
        "calls_exact": share(
            [row["calls_predicted"] == row["calls_measured"] for row in rows if row["exact_calls"]]
        ),
        "calls_by_age": share([_near(row["calls_predicted"], row["calls_measured"]) for row in aged]),
        "calls_by_age_at_measured": share(
            [_near(row["calls_at_measured"], row["calls_measured"]) for row in aged]
        ),
        "calls_by_age_itself": share([held for row in aged for held in row["calls_by_itself"]]),
        "aged": len(aged),
        "noisy": sum(row["noisy"] > 0 for row in rows),
    }


def _near(calls: int, measured: int) -> bool:
    return abs(calls / max(measured, 1) - 1) <= BY_AGE


def _by_earlier(earlier: dict[str, Any] | None) -> list[str]:
    """What records of an earlier hour would have foretold."""
    if earlier is None:
        return []
    figures = earlier["summary"]["plan"]
    return [
        "",
        f"By the rates of {earlier['records_date']}, measured before: median {figures['median']:.1%}, p90 "
        f"{figures['p90']:.1%}, within 20 %: {earlier['summary']['within_20']:.0%}, within their 80 % interval: "
        f"{earlier['summary']['coverage_80']:.0%} of runs, limiting resource right: "
        f"{earlier['summary']['limit_right']:.0%}.",
    ]


def _percent(share: float | None) -> str:
    return "none measured" if share is None else f"{share:.0%}"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: summary first, then every row, misses included."""
    summary = result["summary"]
    lines = [
        f"Machine: {result['machine']}; held-out runs {result['measured_date']}, rates measured "
        + ("in the same rounds." if result.get("same_rounds") else f"{result['records_date']}."),
        f"{result['measured']} of {result['planned']} configurations measured; "
        f"failed: {', '.join(result['failed']) or 'none'}.",
        "",
    ]
    if not summary:
        return "\n".join(lines)
    lines += [
        "| seconds, absolute error | median | p90 | max | within 20 % |",
        "| --- | --- | --- | --- | --- |",
    ]
    names = {
        "plan": "plan", "by_best_rate": "bytes over best rate", "by_nearest": "nearest cell, scaled",
        "by_itself": "a run, from the others of the same configuration", "floor": "noise floor of a configuration",
    }  # fmt: skip
    for name, label in names.items():
        if figures := summary[name]:
            lines.append(
                f"| {label} | {figures['median']:.1%} | {figures['p90']:.1%} | {figures['max']:.0%} "
                f"| {figures['within_20']:.0%} |"
            )
    lines += [
        "",
        f"Within 20 %: {summary['within_20']:.0%}; within 20 % or 1.2 times its noise floor: "
        f"{summary['within_allowed']:.0%}. Bias: {summary['bias']:+.1%}. Within their 80 % interval: "
        f"{summary['coverage_80']:.0%} of runs, {summary['coverage_80_medians']:.0%} of medians. "
        f"Limiting resource right: {summary['limit_right']:.0%}. "
        f"KMS calls exact where messages or bytes limit a key: {_percent(summary['calls_exact'])}; within 5 % where "
        f"its age does ({summary['aged']} configurations): {_percent(summary['calls_by_age'])}, and "
        f"{_percent(summary['calls_by_age_at_measured'])} of the calls of a plan that is told the time; "
        "so near is a run's number to the others' of its configuration in "
        f"{_percent(summary['calls_by_age_itself'])} of runs. Configurations with a noisy run: {summary['noisy']}.",
        *_by_earlier(result.get("earlier")),
        "",
        "| configuration | measured s | noise floor | predicted s | error | 80 % interval "
        "| limit: predicted, measured | KMS calls: predicted, measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(result["rows"], key=lambda row: -abs(row["error"])):
        low, high = row["interval"]
        mark = "" if low <= row["measured"] <= high else " *"
        lines.append(
            f"| {row['label']} | {row['measured']:.3f} | {row['floor']:.0%} | {row['predicted']:.3f} "
            f"| {row['error']:+.0%} | {low:.3f}–{high:.3f}{mark} | {row['limit']}, {row['limit_measured']} | "
            f"{row['calls_predicted']}, {row['calls_measured']} |"
        )
    return "\n".join(lines)
