"""Campaigns on file systems: a full one, one that loses power, one whose folders are swapped for links
(RELIABILITY 11, 15, 16).  They mount, so they need root (or are skipped)."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from families.keyrings import CRAFT_KEYRING as KEYS
from families.trees import (
    assert_nothing_partial,
    assert_nothing_partial_decrypted,
    leftovers,
    make_tree,
    read_tree,
)

import streamcrypt as sc
from streamcrypt.engine.spans import MANIFEST

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None, reason="mounting needs root and e2fsprogs"
)
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

FILES = {"a": 100_000, "b": 0, "sub/c": 1_500_000, "sub/d": 30_000}


@contextlib.contextmanager
def mounted(what: str, where: Path, *options: str):
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, what, where], check=True)
    try:
        yield where
    finally:
        gc.collect()  # folders that the tracebacks of failed jobs still hold open
        subprocess.run(["umount", where], check=True)


@needs_mounts
def test_full_disk(campaign, tmp_path):
    """A tmpfs of 4 MiB, filled to every level in steps of 16 KiB: clean failure or whole success."""
    campaign_run = campaign("15")
    contents = make_tree(tmp_path / "in", FILES)
    sc.encrypt(tmp_path / "in", tmp_path / "complete", keys=KEYS)
    size, step = 4 * 2**20, 16 * 2**10
    failed = succeeded = 0
    with mounted("tmpfs", tmp_path / "disk", "-t", "tmpfs", "-o", f"size={size}") as disk:
        (disk / "kept").write_bytes(b"old")
        levels = list(range(size // step))
        if campaign_run.number(len(levels)) < len(levels):
            levels = random.Random(campaign_run.seed).sample(levels, campaign_run.number(len(levels)))
        for level in levels:
            for operation in ("encrypt", "decrypt", "overwrite"):
                failure = None
                with open(disk / "filler", "wb") as filler, contextlib.suppress(OSError):
                    filler.write(bytes(level * step))
                target = disk / "target"
                try:
                    if operation == "overwrite":
                        sc.encrypt(tmp_path / "in" / "sub/c", disk / "kept", keys=KEYS, overwrite=True)
                    else:
                        source = tmp_path / ("in" if operation == "encrypt" else "complete")
                        getattr(sc, operation)(source, target, keys=KEYS)
                    done = True
                except sc.StreamcryptError:
                    done = False
                except BaseException as error:
                    done, failure = False, f"{type(error).__name__}: {error}"
                try:
                    if operation == "encrypt":
                        found = assert_nothing_partial(target, contents, KEYS)
                    elif operation == "decrypt":
                        found = assert_nothing_partial_decrypted(target, contents)
                    else:
                        found = len(contents) if done else 0
                        kept = (disk / "kept").read_bytes()
                        whole = sc.decrypt_bytes(kept, keys=KEYS) if done else kept
                        if whole != (contents["sub/c"] if done else b"old"):
                            failure = "the file that was there is lost"
                    if done and found != len(contents):
                        failure = "success of an incomplete job"
                    if leftovers(disk):
                        failure = "temporary files were left"
                except BaseException as error:
                    failure = f"partial: {error!r}"
                failed, succeeded = failed + (not done), succeeded + done
                (disk / "filler").unlink()
                shutil.rmtree(target, ignore_errors=True)
                (disk / "kept").write_bytes(b"old")
                campaign_run.trial(failure, level=level * step, operation=operation, done=done)
    campaign_run.notes = {"failed_cleanly": failed, "succeeded": succeeded}
    campaign_run.finish()


@needs_mounts
@pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="an atomic snapshot needs xfsprogs (reflink)")
@pytest.mark.parametrize("system", ["ext4", "xfs"])
def test_crash_images(campaign, tmp_path, system):
    """What a power loss would leave: the disk image is snapshotted while jobs write to it.

    The image lies on an XFS that clones files atomically, so a snapshot is what the disk held at one
    moment.  Each is mounted (the journal replays) and looked at: no name holds anything but a whole
    file, and every job that had been reported done is complete.
    """
    campaign_run = campaign("16")
    rng = random.Random(campaign_run.seed)
    contents = make_tree(tmp_path / "in", FILES)
    outer_image = Path("/dev/shm") / f"crash-{os.getpid()}-{system}"
    lost = {"by us": 0, "without fsync": 0}
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(lambda: outer_image.unlink(missing_ok=True))
        subprocess.run(["truncate", "-s", "4G", outer_image], check=True)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", outer_image], check=True)
        outer = cleanup.enter_context(mounted(str(outer_image), tmp_path / "outer", "-o", "loop"))
        image = outer / "disk"
        subprocess.run(["truncate", "-s", "400M", image], check=True)
        quiet = ["-q"] if system == "ext4" else ["-q", "-f"]
        subprocess.run([f"mkfs.{system}", *quiet, image], check=True)
        disk = cleanup.enter_context(mounted(str(image), tmp_path / "disk", "-o", "loop"))
        done: list[str] = []
        stop = threading.Event()

        def work():
            number = 0
            while not stop.is_set():
                number += 1
                name = f"job{number}"
                sc.encrypt(tmp_path / "in", disk / name, keys=KEYS, workers=1)
                done.append(name)
                # The control: written and renamed, never flushed.
                (disk / f"control{number}.tmp").write_bytes(b"x" * 50_000)
                (disk / f"control{number}.tmp").rename(disk / f"control{number}")
                if number > 12:
                    old = number - 12
                    with contextlib.suppress(ValueError):
                        done.remove(f"job{old}")
                    shutil.rmtree(disk / f"job{old}")
                    (disk / f"control{old}").unlink()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for number in range(campaign_run.number(100)):
                time.sleep(rng.uniform(0, 0.05))
                before = list(done)
                snapshot = outer / "snapshot"
                subprocess.run(["cp", "--reflink=always", image, snapshot], check=True)
                still = set(done)
                failure = None
                options = "loop" if system == "ext4" else "loop,nouuid"
                with mounted(str(snapshot), tmp_path / "crashed", "-o", options) as crashed:
                    try:
                        for job in crashed.glob("job*"):
                            assert_nothing_partial(job, contents, KEYS)
                        for name in before:
                            if name not in still:
                                continue  # it was being removed
                            if not (crashed / name / MANIFEST).exists() or assert_nothing_partial(
                                crashed / name, contents, KEYS
                            ) != len(contents):
                                failure = f"{name} was reported done and is not whole"
                    except BaseException as error:
                        failure = f"partial: {error!r}"
                    for control in crashed.glob("control*"):
                        if control.suffix != ".tmp" and control.stat().st_size != 50_000:
                            lost["without fsync"] += 1
                snapshot.unlink()
                lost["by us"] += failure is not None
                campaign_run.trial(failure, image=number, done=len(before))
        finally:
            stop.set()
            worker.join()
    campaign_run.notes = {"file_system": system, "lost": lost}
    campaign_run.finish()


def test_folders_swapped_for_links(campaign, tmp_path):
    """While a job runs, its folders are swapped for links to the outside and back: nothing outside is
    read or written."""
    campaign_run = campaign("11")
    make_tree(tmp_path / "in", {"d/a": 10, "d/b": 2000, "e/c": 10})
    make_tree(tmp_path / "outside", {"a": 10, "b": 2000, "c": 10}, seed=2)
    secrets = set(read_tree(tmp_path / "outside").values())
    target, stop = tmp_path / "target", threading.Event()
    swaps = 0

    def swap():
        nonlocal swaps
        while not stop.is_set():
            for folder in (target / "d", tmp_path / "in" / "d"):
                aside = folder.with_name("aside")
                with contextlib.suppress(OSError):
                    folder.rename(aside)
                    folder.symlink_to(tmp_path / "outside")
                    swaps += 1
                with contextlib.suppress(OSError):
                    folder.unlink()
                with contextlib.suppress(OSError):
                    aside.rename(folder)

    swapper = threading.Thread(target=swap)
    swapper.start()
    before = read_tree(tmp_path / "outside")
    refused = 0
    try:
        for _ in range(campaign_run.number(10_000)):
            failure = None
            try:
                sc.encrypt(tmp_path / "in", target, keys=KEYS, overwrite=True, workers=1, fsync=False)
            except sc.StreamcryptError:
                refused += 1
            except BaseException as error:
                failure = f"{type(error).__name__}: {error}"
            if read_tree(tmp_path / "outside") != before:
                failure = "written outside the root"
            for path in (target / "d").glob("*") if not (target / "d").is_symlink() else ():
                with contextlib.suppress(OSError, sc.StreamcryptError):
                    if sc.decrypt_bytes(path.read_bytes(), keys=KEYS) in secrets:
                        failure = "read outside the root"
            campaign_run.trial(failure, quiet=True)
    finally:
        stop.set()
        swapper.join()
    campaign_run.notes = {"swaps": swaps, "refused": refused}
    campaign_run.finish()
