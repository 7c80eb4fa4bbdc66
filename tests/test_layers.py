"""Modules import downward only; import-linter reads the contract in pyproject.toml."""

from __future__ import annotations

import ast
import pickle
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from streamcrypt.message.frames import Geometry
from streamcrypt.tuples import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
_BELOW_THE_FORMAT = ("streamcrypt.message", "streamcrypt.errors", "streamcrypt.units", "streamcrypt.tuples")


def test_layers():
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which(
        "lint-imports"
    )
    if linter is None:
        pytest.skip("import-linter is not installed (extra `dev`)")
    done = subprocess.run([linter, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_message_format_knows_no_key_service_and_does_no_io():
    for path in (REPOSITORY / "streamcrypt" / "message").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name not in ("os", "io", "socket", "pathlib", "logging"), path.name
                if name.startswith("streamcrypt"):
                    assert name.startswith(_BELOW_THE_FORMAT)


def test_named_tuples_are_those_of_typing():
    """streamcrypt/tuples.py makes what ``typing.NamedTuple`` would."""

    class Theirs(typing.NamedTuple):
        """A pair."""

        first: int
        second: str = "2"

        def both(self) -> str:
            return f"{self.first}{self.second}"

    class Ours(NamedTuple):
        """A pair."""

        first: int
        second: str = "2"

        def both(self) -> str:
            return f"{self.first}{self.second}"

    assert Ours(1) == Theirs(1) == (1, "2")
    assert Ours(1).both() == "12"
    assert repr(Ours(1)) == repr(Theirs(1)).replace("Theirs", "Ours")
    for name in ("_fields", "_field_defaults", "__doc__", "__module__", "__match_args__"):
        assert getattr(Ours, name) == getattr(Theirs, name)
    assert typing.get_type_hints(Ours) == typing.get_type_hints(Theirs)
    assert vars(Ours).keys() - vars(Theirs).keys() == set()
    assert pickle.loads(pickle.dumps(Geometry(1, 2, 3, 4))) == Geometry(1, 2, 3, 4, 0)
    with pytest.raises(TypeError, match="first"):
        Ours()
