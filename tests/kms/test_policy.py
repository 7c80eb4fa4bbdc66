"""The policy evaluator against cases worked out from AWS's documentation.

Each case states policies, a request, and the decision with its reason.  ``DG`` in a name: the AWS KMS
Developer Guide prints this policy or states this rule; ``IAM``: the IAM User Guide does.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcrypt.kms.conditions import arn_match, wildcard_match
from streamcrypt.kms.errors import KmsError
from streamcrypt.kms.policy import (
    GRANT_OPERATIONS,
    ROOT,
    Caller,
    Decision,
    Grant,
    KeyFacts,
    Request,
    check_identity_policy,
    check_key_policy,
    check_new_grant,
    default_key_policy,
    evaluate,
    grant_applies,
    may_retire,
    unknown_key_message,
    unmet_conditions,
    unmet_constraints,
)

OWNER, OTHER = "111122223333", "444455556666"
KEY_ARN = f"arn:aws:kms:us-west-2:{OWNER}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
KEY = KeyFacts(KEY_ARN, aliases=("alias/ml", "alias/prod"), tags={"Project": "Alpha"})
ALICE = f"arn:aws:iam::{OWNER}:user/alice"
BOB = f"arn:aws:iam::{OWNER}:user/team/bob"
ROLE = f"arn:aws:iam::{OWNER}:role/RoleForExampleApp"
SESSION = f"arn:aws:sts::{OWNER}:assumed-role/RoleForExampleApp/job-7"
EVE = f"arn:aws:iam::{OTHER}:user/eve"
OWNER_ROOT, OTHER_ROOT = f"arn:aws:iam::{OWNER}:root", f"arn:aws:iam::{OTHER}:root"

KEY_POLICY, IDENTITY, GRANT = "key policy", "identity policy", "grant"
NO_KEY_POLICY = (False, KEY_POLICY)
NO_IDENTITY = (False, IDENTITY)
NOT_TOLD = (False, "")
BY_KEY_POLICY, BY_IDENTITY, BY_GRANT = (True, KEY_POLICY), (True, IDENTITY), (True, GRANT)
DENY_IN_KEY_POLICY, DENY_IN_IDENTITY = (False, KEY_POLICY, "deny"), (False, IDENTITY, "deny")


def statement(
    principal: Any = None, action: Any = "kms:*", effect: str = "Allow", **more: Any
) -> dict[str, Any]:
    made = {"Effect": effect, "Action": action, "Resource": "*", **more}
    if principal is not None:
        made["Principal"] = (
            principal if principal == "*" or isinstance(principal, dict) else {"AWS": principal}
        )
    return made


def document(*statements: dict[str, Any], version: str = "2012-10-17") -> str:
    return json.dumps({"Version": version, "Statement": list(statements)})


DEFAULT = default_key_policy(OWNER)
ALLOW_ALL = document(statement())
DENY_DECRYPT = document(statement(action="kms:Decrypt", effect="Deny"))


def request(
    caller: str | Caller = ALICE, action: str = "kms:Decrypt", *, own: tuple[str, ...] = (), **more: Any
) -> Request:
    who = caller if isinstance(caller, Caller) else Caller(caller, policies=own)
    return Request(who, action, more.pop("key", KEY), **more)


def outcome(decision: Decision) -> tuple[Any, ...]:
    return (decision.allowed, decision.source, *(["deny"] if decision.explicit else []))


# --- who: principals, accounts, delegation --------------------------------------------------------

P = statement
WHO: dict[str, tuple[str | None, Request, tuple[Any, ...]]] = {
    "DG default policy serves the root user": (DEFAULT, request(OWNER_ROOT), BY_KEY_POLICY),
    "DG example 1, Alice: account enabled, no IAM policy": (DEFAULT, request(ALICE), NO_IDENTITY),
    "DG account enabled and IAM allows": (DEFAULT, request(ALICE, own=(ALLOW_ALL,)), BY_IDENTITY),
    "DG without the account statement IAM allows are void": (
        document(P(BOB)), request(ALICE, own=(ALLOW_ALL,)), NO_KEY_POLICY),
    "DG without the account statement IAM denies still count": (
        document(P(ALICE)), request(ALICE, own=(DENY_DECRYPT,)), DENY_IN_IDENTITY),
    "account root without a statement has nothing": (document(P(BOB)), request(OWNER_ROOT), NO_KEY_POLICY),
    "twelve digits are the account": (document(P(OWNER)), request(ALICE, own=(ALLOW_ALL,)), BY_IDENTITY),
    "user named": (document(P(ALICE)), request(ALICE), BY_KEY_POLICY),
    "user with a path named": (document(P(BOB)), request(BOB), BY_KEY_POLICY),
    "user's path is part of the name": (document(P(f"arn:aws:iam::{OWNER}:user/bob")), request(BOB), NO_KEY_POLICY),
    "principals are case-sensitive": (document(P(ALICE.replace("alice", "Alice"))), request(ALICE), NO_KEY_POLICY),
    "one of a list": (document(P([BOB, ALICE])), request(ALICE), BY_KEY_POLICY),
    "role named serves its sessions": (document(P(ROLE)), request(SESSION), BY_KEY_POLICY),
    "role named, caller is the role": (document(P(ROLE)), request(ROLE), BY_KEY_POLICY),
    "session named": (document(P(SESSION)), request(SESSION), BY_KEY_POLICY),
    "another session named": (document(P(SESSION + "8")), request(SESSION), NO_KEY_POLICY),
    "session named does not serve the role": (document(P(SESSION)), request(ROLE), NO_KEY_POLICY),
    "role with a path, given with the session": (
        document(P(f"arn:aws:iam::{OWNER}:role/ml/RoleForExampleApp")),
        request(Caller(SESSION, role=f"arn:aws:iam::{OWNER}:role/ml/RoleForExampleApp")), BY_KEY_POLICY),
    "star is everyone of the account": (document(P("*")), request(ALICE), BY_KEY_POLICY),
    "AWS star is everyone of the account": (document(P({"AWS": "*"})), request(SESSION), BY_KEY_POLICY),
    "DG star and another account need an IAM allow there": (document(P("*")), request(EVE), NO_IDENTITY),
    "DG star, another account, IAM allow there": (document(P("*")), request(EVE, own=(ALLOW_ALL,)), BY_KEY_POLICY),
    "service principal": (
        document(P({"Service": "sagemaker.amazonaws.com"})), request("sagemaker.amazonaws.com"), BY_KEY_POLICY),
    "another service": (
        document(P({"Service": "s3.amazonaws.com"})), request("sagemaker.amazonaws.com"), NO_KEY_POLICY),
    "federated user": (
        document(P(f"arn:aws:sts::{OWNER}:federated-user/f")),
        request(f"arn:aws:sts::{OWNER}:federated-user/f"), BY_KEY_POLICY),
    "DG example 2: both accounts allow": (
        document(P(OWNER_ROOT), P(OTHER_ROOT, "kms:Decrypt")), request(EVE, own=(ALLOW_ALL,)), BY_IDENTITY),
    "DG example 2: the caller's account does not allow": (
        document(P(OWNER_ROOT), P(OTHER_ROOT, "kms:Decrypt")), request(EVE), NO_IDENTITY),
    "DG example 2: the key's account allows another action": (
        document(P(OTHER_ROOT, "kms:Encrypt")), request(EVE, own=(ALLOW_ALL,)), NOT_TOLD),
    "user of another account named, no IAM allow there": (document(P(EVE)), request(EVE), NO_IDENTITY),
    "user of another account named, IAM allow there": (document(P(EVE)), request(EVE, own=(ALLOW_ALL,)), BY_KEY_POLICY),
    "root user of another account": (document(P(OTHER_ROOT)), request(OTHER_ROOT), BY_KEY_POLICY),
    "another account, nothing in the key policy": (DEFAULT, request(EVE, own=(ALLOW_ALL,)), NOT_TOLD),
    "another account, no such key": (None, request(EVE, own=(ALLOW_ALL,)), NOT_TOLD),
    "deny in the key policy before its allow": (
        document(P(ALICE), P(ALICE, "kms:Decrypt", "Deny")), request(ALICE), DENY_IN_KEY_POLICY),
    "deny in the key policy beats an IAM allow": (
        document(P(OWNER_ROOT), P(ALICE, "kms:Decrypt", "Deny")),
        request(ALICE, own=(ALLOW_ALL,)), DENY_IN_KEY_POLICY),
    "deny for the account means all of it": (
        document(P(ALICE), P(OWNER_ROOT, "kms:Decrypt", "Deny")), request(ALICE), DENY_IN_KEY_POLICY),
    "deny for a role means its sessions": (
        document(P("*"), P(ROLE, effect="Deny")), request(SESSION), DENY_IN_KEY_POLICY),
    "deny in IAM beats an allow in IAM": (
        DEFAULT, request(ALICE, own=(ALLOW_ALL, DENY_DECRYPT)), DENY_IN_IDENTITY),
    "IAM deny spares the root user, who has no policies": (DEFAULT, request(OWNER_ROOT), BY_KEY_POLICY),
    "IAM NotPrincipal deny spares user with account": (
        document(P("*"), {"Effect": "Deny", "NotPrincipal": {"AWS": [ALICE, OWNER_ROOT]}, "Action": "kms:*",
                          "Resource": "*"}), request(ALICE), BY_KEY_POLICY),
    "IAM NotPrincipal deny without the account denies": (
        document(P("*"), {"Effect": "Deny", "NotPrincipal": {"AWS": ALICE}, "Action": "kms:*", "Resource": "*"}),
        request(ALICE), DENY_IN_KEY_POLICY),
    "IAM NotPrincipal deny hits others": (
        document(P("*"), {"Effect": "Deny", "NotPrincipal": {"AWS": [ALICE, OWNER_ROOT]}, "Action": "kms:*",
                          "Resource": "*"}), request(BOB), DENY_IN_KEY_POLICY),
    "IAM-only action, allowed": (
        None, request(ALICE, "kms:ListKeys", own=(ALLOW_ALL,), key=None), BY_IDENTITY),
    "IAM-only action, not allowed": (None, request(ALICE, "kms:ListKeys", key=None), NO_IDENTITY),
    "IAM-only action, root": (None, request(OWNER_ROOT, "kms:CreateKey", key=None), BY_IDENTITY),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "asked", "expected"), WHO.values(), ids=WHO)
def test_who(policy: str | None, asked: Request, expected: tuple[Any, ...]) -> None:
    assert outcome(evaluate(asked, policy)) == expected


# --- what: actions and resources ------------------------------------------------------------------

WHAT: dict[str, tuple[Any, str, bool]] = {
    "every action": ("*", "kms:Decrypt", True),
    "every action of the service": ("kms:*", "kms:Decrypt", True),
    "this action": ("kms:Decrypt", "kms:Decrypt", True),
    "DG ReEncrypt* covers both permissions": ("kms:ReEncrypt*", "kms:ReEncryptTo", True),
    "ReEncrypt alone is no permission": ("kms:ReEncrypt", "kms:ReEncryptFrom", False),
    "GenerateDataKey* covers the pair": ("kms:GenerateDataKey*", "kms:GenerateDataKeyPair", True),
    "GenerateDataKey alone does not": ("kms:GenerateDataKey", "kms:GenerateDataKeyPair", False),
    "actions ignore case": ("KMS:decrypt", "kms:Decrypt", True),
    "question mark is one character": ("kms:?ecrypt", "kms:Decrypt", True),
    "question mark is not none": ("kms:?Decrypt", "kms:Decrypt", False),
    "another service": ("s3:*", "kms:Decrypt", False),
    "one of a list": (["kms:Encrypt", "kms:Decrypt"], "kms:Decrypt", True),
    "a dot is a dot": ("kms:D.crypt", "kms:Decrypt", False),
}


@pytest.mark.parametrize(("pattern", "action", "expected"), WHAT.values(), ids=WHAT)
def test_actions(pattern: Any, action: str, expected: bool) -> None:
    assert evaluate(request(ALICE, action), document(P(ALICE, pattern))).allowed is expected
    negated = document(
        {"Effect": "Allow", "Principal": {"AWS": ALICE}, "NotAction": pattern, "Resource": "*"}
    )
    assert evaluate(request(ALICE, action), negated).allowed is not expected


RESOURCES: dict[str, tuple[Any, bool]] = {
    "every resource": ("*", True),
    "the key": (KEY_ARN, True),
    "every key of the account": (f"arn:aws:kms:*:{OWNER}:key/*", True),
    "every key of every account": ("arn:aws:kms:*:*:key/*", True),
    "another Region": (f"arn:aws:kms:eu-west-1:{OWNER}:key/*", False),
    "another account's keys": (f"arn:aws:kms:*:{OTHER}:key/*", False),
    "DG an alias is no key": (f"arn:aws:kms:us-west-2:{OWNER}:alias/ml", False),
    "IAM a wildcard stays in its part": ("arn:aws:*:key/*", False),
    "a short pattern's end spans": ("arn:aws:kms:*", True),
    "ARNs are case-sensitive": (KEY_ARN.replace("1234abcd", "1234ABCD"), False),
    "one of a list": ([f"arn:aws:kms:*:{OTHER}:key/*", KEY_ARN], True),
}


@pytest.mark.parametrize(("pattern", "expected"), RESOURCES.values(), ids=RESOURCES)
def test_resources(pattern: Any, expected: bool) -> None:
    own = document(statement(action="kms:Decrypt", Resource=pattern))
    assert evaluate(request(ALICE, own=(own,)), DEFAULT).allowed is expected
    assert evaluate(request(ALICE), document(P(ALICE, Resource=pattern))).allowed is expected
    negated = {"Effect": "Allow", "Action": "kms:*", "NotResource": pattern}
    assert evaluate(request(ALICE, own=(document(negated),)), DEFAULT).allowed is not expected


def test_alias_operations_need_the_alias_as_resource() -> None:
    alias = f"arn:aws:kms:us-west-2:{OWNER}:alias/ml"
    own = document(statement(action="kms:CreateAlias", Resource=alias))
    asked = Request(Caller(ALICE, policies=(own,)), "kms:CreateAlias", resource=alias)
    assert evaluate(asked, None).allowed
    assert not evaluate(asked._replace(resource=alias + "2"), None).allowed


@pytest.mark.parametrize("element", ["Action", "Resource"])
def test_dg_a_statement_without_action_or_resource_has_no_effect(element: str) -> None:
    incomplete = statement(ALICE)
    del incomplete[element]
    check_key_policy(document(incomplete, P(OWNER_ROOT)), request(OWNER_ROOT))
    assert not evaluate(request(ALICE), document(incomplete)).allowed


# --- conditions -----------------------------------------------------------------------------------

NOON = 1_790_000_000.0  # 2026-09-21T14:13:20Z
CONTEXT = {"AppName": "ExampleApp", "Project": "Alpha"}

# name -> (Condition, what the request has, whether an Allow with it applies)
CONDITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "DG pair required, present among others": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "ExampleApp"}}, {"encryption_context": CONTEXT}, True),
    "DG pair required, absent": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "ExampleApp"}}, {"encryption_context": {"A": "b"}}, False),
    "DG pair required, no context": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "ExampleApp"}}, {"encryption_context": {}}, False),
    "DG the pair's name ignores case": (
        {"StringEquals": {"kms:encryptioncontext:APPNAME": "ExampleApp"}}, {"encryption_context": CONTEXT}, True),
    "DG the pair's value does not": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "exampleapp"}}, {"encryption_context": CONTEXT}, False),
    "DG the value ignores case when the operator does": (
        {"StringEqualsIgnoreCase": {"kms:EncryptionContext:AppName": "exampleapp"}},
        {"encryption_context": CONTEXT}, True),
    "names that differ in case only: an Allow needs all": (
        {"StringEquals": {"kms:EncryptionContext:App": "a"}}, {"encryption_context": {"App": "a", "app": "b"}}, False),
    "DG two pairs are ANDed": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "ExampleApp", "kms:EncryptionContext:Project": "Beta"}},
        {"encryption_context": CONTEXT}, False),
    "DG several values are ORed": (
        {"StringEquals": {"kms:EncryptionContext:Project": ["Beta", "Alpha"]}}, {"encryption_context": CONTEXT}, True),
    "operators are ANDed": (
        {"StringEquals": {"kms:EncryptionContext:Project": "Alpha"}, "Bool": {"kms:MultiRegion": "true"}},
        {"encryption_context": CONTEXT}, False),
    "DG only these names, exactly": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "ExampleApp"},
         "ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["AppName"]}},
        {"encryption_context": {"AppName": "ExampleApp"}}, True),
    "DG only these names, one more": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "ExampleApp"},
         "ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["AppName"]}},
        {"encryption_context": CONTEXT}, False),
    "DG ForAllValues holds without a context": (
        {"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["AppName"]}}, {"encryption_context": {}}, True),
    "DG ForAnyValue does not hold without a context": (
        {"ForAnyValue:StringEquals": {"kms:EncryptionContextKeys": ["AppName"]}}, {"encryption_context": {}}, False),
    "DG ForAnyValue needs one": (
        {"ForAnyValue:StringEquals": {"kms:EncryptionContextKeys": "AppName"}}, {"encryption_context": CONTEXT}, True),
    "DG EncryptionContextKeys follows the operator's case": (
        {"ForAnyValue:StringEquals": {"kms:EncryptionContextKeys": "appname"}},
        {"encryption_context": CONTEXT}, False),
    "multi-valued key without set operator, Allow: all must match": (
        {"StringEquals": {"kms:EncryptionContextKeys": "AppName"}}, {"encryption_context": CONTEXT}, False),
    "DG Null false: a context is there": (
        {"Null": {"kms:EncryptionContextKeys": False}}, {"encryption_context": CONTEXT}, True),
    "DG Null false: none is": ({"Null": {"kms:EncryptionContextKeys": False}}, {"encryption_context": {}}, False),
    "DG Null true: parameter not sent": ({"Null": {"kms:BypassPolicyLockoutSafetyCheck": True}}, {}, True),
    "DG Null true: parameter sent": (
        {"Null": {"kms:BypassPolicyLockoutSafetyCheck": "true"}},
        {"conditions": {"kms:BypassPolicyLockoutSafetyCheck": False}}, False),
    "DG user name as a value": (
        {"StringEquals": {"kms:EncryptionContext:user": "${aws:username}"}},
        {"encryption_context": {"user": "alice"}}, True),
    "DG another's name": (
        {"StringEquals": {"kms:EncryptionContext:user": "${aws:username}"}},
        {"encryption_context": {"user": "bob"}}, False),
    "IAM variable inside text": (
        {"StringLike": {"kms:EncryptionContext:path": "home/${aws:username}/*"}},
        {"encryption_context": {"path": "home/alice/x"}}, True),
    "IAM variable with a default": (
        {"StringEquals": {"kms:EncryptionContext:team": "${aws:PrincipalTag/team, 'none'}"}},
        {"encryption_context": {"team": "none"}}, True),
    "IAM variable that the request lacks matches nothing": (
        {"StringLike": {"kms:EncryptionContext:team": "${aws:PrincipalTag/team}*"}},
        {"encryption_context": {"team": "none"}}, False),
    "IAM literal star": (
        {"StringLike": {"kms:EncryptionContext:p": "a${*}"}}, {"encryption_context": {"p": "ab"}}, False),
    "IAM literal star matches itself": (
        {"StringLike": {"kms:EncryptionContext:p": "a${*}"}}, {"encryption_context": {"p": "a*"}}, True),
    "StringEquals has no wildcards": (
        {"StringEquals": {"kms:EncryptionContext:AppName": "Ex*"}}, {"encryption_context": CONTEXT}, False),
    "StringLike has": ({"StringLike": {"kms:EncryptionContext:AppName": "Ex*"}}, {"encryption_context": CONTEXT}, True),
    "StringLike spans lines": (
        {"StringLike": {"kms:EncryptionContext:a": "x*y"}}, {"encryption_context": {"a": "x\ny"}}, True),
    "StringLike is anchored": (
        {"StringLike": {"kms:EncryptionContext:AppName": "Example"}}, {"encryption_context": CONTEXT}, False),
    "StringNotEquals, absent key holds": (
        {"StringNotEquals": {"kms:EncryptionContext:Stage": "Restricted"}}, {"encryption_context": CONTEXT}, True),
    "StringNotEquals: none of the values may match": (
        {"StringNotEquals": {"kms:EncryptionContext:Project": ["Beta", "Alpha"]}},
        {"encryption_context": CONTEXT}, False),
    "StringNotLike": (
        {"StringNotLike": {"kms:EncryptionContext:Project": "Al*"}}, {"encryption_context": CONTEXT}, False),
    "StringNotEqualsIgnoreCase": (
        {"StringNotEqualsIgnoreCase": {"kms:EncryptionContext:Project": "ALPHA"}},
        {"encryption_context": CONTEXT}, False),
    "IAM IfExists, absent": ({"StringEqualsIfExists": {"kms:ViaService": "s3.us-west-2.amazonaws.com"}}, {}, True),
    "IAM IfExists, present and other": (
        {"StringEqualsIfExists": {"kms:ViaService": "s3.us-west-2.amazonaws.com"}},
        {"caller": Caller(ALICE, via_service="ec2.us-west-2.amazonaws.com")}, False),
    "DG ViaService": (
        {"StringEquals": {"kms:ViaService": "ec2.us-west-2.amazonaws.com"}},
        {"caller": Caller(ALICE, via_service="ec2.us-west-2.amazonaws.com")}, True),
    "DG ViaService, direct call": ({"StringEquals": {"kms:ViaService": "ec2.us-west-2.amazonaws.com"}}, {}, False),
    "DG CallerAccount": ({"StringEquals": {"kms:CallerAccount": OWNER}}, {}, True),
    "DG CallerAccount, another": ({"StringEquals": {"kms:CallerAccount": OTHER}}, {}, False),
    "KeySpec": ({"StringEquals": {"kms:KeySpec": "SYMMETRIC_DEFAULT"}}, {}, True),
    "KeyUsage": ({"StringEquals": {"kms:KeyUsage": "SIGN_VERIFY"}}, {}, False),
    "KeyOrigin": ({"StringNotEquals": {"kms:KeyOrigin": "EXTERNAL"}}, {}, True),
    "Bool with a JSON boolean": ({"Bool": {"kms:MultiRegion": False}}, {}, True),
    "Bool ignores case": ({"Bool": {"kms:MultiRegion": "False"}}, {}, True),
    "Bool, absent key": ({"Bool": {"kms:ReEncryptOnSameKey": "false"}}, {}, False),
    "DG ResourceAliases": ({"ForAnyValue:StringEquals": {"kms:ResourceAliases": "alias/prod"}}, {}, True),
    "DG ResourceAliases, all of them": ({"ForAllValues:StringLike": {"kms:ResourceAliases": "alias/p*"}}, {}, False),
    "DG RequestAlias, key named by id": ({"StringEquals": {"kms:RequestAlias": "alias/ml"}}, {}, False),
    "DG RequestAlias": (
        {"StringEquals": {"kms:RequestAlias": "alias/ml"}}, {"conditions": {"kms:RequestAlias": "alias/ml"}}, True),
    "DG EncryptionAlgorithm": (
        {"StringEquals": {"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}},
        {"conditions": {"kms:EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}}, True),
    "resource tag, name ignores case": ({"StringEquals": {"aws:ResourceTag/project": "Alpha"}}, {}, True),
    "request tags": (
        {"ForAllValues:StringEquals": {"aws:TagKeys": ["team"]}},
        {"conditions": {"aws:TagKeys": ["team", "x"]}}, False),
    "NumericLessThanEquals": (
        {"NumericLessThanEquals": {"kms:ScheduleKeyDeletionPendingWindowInDays": "10"}},
        {"conditions": {"kms:ScheduleKeyDeletionPendingWindowInDays": 10}}, True),
    "NumericGreaterThan": (
        {"NumericGreaterThan": {"kms:RotationPeriodInDays": 180}}, {"conditions": {"kms:RotationPeriodInDays": 180}},
        False),
    "NumericEquals compares numbers, not text": (
        {"NumericEquals": {"kms:RotationPeriodInDays": "90.0"}},
        {"conditions": {"kms:RotationPeriodInDays": 90}}, True),
    "NumericNotEquals": (
        {"NumericNotEquals": {"kms:RotationPeriodInDays": 90}},
        {"conditions": {"kms:RotationPeriodInDays": 91}}, True),
    "Numeric on text of the request": (
        {"NumericLessThan": {"kms:RotationPeriodInDays": 90}},
        {"conditions": {"kms:RotationPeriodInDays": "x"}}, False),
    "DateLessThan": ({"DateLessThan": {"aws:CurrentTime": "2026-09-22T00:00:00Z"}}, {"time": NOON}, True),
    "DateGreaterThan": ({"DateGreaterThan": {"aws:CurrentTime": "2026-09-22"}}, {"time": NOON}, False),
    "DateEquals with seconds": ({"DateEquals": {"aws:CurrentTime": "1790000000"}}, {"time": NOON}, True),
    "NumericGreaterThanEquals on EpochTime": (
        {"NumericGreaterThanEquals": {"aws:EpochTime": 1_790_000_000}}, {"time": NOON}, True),
    "ArnEquals is ArnLike": ({"ArnEquals": {"aws:PrincipalArn": f"arn:aws:iam::{OWNER}:user/*"}}, {}, True),
    "ArnLike keeps to its part": ({"ArnLike": {"aws:PrincipalArn": "arn:*:user/alice"}}, {}, False),
    "ArnNotLike": ({"ArnNotLike": {"aws:PrincipalArn": f"arn:aws:iam::{OWNER}:role/*"}}, {}, True),
    "PrincipalArn of a session is its role": (
        {"ArnEquals": {"aws:PrincipalArn": ROLE}}, {"caller": Caller(SESSION)}, True),
    "PrincipalType": ({"StringEquals": {"aws:PrincipalType": "User"}}, {}, True),
    "PrincipalTag equals ResourceTag": (
        {"StringEquals": {"aws:ResourceTag/Project": "${aws:PrincipalTag/Project}"}},
        {"caller": Caller(ALICE, tags={"Project": "Alpha"})}, True),
    "SourceIp": (
        {"IpAddress": {"aws:SourceIp": ["10.0.0.0/8", "2001:db8::/32"]}},
        {"caller": Caller(ALICE, source_ip="10.1.2.3")}, True),
    "NotIpAddress": (
        {"NotIpAddress": {"aws:SourceIp": "10.0.0.0/8"}}, {"caller": Caller(ALICE, source_ip="10.1.2.3")}, False),
    "BinaryEquals": (
        {"BinaryEquals": {"aws:Custom": "QmluYXJ5"}}, {"conditions": {"aws:Custom": "QmluYXJ5"}}, True),
    "organisation": (
        {"StringEquals": {"aws:PrincipalOrgID": "o-1"}},
        {"caller": Caller(ALICE, conditions={"aws:PrincipalOrgID": "o-1"})}, True),
    "a condition key nobody knows": ({"StringEquals": {"aws:NoSuchKey": "x"}}, {}, False),
}  # fmt: skip


@pytest.mark.parametrize(("condition", "given", "expected"), CONDITIONS.values(), ids=CONDITIONS)
def test_conditions(condition: dict[str, Any], given: dict[str, Any], expected: bool) -> None:
    """An Allow with the condition, for every caller, as the only statement."""
    asked = request(given.get("caller", ALICE), **{k: v for k, v in given.items() if k != "caller"})
    decision = evaluate(asked, document(P("*", Condition=condition)))
    assert decision.allowed is expected
    # The same condition in a Deny takes the permission away exactly where it holds, except that an unqualified
    # multi-valued key then needs one value only.
    if any(marker in str(condition) for marker in ("'kms:EncryptionContextKeys': 'AppName'", "Context:App'")):
        return
    denied = evaluate(asked, document(P("*"), P("*", effect="Deny", Condition=condition)))
    assert denied.explicit is expected


def test_multi_valued_key_without_set_operator_in_a_deny_needs_one_value() -> None:
    asked = request(ALICE, encryption_context=CONTEXT)
    deny = P("*", effect="Deny", Condition={"StringEquals": {"kms:EncryptionContextKeys": "AppName"}})
    assert evaluate(asked, document(P("*"), deny)).explicit


def test_variables_are_text_in_the_version_of_2008() -> None:
    condition = {"StringEquals": {"kms:EncryptionContext:user": "${aws:username}"}}
    old = document(P("*", Condition=condition), version="2008-10-17")
    assert not evaluate(request(ALICE, encryption_context={"user": "alice"}), old).allowed
    assert evaluate(request(ALICE, encryption_context={"user": "${aws:username}"}), old).allowed


def test_a_caller_brings_no_wildcard_in_by_a_variable() -> None:
    condition = {"StringLike": {"kms:EncryptionContext:team": "${aws:PrincipalTag/team}"}}
    caller = Caller(ALICE, tags={"team": "*"})
    policy = document(P("*", Condition=condition))
    assert not evaluate(request(caller, encryption_context={"team": "secret"}), policy).allowed
    own = document(statement(Resource="arn:aws:kms:us-west-2:${aws:PrincipalTag/team}:key/*"))
    assert not evaluate(request(caller._replace(policies=(own,))), DEFAULT).allowed
    same = caller._replace(policies=(own,), tags={"team": OWNER})
    assert evaluate(request(same), DEFAULT).allowed


# --- grants ---------------------------------------------------------------------------------------


def grant(**fields: Any) -> Grant:
    made = {"grantee": ALICE, "operations": frozenset({"Decrypt"}), "issuing_account": OWNER, **fields}
    return Grant("e" * 64, **{**made, "operations": frozenset(made["operations"])})


FINANCE = {"Department": "Finance", "Classification": "Public"}
NOT_ALLOWED = document(P(BOB))  # a key policy that gives Alice nothing

GRANTS: dict[str, tuple[Grant, Request, tuple[Any, ...]]] = {
    "grantee and operation": (grant(), request(ALICE), BY_GRANT),
    "another operation": (grant(operations={"Encrypt"}), request(ALICE), NO_KEY_POLICY),
    "another grantee": (grant(grantee=BOB + "x"), request(ALICE), NO_KEY_POLICY),
    "role as grantee serves its sessions": (grant(grantee=ROLE), request(SESSION), BY_GRANT),
    "session as grantee": (grant(grantee=SESSION), request(SESSION), BY_GRANT),
    "account as grantee: root user": (grant(grantee=OWNER_ROOT), request(OWNER_ROOT), BY_GRANT),
    "account as grantee: user without IAM allow": (grant(grantee=OWNER_ROOT), request(ALICE), NO_KEY_POLICY),
    "account as grantee: user with IAM allow": (
        grant(grantee=OWNER_ROOT), request(ALICE, own=(ALLOW_ALL,)), BY_GRANT),
    "service as grantee": (
        grant(grantee="dynamodb.us-west-2.amazonaws.com"), request("dynamodb.us-west-2.amazonaws.com"), BY_GRANT),
    "grantee of another account": (grant(grantee=EVE), request(EVE), BY_GRANT),
    "IAM deny beats a grant": (grant(), request(ALICE, own=(DENY_DECRYPT,)), DENY_IN_IDENTITY),
    "DG subset: equal": (grant(subset=FINANCE), request(encryption_context=FINANCE), BY_GRANT),
    "DG subset: another order": (
        grant(subset=FINANCE), request(encryption_context=dict(reversed(FINANCE.items()))), BY_GRANT),
    "DG subset: more pairs": (
        grant(subset=FINANCE), request(encryption_context={"Customer": "12345", **FINANCE, "Purpose": "Test"}),
        BY_GRANT),
    "DG subset: one missing": (
        grant(subset=FINANCE), request(encryption_context={"Department": "Finance"}), NO_KEY_POLICY),
    "DG subset: another case": (
        grant(subset=FINANCE), request(encryption_context={"department": "finance", "classification": "public"}),
        NO_KEY_POLICY),
    "DG subset: no context": (grant(subset=FINANCE), request(), NO_KEY_POLICY),
    "DG equals: equal": (
        grant(equals={"Department": "IT"}), request(encryption_context={"Department": "IT"}), BY_GRANT),
    "DG equals: more pairs": (
        grant(equals={"Department": "IT"}), request(encryption_context={"Department": "IT", "Purpose": "Test"}),
        NO_KEY_POLICY),
    "equals: empty means none": (grant(equals={}), request(encryption_context={"a": "b"}), NO_KEY_POLICY),
    "constraints do not apply to DescribeKey": (
        grant(operations={"DescribeKey"}, equals={"a": "b"}), request(action="kms:DescribeKey"), BY_GRANT),
    "source ARN": (
        grant(grantee="x.amazonaws.com", source_arn="arn:aws:x:*:111122223333:thing/*"),
        request(Caller("x.amazonaws.com", conditions={"aws:SourceArn": "arn:aws:x:us:111122223333:thing/1"})),
        BY_GRANT),
    "source ARN, absent": (
        grant(grantee="x.amazonaws.com", source_arn="arn:aws:x:*:111122223333:thing/*"),
        request("x.amazonaws.com"), NO_KEY_POLICY),
    "ReEncryptFrom": (
        grant(operations={"ReEncryptFrom"}), request(action="kms:ReEncryptFrom"), BY_GRANT),
}  # fmt: skip


@pytest.mark.parametrize(("given_grant", "asked", "expected"), GRANTS.values(), ids=GRANTS)
def test_grants(given_grant: Grant, asked: Request, expected: tuple[Any, ...]) -> None:
    decision = evaluate(asked, NOT_ALLOWED, [given_grant])
    assert outcome(decision) == expected
    if expected == BY_GRANT:
        assert decision.statement == given_grant.grant_id


def test_a_deny_in_the_key_policy_beats_a_grant() -> None:
    policy = document(P(BOB), P("*", "kms:Decrypt", "Deny", Sid="No decryption"))
    decision = evaluate(request(ALICE), policy, [grant()])
    assert (decision.explicit, decision.statement) == (True, "No decryption")
    assert grant_applies(grant(), request(ALICE))


PARENT = {"operations": {"GenerateDataKey", "Decrypt", "CreateGrant"}, "subset": {"Department": "Finance"}}
CHILDREN: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "DG fewer operations, equals for subset": (
        PARENT, {"operations": {"CreateGrant", "Decrypt"}, "equals": {"Department": "Finance"}}, True),
    "DG the same": (PARENT, {"operations": PARENT["operations"], "subset": PARENT["subset"]}, True),
    "DG one pair more": (PARENT, {"subset": {"Department": "Finance", "Classification": "Critical"}}, True),
    "DG another operation": (PARENT, {"operations": {"ReEncryptFrom"}, "subset": PARENT["subset"]}, False),
    "DG constraint dropped": (PARENT, {}, False),
    "DG other value": (PARENT, {"subset": {"Department": "IT"}}, False),
    "equals with more pairs for subset": (PARENT, {"equals": {"Department": "Finance", "x": "y"}}, True),
    "DG equals never becomes subset": (
        {"operations": {"Decrypt", "CreateGrant"}, "equals": {"a": "b"}}, {"subset": {"a": "b"}}, False),
    "equals stays equals": (
        {"operations": {"Decrypt", "CreateGrant"}, "equals": {"a": "b"}}, {"equals": {"a": "b"}}, True),
    "parent without CreateGrant": ({"operations": {"Decrypt"}}, {}, False),
    "parent without constraints": ({"operations": {"Decrypt", "CreateGrant"}}, {"subset": {"a": "b"}}, True),
    "source ARN kept": (
        {"operations": {"Decrypt", "CreateGrant"}, "source_arn": None, "subset": None},
        {"source_arn": "arn:aws:x"}, True),
}  # fmt: skip


@pytest.mark.parametrize(("parent", "child", "expected"), CHILDREN.values(), ids=CHILDREN)
def test_create_grant_through_a_grant(parent: dict[str, Any], child: dict[str, Any], expected: bool) -> None:
    asked = request(ALICE, "kms:CreateGrant", new_grant=grant(grantee=BOB, **child))
    assert evaluate(asked, NOT_ALLOWED, [grant(**parent)]).allowed is expected
    # One who holds CreateGrant by policy may give what it does not hold itself.
    assert evaluate(asked, document(P(ALICE, "kms:CreateGrant"))).allowed


CREATE_GRANT: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "DG only these operations": (
        {"ForAllValues:StringEquals": {"kms:GrantOperations": ["Encrypt", "ReEncryptTo"]}},
        {"operations": {"Encrypt"}}, True),
    "DG only these operations, one other": (
        {"ForAllValues:StringEquals": {"kms:GrantOperations": ["Encrypt", "ReEncryptTo"]}},
        {"operations": {"Encrypt", "Decrypt"}}, False),
    "DG constraint type": (
        {"StringEquals": {"kms:GrantConstraintType": "EncryptionContextEquals"}}, {"equals": {"a": "b"}}, True),
    "DG constraint type, none": (
        {"StringEquals": {"kms:GrantConstraintType": "EncryptionContextEquals"}}, {}, False),
    "DG grantee": ({"StringEquals": {"kms:GranteePrincipal": ALICE}}, {}, True),
    "DG retiring principal": ({"StringEquals": {"kms:RetiringPrincipal": BOB}}, {"retiring": ALICE}, False),
    "DG for an AWS resource, direct call": ({"Bool": {"kms:GrantIsForAWSResource": True}}, {}, False),
    "the constraint's pairs are the context": (
        {"StringEquals": {"kms:EncryptionContext:a": "b"}}, {"subset": {"a": "b"}}, True),
}  # fmt: skip


@pytest.mark.parametrize(("condition", "new", "expected"), CREATE_GRANT.values(), ids=CREATE_GRANT)
def test_conditions_on_create_grant(condition: dict[str, Any], new: dict[str, Any], expected: bool) -> None:
    policy = document(P(BOB, "kms:CreateGrant", Condition=condition))
    asked = request(BOB, "kms:CreateGrant", new_grant=grant(**new))
    assert evaluate(asked, policy).allowed is expected


def test_grant_is_for_aws_resource_when_a_service_calls_for_the_user() -> None:
    condition = {"Bool": {"kms:GrantIsForAWSResource": "true"}}
    policy = document(P(BOB, ["kms:CreateGrant", "kms:ListGrants", "kms:RevokeGrant"], Condition=condition))
    via = Caller(BOB, via_service="sagemaker.us-west-2.amazonaws.com")
    assert evaluate(request(via, "kms:CreateGrant", new_grant=grant()), policy).allowed
    assert evaluate(request(via, "kms:ListGrants"), policy).allowed
    assert not evaluate(request(BOB, "kms:ListGrants"), policy).allowed


RETIRE: dict[str, tuple[Grant, Caller, bool]] = {
    "retiring principal": (grant(retiring=BOB), Caller(BOB), True),
    "a session of the retiring role": (grant(retiring=ROLE), Caller(SESSION), True),
    "grantee without RetireGrant": (grant(), Caller(ALICE), False),
    "grantee with RetireGrant": (grant(operations={"Decrypt", "RetireGrant"}), Caller(ALICE), True),
    "the account that created it": (grant(), Caller(OWNER_ROOT), True),
    "a user of that account": (grant(), Caller(BOB), False),
    "a user of that account with an IAM allow": (grant(), Caller(BOB, policies=(ALLOW_ALL,)), True),
    "another account": (grant(), Caller(OTHER_ROOT), False),
    "a user of a retiring account with an IAM allow": (
        grant(retiring=OTHER_ROOT), Caller(EVE, policies=(ALLOW_ALL,)), True),
}  # fmt: skip


@pytest.mark.parametrize(("given_grant", "caller", "expected"), RETIRE.values(), ids=RETIRE)
def test_who_may_retire(given_grant: Grant, caller: Caller, expected: bool) -> None:
    assert may_retire(caller, given_grant, KEY_ARN) is expected


RSA_SIGN = KeyFacts(KEY_ARN, spec="RSA_2048", usage="SIGN_VERIFY")
NEW_GRANTS: dict[str, tuple[Grant, KeyFacts, str | None]] = {
    "symmetric": (grant(operations={"Decrypt", "GenerateDataKeyPair", "DescribeKey", "RetireGrant"}), KEY, None),
    "signing on a symmetric key": (grant(operations={"Sign"}), KEY, "ValidationException"),
    "GetPublicKey on a symmetric key": (grant(operations={"GetPublicKey"}), KEY, "ValidationException"),
    "signing": (grant(operations={"Sign", "Verify", "GetPublicKey", "CreateGrant"}), RSA_SIGN, None),
    "decrypting with a signing key": (grant(operations={"Decrypt"}), RSA_SIGN, "ValidationException"),
    "a context with a signing key": (grant(operations={"Sign"}, subset={"a": "b"}), RSA_SIGN, "ValidationException"),
    "data keys of an RSA key": (
        grant(operations={"GenerateDataKey"}), KeyFacts(KEY_ARN, spec="RSA_2048"), "ValidationException"),
    "MAC": (grant(operations={"VerifyMac"}), KeyFacts(KEY_ARN, spec="HMAC_256", usage="GENERATE_VERIFY_MAC"), None),
    "agreement": (
        grant(operations={"DeriveSharedSecret"}), KeyFacts(KEY_ARN, spec="ECC_NIST_P256", usage="KEY_AGREEMENT"), None),
    "no operation": (grant(operations=()), KEY, "ValidationException"),
    "eight pairs": (grant(equals={str(n): "" for n in range(8)}), KEY, None),
    "nine pairs": (grant(equals={str(n): "" for n in range(9)}), KEY, "ValidationException"),
    "long value": (grant(subset={"a": "x" * 385}), KEY, "ValidationException"),
    "grantee is no ARN": (grant(grantee="alice"), KEY, "InvalidArnException"),
    "grantee is a group": (grant(grantee=f"arn:aws:iam::{OWNER}:group/g"), KEY, "InvalidArnException"),
    "retiring principal is no ARN": (grant(retiring="x"), KEY, "InvalidArnException"),
    "service without a constraint": (grant(grantee="x.amazonaws.com"), KEY, "ValidationException"),
}  # fmt: skip


@pytest.mark.parametrize(("given_grant", "key", "code"), NEW_GRANTS.values(), ids=NEW_GRANTS)
def test_new_grants(given_grant: Grant, key: KeyFacts, code: str | None) -> None:
    if code is None:
        check_new_grant(given_grant, key)
        return
    with pytest.raises(KmsError) as refused:
        check_new_grant(given_grant, key)
    assert (refused.value.code, refused.value.status) == (code, 400)
    assert refused.value.message


def test_the_grantable_operations_are_those_of_the_reference() -> None:
    assert (len(GRANT_OPERATIONS), "ScheduleKeyDeletion" in GRANT_OPERATIONS) == (19, False)


# --- texts ----------------------------------------------------------------------------------------

TEXTS: dict[str, tuple[str | None, Request, bool, str]] = {
    "no identity policy": (
        DEFAULT, request(ALICE), False,
        f"User: {ALICE} is not authorized to perform: kms:Decrypt on resource: {KEY_ARN} "
        "because no identity-based policy allows the kms:Decrypt action"),
    "no key policy": (
        NOT_ALLOWED, request(SESSION, "kms:Encrypt"), False,
        f"User: {SESSION} is not authorized to perform: kms:Encrypt on resource: {KEY_ARN} "
        "because no resource-based policy allows the kms:Encrypt action"),
    "deny in the key policy": (
        document(P("*", effect="Deny")), request(ALICE), False,
        f"User: {ALICE} is not authorized to perform: kms:Decrypt on resource: {KEY_ARN} "
        "with an explicit deny in a resource-based policy"),
    "deny in an identity policy": (
        DEFAULT, request(ALICE, own=(DENY_DECRYPT,)), False,
        f"User: {ALICE} is not authorized to perform: kms:Decrypt on resource: {KEY_ARN} "
        "with an explicit deny in an identity-based policy"),
    "Decrypt without KeyId": (
        NOT_ALLOWED, request(ALICE), True,
        f"User: {ALICE} is not authorized to perform: kms:Decrypt on the resource associated with this ciphertext "
        "because no resource-based policy allows the kms:Decrypt action"),
    "another account": (
        DEFAULT, request(EVE, "kms:Encrypt", own=(ALLOW_ALL,)), False,
        f"User: {EVE} is not authorized to perform: kms:Encrypt on this resource because the resource does not "
        "exist in this Region, no resource-based policies allow access, or a resource-based policy explicitly "
        "denies access"),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "asked", "by_ciphertext", "text"), TEXTS.values(), ids=TEXTS)
def test_access_denied_says_what_aws_says(
    policy: str | None, asked: Request, by_ciphertext: bool, text: str
) -> None:
    assert evaluate(asked, policy).message(asked, by_ciphertext=by_ciphertext) == text


def test_another_account_cannot_tell_an_absent_key_from_a_closed_one() -> None:
    asked = request(EVE, own=(ALLOW_ALL,))
    absent, closed = evaluate(asked, None), evaluate(asked, DEFAULT)
    assert absent == closed
    assert closed.message(asked) == unknown_key_message(asked.caller, "kms:Decrypt")


# --- what may become a policy ---------------------------------------------------------------------

INVALID_PRINCIPALS = "Policy contains a statement with one or more invalid principals."
LOCKED_OUT = "The new key policy will not allow you to update the key policy in the future."
MALFORMED: dict[str, tuple[str, str]] = {
    "not JSON": ("not a real policy statement", "Policy is not valid JSON."),
    "a JSON list": ("[]", "Policy must be an object with a Statement."),
    "deep": ('{"Statement":' + "[" * 30_000, "Policy is not valid JSON."),
    "no statement": ('{"Version":"2012-10-17"}', "Policy must be an object with a Statement."),
    "empty list": (document(), "Policy must have at least one statement."),
    "a statement that is text": ('{"Statement":["x"]}', "Statement must be an object or a list of objects."),
    "unknown version": (
        document(P("*"), version="2020-01-01"), "The policy's Version must be 2012-10-17 or 2008-10-17."),
    "unknown element": ('{"Statement":{},"Extra":1}', "Policy has an unknown element Extra."),
    "unknown element of a statement": (
        document(P("*", Principle="x")), "Policy contains a statement with an unknown element Principle."),
    "an element twice": (
        '{"Version":"2012-10-17","Version":"2008-10-17","Statement":[]}', "Policy names an element twice."),
    "effect in lower case": (
        document(P("*", effect="allow")), "Policy contains a statement whose Effect is neither Allow nor Deny."),
    "no principal": (document(statement()), "Policy contains a statement with no principal."),
    "Principal and NotPrincipal": (
        document(P("*", NotPrincipal="*")), "Policy contains a statement with both Principal and NotPrincipal."),
    "Action and NotAction": (
        document(P("*", NotAction="kms:*")), "Policy contains a statement with both Action and NotAction."),
    "wildcard in a principal": (document(P(f"arn:aws:iam::{OWNER}:user/*")), INVALID_PRINCIPALS),
    "unique id of a deleted user": (document(P("AIDAEXAMPLEEXAMPLE")), INVALID_PRINCIPALS),
    "unknown principal type": (document(P({"GCP": "x"})), INVALID_PRINCIPALS),
    "principal is text": (document(P({"AWS": [1]})), INVALID_PRINCIPALS),
    "group as principal": (document(P(f"arn:aws:iam::{OWNER}:group/admins")), INVALID_PRINCIPALS),
    "service that is none": (document(P({"Service": "sagemaker"})), INVALID_PRINCIPALS),
    "action without a service": (document(P("*", "Decrypt")), "Actions must be prefixed with a service: kms:Decrypt."),
    "action that is a number": (document(P("*", [1])), "Policy contains a statement with an invalid Action."),
    "resource that is no ARN": (document(P("*", Resource="key/1")), "Resource key/1 must be in ARN format or *."),
    "Sid that is no text": (document(P("*", Sid=1)), "Policy contains a statement whose Sid is not text."),
    "condition that is text": (document(P("*", Condition="x")), "Condition must be an object."),
    "unknown operator": (
        document(P("*", Condition={"StringIs": {"a": "b"}})), "Unknown condition operator StringIs."),
    "unknown set operator": (
        document(P("*", Condition={"ForSome:StringEquals": {"a": "b"}})),
        "Unknown condition operator ForSome:StringEquals."),
    "NullIfExists": (
        document(P("*", Condition={"NullIfExists": {"a": True}})), "Condition operator NullIfExists does not exist."),
    "number that is none": (
        document(P("*", Condition={"NumericEquals": {"a": "x"}})), "Invalid condition value 'x'."),
    "date that is none": (document(P("*", Condition={"DateEquals": {"a": "x"}})), "Invalid condition value 'x'."),
    "network that is none": (document(P("*", Condition={"IpAddress": {"a": "10.0.0.0/99"}})),
                             "Invalid condition value '10.0.0.0/99'."),
    "boolean that is none": (document(P("*", Condition={"Bool": {"a": "yes"}})), "Invalid condition value 'yes'."),
    "character outside Latin-1": (
        '{"Statement":[],"Id":"\u20ac"}', "Policy contains a character that is not allowed in policies."),
    "DG ForAllValues on a pair": (
        document(P("*", Condition={"ForAllValues:StringEquals": {"kms:EncryptionContext:Department": "IT"}})),
        "OverlyPermissiveCondition:EncryptionContext: Using the ForAllValues set operator with a single-valued "
        "condition key matches requests without the specified encryption context or with an unspecified "
        "encryption context. To fix, remove ForAllValues."),
    "locked out": (document(P(ALICE)), LOCKED_OUT),
    "locked out by a deny": (document(P(OWNER_ROOT), P("*", "kms:PutKeyPolicy", "Deny")), LOCKED_OUT),
    "locked out by a condition": (
        document(P(OWNER_ROOT, Condition={"StringEquals": {"kms:ViaService": "s3.us-west-2.amazonaws.com"}})),
        LOCKED_OUT),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_policies(text: str, message: str) -> None:
    with pytest.raises(KmsError) as refused:
        check_key_policy(text, request(OWNER_ROOT))
    assert refused.value.code == "MalformedPolicyDocumentException"
    assert refused.value.message == message


def test_lockout_check() -> None:
    check_key_policy(document(P(ALICE)), request(OWNER_ROOT), bypass_lockout_check=True)
    check_key_policy(document(P(ALICE, "kms:PutKeyPolicy")), request(ALICE))
    # The account's statement is enough: an administrator of the account can always mend it.
    check_key_policy(DEFAULT, request(BOB))


def test_a_key_policy_has_32_kib() -> None:
    fits = DEFAULT + " " * (32_768 - len(DEFAULT))
    check_key_policy(fits, request(OWNER_ROOT))
    with pytest.raises(KmsError) as refused:
        check_key_policy(fits + " ", request(OWNER_ROOT))
    assert refused.value.code == "LimitExceededException"


def test_identity_policies_name_no_principal() -> None:
    check_identity_policy(ALLOW_ALL)
    with pytest.raises(KmsError) as refused:
        check_identity_policy(document(P("*")))
    assert refused.value.code == "MalformedPolicyDocumentException"


def test_default_policy_is_the_recorded_one() -> None:
    assert json.loads(DEFAULT) == {
        "Version": "2012-10-17",
        "Id": "key-default-1",
        "Statement": [
            {
                "Sid": "Enable IAM User Permissions",
                "Effect": "Allow",
                "Principal": {"AWS": OWNER_ROOT},
                "Action": "kms:*",
                "Resource": "*",
            }
        ],
    }
    own = KeyFacts("arn:aws:kms:local:000000000000:key/1")
    assert evaluate(Request(ROOT, "kms:Decrypt", own), default_key_policy("000000000000")).allowed


# --- properties -----------------------------------------------------------------------------------

_PRINCIPALS = st.sampled_from([ALICE, BOB, ROLE, SESSION, EVE, OWNER_ROOT, OTHER_ROOT, OWNER, "*"])
_ACTIONS = st.sampled_from(["kms:*", "kms:Decrypt", "kms:Encrypt", "kms:Generate*", "KMS:DECRYPT", "s3:*"])
_TESTS = st.sampled_from(
    [
        {},
        {"StringEquals": {"kms:EncryptionContext:a": "1"}},
        {"StringNotEquals": {"kms:EncryptionContext:A": ["1", "2"]}},
        {"StringLikeIfExists": {"kms:EncryptionContext:b": "1*"}},
        {"ForAllValues:StringEquals": {"kms:EncryptionContextKeys": ["a", "b"]}},
        {"ForAnyValue:StringLike": {"kms:EncryptionContextKeys": "?"}},
        {"Null": {"kms:ViaService": "true"}},
        {"StringEquals": {"kms:EncryptionContext:a": "${aws:username}"}},
        {"StringNotLike": {"kms:EncryptionContext:b": ["${aws:username, '1'}*", "2"]}},
        {"NumericLessThan": {"kms:EncryptionContext:a": [2, 0]}, "Bool": {"kms:MultiRegion": False}},
        {
            "NotIpAddress": {"aws:SourceIp": "10.0.0.0/8"},
            "DateGreaterThan": {"aws:CurrentTime": "2026-01-01"},
        },
    ]
)
_KEY_STATEMENTS = st.builds(
    lambda principal, action, effect, test: P(principal, action, effect, Condition=test),
    _PRINCIPALS, _ACTIONS, st.sampled_from(["Allow", "Deny"]), _TESTS,
)  # fmt: skip
_OWN_STATEMENTS = st.builds(
    lambda action, effect, test: statement(None, action, effect, Condition=test),
    _ACTIONS, st.sampled_from(["Allow", "Deny"]), _TESTS,
)  # fmt: skip
_POLICIES = st.lists(_KEY_STATEMENTS, min_size=1, max_size=6)
_OWN = st.lists(_OWN_STATEMENTS, max_size=3)
_CONTEXTS = st.dictionaries(
    st.sampled_from(["a", "A", "b", "c"]), st.sampled_from(["1", "2", "11"]), max_size=3
)
_CALLERS = st.sampled_from([ALICE, BOB, ROLE, SESSION, EVE, OWNER_ROOT, OTHER_ROOT])


def ask(caller: str, own: list[dict[str, Any]], context: dict[str, str]) -> Request:
    policies = (document(*own),) if own else ()
    return request(Caller(caller, policies=policies), encryption_context=context)


@given(_POLICIES, _OWN, _CALLERS, _CONTEXTS, st.randoms(use_true_random=False))
def test_the_order_of_statements_is_irrelevant(
    statements: list[dict[str, Any]],
    own: list[dict[str, Any]],
    caller: str,
    context: dict[str, str],
    random: Any,
) -> None:
    asked = ask(caller, own, context)
    before = evaluate(asked, document(*statements))
    random.shuffle(statements)
    after = evaluate(asked, document(*statements))
    assert (before.allowed, before.explicit, before.source == "") == (
        after.allowed, after.explicit, after.source == "",
    )  # fmt: skip


@given(_POLICIES, _OWN, _CALLERS, _CONTEXTS, _KEY_STATEMENTS)
def test_adding_an_allow_never_takes_away_and_adding_a_deny_never_gives(
    statements: list[dict[str, Any]],
    own: list[dict[str, Any]],
    caller: str,
    context: dict[str, str],
    more: dict[str, Any],
) -> None:
    asked = ask(caller, own, context)
    before = evaluate(asked, document(*statements)).allowed
    after = evaluate(asked, document(*statements, more)).allowed
    if more["Effect"] == "Allow":
        assert after >= before
    else:
        assert after <= before


@given(_POLICIES, _OWN, _CALLERS, st.lists(_CONTEXTS, min_size=1, max_size=4))
def test_statements_that_are_asked_together_answer_as_each_does_alone(
    statements: list[dict[str, Any]],
    own: list[dict[str, Any]],
    caller: str,
    contexts: list[dict[str, str]],
) -> None:
    """Several requests of one policy, because answers are remembered."""
    together = document(*statements)
    for context in contexts:
        asked = ask(caller, own, context)
        decision = evaluate(asked, together)
        alone = [evaluate(asked, document(statement)) for statement in statements]
        assert decision.explicit is any(one.explicit for one in alone)
        assert decision.allowed is (not decision.explicit and any(one.allowed for one in alone))


@given(_POLICIES, _OWN, _CALLERS, _CONTEXTS)
def test_deny_wins(
    statements: list[dict[str, Any]], own: list[dict[str, Any]], caller: str, context: dict[str, str]
) -> None:
    asked = ask(caller, own, context)
    grants = [grant(grantee=caller)]
    in_key_policy = evaluate(asked, document(*statements, P("*", "kms:Decrypt", "Deny")), grants)
    assert (in_key_policy.allowed, in_key_policy.explicit) == (False, True)
    in_identity = ask(caller, [*own, statement(None, "kms:Decrypt", "Deny")], context)
    assert not evaluate(in_identity, document(*statements), grants).allowed


@given(_POLICIES, _OWN, _CALLERS, _CONTEXTS)
def test_grants_only_allow(
    statements: list[dict[str, Any]], own: list[dict[str, Any]], caller: str, context: dict[str, str]
) -> None:
    asked = ask(caller, own, context)
    without = evaluate(asked, document(*statements))
    with_grant = evaluate(asked, document(*statements), [grant(grantee=caller)])
    assert with_grant.allowed >= without.allowed
    assert with_grant.allowed is not without.explicit


@given(_POLICIES, _OWN, _CONTEXTS)
def test_a_foreign_account_needs_its_own_allow(
    statements: list[dict[str, Any]], own: list[dict[str, Any]], context: dict[str, str]
) -> None:
    """Whatever the key policy says, a user of another account without policies gets nothing."""
    assert not evaluate(ask(EVE, [], context), document(*statements)).allowed
    if not any(entry["Effect"] == "Allow" for entry in own):
        assert not evaluate(ask(EVE, own, context), document(*statements)).allowed


def glob(pattern: str, text: str, star: str = "") -> bool:
    """Wildcards by their definition; ``star``: characters that no wildcard stands for."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        first = text[:1]
        return glob(pattern[1:], text, star) or (
            bool(first) and first not in star and glob(pattern, text[1:], star)
        )
    matches = text[:1] == pattern[0] or (pattern[0] == "?" and text[:1] not in star and bool(text))
    return matches and glob(pattern[1:], text[1:], star)


