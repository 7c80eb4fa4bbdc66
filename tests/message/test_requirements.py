"""docs/requirements.md and docs/reliability.md name tests that exist, and each row names one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@cache
def functions(path: str) -> frozenset[str]:
    tree = ast.parse((REPOSITORY / path).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def rows(document: str) -> list[list[str]]:
    lines = (REPOSITORY / "docs" / document).read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [
        row for row in cells if not set(row[0]) <= set("- ") and row[0] not in ("sentence", "rule", "item")
    ]


@pytest.mark.parametrize("document", ["requirements.md", "reliability.md"])
def test_every_named_test_exists(document):
    named = _TEST.findall((REPOSITORY / "docs" / document).read_text())
    assert named
    for path, function in named:
        assert (REPOSITORY / path).is_file(), path
        assert not function or function in functions(path), f"{path}::{function}"


def test_every_requirement_has_a_test():
    table = rows("requirements.md")
    assert len(table) >= 50
    for sentence, tests in table:
        assert _TEST.search(tests), sentence
