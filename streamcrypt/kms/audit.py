"""Audit: every call becomes one compact row, and an event in CloudTrail's shape only when it is read.

SIGNATURES FIRST, for the store and the service; the bodies follow within the hour.

    store:    connection.executescript(audit.SCHEMA);  connection.execute(audit.INSERT, audit.row(...))
    reading:  sql, parameters = filter.select(after=last_id);  [audit.event(row) for row in connection.execute(sql, parameters)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamcrypt.kms.policy import Caller

SCHEMA = ""
"""CREATE TABLE IF NOT EXISTS audit (id INTEGER PRIMARY KEY, time REAL, operation TEXT, caller TEXT, key TEXT, error TEXT, detail TEXT)"""
INSERT = ""
"""INSERT INTO audit (...) VALUES (?, …): takes what row() returns."""
COLUMNS = ("id", "time", "operation", "caller", "key", "error", "detail")
"""The order in which select() reads and event() expects."""

Row = tuple[Any, ...]


def row(
    time: float,
    operation: str,
    caller: Caller,
    request: Mapping[str, Any],
    response: Mapping[str, Any] | None,
    *,
    request_id: str,
    keys: Sequence[str] = (),
    key_spec: str | None = None,
    region: str = "local",
    error: str | None = None,
    message: str | None = None,
    tls: bool = False,
) -> Row:
    """The row of one call, for INSERT.  ``request`` and ``response`` in boto3's shapes: no plaintext, ciphertext,
    token or other blob of them is kept.  ``keys``: ARNs of the keys used (ReEncrypt: source, destination).
    ``error``: the exception's name (``AccessDeniedException``).  A few microseconds."""
    raise NotImplementedError


def service_row(time: float, event_name: str, key: str, *, region: str = "local") -> Row:
    """The row of what KMS did by itself: ``DeleteKey`` at the end of the window, ``RotateKey``."""
    raise NotImplementedError


def event(row: Row) -> dict[str, Any]:
    """The CloudTrail event of a row: the record shape of section 14 of the reference."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events: every given field must match.  Times are Unix seconds."""

    since: float | None = None
    until: float | None = None
    principal: str | None = None
    """A part of the ARN."""
    operation: str | None = None
    key: str | None = None
    """Key ARN or id."""
    context: Mapping[str, str] = field(default_factory=dict)
    """Pairs that the encryption context holds."""
    error: str | None = None
    """An error code, ``*`` for any error, '' for success only."""

    def select(self, *, after: int = 0, limit: int | None = None) -> tuple[str, list[Any]]:
        """SQL and parameters for the rows of the audit table, oldest first; ``after``: rows with a higher id."""
        raise NotImplementedError

    def matches(self, event: Mapping[str, Any]) -> bool:
        """Whether a CloudTrail event passes."""
        raise NotImplementedError


def follow(read: Callable[[int], Sequence[Row]], wait: Callable[[], bool], *, after: int = 0) -> Iterator[dict[str, Any]]:
    """Events as they come: ``read(after)`` gives newer rows; when there are none ``wait()`` is called, False ends."""
    raise NotImplementedError


def read_cloudtrail(paths: Sequence[Path | str]) -> Iterator[dict[str, Any]]:
    """KMS events of CloudTrail files (``{"Records": […]}``, an array, JSON lines, one event; gzip or plain),
    and of files that ``kms audit --json`` wrote."""
    raise NotImplementedError
