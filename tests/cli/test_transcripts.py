"""Shell sessions and what must come of them, with no Python in between.

    # what the case shows
    $ command            run by sh in the session's folder; lines that follow say what it gave
    exit 3               its exit code (0 when there is no such line)
    out  line            standard output, whole, line by line, when there is any such line
    err  line            the same for standard error; a command that fails must give it
    no   path            nothing is there
    has  path            something is there

In a line, … stands for any text.  Every session has an empty folder, a STREAMCRYPT_HOME of its own, and
the command `streamcrypt` of the interpreter that runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TRANSCRIPTS = Path(__file__).parent / "transcripts"
TIMEOUT = 240


@dataclass
class Step:
    line: int
    command: str
    exit: int = 0
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    no: list[str] = field(default_factory=list)
    has: list[str] = field(default_factory=list)


def parse(text: str) -> list[Step]:
    steps: list[Step] = []
    for number, line in enumerate(text.splitlines(), 1):
        word, _, rest = line.partition(" ")
        if not line.strip() or word == "#":
            continue
        if word == "$":
            steps.append(Step(number, rest))
        elif word == "exit":
            steps[-1].exit = int(rest)
        elif word in ("out", "err", "no", "has"):
            getattr(steps[-1], word).append(rest.strip())
        else:
            raise ValueError(f"line {number}: {line!r} is not a line of a transcript")
    return steps


def matches(expected: list[str], given: str) -> bool:
    lines = given.splitlines()
    return len(lines) == len(expected) and all(
        re.fullmatch(".*".join(map(re.escape, want.split("…"))), line)
        for want, line in zip(expected, lines, strict=True)
    )


def run(steps: list[Step], folder: Path, environment: dict[str, str]) -> int:
    """Run the steps; AssertionError with the transcript's line at the first that differs."""
    for step in steps:
        done = subprocess.run(
            ["sh", "-c", step.command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        told = f"line {step.line}: $ {step.command}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == step.exit, told
        assert not step.out or matches(step.out, done.stdout), told
        if step.err or step.exit:
            assert matches(step.err, done.stderr), told
        assert not [path for path in step.no if os.path.lexists(folder / path)], told
        assert not [path for path in step.has if not os.path.lexists(folder / path)], told
    return len(steps)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    scripts = os.path.dirname(sys.executable)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "STREAMCRYPT_"))
    }
    home = tmp_path / "home"
    return kept | {
        "PATH": f"{scripts}{os.pathsep}{kept['PATH']}",
        "STREAMCRYPT_HOME": str(home),
        "LC_ALL": "C.UTF-8",
    }


@pytest.mark.parametrize("transcript", sorted(TRANSCRIPTS.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(transcript: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    assert run(parse(transcript.read_text(encoding="utf-8")), folder, environment)


FAILING = {
    "exit code": "$ exit 3\n",
    "output": "$ echo one\nout  two\n",
    "unexpected error line": "$ echo oops >&2; exit 1\nexit 1\n",
    "more lines than expected": "$ echo one; echo two\nout  one\n",
    "file that should be absent": "$ touch x\nno   x\n",
    "file that should be there": "$ true\nhas  x\n",
}


@pytest.mark.parametrize("text", FAILING.values(), ids=FAILING)
def test_the_runner_notices(text: str, tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(AssertionError):
        run(parse(text), tmp_path, environment)
