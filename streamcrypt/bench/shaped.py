"""A KMS with the latency, the quota and the failures that a measurement asks for, in front of another one.

It answers the calls that keyrings make, by boto3's names, and remembers every latency.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from streamcrypt.kms.simulation import Simulation

SPREAD: Final = 0.25  # sigma of the lognormal latency


def simulation(
    latency: float, quota: float | None, errors: float, *, seed: int | None, **hands: Any
) -> Simulation:
    """The embedded KMS's own, with a lognormal latency of this mean.  ``hands``: its clock and its sleep."""
    # The mean of a lognormal distribution is exp(mu + sigma²/2).
    mu = math.log(latency) - SPREAD * SPREAD / 2 if latency > 0 else 0.0
    drawn = (lambda source: source.lognormvariate(mu, SPREAD)) if latency > 0 else None
    return Simulation(latency=drawn, rate=quota, errors=errors, seed=seed, **hands)


class ShapedKms:
    """``service`` behind a wait of mean ``latency`` seconds and a token bucket of ``quota`` calls a second.

    The bucket holds one second of quota and is full at the start; a call that finds it empty is
    refused with ThrottlingException, as AWS KMS does.  The share ``errors`` of the calls is refused all
    the same.  ``samples`` are the seconds of the answered calls, ``waited`` their sum.
    """

    def __init__(
        self,
        service: Any,
        *,
        latency: float = 0.0,
        quota: float | None = None,
        errors: float = 0.0,
        seed: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._service = service
        self._simulation = simulation(latency, quota, errors, seed=seed, clock=clock)
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self.samples: list[float] = []
        self.calls: dict[str, int] = {}
        self.throttled = 0
        self.failed = 0
        self.waited = 0.0

    def _call(self, operation: str, request: dict[str, Any]) -> Any:
        started = self._clock()
        try:
            self._simulation.admit(operation)
            delay = self._simulation.draw()
            answer = getattr(self._service, operation)(**request)
        except Exception as error:
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
            with self._lock:
                self.throttled += "hrottl" in code
                self.failed += "hrottl" not in code
            raise
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
