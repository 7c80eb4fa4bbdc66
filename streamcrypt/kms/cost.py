"""What recorded calls and keys would cost on AWS, and how many calls a second AWS lets through.

Both tables are dated and say where they are from; both are read, never fetched, and a user who
knows better replaces the prices by a file (``Prices.from_json``).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from streamcrypt.kms import audit

# --- prices ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prices:
    """A price table in US dollars; requests are priced by ``per``."""

    date: str
    source: str
    key_month: float
    """A customer managed key, replicas and imported ones too."""
    rotation_month: float
    """More for each of the first ``paid_rotations`` rotations of a key."""
    paid_rotations: int
    symmetric: float
    """Symmetric and HMAC keys, RSA_2048, and management calls."""
    asymmetric: float
    """Asymmetric keys but RSA_2048."""
    data_key_pair_ecc: float
    data_key_pair_rsa: float
    per: int
    free_requests: int
    """A month, over all Regions."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Prices:
        """PRICES with some fields replaced; ValueError for a name or type that the table does not have."""
        types = {field.name: type(getattr(PRICES, field.name)) for field in dataclasses.fields(cls)}
        for name, value in values.items():
            expected = types.get(name)
            if expected is None:
                raise ValueError(f"prices: no field {name!r}; there are {', '.join(types)}")
            if isinstance(value, bool) or not isinstance(
                value, (float, int) if expected is float else expected
            ):
                raise ValueError(f"prices: {name} must be {expected.__name__}")
            if not isinstance(value, str) and not (1 if name == "per" else 0) <= value < math.inf:
                raise ValueError(f"prices: {name} is out of range")
        return dataclasses.replace(PRICES, **values)

    def request(self, operation: str, key_spec: str = "SYMMETRIC_DEFAULT") -> float:
        """USD for one request beyond the free tier; for GenerateDataKeyPair ``key_spec`` is the pair's."""
        if operation.startswith("GenerateDataKeyPair"):
            price = self.data_key_pair_rsa if key_spec.startswith("RSA_") else self.data_key_pair_ecc
        elif operation in _CRYPTOGRAPHIC and _is_asymmetric(key_spec) and key_spec != "RSA_2048":
            price = self.asymmetric
        else:
            price = self.symmetric
        return price / self.per


PRICES: Final = Prices(
    date="2026-09-29",
    source=(
        "AWS KMS pricing, us-east-1 and most Regions, as quoted in a public study of 2026-09-29 (price list of "
        "2026-09-11) and public notes of 2025-2026; read through secondary sources; GovCloud and China differ"
    ),
    key_month=1.00,
    rotation_month=1.00,
    paid_rotations=2,
    symmetric=0.03,
    asymmetric=0.15,
    data_key_pair_ecc=0.10,
    data_key_pair_rsa=12.00,
    per=10_000,
    free_requests=20_000,
)

_CRYPTOGRAPHIC: Final = frozenset(
    {
        "Encrypt", "Decrypt", "ReEncrypt", "Sign", "Verify", "GetPublicKey", "DeriveSharedSecret", "Encapsulate",
        "Decapsulate",
    }
)  # fmt: skip
# "excludes GenerateDataKeyPair*, and asymmetric Sign, Verify, Encrypt, Decrypt, GetPublicKey", to the letter.
_NEVER_FREE: Final = frozenset({"Sign", "Verify", "Encrypt", "Decrypt", "GetPublicKey"})


def _is_asymmetric(key_spec: str) -> bool:
    return not key_spec.startswith(("SYMMETRIC", "HMAC"))


def is_free_tier(operation: str, key_spec: str = "SYMMETRIC_DEFAULT") -> bool:
    """Whether the free tier covers such a call."""
    if operation.startswith("GenerateDataKeyPair"):
        return False
    return not (operation in _NEVER_FREE and _is_asymmetric(key_spec))


