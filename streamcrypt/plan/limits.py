"""What AWS lets through and what it costs: dated, with sources, and every figure may be overridden.

KMS quotas and prices live beside the embedded KMS (``streamcrypt.kms.cost``); this adds what only a
plan needs.  A plan says which figures it used and from when they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from streamcrypt.kms import cost


@dataclass(frozen=True, slots=True)
class Price:
    """USD for one unit, with date and source."""

    usd: float
    unit: str
    date: str
    source: str


# A general-purpose virtual CPU; the planner multiplies by cores.  An x86 one costs up to a quarter more.
CPU_HOUR: Final = Price(
    0.0408,
    "vCPU hour",
    "2026-06",
    "half an m7g.large, Linux on demand, us-east-1, by a public study of 2026-06-17",
)
PUT_REQUEST: Final = Price(
    0.005 / 1000,
    "PUT",
    "2023",
    "S3 Standard, public pricing as quoted in secondary sources; check before quoting",
)
GET_REQUEST: Final = Price(
    0.0004 / 1000,
    "GET",
    "2023",
    "S3 Standard, public pricing as quoted in secondary sources; check before quoting",
)

# The quota is shared by everything the account does in a Region, AWS services included.
QUOTA_SHARE: Final = 0.5
# No AWS figure exists; see PLANNING.md: reports say a median of 4 to 10 ms in the Region, 20 to 30 from outside.
KMS_LATENCY: Final = 0.010
# Without a Region the smallest default quota is assumed; this Region has it.
CAUTIOUS_REGION: Final = "eu-north-1"
_REGION: Final = re.compile(r"[a-z]{2}(-[a-z]+)+-[0-9]+")
HOURS_PER_MONTH: Final = 730.0


@dataclass(frozen=True, slots=True)
class KmsQuota:
    """Calls a second, and where the figure comes from."""

    per_second: float
    source: str


def kms_quota(operation: str, region: str | None = None, share: float = QUOTA_SHARE) -> KmsQuota:
    """The part of the account's default quota that a job may count on.

    ValueError for a share outside (0, 1], or what is no Region's name.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a quota share of {share:g} is not above 0 and at most 1")
    if region is not None and not _REGION.fullmatch(region):
        raise ValueError(f"{region!r} is not the name of an AWS Region, such as eu-central-1")
    found = cost.quota(operation, region=region or CAUTIOUS_REGION)
    where = region or "the smallest Region's"
    return KmsQuota(
        found.per_second * share,
        f"{share:.0%} of {where} default of {found.per_second:g}/s ({cost.QUOTAS_DATE}); "
        "the account's own value is in Service Quotas",
    )


def kms_cost(operation: str, calls: float, keys: int, seconds: float) -> dict[str, Any]:
    """USD for the calls and for the keys' share of a month, with the date of the prices."""
    bill = cost.bill(
        [cost.Calls(operation, round(calls))],
        [cost.KeyUse("", max(seconds / 3600, 1.0) / HOURS_PER_MONTH)] * keys,
    )
    return {
        "kms_requests": bill["kms_requests"],
        "kms_keys": bill["kms_keys"],
        "kms_prices": bill["prices"],
    }


def kms_prices() -> dict[str, float]:
    """The figures behind ``kms_cost``, for the report's page."""
    prices = cost.PRICES
    return {
        "request_price": prices.symmetric / prices.per,
        "free_requests": prices.free_requests,
        "key_month": prices.key_month,
        "hours_per_month": HOURS_PER_MONTH,
    }
