"""Encrypted Parquet, as messages and as modular files: the same tables as plain, or an error, never a wrong value."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from families.datasets import KEY, flip, kms_calls, make_key, make_table

import streamcrypt as sc
from streamcrypt import parquet
from streamcrypt.storage import LocalSource

F = 4096
PII = "local:alias/pii"

TABLES = {
    "types": make_table(1000),
    "no rows": make_table(1000).slice(0, 0),
    "one row": make_table(1000).slice(3, 1),
    "larger than many frames": make_table(40_000),
    "struct and map": pa.table(
        {
            "s": [{"a": i, "b": {"c": str(i)}} for i in range(500)],
            "m": pa.array([[("k", i)] for i in range(500)], pa.map_(pa.string(), pa.int64())),
        }
    ),
    "dictionary and decimal": pa.table(
        {
            "d": pa.array(["x", "y", None] * 300).dictionary_encode(),
            "n": pa.array([None, 1, 2] * 300, pa.decimal128(20, 3)),
            "b": pa.array([bytes(i % 7) for i in range(900)]),
        }
    ),
}


@pytest.fixture
def keys(home: Path) -> str:
    make_key()
    make_key("alias/pii")
    return KEY


@pytest.mark.parametrize("form", ["message", "modular", "modular, a key for columns"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_round_trip(keys: str, tmp_path: Path, table: pa.Table, compression: str, form: str) -> None:
    path = tmp_path / "t.parquet"
    column_keys = {"message": None, "modular": {}}.get(form, {PII: table.column_names[0]})
    parquet.write_table(
        table,
        path,
        keys=keys,
        column_keys=column_keys,
        compression=compression,
        row_group_size=300,
        frame_size=F,
    )
    first = table.column_names[-1]
    assert parquet.read_table(path).equals(table)
    assert parquet.read_table(path, columns=[first]).equals(table.select([first]))
    assert parquet.read_table(str(path), keys=[KEY, PII], use_threads=False).equals(table)
    assert parquet.dataset(path).to_table().equals(table)


@pytest.mark.parametrize("frame_size", [512, F, F + 1, 2**20])
@pytest.mark.parametrize("sign", [False, True])
def test_frame_sizes_and_signed_messages(keys: str, tmp_path: Path, frame_size: int, sign: bool) -> None:
    table = make_table(20_000)
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, keys=keys, frame_size=frame_size, sign=sign, row_group_size=5000)
    assert parquet.read_table(path).equals(table)
    assert parquet.read_table(path, filters=[("id", ">=", 19_990)]).num_rows == 10
    assert pq.read_table(str(path), filesystem=sc.filesystem()).equals(table)


@pytest.mark.parametrize(
    "column_keys", [None, {}, {PII: ["name", "tags"]}], ids=["message", "modular", "columns"]
)
def test_trees(keys: str, tmp_path: Path, column_keys: Any) -> None:
    table = make_table(5000)
    root = tmp_path / "tree"
    parquet.write_dataset(
        table, root, keys=keys, column_keys=column_keys, partitioning=["flag"], partitioning_flavor="hive",
        max_rows_per_file=700, max_rows_per_group=350,
    )  # fmt: skip
    dataset = parquet.dataset(root)
    assert len(dataset.files) >= 8
    assert (
        dataset.to_table()
        .sort_by("id")
        .select(table.column_names[:3])
        .equals(table.select(table.column_names[:3]))
    )
    assert dataset.count_rows(filter=pyarrow.dataset.field("id") < 100) == 100
    assert parquet.read_table(root, filters=[("id", "<", 100)]).num_rows == 100
    assert parquet.dataset(dataset.files, partitioning=None).count_rows() == 5000


def test_a_dataset_of_several_files(keys: str, tmp_path: Path) -> None:
    table = make_table(30)
    paths = [tmp_path / f"{n}.parquet" for n in range(3)]
    for n, path in enumerate(paths):
        parquet.write_table(table.slice(10 * n, 10), path, keys=keys)
    assert parquet.dataset(paths).to_table().equals(table)
    assert parquet.dataset(iter(paths)).to_table().equals(table)  # the first is not lost
    with pytest.raises(ValueError, match="needs a source"):
        parquet.dataset([])
    with open(paths[0], "rb") as file:
        for wrong in (paths, None, file):
            with pytest.raises(TypeError, match="a path or URL is needed, not"):
                parquet.read_table(wrong)  # type: ignore[arg-type]


def test_an_encrypted_tree_shows_only_its_data_files(keys: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    table = make_table(3000)
    pq.write_to_dataset(table, plain, partition_cols=["flag"])
    sc.encrypt(plain, tmp_path / "enc", keys=keys, frame_size=F)
    for root in (str(tmp_path / "enc"), f"crypt::file://{tmp_path}/enc"):
        dataset = parquet.dataset(root)
        assert len(dataset.files) == 2
        assert dataset.to_table().sort_by("id").column("id").equals(table.column("id"))
    below = sc.filesystem(tmp_path / "enc")
    assert {info.path for info in below.get_file_info(pa.fs.FileSelector("", recursive=False))} == {
        "flag=false", "flag=true"
    }  # fmt: skip
    one, two = dataset.files
    Path(one).write_bytes(Path(two).read_bytes())
    with pytest.raises(sc.IntegrityError, match="swapped"):
        parquet.dataset(tmp_path / "enc", cache_max_age=250).to_table()


def test_column_and_row_group_pruning_read_only_the_frames_they_need(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = 20
    rows = 40_000
    rng = random.Random(1)
    table = pa.table({f"c{i}": [rng.random() for _ in range(rows)] for i in range(columns)})
    options = {"compression": "none", "use_dictionary": False, "row_group_size": rows // 4}
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, keys=keys, frame_size=F, **options)
    size = path.stat().st_size
    count = bytes_read(monkeypatch)
    assert parquet.read_table(path, columns=["c3", "c11"]).equals(table.select(["c3", "c11"]))
    assert count() < 1.2 * 2 / columns * size
    low = parquet.read_table(path, columns=["c3"], filters=[("c3", "<", -1)])
    assert low.num_rows == 0
    assert count() < 0.02 * size  # the footer's statistics suffice
    parquet.dataset(path).head(5, columns=["c3"], batch_size=100, fragment_readahead=0, batch_readahead=0)
    assert count() < 0.2 * size


def test_duckdb_asks_a_dataset_only_for_the_frames_it_needs(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    duckdb = pytest.importorskip(
        "duckdb", reason="duckdb IS MISSING: what it reads of a dataset was not tested"
    )
    rows, groups = 40_000, 10
    table = pa.table({"id": range(rows), **{f"c{i}": [j % 1009 for j in range(rows)] for i in range(9)}})
    path = tmp_path / "t.parquet"
    options = {"compression": "none", "use_dictionary": False, "row_group_size": rows // groups}
    parquet.write_table(table, path, keys=keys, frame_size=F, **options)
    size = path.stat().st_size
    connection = duckdb.connect()
    connection.register("t", parquet.dataset(path))
    whole = "SELECT sum(id), " + ", ".join(f"sum(c{i})" for i in range(9)) + " FROM t"
    sums = tuple(sum(table[name].to_pylist()) for name in table.column_names)
    assert connection.sql(whole).fetchall() == [sums]
    count = bytes_read(monkeypatch)
    assert connection.sql("SELECT sum(c3) FROM t").fetchall() == [(sums[4],)]
    assert count() < 1.5 * size / 10
    found = connection.sql("SELECT count(c3) FROM t WHERE id BETWEEN 12000 AND 12099").fetchall()
    assert found == [(100,)]
    assert count() < 1.5 * 2 * size / 10 / groups + 20 * F


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that says how many bytes were read from files since it was last called."""
    lock = threading.Lock()
    total = 0
    read_at = LocalSource.read_at

    def watched(self: LocalSource, offset: int, buffer: memoryview) -> int:
        nonlocal total
        with lock:
            total += len(buffer)
        return read_at(self, offset, buffer)

    monkeypatch.setattr(LocalSource, "read_at", watched)

    def since() -> int:
        nonlocal total
        found, total = total, 0
        return found

    return since


