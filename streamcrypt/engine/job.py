"""What is asked, and what was done."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from streamcrypt.errors import FormatError, IntegrityError, KeyAccessError, StreamcryptError, TemporaryError
from streamcrypt.keys.materials import Materials
from streamcrypt.message.suites import UNSIGNED, AlgorithmSuite
from streamcrypt.storage import Filters, Tree
from streamcrypt.streams import DEFAULT_FRAME_LENGTH, ReadingRules
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:  # few jobs have one of these
    from streamcrypt.keys.partition import KeyMap
    from streamcrypt.keys.signing import PublicKey, SigningKey


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# So many requests to an object store are under way at a time, where nobody says how many.
STORE_WORKERS: Final = 8


class Place(NamedTuple):
    """A file (``name`` in its folder), a whole folder (``name`` None), or standard input or output."""

    tree: Tree
    name: str | None = None
    is_stream: bool = False

    @property
    def path(self) -> str:
        if self.is_stream:
            return "-"
        return self.tree.root if self.name is None else self.tree.path(self.name)


class Progress(NamedTuple):
    """How far a job is: files that are finished, plaintext bytes that are done."""

    files: int
    bytes: int


class Job(NamedTuple):
    """One call of encrypt, decrypt, verify or rekey.

    ``reading`` gives materials for the messages that are read, ``writing`` for those that are
    written; lengths are in bytes.  ``names`` limits the job to these names of the source.
    ``resume`` goes on with an interrupted job on the same folders; ``resuming`` then opens the messages
    that it had written.  ``key_map`` gives some files other keys than ``writing``.  ``signing`` signs what
    was written as a whole; ``signed_by`` is who must have signed what is read.
    """

    operation: str
    source: Place
    destination: Place | None = None
    against: Place | None = None
    reading: Materials | None = None
    writing: Materials | None = None
    rules: ReadingRules = ReadingRules()
    context: Mapping[str, str] = MappingProxyType({})
    authenticated_context: Mapping[str, str] = MappingProxyType({})
    suite: AlgorithmSuite = UNSIGNED
    frame_length: int = DEFAULT_FRAME_LENGTH
    workers: int = 1
    overwrite: bool = False
    resume: bool = False
    resuming: Materials | None = None
    durable: bool = True
    require_manifest: bool = False
    filters: Filters = Filters()
    names: tuple[str, ...] | None = None
    dry_run: bool = False
    progress: Callable[[Progress], None] | None = None
    audit: Callable[[dict[str, Any]], None] | None = None
    key_map: KeyMap | None = None
    signing: SigningKey | None = None
    signed_by: PublicKey | None = None


class Failure(NamedTuple):
    """One file that failed, and why."""

    path: str
    error: StreamcryptError


# The shape of the JSON object does not depend on what happened.
_NO_CACHE: dict[str, Any] = {
    "hits": 0,
    "misses": 0,
    "evictions": {"age": 0, "messages": 0, "bytes": 0, "capacity": 0},
}
_NO_CALLS: dict[str, Any] = {
    "calls": {},
    "latency_ms": {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0},
    "throttled": 0,
    "retries": 0,
}


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def peak_memory() -> int:
    """The most bytes that this process has had in memory.

    Not by getrusage where Linux says it itself: there it begins with what the parent had.
    """
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open("/proc/self/status", encoding="utf-8") as lines,
    ):
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # start-up: Linux needs it not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Report:
    """What a job did.  ``bytes_in`` were read, ``bytes_out`` written; ``seconds`` is wall time.

    ``cpu_seconds``: processor time meanwhile, of this process and of the workers that it started.
    ``peak_memory``: the most bytes that this process has had in memory so far.

    ``to_json`` gives the JSON object of the command line.
    """

    def __init__(self, operation: str, workers: int = 0, *, dry_run: bool = False) -> None:
        self.operation = operation
        self.workers = workers
        self.files = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_memory = 0
        self.data_keys = 0
        self.skipped = 0
        self.failed: list[Failure] = []
        self.cache: dict[str, Any] = {}
        self.kms: dict[str, Any] = {}
        self.advice: list[str] = []
        self.manifest_digest: str | None = None
        self.keys: list[dict[str, Any]] | None = None
        self.signature: dict[str, str] | None = None
        self.dry_run = dry_run

    def __repr__(self) -> str:
        return f"<Report {json.dumps(self.to_json())}>"

    def __getitem__(self, name: str) -> Any:
        """A member of the JSON object."""
        return self.to_json()[name]

    def __iter__(self) -> Iterator[str]:
        """The names of its members; without it ``in`` would count up from 0."""
        return iter(self.to_json())

    @property
    def bytes_per_second(self) -> float:
        return self.bytes_in / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "operation": self.operation,
            "files": self.files,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": round(self.seconds, 6),
            "bytes_per_second": round(self.bytes_per_second, 1),
            "cpu_seconds": round(self.cpu_seconds, 6),
            "peak_memory": self.peak_memory,
            "workers": self.workers,
            "data_keys": self.data_keys,
            "cache": self.cache or _NO_CACHE,
            "skipped": self.skipped,
            "failed": [{"path": failure.path, "error": str(failure.error)} for failure in self.failed],
            "kms": self.kms or _NO_CALLS,
            "advice": self.advice,
        }
        if self.manifest_digest is not None:
            report["manifest"] = self.manifest_digest
        if self.keys is not None:
            report["keys"] = self.keys
        if self.signature is not None:
            report["signature"] = self.signature
        if self.dry_run:
            report["dry_run"] = True
        return report

    def raise_for_failures(self) -> None:
        """Raise the gravest failure, with this report as its ``report``; nothing when all went well."""
        if not self.failed:
            return
        gravest = min(self.failed, key=lambda failure: _gravity(failure.error)).error
        raised = gravest
        if len(self.failed) > 1:
            total = len(self.failed) + self.files + self.skipped
            raised = copy.copy(gravest)  # in ``failed`` an error says what became of its file, and no more
            raised.args = (f"{gravest} ({len(self.failed)} of {total} files failed)",)
            raised.gravest = gravest  # type: ignore[attr-defined]  # the one that it tells
        raised.report = self  # type: ignore[attr-defined]  # for the caller who wants all of them
        raise raised.with_traceback(gravest.__traceback__) from gravest.__cause__


def _gravity(error: StreamcryptError) -> float:
    if isinstance(error, FormatError) and not error.recognised:
        return math.inf  # never was a message: the wrong file, not a tampered one
    for rank, kind in enumerate((TemporaryError, KeyAccessError, IntegrityError)):
        if isinstance(error, kind):
            return (2, 1, 0)[rank]
    return math.inf


# Who wants to know of every job (telemetry.py): called with the job, each gives a context manager around
# it, whose value is called with the finished report.  Empty unless somebody asked.
observers: list[Callable[[Job], AbstractContextManager[Callable[[Report], None]]]] = []
