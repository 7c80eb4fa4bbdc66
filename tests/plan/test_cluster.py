"""A job on a cluster: the simulation keeps the laws of the KMS and of work, the formulas keep to the simulation."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from families.measured import synthetic_records

from streamcrypt.bench.records import write_json
from streamcrypt.cli import main
from streamcrypt.engine.remote import LIST_BYTES, LIST_FILES
from streamcrypt.plan.cluster import START, ClusterLoad, closed_form, lists_of
from streamcrypt.plan.predict import Job, cluster_load, predict
from streamcrypt.plan.simulate import simulate_cluster

GiB = 2**30
PETABYTE = 10**15


def load(**options):
    given = {"files": 10_000, "nodes": 10, "workers": 4, "service": 0.05, "driver": 1e-4, "lists": 1_000}
    return ClusterLoad(**given | options)


def draw(rng):
    """Any cluster and job; every number over its whole range, evenly in its logarithm."""

    def log(low, high):
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    nodes, workers = round(log(1, 200)), rng.choice([1, 4, 16])
    lists = round(nodes * workers * log(5, 30))
    reading = rng.random() < 0.4
    return load(
        nodes=nodes, workers=workers, lists=lists, files=round(lists * log(1, 64)), service=log(1e-3, 0.3),
        driver=log(1e-5, 1e-3), variation=rng.choice([0.0, 0.5]), latency=log(0.002, 0.05),
        quota=log(100, 1e5), max_messages=math.inf if reading else round(log(20, 1e6)),
        max_age=rng.choice([math.inf, 300.0]), data_keys=round(log(1, 200)) if reading else 0,
        questions=rng.choice([1, 1, 2]),
    )  # fmt: skip


CASES = [draw(random.Random(f"20261125 {number}")) for number in range(60)]


@pytest.fixture(scope="module")
def played():
    return [simulate_cluster(case) for case in CASES]


def test_the_kms_is_never_asked_faster_than_its_quota(played):
    for case, (outcome, sent) in zip(CASES, played, strict=True):
        assert len(sent) == outcome.driver_calls + outcome.worker_calls
        # In whatever time from one call to another: the bucket's tokens, and what came in meanwhile.
        excess = np.arange(1, len(sent) + 1) - case.quota * sent
        allowed = max(case.tokens, 1.0) - case.quota * sent
        worst = (excess - np.minimum.accumulate(excess) + 1).max()
        assert worst <= allowed[0] + case.quota * sent[0] + 1e-6 * len(sent) + 1, case
        assert outcome.peak_per_second <= case.tokens + case.quota + 1


def test_calls_are_what_the_limits_say(played):
    for case, (outcome, _) in zip(CASES, played, strict=True):
        keys = math.ceil(case.files / case.per_key - 1e-9)
        if math.isinf(case.max_age):
            assert outcome.driver_calls == keys * case.questions, case
            # Each worker opens each data key that it meets once.
            pairs = min(keys * case.all_workers, case.lists + keys - 1) * case.questions
            assert keys * case.questions <= outcome.worker_calls <= pairs, case
        else:
            assert outcome.driver_calls >= keys * case.questions, case


def test_work_is_neither_lost_nor_made(played):
    for case, (outcome, _) in zip(CASES, played, strict=True):
        work = case.service * case.files
        if case.variation == 0:
            spent = (outcome.worker_seconds - outcome.stall_seconds) * case.all_workers
            assert spent == pytest.approx(work, rel=1e-9)
            assert outcome.seconds >= work / case.all_workers
        assert outcome.seconds >= case.driver * case.files + case.hand_over * case.lists
        assert outcome.driver_seconds <= outcome.seconds


def test_nine_in_ten_formulas_are_near_the_simulation(played):
    errors = sorted(
        (
            abs(closed_form(case).seconds / outcome.seconds - 1),
            abs(closed_form(case).calls / outcome.calls - 1),
        )
        for case, (outcome, _) in zip(CASES, played, strict=True)
    )
    assert errors[len(errors) // 2][0] < 0.04
    assert errors[math.ceil(0.9 * len(errors)) - 1][0] < 0.12, errors[-8:]
    calls = sorted(error for _, error in errors)
    assert calls[math.ceil(0.9 * len(calls)) - 1] < 0.15, calls[-8:]


# load -> calls of the driver, and of all workers
EXACT = {
    "one key": ({}, 1, 40),
    "a key for every list": ({"max_messages": 10}, 1_000, 1_000),
    "a key for every file": ({"max_messages": 1}, 10_000, 10_000),
    "runs of data keys": ({"data_keys": 5}, 5, 200),
    "rekey": ({"questions": 2}, 2, 80),
    "fewer lists than workers": ({"lists": 30}, 1, 30),
}


@pytest.mark.parametrize(("options", "driver", "workers"), EXACT.values(), ids=EXACT)
def test_calls_that_have_one_answer(options, driver, workers):
    outcome, _ = simulate_cluster(load(latency=0.01, **options))
    assert (outcome.driver_calls, outcome.worker_calls) == (driver, workers)
    found = closed_form(load(latency=0.01, **options))
    assert found.driver_calls == pytest.approx(driver)
    assert found.worker_calls == pytest.approx(workers, rel=0.05)


def test_who_decides():
    quota, _ = simulate_cluster(load(max_messages=1, quota=50, burst=1))
    assert quota.seconds == pytest.approx(20_000 / 50, rel=0.02)
    driver, _ = simulate_cluster(load(driver=0.01))
    assert driver.seconds == pytest.approx(10_000 * 0.01 + 1_000 * 1e-3, rel=0.02)
    workers, _ = simulate_cluster(load())
    assert workers.seconds == pytest.approx(10_000 * 0.05 / 40, rel=0.05)


def test_workers_played_in_groups_are_as_those_played_one_by_one(monkeypatch):
    case = load(nodes=50, workers=8, lists=20_000, files=40_000, latency=0.01, quota=300, max_messages=2_000)
    single, _ = simulate_cluster(case)
    monkeypatch.setattr("streamcrypt.plan.simulate._EVENTS", 3_000)
    grouped, sent = simulate_cluster(case)
    assert grouped.seconds == pytest.approx(single.seconds, rel=0.03)
    assert grouped.driver_calls == single.driver_calls
    assert grouped.worker_calls == pytest.approx(single.worker_calls, rel=0.05)
    assert len(sent) == grouped.driver_calls + grouped.worker_calls


def test_a_thousand_nodes_and_a_petabyte():
    job = Job(
        bytes=PETABYTE, files=8_000_000, hosts=1_000, workers=16, cores=16, engine="ray", region="us-east-1",
        cache_max_bytes=float(2**50),
    )  # fmt: skip
    case = cluster_load(job, synthetic_records())
    outcome, sent = simulate_cluster(case)
    assert case.all_workers == 16_000
    # Every worker opens the first key at once: more than a second's quota would be refused.
    assert outcome.worker_calls >= 16_000
    assert outcome.peak_per_second <= 2 * case.quota
    assert (np.searchsorted(sent, sent + 1, "left") - np.arange(len(sent))).max() <= 2 * case.quota
    # Four hundred thousand and more lists leave the driver no rest.
    assert outcome.seconds == pytest.approx(case.hand_over * case.lists + case.driver * case.files, rel=0.05)
    assert closed_form(case).seconds == pytest.approx(outcome.seconds, rel=0.05)
    small = replace(case, quota=250.0, burst=250.0)
    throttled, _ = simulate_cluster(small)
    assert throttled.peak_per_second <= 500


def test_lists_are_those_of_the_engine():
    assert lists_of(512, 2 * GiB, 2) == math.ceil(512 / 64)  # four for each CPU
    assert lists_of(100_000, 100_000 * 1_000, 2) == math.ceil(100_000 / LIST_FILES)
    assert lists_of(10_000, 10_000 * GiB, 100) == 10_000 * GiB // LIST_BYTES


def test_a_cluster_is_planned(capsys, tmp_path):
    records = synthetic_records()
    job = Job(bytes=2 * GiB, files=512, workers=1, cores=1, fsync=False, engine="ray", kms_quota=1e6)
    one, two = (predict(replace(job, hosts=hosts), records, trials=50) for hosts in (1, 2))
    assert 1.8 < (one.estimate.seconds - START) / (two.estimate.seconds - START) < 2
    assert two.to_json()["kms"]["calls"] == {"GenerateDataKey": 1, "Decrypt": 2}
    many = predict(replace(job, hosts=2_000, bytes=PETABYTE, files=10_000_000), records, trials=50)
    assert many.estimate.limit == "driver"

    write_json(tmp_path / "machine.json", records)
    words = ["plan", "--bytes", "1TB", "--files", "10000", "--hosts", "20", "--engine", "ray", "--simulate"]
    assert main([*words, "--records", str(tmp_path / "machine.json"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["simulated"]["seconds"] == pytest.approx(plan["seconds"], rel=0.1)
    assert plan["simulated"]["peak_per_second"] <= 2 * plan["simulated"]["quota_per_second"]
    assert not plan["page"]["live"]
    assert main([*words, "--records", str(tmp_path / "machine.json")]) == 0
    assert "  simulated    " in capsys.readouterr().out
    assert main([*words[:-3], "--simulate"]) == 2
    assert "--engine ray" in capsys.readouterr().err
