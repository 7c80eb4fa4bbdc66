"""Every example of docs/loaders.md, run in order in one folder; those for Ray run on a Ray that is started here."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from families.datasets import KEY, flip, make_key

import streamcrypt as sc
from streamcrypt.kms import open_service, principals
from streamcrypt.kms.server import Server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loaders.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
NEEDED = ("torch", "torchdata", "safetensors", "fsspec", "webdataset")


WARNINGS = (
    "ignore:'set_vital' is deprecated",  # torchdata 0.11 under torch 2.13
    "ignore::FutureWarning",  # torch's distributed checkpoint about itself, and Ray
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
    "ignore::ResourceWarning",  # webdataset and Ray leave pipes and sockets to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


def run_examples(of_ray, names):
    """Run the examples, those of the section on Ray or all others."""
    text = PAGE.read_text()
    ray_begins = text.index("## Ray\n")
    examples = [found for found in EXAMPLE.finditer(text) if (found.start() > ray_begins) is of_ray]
    assert len(examples) >= (2 if of_ray else 8)
    for example in examples:
        # Errors show the line of the page.
        padding = "\n" * text.count("\n", 0, example.start(1))
        exec(compile(padding + example[1], PAGE.name, "exec"), names)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings(*WARNINGS)
def test_the_examples_run(tmp_path, home, monkeypatch):
    for package in NEEDED:
        pytest.importorskip(package, reason=f"{package.upper()} IS MISSING: docs/loaders.md was not run")
    make_key()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    run_examples(False, {"folder": str(tmp_path), "__name__": "loaders"})


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings(*WARNINGS)
def test_the_examples_for_ray_run(tmp_path, home, monkeypatch):
    ray = pytest.importorskip("ray", reason="RAY IS MISSING: its part of docs/loaders.md was not run")
    pytest.importorskip("ray.data", reason="RAY DATA IS MISSING: its part of docs/loaders.md was not run")
    monkeypatch.chdir(tmp_path)
    table = pa.table({"id": np.arange(30_000), "x": np.arange(30_000) / 7})
    ds.write_dataset(table, "train", format="parquet", max_rows_per_file=10_000, max_rows_per_group=5_000)
    service = open_service()
    make_key()
    credentials = principals.access_key(service.store, principals.principal_arn(None))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", credentials.id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", credentials.secret)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    sc.encrypt("train", "train.enc", keys=KEY)
    server = Server(service, port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    try:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            configure_logging=False,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        run_examples(True, {"sc": sc, "url": server.url})
    finally:
        ray.shutdown()
        server.stop()
        thread.join(20)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_ends_with_an_error_where_a_shard_was_altered(tmp_path, home, monkeypatch):
    wds = pytest.importorskip(
        "webdataset", reason="WEBDATASET IS MISSING: damage to its shards was not tested"
    )
    make_key()
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(50):
            writer.write({"__key__": f"{number:03}", "x.npy": np.full(500, number)})
    message = tmp_path / "a.tar.enc"
    sc.encrypt(tmp_path / "a.tar", message, keys=KEY, frame_size="4KiB")
    url = f"pipe:streamcrypt cat --quiet {message}"

    def values():
        got = []
        for sample in wds.WebDataset(url, shardshuffle=False).decode():
            got.append(sample["x.npy"].tolist())
        return got

    whole = [[number] * 500 for number in range(50)]
    assert values() == whole
    flip(message, message.stat().st_size // 2)
    got = []
    with pytest.raises(Exception, match=r"exit|status|empty file|end of"):  # noqa: PT012
        for sample in wds.WebDataset(url, shardshuffle=False).decode():
            got.append(sample["x.npy"].tolist())
    assert got == whole[: len(got)]
