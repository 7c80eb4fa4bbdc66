"""Spans and counters of every job, for whoever collects them: OpenTelemetry, Prometheus.

    stop = telemetry.opentelemetry()      a span for each encrypt, decrypt, verify and rekey
    stop = telemetry.prometheus()         counters, and a histogram of seconds

Both tell what a job's report says (docs/performance.md has the names), and nothing that is secret:
no key, no plaintext, no encryption context.  A process that calls neither pays nothing.  Needs
`pip install 'streamcrypt[telemetry]'`; exporters are the application's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from streamcrypt.engine.job import Job, Report, observers

Observer = Callable[[Job], AbstractContextManager[Callable[[Report], None]]]

# Seconds of a job: from a small file to a night.
_BUCKETS: Final = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 14_400, 43_200)


def opentelemetry(tracer_provider: Any = None) -> Callable[[], None]:
    """A span for every job from now on; the function that is returned ends that.

    The span is current while the job runs, so the spans that botocore's instrumentation makes of KMS
    calls are its children.  ``tracer_provider`` None: the global one.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise ImportError("spans need opentelemetry-api: pip install 'streamcrypt[telemetry]'") from error
    from streamcrypt import __version__

    tracer = trace.get_tracer("streamcrypt", __version__, tracer_provider)

    @contextlib.contextmanager
    def observe(job: Job) -> Iterator[Callable[[Report], None]]:
        attributes = {"streamcrypt.operation": job.operation, "streamcrypt.source": job.source.path}
        if job.destination is not None:
            attributes["streamcrypt.destination"] = job.destination.path
        # An exception ends the span with the status ERROR, and is recorded in it.
        with tracer.start_as_current_span(f"streamcrypt {job.operation}", attributes=attributes) as span:
            yield lambda report: span.set_attributes(_attributes(report))

    return _observing(observe)


def _attributes(report: Report) -> dict[str, int | float]:
    """The figures of a report under dotted names; of what failed only how many."""
    row = report.to_json()
    row["failed"] = len(row["failed"])
    return {f"streamcrypt.{name}": value for name, value in _flat(row)}


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def prometheus(registry: Any = None) -> Callable[[], None]:
    """Counters of every job from now on; the function that is returned ends that and takes them away.

    ``registry`` None: prometheus_client's own.
    """
    try:
        from prometheus_client import REGISTRY, Counter, Histogram
    except ImportError as error:
        raise ImportError("counters need prometheus-client: pip install 'streamcrypt[telemetry]'") from error
    place = REGISTRY if registry is None else registry

    def counter(name: str, what: str, *labels: str) -> Any:
        return Counter(f"streamcrypt_{name}", what, labels, registry=place)

    jobs = counter("jobs", "Jobs that ended, by outcome: done, or the error's class", "operation", "outcome")
    seconds = Histogram(
        "streamcrypt_job_seconds", "Wall-clock time of jobs", ["operation"], buckets=_BUCKETS, registry=place
    )
    files = counter("files", "Files that were done", "operation")
    skipped = counter("skipped_files", "Files that a resumed job found done", "operation")
    failed = counter("failed_files", "Files that failed, by the error's class", "operation", "error")
    read = counter("read_bytes", "Bytes that were read", "operation")
    written = counter("written_bytes", "Bytes that were written", "operation")
    data_keys = counter("data_keys", "Data keys that were made or unwrapped", "operation")
    lookups = counter("cache_lookups", "Questions to the data-key cache", "result")
    evictions = counter("cache_evictions", "Data keys that left the cache, by the limit", "limit")
    calls = counter("kms_calls", "KMS calls, retried ones included", "call")
    throttled = counter("kms_throttled", "KMS calls that were throttled")
    retries = counter("kms_retries", "KMS calls that were made again")

    def count(report: Report) -> None:
        operation, row = report.operation, report.to_json()
        seconds.labels(operation).observe(report.seconds)
        files.labels(operation).inc(report.files)
        skipped.labels(operation).inc(report.skipped)
        for failure in report.failed:
            failed.labels(operation, type(failure.error).__name__).inc()
        read.labels(operation).inc(report.bytes_in)
        written.labels(operation).inc(report.bytes_out)
        data_keys.labels(operation).inc(report.data_keys)
        for result in ("hits", "misses"):
            lookups.labels(result).inc(row["cache"][result])
        for limit, number in row["cache"]["evictions"].items():
            evictions.labels(limit).inc(number)
        for call, number in row["kms"]["calls"].items():
            calls.labels(call).inc(number)
        throttled.inc(row["kms"]["throttled"])
        retries.inc(row["kms"]["retries"])

    @contextlib.contextmanager
    def observe(job: Job) -> Iterator[Callable[[Report], None]]:
        try:
            yield count
        except BaseException as error:
            jobs.labels(job.operation, type(error).__name__).inc()
            raise
        jobs.labels(job.operation, "done").inc()

    stop = _observing(observe)
    made = (jobs, seconds, files, skipped, failed, read, written, data_keys, lookups, evictions, calls)

    def stop_and_unregister() -> None:
        stop()
        for metric in (*made, throttled, retries):
            place.unregister(metric)

    return stop_and_unregister


def _observing(observe: Observer) -> Callable[[], None]:
    observers.append(observe)
    return lambda: observers.remove(observe)


class Instrumentor:
    """For `opentelemetry-instrument streamcrypt encrypt …`: its entry point of this package."""

    _stop: Callable[[], None] | None = None

    def instrument(self, **options: Any) -> None:
        """``options``: ``tracer_provider``, as opentelemetry-instrumentation passes it."""
        if Instrumentor._stop is None:
            Instrumentor._stop = opentelemetry(options.get("tracer_provider"))

    def uninstrument(self, **_: Any) -> None:
        if Instrumentor._stop is not None:
            Instrumentor._stop()
            Instrumentor._stop = None
