"""Pages whose code blocks are run, in their order, in one folder.

    ```sh                       run by the shell, which stops at the first command that fails
    ```python                   run in one namespace with the page's other blocks
    ```python title="train.py"  written to this file; a later block runs it

A block that is not run says so to the reader, on the line before it:

    *Not run by the tests: it takes hours.*
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(
    r"(?:^\*Not run by the tests: (?P<reason>[^\n]+)\*\n\s*)?"
    r'^```(?P<language>[\w-]*)(?: title="(?P<title>[^"\n]+)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    code: str
    line: int
    reason: str | None
    """Why it is not run."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            found["title"],
            found["code"],
            text.count("\n", 0, found.start("code")),
            found["reason"],
        )
        for found in _FENCE.finditer(text)
    ]


def run_page(
    page: Path, folder: Path, *, instead: Mapping[str, str] | None = None, children: bool = False
) -> None:
    """Run the page's blocks in ``folder``, which is the working directory; ``instead`` replaces commands.

    ``children``: each block of Python in a process of its own, because it changes the process.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        code = block.code
        for shown, run in (instead or {}).items():
            code = code.replace(shown, run)
        if block.reason is not None:
            continue
        if block.title is not None:
            (folder / block.title).write_text(code)
        elif block.language == "python":
            code = "\n" * block.line + code  # errors show the line of the page
            if children:
                subprocess.run([sys.executable, "-c", code], timeout=240, check=True, cwd=folder)
            else:
                exec(compile(code, page.name, "exec"), names)
        elif block.language == "sh":
            done = subprocess.run(
                ["sh", "-e"], input=code, capture_output=True, text=True, timeout=240, check=False, cwd=folder
            )
            assert done.returncode == 0, f"{page.name}:{block.line}: {done.stdout}{done.stderr}"
