"""Latency and quota of AWS, for tests and planning: the embedded KMS on request answers as slowly,
and refuses as many calls, as the real one would."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from streamcrypt.kms.errors import refuse
from streamcrypt.units import parse_duration

if TYPE_CHECKING:
    import random

_P99_IN_SIGMAS: Final = 2.3263478740408408  # the standard normal's 99th percentile

_THROTTLED: Final = (
    "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls."
)

Latency = Callable[["random.Random"], float]


def constant(seconds: float) -> Latency:
    return lambda _: seconds


def lognormal(median: float, p99: float) -> Latency:
    """The usual shape of a service's latency, given by two of its percentiles, in seconds."""
    if not 0 < median <= p99:
        raise ValueError("a latency needs 0 < median <= p99")
    mu, sigma = math.log(median), math.log(p99 / median) / _P99_IN_SIGMAS
    return lambda source: source.lognormvariate(mu, sigma)


def observed(samples: Sequence[float]) -> Latency:
    """Latencies drawn from recorded ones, in seconds."""
    if not samples:
        raise ValueError("a latency needs at least one sample")
    kept = list(samples)
    return lambda source: source.choice(kept)


def parse_latency(text: str) -> Latency:
    """``8ms``, or ``8ms,40ms`` for median and 99th percentile."""
    first, comma, second = text.partition(",")
    median = parse_duration(first)
    return lognormal(median, parse_duration(second)) if comma else constant(median)


class Simulation:
    """A latency for every call, a token bucket that throttles, and calls that fail.  Thread-safe.

    ``rate`` is in calls a second over all operations; the bucket holds one second's worth, as
    AWS counts over one-second intervals, unless ``burst`` says otherwise.  ``errors`` is the share
    of calls that are refused whatever the bucket holds, by turns as throttled and as KMS's own fault.
    """

    def __init__(
        self,
        *,
        latency: Latency | None = None,
        rate: float | None = None,
        burst: float | None = None,
        errors: float = 0.0,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if rate is not None and rate <= 0:
            raise ValueError("rate must be above 0")
        if not 0 <= errors < 1:
            raise ValueError("errors is a share of the calls, from 0 to below 1")
        self._latency = latency
        self._rate = rate
        self._errors = errors
        self._failures = 0
        self._capacity = burst if burst is not None else max(rate or 0.0, 1.0)
        self._tokens = self._capacity
        import random

        self._random = random.Random(seed)  # noqa: S311 - a simulated delay, no secret
        self._clock = clock
        self._sleep = sleep
        self._filled = clock()
        self._lock = threading.Lock()
        self.throttled = 0
        self.failed = 0

    def admit(self, operation: str) -> None:
        """ThrottlingException when the bucket is empty; that or KMSInternalException for a call that is to fail."""
        if self._errors:
            with self._lock:
                failing = self._random.random() < self._errors
                self._failures += failing
                throttled = failing and self._failures % 2 == 1
                self.throttled += throttled
                self.failed += failing and not throttled
            if throttled:
                refuse("ThrottlingException", _THROTTLED)
            if failing:
                refuse(
                    "KMSInternalException", "The request was rejected because an internal exception occurred."
                )
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            self._tokens = min(self._capacity, self._tokens + (now - self._filled) * self._rate)
            self._filled = now
            if self._tokens >= 1:
                self._tokens -= 1
                return
            self.throttled += 1
        refuse("ThrottlingException", _THROTTLED)

    def draw(self) -> float:
        """A latency in seconds."""
        if self._latency is None:
            return 0.0
        with self._lock:
            return self._latency(self._random)

    def wait(self) -> None:
        """Let one drawn latency pass."""
        seconds = self.draw()
        if seconds > 0:
            self._sleep(seconds)
