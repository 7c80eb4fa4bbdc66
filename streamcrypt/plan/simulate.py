"""The same Load as ``closed.closed_form``, played file by file: what the formulas are checked against.

The KMS is a token bucket whose callers wait (our own limiter, not botocore's rejections and retries)
and answers after a fixed latency; service times are gamma distributed with the Load's mean and
variation, sizes likewise.  About a million files take a few seconds.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamcrypt.plan.closed import Load, Outcome


class _Kms:
    """A token bucket and a latency; remembers every call's send time."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.tokens = load.tokens
        self.updated = 0.0
        self.sent: list[float] = []

    def call(self, now: float) -> float:
        """When the answer to a question asked at ``now`` arrives.  Callers come in order of time."""
        rate = self.load.quota
        if math.isfinite(rate):
            if now > self.updated:
                self.tokens = min(max(self.load.tokens, 1.0), self.tokens + (now - self.updated) * rate)
                self.updated = now
            self.tokens -= 1
            if self.tokens < 0:  # whoever waits keeps the place in the queue
                now -= self.tokens / rate
        self.sent.append(now)
        return now + self.load.latency


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
    peak = max((int(np.searchsorted(sent, t + 1, "left")) - i for i, t in enumerate(sent)), default=0)
    stall = max(0.0, seconds - work / load.workers)
    return Outcome(seconds, calls, load.files / calls, seconds, stall, 0.0, float(peak))


def _play_shared(load: Load, kms: _Kms, files: Iterator[tuple[float, float, int]]) -> tuple[float, float]:
    """The parent hands out files in order and blocks while it asks for a key."""
    cache = _Cache(load)
    free = [0.0] * load.workers
    in_flight: list[float] = []
    ahead = load.workers + load.prefetch
    now = end = work = 0.0
    waiting = list(itertools.islice(files, load.prepared))
    for _, size, key in waiting:
        if not cache.usable(key, size, now):
            now = kms.call(now)
            cache.put(key, size, now)
    ready = len(waiting)
    for service, size, key in itertools.chain(waiting, files):
        if len(in_flight) == ahead:
            now = max(now, heapq.heappop(in_flight))
        if ready > 0:
            ready -= 1
        elif not cache.usable(key, size, now):
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
