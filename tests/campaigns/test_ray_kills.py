"""Campaigns of SIGKILL on a Ray cluster: workers, nodes, and the driver, whose job is then resumed (RELIABILITY 12)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from families.trees import leftovers, make_tree, read_tree

import streamcrypt as sc

ray = pytest.importorskip("ray", reason="RAY IS MISSING: its campaigns were not run")

from families.clusters import (  # noqa: E402
    WARNINGS,
    add_node,
    credentials,
    kill_node,
    ray_cluster,
    served_kms,
    workers_of,
)

from streamcrypt.engine import remote  # noqa: E402

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(0),
    *(pytest.mark.filterwarnings(warning) for warning in WARNINGS),
]

# Many lists, some long ones among them.
FILES = {f"{n % 5}/f{n:03}": 300_000 for n in range(200)} | {f"big{n}": 6_000_000 for n in range(5)}


@pytest.fixture
def cluster(tmp_path):
    """Two nodes and their key."""
    with served_kms(tmp_path / "kms") as (service, url):
        key = service.create_key()["KeyMetadata"]["KeyId"]
        service.create_alias(AliasName="alias/ml", TargetKeyId=key)
        variables = {"STREAMCRYPT_HOME": str(tmp_path / "empty"), **credentials(service, None)}
        with ray_cluster(variables) as made:
            for _ in range(2):
                add_node(made)
            yield made, f"local:alias/ml@{url}"


def judged(root: Path, contents: dict[str, bytes], key: str, report: object) -> str | None:
    """What is wrong with a finished job."""
    found = set(read_tree(root))
    if found != {*contents, "_streamcrypt/manifest"}:
        return f"names: {sorted(found ^ {*contents, '_streamcrypt/manifest'})[:3]}"
    if report is not None and report["files"] + report["skipped"] != len(contents):  # type: ignore[index]
        return f"{report['files']} files are reported"  # type: ignore[index]
    if leftovers(root):
        return "temporary files were left"
    try:
        sc.verify(root, against=root.parent / "in", keys=key)
    except sc.StreamcryptError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_kills_of_workers_and_nodes(campaign, cluster, tmp_path):
    made, key = cluster
    campaign_run = campaign("12")
    rng = random.Random(campaign_run.seed)
    contents = make_tree(tmp_path / "in", FILES)
    given_up = nodes_killed = workers_killed = 0
    for number in range(campaign_run.number(200)):
        target = tmp_path / "out"
        shutil.rmtree(target, ignore_errors=True)
        begun, over, kills = threading.Event(), threading.Event(), []
        first = rng.randrange(len(FILES))

        def kill(number=number, begun=begun, over=over, kills=kills):
            begun.wait()
            for _ in range(rng.randint(1, 4)):
                if over.wait(rng.uniform(0, 0.1)):
                    return
                if number % 2:
                    kill_node(made, rng.choice(sorted(made.worker_nodes, key=id)))
                    kills.append("node")
                    return
                for pid in rng.sample(found := workers_of(made), min(1, len(found))):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        kills.append("worker")

        def progress(state, first=first, begun=begun):
            if state.files >= first:
                begun.set()

        thread = threading.Thread(target=kill)
        thread.start()
        report, failure = None, None
        try:
            report = sc.encrypt(
                tmp_path / "in", target, keys=key, engine="ray", fsync=False, progress=progress
            )
        except sc.StreamcryptError as error:
            # A file that lost its worker three times fails by name; anything else is a finding.
            given_up += 1
            if "each time it had this file" not in str(error):
                failure = f"{type(error).__name__}: {error}"
        finally:
            over.set()
            begun.set()
            thread.join()
        if report is not None:
            failure = judged(target, contents, key, report)
        nodes_killed += kills.count("node")
        workers_killed += kills.count("worker")
        campaign_run.trial(failure, kills=kills, done=report is not None)
        while len(made.worker_nodes) < 2:
            add_node(made)
    campaign_run.notes = {"workers": workers_killed, "nodes": nodes_killed, "given_up": given_up}
    campaign_run.finish()


def test_kills_of_the_driver(campaign, cluster, tmp_path):
    made, key = cluster
    campaign_run = campaign("12")
    rng = random.Random(campaign_run.seed)
    contents = make_tree(tmp_path / "in", FILES)
    interrupted = 0
    for number in range(campaign_run.number(100)):
        target = tmp_path / "out"
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "streamcrypt", "encrypt", tmp_path / "in", target, "--key", key]
        command += ["--engine", "ray", "--address", made.address, "--no-fsync", "--quiet"]
        with subprocess.Popen(list(map(str, command))) as driver:
            deadline = time.monotonic() + 60
            # From the moment when there is a destination, or when the first files are finished.
            begun = target if number % 3 == 0 else target / "_streamcrypt" / "journal"
            while not begun.exists() and driver.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(rng.uniform(0, 0.5))
            driver.kill()
        interrupted += driver.returncode != 0
        report = None
        if driver.returncode != 0:
            words = [*command, "--resume", "--json"]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
            failure = f"resuming: {done.stderr}" if done.returncode else None
            report = json.loads(done.stdout)
        else:
            failure = None
        failure = failure or judged(target, contents, key, report)
        campaign_run.trial(failure, interrupted=driver.returncode != 0, skipped=report and report["skipped"])
    campaign_run.notes = {"interrupted": interrupted}
    campaign_run.finish()


def test_every_node_is_killed(campaign, cluster, tmp_path, monkeypatch):
    made, key = cluster
    campaign_run = campaign("12")
    monkeypatch.setattr(remote, "_NO_NODE", 5.0)
    monkeypatch.setattr(remote, "_LOOK", 1.0)
    contents = make_tree(tmp_path / "in", FILES)
    for _ in range(campaign_run.number(10)):
        target = tmp_path / "out"
        shutil.rmtree(target, ignore_errors=True)

        def kill(progress):
            for node in list(made.worker_nodes):
                kill_node(made, node)

        failure = None
        try:
            sc.encrypt(tmp_path / "in", target, keys=key, engine="ray", fsync=False, progress=kill)
            failure = "the job ended well without any node"
        except sc.TemporaryError:
            pass
        if leftovers(target):
            failure = "temporary files were left"
        for _ in range(2):
            add_node(made)
        report = sc.encrypt(tmp_path / "in", target, keys=key, engine="ray", fsync=False, resume=True)
        failure = failure or judged(target, contents, key, report)
        campaign_run.trial(failure, skipped=report["skipped"])
    campaign_run.finish()