@dataclass(frozen=True, slots=True)
class Calls:
    """A number of equal calls in one month (``2026-11``)."""

    operation: str
    count: int
    key_spec: str = "SYMMETRIC_DEFAULT"
    """The key's; for GenerateDataKeyPair the pair's."""
    key: str = ""
    principal: str = ""
    month: str = ""


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A customer managed key: how many months of it are billed, and how many rotations it has seen."""

    arn: str
    months: float
    rotations: int = 0


def bill(calls: Iterable[Calls], keys: Iterable[KeyUse] = (), prices: Prices = PRICES) -> dict[str, Any]:
    """What the calls and keys cost, in USD, whole and by operation, key and principal.

    The free tier of each month is shared among the calls it covers in proportion to their number.
    """
    calls, keys = list(calls), list(keys)
    covered: Counter[str] = Counter()
    for entry in calls:
        if is_free_tier(entry.operation, entry.key_spec):
            covered[entry.month] += entry.count
    groups: dict[str, dict[str, dict[str, float]]] = {
        name: defaultdict(lambda: {"requests": 0, "usd": 0.0})
        for name in ("by_operation", "by_key", "by_principal")
    }
    requests = 0
    cost_of_requests = 0.0
    for entry in calls:
        paid = float(entry.count)
        if is_free_tier(entry.operation, entry.key_spec) and covered[entry.month]:
            paid *= max(0.0, 1 - prices.free_requests / covered[entry.month])
        usd = paid * prices.request(entry.operation, entry.key_spec)
        requests += entry.count
        cost_of_requests += usd
        for group, name in (
            ("by_operation", entry.operation), ("by_key", entry.key), ("by_principal", entry.principal),
        ):  # fmt: skip
            groups[group][name]["requests"] += entry.count
            groups[group][name]["usd"] += usd
    cost_of_keys = 0.0
    for key in keys:
        monthly = prices.key_month + prices.rotation_month * min(key.rotations, prices.paid_rotations)
        cost_of_keys += monthly * key.months
        groups["by_key"][key.arn]["usd"] += monthly * key.months
    return {
        "currency": "USD",
        "prices": {"date": prices.date, "source": prices.source},
        "requests": requests,
        "free_requests": sum(min(number, prices.free_requests) for number in covered.values()),
        "kms_requests": cost_of_requests,
        "kms_keys": cost_of_keys,
        "total": cost_of_requests + cost_of_keys,
        **{
            group: dict(
                sorted(entries.items(), key=lambda item: (-item[1]["usd"], -item[1]["requests"], item[0]))
            )
            for group, entries in groups.items()
        },
    }


def calls_of(events: Iterable[Mapping[str, Any]]) -> list[Calls]:
    """CloudTrail events, counted.  Calls that failed are left out; a dry run that would have succeeded is billed."""
    counted: Counter[tuple[str, str, str, str, str]] = Counter()
    for event in events:
        if event.get("eventType", "AwsApiCall") != "AwsApiCall":
            continue
        if event.get("errorCode") not in (None, "DryRunOperationException"):
            continue
        operation = str(event.get("eventName"))
        # ReEncrypt is one request; it is counted under its source.
        key = next(iter(audit.keys_of(event)), "")
        month = str(event.get("eventTime", ""))[:7]
        counted[operation, _spec_of(event), key, audit.principal_of(event), month] += 1
    return [
        Calls(operation, count, spec, key, principal, month)
        for (operation, spec, key, principal, month), count in sorted(counted.items())
    ]


def _spec_of(event: Mapping[str, Any]) -> str:
    """The key's spec as far as an event tells: CloudTrail names an algorithm, our own events the spec."""
    parameters = event.get("requestParameters") or {}
    if "keyPairSpec" in parameters:
        return str(parameters["keyPairSpec"])
    known = (event.get("additionalEventData") or {}).get("keySpec")
    if known:
        return str(known)
    algorithm = str(
        parameters.get("signingAlgorithm")
        or parameters.get("encryptionAlgorithm")
        or parameters.get("sourceEncryptionAlgorithm")
        or parameters.get("keyAgreementAlgorithm")
        or ""
    )
    if algorithm.startswith("RSA"):
        return "RSA_2048"  # the size is not in the log: the cheapest, and the most used
    if algorithm.startswith(("ECDSA", "ED25519", "ECDH")):
        return "ECC_NIST_P256"
    return "SYMMETRIC_DEFAULT"


