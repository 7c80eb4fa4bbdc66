"""Plans from records of a known law: the fit finds it again, the plan keeps its promises."""

import dataclasses
import json
import math
import random

import pytest
from families.measured import LAW, law_seconds, synthetic_records, synthetic_run, work_of_cell

import streamcrypt as sc
from streamcrypt.bench.records import Cell, Records, median
from streamcrypt.bench.sweep import held_out
from streamcrypt.engine import manifest
from streamcrypt.engine.run import SAMPLE, processes_pay
from streamcrypt.plan import limits, validate
from streamcrypt.plan import predict as planner
from streamcrypt.plan.model import ModelError, Work, best_workers, fit, scalability

RECORDS = synthetic_records()
JOB = planner.Job(bytes=1 << 36, files=20_000)
MIB = 1 << 20


def test_the_fit_finds_the_law_again():
    found = fit(synthetic_records(noise=0.0), "encrypt", storage="disk")
    coefficients = dict(zip(LAW, found.coefficients.tolist(), strict=True))
    assert coefficients == pytest.approx(LAW, rel=1e-4, abs=1e-12)
    # What no cell tells apart: verifying waits for no disk.
    verifying = fit(synthetic_records(noise=0.0), "verify", storage="disk")
    expected = LAW | dict.fromkeys(("single", "sync_serial", "sync", "sync_byte"), 0.0)
    found_again = dict(zip(LAW, verifying.coefficients.tolist(), strict=True))
    assert found_again == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_what_was_not_measured_on_a_storage_is_taken_from_the_other():
    """Frames, signatures and worker processes cost the same wherever the files are."""
    found = fit(synthetic_records(noise=0.0), "decrypt", signed=True, storage="disk")
    cells = [run.cell for run in RECORDS.runs if run.cell.storage == "disk"]
    assert not any(cell.signed or cell.frame_size == 4096 for cell in cells)
    for change in ({"signed": True, "files": 50}, {"frame_size": 4096}, {"files": 9000, "workers": 2}):
        cell = dataclasses.replace(
            Cell(operation="decrypt", storage="disk", files=80, file_size=MIB, fsync=True), **change
        )
        assert found.seconds(work_of_cell(cell)) == pytest.approx(law_seconds(cell), rel=1e-3)


