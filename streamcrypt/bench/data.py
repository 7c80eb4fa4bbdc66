"""Files to measure with: seeded, incompressible, never sparse, in the sizes of a distribution.

The same specification gives the same bytes on every machine and in every session.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Final

import numpy as np

_POOL: Final = 64 << 20  # bytes of random data; files begin at different places in it


def sizes(files: int, mean: int, distribution: str, spread: float, seed: int) -> list[int]:
    """Sizes of ``files`` files with exactly the mean ``mean``, in a seeded order.

    ``constant``; ``lognormal`` with ``spread`` as sigma; ``pareto`` with ``spread`` as its shape
    (above 1).  ValueError for another name.
    """
    if distribution == "constant":
        return [mean] * files
    rng = np.random.default_rng(seed)
    if distribution == "lognormal":
        drawn = rng.lognormal(0.0, spread, files)
    elif distribution == "pareto":
        if spread <= 1:
            raise ValueError(f"a Pareto distribution of shape {spread:g} has no mean; use a shape above 1")
        drawn = rng.pareto(spread, files) + 1
    else:
        raise ValueError(f"{distribution!r} is not a distribution; choose constant, lognormal or pareto")
    scaled = drawn * (mean * files / drawn.sum())
    found = [math.floor(size) for size in scaled.tolist()]
    found[0] += mean * files - sum(found)
    return found


def write(folder: Path, lengths: list[int], seed: int) -> int:
    """Make ``folder`` with one file for each length; the bytes written.  OSError when there is no room."""
    total = sum(lengths)
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < total + (64 << 20):
        raise OSError(f"no room for {total} bytes of test data; choose another --work folder")
    pool = memoryview(np.random.default_rng(seed).bytes(min(_POOL, max(1 << 16, max(lengths, default=0)))))
    for number, length in enumerate(lengths):
        with (folder / f"{number:06d}.bin").open("wb") as file:
            file.write(number.to_bytes(8, "big")[: min(8, length)])
            left = length - min(8, length)
            start = (number * 4099) % len(pool)
            while left > 0:
                part = pool[start : start + left]
                file.write(part)
                left -= len(part)
                start = 0
    return total