@given(st.text("ab*?", max_size=8), st.text("ab\n", max_size=8))
def test_wildcards(pattern: str, text: str) -> None:
    assert bool(wildcard_match(pattern)(text)) is glob(pattern, text)


@given(st.text("ab:*?", max_size=9), st.text("ab:", max_size=9))
def test_wildcards_stay_within_their_part_of_an_arn(pattern: str, text: str) -> None:
    """But for those of the last part: the whole is tried at every place where that part may begin."""
    parts = min(5, pattern.count(":"))
    *fixed, last = pattern.split(":", parts)
    given_parts = text.split(":", parts)
    expected = len(given_parts) == parts + 1 and glob(last, given_parts[-1])
    expected = expected and all(glob(one, other) for one, other in zip(fixed, given_parts, strict=False))
    assert bool(arn_match(pattern)(text)) is expected


def test_a_pattern_of_many_wildcards_takes_no_longer_than_its_length() -> None:
    for match in (wildcard_match("*a" * 40 + "*b"), arn_match("arn:aws:kms:*:1:" + "*a" * 40 + "*b")):
        assert not match("arn:aws:kms:x:1:" + "a" * 5000)
        assert match("arn:aws:kms:x:1:" + "a" * 5000 + "b")


@given(st.text(min_size=1, max_size=8), st.text(max_size=8), st.data())
def test_case_of_a_pair(name: str, value: str, data: Any) -> None:
    """A pair's name ignores case in a condition; its value does not; a grant's constraint ignores neither."""
    ascii_name = "n" + "".join(c for c in name if c.isascii() and c.isalnum())
    ascii_value = "v" + "".join(c for c in value if c.isascii() and c.isalnum())
    swapped = data.draw(st.sampled_from([ascii_name.upper(), ascii_name.lower(), ascii_name.swapcase()]))
    policy = document(P(ALICE, Condition={"StringEquals": {f"kms:EncryptionContext:{swapped}": ascii_value}}))
    assert evaluate(request(encryption_context={ascii_name: ascii_value}), policy).allowed
    assert not evaluate(request(encryption_context={ascii_name: ascii_value.swapcase()}), policy).allowed
    given_grant = grant(subset={swapped: ascii_value})
    covered = evaluate(
        request(encryption_context={ascii_name: ascii_value}), NOT_ALLOWED, [given_grant]
    ).allowed
    assert covered is (swapped == ascii_name)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=10)
    | st.sampled_from(["*", "Allow", "kms:*", ALICE]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["Statement", "Effect", "Principal", "Action", "Condition", "AWS", "StringLike", "Bool"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(_JSON | st.builds(lambda inner: {"Version": "2012-10-17", "Statement": inner}, _JSON))
def test_any_document_is_a_policy_or_refused(value: Any) -> None:
    try:
        check_key_policy(json.dumps(value), request(OWNER_ROOT))
    except KmsError as error:
        refused = error.code
    else:
        return
    assert refused == "MalformedPolicyDocumentException"


@given(st.text(max_size=60))
def test_any_text_is_a_policy_or_refused(text: str) -> None:
    with pytest.raises(KmsError):
        check_key_policy(text, request(OWNER_ROOT))


# --- why not ----------------------------------------------------------------------------------------


def test_unmet_conditions_name_the_statement_the_condition_and_what_is_there() -> None:
    policy = document(
        P(ALICE, Sid="Team", Condition={
            "StringEquals": {"kms:EncryptionContext:Project": "Alpha", "kms:KeySpec": "SYMMETRIC_DEFAULT"}}),
        P(BOB, Condition={"Bool": {"kms:MultiRegion": True}}),
        P(ALICE, "kms:Encrypt", Condition={"Bool": {"kms:MultiRegion": True}}),
    )  # fmt: skip
    asked = request(ALICE, encryption_context={"Project": "Beta"})
    assert unmet_conditions(asked, policy) == [
        "Team: StringEquals kms:EncryptionContext:Project \"Alpha\", and the request has 'Beta'"
    ]
    assert unmet_conditions(asked._replace(encryption_context={"Project": "Alpha"}), policy) == []
    assert unmet_conditions(request(EVE), policy) == []
    own = document(statement(Condition={"StringEquals": {"kms:ViaService": "s3.us-west-2.amazonaws.com"}}))
    [why] = unmet_conditions(asked, own, "identity")
    assert "kms:ViaService" in why
    assert why.endswith("the request has None")


def test_unmet_constraints_name_the_grant() -> None:
    asked = request(ALICE, encryption_context={"Department": "HR"})
    [why] = unmet_constraints(
        asked, [grant(subset={"Department": "IT"}), grant(grantee=BOB, subset={"a": "b"})]
    )
    assert '"Department": "IT"' in why
    assert unmet_constraints(asked, [grant(), grant(operations={"Encrypt"}, equals={})]) == []
