"""What AWS lets through and what it costs: dated, with sources, and every figure may be overridden.

KMS quotas and prices live beside the embedded KMS (``streamcrypt.kms.cost``); this adds what only a
plan needs.  A plan says which figures it used and from when they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamcrypt.kms import cost


class PricesError(ValueError):
    """A file of prices that is none; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD for ``per`` units, with date and source."""

    usd: float
    per: int
    unit: str
    date: str
    source: str

    @property
    def each(self) -> float:
        return self.usd / self.per


@dataclass(frozen=True, slots=True)
class Prices:
    """What a plan counts; the KMS's own table is that of ``streamcrypt kms cost``."""

    vcpu_hour: Price = Price(
        0.0408,
        1,
        "hour of a virtual CPU",
        "2026-06",
        "half an m7g.large, Linux on demand, us-east-1, by a public study of 2026-06-17; x86 up to a quarter more",
    )
    put_requests: Price = Price(
        0.005,
        1000,
        "PUT requests",
        "2023",
        "S3 Standard, public pricing as quoted in secondary sources; check before quoting",
    )
    get_requests: Price = Price(
        0.0004,
        1000,
        "GET requests",
        "2023",
        "S3 Standard, public pricing as quoted in secondary sources; check before quoting",
    )
    kms: cost.Prices = cost.PRICES

    @classmethod
    def read(cls, path: Path) -> Prices:
        """Ours, with what a TOML or JSON file says instead; PricesError when it is no such file.

        ``vcpu_hour``, ``put_requests`` and ``get_requests`` (of 1000) in USD, ``date`` and ``source`` of
        them, and a table ``kms`` with fields of the KMS's prices.
        """
        try:
            text = path.read_text(encoding="utf-8")
            given = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise PricesError(f"{path}: {error}; prices are a TOML or JSON file") from error
        if not isinstance(given, dict):
            raise PricesError(f"{path}: prices are a table of names and USD")
        told = {name: given.pop(name, "given") for name in ("date", "source")}
        table = given.pop("kms", {})
        if not isinstance(table, dict):
            raise PricesError(f"{path}: kms is a table, with prices of `streamcrypt kms cost`")
        names = [field.name for field in dataclasses.fields(cls) if field.name != "kms"]
        ours, changed = cls(), {}
        for name, usd in given.items():
            if name not in names:
                raise PricesError(
                    f"{path}: no price {name!r}; there are {', '.join(names)} and the table kms"
                )
            if isinstance(usd, bool) or not isinstance(usd, float | int) or not 0 <= usd < math.inf:
                raise PricesError(f"{path}: {name} is {usd!r}; a price is a number of USD, 0 or more")
            changed[name] = dataclasses.replace(getattr(ours, name), usd=float(usd), **told)
        try:
            kms = cost.Prices.from_json({**told, **table} if table else {})
        except ValueError as error:
            raise PricesError(f"{path}: {error}") from error
        return dataclasses.replace(ours, kms=kms, **changed)


PRICES: Final = Prices()

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


def kms_cost(operation: str, calls: float, keys: int, seconds: float, prices: Prices) -> tuple[float, float]:
    """USD for the calls, and for the keys' share of a month."""
    bill = cost.bill(
        [cost.Calls(operation, round(calls))],
        [cost.KeyUse("", max(seconds / 3600, 1.0) / HOURS_PER_MONTH)] * keys,
        prices.kms,
    )
    return bill["kms_requests"], bill["kms_keys"]
