"""Does a configuration inside a sweep measure what it measures alone?

    python benchmarks/alone.py [--rounds 9] [--storage memory]

Every round measures each of four configurations twice: in a sweep with the three others, in a shuffled
order, and alone, in a sweep of its own with a fresh folder of data.  Which of the two comes first
changes from round to round.  Printed is the median of sweep / alone over the rounds with its 95 %
interval, and whether that is within 3 %.  About two and a half minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from streamcrypt.bench import sweep
from streamcrypt.bench.records import Cell, median

MIB = 1 << 20
WITHIN = 0.03


def cells(storage: str) -> tuple[Cell, ...]:
    """Large files, small files, small frames, and a read."""
    shapes: list[dict[str, Any]] = [
        {"operation": "encrypt", "files": 40, "file_size": 16 * MIB},
        {"operation": "decrypt", "files": 2000, "file_size": 64 << 10},
        {"operation": "encrypt", "files": 32, "file_size": 8 * MIB, "frame_size": 4 << 10},
        {"operation": "verify", "files": 48, "file_size": 16 * MIB},
    ]
    return tuple(Cell(storage=storage, workers=2, **shape) for shape in shapes)


def seconds(measured: tuple[Cell, ...], number: int) -> dict[str, float]:
    """One sweep of these configurations, in the order that this round's number gives."""
    with tempfile.TemporaryDirectory(prefix="streamcrypt-alone-") as folder:
        planned = sweep.Sweep(measured, 1, seed=number)
        found = sweep.run(planned, Path(folder), yardsticks=False)
    failed = [run.error for run in found.runs if run.error is not None]
    if failed:
        sys.exit(f"a run failed: {failed[0]}")
    return {run.cell.hash: run.wall_s for run in found.runs}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--storage", choices=["memory", "disk"], default="memory")
    arguments = parser.parse_args()
    measured = cells(arguments.storage)
    inside: dict[str, list[float]] = {cell.hash: [] for cell in measured}
    alone: dict[str, list[float]] = {cell.hash: [] for cell in measured}

    def in_a_sweep(number: int) -> None:
        for name, wall in seconds(measured, number).items():
            inside[name].append(wall)

    def each_alone(number: int) -> None:
        for cell in measured:
            alone[cell.hash].append(seconds((cell,), number)[cell.hash])

    for number in range(arguments.rounds):
        ways = [in_a_sweep, each_alone]
        for way in ways if number % 2 else reversed(ways):
            way(number)

    print("| configuration | alone, s | sweep / alone, median | interval | within 3 % |")
    print("| --- | --- | --- | --- | --- |")
    missed = False
    for cell in measured:
        ratios = [a / b for a, b in zip(inside[cell.hash], alone[cell.hash], strict=True)]
        (low, high), kind = sweep.bootstrap_median(ratios)
        good = abs(median(ratios) - 1) <= WITHIN
        missed |= not good
        print(
            f"| {cell.label()} | {median(alone[cell.hash]):.3f} | {median(ratios):.3f} "
            f"| {low:.3f} to {high:.3f} ({kind}) | {'yes' if good else 'no'} |"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