@pytest.mark.parametrize(
    "column_keys", [None, {}, {PII: ["name", "value"]}], ids=["message", "modular", "columns"]
)
def test_a_flipped_bit_is_an_integrity_error(keys: str, tmp_path: Path, column_keys: Any) -> None:
    table = make_table(3000)
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, keys=keys, column_keys=column_keys, frame_size=F, row_group_size=1000)
    whole = path.read_bytes()
    places = [*random.Random(3).sample(range(len(whole)), 60), 4, 7, *range(len(whole) - 8, len(whole))]
    for place in places:
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises((sc.IntegrityError, sc.LimitExceededError)):
            parquet.read_table(path)
        with pytest.raises((sc.IntegrityError, sc.LimitExceededError, OSError)):
            # pyarrow's own words where its scanner reads a modular file
            parquet.dataset(path).to_table()


def test_large_repeated_threaded_reads(keys: str, tmp_path: Path) -> None:
    """More than 32,768 rows twice over, from several threads: pyarrow's own encryption once crashed here."""
    table = make_table(70_000)
    for name, column_keys in (("message", None), ("modular", {PII: ["name"]})):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(
            table, path, keys=keys, column_keys=column_keys, row_group_size=70_000, frame_size=F
        )
        dataset = parquet.dataset(path)
        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(dataset.to_table) for _ in range(6)]
            tasks += [pool.submit(parquet.read_table, path) for _ in range(6)]
            assert all(task.result().equals(table) for task in tasks)


