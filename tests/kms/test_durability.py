"""A key that was returned is never lost: SIGKILL at any statement, power loss at any write.

The same with every system call and thousands of images: ``tests/campaigns/test_kms_durability.py``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import keywork
from families.crashes import Recording, record

from streamcrypt.errors import KeyAccessError
from streamcrypt.kms import open_service

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="STRACE IS MISSING: no crash images")
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: what the disk keeps is worked out, not waited for."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sigkill_at_statements(memory: Path):
    """Every fourth statement of the store's making and of the first key, then every seventeenth."""
    number, ended = 0, False
    while not ended:
        number += 4 if number < 45 else 17
        home = memory / str(number)
        ended, told = keywork.killed_at_statement(number, home)
        assert keywork.lost(home, told) == [], f"statement {number}"
        shutil.rmtree(home)
    assert len(told) == 9


def recorded(memory: Path, *program: str) -> Recording:
    """The work, done by ``python PROGRAM HOME``."""
    home = memory / "recorded"
    shutil.rmtree(home, ignore_errors=True)
    (home / "kms").mkdir(parents=True, mode=0o700)
    program = (sys.executable, *program, str(home))
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "PYTHONHASHSEED": "0"}
    return record(list(program), home / "kms", memory / "log", env=environment)


def lost_in_image(recording: Recording, memory: Path, until: int, losing: str, seed: int = 0) -> list[Any]:
    home = memory / "image"
    shutil.rmtree(home, ignore_errors=True)
    (home / "kms").mkdir(parents=True, mode=0o700)
    recording.image(home / "kms", until, losing, seed)
    return keywork.lost(home, recording.told(until))


@needs_strace
def test_power_loss(memory: Path):
    """Just after each thing that was told: what was not flushed is lost, or some of it, or nothing."""
    recording = recorded(memory, keywork.__file__)
    events = recording.events
    moments = [number + 1 for number, event in enumerate(events) if event.kind == "told"]
    assert len(moments) == 9
    for until in moments:
        for seed, losing in enumerate(("all", "none", *["some"] * 8)):
            assert lost_in_image(recording, memory, until, losing, seed) == [], (until, losing, seed)
    between = range(moments[0], len(events), max(1, len(events) // 40))
    for until in between:
        assert lost_in_image(recording, memory, until, "some") == [], until


CARELESS = """
import sqlite3
from families import keywork

class Connection(sqlite3.Connection):
    def execute(self, statement, *values):
        return super().execute(statement.replace("synchronous=FULL", "synchronous=NORMAL"), *values)

connect = sqlite3.connect
sqlite3.connect = lambda *words, **options: connect(*words, factory=Connection, **options)
keywork.main()
"""


@needs_strace
def test_the_images_show_a_store_that_does_not_flush(memory: Path):
    recording = recorded(memory, "-c", CARELESS)
    first, *_, last = [number for number, event in enumerate(recording.events) if event.kind == "told"]
    with pytest.raises(KeyAccessError, match="the database is empty although its root key"):
        lost_in_image(recording, memory, 1 + first, "all")
    assert lost_in_image(recording, memory, 1 + last, "all")


def test_the_names_of_a_new_home_are_durable(tmp_path: Path, flushed: list[str]):
    """Those of the folders above it too: a power loss must not take all keys with a folder's name."""
    service = open_service(tmp_path / "share" / "home")
    service.create_key()
    service.close()
    assert {str(tmp_path), str(tmp_path / "share"), str(tmp_path / "share" / "home")} <= set(flushed)
