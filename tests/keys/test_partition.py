"""Key maps: which pattern wins, and what is no key map."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import streamcrypt as sc
from streamcrypt.keys.partition import KeyMap, read_key_map
from streamcrypt.kms import open_service


@pytest.fixture
def local(home: Path) -> Path:
    open_service(home)
    return home


def key_map(rules: dict, default: str = "local:alias/default") -> KeyMap:
    return KeyMap(rules, default)


RULES = {
    "special/file": "local:alias/file",
    "a/b/*": "local:alias/ab",
    "*.tmp": [],
    "a/*": "local:alias/a",
    "a/c/*": "local:alias/never",
    "?/x[12]": ["local:alias/one", "local:alias/two"],
    "*/*/deep*": "local:alias/deep",
}
NAMES = [
    "special/file", "a/b/x", "a/b/c/y.tmp", "a/x.tmp", "a/c/z", "q.tmp", "b/x1", "a/x1", "m/n/deep/1", "other", "a",
    "ab/c",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_first_pattern_that_matches_wins(local, name):
    """Folders are looked up and patterns tried: together they must say what trying all in order would."""
    given = next(
        (keys for pattern, keys in RULES.items() if fnmatchcase(name, pattern)), "local:alias/default"
    )
    if not given:
        with pytest.raises(sc.KeyAccessError, match="gives it no key"):
            key_map(RULES).of(name)
    else:
        label = given if isinstance(given, str) else ", ".join(given)
        assert key_map(RULES).of(name).label == label


def test_one_key_is_one_partition_and_every_key_is_listed(local):
    made = key_map(
        {"a/*": "local:alias/x", "b/*": "local:alias/x", "c/*": ["local:alias/y", "local:alias/x"]}
    )
    assert made.of("a/1") is made.of("b/1")
    assert made.references == ["local:alias/default", "local:alias/x", "local:alias/y"]


def test_the_two_forms_of_the_file_say_the_same(tmp_path):
    toml = tmp_path / "map.toml"
    toml.write_text(
        '# countries\n"country=DE/*" = "local:alias/de"\n"*" = ["local:alias/a", "local:alias/b"]\n'
    )
    lines = tmp_path / "map.jsonl"
    lines.write_text(
        '{"pattern": "country=DE/*", "key": "local:alias/de"}\n\n'
        '{"pattern": "*", "key": ["local:alias/a", "local:alias/b"]}\n'
    )
    assert list(read_key_map(toml).items()) == list(read_key_map(lines).items())
    assert list(read_key_map(toml)) == ["country=DE/*", "*"]


@pytest.mark.parametrize(
    "text",
    [
        'country=DE/* = "local:alias/de"',  # no quotation marks: no TOML key
        'a.b = "local:alias/x"',  # a table, not a pattern
        '"a" = 1',
        '"a" = ["local:alias/x", 1]',
        '"a" = "x"\n"a" = "y"',
        '{"pattern": "a"}',
        '{"pattern": 1, "key": "local:alias/x"}',
        '{"pattern": "a", "key": "x"}\n{"pattern": "a", "key": "y"}',
        '{"pattern": "a", "key": "x"}\nmore',
    ],
)
def test_what_is_no_key_map(tmp_path, text):
    (tmp_path / "map").write_text(text)
    with pytest.raises(ValueError, match="map: "):
        read_key_map(tmp_path / "map")


def test_a_key_map_that_is_not_there(tmp_path):
    with pytest.raises(sc.SourceError, match="cannot be read"):
        read_key_map(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_key_map(tmp_path / "binary")


def test_a_bad_reference_shows_before_any_work(local):
    with pytest.raises(ValueError, match="not a key reference"):
        key_map({"a/*": "nonsense"})
