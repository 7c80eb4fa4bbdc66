"""Campaigns on resources: a tree of a million names, a file of 1 TiB (RELIABILITY 30)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import craft
from families.processes import child_processes, peak_memory
from families.trees import leftovers

import streamcrypt as sc

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

REPOSITORY = str(Path(sc.__file__).parents[1])
MiB = 2**20
# The job and its two workers together, the package and its libraries included in each of them.
BOUND = 500 * MiB


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(craft.WRAPPING_KEY)
    path.chmod(0o600)
    return f"raw-aes:{craft.NAMESPACE}/{craft.NAME}@{path}"


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "streamcrypt", *map(str, words)],
        env=os.environ | {"PYTHONPATH": REPOSITORY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def watched(process):
    """The peak memory in bytes of a process and all that it starts, by process, until it ends."""
    peaks = {}
    while process.poll() is None:
        for pid in (process.pid, *child_processes(process.pid)):
            peaks[pid] = max(peaks.get(pid, 0), peak_memory(pid))
        time.sleep(0.1)
    return peaks


def test_million_names(campaign, tmp_path, key):
    """Names spread over 1,000 folders; the files are one byte or nothing, and links of each other, so that
    the machine's memory holds the trees and not the files (basetemp should be a tmpfs)."""
    run = campaign("30")
    folders, names = 1000, run.number(1000)
    source = tmp_path / "in"
    for content in (b"", b"x"):
        (tmp_path / f"content{len(content)}").write_bytes(content)
    for folder in range(folders):
        (source / f"{folder:04}").mkdir(parents=True)
        for name in range(names):
            os.link(tmp_path / f"content{folder % 2}", source / f"{folder:04}" / f"name-{name:06}.bin")
    common = ("--key", key, "--workers", "2", "--json")
    encrypted, plain = tmp_path / "enc", tmp_path / "dec"
    figures = {}
    for operation, words in {
        "encrypt": (source, encrypted, "--no-fsync"),
        "verify": (encrypted,),
        "decrypt": (encrypted, plain, "--no-fsync"),
    }.items():
        process = start(operation, *words, *common)
        peaks = watched(process)
        out, err = process.communicate()
        total, failure = sum(peaks.values()), None
        if process.returncode != 0:
            failure = f"{operation} ended with {process.returncode}: {err[-500:]}"
        elif json.loads(out)["files"] != folders * names:
            failure = f"{operation}: {json.loads(out)['files']} files of {folders * names}"
        elif total > BOUND:
            failure = f"{operation}: {total / MiB:.0f} MiB in {len(peaks)} processes"
        figures[operation] = {
            "parent_mib": round(peaks.get(process.pid, 0) / MiB, 1),
            "all_mib": round(total / MiB, 1),
            "processes": len(peaks),
        }
        run.trial(failure, count=folders * names, operation=operation, **figures[operation])
    run.notes = {"memory": figures}
    run.finish()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_the_beginning_of_a_tebibyte(campaign, tmp_path, key):
    """A sparse file of 1 TiB is encrypted until the first GiB or so is written, then killed: memory stays
    flat, nothing has the final name, and the next run removes what was left.

    The target lies on a ramfs: that has no call to claim room, and so takes a file larger than itself.
    """
    run = campaign("30")
    disk = tmp_path / "disk"
    disk.mkdir()
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    subprocess.run(["mount", "-t", "ramfs", "ramfs", disk], check=True)
    peak = written = 0
    try:
        for number in range(run.number(10)):
            process = start(
                "encrypt", tmp_path / "huge", disk / "enc", "--key", key, "--workers", "2", "--quiet"
            )
            written, failure = 0, None
            while process.poll() is None and written < 2**30:
                time.sleep(0.01)
                pids = (process.pid, *child_processes(process.pid))
                peak = max(peak, sum(map(peak_memory, pids)))
                written = sum(Path(path).stat().st_blocks * 512 for path in leftovers(disk))
            process.kill()
            _, err = process.communicate()
            if process.returncode >= 0:
                failure = f"it ended by itself: {err[-300:]}"
            elif (disk / "enc").exists():
                failure = "a partial message has the final name"
            elif peak > BOUND:
                failure = f"{peak / MiB:.0f} MiB"
            (disk / "small").write_bytes(b"x")
            sc.encrypt(disk / "small", disk / "small.enc", keys=key, overwrite=True)
            if leftovers(disk):
                failure = failure or "the next run did not remove what was left"
                for path in leftovers(disk):
                    os.unlink(path)
            run.trial(failure, number=number, written=written)
    finally:
        subprocess.run(["umount", disk], check=True)
        shutil.rmtree(disk)
    run.notes = {"peak_mib": round(peak / MiB, 1)}
    run.finish()
