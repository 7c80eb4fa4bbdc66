"""Is this change faster?  Policy evaluation: `pytest benchmarks/test_policy.py --benchmark-only`.

The bound of the product is 50 us for a policy of 100 statements, whichever of them apply.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamcrypt.kms.policy import ROOT, Caller, Grant, KeyFacts, Request, default_key_policy, evaluate

pytest.importorskip("pytest_benchmark")

ACCOUNT = "111122223333"
USER = f"arn:aws:iam::{ACCOUNT}:user/loader"
KEY = KeyFacts(f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab")


def _policy(statement: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [statement(number) for number in range(100)]})


def _statement(number: int, principal: str, **more: Any) -> dict[str, Any]:
    actions = ["kms:Decrypt", "kms:GenerateDataKey*"]
    return {"Effect": "Allow", "Principal": {"AWS": principal}, "Action": actions, "Resource": "*", **more}


POLICIES = {
    # As teams write them: a statement for each of many roles.
    "100 roles": _policy(lambda n: _statement(n, f"arn:aws:iam::{ACCOUNT}:role/team-{n}")),
    # The worst case: every statement names the caller and the action, and fails by its last condition.
    "100 pairs tested": _policy(
        lambda n: _statement(
            n,
            USER,
            Condition={
                "StringEquals": {"kms:KeySpec": "SYMMETRIC_DEFAULT", "kms:EncryptionContext:Project": f"p{n}"}
            },
        )
    ),
    "100 denies tested": _policy(
        lambda n: _statement(
            n, USER, Effect="Deny", Condition={"StringLike": {"kms:EncryptionContext:Project": f"p*{n}"}}
        )
    ),
    # Conditions that differ in what they read, in operators that parse, and with variables.
    "100 names of pairs": _policy(
        lambda n: _statement(n, USER, Condition={"StringEquals": {f"kms:EncryptionContext:team-{n}": "x"}})
    ),
    "100 dates": _policy(
        lambda n: _statement(
            n,
            USER,
            Condition={"DateLessThan": {"aws:CurrentTime": f"{1920 + n}-01-01T00:00:00Z"}},
        )
    ),
    "100 networks": _policy(
        lambda n: _statement(n, USER, Condition={"IpAddress": {"aws:SourceIp": f"10.{n}.0.0/16"}})
    ),
    "100 variables": _policy(
        lambda n: _statement(
            n, USER, Condition={"StringLike": {"kms:EncryptionContext:Project": f"{n}/${{aws:username}}/*"}}
        )
    ),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_hundred_statements(benchmark: Any, policy: str) -> None:
    request = Request(
        Caller(USER), "kms:Decrypt", KEY, encryption_context={"Project": "none", "Stage": "test"}
    )
    decision = benchmark(evaluate, request, policy)
    assert not decision.allowed


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_hundred_statements_and_values_never_seen(benchmark: Any, policy: str) -> None:
    """The same where no answer is remembered: every request has an encryption context of its own."""
    requests = iter(
        Request(
            Caller(USER), "kms:Decrypt", KEY, encryption_context={"Project": f"none-{n}", "Stage": str(n)}
        )
        for n in range(10**9)
    )
    benchmark(lambda: evaluate(next(requests), policy))


def test_default_policy(benchmark: Any) -> None:
    """What every call of a single user's embedded KMS pays."""
    key = KeyFacts("arn:aws:kms:local:000000000000:key/1234abcd-12ab-34cd-56ef-1234567890ab")
    request = Request(ROOT, "kms:GenerateDataKey", key, encryption_context={"Project": "none"})
    assert benchmark(evaluate, request, default_key_policy("000000000000")).allowed


def test_hundred_grants(benchmark: Any) -> None:
    grants = [Grant(str(n), USER, frozenset({"Decrypt"}), subset={"Project": f"p{n}"}) for n in range(100)]
    request = Request(Caller(USER), "kms:Decrypt", KEY, encryption_context={"Project": "p99"})
    assert benchmark(evaluate, request, default_key_policy(ACCOUNT), grants).allowed
