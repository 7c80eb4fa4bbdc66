"""Campaigns on the embedded KMS's database: power loss and SIGKILL at any system call (RELIABILITY 31)."""

from __future__ import annotations

import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import keywork
from families.crashes import CALLS, record

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(0),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
FILES = ("", "kms.sqlite", "kms.sqlite-wal", "kms.sqlite-shm", "kms.root", "kms.root.new", "branch-keys.sqlite3",
         "branch-keys.sqlite3-journal")  # fmt: skip


@pytest.fixture
def memory() -> Iterator[Path]:
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


def fresh(home: Path) -> Path:
    shutil.rmtree(home, ignore_errors=True)
    (home / "kms").mkdir(parents=True, mode=0o700)
    return home


def test_crash_images_of_the_kms(campaign, memory):
    """The disk after a power loss at any write: a random part of what was not flushed is there, some of it torn."""
    run = campaign("31")
    chance = random.Random(run.seed)
    home = fresh(memory / "recorded")
    program = [sys.executable, keywork.__file__, str(home)]
    recording = record(program, home / "kms", memory / "log", env=ENVIRONMENT)
    told = 0
    for number in range(run.number(2_000)):
        until = chance.randint(0, len(recording.events))
        losing = chance.choice(("all", "none", "some", "some", "some"))
        image = fresh(memory / "image")
        failure = None
        try:
            recording.image(image / "kms", until, losing, number)
            told += len(recording.told(until))
            if missing := keywork.lost(image, recording.told(until)):
                failure = f"lost before event {until}, losing {losing}: {missing}"
        except BaseException as error:
            failure = f"before event {until}, losing {losing}: {error!r}"
        run.trial(failure, until=until, losing=losing)
    run.notes = {"events": len(recording.events), "things_told": told}
    run.finish()


def test_sigkill_at_every_system_call_of_the_kms(campaign, memory):
    """strace kills the process at its N-th call of one kind on the store's files, for every kind and N."""
    run = campaign("31")
    home = fresh(memory / "home")
    paths = [word for name in FILES for word in ("-P", str(home / "kms" / name).rstrip("/"))]
    strace = ["strace", "-qq", "-f", "-o", str(memory / "log"), *paths]
    program = [sys.executable, keywork.__file__, str(home)]
    counting = subprocess.run(
        [*strace, "-e", f"trace={CALLS},pread64,fcntl,close,mmap", *program],
        env=ENVIRONMENT, capture_output=True, check=True,
    )  # fmt: skip
    everything = len(counting.stdout.splitlines())
    calls = re.findall(r"^(?:\d+ +)?(\w+)\(", (memory / "log").read_text(), re.MULTILINE)
    sites = [(call, n + 1) for call, count in collections.Counter(calls).items() for n in range(count)]
    if run.number(len(sites)) < len(sites):
        sites = random.Random(run.seed).sample(sites, run.number(len(sites)))
    killed = 0
    for call, number in sites:
        fresh(home)
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}"]
        done = subprocess.run([*strace, *inject, *program], env=ENVIRONMENT, capture_output=True, check=False)
        told = [json.loads(line) for line in done.stdout.splitlines()]
        killed += done.returncode != 0
        failure = None
        try:
            if missing := keywork.lost(home, told):
                failure = f"lost: {missing}"
            elif done.returncode == 0 and len(told) != everything:
                failure = "ended well without having told everything"
        except BaseException as error:
            failure = repr(error)
        run.trial(
            f"{call} {number}: {failure}" if failure else None, call=call, number=number, told=len(told)
        )
    run.notes = {"calls": dict(collections.Counter(calls)), "killed": killed}
    run.finish()


def test_sigkill_at_every_statement_of_the_kms(campaign, memory):
    """The process is killed as its N-th SQL statement begins, for every N."""
    run = campaign("31")
    number, ended = 0, False
    while not ended:
        number += max(1, round(1 / run.number(1_000) * 1_000))
        home = memory / "home"
        shutil.rmtree(home, ignore_errors=True)
        ended, told = keywork.killed_at_statement(number, home)
        failure = None
        try:
            if missing := keywork.lost(home, told):
                failure = f"statement {number}: lost {missing}"
        except BaseException as error:
            failure = f"statement {number}: {error!r}"
        run.trial(failure, statement=number, told=len(told))
    run.notes = {"statements": number - 1}
    run.finish()
