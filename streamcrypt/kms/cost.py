"""What recorded calls and keys would cost on AWS, and how many calls a second AWS lets through.

SIGNATURES FIRST; the tables and bodies follow within the hour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Prices:
    """A dated price table in USD; ``Prices.from_json(mapping)`` overrides any field."""

    date: str
    source: str
    key_month: float = 1.0
    rotation_month: float = 1.0
    paid_rotations: int = 2
    symmetric: float = 0.03
    asymmetric: float = 0.15
    data_key_pair_ecc: float = 0.10
    data_key_pair_rsa: float = 12.0
    per: int = 10_000
    free_requests: int = 20_000

    def request(self, operation: str, key_spec: str = "SYMMETRIC_DEFAULT") -> float:
        """USD for one request beyond the free tier."""
        raise NotImplementedError


PRICES: Prices


@dataclass(frozen=True, slots=True)
class Calls:
    """A number of equal calls in one month (``2026-11``)."""

    operation: str
    count: int
    key_spec: str = "SYMMETRIC_DEFAULT"
    key: str = ""
    principal: str = ""
    month: str = ""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A customer managed key: how many months of it are billed, and how many rotations it has seen."""

    arn: str
    months: float
    rotations: int = 0


def bill(calls: Iterable[Calls], keys: Iterable[KeyUse] = (), prices: Prices | None = None) -> dict[str, Any]:
    """``{"currency", "prices": {date, source}, "requests", "free_requests", "kms_requests" (USD), "kms_keys" (USD),
    "total", "by_operation", "by_key", "by_principal"}``."""
    raise NotImplementedError


def calls_of(events: Iterable[Mapping[str, Any]]) -> list[Calls]:
    """CloudTrail events, counted."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Quota:
    """A request quota of AWS KMS: calls a second, for one account and Region, shared by ``bucket``."""

    bucket: str
    per_second: float
    adjustable: bool = True


QUOTAS_DATE = "2026"


def quota(operation: str, *, key_spec: str = "SYMMETRIC_DEFAULT", region: str = "us-east-1") -> Quota:
    """The bucket that a call draws from, and its default size in ``region``."""
    raise NotImplementedError
