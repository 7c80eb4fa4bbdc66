"""torch's distributed checkpoint through the ``crypt`` protocol of fsspec."""

from __future__ import annotations

import os

import pytest
from families.datasets import KEY, flip, make_key

import streamcrypt as sc

torch = pytest.importorskip("torch", reason="TORCH IS MISSING: its distributed checkpoint was not tested")
pytest.importorskip("fsspec", reason="FSSPEC IS MISSING: pip install 'streamcrypt[fsspec]'")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def state(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.ReLU(), torch.nn.Linear(300, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(5, 64)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "step": seed, "optimizer": optimizer.state_dict()}


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_checkpoint_is_saved_and_loaded(tmp_path, home):
    make_key()
    url = f"crypt::file://{tmp_path}/checkpoint"
    saved, fresh = state(3), state(4)
    dcp.save(saved, storage_writer=FsspecWriter(url, keys=KEY, context={"Model": "churn"}), no_dist=True)
    files = sorted(os.listdir(tmp_path / "checkpoint"))
    assert ".metadata" in files
    for file in files:
        assert sc.inspect(tmp_path / "checkpoint" / file).encryption_context["Model"] == "churn"

    dcp.load(fresh, storage_reader=FsspecReader(url, context={"Model": "churn"}), no_dist=True)
    assert same(fresh, saved)

    largest = max((tmp_path / "checkpoint" / file for file in files), key=os.path.getsize)
    flip(largest, os.path.getsize(largest) // 2)
    with pytest.raises(CheckpointException) as caught:  # torch's own, around what each rank met
        dcp.load(state(5), storage_reader=FsspecReader(url), no_dist=True)
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, sc.IntegrityError)
