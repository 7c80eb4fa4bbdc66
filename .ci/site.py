"""What the documentation site is made of besides docs/: the repository's own pages, and every option.

MkDocs calls these hooks (mkdocs.yml).  Links to files at the root of the repository become links to
their pages, so that the same Markdown reads well in the repository and on the site.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from streamcrypt.cli import COMMANDS, parser_for

ROOT = Path(__file__).resolve().parent.parent
os.environ["COLUMNS"] = "96"  # argparse breaks lines there
# Files outside docs/, and the pages that show them.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        if source != "README.md":
            files.append(File.generated(config, page, content=_at_the_root(source)))
    files.append(File.generated(config, "options.md", content="\n".join(_options())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """docs/X.md says ../FILE for what lies at the root of the repository."""
    return _LINK.sub(lambda link: _relinked(link, "docs"), markdown)


def _at_the_root(source: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    return _LINK.sub(lambda link: _relinked(link, str(Path(source).parent)), text)


def _relinked(link: re.Match[str], folder: str) -> str:
    target = (ROOT / folder / link[1]).resolve()
    if not target.is_relative_to(ROOT):
        return link[0]
    name = target.relative_to(ROOT).as_posix()
    return f"]({PAGES.get(name) or name.removeprefix('docs/')}{link[2] or ''})"


def _options() -> Iterator[str]:
    """A page of all commands with their options, from the parsers themselves."""
    yield "# Every option\n\nGenerated from the commands; `streamcrypt COMMAND --help` says the same."
    for command in COMMANDS:
        for parser in _leaves(parser_for(command), command):
            yield f"\n## {parser.prog.removeprefix('streamcrypt ')}\n"
            yield f"{_cell(parser.description or '')}\n"
            yield f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```\n"
            rows = [action for action in parser._actions if action.dest != "help"]
            if rows:
                yield "| option | does |\n| --- | --- |"
            for action in rows:
                words = ", ".join(action.option_strings) or str(action.metavar or action.dest)
                takes = "" if action.nargs == 0 or not action.option_strings else f" {_takes(action)}"
                yield f"| `{words}{takes}` | {_cell(_help(parser, action))} |"


def _leaves(parser: argparse.ArgumentParser, command: str) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                if command in (name, ""):
                    yield from _leaves(child, "")
            return
    yield parser


def _takes(action: argparse.Action) -> str:
    if action.metavar:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices:
        return "|".join(str(choice) for choice in action.choices)
    return action.dest.upper()


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_\[\]])", r"\\\1", " ".join(text.split()))
