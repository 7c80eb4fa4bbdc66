"""The formulas against the simulation: 200 random loads, and the cases that have one exact answer."""

import math
import random

import pytest

from streamcrypt.plan.closed import Load, closed_form, messages_by_bytes
from streamcrypt.plan.simulate import simulate

KINDS = ["messages", "age", "bytes", "groups", "prefetch", "sequential", "random", "prepared"]
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
    if kind == "prepared":
        options |= {"prepared": round(log(files / 20, files * 2)), "sharing": "shared"}
        options["max_messages"] = round(log(1, 1e5))
    if kind == "prefetch":
        options["prefetch"] = rng.choice([1, workers, 4 * workers])
    elif options["sharing"] == "shared" and rng.random() < 0.5:
        options["prefetch"] = rng.choice([workers, 2 * workers])
    if kind in ("sequential", "random"):
        options |= {"data_keys": max(1, round(log(1, files / 2))), "order": kind}
    if kind == "random" and rng.random() < 0.3:
        options["capacity"] = max(1, round(int(str(options["data_keys"])) * rng.uniform(0.2, 2)))
    return Load(**options)  # type: ignore[arg-type]


def errors(kind: str) -> list[tuple[float, Load]]:
    rng = random.Random(f"{SEED} {kind}")
    rows = []
    for _ in range(CASES):
        load = draw(kind, rng)
        played = sum(simulate(load, seed).seconds for seed in range(3)) / 3
        rows.append((abs(closed_form(load).seconds / played - 1), load))
    return rows


@pytest.fixture(scope="module")
def all_errors() -> dict[str, list[tuple[float, Load]]]:
    return {kind: errors(kind) for kind in KINDS}


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
