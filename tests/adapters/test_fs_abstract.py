"""fsspec's own abstract suite, over local files and over an in-memory store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families.datasets import make_key
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from streamcrypt.fs import CryptFileSystem


@pytest.fixture(scope="module", autouse=True)
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One embedded KMS for all: these tests are about files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(tmp_path_factory.mktemp("home")))
        make_key()
        yield


class LocalFixtures(AbstractFixtures):
    @pytest.fixture
    def fs(self) -> Any:
        options = {"auto_mkdir": True}
        return CryptFileSystem(keys="local:alias/ml", frame_size=16, fsync=False, target_options=options)

    @pytest.fixture
    def fs_path(self, tmp_path: Path) -> str:
        return str(tmp_path / "tree")


class MemoryFixtures(AbstractFixtures):
    @pytest.fixture
    def fs(self) -> Any:
        from fsspec.implementations.memory import MemoryFileSystem

        store = CryptFileSystem(target_protocol="memory", keys="local:alias/ml", frame_size=16)
        yield store
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    @pytest.fixture
    def fs_join(self) -> Any:
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def fs_path(self) -> str:
        return "/tree"


class TestLocalCopy(AbstractCopyTests, LocalFixtures): ...


class TestLocalGet(AbstractGetTests, LocalFixtures): ...


class TestLocalOpen(AbstractOpenTests, LocalFixtures): ...


class TestLocalPipe(AbstractPipeTests, LocalFixtures): ...


class TestLocalPut(AbstractPutTests, LocalFixtures): ...


class TestMemoryCopy(AbstractCopyTests, MemoryFixtures): ...


class TestMemoryGet(AbstractGetTests, MemoryFixtures): ...


class TestMemoryOpen(AbstractOpenTests, MemoryFixtures): ...


class TestMemoryPipe(AbstractPipeTests, MemoryFixtures): ...


class TestMemoryPut(AbstractPutTests, MemoryFixtures): ...