# --- request quotas -------------------------------------------------------------------------------

QUOTAS_DATE: Final = "2026"
QUOTAS_SOURCE: Final = (
    "AWS KMS Developer Guide, Request quotas, stored copy of 2026; the defaults of an account and Region"
)


@dataclass(frozen=True, slots=True)
class Quota:
    """A request quota: calls a second of one account in one Region, shared by all calls of ``bucket``."""

    bucket: str
    per_second: float
    adjustable: bool = True


_LARGE_REGIONS: Final = frozenset({"us-east-1", "us-west-2", "eu-west-1"})
_MEDIUM_REGIONS: Final = frozenset(
    {"us-east-2", "ap-southeast-1", "ap-southeast-2", "ap-northeast-1", "eu-central-1", "eu-west-2"}
)
_SHARED: Final = _CRYPTOGRAPHIC - {"GetPublicKey"} | {
    "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "GenerateMac", "GenerateRandom", "VerifyMac",
}  # fmt: skip
_PAIRS_PER_SECOND: Final = {"RSA_2048": 20.0, "RSA_3072": 4.0, "RSA_4096": 1.0}
_PAIRS_PER_SECOND_CHINA: Final = {"RSA_2048": 1.0, "RSA_3072": 0.5, "RSA_4096": 0.1}
# Each of these has a bucket of its own; an operation that is in no row has 5 a second.
_OWN_BUCKETS: Final = {
    2000.0: ("DescribeKey", "GetPublicKey", "ListResourceTags"),
    1000.0: ("GetKeyPolicy", "GetKeyRotationStatus"),
    500.0: ("ListKeys", "ListAliases"),
    100.0: ("ListGrants", "ListKeyPolicies", "ListKeyRotations", "ListRetirableGrants"),
    50.0: ("CreateGrant", "RetireGrant", "RevokeGrant"),
    15.0: (
        "DeleteAlias", "EnableKeyRotation", "PutKeyPolicy", "ScheduleKeyDeletion", "ImportKeyMaterial",
        "DeleteImportedKeyMaterial",
    ),
    10.0: ("TagResource",),
    1.0: ("GetParametersForImport",),
}  # fmt: skip
_PER_SECOND: Final = {name: rate for rate, names in _OWN_BUCKETS.items() for name in names}


def quota(operation: str, *, key_spec: str = "SYMMETRIC_DEFAULT", region: str = "us-east-1") -> Quota:
    """The bucket that a call draws from, and its default size in ``region``.

    For GenerateDataKeyPair ``key_spec`` is the pair's.  ML-KEM was not in the copy of the table that
    was read; it is taken to be like ML-DSA.
    """
    if operation.startswith("GenerateDataKeyPair"):
        table = _PAIRS_PER_SECOND_CHINA if region.startswith("cn-") else _PAIRS_PER_SECOND
        return Quota(f"GenerateDataKeyPair {key_spec}", table.get(key_spec, 100.0))
    if operation not in _SHARED:
        return Quota(operation, _PER_SECOND.get(operation, 5.0))
    if key_spec.startswith("RSA_"):
        return Quota("RSA", 1000.0)
    if key_spec.startswith("ML_"):
        return Quota(key_spec.rpartition("_")[0].replace("_", "-"), 1000.0)
    if _is_asymmetric(key_spec):
        return Quota("ECC and SM2", 1000.0)
    if region in _LARGE_REGIONS:
        return Quota("symmetric", 100_000.0)
    return Quota("symmetric", 20_000.0 if region in _MEDIUM_REGIONS else 10_000.0)
