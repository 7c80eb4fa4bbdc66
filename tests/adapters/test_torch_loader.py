"""torch's loaders over encrypted data: every row once, resumed epochs, workers of every kind, damage."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pickle
import sqlite3
import subprocess
import sys
from multiprocessing import forkserver

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families.datasets import KEY, flip, make_key, make_table

import streamcrypt as sc
from streamcrypt import parquet, tensors
from streamcrypt.kms import default_home

torch = pytest.importorskip("torch", reason="TORCH IS MISSING: its loaders were not tested")

from torch.utils.data import DataLoader  # noqa: E402

from streamcrypt.torch import ParquetDataset  # noqa: E402

# torch's iterator complains from its destructor when a worker of it ended with an error, as some here do.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROWS = 10_000
CONTEXT = {"Project": "CustomerChurn"}
METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for all tests here: the fork server keeps the environment of the moment when it was started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(tmp_path_factory.mktemp("home")))
        gc.collect()
        forkserver._forkserver._stop()
        make_key()
        yield
        gc.collect()
        forkserver._forkserver._stop()


@pytest.fixture
def data(tmp_path, home):
    """A folder of four files with 3 to 5 row groups, plain and encrypted."""
    table = make_table(ROWS).select(["id", "day", "value", "flag", "name", "when"])
    (tmp_path / "plain").mkdir()
    bounds = [0, 2_500, 5_100, 7_400, ROWS]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = table.slice(start, stop - start)
        pq.write_table(
            part, tmp_path / "plain" / f"part-{number}.parquet", row_group_size=(stop - start) // 4 + number
        )
    sc.encrypt(
        tmp_path / "plain", tmp_path / "enc", keys=KEY, context=CONTEXT, frame_size="4KiB", fsync=False
    )
    return tmp_path


def ids(batches):
    return [int(i) for batch in batches for i in batch["id"]]


def kms_calls(operation="Decrypt"):
    (database,) = (default_home() / "kms").glob("kms.sqlite")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT count(*) FROM audit WHERE operation = ?", (operation,)).fetchone()[
            0
        ]


# ------------------------------------------------------------------------------ the same rows as plain


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 77, 2_500, 100_000])
def test_batches_are_those_of_the_plain_files(data, shuffle, batch_size):
    if batch_size == 1:
        options = {"columns": ["id"]}
    else:
        options = {}
    options |= {"batch_size": batch_size, "shuffle": shuffle, "shuffle_buffer": 1_000, "seed": 3}
    encrypted = list(ParquetDataset(data / "enc", context=CONTEXT, **options))
    plain = list(ParquetDataset(data / "plain", filesystem=fsspec.filesystem("file"), **options))
    assert len(encrypted) == len(plain) == -(-ROWS // batch_size)
    for ours, theirs in zip(encrypted, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name, column in ours.items():
            if isinstance(column, list):
                assert column == theirs[name]
            else:
                assert column.dtype == theirs[name].dtype
                assert torch.equal(column.nan_to_num(-1), theirs[name].nan_to_num(-1))
    assert sorted(ids(encrypted)) == list(range(ROWS))
    assert (ids(encrypted) == list(range(ROWS))) is not shuffle


def test_shuffling_depends_on_seed_and_epoch_alone(data):
    def order(**options):
        dataset = ParquetDataset(data / "enc", columns=["id"], shuffle=True, shuffle_buffer=3_000, **options)
        return dataset, ids(dataset)

    dataset, first = order(seed=1)
    assert order(seed=1)[1] == first
    assert order(seed=2)[1] != first
    dataset.set_epoch(1)
    second = ids(dataset)
    assert second != first
    assert sorted(second) == sorted(first) == list(range(ROWS))
    dataset.set_epoch(0)
    assert ids(dataset) == first
    # Rows move far, not only within their row group.
    assert np.mean(np.abs(np.diff(first)) > 700) > 0.5


def test_what_columns_become(tmp_path, home):
    table = pa.table(
        {
            "i": pa.array([1, 2, 3], pa.int16()),
            "u": pa.array([1, 2, 2**32 - 1], pa.uint32()),
            "h": pa.array(np.array([1, 2, 3], np.float16)),
            "f": pa.array([1.5, None, 3.0]),
            "b": pa.array([True, False, True]),
            "s": pa.array(["x", None, "z"]),
            "c": pa.array(["x", "y", "x"]).dictionary_encode(),
            "t": pa.array([1, 2, 3], pa.timestamp("us")),
            "d": pa.array([1, 2, 3], pa.date32()),
            "v": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype="f4")), 2),
            "l": pa.array([[1], [], [2, 3]]),
            "n": pa.array([1, None, 3], pa.int64()),
        }
    )
    with sc.open(tmp_path / "a.parquet", "wb", keys=KEY) as file:
        pq.write_table(table, file)
    with pytest.raises(ValueError, match="column 'n' of type int64 has nulls"):
        list(ParquetDataset(tmp_path / "a.parquet"))
    (batch,) = ParquetDataset(tmp_path / "a.parquet", fill_nulls={"n": -1})
    assert {name: column.dtype for name, column in batch.items() if isinstance(column, torch.Tensor)} == {
        "i": torch.int16, "u": torch.uint32, "h": torch.float16, "f": torch.float64, "b": torch.bool,
        "t": torch.int64, "d": torch.int32, "v": torch.float32, "n": torch.int64,
    }  # fmt: skip
    assert batch["n"].tolist() == [1, -1, 3]
    assert batch["v"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch["s"] == ["x", None, "z"]
    assert batch["c"] == ["x", "y", "x"]
    assert batch["l"] == [[1], [], [2, 3]]
    assert bool(batch["f"][1].isnan())

    (arrays,) = ParquetDataset(tmp_path / "a.parquet", columns=["i", "t"], output="numpy")
    assert arrays["i"].dtype == np.int16
    (whole,) = ParquetDataset(tmp_path / "a.parquet", output="arrow")
    assert whole.equals(pq.read_table(sc.open(tmp_path / "a.parquet")))
    assert list(
        ParquetDataset(tmp_path / "a.parquet", columns=["i"], transform=lambda b: int(b["i"].sum()))
    ) == [6]
    rows = list(ParquetDataset(tmp_path / "a.parquet", columns=["i", "s"], batch_size=None))
    assert [(int(row["i"]), row["s"]) for row in rows] == [(1, "x"), (2, None), (3, "z")]


def test_columns_are_what_pyarrow_makes_of_them(tmp_path, home):
    """Of every type of number, with nulls, in batches that lie across row groups and within bytes of bits."""
    rng = np.random.default_rng(5)
    nulls = rng.random(101) < 0.3
    numbers = rng.integers(0, 100, 101)
    columns = {
        str(kind): pa.array(numbers.astype(kind.to_pandas_dtype()), kind, mask=nulls)
        for kind in (
            pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
            pa.float16(), pa.float32(), pa.float64(),
        )
    }  # fmt: skip
    columns["bool"] = pa.array(numbers > 50, mask=nulls)
    for kind in (pa.timestamp("ns", "UTC"), pa.duration("ms"), pa.time64("us")):
        columns[str(kind)] = pa.array(numbers, pa.int64(), mask=nulls).cast(kind)
    for kind in (pa.date32(), pa.time32("s")):
        columns[str(kind)] = pa.array(numbers.astype(np.int32), pa.int32(), mask=nulls).cast(kind)
    table = pa.table(columns)
    with sc.open(tmp_path / "a.parquet", "wb", keys=KEY) as file:
        pq.write_table(table, file, row_group_size=13)
    fill = {name: 1 for name, column in columns.items() if not pa.types.is_floating(column.type)}
    fill["bool"] = True
    for shuffle in (False, True):
        dataset = ParquetDataset(
            tmp_path / "a.parquet", batch_size=5, shuffle=shuffle, output="numpy", fill_nulls=fill
        )
        read = list(dataset)
        tables = list(ParquetDataset(tmp_path / "a.parquet", batch_size=5, shuffle=shuffle, output="arrow"))
        assert len(read) == len(tables) == 21
        for batch, part in zip(read, tables, strict=True):
            for name, column in zip(part.column_names, part.columns, strict=True):
                kind = column.type
                if pa.types.is_temporal(kind):
                    column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
                expected = (column.fill_null(fill[name]) if name in fill else column).to_numpy()
                assert batch[name].dtype == expected.dtype
                assert batch[name].flags.writeable
                np.testing.assert_array_equal(batch[name], expected, err_msg=name)


@pytest.mark.parametrize("value", [1.5, 300, -1, "x", None])
def test_a_filling_that_does_not_fit_its_column(tmp_path, home, value):
    with sc.open(tmp_path / "a.parquet", "wb", keys=KEY) as file:
        pq.write_table(pa.table({"n": pa.array([1, None], pa.uint8())}), file)
    with pytest.raises(ValueError, match=r"fill_nulls: .* does not fit column 'n' of type uint8"):
        list(ParquetDataset(tmp_path / "a.parquet", fill_nulls={"n": value}))


def test_sources(data):
    for source in (
        data / "enc", str(data / "enc"), str(data / "enc" / "part-*.parquet"), f"crypt::file://{data / 'enc'}",
        [data / "enc" / f"part-{n}.parquet" for n in range(4)],
    ):  # fmt: skip
        dataset = ParquetDataset(source, columns=["id"])
        assert [os.path.basename(file.path) for file in dataset.plan()] == [
            f"part-{n}.parquet" for n in range(4)
        ]
        assert ids(dataset) == list(range(ROWS))
    assert ids(ParquetDataset(data / "enc" / "part-1.parquet", columns=["id"])) == list(range(2_500, 5_100))
    (data / "none").mkdir()
    with pytest.raises(sc.SourceError, match="no Parquet file"):
        list(ParquetDataset(data / "none"))
    with pytest.raises(FileNotFoundError):
        list(ParquetDataset(data / "absent.parquet"))
    with pytest.raises(ValueError, match="no column nothing"):
        list(ParquetDataset(data / "enc", columns=["nothing"]))
    with pytest.raises(sc.ContextMismatchError):
        list(ParquetDataset(data / "enc", context={"Project": "other"}))
    (data / "text").write_bytes(sc.encrypt_bytes(b"not Parquet", keys=KEY))
    with pytest.raises(sc.SourceError, match="not a Parquet file"):
        list(ParquetDataset(data / "text"))


@pytest.mark.parametrize("name", ["run[1]", "what?", "a*b"])
def test_a_folder_whose_name_looks_like_a_pattern(data, name):
    os.rename(data / "enc", data / name)
    assert ids(ParquetDataset(data / name, columns="id")) == list(range(ROWS))
    assert ids(ParquetDataset(data / name / "part-0.parquet", columns="id")) == list(range(2_500))


def test_a_pattern_of_folders(data):
    for day in range(4):
        (data / "days" / f"day={day}").mkdir(parents=True)
        (data / "enc" / f"part-{day}.parquet").rename(data / "days" / f"day={day}" / "part-0.parquet")
    assert ids(ParquetDataset(data / "days" / "day=[0-3]", columns="id")) == list(range(ROWS))
    assert ids(ParquetDataset(data / "days" / "day=0", columns="id")) == list(range(2_500))


@pytest.mark.parametrize("batch_size", [3, 4])
@pytest.mark.parametrize(
    ("second", "difference"),
    [
        ({"a": pa.array([4, 5, 6], pa.int32()), "b": [1.0, 2.0, 3.0]}, "'a' is int32, not int64"),
        ({"a": [4, 5, 6]}, "'b' is missing, not double"),
        ({"b": [1.0, 2.0, 3.0], "a": [4, 5, 6]}, "another order"),
    ],
)
def test_files_of_other_columns(tmp_path, home, second, difference, batch_size):
    """Also where no batch holds rows of two files: the first would be alright, and the second another thing."""
    for number, table in enumerate((pa.table({"a": [1, 2, 3], "b": [1.0, 2.0, 3.0]}), pa.table(second))):
        parquet.write_table(table, tmp_path / f"{number}.parquet", keys=KEY)
    with pytest.raises(ValueError, match=f"1.parquet.*{difference}.*0.parquet"):
        list(ParquetDataset(tmp_path, batch_size=batch_size))
    if "order" in difference:
        assert [int(a) for batch in ParquetDataset(tmp_path, columns=["a"]) for a in batch["a"]] == [
            *range(1, 7)
        ]
    # without rows it takes part in no batch, and pandas makes such a file with other types
    parquet.write_table(pa.table({"a": pa.nulls(0)}), tmp_path / "1.parquet", keys=KEY)
    assert len(list(ParquetDataset(tmp_path, batch_size=3))) == 1


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"shuffle_buffer": 0}, {"output": "list"}, {"output": "arrow", "batch_size": None},
     {"rank": 1}, {"rank": 2, "world_size": 2}],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(ValueError):
        ParquetDataset("nowhere", **options)
    with pytest.raises(ValueError):
        ParquetDataset([])


def test_empty_files(tmp_path, home):
    empty = make_table(5).select(["id"]).slice(0, 0)
    for name, table in (("a", empty), ("b", make_table(5).select(["id"])), ("c", empty)):
        with sc.open(tmp_path / f"{name}.parquet", "wb", keys=KEY) as file:
            pq.write_table(table, file)
    for shuffle in (False, True):
        assert sorted(ids(ParquetDataset(tmp_path, shuffle=shuffle))) == [0, 1, 2, 3, 4]
        dataset = ParquetDataset(tmp_path / "a.parquet", shuffle=shuffle)
        assert (len(dataset), list(dataset)) == (0, [])
        assert (
            list(ParquetDataset(tmp_path / "a.parquet", shuffle=shuffle, rank=1, world_size=3, pad=True))
            == []
        )


# ------------------------------------------------------------------------------ ranks and workers


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [None, 100, 333])
def test_ranks_and_workers_share_the_rows(data, world_size, batch_size, shuffle, monkeypatch):
    if batch_size is None and world_size > 2:
        pytest.skip("single rows are slow, and shared in the same way")
    options = {"columns": ["id"], "batch_size": batch_size, "shuffle": shuffle, "world_size": world_size}

    def run(rank, workers, **more):
        """What each worker of a rank yields, one after the other."""
        found = []
        for worker in range(workers):
            dataset = ParquetDataset(data / "enc", rank=rank, **options, **more)
            at = (worker, workers)
            dataset._at = at
            batches = [batch["id"] for batch in dataset._iterate(at, 0)]
            found.append([[int(b)] if batch_size is None else b.tolist() for b in batches])
        batches = list(itertools.chain(*found))
        assert len(batches) == len(dataset)
        return batches

    for workers in (1, 3):
        exact = [run(rank, workers) for rank in range(world_size)]
        rows = [[i for batch in batches for i in batch] for batches in exact]
        assert sorted(itertools.chain(*rows)) == list(range(ROWS))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        if batch_size is not None:
            for batches in exact:
                assert sum(len(batch) < batch_size for batch in batches) <= 1

            dropped = [run(rank, workers, drop_last=True) for rank in range(world_size)]
            assert {len(batch) for batches in dropped for batch in batches} == {batch_size}
            assert {len(batches) for batches in dropped} == {ROWS // world_size // batch_size}
            seen = [i for batches in dropped for batch in batches for i in batch]
            assert len(seen) == len(set(seen))

            padded = [run(rank, workers, pad=True) for rank in range(world_size)]
            counts = {sum(map(len, batches)) for batches in padded}
            assert counts == {-(-ROWS // world_size)}
            seen = [i for batches in padded for batch in batches for i in batch]
            assert set(seen) == set(range(ROWS))
            assert len(seen) - ROWS < world_size


def test_ranks_of_torch_distributed(data, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        dataset = ParquetDataset(data / "enc")
        assert (dataset.rank, dataset.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_every_kind(data, method):
    dataset = ParquetDataset(
        data / "enc", columns=["id", "name"], batch_size=500, shuffle=True, context=CONTEXT
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert len(loader) == 20
    before = kms_calls()
    first = ids(loader)
    assert sorted(first) == list(range(ROWS))
    # One data key for all files, and one call in each worker: the parent's own key does not travel.
    assert kms_calls() - before == 2


def test_a_batch_of_a_worker_comes_in_one_piece(data):
    """Handing a tensor's memory over costs more than reading it: a batch of many columns is one hand-over."""
    alone = list(ParquetDataset(data / "enc", batch_size=1_000))
    loader = DataLoader(ParquetDataset(data / "enc", batch_size=1_000), batch_size=None, num_workers=1)
    for batch, expected in zip(loader, alone, strict=True):
        assert type(batch) is type(expected) is dict
        assert list(batch) == list(expected)
        tensors_of = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        assert len(tensors_of) > 2
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of}) == 1
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert batch[name].dtype == value.dtype
                np.testing.assert_array_equal(batch[name].numpy(), value.numpy(), err_msg=name)
                batch[name].zero_()  # theirs to change; the next column's comparison shows that none overlap
            else:
                assert batch[name] == value


