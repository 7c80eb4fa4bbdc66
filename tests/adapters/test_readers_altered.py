"""One bit flipped in a file: every library that reads it fails; none gives a wrong value.

What raises is IntegrityError itself wherever the library passes exceptions on; ``WRAPPED`` are those
that raise their own with our text in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from families.datasets import KEY, flip, make_key, make_table

import streamcrypt as sc
from streamcrypt import parquet, tensors


def duckdb_sum(path: str) -> Any:
    import duckdb

    connection = duckdb.connect()
    connection.register_filesystem(fsspec.filesystem("crypt"))
    return connection.sql(
        f"SELECT sum(id), sum(value), max(name) FROM read_parquet('crypt://{path}')"
    ).fetchall()


def duckdb_sum_of_dataset(path: str) -> Any:
    import duckdb

    connection = duckdb.connect()
    connection.register("t", parquet.dataset(path))
    return connection.sql("SELECT sum(id), sum(value), max(name) FROM t").fetchall()


def polars_read(path: str) -> Any:
    import polars

    with sc.open(path) as file:
        return polars.read_parquet(file)


def polars_scan(path: str) -> Any:
    import polars

    return polars.scan_pyarrow_dataset(parquet.dataset(path)).collect()


def pandas_read(path: str) -> Any:
    import pandas

    return pandas.read_parquet(f"crypt::file://{path}")


def dask_read(path: str) -> Any:
    import dask.dataframe

    return dask.dataframe.read_parquet(f"crypt::file://{path}").compute()


def hugging_face(path: str) -> Any:
    import datasets

    return list(datasets.load_dataset("parquet", data_files=f"crypt://{path}", split="train", streaming=True))


def hugging_face_copy(path: str) -> Any:
    import datasets

    return datasets.load_dataset(
        "parquet", data_files=f"crypt://{path}", split="train", cache_dir=f"{path}.cache",
        download_mode="force_redownload",
    )  # fmt: skip


READERS: dict[str, tuple[Callable[[str], Any], str | None]] = {
    "parquet.read_table": (parquet.read_table, None),
    "parquet.read_table, columns": (
        lambda path: parquet.read_table(path, columns=["id", "value", "name"]),
        None,
    ),
    "pyarrow.parquet": (lambda path: pq.read_table(path, filesystem=sc.filesystem()), None),
    "pyarrow.dataset": (lambda path: ds.dataset(path, filesystem=sc.filesystem()).to_table(), None),
    "pyarrow.dataset, batches": (lambda path: list(parquet.dataset(path).to_batches(batch_size=100)), None),
    "pandas": (pandas_read, "pandas"),
    "dask": (dask_read, "dask.dataframe"),
    "duckdb": (duckdb_sum, "duckdb"),
    "duckdb, dataset": (duckdb_sum_of_dataset, "duckdb"),
    "polars, file": (polars_read, "polars"),
    "polars, scan": (polars_scan, "polars"),
    "hugging face": (hugging_face, "datasets"),
    "hugging face, copied": (hugging_face_copy, "datasets"),
}
WRAPPED = {"duckdb", "duckdb, dataset", "polars, file", "polars, scan"}


@pytest.fixture
def file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    make_key()
    path = tmp_path / "t.parquet"
    table = make_table(5000).select(["id", "value", "name"])
    parquet.write_table(table, path, keys=KEY, frame_size=4096, row_group_size=1000, compression="none")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_fails(file: Path, name: str) -> None:
    read, module = READERS[name]
    if module is not None:
        pytest.importorskip(module, reason=f"{module} IS MISSING: it was not tested on altered files")
    read(str(file))
    # In the middle of a column that all of them read; not in the header, the footer or the last frame.
    flip(file, file.stat().st_size // 3)
    # BaseException: Polars panics, as pyo3 calls it, when a file object raises.
    with pytest.raises(BaseException) as caught:
        read(str(file))
    text = str(caught.value if name in WRAPPED else integrity_error(caught.value))
    assert "authenticate" in text
    assert f"{file}: " in text  # of a thousand files, which


def integrity_error(error: BaseException) -> sc.IntegrityError:
    """The IntegrityError that led to this one, or is this one."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, sc.IntegrityError):
        found = found.__cause__ or found.__context__
    assert found is not None, repr(error)
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_in_what_hugging_face_saved(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip(
        "datasets", reason="datasets IS MISSING: altered folders of it were not read"
    )
    make_key()
    url = f"crypt://{tmp_path}/saved"
    table = make_table(500).select(["id", "value", "name"])
    datasets.Dataset(table).save_to_disk(url, storage_options={"keys": KEY})
    assert datasets.load_from_disk(url).num_rows == 500
    [file] = (tmp_path / "saved").glob("*.arrow")
    flip(file, file.stat().st_size // 2)
    with pytest.raises(Exception) as caught:
        datasets.load_from_disk(url)
    integrity_error(caught.value)


def test_what_is_wrong_with_a_file_is_told_with_its_name(home: Path, tmp_path: Path) -> None:
    import numpy as np

    make_key()
    array, empty, plain = tmp_path / "a.npy", tmp_path / "empty", tmp_path / "plain.parquet"
    tensors.save_npy(array, np.zeros(5000), keys=KEY, context={"Of": "this"}, frame_size=4096)
    modular = tmp_path / "modular.parquet"
    parquet.write_table(make_table(50), modular, keys=KEY, column_keys={})
    empty.write_bytes(b"")
    pq.write_table(make_table(5), plain)
    for error, path, read in (
        (sc.ContextMismatchError, array, lambda: tensors.load_npy(array, context={"Of": "that"})),
        (sc.ContextMismatchError, modular, lambda: parquet.read_table(modular, context={"Of": "that"})),
        (sc.FormatError, empty, lambda: sc.open(empty)),
        (sc.FormatError, plain, lambda: sc.open(plain)),
        (sc.FormatError, plain, lambda: sc.inspect(plain)),
        (sc.FormatError, plain, lambda: fsspec.open(f"crypt::file://{plain}").open()),
        (sc.IntegrityError, array, lambda: sc.open(array, verify_signature=True)),
        (sc.LimitExceededError, array, lambda: sc.open(array, max_encrypted_data_keys=1)),
    ):
        if error is sc.LimitExceededError:
            tensors.save_npy(array, np.zeros(5000), keys=[KEY, KEY], frame_size=4096)
        with pytest.raises(error) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: "), caught.value
        assert str(caught.value).count(str(path)) == 1
    flip(array, array.stat().st_size // 2)
    with sc.open(array) as file:
        for _ in range(2):
            with pytest.raises(sc.IntegrityError) as caught:
                file.readinto(bytearray(file.size))
            assert str(caught.value).count(f"{array}: ") == 1


def collect(source: Iterable[str], got: list[str]) -> None:
    for line in source:
        got.append(line)


def test_csv_lines_stop_before_the_altered_frame(home: Path, tmp_path: Path) -> None:
    """A reader of lines has had only authenticated ones when it fails."""
    make_key()
    lines = [f"{i},{i * i}\n" for i in range(20_000)]
    with fsspec.open(f"crypt::file://{tmp_path}/a.csv", "wt", keys=KEY, frame_size=4096) as out:
        out.writelines(lines)
    flip(tmp_path / "a.csv", (tmp_path / "a.csv").stat().st_size // 2)
    got: list[str] = []
    with fsspec.open(f"crypt::file://{tmp_path}/a.csv", "rt") as source, pytest.raises(sc.IntegrityError):
        collect(source, got)
    assert got == lines[: len(got)]
    assert len(got) > 5000


def test_stream_of_batches_from_many_threads(file: Path) -> None:
    table = parquet.dataset(file).scanner(use_threads=True, batch_size=64).to_table()
    assert table.equals(make_table(5000).select(["id", "value", "name"]))
    assert pa.Table.from_batches(parquet.dataset(file).to_batches()).equals(table)
