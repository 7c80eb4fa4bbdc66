"""One host's share of a job as a queue: N workers, data keys with limits, a KMS with a quota.

    Load     what arrives: files, service times, cache limits, KMS latency and quota
    Outcome  what comes of it: seconds, KMS calls, the seconds each resource alone would need

``closed_form`` computes the outcome by formulas, in tens of microseconds; ``simulate.simulate`` plays
it file by file.  Both take a Load and return an Outcome, and a property test holds them together.

How a host works (the engine's rule): **shared**, the parent hands files to the workers in order, at
most ``workers + prefetch`` at a time, and asks the KMS when the key in use has reached a limit; while
it waits the workers go on with what they hold.  **private**, every worker has a cache of its own
(the AWS Encryption SDK's caching materials manager, or Ray workers that unwrap for themselves).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Sharing = Literal["shared", "private"]
Order = Literal["sequential", "random"]


@dataclass(frozen=True, slots=True)
class Load:
    """Seconds, bytes and calls per second.  ``data_keys`` above zero means decrypting: that many
    data keys over the files, in runs (``sequential``) or scattered (``random``)."""

    files: int
    workers: int
    service: float
    variation: float = 0.0  # coefficient of variation of the service time
    latency: float = 0.0
    quota: float = math.inf
    burst: float | None = None  # tokens at the start; None: one second of quota
    max_messages: float = math.inf
    max_age: float = math.inf
    max_bytes: float = math.inf
    size: float = 1.0
    size_variation: float = 0.0
    sharing: Sharing = "shared"
    groups: int = 1  # distinct encryption contexts; every one has its own data keys
    prefetch: int = 0  # files handed out ahead of the workers
    data_keys: int = 0
    order: Order = "sequential"
    capacity: int = 1000  # entries of the cache
    pieces: int = 1  # equal spans into which a file is cut, each for any worker
    batch: int = (
        1  # files that are handed out together, when so many of those before are done (shared caches)
    )
    idle: float = 0.0  # seconds that the first files wait for workers that are being started
    closing: bool = False  # the last file, a manifest, gets its key when all others are done
    handing: float = (
        0.0  # seconds of the parent for a file, in which it cannot wait for the KMS (shared caches)
    )

    @property
    def tokens(self) -> float:
        """Calls that the KMS answers at once before the quota's rate applies."""
        return self.quota if self.burst is None else self.burst


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a Load comes to.  ``worker_seconds`` counts work and waiting for keys, ``quota_seconds``
    is the time that the KMS quota alone enforces, ``peak_per_second`` the most calls in any second."""

    seconds: float
    calls: float
    messages_per_key: float
    worker_seconds: float
    stall_seconds: float
    quota_seconds: float
    peak_per_second: float

    @property
    def near_tie(self) -> bool:
        """Two bounds within 30 % of each other: a closed form takes the larger, reality mixes them."""
        return self.quota_seconds > 0 and abs(self.worker_seconds / self.quota_seconds - 1) < 0.3


def messages_by_bytes(max_bytes: float, size: float, variation: float) -> float:
    """Files of mean ``size`` that one key takes before the next would pass ``max_bytes``; at least one.

    The key is given up when the next file does not fit, so on average the age of a renewal process
    at ``max_bytes``, E[b²]/(2E[b]), stays unused.  Equal files fill it to a whole number.
    """
    if math.isinf(max_bytes) or size <= 0:
        return math.inf
    if variation == 0:
        return max(1.0, math.floor(max_bytes / size))
    # Where hardly one file fits, a longer one has a key for itself: the line bends towards 1, the
    # more sharply the more equal the files are (fitted to simulation for variations 0.3 to 1.5).
    bend = 0.88 / math.pow(variation, 1.6)
    beyond = (max_bytes / size - (1 + variation * variation) / 2 - 1) * bend
    return 1 + (beyond if beyond > 30 else math.log1p(math.exp(beyond))) / bend


def _stall(wait: float, service: float, variation: float) -> float:
    """Worker-seconds lost per worker while no file can be handed out for ``wait`` seconds.

    A worker loses only what is left of the wait after its file in hand, E[(wait - residual)+]: for
    services of one length the residual is uniform, for exponential ones it is exponential.
    """
    if wait <= 0:
        return 0.0
    if service <= 0:
        return wait
    uniform = wait * wait / (2 * service) if wait < service else wait - service / 2
    exponential = wait - service * -math.expm1(-wait / service)
    weight = min(1.0, variation * variation)
    return (1 - weight) * uniform + weight * exponential


def _renewals(age: float, service: float, variation: float, most: float) -> float:
    """E[min(most, 1 + files that one worker starts within ``age``)]: a key's messages in a private cache."""
    if math.isinf(age):
        return most
    if variation == 0:
        return min(most, 1 + math.floor(age / service))
    mean = age / service
    if most <= 1:
        return 1.0
    centre = mean + (variation * variation - 1) / 2
    if math.isinf(most):
        return max(1.0, 1 + centre)
    if mean > 50 or most > 400:
        # Far out the renewal function is its asymptote; the minimum smooths over a spread of c·√mean.
        spread = variation * math.sqrt(mean)
        z = (most - 1 - centre) / spread
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        above = math.erfc(z / math.sqrt(2)) / 2
        return max(1.0, 1 + centre - spread * (density - z * above))
    from scipy.special import gammainc

    shape = 1 / (variation * variation)
    total, k = 1.0, 1
    while k < most:
        reached = float(gammainc(k * shape, age * shape / service))
        total += reached * min(1.0, most - k)
        if reached < 1e-6:
            break
        k += 1
    return total


