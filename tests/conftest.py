"""Fixtures for all tests."""

from __future__ import annotations

import os
import random
from multiprocessing import forkserver
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VECTORS = Path(os.environ.get("STREAMCRYPT_VECTORS", ROOT.parent / "shared" / "vectors"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign", "reliability campaigns: pytest -m campaign (tests/README.md)")
    group.addoption("--campaign-out", metavar="FILE", help="append a JSON line per trial and per summary")
    group.addoption("--campaign-scale", type=float, default=1.0, help="this part of each campaign's trials")
    group.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in this random order")
    group.addoption(
        "--campaign-seed", type=int, default=20261124, help="what every random choice starts from"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Campaigns run only when they are asked for by their marker."""
    if "campaign" not in config.getoption("-m"):
        campaigns = [item for item in items if item.get_closest_marker("campaign")]
        items[:] = [item for item in items if not item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=campaigns)
    if (seed := config.getoption("--shuffle")) is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that this process gave to fsync."""
    fsync, paths = os.fsync, []

    def record(descriptor: int) -> None:
        paths.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no system here that names a descriptor's file")
    monkeypatch.setattr("os.fsync", record)
    return paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh STREAMCRYPT_HOME: the embedded KMS of this test alone."""
    # A fork server that another test left would keep that test's environment.
    forkserver._forkserver._stop()
    folder = tmp_path / "streamcrypt-home"
    monkeypatch.setenv("STREAMCRYPT_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of published test vectors; the tests that need it skip where it is absent."""
    if not VECTORS.is_dir():
        pytest.skip(f"PUBLISHED TEST VECTORS ARE MISSING: no folder {VECTORS} (set STREAMCRYPT_VECTORS)")
    return VECTORS
