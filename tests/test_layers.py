"""Modules import downward only; import-linter reads the contract in pyproject.toml."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


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
                    assert name.startswith(("streamcrypt.message", "streamcrypt.errors", "streamcrypt.units"))
