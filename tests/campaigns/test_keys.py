"""Campaigns on keys: uses of a data key over processes and threads, forks, throttling
outages (RELIABILITY 17, 18, 21, 22)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter

import pytest
from families.keyrings import CRAFT_KEYRING
from families.outages import FAULTS, served_through_a_proxy
from families.trees import assert_nothing_partial, make_tree

import streamcrypt as sc
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import DEADLINE
from streamcrypt.keys.materials import Materials
from streamcrypt.message.suites import UNSIGNED
from streamcrypt.streams import OutgoingMessage, header_template

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]


def use(materials, count, uses, ids):
    template = None
    for _ in range(count):
        found = materials.for_encryption(UNSIGNED, {}, 100)
        if template is None or template[0] is not found:
            template = (found, header_template(found, 4096))
        message = OutgoingMessage.begin(found, template[1], 4096)
        ids.append(message.message_id)
        uses.append(found.encrypted_data_keys[0].ciphertext)


def process(count, limit, threads, results):
    materials = Materials(CRAFT_KEYRING, cache=DataKeyCache(max_messages=limit))
    lists = [([], []) for _ in range(threads)]
    running = [threading.Thread(target=use, args=(materials, count // threads, *both)) for both in lists]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    uses = Counter(key for both in lists for key in both[0])
    ids = [message_id for both in lists for message_id in both[1]]
    results.put((dict(uses), len(ids), len(set(ids)), b"".join(ids)))


@pytest.mark.parametrize("limit", [10, 1_000])
def test_million_uses_of_data_keys(campaign, limit):
    """8 processes of 8 threads, one policy: no data key is used more often than the limit says, and
    exactly ceil(messages / limit) of them are asked for; no message id appears twice."""
    run = campaign("21, 22")
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    each = run.number(500_000) // 8 // 8 * 8
    workers = [spawn.Process(target=process, args=(each, limit, 8, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    uses: Counter[bytes] = Counter()
    ids: set[bytes] = set()
    for _ in workers:
        counted, total, different, joined = results.get(timeout=600)
        uses.update(counted)
        ids.update(joined[i : i + 32] for i in range(0, len(joined), 32))
        failure = None
        if total != each or different != each:
            failure = "message ids repeat"
        elif len(counted) != -(-each // limit):
            failure = f"{len(counted)} data keys for {each} messages of limit {limit}"
        run.trial(failure, count=each)
    for worker in workers:
        worker.join()
    if max(uses.values()) > limit:
        run.trial(f"a data key was used {max(uses.values())} times, the limit is {limit}")
    if len(ids) != 8 * each:
        run.trial("message ids repeat over processes")
    run.notes = {"limit": limit, "data_keys": len(uses), "most_uses": max(uses.values())}
    run.finish()


def test_forks(campaign):
    """Forked after warm-up and again mid-run: no data key and no message id is shared."""
    run = campaign("22")
    materials = Materials(CRAFT_KEYRING, cache=DataKeyCache(max_messages=10**6))
    found: list[bytes] = []
    keys: list[bytes] = []
    each = run.number(20_000)
    use(materials, each, keys, found)
    for _ in range(8):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                os.close(reading)
                uses: list[bytes] = []
                ids: list[bytes] = []
                use(materials, each, uses, ids)
                with os.fdopen(writing, "wb") as pipe:
                    pipe.write(b"".join(sorted(set(uses))).ljust(4096, b"\0") + b"".join(ids))
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
        theirs, ids_of_child = data[:4096].rstrip(b"\0"), data[4096:]
        failure = None
        if any(key in theirs for key in set(keys)):
            failure = "a forked child went on with its parent's data key"
        found += [ids_of_child[i : i + 32] for i in range(0, len(ids_of_child), 32)]
        run.trial(failure, count=each)
        use(materials, each // 8, keys, found)
    if len(set(found)) != len(found):
        run.trial("message ids repeat over forks")
    run.notes = {"message_ids": len(found)}
    run.finish()


def test_throttling(campaign, tmp_path, monkeypatch):
    """A KMS that takes 50 requests a second, 32 threads that all need a data key of their own: the quota
    is used, nobody fails, few requests are refused."""
    from families.quota import served_with_quota

    from streamcrypt.keys.calls import KmsStats
    from streamcrypt.keys.reference import encrypting_keyring

    run = campaign("17")
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "home"))
    seconds, quota = max(6.0, 20.0 * run.number(100) / 100), 50
    with served_with_quota(tmp_path / "home", quota) as reference:
        stats = KmsStats()
        keyring = encrypting_keyring(reference, stats=stats)
        done: list[float] = []
        failures: list[str] = []
        begin = time.monotonic()

        def work():
            while time.monotonic() < begin + seconds:
                started = time.monotonic()
                try:
                    keyring.generate(UNSIGNED, {})
                except Exception as error:
                    failures.append(f"{type(error).__name__}: {error}")
                else:
                    done.append(time.monotonic() - started)

        threads = [threading.Thread(target=work) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - begin
    rate, report = len(done) / elapsed, stats.to_json()
    attempts = (len(done) + report["throttled"]) / max(1, len(done))
    for failure in failures or [None]:
        run.trial(failure, count=max(1, len(done)))
    if rate < 0.95 * quota:
        run.trial(f"{rate:.1f} requests a second, the quota is {quota}")
    if attempts > 1.1:
        run.trial(f"{attempts:.2f} attempts per success")
    run.notes = {
        "rate": round(rate, 1), "quota": quota, "throttled": report["throttled"],
        "attempts_per_success": round(attempts, 3), "p99_seconds": round(sorted(done)[int(0.99 * len(done))], 2),
    }  # fmt: skip
    run.finish()


OUTAGE = 60.0  # seconds


def timed_job(root, name, keyring, progress=None):
    """A job of 600 data keys, whose KMS takes its time: how long it took, and its report."""
    started = time.monotonic()
    report = sc.encrypt(
        root / "in", root / name, keys=keyring, workers=2, fsync=False, progress=progress,
        cache=sc.DataKeyCache(max_messages=1),
    )  # fmt: skip
    return time.monotonic() - started, report


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_of_a_minute(campaign, tmp_path, monkeypatch, fault):
    """The KMS goes away in the middle of a job and is back after 60 s.  The job waits, goes on within 5 s
    and costs no more than 65 s beyond what it takes without; or, where its calls do get an answer that is
    too slow to end (drip), it fails as temporary by its deadline, and the next run finishes it."""
    run = campaign("18")
    home = tmp_path / "home"
    monkeypatch.setenv("STREAMCRYPT_HOME", str(home))
    contents = make_tree(tmp_path / "in", {f"{i:04}": 100 for i in range(600)})
    seconds = max(3.0, OUTAGE * run.number(100) / 100)
    with served_through_a_proxy(home) as (reference, proxy):
        usual, _ = timed_job(tmp_path, "usual", reference)
        moments = {}

        def recover():
            proxy.recover()
            moments["back"] = time.monotonic()

        def watch(progress):
            if progress.files >= 200 and "gone" not in moments:
                moments["gone"] = time.monotonic()
                proxy.break_down(fault)
                threading.Timer(seconds, recover).start()
            if "back" in moments and "on" not in moments:
                moments["on"] = time.monotonic()

        failure, took, resumed = None, 0.0, False
        started = time.monotonic()
        try:
            took, report = timed_job(tmp_path, "enc", reference, watch)
            if report.failed:
                failure = f"{len(report.failed)} files failed"
            elif took > usual + seconds + 5:
                failure = f"it took {took:.1f} s, {usual:.1f} s without an outage of {seconds:.0f} s"
            elif moments["on"] - moments["back"] > 5:
                failure = f"it went on {moments['on'] - moments['back']:.1f} s after the recovery"
        except sc.TemporaryError as error:
            took, resumed = time.monotonic() - started, True
            if fault != "drip":
                failure = f"it gave up: {error}"
            elif took > usual + DEADLINE + 5:
                failure = f"a call outlived its deadline: {took:.1f} s"
            while "back" not in moments:
                time.sleep(0.1)
            sc.encrypt(
                tmp_path / "in", tmp_path / "enc", keys=reference, workers=2, fsync=False, resume=True,
                cache=sc.DataKeyCache(max_messages=1),
            )  # fmt: skip
        if assert_nothing_partial(tmp_path / "enc", contents, reference) != len(contents):
            failure = failure or "the job is not complete"
        run.trial(failure, fault=fault, took=round(took, 1), usual=round(usual, 1), resumed=resumed)
        run.notes = {
            "fault": fault, "outage_seconds": seconds,
            "usual_seconds": round(usual, 1), "took_seconds": round(took, 1),
            "on_after_seconds": round(moments.get("on", 0) - moments["back"], 2) if "on" in moments else None,
            "gave_up_and_was_resumed": resumed,
        }  # fmt: skip
    run.finish()
