"""A KMS with the latency and the quota that a measurement asks for, in front of the embedded one.

It answers the calls that the keyrings make, by boto3's names, and remembers every latency.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from streamcrypt.kms.errors import KmsError

SPREAD: Final = 0.25  # sigma of the lognormal latency


class ShapedKms:
    """``service`` behind a wait of mean ``latency`` seconds and a token bucket of ``quota`` calls a second.

    The bucket holds one second of quota and is full at the start; a call that finds it empty is
    refused with ThrottlingException, as AWS KMS does.  ``samples`` are the seconds of the answered
    calls, ``waited`` their sum with the refused ones'.
    """

    def __init__(
        self,
        service: Any,
        *,
        latency: float = 0.0,
        quota: float | None = None,
        seed: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._service = service
        self._latency = latency
        self._quota = quota
        self._random = random.Random(seed)  # noqa: S311 - latencies, no secret
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._tokens = quota or 0.0
        self._updated = clock()
        self.samples: list[float] = []
        self.calls: dict[str, int] = {}
        self.throttled = 0
        self.waited = 0.0

    def _admitted(self) -> bool:
        if self._quota is None:
            return True
        now = self._clock()
        self._tokens = min(max(self._quota, 1.0), self._tokens + (now - self._updated) * self._quota)
        self._updated = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _call(self, operation: str, request: dict[str, Any]) -> Any:
        started = self._clock()
        with self._lock:
            admitted = self._admitted()
            delay = 0.0
            if self._latency > 0:
                # The mean of a lognormal distribution is exp(mu + sigma²/2).
                mu = math.log(self._latency) - SPREAD * SPREAD / 2
                delay = self._random.lognormvariate(mu, SPREAD)
        if not admitted:
            with self._lock:
                self.throttled += 1
            raise KmsError("ThrottlingException", _THROTTLED)
        answer = getattr(self._service, operation)(**request)
        left = delay - (self._clock() - started)  # the service's own time is part of the latency
        if left > 0:
            self._sleep(left)
        took = self._clock() - started
        with self._lock:
            self.samples.append(took)
            self.waited += took
            self.calls[operation] = self.calls.get(operation, 0) + 1
        return answer

    def generate_data_key(self, **request: Any) -> Any:
        return self._call("generate_data_key", request)

    def encrypt(self, **request: Any) -> Any:
        return self._call("encrypt", request)

    def decrypt(self, **request: Any) -> Any:
        return self._call("decrypt", request)

    def describe_key(self, **request: Any) -> Any:
        """Not shaped: it is asked once, when a job starts."""
        return self._service.describe_key(**request)


_THROTTLED: Final = (
    "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls."
)
