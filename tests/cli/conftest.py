"""The commands that these tests start find the package compiled, as an installed one is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from families.s3 import bucket, client, server

__all__ = ["bucket", "client", "server"]


@pytest.fixture(autouse=True, scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
        yield