def test_what_a_transform_makes_of_a_batch_arrives(data):
    loader = DataLoader(
        ParquetDataset(data / "enc", columns=["id"], batch_size=1_000, transform=_transformed),
        batch_size=None,
        num_workers=1,
    )
    for start, batch in zip(range(0, ROWS, 1_000), loader, strict=True):
        assert batch["id"].tolist() == list(range(start, start + 1_000))
        assert batch["first"].item() == start
        assert batch["first"].shape == ()
        assert batch["halves"].tolist() == list(range(start, start + 1_000, 2))
        assert batch["empty"].shape == (0, 3)
        assert batch["wanted"].requires_grad
        assert batch["note"] == "text"


def _transformed(batch):
    batch["first"] = batch["id"][0]
    batch["halves"] = batch["id"][::2]
    batch["empty"] = torch.empty((0, 3))
    batch["wanted"] = torch.nn.Parameter(torch.ones(2))
    batch["note"] = "text"
    return batch


def test_a_worker_imports_no_pandas(data):
    """It would spend more processor time on that than on an epoch of a small dataset."""
    script = f"""
import sys
from torch.utils.data import DataLoader
from streamcrypt.torch import ParquetDataset
def seen(batch):
    return "pandas" in sys.modules
for shuffle in (False, True):
    dataset = ParquetDataset({str(data / "enc")!r}, batch_size=1_000, shuffle=shuffle, transform=seen)
    assert not any(DataLoader(dataset, batch_size=None, num_workers=2)), "pandas"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_workers_that_stay_see_the_next_epoch(data):
    dataset = ParquetDataset(data / "enc", columns=["id"], batch_size=500, shuffle=True, shuffle_buffer=500)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    epochs = []
    before = kms_calls()
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(ids(loader))
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert kms_calls() - before == 2
    loader._iterator._shutdown_workers()


def test_a_loader_that_batches_single_rows(data):
    dataset = ParquetDataset(data / "enc", columns=["id", "day"], batch_size=None)
    batches = list(DataLoader(dataset, batch_size=1_000, num_workers=2))
    assert sorted(ids(batches)) == list(range(ROWS))
    assert {batch["day"].shape for batch in batches} == {(1_000,)}


def test_nothing_secret_is_pickled(data):
    dataset = ParquetDataset(data / "enc", columns=["id"], keys=KEY)
    lazy = pickle.dumps(dataset)
    dataset.plan()
    planned = pickle.dumps(dataset)
    ids(dataset)
    used = pickle.dumps(dataset)
    assert len(lazy) < 3_000
    # The data key, as the embedded KMS unwraps it.
    header = sc.open(data / "enc" / "part-0.parquet").header
    from streamcrypt.keys.materials import Materials
    from streamcrypt.keys.reference import decrypting_keyring

    materials = Materials(decrypting_keyring(None))
    data_key = materials.for_decryption(header.suite, header.context, header.encrypted_data_keys).data_key
    for pickled in (lazy, planned, used):
        assert data_key not in pickled
        assert ids(pickle.loads(pickled)) == list(range(ROWS))


# ------------------------------------------------------------------------------ resumed epochs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True},
        {"shuffle": True, "shuffle_buffer": 900},
        {"drop_last": True},
        {"batch_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [0, 1, 7, 33])
def test_a_resumed_epoch_yields_exactly_the_rest(data, options, stop):
    options = {"batch_size": 300, "columns": ["id"], "rank": 1, "world_size": 2, "seed": 5, **options}

    def flat(batches):
        return [batch["id"].tolist() for batch in batches]

    dataset = ParquetDataset(data / "enc", **options)
    dataset.set_epoch(4)
    whole = flat(dataset)
    iterator = iter(dataset)
    begun = flat(itertools.islice(iterator, stop))
    state = dataset.state_dict()
    iterator.close()

    resumed = ParquetDataset(data / "enc", **options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert begun + flat(resumed) == whole
    assert flat(resumed) == whole  # the one after is a whole epoch again
    assert resumed.state_dict()["next"] is None


def test_a_resumed_epoch_reads_nothing_before_its_place(tmp_path, home):
    noise = np.random.default_rng(9).random(60_000)
    for number in range(3):
        part = slice(20_000 * number, 20_000 * (number + 1))
        table = pa.table({"id": np.arange(60_000)[part], "noise": noise[part]})
        with sc.open(tmp_path / f"part-{number}.parquet", "wb", keys=KEY, frame_size="4KiB") as file:
            pq.write_table(table, file, row_group_size=5_000)
    dataset = ParquetDataset(tmp_path, batch_size=1_000)
    iterator = iter(dataset)
    for _ in range(47):
        next(iterator)
    state = dataset.state_dict()
    assert state["next"] == {
        "file": str(tmp_path / "part-2.parquet"),
        "message_id": sc.inspect(tmp_path / "part-2.parquet").message_id,
        "row_group": 1,
        "row": 2_000,
    }
    # What lies before the place is destroyed (but for the end of each file, where its footer is): the
    # rest of the epoch does not need it.
    for name, bound in (("part-0.parquet", 200_000), ("part-1.parquet", 200_000), ("part-2.parquet", 50_000)):
        path = tmp_path / name
        message = bytearray(path.read_bytes())
        start = sc.inspect(path).header_length
        message[start:bound] = bytes(bound - start)
        path.write_bytes(message)
    resumed = ParquetDataset(tmp_path, batch_size=1_000)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert ids(rest) == list(range(47_000, 60_000))
    assert np.array_equal(np.concatenate([batch["noise"] for batch in rest]), noise[47_000:])
    with pytest.raises(sc.IntegrityError):
        ids(resumed)


def test_a_state_that_does_not_fit_is_refused(data):
    options = {"columns": ["id"], "batch_size": 100}
    dataset = ParquetDataset(data / "enc", **options)
    next(iter(dataset))
    state = dataset.state_dict()
    for other in (
        {"batch_size": 99}, {"shuffle": True}, {"seed": 1}, {"drop_last": True}, {"pad": True},
        {"rank": 0, "world_size": 2},
    ):  # fmt: skip
        changed = ParquetDataset(data / "enc", **{**options, **other})
        changed.load_state_dict(state)
        with pytest.raises(ValueError, match="the state is of"):
            next(iter(changed))
    with pytest.raises(ValueError, match="version"):
        dataset.load_state_dict({**state, "version": 9})
    sc.encrypt(data / "plain" / "part-0.parquet", data / "enc" / "part-0.parquet", keys=KEY, overwrite=True)
    rewritten = ParquetDataset(data / "enc", verify_manifest=False, **options)
    rewritten.load_state_dict(state)
    with pytest.raises(ValueError, match="other files"):
        next(iter(rewritten))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_stateful_data_loader(data, workers, shuffle):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="TORCHDATA IS MISSING: not tested")

    def loader():
        dataset = ParquetDataset(
            data / "enc", columns=["id"], batch_size=250, shuffle=shuffle, shuffle_buffer=1_000
        )
        return stateful.StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    whole = [batch["id"].tolist() for batch in loader()]
    for stop in (0, 1, 13, 39):
        first = loader()
        iterator = iter(first)
        begun = [next(iterator)["id"].tolist() for _ in range(stop)]
        state = first.state_dict()
        del iterator
        second = loader()
        second.load_state_dict(state)
        rest = [batch["id"].tolist() for batch in second]
        assert begun + rest == whole, stop
    data_key = b"data_key"
    assert data_key not in pickle.dumps(state)
    assert len(pickle.dumps(state)) < 3_000 * max(1, workers)


# ------------------------------------------------------------------------------ damage and death


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_a_flipped_bit_is_an_integrity_error(data, method):
    path = data / "enc" / "part-2.parquet"
    flip(path, path.stat().st_size // 3)
    dataset = ParquetDataset(data / "enc", columns=["id", "value", "name"], batch_size=500)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2 if method else 0, multiprocessing_context=method
    )
    with pytest.raises(sc.IntegrityError, match="did not authenticate"):
        ids(loader)


def test_files_that_change_are_noticed(data):
    dataset = ParquetDataset(data / "enc", columns=["id"], batch_size=100, verify_manifest=False)
    dataset.plan()
    sc.encrypt(data / "plain" / "part-1.parquet", data / "enc" / "part-3.parquet", keys=KEY, overwrite=True)
    with pytest.raises(sc.SourceError, match="another message"):
        ids(dataset)
    # With the manifest, two files that were swapped do not pass at all.
    with pytest.raises(sc.IntegrityError):
        ids(ParquetDataset(data / "enc", columns=["id"]))


def test_a_key_that_was_disabled_is_a_key_access_error_in_a_worker(data):
    client = sc.kms_client("local")
    key = client.describe_key(KeyId="alias/ml")["KeyMetadata"]["KeyId"]
    client.disable_key(KeyId=key)
    try:
        loader = DataLoader(ParquetDataset(data / "enc", columns=["id"]), batch_size=None, num_workers=1)
        with pytest.raises(sc.KeyAccessError):
            next(iter(loader))
    finally:
        client.enable_key(KeyId=key)


KILLED = """
import os, signal, sys
from torch.utils.data import DataLoader
from streamcrypt.torch import ParquetDataset