def count_rows(dataset: Any, results: Any) -> None:
    results.put(dataset.count_rows() if dataset.schema else 0)
    results.put(dataset.to_table().num_rows)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_dataset_travels_without_keys(keys: str, tmp_path: Path, method: str) -> None:
    parquet.write_dataset(
        make_table(1000), tmp_path / "t", keys=keys, max_rows_per_file=300, max_rows_per_group=300
    )
    dataset = parquet.dataset(tmp_path / "t")
    assert len(pickle.dumps(dataset)) < 20_000
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=count_rows, args=(dataset, results))
    worker.start()
    try:
        assert [results.get(timeout=240) for _ in range(2)] == [1000, 1000]
    finally:
        worker.join(30)


def test_one_decrypt_for_a_tree(keys: str, home: Path, tmp_path: Path) -> None:
    pq.write_to_dataset(make_table(1000), tmp_path / "plain", partition_cols=["day"], max_partitions=400)
    sc.encrypt(tmp_path / "plain", tmp_path / "enc", keys=keys)
    assert parquet.dataset(tmp_path / "enc", cache_max_age=251).to_table().num_rows == 1000
    assert kms_calls(home)["Decrypt"] == 1


# -- modular files


def test_a_column_key_is_needed_for_its_columns_only(keys: str, tmp_path: Path) -> None:
    table = make_table(2000)
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, keys=keys, column_keys={PII: ["name", "tags"]})
    assert parquet.read_table(path, keys=KEY, columns=["id", "value"]).equals(table.select(["id", "value"]))
    for columns in (["name"], ["tags"]):
        with pytest.raises(sc.KeyAccessError):
            parquet.read_table(path, keys=KEY, columns=columns)
    with pytest.raises(sc.KeyAccessError):
        parquet.read_table(path, keys=PII)


def test_nothing_of_a_modular_file_is_in_the_clear(keys: str, tmp_path: Path) -> None:
    """pyarrow leaves columns without a key of their own in the clear; here they get the footer's."""
    secret = "a value to be looked for " * 3
    table = pa.table({"a": [secret] * 100, "b": [secret] * 100, "s": [{"c": secret}] * 100})
    for column_keys in ({}, {PII: ["a"]}, {PII: ["s"]}):
        path = tmp_path / "t.parquet"
        parquet.write_table(
            table, path, keys=keys, column_keys=column_keys, compression="none", use_dictionary=False
        )
        data = path.read_bytes()
        assert data[:4] == data[-4:] == b"PARE"
        assert secret.encode() not in data
        parquet.write_dataset(table, tmp_path / "tree", keys=keys, column_keys=column_keys,
                              existing_data_behavior="overwrite_or_ignore")  # fmt: skip
        [file] = (tmp_path / "tree").iterdir()
        assert secret.encode() not in file.read_bytes()


def test_plaintext_footer(keys: str, tmp_path: Path) -> None:
    table = make_table(500)
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, keys=keys, column_keys={PII: ["name"]}, plaintext_footer=True)
    assert pq.read_schema(path).names == table.column_names  # anyone may read the schema
    with pytest.raises(sc.FormatError, match="plaintext_footer=True"):
        parquet.read_table(path)
    assert parquet.read_table(path, plaintext_footer=True).equals(table)
    assert parquet.dataset(path, plaintext_footer=True).to_table().equals(table)
    flip(path, -60)  # in the footer or its signature
    with pytest.raises(sc.IntegrityError):
        parquet.read_table(path, plaintext_footer=True)


def test_a_plain_file_is_refused(keys: str, tmp_path: Path) -> None:
    """Whoever can replace a file must not be able to replace it by one that is not encrypted."""
    (tmp_path / "d").mkdir()
    pq.write_table(make_table(10), tmp_path / "d" / "t.parquet")
    for read in (
        lambda: parquet.read_table(tmp_path / "d" / "t.parquet"),
        lambda: parquet.read_table(tmp_path / "d"),
        lambda: parquet.read_table(tmp_path / "d", plaintext_footer=True),
        lambda: parquet.read_table(tmp_path / "d" / "t.parquet", plaintext_footer=True),
        lambda: parquet.dataset(tmp_path / "d").to_table(),
    ):
        with pytest.raises(sc.FormatError):
            read()
    (tmp_path / "d" / "t.parquet").write_bytes(b"hello world")
    with pytest.raises(sc.FormatError):
        parquet.read_table(tmp_path / "d" / "t.parquet")


