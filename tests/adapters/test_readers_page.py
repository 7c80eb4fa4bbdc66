"""docs/readers.md: every example runs, in order, in one folder."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from families.datasets import make_key

PAGE = Path(__file__).resolve().parents[2] / "docs" / "readers.md"
NEEDED = {
    "Polars": ["polars"],
    "pandas, Dask and fsspec: by URL": ["pandas", "dask.dataframe"],
    "DuckDB": ["duckdb"],
    "Hugging Face datasets": ["datasets"],
    "A tree to read": ["pandas"],
}


def sections() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        found[title] = re.findall(r"^```python\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The names that the examples share; each section goes on from those before it."""
    folder = tmp_path_factory.mktemp("readers")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(folder / "home"))
        patch.setenv("HF_HOME", str(folder / "hf"))
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        make_key()
        make_key("alias/pii")
        os.chdir(folder)
        yield {"folder": str(folder)}
        os.chdir(before)


@pytest.mark.parametrize("title", [title for title, examples in sections().items() if examples])
def test_section(names: dict[str, Any], title: str) -> None:
    for module in NEEDED.get(title, []):
        pytest.importorskip(module, reason=f"{module} IS MISSING: docs/readers.md, {title!r} was not run")
    if title != "A tree to read" and "table" not in names:
        pytest.skip("the first section, which makes the data, did not run")
    for number, example in enumerate(sections()[title]):
        with warnings.catch_warnings():
            if title not in ("pyarrow", "Arrow IPC", "Parquet Modular Encryption"):
                warnings.simplefilter("default")  # what other libraries warn of among themselves
            exec(compile(example, f"{PAGE.name}, {title} [{number}]", "exec"), names)


def test_the_page_names_every_reader() -> None:
    assert {"pyarrow", "Polars", "DuckDB", "Hugging Face datasets", "Arrow IPC"} <= set(sections())
