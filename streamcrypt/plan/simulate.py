"""A Load played file by file, and a ClusterLoad list by list: what the formulas are checked against.

The KMS is a token bucket whose callers wait (our own limiter, not botocore's rejections and retries)
and answers after a fixed latency; service times are gamma distributed with the Load's mean and
variation, sizes likewise.  About a million files take a few seconds.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from streamcrypt.engine.remote import HELD
from streamcrypt.plan.closed import Load, Outcome
from streamcrypt.plan.cluster import ClusterLoad, ClusterOutcome


class _Kms:
    """A token bucket and a latency; remembers every call's send time."""

    def __init__(self, load: Load | ClusterLoad) -> None:
        self.load = load
        self.tokens = load.tokens
        self.updated = 0.0
        self.sent: list[float] = []

    def call(self, now: float, callers: int = 1) -> float:
        """When the answer to a question asked at ``now`` arrives, to the last of so many callers.

        They come in order of time.
        """
        rate = self.load.quota
        if math.isfinite(rate):
            if now > self.updated:
                self.tokens = min(max(self.load.tokens, 1.0), self.tokens + (now - self.updated) * rate)
                self.updated = now
            for _ in range(callers):
                self.tokens -= 1
                # Whoever waits keeps the place in the queue.
                self.sent.append(now if self.tokens >= 0 else now - self.tokens / rate)
        else:
            self.sent += [now] * callers
        return self.sent[-1] + self.load.latency


@dataclass(slots=True)
class _Entry:
    born: float
    messages: int = 0
    used: float = 0.0


