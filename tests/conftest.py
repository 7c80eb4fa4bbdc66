"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VECTORS = Path(os.environ.get("STREAMCRYPT_VECTORS", ROOT.parent / "shared" / "vectors"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh STREAMCRYPT_HOME: the embedded KMS of this test alone."""
    folder = tmp_path / "streamcrypt-home"
    monkeypatch.setenv("STREAMCRYPT_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of published test vectors; the tests that need it skip where it is absent."""
    if not VECTORS.is_dir():
        pytest.skip(f"PUBLISHED TEST VECTORS ARE MISSING: no folder {VECTORS} (set STREAMCRYPT_VECTORS)")
    return VECTORS
