"""Every system call of a three-file job, killed at once and failed at once (RELIABILITY 13, 14, 16).

``strace`` attaches to a job that is ready to start and tampers with the N-th call of one kind.  The
job's tasks run in its main thread, so that the N-th call is always the same one and N = 1, 2, 3 … until
a run meets no fault enumerates all of them.
"""

from __future__ import annotations

import collections
import random
import re
import shutil

import pytest
from families.keyrings import CRAFT_KEYRING as KEYS
from families.traced import FAULTS, Traced, calls_of, injection
from families.trees import (
    assert_nothing_partial,
    assert_nothing_partial_decrypted,
    leftovers,
    make_tree,
    read_tree,
)

import streamcrypt as sc
from streamcrypt.engine import run
from streamcrypt.engine.spans import MANIFEST
from streamcrypt.engine.worker import Worker

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(0),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

FILES = {"a": 100_000, "b": 0, "sub/c": 3_000_000}
CALLS = (
    "openat", "close", "fstat", "newfstatat", "statx", "flock", "ftruncate", "fallocate",
    "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "write", "fsync", "fdatasync",
    "link", "linkat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "getdents64",
    "fcntl", "dup", "lseek",
)  # fmt: skip


class InlinePool:
    """Does each list of tasks at once, in the thread that submits it."""

    has_room = True

    def __init__(self, setup, workers, *, in_turns=False):
        self._worker = Worker(setup)
        self._results = []

    @property
    def busy(self):
        return bool(self._results)

    def submit(self, tasks):
        self._results.append(list(self._worker.take(tasks)))

    def collect(self):
        return self._results.pop()

    def close(self, *, cancel=False):
        self._worker.close()


def job(operation, source, target):
    """The job, with its tasks in this thread."""

    def work():
        run.ThreadPool = InlinePool
        getattr(sc, operation)(source, target, keys=KEYS, workers=1, overwrite=True)

    return work


@pytest.fixture
def trees(tmp_path):
    contents = make_tree(tmp_path / "in", FILES)
    sc.encrypt(tmp_path / "in", tmp_path / "complete", keys=KEYS)
    return tmp_path, contents


def violated(operation, target, contents, status):
    """What does not hold of the target, or None."""
    try:
        if operation == "encrypt":
            found = assert_nothing_partial(target, contents, KEYS)
        else:
            found = assert_nothing_partial_decrypted(target, contents)
    except BaseException as error:
        return f"partial: {error!r}"
    if status is None:
        return "hangs"
    if status == 11:
        return "an exception that is none of ours"
    if status == 0 and (
        found != len(contents) or (operation == "encrypt" and not (target / MANIFEST).exists())
    ):
        return "success was reported of a job that is not complete"
    return None


@pytest.mark.parametrize("operation", ["encrypt", "decrypt"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_system_call(campaign, trees, fault, operation):
    campaign_run = campaign("13" if fault == "KILL" else "14")
    rng = random.Random(campaign_run.seed)
    root, contents = trees
    source = root / ("in" if operation == "encrypt" else "complete")
    counts, _ = calls_of(job(operation, source, root / "counted"), CALLS, root / "log")
    sites = [(call, number) for call, count in sorted(counts.items()) for number in range(1, count + 1)]
    if campaign_run.number(len(sites)) < len(sites):
        sites = rng.sample(sites, campaign_run.number(len(sites)))
    statuses = collections.Counter()
    for call, number in sites:
        target = root / "target"
        shutil.rmtree(target, ignore_errors=True)
        status = Traced(job(operation, source, target), *injection(fault, call, number)).wait()
        statuses[str(status)] += 1
        failure = violated(operation, target, contents, status)
        left = len(leftovers(target))
        if failure is None:  # and the next run finishes the job and tidies up
            getattr(sc, operation)(source, target, keys=KEYS, overwrite=True)
            if leftovers(target):
                failure = "the next run left temporary files"
            if operation == "decrypt" and read_tree(target) != contents:
                failure = "the next run did not finish the job"
        campaign_run.trial(
            f"{fault} at {call} {number}: {failure}" if failure else None,
            call=call, number=number, fault=fault, operation=operation, status=status, leftovers=left,
        )  # fmt: skip
    campaign_run.notes = {
        "operation": operation,
        "fault": fault,
        "statuses": dict(statuses),
        "calls": dict(counts),
    }
    campaign_run.finish()


def test_order_of_writes_and_flushes(campaign, trees):
    """The log as an oracle: every write of a file before its fsync, before its name, before its folder's
    fsync; the manifest after all of them (RELIABILITY 16, second method)."""
    campaign_run = campaign("16")
    root, contents = trees
    for operation in ("encrypt", "decrypt"):
        source = root / ("in" if operation == "encrypt" else "complete")
        target = root / f"ordered {operation}"
        _, lines = calls_of(job(operation, source, target), CALLS, root / "log")
        written, flushed, named = {}, {}, {}
        folders = {}
        for at, line in enumerate(lines):
            temporary = re.search(r"(\.streamcrypt-[0-9a-f]+\.tmp)|/#(\d+)", line)
            name = temporary[1] or temporary[2] if temporary else None  # small files have numbers, no names
            if re.search(r"\bpwrite(64|v2?)\(", line) and name:
                written[name] = at
            elif "fsync(" in line:
                path = re.search(r"fsync\(\d+<([^>]*)>", line)
                if name:
                    flushed[name] = at
                elif path:
                    folders[path[1]] = at
            elif re.search(r"\b(link|rename)(at2?)?\(.* = 0", line) and name:
                named[name] = at
        assert len(named) >= len(contents)
        for name, at in named.items():
            failure = None
            if not written.get(name, -1) < flushed.get(name, -1) < at:
                failure = f"{name} has its name before it was flushed"
            elif not any(at < folder for folder in folders.values()):
                failure = f"{name}: its folder was not flushed after it got its name"
            campaign_run.trial(failure, operation=operation)
    campaign_run.finish()