def test_with_noise_unseen_cells_are_still_predicted():
    found = fit(RECORDS, "encrypt", storage="disk")
    cell = Cell(files=700, file_size=300_000, frame_size=32 << 10, workers=2, storage="disk", fsync=True)
    frames = cell.files * (cell.file_size // cell.frame_size + 1)
    work = Work(files=700, bytes=700 * 300_000, frames=frames, workers=2, cores=2, fsync=True, singles=700)
    assert found.seconds(work) == pytest.approx(law_seconds(cell), rel=0.05)


def test_a_fit_from_too_little_is_refused():
    few = Records(RECORDS.machine, RECORDS.runs[:2])
    with pytest.raises(ModelError, match="bench calibrate"):
        fit(few, "encrypt", storage="disk")
    with pytest.raises(ModelError, match="read"):
        fit(RECORDS, "read")


def test_the_json_has_what_the_interface_promises():
    plan = planner.predict(JOB, RECORDS, trials=100).to_json()
    json.dumps(plan)
    for name in (
        "hosts",
        "workers_per_host",
        "seconds",
        "seconds_interval",
        "limit",
        "kms",
        "cost",
        "sensitivity",
        "records",
    ):
        assert name in plan
    assert set(plan["kms"]) >= {"calls", "peak_per_second", "quota_per_second"}
    assert set(plan["cost"]) >= {"currency", "kms_requests", "kms_keys", "compute", "total"}
    assert set(plan["records"]) >= {"machine", "date"}
    assert plan["seconds_interval"][0] <= plan["seconds"] <= plan["seconds_interval"][1]
    assert plan["cost"]["total"] == pytest.approx(
        plan["cost"]["kms_requests"] + plan["cost"]["kms_keys"] + plan["cost"]["compute"]
    )


# change -> direction in which seconds (or calls) must go
DIRECTIONS = {
    "twice the bytes": ({"bytes": JOB.bytes * 2}, 1, 0),
    "twice the hosts": ({"hosts": 2}, -1, 1),
    "no cache": ({"cache": False}, 1, 1),
    "slow KMS, no cache": ({"cache": False, "kms_latency": 1.0}, 1, 1),
    "small quota, no cache": ({"cache": False, "kms_quota": 10.0}, 1, 1),
    "small frames": ({"frame_size": 4096}, 1, 0),
    "signed": ({"signed": True}, 1, 0),
    "fifty times as long": ({"bytes": JOB.bytes * 50}, 1, 1),
    "no fsync": ({"fsync": False}, -1, 0),
    "slow disk": ({"write_bandwidth": 10.0e6}, 1, 0),
    "ten messages a key, slow KMS": ({"cache_max_messages": 10, "kms_latency": 1.0}, 1, 1),
}


@pytest.mark.parametrize(("change", "seconds", "calls"), DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_change_moves_the_plan_the_right_way(change, seconds, calls):
    base, other = (
        planner.evaluate(JOB, RECORDS),
        planner.evaluate(dataclasses.replace(JOB, **change), RECORDS),
    )
    assert (other.seconds - base.seconds) * seconds > 0
    assert (other.calls - base.calls) * calls >= 0
    assert (other.calls != base.calls) == bool(calls)


LIMITS = {
    "kms-quota": {"cache": False, "kms_quota": 5.0},
    "kms-latency": {"cache": False, "kms_latency": 1.0},
    "storage-write": {"write_bandwidth": 1e6},
    "storage-read": {"operation": "verify", "read_bandwidth": 1e6},
    "network": {"network_bandwidth": 1e6},
    "cpu": {"fsync": False, "frame_size": 1024},
}


@pytest.mark.parametrize(("limit", "change"), LIMITS.items(), ids=LIMITS)
def test_the_limiting_resource_is_named(limit, change):
    assert planner.evaluate(dataclasses.replace(JOB, **change), RECORDS).limit == limit


def test_calls_are_exact_where_a_message_limit_decides():
    for files, per_key in [(1000, 7), (1000, 1000), (40_000, 64), (5000, 1)]:
        job = planner.Job(bytes=files * 1000, files=files, cache_max_messages=per_key)
        # The manifest is a message too.
        assert round(planner.evaluate(job, RECORDS).calls) == math.ceil((files + 1) / per_key)


@pytest.mark.parametrize("per_key", [1, 20, 60, 1000])
@pytest.mark.parametrize("held", [1_000, 1_000_000])
def test_calls_are_those_of_the_engine(held, per_key, home, tmp_path, monkeypatch):
    """A manifest too long to be held in memory has a data key of its own, and is opened with it."""
    monkeypatch.setattr(manifest, "HELD_LENGTH", held)
    monkeypatch.setattr(planner, "HELD_LENGTH", held)
    (tmp_path / "plain").mkdir()
    for number in range(60):
        (tmp_path / "plain" / f"{number}").write_bytes(bytes(100))
    key = f"local:{sc.kms_client('local').create_key()['KeyMetadata']['KeyId']}"
    cache = sc.DataKeyCache(max_messages=per_key)
    done = sc.encrypt(tmp_path / "plain", tmp_path / "out", keys=key, cache=cache, workers=2, fsync=False)
    job = planner.Job(bytes=6000, files=60, cache_max_messages=per_key)
    assert round(planner.evaluate(job, RECORDS).calls) == done.to_json()["kms"]["calls"]["GenerateDataKey"]
    done = sc.verify(tmp_path / "out", keys=key, workers=2)
    job = dataclasses.replace(job, operation="verify")
    assert round(planner.evaluate(job, RECORDS).calls) == done.to_json()["kms"]["calls"]["Decrypt"]


def test_calls_under_an_age_limit_follow_the_time():
    job = dataclasses.replace(JOB, cache_max_age=0.1)
    found = planner.evaluate(job, RECORDS)
    assert found.calls > 100
    assert planner.calls_within(job, RECORDS, found.seconds) == pytest.approx(found.calls, abs=1)
    assert planner.calls_within(job, RECORDS, 2 * found.seconds) == pytest.approx(2 * found.calls, rel=0.05)
    assert planner.calls_within(JOB, RECORDS, 2 * found.seconds) == 1


def test_the_peak_is_that_of_the_busiest_second():
    """Of a job that asks for a key now and then, not what the KMS could answer in a second."""
    days = planner.Job(bytes=100 << 40, files=1_000_000, cache_max_messages=1_000, contexts=1)
    assert planner.evaluate(days, RECORDS).peak_per_second == 1
    rekey = dataclasses.replace(days, operation="rekey")  # opens the old key, then asks for a new one
    assert planner.evaluate(rekey, RECORDS).peak_per_second == 2
    # Every host begins with a key.
    assert planner.evaluate(dataclasses.replace(days, hosts=50), RECORDS).peak_per_second == 50
    # A file a call, each worth a millisecond: as many as one caller can ask one after the other.
    uncached = planner.Job(bytes=10_000_000, files=100_000, cache=False, kms_latency=0.02, fsync=False)
    peak = planner.evaluate(uncached, RECORDS).peak_per_second
    assert (peak, type(peak)) == (50, float)  # of one type in the JSON, whatever limits it
    assert planner.evaluate(dataclasses.replace(uncached, kms_quota=10), RECORDS).peak_per_second <= 20


def test_every_host_has_its_own_keys():
    job = dataclasses.replace(JOB, hosts=8)
    assert planner.evaluate(job, RECORDS).calls == 8


def test_without_fsync_the_disk_counts_beyond_what_memory_holds():
    small = planner.Job(bytes=1 << 30, files=400, fsync=False)
    large = dataclasses.replace(small, bytes=10 << 40, files=400_000, kms_latency=0.0)
    alone, beyond = (planner.evaluate(job, RECORDS) for job in (small, large))
    assert alone.parts["storage-write"] < 0.5 * alone.seconds
    # The law's disk takes 0.2 ns a byte after what a fifth of 16 GiB of memory holds back.
    assert beyond.parts["storage-write"] == pytest.approx(0.2e-9 * ((10 << 40) - (16 << 30) / 5), rel=0.1)
    assert beyond.seconds >= beyond.parts["storage-write"]
    assert any("memory holds back" in note for note in planner.predict(large, RECORDS, trials=10).notes)
    in_memory = dataclasses.replace(large, storage="memory")
    assert planner.evaluate(in_memory, RECORDS).parts["storage-write"] < beyond.parts["storage-write"]


def test_many_small_files_are_worth_processes():
    """The first entries decide: as many as are looked at must be enough, or no job would take them."""
    assert processes_pay(SAMPLE, SAMPLE)


def test_solve_hosts_is_the_least_that_meets_the_deadline():
    job = dataclasses.replace(JOB, deadline=20.0)
    found = planner.solve("hosts", job, RECORDS)
    assert found.feasible
    assert found.hosts > 1
    assert not planner.predict(dataclasses.replace(job, hosts=found.hosts - 1), RECORDS, trials=400).feasible


def test_solve_deadline_and_cache():
    deadline = planner.solve("deadline", JOB, RECORDS)
    assert deadline.feasible
    assert deadline.job.deadline == pytest.approx(deadline.interval[1], rel=0.05)
    slow = dataclasses.replace(JOB, kms_latency=0.5)
    cache = planner.solve("cache", slow, RECORDS)
    least = cache.job.cache_max_messages
    assert 1 < least < JOB.files
    fewer = dataclasses.replace(slow, cache_max_messages=least / 2)
    assert planner.evaluate(fewer, RECORDS).seconds > 1.01 * planner.evaluate(slow, RECORDS).seconds


def test_an_impossible_deadline_says_what_stands_in_the_way():
    with pytest.raises(planner.PlanError, match=r"no number of hosts .* meets the deadline of 0\.001 s"):
        planner.solve("hosts", dataclasses.replace(JOB, deadline=0.001), RECORDS)


BAD = {
    "negative size": {"bytes": -1},
    "no files": {"files": 0},
    "no hosts": {"hosts": 0},
    "quota of zero": {"kms_quota": 0.0},
    "negative latency": {"kms_latency": -1.0},
    "deadline of zero": {"deadline": 0.0},
    "unknown operation": {"operation": "compress"},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_bad_jobs_are_refused_in_one_line(change):
    with pytest.raises(planner.PlanError) as caught:
        dataclasses.replace(JOB, **change)
    assert "\n" not in str(caught.value)


def test_more_workers_than_measured_widen_the_interval():
    near = planner.predict(JOB, RECORDS, trials=500)
    far = planner.predict(dataclasses.replace(JOB, workers=64), RECORDS, trials=500)

    def width(found):
        return (found.interval[1] - found.interval[0]) / found.estimate.seconds

    assert width(far) > 1.5 * width(near)
    assert any("widened" in note for note in far.notes)


def test_quotas_are_dated_and_the_smallest_is_assumed():
    assumed = limits.kms_quota("GenerateDataKey")
    assert assumed.per_second == min(
        limits.kms_quota("GenerateDataKey", region).per_second
        for region in ("us-east-1", "eu-north-1", "eu-west-2")
    )
    assert "20" in assumed.source
    with pytest.raises(ValueError, match="share"):
        limits.kms_quota("GenerateDataKey", share=0)


def test_long_objects_are_paid_for_by_the_part():
    """Of 10 GB in parts of 8 MiB: 1,193 of them, one request that begins them and one that joins them."""
    job = planner.Job(bytes=10**12, files=100, object_store=True)
    each = 1195 * limits.PRICES.put_requests.each + 1193 * limits.PRICES.get_requests.each
    assert planner.evaluate(job, RECORDS).cost["store_requests"] == pytest.approx(100 * each)
    verify = dataclasses.replace(job, operation="verify")
    only_read = 119_300 * limits.PRICES.get_requests.each
    assert planner.evaluate(verify, RECORDS).cost["store_requests"] == pytest.approx(only_read)


def test_the_longest_frame_is_planned():
    job = dataclasses.replace(JOB, frame_size=1 << 30)
    assert "frame_size" in planner.predict(job, RECORDS, trials=10).sensitivity


@pytest.mark.parametrize("seconds", [math.nan, -1.0, 0.0, math.inf])
def test_a_report_that_took_no_time_is_none(seconds):
    with pytest.raises(ValueError, match="did not take"):
        planner.check({"seconds": seconds}, JOB, RECORDS)


def test_prices_come_from_a_file(tmp_path):
    ours = planner.evaluate(dataclasses.replace(JOB, object_store=True, cache=False), RECORDS).cost
    file = tmp_path / "prices.toml"
    file.write_text('date = "2027-01"\nsource = "our contract"\nvcpu_hour = 0.0816\nput_requests = 0.01\n'
                    "[kms]\nsymmetric = 0.06\nfree_requests = 0\n")  # fmt: skip
    job = dataclasses.replace(JOB, object_store=True, cache=False, prices=limits.Prices.read(file))
    found = planner.predict(job, RECORDS, trials=10).cost
    assert found["compute"] == pytest.approx(2 * ours["compute"])
    assert found["kms_requests"] == pytest.approx(20_001 * 0.06 / 10_000)
    assert found["store_requests"] == pytest.approx(20_000 * (0.01 + 0.0004) / 1000)
    assert found["prices"]["compute"] == {"date": "2027-01", "source": "our contract"}
    assert found["prices"]["kms"] == {"date": "2027-01", "source": "our contract"}
    assert found["total"] == pytest.approx(
        sum(planner.evaluate(job, RECORDS).cost[name] for name in ours) / 2
    )
    (tmp_path / "prices.json").write_text('{"vcpu_hour": 1}')
    assert limits.Prices.read(tmp_path / "prices.json").vcpu_hour.usd == 1
    assert limits.Prices.read(tmp_path / "prices.json").put_requests == limits.PRICES.put_requests


def test_intervals_cover_what_the_law_does():
    """Eight in ten of the law's own noisy runs lie in the 80 % interval, on cells the fit has not seen."""
    rng = random.Random(5)
    covered = []
    for cell in held_out(7, ("memory",)):
        if cell.operation == "verify" or cell.kms_latency or cell.distribution != "constant":
            continue
        found = planner.predict(validate.job_of(cell, RECORDS.machine.cores), RECORDS)
        for number in range(5):
            run = synthetic_run(cell, number, rng)
            covered.append(found.interval[0] <= run.wall_s <= found.interval[1])
    assert 0.6 <= sum(covered) / len(covered) <= 1.0


def test_hosts_without_a_file_ask_for_no_key():
    few, many = (
        planner.evaluate(dataclasses.replace(JOB, files=10, hosts=n), RECORDS) for n in (10, 100_000)
    )
    assert many.calls == few.calls == 10
    assert many.seconds == pytest.approx(few.seconds)


def test_scalability_law():
    workers = [1, 2, 3, 4, 6, 8, 12]
    alpha, beta = 0.08, 0.004
    rates = [5 * n / (1 + alpha * (n - 1) + beta * n * (n - 1)) for n in workers]
    found = scalability(workers, rates)
    assert found == pytest.approx((alpha, beta), rel=1e-3)
    assert best_workers(*found) == pytest.approx(math.sqrt((1 - alpha) / beta), rel=1e-3)
    assert scalability([1, 2], [1.0, 1.6])[1] == 0.0


def test_a_finished_job_is_held_against_its_plan():
    predicted = planner.predict(JOB, RECORDS)
    report = {"seconds": predicted.estimate.seconds * 1.5, "kms": {"calls": {"GenerateDataKey": 2}}}
    result = planner.check(report, JOB, RECORDS)
    assert result["ratio"] == pytest.approx(1.5)
    assert result["drifted"]
    assert result["actual_calls"] == 2


def test_sizes():
    lognormal = planner.Sizes.lognormal(1e6, 1.0)
    assert lognormal.mean == pytest.approx(1e6)
    assert lognormal.variation == pytest.approx(math.sqrt(math.e - 1), rel=0.15)
    assert planner.Sizes.constant(MIB).frames(MIB) == 2  # a whole frame is followed by an empty final one
    assert planner.Sizes.constant(MIB - 1).frames(MIB) == 1
    listed = planner.Sizes.listing(list(range(10_000)))
    assert len(listed.points) == 512
    assert listed.mean == pytest.approx(4999.5, rel=1e-3)
    with pytest.raises(planner.PlanError, match="no files"):
        planner.Sizes.listing([])


def test_the_text_names_limit_basis_and_deadline():
    text = planner.describe_plan(planner.predict(dataclasses.replace(JOB, deadline=1e6), RECORDS, trials=100))
    for words in ("limit ", "basis ", "deadline ", "what if", "GenerateDataKey", "80 %"):
        assert words in text


def test_judging_held_out_runs():
    """The table compares plan and measurement, and both naive planners, on the law's own runs."""
    rng = random.Random(2)
    cells = [
        dataclasses.replace(cell, distribution="constant", spread=0.0)
        for cell in held_out(3, ("memory",))
        if not cell.kms_latency
    ]
    measured = Records(
        RECORDS.machine, tuple(synthetic_run(cell, number, rng) for cell in cells for number in range(3))
    )
    aged = Cell(files=8000, file_size=100_000, cache_max_age=0.02, workers=2)
    calls = round(planner.evaluate(validate.job_of(aged, 2), RECORDS).calls)
    run = dataclasses.replace(synthetic_run(aged, 0, rng, noise=0.0), kms_calls={"GenerateDataKey": calls})
    slow = dataclasses.replace(run, cell=dataclasses.replace(aged, seed=2), wall_s=2 * run.wall_s,
                               kms_calls={"GenerateDataKey": 2 * calls})  # fmt: skip
    measured = Records(RECORDS.machine, (*measured.runs, run, slow))
    result = validate.judge(measured, RECORDS, planned=len(cells), cores=2)
    assert result["measured"] == len(cells) + 2 > 5
    # Of a job that took twice as long as planned the calls were not foreseen, but of its time they are.
    assert (result["summary"]["calls_by_age"], result["summary"]["calls_by_age_at_measured"]) == (0.5, 1.0)
    assert "2 configurations" in validate.table(result)
    crowded = [row["error"] for row in result["rows"] if ", 4 workers" in row["label"]]
    assert max(map(abs, crowded)) < 0.15  # on two cores, as they were measured
    assert result["summary"]["plan"]["median"] < 0.05
    assert result["summary"]["plan"]["p90"] < result["summary"]["by_best_rate"]["p90"]
    assert result["summary"]["calls_exact"] == 1.0
    assert "noise floor" in validate.table(result)
    by_itself = [row["by_itself"] for row in result["rows"]]
    assert by_itself.count(None) == 2  # the two that ran once foretell nothing
    assert result["summary"]["by_itself"]["median"] == median([it for it in by_itself if it is not None])
    assert 0 < result["summary"]["by_itself"]["median"] < 0.1


def test_a_run_is_foretold_from_the_others_of_its_configuration():
    walls = (1.0, 2.0, 4.0)  # from 3.0, 2.5 and 1.5: off by 2.0, 0.25 and 0.625
    cell = Cell(files=3, file_size=MIB)
    runs = tuple(
        dataclasses.replace(synthetic_run(cell, n, random.Random(1)), wall_s=w) for n, w in enumerate(walls)
    )
    (row,) = validate.judge(Records(RECORDS.machine, runs), RECORDS, planned=1, cores=2)["rows"]
    assert row["by_itself"] == pytest.approx(0.625)
    assert row["calls_by_itself"] == [True, True, True]  # a call each
    assert row["floor"] == pytest.approx(0.9)  # off by 0, 0.5 and 1 from their median: nine tenths of the way
    assert row["allowed"] == pytest.approx(1.08)


def test_held_out_cells_are_drawn_from_their_seed_and_survive_the_file(tmp_path):
    cells = held_out(11)
    assert len(cells) >= 40
    assert cells == held_out(11)
    assert cells != held_out(12)
    path = tmp_path / "held_out.json"
    validate.write_held_out(path, cells, 11)
    assert validate.read_held_out(path) == cells
    calibrated = {(run.cell.frame_size, run.cell.file_size) for run in RECORDS.runs}
    assert not calibrated & {(cell.frame_size, cell.file_size) for cell in cells}