dataset = ParquetDataset(sys.argv[1], columns=["id"], batch_size=10)
iterator = iter(DataLoader(dataset, batch_size=None, num_workers=2, prefetch_factor=2, timeout=30))
next(iterator)
os.kill(iterator._workers[0].pid, signal.SIGKILL)
try:
    for _ in iterator:
        pass
except (RuntimeError, OSError, EOFError) as error:
    told = error
while True:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        print(type(told).__name__, told, flush=True)
        # The other one may wait for a lock of the queue that died with the first, and holds our standard output.
        os.kill(iterator._workers[1].pid, signal.SIGKILL)
        os._exit(7)
    except RuntimeError as late:  # torch's handler for the dead child, which may come only now
        told = late
"""


def test_a_killed_worker_is_an_error_and_not_a_hang(data):
    # In a process of its own: torch raises from a signal handler, wherever the program happens to be.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(data / "enc")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 7, done.stderr
    # torch's own word for it, or the broken connection where it was fetching a batch from the dead worker.
    told = (
        "killed by signal",
        "exited unexpectedly",
        "ConnectionResetError",
        "ConnectionRefusedError",
        "EOFError",
    )
    assert any(word in done.stdout for word in told), done.stdout


# ------------------------------------------------------------------------------ rows of tensors


@pytest.fixture
def features(tmp_path, home):
    rng = np.random.default_rng(8)
    source = {"x": rng.random((1_000, 17), dtype=np.float32), "y": np.arange(1_000)}
    tensors.save_file(source, tmp_path / "f.safetensors", keys=KEY, frame_size="4KiB")
    return tmp_path / "f.safetensors", source


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_rows_of_tensors(features, method):
    path, source = features
    dataset = tensors.RowDataset(path)
    assert len(dataset) == 1_000
    assert torch.equal(dataset[-1]["x"], torch.from_numpy(source["x"][-1]))
    calls = kms_calls()
    loader = DataLoader(
        dataset, batch_size=64, shuffle=True, num_workers=2 if method else 0, multiprocessing_context=method
    )
    seen = []
    for batch in loader:
        assert torch.equal(batch["x"], torch.from_numpy(source["x"][batch["y"].numpy()]))
        seen += batch["y"].tolist()
    assert sorted(seen) == list(range(1_000))
    assert kms_calls() - calls == (2 if method else 0)


def test_rows_of_tensors_that_do_not_fit(features, tmp_path):
    path, _ = features
    dataset = tensors.RowDataset(path, ["y"], framework="np")
    assert [row["y"] for row in dataset.__getitems__([5, 3, 5, -1])] == [5, 3, 5, 999]
    for bad in (1_000, -1_001):
        with pytest.raises(IndexError):
            dataset[bad]
    with pytest.raises(KeyError):
        tensors.RowDataset(path, ["z"])[0]
    tensors.save_file({"a": np.zeros(3), "b": np.zeros(4)}, tmp_path / "odd", keys=KEY)
    with pytest.raises(ValueError, match="do not agree"):
        len(tensors.RowDataset(tmp_path / "odd"))
    assert len(pickle.dumps(dataset)) < 1_000
    dataset.close()
    flip(path, 3_000)
    with pytest.raises(sc.IntegrityError):
        [tensors.RowDataset(path)[i] for i in range(1_000)]


def test_an_epoch_is_a_cell_of_a_sweep(tmp_path, monkeypatch):
    """What `bench run --axis operation=epoch` does in its child; the plain twin is the yardstick."""
    from streamcrypt.bench import data as made
    from streamcrypt.bench.measure import measure
    from streamcrypt.bench.records import Cell

    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "work" / "home"))
    (tmp_path / "work").mkdir()
    cell = Cell(operation="epoch", files=2, file_size=50_000, storage="disk")
    written = made.write_tables(tmp_path / "plain", made.sizes_of(cell), cell.seed)
    found = measure(cell, tmp_path / "plain", tmp_path / "work", yardsticks=True)
    assert found["bytes_in"] == written > 90_000
    assert 1 <= found["kms_calls"]["Decrypt"] <= 2  # the worker, and the parent that plans
    assert found["wall_s"] > 0
    assert found["yardstick_s"]["plain"] > 0


def test_streamcrypt_torch_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from streamcrypt import tensors, torch\n"
        "try: torch.ParquetDataset\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "streamcrypt.torch needs torch: pip install 'streamcrypt[torch]'\n"
