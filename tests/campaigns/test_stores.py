"""Campaigns on an object store: outages, kills and resumed jobs, a million keys (RELIABILITY 18, 28, 30)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from families.campaign import Campaign
from families.s3 import Bucket, MiB, bucket, client, key, listed, outage, server
from families.trees import make_tree

import streamcrypt as sc
from streamcrypt import stores

__all__ = ["bucket", "client", "key", "server"]  # the fixtures

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]

OUTAGE, COST = 60.0, 65.0  # seconds

JOB = """
import sys
import streamcrypt as sc
operation, source, destination, keys = sys.argv[1:]
getattr(sc, operation)(source, destination, workers=4, keys=keys, resume=True)
"""


def test_an_outage_of_a_minute_costs_little_more(
    campaign: Callable[[str], Campaign],
    bucket: Bucket,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    campaign_18 = campaign("18")
    monkeypatch.delenv(stores.RETRY_VARIABLE)
    rng = random.Random(campaign_18.seed)
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number:02}").write_bytes(rng.randbytes(1000))
    (source / "large").write_bytes(rng.randbytes(17 * MiB))

    def job(number: int | str) -> float:
        started = time.monotonic()
        sc.encrypt(source, f"{bucket.url}/{number}", keys=key, fsync=False)
        return time.monotonic() - started

    worst = 0.0
    for number in range(campaign_18.number(10)):
        kind, after = rng.choice([503, 500, "drop"]), rng.randint(1, 30)
        usual = job(f"usual-{number}")  # just before: other work on the machine is not the outage's cost
        bucket.proxy.fault = outage(kind, OUTAGE, after=after)
        try:
            cost = job(number) - usual
        except sc.StreamcryptError as error:
            campaign_18.trial(f"{kind} after {after} requests: {error}")
            continue
        finally:
            bucket.proxy.fault = lambda method, path: None
        worst = max(worst, cost)
        failure = f"{kind} after {after} requests cost {cost:.1f} s" if cost > COST else None
        if sc.verify(f"{bucket.url}/{number}", against=source).files != 21:
            failure = "not all files are there"
        campaign_18.trial(failure, kind=kind, after=after, cost=round(cost, 1))
    campaign_18.notes |= {"worst_cost_seconds": round(worst, 1)}
    campaign_18.finish()


def test_a_job_that_is_killed_again_and_again_is_finished_by_resuming(
    campaign: Callable[[str], Campaign], bucket: Bucket, key: str, tmp_path: Path
) -> None:
    """Each trial: kills at random times, each followed by --resume, until a run comes through."""
    campaign_28 = campaign("28")
    rng = random.Random(campaign_28.seed)
    source = tmp_path / "source"
    make_tree(source, {f"{i % 7}/f{i}": 20_000 + i for i in range(60)} | {"large": 17 * MiB})
    for number in range(campaign_28.number(100)):
        operation, place = "encrypt", str(source)
        url, kills = f"{bucket.url}/{number}", 0
        while True:
            process = subprocess.Popen([sys.executable, "-c", JOB, operation, place, url, key])
            try:
                process.wait(rng.uniform(0.5, 6.0) if kills < 6 else 120)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
            if process.wait() == 0:
                break
            kills += 1
            if kills > 7:
                break
        failure = None
        if kills > 7:
            failure = "did not finish"
        else:
            try:
                if sc.verify(url, against=source).files != 61:
                    failure = "not all files are there"
            except sc.StreamcryptError as error:
                failure = str(error)
        left = [name for name in bucket.names() if "_streamcrypt/journal" in name or "/uploads/" in name]
        if bucket.uploads() or left:
            failure = f"left behind: {bucket.uploads()} {left}"
        campaign_28.trial(failure, kills=kills)
    campaign_28.finish()


def test_a_million_keys_are_listed_in_constant_memory(
    campaign: Callable[[str], Campaign], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign_30 = campaign("30")
    count = campaign_30.number(10**6)
    found = listed(count, monkeypatch)
    failure = None if found["count"] == count and found["in_order"] else f"listed {found}"
    if found["grown_mib"] > 32:
        failure = f"memory grew by {found['grown_mib']} MiB"
    campaign_30.trial(failure, keys=found["count"], grown_mib=found["grown_mib"])
    campaign_30.notes |= found
    campaign_30.finish()
