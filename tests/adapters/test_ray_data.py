"""Ray Data over encrypted Parquet, on a Ray that runs here."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families.datasets import KEY, flip, make_key, make_table

import streamcrypt as sc

ray = pytest.importorskip("ray", reason="RAY IS MISSING: its datasets were not tested")
pytest.importorskip("ray.data", reason="RAY DATA IS MISSING: pip install 'ray[data]'")

from streamcrypt import ray as crypt_ray  # noqa: E402

pytestmark = [
    pytest.mark.timeout(300),
    # Ray leaves sockets and files to the interpreter's end, and warns of its own future.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of two CPUs; its workers keep the environment, and so the home, of this moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        make_key()
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            configure_logging=False,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


@pytest.fixture
def data(cluster, tmp_path):
    table = make_table(5_000)
    (tmp_path / "plain").mkdir()
    for number in range(3):
        part = table.slice(number * 1_700, 1_700)
        pq.write_table(part, tmp_path / "plain" / f"part-{number}.parquet", row_group_size=600)
    sc.encrypt(
        tmp_path / "plain",
        tmp_path / "enc",
        keys=KEY,
        context={"Project": "a"},
        frame_size="4KiB",
        fsync=False,
    )
    return tmp_path


def rows(dataset):
    return sorted(dataset.take_all(), key=lambda row: row["id"])


def plain_rows(data):
    return sorted(pq.read_table(data / "plain").to_pylist(), key=lambda row: row["id"])


def test_the_rows_are_those_of_the_plain_files(data):
    plain = plain_rows(data)
    assert rows(crypt_ray.read_parquet(data / "enc", context={"Project": "a"})) == plain
    paths = [data / "enc" / f"part-{number}.parquet" for number in range(3)]
    some = rows(crypt_ray.read_parquet(paths, columns=["id", "value"], keys=KEY))
    assert some == [{"id": row["id"], "value": row["value"]} for row in plain]


def test_what_is_written_is_encrypted_and_read_back(data):
    dataset = ray.data.read_parquet(str(data / "plain"))
    crypt_ray.write_parquet(dataset, data / "new", keys=KEY, context={"Project": "b"})
    files = sorted((data / "new").iterdir())
    assert files
    for file in files:
        assert sc.inspect(file).encryption_context["Project"] == "b"
        with pytest.raises(pa.ArrowInvalid):
            pq.read_table(file)
    assert rows(crypt_ray.read_parquet(data / "new", context={"Project": "b"})) == plain_rows(data)


def test_damage_and_bad_references_are_errors(data):
    with pytest.raises(ValueError, match="not a key reference"):
        crypt_ray.read_parquet(data / "enc", keys="nonsense")
    with pytest.raises(TypeError, match="key references"):
        crypt_ray.read_parquet(data / "enc", keys=[3])
    path = data / "enc" / "part-1.parquet"
    flip(path, os.path.getsize(path) // 2)
    with pytest.raises(Exception, match="did not authenticate"):
        crypt_ray.read_parquet(data / "enc").take_all()
