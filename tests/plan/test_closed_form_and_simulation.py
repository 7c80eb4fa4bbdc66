"""The formulas against the simulation: 200 random loads, and the cases that have one exact answer."""

import dataclasses
import math
import random

import pytest

from streamcrypt.plan.closed import Load, Outcome, closed_form, messages_by_bytes
from streamcrypt.plan.simulate import simulate

KINDS = ["messages", "age", "bytes", "groups", "prefetch", "sequential", "random", "lists"]
CASES = 25  # of each kind: 200
SEED = 20261124


def draw(kind: str, rng: random.Random) -> Load:
    """A load of one kind; every number over its whole range, evenly in its logarithm."""

    def log(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    workers = rng.choice([1, 2, 4, 8, 16, 32, 64])
    files = max(round(log(100, 4000)), 4 * workers)
    options: dict[str, object] = {
        "files": files,
        "workers": workers,
        "service": log(0.005, 1),
        "variation": rng.choice([0, 0.3, 1]),
        "latency": log(0.005, 0.2),
        "quota": log(10, 5000),
        "sharing": "private" if kind != "prefetch" and rng.random() < 0.3 else "shared",
    }
    if kind in ("messages", "bytes", "groups", "prefetch"):
        options["max_messages"] = round(log(1, 1e5))
    if kind in ("age", "groups") or (kind in ("prefetch", "sequential", "random") and rng.random() < 0.4):
        options["max_age"] = log(0.1, 300)
    if kind == "bytes":
        options |= {"max_bytes": log(1, 1e4), "size_variation": rng.choice([0, 0.5, 1])}
    if kind == "groups":
        options["groups"] = rng.choice([2, 5, 20])
    if kind == "lists":  # as the engine hands files out
        batch = rng.choice([1, 3, 16])
        options |= {"batch": batch, "prefetch": (2 * batch - 1) * workers, "sharing": "shared"}
        options |= {"closing": True, "idle": rng.choice([0.0, 0.3])}
        options["max_messages" if rng.random() < 0.5 else "max_age"] = round(log(1, 300))
        way = rng.choice(["threads", "processes", "in turns"])
        if way == "processes":  # whose parent has a share of the work
            options["handing"] = float(str(options["service"])) / workers * rng.uniform(0.1, 0.9)
        elif way == "in turns":
            options |= {"workers": 1, "prefetch": batch - 1}
    if kind == "prefetch":
        options["prefetch"] = rng.choice([1, workers, 4 * workers])
    elif options["sharing"] == "shared" and rng.random() < 0.5:
        options["prefetch"] = rng.choice([workers, 2 * workers])
    if kind in ("sequential", "random"):
        options |= {"data_keys": max(1, round(log(1, files / 2))), "order": kind}
    if kind == "random" and rng.random() < 0.3:
        options["capacity"] = max(1, round(int(str(options["data_keys"])) * rng.uniform(0.2, 2)))
    return Load(**options)  # type: ignore[arg-type]


Played = list[tuple[Load, Outcome, list[Outcome]]]


@pytest.fixture(scope="module")
def played() -> dict[str, Played]:
    """Every load with its formulas and three simulations of it."""
    found: dict[str, Played] = {}
    for kind in KINDS:
        rng = random.Random(f"{SEED} {kind}")
        loads = [draw(kind, rng) for _ in range(CASES)]
        found[kind] = [
            (load, closed_form(load), [simulate(load, seed) for seed in range(3)]) for load in loads
        ]
    return found


@pytest.fixture(scope="module")
def all_errors(played: dict[str, Played]) -> dict[str, list[tuple[float, Load]]]:
    def mean(outcomes: list[Outcome]) -> float:
        return sum(outcome.seconds for outcome in outcomes) / len(outcomes)

    return {
        kind: [(abs(formula.seconds / mean(sims) - 1), load) for load, formula, sims in rows]
        for kind, rows in played.items()
    }


def percentile(rows: list[tuple[float, Load]], fraction: float) -> float:
    return sorted(error for error, _ in rows)[math.ceil(fraction * len(rows)) - 1]


def test_nine_in_ten_of_200_loads_are_within_ten_percent(all_errors):
    rows = [row for kind in KINDS for row in all_errors[kind]]
    assert len(rows) == 200
    assert percentile(rows, 0.5) < 0.02
    assert percentile(rows, 0.9) < 0.10


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_for_itself(all_errors, kind):
    rows = all_errors[kind]
    assert percentile(rows, 0.5) < 0.05, max(rows, key=lambda row: row[0])
    assert percentile(rows, 0.8) < 0.12, max(rows, key=lambda row: row[0])


def test_the_busiest_second_is_that_of_the_simulation(played):
    """Not what the KMS could answer: a job of hours that asks for a key an hour has a peak of one call."""
    ratios = []
    for rows in played.values():
        for load, formula, sims in rows:
            peak = sum(outcome.peak_per_second for outcome in sims) / len(sims)
            # One call more or less is chance where there are few.
            off = max(abs(formula.peak_per_second - peak) - 1, 0.0) / peak
            ratios.append((off, load))
    ratios.sort(key=lambda row: row[0])
    assert ratios[len(ratios) // 2][0] < 0.02
    assert ratios[math.ceil(0.9 * len(ratios)) - 1][0] < 0.25, ratios[-20:]
    assert ratios[-1][0] < 2, ratios[-1]


def test_calls_under_an_age_limit_are_those_of_the_simulation():
    """A key is asked for by the first list that finds the one before too old; the manifest comes at the end."""
    rng = random.Random(f"{SEED} ages")
    off = []
    for _ in range(40):
        batch, workers = rng.choice([1, 5, 25]), rng.choice([1, 2, 4])
        age = math.exp(rng.uniform(math.log(0.1), math.log(2)))
        load = Load(
            files=3000, workers=workers, service=workers * math.exp(rng.uniform(math.log(1e-3), math.log(2e-2))),
            variation=rng.choice([0.1, 0.5]), latency=rng.choice([0.004, 0.03]), max_age=age, batch=batch,
            prefetch=(2 * batch - 1) * workers, idle=rng.choice([0.0, 0.4]), closing=True,
        )  # fmt: skip
        calls = [simulate(load, seed).calls for seed in range(3)]
        off.append(max(0.0, abs(closed_form(load).calls - sum(calls) / 3) - 1) / (sum(calls) / 3))
    off.sort()
    assert off[len(off) // 2] < 0.01
    assert off[math.ceil(0.9 * len(off)) - 1] < 0.05, off


# files, workers, service, limits -> calls that both must give, exactly
EXACT = {
    "one key for all": ({"files": 1000, "workers": 4}, 1),
    "no cache": ({"files": 1000, "workers": 4, "max_messages": 1}, 1000),
    "message limit": ({"files": 1000, "workers": 4, "max_messages": 300}, 4),
    "private message limit": ({"files": 1200, "workers": 4, "max_messages": 100, "sharing": "private"}, 12),
    "byte limit, equal files": ({"files": 1000, "workers": 4, "size": 3.0, "max_bytes": 10.0}, 334),
    "the lesser limit": (
        {"files": 1000, "workers": 4, "max_messages": 300, "size": 1.0, "max_bytes": 100.0},
        10,
    ),
    "decrypt, runs": ({"files": 1000, "workers": 4, "data_keys": 20}, 20),
    "decrypt, private, runs": ({"files": 1000, "workers": 4, "data_keys": 20, "sharing": "private"}, 80),
}


@pytest.mark.parametrize(("options", "calls"), EXACT.values(), ids=EXACT)
def test_calls_that_have_one_answer(options, calls):
    load = Load(service=0.01, latency=0.02, **options)
    assert simulate(load).calls == calls
    assert closed_form(load).calls == calls


def test_a_quota_bounds_the_rate_of_calls():
    load = Load(files=2000, workers=64, service=0.001, max_messages=1, latency=0.001, quota=50, burst=1)
    for outcome in (simulate(load), closed_form(load)):
        assert outcome.seconds == pytest.approx(2000 / 50, rel=0.02)
        assert outcome.peak_per_second <= 52


def test_a_parent_that_hands_out_cannot_wait_for_the_kms_meanwhile():
    """A key takes 12 ms and its 100 files 5 ms of the parent, 7 of the workers."""
    load = Load(
        files=5000, workers=2, service=140e-6, latency=0.012, max_messages=100, batch=50, prefetch=198
    )
    for model in (simulate, closed_form):
        assert model(load).seconds == pytest.approx(50 * 0.012, rel=0.05)
        handing = dataclasses.replace(load, handing=50e-6)
        assert model(handing).seconds == pytest.approx(50 * 0.017, rel=0.05)


def test_in_turns_nothing_hides_the_latency():
    load = Load(files=5000, workers=1, service=1e-3, latency=0.02, max_messages=100, batch=50, prefetch=49)
    for model in (simulate, closed_form):
        assert model(load).seconds == pytest.approx(5.0 + 50 * 0.02, rel=0.02)


def test_files_handed_out_ahead_hide_the_latency():
    base = {
        "files": 4000,
        "workers": 4,
        "service": 0.01,
        "variation": 1.0,
        "latency": 0.05,
        "max_messages": 100,
    }
    for model in (simulate, closed_form):
        bare, ahead = model(Load(**base)), model(Load(**base, prefetch=32))
        assert ahead.stall_seconds < 0.35 * bare.stall_seconds
        assert ahead.seconds < bare.seconds


def test_an_empty_load_takes_no_time():
    load = Load(files=0, workers=4, service=0.01)
    assert closed_form(load).seconds == simulate(load).seconds == 0


@pytest.mark.parametrize(
    ("max_bytes", "size", "variation", "least", "most"),
    [
        (10.0, 3.0, 0.0, 3, 3),
        (2.0, 3.0, 0.0, 1, 1),
        (math.inf, 1.0, 1.0, math.inf, math.inf),
        (100.0, 1.0, 1.0, 98, 100),
    ],
)
def test_messages_that_fit_a_byte_limit(max_bytes, size, variation, least, most):
    assert least <= messages_by_bytes(max_bytes, size, variation) <= most
