"""Every example of docs/loaders.md, run in order in one folder."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from families.datasets import KEY, flip, make_key

import streamcrypt as sc

PAGE = Path(__file__).resolve().parents[2] / "docs" / "loaders.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
NEEDED = ("torch", "torchdata", "safetensors", "fsspec", "webdataset")


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated",  # torchdata 0.11 under torch 2.13
    "ignore::FutureWarning",  # torch's distributed checkpoint about itself
    "ignore::UserWarning",
    "ignore::ResourceWarning",  # webdataset leaves its pipes to the garbage collector
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_the_examples_run(tmp_path, home, monkeypatch):
    for package in NEEDED:
        pytest.importorskip(package, reason=f"{package.upper()} IS MISSING: docs/loaders.md was not run")
    make_key()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    names = {"folder": str(tmp_path), "__name__": "loaders"}
    text = PAGE.read_text()
    examples = list(EXAMPLE.finditer(text))
    assert len(examples) >= 8
    for example in examples:
        # Errors show the line of the page.
        padding = "\n" * text.count("\n", 0, example.start(1))
        exec(compile(padding + example[1], PAGE.name, "exec"), names)


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
