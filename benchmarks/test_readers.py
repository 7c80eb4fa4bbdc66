"""Readers of encrypted datasets against the same readers of the same data in plain.

    python -m pytest benchmarks/test_readers.py -s

Variants are taken in turns in an order that is shuffled each round, in one process, with the data in
the page cache; the result is the ratio of medians, and only ratios are compared.  The targets are those
of the project's issue on readers; STREAMCRYPT_READER_MB sets the size (default 400 MB of columns).
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

import streamcrypt as sc
import streamcrypt.fs
from streamcrypt import arrow, parquet
from streamcrypt.parquet import tables
from streamcrypt.storage import LocalSource

MEGABYTES = int(os.environ.get("STREAMCRYPT_READER_MB", "400"))
ROUNDS = int(os.environ.get("STREAMCRYPT_READER_ROUNDS", "7"))
COLUMNS = 20
TWO = ["c03", "c11"]
KEY = "local:alias/bench"


class Data:
    """One table in plain and encrypted files of each kind."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(1)
        rows = MEGABYTES * 10**6 // (8 * COLUMNS)
        columns = {
            f"c{i:02}": rng.random(rows) if i % 2 else rng.integers(0, 2**40, rows) for i in range(COLUMNS)
        }
        table = pa.table(columns)
        # Row groups of 13 MB a column, as writers make them for files of this size.
        group = max(1, rows // 2)
        for name, compression in (("none", "none"), ("zstd", "zstd")):
            (root / "plain" / name).mkdir(parents=True)
            pq.write_table(
                table, root / "plain" / name / "t.parquet", compression=compression, use_dictionary=False,
                row_group_size=group,
            )  # fmt: skip
        (root / "plain" / "arrow").mkdir()
        with pa.ipc.new_file(root / "plain" / "arrow" / "t.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=group // 4)
        (root / "plain" / "csv").mkdir()
        import pyarrow.csv

        pyarrow.csv.write_csv(table.select(TWO).slice(0, rows // 4), root / "plain" / "csv" / "t.csv")
        sc.encrypt(root / "plain", root / "enc", keys=KEY, fsync=False)

    def plain(self, name: str) -> str:
        return str(self.root / "plain" / name)

    def encrypted(self, name: str) -> str:
        return str(self.root / "enc" / name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Data]:
    root = tmp_path_factory.mktemp("readers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(root / "home"))
        from streamcrypt.kms import open_service

        service = open_service()
        service.create_alias(
            AliasName="alias/bench", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"]
        )
        yield Data(root)


def ratio(name: str, plain: Callable[[], Any], encrypted: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Time of ``encrypted`` over that of ``plain``; see ``ratios``."""
    [found] = ratios(name, plain, {"encrypted": encrypted}, rounds)
    return found


def ratios(
    name: str,
    plain: Callable[[], Any],
    others: dict[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    *,
    needed: tuple[str, ...] = (),
) -> list[float]:
    """Time of each of ``others`` over that of ``plain``, after one round of warming up.

    The ratio of medians by the wall clock; that of the best times and that of processor time are printed
    too, because on a machine that others use the wall clock also tells what the others did.

    ``needed`` are those of ``others`` that no reading can leave out.  The bound that is printed is the
    time that their processor time takes when no core ever waits.
    """
    variants = {"plain": plain, **others}
    walls: dict[str, list[float]] = {variant: [] for variant in variants}
    processor: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(rounds + 1):
        order = list(variants)
        random.shuffle(order)
        for variant in order:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            result = variants[variant]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            del result
            if number:
                walls[variant].append(wall)
                processor[variant].append(cpu)
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    medians = []
    for other in others:
        medians.append(statistics.median(walls[other]) / statistics.median(walls["plain"]))
        best = min(walls[other]) / min(walls["plain"])
        cpu = statistics.median(processor[other]) / statistics.median(processor["plain"])
        print(
            f"\n{name}, {other}: median {medians[-1]:.2f} x, best {best:.2f} x, processor {cpu:.2f} x"
            f" (plain {statistics.median(walls['plain']):.3f} s{', machine busy' if busy else ''})"
        )
    if needed:
        seconds = sum(statistics.median(processor[other]) for other in needed) / (os.cpu_count() or 1)
        print(f"\n{name}: bound {seconds / statistics.median(walls['plain']):.2f} x ({' and '.join(needed)})")
    return medians


def test_parquet_all_columns(data: Data) -> None:
    assert table_ratio(data, "none", None) <= 1 / 0.7


def test_parquet_all_columns_zstd(data: Data) -> None:
    assert table_ratio(data, "zstd", None) <= 1 / 0.9


def test_parquet_two_columns(data: Data) -> None:
    assert table_ratio(data, "none", TWO, 3 * ROUNDS) <= 1.25


def table_ratio(data: Data, kind: str, columns: list[str] | None, rounds: int = ROUNDS) -> float:
    """Of ``read_table``; and the bound by opening the frames, and decoding what is in memory."""
    plain, encrypted = data.plain(f"{kind}/t.parquet"), data.encrypted(f"{kind}/t.parquet")
    memory = pa.BufferReader(Path(plain).read_bytes())
    chunks = list(tables._chunks(pq.ParquetDataset(plain), columns, None))
    fs = sc.fs.CryptFileSystem()

    def frames() -> None:
        with fs.open(encrypted) as file:
            file.hold(chunks)

    wanted = f"{len(columns)} of {COLUMNS}" if columns else "all"
    found, *_ = ratios(
        f"parquet.read_table, {kind}, {wanted} columns",
        lambda: pq.read_table(plain, columns=columns),
        {
            "encrypted": lambda: parquet.read_table(encrypted, columns=columns),
            "frames alone": frames,
            "decoding alone": lambda: pq.read_table(memory, columns=columns, pre_buffer=False),
        },
        rounds,
        needed=("frames alone", "decoding alone"),
    )
    return found


def test_parquet_two_columns_bytes(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    read_at = LocalSource.read_at

    def watched(self: LocalSource, offset: int, buffer: memoryview) -> int:
        nonlocal read
        read += len(buffer)
        return read_at(self, offset, buffer)

    monkeypatch.setattr(LocalSource, "read_at", watched)
    parquet.read_table(data.encrypted("none/t.parquet"), columns=TWO)
    groups = pq.read_metadata(data.plain("none/t.parquet"))
    needed = sum(
        groups.row_group(i).column(j).total_compressed_size
        for i in range(groups.num_row_groups)
        for j in range(COLUMNS)
        if groups.row_group(i).column(j).path_in_schema in TWO
    )
    print(f"\nparquet.read_table, 2 of 20 columns: {read / needed:.2f} x the bytes")
    assert read <= 1.2 * needed


def test_dataset(data: Data) -> None:
    plain, encrypted = data.plain("none"), data.encrypted("none")
    assert (
        ratio(
            "pyarrow.dataset, all columns",
            lambda: ds.dataset(plain).to_table(),
            lambda: parquet.dataset(encrypted).to_table(),
        )
        <= 2
    )


def test_arrow_file(data: Data) -> None:
    plain, encrypted = data.plain("arrow/t.arrow"), data.encrypted("arrow/t.arrow")
    ratio(
        "arrow.read_table against pyarrow reading into memory",
        lambda: pa.ipc.open_file(pa.OSFile(plain)).read_all(),
        lambda: arrow.read_table(encrypted),
    )
    ratio(
        "arrow.open_file, batch by batch",
        lambda: batches(pa.ipc.open_file(pa.OSFile(plain))),
        lambda: batches(arrow.open_file(encrypted)),
    )


def batches(reader: Any) -> int:
    return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))


def test_pandas_by_url(data: Data) -> None:
    pandas = pytest.importorskip("pandas")
    plain, encrypted = data.plain("csv/t.csv"), data.encrypted("csv/t.csv")
    assert (
        ratio(
            "pandas.read_csv by URL",
            lambda: pandas.read_csv(f"file://{plain}"),
            lambda: pandas.read_csv(f"crypt::file://{encrypted}"),
            3,
        )
        <= 1.5
    )
    plain, encrypted = data.plain("zstd/t.parquet"), data.encrypted("zstd/t.parquet")
    assert (
        ratio(
            "pandas.read_parquet by URL, zstd",
            lambda: pandas.read_parquet(f"file://{plain}"),
            lambda: pandas.read_parquet(f"crypt::file://{encrypted}"),
        )
        <= 1.5
    )


class BareFile:
    """What the least file in Python does for DuckDB: one system call a read, each thread at its own place."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._place = threading.local()
        self.size = os.fstat(self._descriptor).st_size
        self.closed = False

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place.offset = offset
        return offset

    def tell(self) -> int:
        return int(self._place.offset)

    def read(self, size: int = -1) -> bytes:
        found = os.pread(self._descriptor, size, self._place.offset)
        self._place.offset += len(found)
        return found

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
            self.closed = True


class BareFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec is not annotated
    """Plain files through fsspec without anything else: how much of a scan is DuckDB's way with Python."""

    protocol = ("bare",)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> BareFile:
        return BareFile(path)

    def unstrip_protocol(self, name: str) -> str:
        return f"bare://{self._strip_protocol(name)}"


def test_duckdb_scan(data: Data) -> None:
    """A dataset within 1.5 x of DuckDB's own reader; so a registered filesystem, or as a bare file in Python."""
    duckdb = pytest.importorskip("duckdb")
    import fsspec

    connection = duckdb.connect()
    connection.register_filesystem(fsspec.filesystem("crypt"))
    connection.register_filesystem(BareFileSystem())
    found = {}
    for kind in ("zstd", "none"):
        columns = ", ".join(f"sum(c{i:02})" for i in range(COLUMNS))
        query = f"SELECT {columns} FROM read_parquet('{{}}')"
        plain = query.format(data.plain(f"{kind}/t.parquet"))
        bare = query.format("bare://" + data.plain(f"{kind}/t.parquet"))
        encrypted = query.format("crypt://" + data.encrypted(f"{kind}/t.parquet"))
        connection.register("encrypted", parquet.dataset(data.encrypted(f"{kind}/t.parquet")))
        of_dataset = f"SELECT {columns} FROM encrypted"
        found[f"{kind}, dataset"], found[kind], found[f"{kind}, bare"] = ratios(
            f"DuckDB scan of 20 columns, {kind}",
            lambda plain=plain: connection.sql(plain).fetchall(),
            {
                "encrypted, a dataset": lambda of_dataset=of_dataset: connection.sql(of_dataset).fetchall(),
                "encrypted, a registered filesystem": lambda encrypted=encrypted: connection.sql(
                    encrypted
                ).fetchall(),
                "a bare file in Python": lambda bare=bare: connection.sql(bare).fetchall(),
            },
        )
    assert found["zstd, dataset"] <= 1.5
    assert found["none, dataset"] <= 1.5
    assert found["zstd"] <= 1.5
    assert found["none"] <= max(1.5, 1.1 * found["none, bare"])


def test_hugging_face_streaming(data: Data) -> None:
    datasets = pytest.importorskip("datasets")
    pyarrow_format = {"split": "train", "streaming": True}

    def rows(url: str) -> int:
        stream = datasets.load_dataset("parquet", data_files=url, **pyarrow_format).with_format("arrow")
        return sum(table.num_rows for table in stream.iter(100_000))

    plain, encrypted = data.plain("zstd/t.parquet"), data.encrypted("zstd/t.parquet")
    assert (
        ratio(
            "Hugging Face streaming, zstd",
            lambda: rows(plain),
            lambda: rows(f"crypt://{encrypted}"),
            3,
        )
        <= 1.5
    )
