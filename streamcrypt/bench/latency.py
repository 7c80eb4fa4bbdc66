"""Latency of a KMS: closed loop (as fast as answers come) and open loop (at a given rate).

Two series: ``service`` from sending a call to its answer, ``response`` from when the call was due.
In a closed loop they are one.  In an open loop a slow answer delays the calls behind it, and only
``response`` shows that (the closed loop's omission of it is called coordinated omission).
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

_MOST_THREADS: Final = 256


class LatencyError(RuntimeError):
    """The KMS cannot be measured: not there, not installed."""


class NoSuchKmsError(LatencyError):
    """Nothing that can be measured was named."""


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}

    def at(fraction: float) -> float:
        return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] * 1000

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1] * 1000}


@contextlib.contextmanager
def target(
    kms: str, *, key: str | None, latency: float = 0.0, quota: float | None = None, errors: float = 0.0
) -> Iterator[Callable[[], Any]]:
    """One GenerateDataKey of the KMS that ``kms`` names, as a function."""
    from streamcrypt.kms import kms_client, open_service

    with contextlib.ExitStack() as stack:
        if kms in ("local", "local-boto3"):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamcrypt-kms-")))
            client: Any = open_service(home)
            if key is None:
                key = client.create_key(Description="benchmark")["KeyMetadata"]["Arn"]
            if kms == "local":
                from streamcrypt.bench.shaped import ShapedKms

                client = ShapedKms(client, latency=latency, quota=quota, errors=errors)
            else:
                client = kms_client("local", home=home)
        elif kms == "moto":
            try:
                from moto.server import ThreadedMotoServer
            except ImportError as error:
                raise LatencyError("moto is not installed: pip install 'moto[server]'") from error
            import boto3

            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each call costs time
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            host, port = server.get_host_and_port()
            client = boto3.client(
                "kms",
                endpoint_url=f"http://{host}:{port}",
                region_name="us-east-1",
                aws_access_key_id="moto",
                aws_secret_access_key="moto",  # noqa: S106 - moto asks for one and checks none
            )
            stack.callback(client.close)
        elif kms == "aws":
            if key is None:
                raise NoSuchKmsError("--kms aws needs --key: nothing is created in an account")
            client = _boto3_client("aws")
        elif kms.startswith("http"):
            client = _boto3_client(f"local@{kms}")
        else:
            raise NoSuchKmsError(
                f"{kms!r} is not a KMS to measure; choose local, local-boto3, moto, aws or a URL"
            )
        if key is None:
            key = client.create_key(Description="benchmark")["KeyMetadata"]["KeyId"]
        yield lambda: client.generate_data_key(KeyId=key, KeySpec="AES_256")


def _boto3_client(reference: str) -> Any:
    """A client, or LatencyError with botocore's reason (no Region, no credentials)."""
    from botocore.exceptions import BotoCoreError

    from streamcrypt.kms import kms_client

    try:
        return kms_client(reference)
    except (BotoCoreError, ValueError) as error:
        raise LatencyError(f"{reference}: {error}") from error


class _Series:
    """What the callers saw."""

    def __init__(self, most: int | None) -> None:
        self._lock = threading.Lock()
        self._most = most
        self.started = 0
        self.service: list[float] = []
        self.response: list[float] = []
        self.throttled = 0
        self.failed = 0
        self.error = ""

    def begin(self) -> bool:
        """Whether one more call may be made."""
        with self._lock:
            if self._most is not None and self.started >= self._most:
                return False
            self.started += 1
            return True

    def call(self, one: Callable[[], Any], due: float, clock: Callable[[], float]) -> None:
        sent = clock()
        try:
            one()
        except Exception as error:  # noqa: BLE001 - whatever a client raises is a failed call of this series
            code = getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__)
            with self._lock:
                if "hrottl" in code:
                    self.throttled += 1
                else:
                    self.failed += 1
                    self.error = f"{code}: {error}"
            return
        ended = clock()
        with self._lock:
            self.service.append(ended - sent)
            self.response.append(ended - due)


def measure(
    kms: str,
    *,
    key: str | None = None,
    latency: float = 0.0,
    quota: float | None = None,
    errors: float = 0.0,
    threads: int = 4,
    rate: float | None = None,
    seconds: float = 5.0,
    max_calls: int | None = None,
) -> dict[str, Any]:
    """Measure the KMS that ``kms`` names: ``local``, ``local-boto3``, ``moto``, ``aws`` or a URL.

    LatencyError when it is not there or refuses the first call.
    """
    with target(kms, key=key, latency=latency, quota=quota, errors=errors) as one:
        found = drive(one, threads=threads, rate=rate, seconds=seconds, max_calls=max_calls)
    return {"kms": kms, **found}


def drive(
    one: Callable[[], Any],
    *,
    threads: int = 4,
    rate: float | None = None,
    seconds: float = 5.0,
    max_calls: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Call ``one`` for ``seconds``: ``threads`` callers in a closed loop, or ``rate`` calls a second in an open one."""
    series = _Series(max_calls)
    late = 0
    # The first call opens connections; it is made before the clock starts, and counts as a call.
    if series.begin():
        series.call(one, clock(), clock)
        if series.failed:
            raise LatencyError(f"the first call failed: {series.error}")
        series.service.clear()
        series.response.clear()
    started = clock()
    if rate is None:

        def loop(_: int) -> None:
            while clock() - started < seconds and series.begin():
                series.call(one, clock(), clock)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(loop, range(threads)))
    else:
        with ThreadPoolExecutor(_MOST_THREADS) as pool:
            for number in range(int(rate * seconds)):
                due = started + number / rate
                ahead = due - clock()
                if ahead > 0:
                    sleep(ahead)
                elif ahead < -0.01:
                    late += 1
                if not series.begin():
                    break
                pool.submit(series.call, one, due, clock)
    elapsed = clock() - started
    refused = series.throttled + series.failed
    return {
        "loop": "open" if rate is not None else "closed",
        "rate": rate,
        "threads": threads if rate is None else None,
        "calls": len(series.service),
        "seconds": elapsed,
        "per_second": len(series.service) / elapsed if elapsed else 0.0,
        "started": series.started,
        "throttled": series.throttled,
        "failed": series.failed,
        "refused_share": refused / (refused + len(series.service)) if refused else 0.0,
        "late_starts": late,
        "service_ms": _percentiles(series.service),
        "response_ms": _percentiles(series.response),
    }
