"""Prices and quotas, against the figures of AWS's tables."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from streamcrypt.kms.audit import Filter, event
from streamcrypt.kms.cost import PRICES, Calls, KeyUse, Prices, bill, calls_of, is_free_tier, quota
from streamcrypt.kms.policy import ROOT

SYMMETRIC = "SYMMETRIC_DEFAULT"
# operation, spec -> USD for 10,000 requests, in the free tier
PRICE_CASES = [
    ("Decrypt", SYMMETRIC, 0.03, True),
    ("GenerateDataKey", SYMMETRIC, 0.03, True),
    ("DescribeKey", "ECC_NIST_P256", 0.03, True),
    ("CreateKey", "RSA_4096", 0.03, True),
    ("GenerateMac", "HMAC_256", 0.03, True),
    ("Sign", "RSA_2048", 0.03, False),
    ("GetPublicKey", "RSA_2048", 0.03, False),
    ("Decrypt", "RSA_2048", 0.03, False),
    ("Sign", "RSA_4096", 0.15, False),
    ("Encrypt", "RSA_3072", 0.15, False),
    ("Verify", "ECC_NIST_P384", 0.15, False),
    ("DeriveSharedSecret", "ECC_NIST_P256", 0.15, True),
    ("GenerateDataKeyPair", "ECC_NIST_P256", 0.10, False),
    ("GenerateDataKeyPairWithoutPlaintext", "RSA_2048", 12.00, False),
]


@pytest.mark.parametrize(("operation", "spec", "price", "free"), PRICE_CASES)
def test_price_of_ten_thousand_requests(operation: str, spec: str, price: float, free: bool) -> None:
    assert PRICES.request(operation, spec) * 10_000 == pytest.approx(price)
    assert is_free_tier(operation, spec) is free


def test_the_free_tier_is_taken_off_once_a_month() -> None:
    within = bill([Calls("Decrypt", 20_000, month="2026-11")])
    assert (within["kms_requests"], within["free_requests"]) == (0.0, 20_000)
    beyond = bill(
        [Calls("Decrypt", 25_000, month="2026-11"), Calls("GenerateDataKey", 5_000, month="2026-11")]
    )
    assert beyond["kms_requests"] == pytest.approx(0.03)
    months = bill([Calls("Decrypt", 30_000, month="2026-10"), Calls("Decrypt", 30_000, month="2026-11")])
    assert months["kms_requests"] == pytest.approx(0.06)
    assert months["free_requests"] == 40_000
    assert bill([Calls("Sign", 10_000, "ECC_NIST_P256")])["kms_requests"] == pytest.approx(0.15)


def test_a_bill_adds_up_by_operation_key_and_principal() -> None:
    made = bill(
        [
            Calls("Decrypt", 50_000, key="k1", principal="alice", month="2026-11"),
            Calls("GenerateDataKey", 30_000, key="k2", principal="alice", month="2026-11"),
            Calls("GenerateDataKeyPair", 10, "RSA_4096", "k2", "bob", "2026-11"),
        ],
        [KeyUse("k1", 1.0), KeyUse("k2", 0.5, rotations=1), KeyUse("k3", 1.0, rotations=7)],
    )
    assert made["requests"] == 80_010
    assert made["kms_requests"] == pytest.approx(0.18 + 0.012)
    assert made["kms_keys"] == pytest.approx(1.0 + 0.5 * 2 + 3.0)
    assert made["total"] == pytest.approx(made["kms_requests"] + made["kms_keys"])
    for group, total in (
        ("by_operation", "kms_requests"),
        ("by_principal", "kms_requests"),
        ("by_key", "total"),
    ):
        assert sum(entry["usd"] for entry in made[group].values()) == pytest.approx(made[total]), group
        assert sum(entry["requests"] for entry in made[group].values()) == 80_010
    assert made["by_principal"]["bob"] == {"requests": 10, "usd": pytest.approx(0.012)}
    assert next(iter(made["by_key"])) == "k3"  # dearest first
    assert made["prices"] == {"date": PRICES.date, "source": PRICES.source}
    assert made["currency"] == "USD"


def test_nothing_costs_nothing() -> None:
    made = bill([])
    assert (made["total"], made["requests"], made["by_key"]) == (0.0, 0, {})


def test_prices_can_be_replaced() -> None:
    china = Prices.from_json({"date": "2027-01-01", "source": "mine", "symmetric": 0.06, "free_requests": 0})
    assert bill([Calls("Decrypt", 10_000)], prices=china)["kms_requests"] == pytest.approx(0.06)
    assert china.asymmetric == PRICES.asymmetric
    assert Prices.from_json({"key_month": 2}).key_month == 2
    for wrong in (
        {"symetric": 1.0},
        {"symmetric": "1"},
        {"symmetric": -1.0},
        {"symmetric": float("nan")},
        {"key_month": float("inf")},
        {"per": 0},
        {"free_requests": True},
    ):
        with pytest.raises(ValueError, match="prices:"):
            Prices.from_json(wrong)


def one_event(operation: str = "Decrypt", **more: Any) -> dict[str, Any]:
    return {
        "eventSource": "kms.amazonaws.com",
        "eventType": "AwsApiCall",
        "eventName": operation,
        "eventTime": "2026-11-24T07:00:00Z",
        "userIdentity": {"arn": "alice"},
        "resources": [{"ARN": "arn:aws:kms:us-west-2:111122223333:key/k1"}],
        **more,
    }


def test_events_are_counted_by_what_they_cost() -> None:
    key = "arn:aws:kms:us-west-2:111122223333:key/k1"
    counted = calls_of(
        [
            one_event(),
            one_event(),
            one_event(errorCode="AccessDenied"),
            one_event(errorCode="DryRunOperationException"),
            one_event("RotateKey", eventType="AwsServiceEvent"),
            one_event("Sign", requestParameters={"signingAlgorithm": "ECDSA_SHA_256"}),
            one_event("Sign", requestParameters={"signingAlgorithm": "RSASSA_PSS_SHA_256"}),
            one_event("Sign", additionalEventData={"keySpec": "RSA_4096"}),
            one_event("GenerateDataKeyPair", requestParameters={"keyPairSpec": "RSA_2048"}),
        ]
    )
    assert counted == [
        Calls("Decrypt", 3, SYMMETRIC, key, "alice", "2026-11"),
        Calls("GenerateDataKeyPair", 1, "RSA_2048", key, "alice", "2026-11"),
        Calls("Sign", 1, "ECC_NIST_P256", key, "alice", "2026-11"),
        Calls("Sign", 1, "RSA_2048", key, "alice", "2026-11"),
        Calls("Sign", 1, "RSA_4096", key, "alice", "2026-11"),
    ]


def test_our_own_events_tell_the_spec(home: Any) -> None:
    from streamcrypt.kms import open_service

    service = open_service(home)
    key = service.create_key(KeySpec="RSA_4096", KeyUsage="SIGN_VERIFY")["KeyMetadata"]
    service.sign(KeyId=key["KeyId"], Message=b"m", SigningAlgorithm="RSASSA_PSS_SHA_256")
    events = [event(row) for row in service.store.query(*Filter(operation="Sign").select())]
    [signed] = calls_of(events)
    assert (signed.key_spec, signed.key, signed.principal) == ("RSA_4096", key["Arn"], ROOT.arn)
    assert bill([dataclasses.replace(signed, count=10_000)])["kms_requests"] == pytest.approx(0.15)


QUOTA_CASES = [
    ("GenerateDataKey", SYMMETRIC, "us-east-1", "symmetric", 100_000),
    ("Decrypt", SYMMETRIC, "eu-central-1", "symmetric", 20_000),
    ("VerifyMac", "HMAC_256", "eu-north-1", "symmetric", 10_000),
    ("GenerateRandom", SYMMETRIC, "sa-east-1", "symmetric", 10_000),
    ("Decrypt", "RSA_2048", "us-east-1", "RSA", 1_000),
    ("Sign", "ECC_NIST_P256", "us-east-1", "ECC and SM2", 1_000),
    ("DeriveSharedSecret", "ECC_NIST_P521", "us-east-1", "ECC and SM2", 1_000),
    ("Sign", "ML_DSA_65", "us-east-1", "ML-DSA", 1_000),
    ("GenerateDataKeyPair", "RSA_4096", "us-east-1", "GenerateDataKeyPair RSA_4096", 1),
    ("GenerateDataKeyPairWithoutPlaintext", "RSA_3072", "cn-north-1", "GenerateDataKeyPair RSA_3072", 0.5),
    ("GenerateDataKeyPair", "ECC_NIST_P256", "cn-north-1", "GenerateDataKeyPair ECC_NIST_P256", 100),
    ("DescribeKey", SYMMETRIC, "us-east-1", "DescribeKey", 2_000),
    ("GetPublicKey", "RSA_2048", "us-east-1", "GetPublicKey", 2_000),
    ("ListGrants", SYMMETRIC, "us-east-1", "ListGrants", 100),
    ("CreateGrant", SYMMETRIC, "us-east-1", "CreateGrant", 50),
    ("ScheduleKeyDeletion", SYMMETRIC, "us-east-1", "ScheduleKeyDeletion", 15),
    ("CreateKey", SYMMETRIC, "us-east-1", "CreateKey", 5),
    ("GetParametersForImport", SYMMETRIC, "us-east-1", "GetParametersForImport", 1),
]


@pytest.mark.parametrize(("operation", "spec", "region", "bucket", "rate"), QUOTA_CASES)
def test_quotas(operation: str, spec: str, region: str, bucket: str, rate: float) -> None:
    found = quota(operation, key_spec=spec, region=region)
    assert (found.bucket, found.per_second) == (bucket, rate)