def test_a_column_that_is_not_there_is_refused(keys: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column 'nme'"):
        parquet.write_table(make_table(10), tmp_path / "t.parquet", keys=keys, column_keys={PII: ["nme"]})
    assert not (tmp_path / "t.parquet").exists()


def test_context_of_a_modular_file(keys: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = make_table(10)
    parquet.write_table(table, path, keys=keys, column_keys={}, context={"Project": "Churn"})
    assert parquet.read_table(path, context={"Project": "Churn"}).equals(table)
    with pytest.raises(sc.ContextMismatchError):
        parquet.read_table(path, context={"Project": "Other"})


def test_pyarrow_reads_and_writes_with_our_client(keys: str, tmp_path: Path) -> None:
    """The KmsClient alone, in pyarrow's own configuration, 128-bit keys and single wrapping included."""
    import pyarrow.parquet.encryption as pe

    table = make_table(1000)
    names = {"footer": KEY, "columns": [PII, KEY]}
    connection = pe.KmsConnectionConfig()
    for bits, double in ((128, True), (192, False), (256, True)):
        config = pe.EncryptionConfiguration(
            "footer", column_keys={"columns": ["id"]}, data_key_length_bits=bits, double_wrapping=double
        )
        properties = parquet.crypto_factory(names=names).file_encryption_properties(connection, config)
        pq.write_table(table, tmp_path / "t.parquet", encryption_properties=properties)
        for reading in (None, [KEY], [PII, KEY]):
            decryption = parquet.decryption_properties(reading)
            assert pq.read_table(tmp_path / "t.parquet", decryption_properties=decryption).equals(table)
            assert parquet.read_table(tmp_path / "t.parquet", keys=reading).equals(table)


def test_pages_that_nothing_authenticates_are_neither_read_nor_written(keys: str, tmp_path: Path) -> None:
    """AES_GCM_CTR_V1 seals pages without a tag: with it, pyarrow itself gives another value for a flipped bit."""
    import pyarrow.parquet.encryption as pe

    table = pa.table({"id": range(1000)})
    config = pe.EncryptionConfiguration("f", uniform_encryption=True, encryption_algorithm="AES_GCM_CTR_V1")
    connection = pe.KmsConnectionConfig()
    with pytest.raises(ValueError, match="AES_GCM_V1"):
        parquet.crypto_factory(names={"f": KEY}).file_encryption_properties(connection, config)

    theirs = pe.CryptoFactory(lambda _: parquet.key_client(names={"f": KEY}))
    path = tmp_path / "d" / "t.parquet"
    path.parent.mkdir()
    pq.write_table(
        table, path, encryption_properties=theirs.file_encryption_properties(connection, config),
        compression="none", use_dictionary=False,
    )  # fmt: skip
    flip(path, 4000)
    wrong = pq.read_table(path, decryption_properties=parquet.decryption_properties())
    assert wrong.shape == table.shape
    assert not wrong.equals(table)
    for read in (
        lambda: parquet.read_table(path),
        lambda: parquet.read_table(path, columns=["id"]),
        lambda: parquet.read_table(path.parent),
        lambda: parquet.dataset(path).to_table(),
        lambda: parquet.polars_decryption(path),
    ):
        with pytest.raises(sc.FormatError, match="nothing authenticates its pages"):
            read()


def test_raw_keys_and_no_path_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    reference = f"raw-aes:ns/name@{tmp_path}/key"
    table = make_table(100)
    parquet.write_table(table, tmp_path / "t.parquet", keys=reference, column_keys={})
    assert parquet.read_table(tmp_path / "t.parquet", keys=reference).equals(table)
    assert str(tmp_path).encode() not in (tmp_path / "t.parquet").read_bytes()
    with pytest.raises(sc.KeyAccessError):
        parquet.read_table(tmp_path / "t.parquet")


def test_nothing_appears_when_writing_fails(keys: str, tmp_path: Path) -> None:
    class BrokenTable:
        schema = make_table(1).schema

    for column_keys in (None, {}):
        with pytest.raises((TypeError, AttributeError)):
            parquet.write_table(BrokenTable(), tmp_path / "t.parquet", keys=keys, column_keys=column_keys)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