class _Cache:
    """A data-key cache's decisions: which file needs a call."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.entries: OrderedDict[int, _Entry] = OrderedDict()

    def usable(self, key: int, size: float, now: float) -> bool:
        load = self.load
        entry = self.entries.get(key)
        if entry is None or now - entry.born > load.max_age:
            return False
        if not load.data_keys and (
            entry.messages + 1 > load.max_messages or entry.used + size > load.max_bytes
        ):
            return False
        self.entries.move_to_end(key)
        entry.messages += 1
        entry.used += size
        return True

    def put(self, key: int, size: float, born: float) -> None:
        self.entries[key] = _Entry(born, 1, size)
        self.entries.move_to_end(key)
        while len(self.entries) > self.load.capacity:
            self.entries.popitem(last=False)


def _draws(load: Load, rng: np.random.Generator) -> Iterator[tuple[float, float, int]]:
    """Service time, size and key number of every file, in order."""
    n = load.files

    def gamma(mean: float, variation: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        if variation == 0:
            return np.full(n, mean)
        shape = 1 / variation**2
        return rng.gamma(shape, mean / shape, n)

    if load.data_keys:
        keys = np.arange(n) * min(load.data_keys, n) // n
        if load.order == "random":
            keys = rng.integers(0, load.data_keys, n)
    else:
        keys = rng.integers(0, load.groups, n) if load.groups > 1 else np.zeros(n, np.int64)
    return zip(
        gamma(load.service, load.variation).tolist(),
        gamma(load.size, load.size_variation).tolist(),
        keys.tolist(),
        strict=True,
    )


def simulate(load: Load, seed: int = 0) -> Outcome:
    """Play the Load once; ``seed`` draws service times, sizes and the order of keys."""
    if load.files <= 0:
        return Outcome(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rng = np.random.default_rng(seed)
    kms = _Kms(load)
    played = _play_private if load.sharing == "private" else _play_shared
    seconds, work = played(load, kms, _draws(load, rng))
    calls = len(kms.sent)
    sent = np.sort(np.array(kms.sent))
    peak = _most_in_a_second(sent)
    stall = max(0.0, seconds - work / load.workers)
    return Outcome(seconds, calls, load.files / calls, seconds, stall, 0.0, float(peak))


def _play_shared(load: Load, kms: _Kms, files: Iterator[tuple[float, float, int]]) -> tuple[float, float]:
    """The parent hands out files in order, a list at a time, and blocks while it asks for a key."""
    cache = _Cache(load)
    free = [load.idle] * load.workers
    in_flight: list[float] = []
    ahead = load.workers + load.prefetch
    now = end = work = 0.0
    for number, (service, size, key) in enumerate(files, 1):
        if len(in_flight) == ahead:
            for _ in range(min(load.batch, ahead)):
                now = max(now, heapq.heappop(in_flight))
        if load.closing and number == load.files:
            now = end
        now += load.handing
        if not cache.usable(key, size, now):
            now = kms.call(now)
            cache.put(key, size, now)
        for _ in range(load.pieces):
            done = max(now, heapq.heappop(free)) + service / load.pieces
            heapq.heappush(free, done)
        heapq.heappush(in_flight, done)
        end = max(end, done)
        work += service
    return end, work


def _play_private(load: Load, kms: _Kms, files: Iterator[tuple[float, float, int]]) -> tuple[float, float]:
    """Whichever worker is free first takes the next file, and asks for itself."""
    caches = [_Cache(load) for _ in range(load.workers)]
    free = [(0.0, worker) for worker in range(load.workers)]
    end = work = 0.0
    for service, size, key in files:
        now, worker = free[0]
        if not caches[worker].usable(key, size, now):
            now = kms.call(now)
            caches[worker].put(key, size, now)
        done = now + service
        heapq.heapreplace(free, (done, worker))
        end = max(end, done)
        work += service
    return end, work


# -- a cluster

# More lists than this are played in groups: so many alike workers take a list each, at the same time.
_EVENTS = 250_000
# More calls of the KMS than this are not played: each is a moment that is kept.
MOST_CALLS: Final = 20_000_000


class _Driver:
    """Which data keys the messages of a list need, in the order of the files."""

    def __init__(self, load: ClusterLoad) -> None:
        self.load = load
        self.key = -1  # the newest that was asked for
        self.born = -math.inf
        self.room = 0  # messages that it may still be used for
        self.last = -1  # message that has its key

    def keys(self, first: int, last: int, now: float) -> range:
        """The numbers of the keys of these messages; those above ``self.key`` are to be asked for."""
        load = self.load
        old = now - self.born > load.max_age
        if load.data_keys:
            number = min(load.data_keys, load.files)
            keys = range(first * number // load.files, last * number // load.files + 1)
            if old:
                self.key = min(self.key, keys[0] - 1)
            return keys
        usable = 0 if old else self.room
        current = first <= self.last or usable > 0
        missing, self.last = last - self.last - usable, last
        if missing <= 0:
            self.room = -missing
            return range(self.key, self.key + 1)
        per_key = load.files if math.isinf(load.per_key) else int(load.per_key)
        new = -(-missing // per_key)
        self.room = new * per_key - missing
        return range(self.key if current else self.key + 1, self.key + new + 1)


def _group(load: ClusterLoad) -> int:
    """How many workers are played as one: a divisor of their number."""
    most = load.lists // _EVENTS
    return next(size for size in range(max(1, most), 0, -1) if load.all_workers % size == 0)


def _missing(keys: range, known: int, questions: int) -> deque[int]:
    """The keys above ``known``, each as often as it takes calls."""
    if not keys or keys[-1] <= known:
        return deque()
    return deque(key for key in keys if key > known for _ in range(questions))


def simulate_cluster(
    load: ClusterLoad, seed: int = 0
) -> tuple[ClusterOutcome, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Play a cluster's job once; also the moments at which the KMS was asked, in order.

    Every question takes a token of the one bucket, whoever asks; callers wait for theirs, in the order
    in which they ask.  Our workers pace themselves apart from each other, so a real cluster also has
    refusals, which the KMS counts and the workers repeat.
    """
    group = _group(load)
    workers, events = load.all_workers // group, -(-load.lists // group)
    rng = np.random.default_rng(seed)
    mean = load.service * load.files / (events * group)
    services = np.full(events, mean)
    if load.variation:
        services = rng.gamma(1 / load.variation**2, mean * load.variation**2, events)
    work = services.tolist()
    kms, driver = _Kms(load), _Driver(load)
    handed = (load.driver * load.files + load.hand_over * load.lists) / events

    # What happens next: (time, who); -1 is the driver.
    heap = [(handed, -1)]
    queue: deque[tuple[float, range]] = deque()
    idle = list(range(workers))
    working = [False] * workers
    asking: dict[int, tuple[deque[int], float]] = {}
    known, asked = [-1] * workers, [-math.inf] * workers
    prepared = in_flight = driver_calls = 0
    blocked = False
    pending: tuple[range, deque[int]] | None = None  # the driver's list, and the keys it still asks for
    end = stall = busy = driver_busy = 0.0
    while heap:
        now, who = heapq.heappop(heap)
        if who < 0:
            if pending is None:
                driver_busy += handed
                first = prepared * load.files // events
                last = max(first, (prepared + 1) * load.files // events - 1)
                keys = driver.keys(first, last, now)
                pending = keys, _missing(keys, driver.key, load.questions)
            keys, missing = pending
            if missing:
                driver.key = max(driver.key, missing.popleft())
                driver_calls += 1
                driver.born = kms.call(now)
                driver_busy += driver.born - now
                heapq.heappush(heap, (driver.born, -1))
                continue
            pending = None
            queue.append((work[prepared], keys))
            prepared += 1
            in_flight += 1
            if idle:
                heapq.heappush(heap, (now, idle.pop()))
            if prepared < events:
                blocked = in_flight >= HELD * workers
                if not blocked:
                    heapq.heappush(heap, (now + handed, -1))
            continue
        if working[who]:
            working[who] = False
            in_flight -= 1
            if blocked:
                blocked = False
                heapq.heappush(heap, (now + handed, -1))
        if who not in asking:
            if not queue:
                idle.append(who)
                continue
            service, keys = queue.popleft()
            expired = now - asked[who] > load.max_age
            asking[who] = _missing(keys, -1 if expired else known[who], load.questions), service
        wanted, service = asking[who]
        if wanted:
            known[who] = max(known[who], wanted.popleft())
            asked[who] = kms.call(now, group)
            stall += asked[who] - now
            heapq.heappush(heap, (asked[who], who))
            continue
        del asking[who]
        working[who] = True
        busy += service
        end = max(end, now + service)
        heapq.heappush(heap, (now + service, who))
    sent = np.sort(np.array(kms.sent))
    outcome = ClusterOutcome(
        end,
        driver_busy,
        (busy + stall) / workers,
        max(0.0, len(sent) - load.tokens) / load.quota,
        stall / workers,
        driver_calls,
        len(sent) - driver_calls,
        float(_most_in_a_second(sent)),
    )
    return outcome, sent


def _most_in_a_second(sent: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> int:
    if not len(sent):
        return 0
    return int((np.searchsorted(sent, sent + 1, "left") - np.arange(len(sent))).max())
