"""Campaigns of SIGKILL: the whole job, and one worker (RELIABILITY 12)."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from families.keyrings import CRAFT_KEYRING as KEYS
from families.processes import child_processes, is_running
from families.trees import (
    assert_nothing_partial,
    assert_nothing_partial_decrypted,
    leftovers,
    make_tree,
    read_tree,
)

import streamcrypt as sc
from streamcrypt.engine import run

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

# Files of one frame go several at a time, those of several one by one; in one list both take turns.
FILES = {f"{i % 10}/f{i}": 16 * 2**10 if i % 8 else 5 * 2**19 for i in range(80)}


def start(operation: str, source: Path, target: Path) -> int:
    """The job in a process of its own; returns its pid.  Exit status 0: done.

    Forked, so that a trial does not pay for the imports; the job is told that worker processes pay
    for a job of any size, and starts two of them.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run.processes_pay = lambda files, frames: True
        getattr(sc, operation)(source, target, keys=KEYS, workers=2, overwrite=True)
        status = 0
    finally:
        os._exit(status)


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Shared memory that these processes have mapped or open, by the names that Python gives.

    The folder itself belongs to the whole machine and says nothing about one job.
    """
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/maps").read_text()
            text += " ".join(os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
            found.update(re.findall(r"/dev/shm/((?:psm_|sem\.|pym-)[\w.-]+)", text))
    return found


def ended(pid: int) -> int | None:
    """The wait status of a child that has ended, None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_thousand_kills_of_the_parent(campaign, tmp_path):
    campaign_run = campaign("12")
    rng = random.Random(campaign_run.seed)
    contents = make_tree(tmp_path / "in", FILES)
    sc.encrypt(tmp_path / "in", tmp_path / "complete", keys=KEYS, fsync=False)
    interrupted = left = with_workers = 0
    started = time.monotonic()
    _, status = os.waitpid(start("encrypt", tmp_path / "in", tmp_path / "encrypt"), 0)
    assert status == 0
    longest = 1.1 * (time.monotonic() - started)
    for number in range(campaign_run.number(1_000)):
        operation = ("encrypt", "decrypt")[number % 2]
        source = tmp_path / ("in" if operation == "encrypt" else "complete")
        target = tmp_path / operation
        if rng.random() < 0.3:
            shutil.rmtree(target, ignore_errors=True)
        pid = start(operation, source, target)
        delay = rng.uniform(0, longest)
        started, status = time.monotonic(), None
        children: set[int] = set()
        shared: set[str] = set()
        while time.monotonic() < started + delay and (status := ended(pid)) is None:
            children.update(child_processes(pid))
            shared |= shared_memory((pid, *children))
            time.sleep(0.01)
        if status is None:
            children.update(child_processes(pid))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        done = status == 0
        if os.WIFEXITED(status) and status:
            campaign_run.trial(f"{operation} failed by itself")
        interrupted += not done
        with_workers += bool(children)
        failure = None
        if not gone(list(children), 5.0):
            failure = "orphan processes after 5 s"
        try:
            if operation == "encrypt":
                assert_nothing_partial(target, contents, KEYS)
            else:
                assert_nothing_partial_decrypted(target, contents)
        except BaseException as error:
            failure = f"partial: {error!r}"
        left += bool(leftovers(target))
        if any(Path("/dev/shm", name).exists() for name in shared):
            failure = "shared memory leaked"
        campaign_run.trial(
            failure, operation=operation, delay=round(delay, 3), done=done, workers=len(children)
        )
    if not with_workers:
        campaign_run.trial("no job had a worker process")
    for operation, source in (("encrypt", "in"), ("decrypt", "complete")):
        getattr(sc, operation)(tmp_path / source, tmp_path / operation, keys=KEYS, overwrite=True)
        if leftovers(tmp_path / operation):
            campaign_run.trial("the next run did not remove what was left over")
    if read_tree(tmp_path / "decrypt") != contents:
        campaign_run.trial("the next run did not finish the job")
    campaign_run.notes = {
        "interrupted": interrupted, "with_workers": with_workers, "with_leftovers": left, "job_seconds": longest,
    }  # fmt: skip
    campaign_run.finish()


def test_thousand_kills_of_workers(campaign, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "processes_pay", lambda files, frames: True)
    campaign_run = campaign("12")
    rng = random.Random(campaign_run.seed)
    contents = make_tree(tmp_path / "in", FILES)
    wanted, jobs = campaign_run.number(1_000), 0
    while campaign_run.trials < wanted:
        target = tmp_path / "out"
        shutil.rmtree(target, ignore_errors=True)
        stop, kills = threading.Event(), 0

        def kill(stop=stop):
            nonlocal kills
            while not stop.is_set() and kills < 4:
                children = child_processes()
                if not children:
                    stop.wait(0.002)
                    continue
                stop.wait(rng.uniform(0, 0.35))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(children), signal.SIGKILL)
                    kills += 1

        thread = threading.Thread(target=kill)
        thread.start()
        failure, started = None, time.monotonic()
        try:
            sc.encrypt(tmp_path / "in", target, keys=KEYS, workers=2)
        except sc.StreamcryptError as error:
            # A file that lost its worker three times fails by name; anything else is a finding.
            if "each time it had this file" not in str(error):
                failure = f"{type(error).__name__}: {error}"
        finally:
            stop.set()
            thread.join()
        try:
            found = assert_nothing_partial(target, contents, KEYS)
        except BaseException as error:
            found, failure = 0, f"partial: {error!r}"
        if leftovers(target):
            failure = "temporary files were left"
        if not gone(child_processes(), 5.0):
            failure = "worker processes were left"
        jobs += 1
        campaign_run.trial(failure, count=kills, files=found, seconds=round(time.monotonic() - started, 2))
    campaign_run.notes = {"jobs": jobs}
    campaign_run.finish()