def _longest(count: float, variation: float) -> float:
    """E[max] of ``count`` residual services, in units of the mean service: uniform at variation 0,
    exponential at 1, in proportion to the variance between and beyond."""
    uniform = count / (count + 1)
    harmonic = math.log(count) + 0.5772 + 1 / (2 * count)
    weight = variation * variation
    if weight <= 1:
        return (1 - weight) * uniform + weight * harmonic
    return harmonic * (1 + weight) / 2


def _keys(files: float, per_key: float, *, exact: bool, scattered: float = 1.0) -> float:
    """Data keys for ``files`` files of one context at ``per_key`` each.  With ``scattered`` contexts
    the number of files of each is random, and some may meet none."""
    if scattered > 1:
        met = 1 - math.pow(1 - 1 / scattered, files * scattered)
        rest = max(0.0, files - met) / per_key
        return min(met + rest, max(met, files / per_key + 0.5)) if per_key < files else met
    if per_key >= files:
        return 1.0
    whole = math.ceil(files / per_key - 1e-9)
    return float(whole) if exact else min(float(whole), files / per_key + 0.5)


def closed_form(load: Load) -> Outcome:
    """The outcome by formulas; see PLANNING.md, section 4, for where each comes from."""
    if load.files <= 0:
        return Outcome(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    if load.data_keys and load.order == "random":
        return _scattered(load)
    return _private(load) if load.sharing == "private" else _shared(load)


def _finish(
    load: Load, calls: float, per_key: float, stall: float, last_key: float, in_a_second: float
) -> Outcome:
    """Join the two bounds, work with its waits and the quota, and add the tail of the last files.

    ``in_a_second`` calls the host would make in its busiest second, if every one were answered at once.
    """
    workers, n, s = load.workers, load.files * load.pieces, load.service / load.pieces
    square = load.variation * load.variation
    if load.variation == 0 and stall == 0:
        work, tail = math.ceil(n / workers) * s, 0.0
    elif n <= workers:  # as long as its longest file
        least = n / (n + 1) * (1 - min(1.0, square)) + min(1.0, square)
        work, tail = s, s * (_longest(n, load.variation) - least)
    else:  # when nothing is left to hand out, the longest residual service is still to come
        work, tail = n * s / workers, s * (_longest(workers, load.variation) - (1 + square) / 2)
    worker_seconds = work + stall + tail
    forced = max(0.0, calls - load.tokens) / load.quota if math.isfinite(load.quota) else 0.0
    quota_seconds = forced + load.latency + last_key if forced > 0 else 0.0
    seconds = max(worker_seconds, quota_seconds)
    # The parent asks one question at a time; so does every worker with a cache of its own.
    askers = 1 if load.sharing == "shared" else workers
    fastest = askers * math.ceil(1 / load.latency) if load.latency > 0 else calls
    peak = min(calls, fastest, load.tokens + load.quota, in_a_second)
    return Outcome(seconds, calls, per_key, worker_seconds, stall, quota_seconds, peak)


def _shared(load: Load) -> Outcome:
    n, workers, s, latency = load.files, load.workers, load.service, load.latency
    rate = workers / s if s > 0 else math.inf
    groups = min(load.groups, n)
    ahead = workers + load.prefetch
    if load.data_keys:
        runs, run = float(min(load.data_keys, n)), n / min(load.data_keys, n)
        most, exact = run, True
    else:
        runs, run = float(groups), n / groups
        by_bytes = messages_by_bytes(load.max_bytes, load.size, load.size_variation)
        most = min(float(load.max_messages), by_bytes)
        exact = math.isinf(load.max_bytes) or load.size_variation == 0
        if groups > load.capacity:  # least recently used under scattered contexts: most are gone again
            most, exact = min(most, 1 / (1 - load.capacity / groups)), False
    interleaved = 1.0 if load.data_keys else float(groups)

    # How many files a key serves before it is too old depends on the rate at which files are handed
    # out during its life.  With one context that is the workers' own rate (waiting for the KMS happens
    # before the key is born); with several, other contexts' waits fall into its life.
    per_key = _by_age(load, rate, rate, most, interleaved, ahead)
    if interleaved > 1 and math.isfinite(load.max_age):
        for _ in range(100):
            slowest = 1 / load.quota if runs * run / per_key > load.tokens else 0.0
            life_rate = min(rate, per_key / max(_cycle(load, per_key), slowest))
            per_key, before = _by_age(load, life_rate, rate, most, interleaved, ahead), per_key
            if abs(per_key - before) < 1e-3 * before:
                break
    aged = per_key < most and not load.data_keys
    last = 0.0  # the wait for the key of a manifest, which nothing hides
    if aged and interleaved == 1 and s > 0:
        calls, last = _renewed(load, rate, per_key, ahead)
    else:
        calls = runs * _keys(run, per_key, exact=exact and not aged, scattered=interleaved)
    calls = min(float(n), calls)
    per_fetch = n / calls
    cycle = _cycle(load, per_fetch)
    wait = max(0.0, cycle - per_fetch * s / workers)
    first = latency * (interleaved if interleaved > 1 else 1.0)
    stall = first + max(0.0, calls - last - interleaved) * wait + last * latency
    # The busiest second is the first one, in which the workers' lists are filled, or any other.
    begun = min(float(n), ahead + rate)
    per_start = most if interleaved == 1 else per_key
    started = float(math.ceil(begun / per_start - 1e-9))
    if interleaved > 1:
        started = groups * _keys(begun / groups, per_start, exact=False, scattered=interleaved)
    later = math.ceil(1 / max(cycle, per_key / rate)) if s > 0 and calls > interleaved else 1
    return _finish(load, calls, per_key, stall, min(per_fetch, n) * s / workers, max(started, later))


def _renewed(load: Load, rate: float, per_key: float, ahead: int) -> tuple[float, float]:
    """Calls where age ends the one key in use, and how many of them (0 or 1) a closing manifest makes.

    The first lists are handed out at once, while the workers start; a key is asked for by the first file
    that finds the one before too old, and the last file is handed out long before the last one is done.
    """
    files = load.files - load.closing
    waited = min(ahead - 1.0, rate * load.latency)
    drawn = max(0.0, files - ahead + load.idle * rate)  # that go by from the first draw to the last
    renewals = (drawn + waited) // per_key if drawn > per_key - waited else 0.0
    since = files + (load.idle + load.latency) * rate - renewals * per_key
    late = float(load.closing and since > waited + load.max_age * rate)
    return 1.0 + renewals + late, late


def _by_age(load: Load, life_rate: float, rate: float, most: float, groups: float, ahead: int) -> float:
    """Messages of one key in a shared cache: those that waited for it, and those within its age."""
    if math.isinf(load.max_age):
        return most
    waited = min(ahead - 1.0, rate * load.latency)
    if groups > 1:
        return max(1.0, min(most, 1 + (waited + life_rate * load.max_age) / groups))
    # Lists are asked for at nearly equal intervals, and the key grows too old between two of them: a whole
    # number of intervals, the less sharply the more of them and the less equal they are.
    lists = (waited + life_rate * load.max_age) / load.batch
    unequal = load.variation * load.variation / load.batch + (1 - 1 / load.workers) / load.batch**2
    sharp = math.exp(-2 * math.pi * math.pi * unequal * lists)
    lists += sharp * (math.ceil(lists) - lists) + (1 - sharp) * (1 + unequal) / 2
    return max(1.0, min(most, load.batch * lists))


def _cycle(load: Load, per_fetch: float) -> float:
    """Seconds from one KMS answer to the next in steady state."""
    busy = per_fetch * load.service / load.workers
    left = load.prefetch + 1 - load.batch  # in the workers' hands when a list is asked for
    wait = load.latency - min(float(left), per_fetch) * load.service / load.workers
    stall = _stall(wait, load.service, load.variation)
    if load.prefetch < load.batch:  # the worker whose end asked for the file has nothing left in hand
        stall += (wait - stall) / load.workers
    return max(load.latency + per_fetch * load.handing, busy + stall)


def _private(load: Load) -> Outcome:
    n, workers, s = load.files, min(load.workers, load.files), load.service
    each = n / workers
    groups = min(load.groups, n)
    if load.data_keys:
        run = n / min(load.data_keys, n)
        holders = min(workers, run)  # the next files of a run go to different workers
        per_key = run / holders
        age_messages = _renewals(load.max_age, s, load.variation, per_key)
        calls = min(load.data_keys, n) * holders * _keys(per_key, age_messages, exact=False)
    else:
        by_bytes = messages_by_bytes(load.max_bytes, load.size, load.size_variation)
        most = min(float(load.max_messages), by_bytes)
        per_group = each / groups
        exact = math.isinf(load.max_bytes) or load.size_variation == 0
        if groups > 1:
            per_key = most
            if math.isfinite(load.max_age):  # other contexts' files and waits fall into a key's life
                exact = False
                for _ in range(100):
                    slowest = workers / load.quota if n / per_key > load.tokens else 0.0
                    period = max(s + load.latency / per_key, slowest / per_key)
                    per_key, before = max(1.0, min(most, 1 + load.max_age / (period * groups))), per_key
                    if abs(per_key - before) < 1e-3 * before:
                        break
        else:
            per_key = _renewals(load.max_age, s, load.variation, most)
            exact = exact and (load.variation == 0 or per_key >= most - 1e-6)
        calls = workers * groups * _keys(per_group, per_key, exact=exact, scattered=float(groups))
    calls = min(calls, float(n))
    stall = calls / workers * load.latency
    # All workers ask at the start, and each again when its key is used up.
    cycle = per_key * s + load.latency
    often = math.ceil(1 / cycle) if cycle > 0 else each
    at_once = workers * min(each, max(float(groups > 1) * min(groups, 1 / s), often))
    if calls > workers * 1.01:
        return _finish(load, calls, per_key, stall, min(per_key, each) * s, at_once)
    # Only the first keys: workers that get theirs later leave their files to the others.
    late = max(0.0, calls - load.tokens)
    stall += late * late / (2 * load.quota * calls)
    return _finish(load, calls, per_key, stall, s, at_once)


def _scattered(load: Load) -> Outcome:
    """Decrypting in random order: every data key is met again and again, by every cache."""
    n, keys, s, latency = load.files, min(load.data_keys, load.files), load.service, load.latency
    caches = load.workers if load.sharing == "private" else 1
    seen = n / caches  # files that one cache meets
    per_key = seen / keys
    rate = load.workers / s if s > 0 else math.inf

    def misses(seconds: float) -> float:
        """Calls of one cache when the job takes ``seconds``."""
        distinct = keys * -math.expm1(seen * math.log1p(-1 / keys)) if keys > 1 else 1.0
        if load.capacity < keys:
            filled = math.log1p(-load.capacity / keys) / math.log1p(-1 / keys)
            if seen > filled:
                distinct = load.capacity + (seen - filled) * (1 - load.capacity / keys)
        if math.isinf(load.max_age) or seconds <= load.max_age:
            return distinct
        # Renewals of one key: the k-th call happens if k of its files fall outside k-1 whole ages.
        from scipy.stats import binom

        total, k = 0.0, 1
        chance = 1 / keys
        while (k - 1) * load.max_age < seconds and k <= seen:
            outside = 1 - (k - 1) * load.max_age / seconds
            more = float(binom.sf(k - 1, round(seen), chance * outside))
            total += more
            if more < 1e-6:
                break
            k += 1
        return max(distinct, min(keys * total, seen))

    def duration(per_cache: float) -> tuple[float, float]:
        """Seconds and stall: nearly every file asks at first, later only after an entry has expired."""
        if load.sharing == "private":
            return n / rate + per_cache * latency, per_cache * latency
        floor = 0.0
        distinct = keys * -math.expm1(n * math.log1p(-1 / keys)) if keys > 1 else 1.0
        if per_cache > distinct:
            floor = min(1.0, (per_cache - distinct) / max(n - distinct, 1.0))
        fraction = latency * rate
        busy = 0.0
        # Integrate max(1/rate, p(i)·L) over the files, p(i) = floor + (1 - floor)·exp(-i/keys).
        if fraction * floor >= 1:
            busy = latency * (floor * n + (1 - floor) * distinct)
        else:
            level = (1 / fraction - floor) / (1 - floor) if fraction > 0 and floor < 1 else math.inf
            cut = min(float(n), -keys * math.log(level)) if level < 1 else 0.0
            busy = latency * (floor * cut + (1 - floor) * keys * -math.expm1(-cut / keys)) + (n - cut) / rate
        # Past the crossing the calls are apart; each stalls the workers by what the files in hand leave.
        share = n / max(per_cache, 1.0)
        overlap = max(0.0, _cycle(load, share) - share / rate) if share / rate > latency else 0.0
        return busy + latency + overlap * max(0.0, per_cache - distinct), busy - n / rate + latency

    seconds = n / rate + latency
    for _ in range(20):
        per_cache = misses(seconds)
        worked, _ = duration(per_cache)
        forced = max(0.0, per_cache * caches - load.tokens) / load.quota
        seconds = (seconds + max(worked, forced)) / 2
    calls = per_cache * caches
    met = (load.workers + load.prefetch + rate if caches == 1 else 1 + 1 / s) if s > 0 else n
    first = keys * -math.expm1(min(met, seen) * math.log1p(-1 / keys)) if keys > 1 else 1.0
    return _finish(
        load, calls, n / calls, max(0.0, worked - n / rate), min(per_key, n / calls) * s, caches * first
    )
