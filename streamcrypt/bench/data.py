"""Files to measure with: seeded, incompressible, never sparse, in the sizes of a distribution.

The same specification gives the same bytes on every machine and in every session.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np

from streamcrypt.bench.records import Cell
from streamcrypt.units import parse_size

_MOST_SIZES: Final = 1000
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


def sizes_of(cell: Cell) -> list[int]:
    """Sizes of a cell's files, in a seeded order."""
    if cell.sizes is None:
        return sizes(cell.files, cell.file_size, cell.distribution, cell.spread, cell.seed)
    ordered = sorted(cell.sizes)
    spread = [ordered[(2 * number + 1) * len(ordered) // (2 * cell.files)] for number in range(cell.files)]
    found: list[int] = np.random.default_rng(cell.seed).permutation(spread).tolist()
    return found


def own_sizes(given: str | list[str | int]) -> dict[str, object]:
    """The fields of a Cell that ``given`` says, or ValueError.

    ``64KiB+1MiB+1MiB`` or a list: these sizes; ``lognormal:4MiB:1.2``, ``pareto:4MiB:2.5`` and
    ``constant:4MiB``: a distribution, its mean and its spread; ``@FOLDER``, ``@URL`` and ``@FILE`` (a size
    on each line): the sizes found there.
    """
    if isinstance(given, str) and given.partition(":")[0] in ("constant", "lognormal", "pareto"):
        distribution, mean, *spread = given.split(":")
        if len(spread) != (distribution != "constant"):
            raise ValueError(f"{given!r}: write constant:MEAN, lognormal:MEAN:SIGMA or pareto:MEAN:SHAPE")
        found = {"distribution": distribution, "file_size": parse_size(mean), "sizes": None}
        return {**found, "spread": float(spread[0]) if spread else 0.0}
    if isinstance(given, str) and given.startswith("@"):
        listed = _listed(given[1:])
    else:
        listed = [parse_size(size) for size in (given.split("+") if isinstance(given, str) else given)]
    if not listed:
        raise ValueError(f"{given!r}: no sizes")
    if min(listed) < 0:
        raise ValueError(f"{given!r}: a size below 0")
    listed.sort()
    if len(listed) > _MOST_SIZES:  # as many as a record can carry
        listed = [listed[(2 * n + 1) * len(listed) // (2 * _MOST_SIZES)] for n in range(_MOST_SIZES)]
    mean_size = round(sum(listed) / len(listed))
    return {"distribution": "own", "file_size": mean_size, "spread": 0.0, "sizes": tuple(listed)}


def _listed(source: str) -> list[int]:
    from streamcrypt import api
    from streamcrypt.errors import StreamcryptError

    path = Path(source)
    try:
        if "://" in source or path.is_dir():
            entries = api.entries(source)
            return [entry.size for entry in entries if not entry.folder and entry.problem is None]
        lines = path.read_text(encoding="utf-8").splitlines()
    except (StreamcryptError, ImportError) as error:
        raise ValueError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{source}: neither a folder nor a file with a size on each line ({error})"
        ) from error
    return [parse_size(line.strip()) for line in lines if line.strip()]


def write_tables(folder: Path, lengths: list[int], seed: int) -> int:
    """Make ``folder`` with a Parquet file of about each length: eight columns of random floats, uncompressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _make_room(folder, sum(lengths))
    random, written = np.random.default_rng(seed), 0
    for number, length in enumerate(lengths):
        rows = max(1, length // 64)
        table = pa.table({f"x{column}": random.random(rows) for column in range(8)})
        path = folder / f"{number:06d}.parquet"
        pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=1 << 16)
        written += path.stat().st_size
    return written


def put_aside(folder: Path) -> None:
    """Empty the files of a folder and move it out of the way, until what it lies in is removed.

    An ext4 without a journal does not give out an inode that was freed in the last one to six minutes, and
    looks at each of them whenever a file is made nearby: after 10,000 files were removed a new one took 70 to
    150 µs of the kernel's time instead of 10 (benchmarks/README.md, "the budget of a small file").
    """
    if not folder.exists():
        return
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.isfile(path) and not os.path.islink(path):
                os.truncate(path, 0)
    folder.rename(folder.with_name(f"{folder.name}-{time.monotonic_ns()}"))


def spread_out(folder: Path) -> None:
    """Let the folders made in ``folder`` begin anywhere on an ext4, away from files that others removed."""
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(["chattr", "+T", str(folder)], check=False, stderr=subprocess.DEVNULL)  # noqa: S607


def warm(folder: Path, length: int) -> None:
    """Write so many bytes into a file without a name and drop it, so that the host of a virtual machine holds them.

    It takes back what its guest has freed for a few seconds, and a fresh page then costs several times more: who
    writes first after a pause would pay for it.  Written, not claimed: claimed pages may never be touched.
    In pieces of 1 MiB, for which a file system takes the large blocks that the host takes back.
    """
    piece = bytes(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(-(-length // len(piece))):
            file.write(piece)


def _make_room(folder: Path, total: int) -> None:
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < total + (64 << 20):
        raise OSError(f"no room for {total} bytes of test data; choose another --work folder")


def write(folder: Path, lengths: list[int], seed: int) -> int:
    """Make ``folder`` with one file for each length; the bytes written.  OSError when there is no room."""
    total = sum(lengths)
    _make_room(folder, total)
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
