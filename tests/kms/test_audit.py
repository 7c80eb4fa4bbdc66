"""Audit rows and the CloudTrail events that are made from them."""

from __future__ import annotations

import contextlib
import gzip
import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from streamcrypt.errors import SourceError
from streamcrypt.kms import KmsError, Service, audit, open_service
from streamcrypt.kms.audit import Filter, event, follow, read_cloudtrail, row, service_row
from streamcrypt.kms.policy import ROOT, Caller

ACCOUNT = "111122223333"
KEY = f"arn:aws:kms:us-west-2:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OTHER_KEY = f"arn:aws:kms:us-west-2:{ACCOUNT}:key/0987dcba-09fe-87dc-65ba-ab0987654321"
ALICE = Caller(
    f"arn:aws:iam::{ACCOUNT}:user/team/Alice", access_key_id="EXAMPLE_KEY_ID", source_ip="192.0.2.0"
)
JOB = Caller(f"arn:aws:sts::{ACCOUNT}:assumed-role/Trainer/job-7")
NOON = 1_790_000_000.0
SECRET = b"secret-plaintext"


def make(operation: str = "Decrypt", request: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The event of one call, through a real table."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(audit.SCHEMA)
        made = row(
            more.pop("time", NOON), operation, more.pop("caller", ALICE), request or {}, more.pop("response", None),
            request_id="25cfd8a5-0d3a-4d3b-9e0a-7a3e3f0bbd0f", keys=more.pop("keys", [KEY]), **more,
        )  # fmt: skip
        database.execute(audit.INSERT, made)
        [found] = database.execute(*Filter().select()).fetchall()
    database.close()
    return event(found)


def test_decrypt_has_the_shape_of_the_guides_example() -> None:
    """AWS KMS Developer Guide, "Decrypt" under "CloudTrail log entries": names, and values where they are given."""
    made = make(
        request={"CiphertextBlob": SECRET, "EncryptionContext": {"Department": "Alpha", "user": "Bob"}},
        response={"Plaintext": SECRET, "KeyId": KEY, "KeyMaterialId": "f" * 64},
        region="us-west-2",
        tls="TLSv1.3",
    )
    assert made.pop("eventID")
    assert made["userIdentity"].pop("principalId").startswith("AIDA")
    assert made == {
        "eventVersion": "1.11",
        "userIdentity": {
            "type": "IAMUser",
            "arn": ALICE.arn,
            "accountId": ACCOUNT,
            "accessKeyId": "EXAMPLE_KEY_ID",
            "userName": "Alice",
        },
        "eventTime": "2026-09-21T14:13:20Z",
        "eventSource": "kms.amazonaws.com",
        "eventName": "Decrypt",
        "awsRegion": "us-west-2",
        "sourceIPAddress": "192.0.2.0",
        "userAgent": "streamcrypt",
        "requestParameters": {
            "encryptionAlgorithm": "SYMMETRIC_DEFAULT",
            "encryptionContext": {"Department": "Alpha", "user": "Bob"},
        },
        "responseElements": None,
        "additionalEventData": {"keyMaterialId": "f" * 64},
        "requestID": "25cfd8a5-0d3a-4d3b-9e0a-7a3e3f0bbd0f",
        "readOnly": True,
        "resources": [{"accountId": ACCOUNT, "type": "AWS::KMS::Key", "ARN": KEY}],
        "eventType": "AwsApiCall",
        "managementEvent": True,
        "recipientAccountId": ACCOUNT,
        "eventCategory": "Management",
        "tlsDetails": {"tlsVersion": "TLSv1.3"},
    }


def test_names_in_an_encryption_context_keep_their_case() -> None:
    constraints = {"EncryptionContextSubset": {"Department": "IT", "aws:S3": "x"}}
    made = make(
        "CreateGrant",
        {"KeyId": KEY, "Operations": ["Decrypt"], "Constraints": constraints, "GranteePrincipal": ALICE.arn},
        response={"GrantId": "e" * 64, "GrantToken": "token"},
    )
    parameters = made["requestParameters"]
    assert parameters["constraints"] == {"encryptionContextSubset": {"Department": "IT", "aws:S3": "x"}}
    assert (parameters["operations"], parameters["granteePrincipal"]) == (["Decrypt"], ALICE.arn)
    assert made["responseElements"] == {"grantId": "e" * 64}
    assert made["readOnly"] is False


IDENTITIES: dict[str, tuple[Caller, dict[str, Any]]] = {
    "root": (
        ROOT,
        {"type": "Root", "principalId": "000000000000", "arn": ROOT.arn, "accountId": "000000000000"},
    ),
    "role session": (
        JOB,
        {
            "type": "AssumedRole",
            "sessionContext": {
                "sessionIssuer": {
                    "type": "Role",
                    "arn": f"arn:aws:iam::{ACCOUNT}:role/Trainer",
                    "accountId": ACCOUNT,
                    "userName": "Trainer",
                }
            },
        },
    ),
    "a service": (
        Caller("sagemaker.amazonaws.com"),
        {"type": "AWSService", "invokedBy": "sagemaker.amazonaws.com"},
    ),
    "a service for a user": (
        Caller(ALICE.arn, via_service="sagemaker.us-west-2.amazonaws.com"),
        {"type": "IAMUser", "invokedBy": "sagemaker.amazonaws.com"},
    ),
}


@pytest.mark.parametrize(("caller", "expected"), IDENTITIES.values(), ids=IDENTITIES)
def test_user_identity(caller: Caller, expected: dict[str, Any]) -> None:
    identity = make(caller=caller)["userIdentity"]
    assert {name: identity.get(name) for name in expected} == expected


def test_denied_is_access_denied_and_other_codes_keep_their_name() -> None:
    denied = make(error="AccessDeniedException", message="User: x is not authorized", keys=[])
    assert (denied["errorCode"], denied["errorMessage"]) == ("AccessDenied", "User: x is not authorized")
    assert denied["resources"] == []
    assert make(error="IncorrectKeyException", message="m")["errorCode"] == "IncorrectKeyException"
    assert make(error="InvalidCiphertextException")["errorMessage"] == ""


def test_re_encrypt_names_both_keys() -> None:
    made = make("ReEncrypt", {"DestinationKeyId": OTHER_KEY}, keys=[KEY, OTHER_KEY])
    assert [resource["ARN"] for resource in made["resources"]] == [KEY, OTHER_KEY]
    assert made["requestParameters"]["sourceEncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"


def test_what_kms_does_by_itself() -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(audit.SCHEMA)
        database.execute(audit.INSERT, service_row(NOON, "DeleteKey", KEY))
        made = event(database.execute(*Filter().select()).fetchone())
    database.close()
    assert (made["eventName"], made["eventType"]) == ("DeleteKey", "AwsServiceEvent")
    assert made["userIdentity"] == {"accountId": ACCOUNT, "invokedBy": "AWS Internal"}
    assert made["resources"][0]["ARN"] == KEY


def blob_members() -> list[tuple[str, str]]:
    """Every blob, and every token, in a KMS request: from botocore's own model."""
    model = botocore.session.get_session().get_service_model("kms")
    members = []
    for name in model.operation_names:
        shape = model.operation_model(name).input_shape
        for member, inner in (shape.members if shape else {}).items():
            if inner.type_name == "blob" or "Token" in member or inner.type_name == "structure":
                members.append((name, member))
    assert len(members) > 30
    return members


@pytest.mark.parametrize(("operation", "member"), blob_members())
def test_no_blob_and_no_token_enters_a_row(operation: str, member: str) -> None:
    if member in ("Constraints", "XksProxyAuthenticationCredential"):
        values: list[Any] = [{"EncryptionContextSubset": {}, "RawSecretAccessKey": SECRET}]
    else:
        values = [SECRET, bytearray(SECRET), memoryview(SECRET), SECRET.decode(), [SECRET.decode()]]
        if member in ("RecoveryPoint", "EncryptionContext"):
            pytest.skip("no secret by its nature")
    for value in values:
        made = row(NOON, operation, ALICE, {member: value}, None, request_id="r", keys=[KEY])
        assert SECRET.decode() not in repr(made)


def test_a_member_that_nobody_knows_stays_out() -> None:
    request = {"Plaintxt": SECRET.decode(), "KeyId": SECRET, "EncryptionContext": {b"k": SECRET, "a": SECRET}}
    made = row(NOON, "Encrypt", ALICE, request, None, request_id="r", keys=[KEY])
    assert SECRET.decode() not in repr(made)


def test_any_text_can_be_stored() -> None:
    made = make(request={"EncryptionContext": {"lone \ud800": "\u20ac \x00"}})
    assert made["requestParameters"]["encryptionContext"] == {"lone \ud800": "\u20ac \x00"}


def test_dates_are_text() -> None:
    moment = datetime(2027, 1, 1, tzinfo=UTC)
    made = make("ImportKeyMaterial", {"ValidTo": moment, "EncryptedKeyMaterial": SECRET})
    assert made["requestParameters"] == {"validTo": "2027-01-01T00:00:00+00:00"}


# --- filters: SQL and Python give the same answer --------------------------------------------------

STORED: list[dict[str, Any]] = [
    {
        "time": NOON,
        "operation": "GenerateDataKey",
        "request": {"EncryptionContext": {"Project": "Alpha", "Stage": "1"}},
    },
    {
        "time": NOON + 10,
        "operation": "Decrypt",
        "request": {"EncryptionContext": {"Project": "Beta"}},
        "caller": JOB,
    },
    {
        "time": NOON + 20,
        "operation": "Decrypt",
        "request": {},
        "error": "AccessDeniedException",
        "caller": JOB,
    },
    {
        "time": NOON + 30,
        "operation": "Decrypt",
        "request": {},
        "error": "IncorrectKeyException",
        "keys": [OTHER_KEY],
    },
    {
        "time": NOON + 40,
        "operation": "ReEncrypt",
        "request": {
            "SourceEncryptionContext": {"Project": "Alpha"},
            "DestinationEncryptionContext": {"New": "1"},
        },
        "keys": [KEY, OTHER_KEY],
    },
    {
        "time": NOON + 50,
        "operation": "CreateGrant",
        "request": {"Constraints": {"EncryptionContextEquals": {"Project": "Alpha"}}},
    },
    {"time": NOON + 60, "operation": "ListKeys", "request": {}, "keys": []},
]
FILTERS: dict[str, tuple[Filter, list[int]]] = {
    "everything": (Filter(), [0, 1, 2, 3, 4, 5, 6]),
    "since": (Filter(since=NOON + 30), [3, 4, 5, 6]),
    "until leaves its end out": (Filter(until=NOON + 10), [0]),
    "between": (Filter(since=NOON + 10, until=NOON + 30), [1, 2]),
    "part of a principal": (Filter(principal="Trainer"), [1, 2]),
    "operation": (Filter(operation="Decrypt"), [1, 2, 3]),
    "operation's case counts": (Filter(operation="decrypt"), []),
    "key ARN": (Filter(key=OTHER_KEY), [3, 4]),
    "key id": (Filter(key="0987dcba-09fe-87dc-65ba-ab0987654321"), [3, 4]),
    "pair": (Filter(context={"Project": "Alpha"}), [0, 4, 5]),
    "two pairs": (Filter(context={"Project": "Alpha", "Stage": "1"}), [0]),
    "pair's name case counts": (Filter(context={"project": "Alpha"}), []),
    "destination's pair": (Filter(context={"New": "1"}), [4]),
    "SQL in a value is text": (Filter(context={"') OR 1=1 --": "x"}, principal="' OR '1"), []),
    "failed": (Filter(error="*"), [2, 3]),
    "succeeded": (Filter(error=""), [0, 1, 4, 5, 6]),
    "denied, KMS's name": (Filter(error="AccessDeniedException"), [2]),
    "denied, CloudTrail's name": (Filter(error="AccessDenied"), [2]),
    "all at once": (Filter(operation="Decrypt", principal="Trainer", error="*", key=KEY), [2]),
}  # fmt: skip


@pytest.mark.parametrize(("wanted", "expected"), FILTERS.values(), ids=FILTERS)
def test_filters(wanted: Filter, expected: list[int]) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(audit.SCHEMA)
        for number, fields in enumerate(STORED):
            made = {"caller": ALICE, "keys": [KEY], "error": None, **fields}
            database.execute(
                audit.INSERT,
                row(
                    made["time"], made["operation"], made["caller"], made["request"], None,
                    request_id=str(number), keys=made["keys"], error=made["error"],
                ),
            )  # fmt: skip
        selected = [event(found) for found in database.execute(*wanted.select())]
        every = [event(found) for found in database.execute(*Filter().select())]
        newest = [event(found) for found in database.execute(*wanted.select(limit=2))]
        later = [event(found) for found in database.execute(*wanted.select(after=3))]
    database.close()
    assert [int(found["requestID"]) for found in selected] == expected
    assert [int(found["requestID"]) for found in every if wanted.matches(found)] == expected
    assert [int(found["requestID"]) for found in newest] == expected[-2:]
    assert [int(found["requestID"]) for found in later] == [number for number in expected if number >= 3]


# --- with the service ------------------------------------------------------------------------------


@pytest.fixture
def service(home: Path) -> Service:
    return open_service(home)


def events(service: Service, wanted: Filter) -> list[dict[str, Any]]:
    return [event(found) for found in service.store.query(*wanted.select())]


def test_every_call_is_recorded_whether_it_succeeds_or_not(service: Service) -> None:
    key = service.create_key()["KeyMetadata"]
    blob = service.encrypt(KeyId=key["KeyId"], Plaintext=SECRET, EncryptionContext={"Project": "x"})[
        "CiphertextBlob"
    ]
    service.decrypt(CiphertextBlob=blob, EncryptionContext={"Project": "x"})
    with pytest.raises(KmsError):
        service.decrypt(CiphertextBlob=blob)
    stranger = Caller("arn:aws:iam::000000000000:user/stranger")
    with pytest.raises(KmsError):
        service.call(
            "Decrypt", {"CiphertextBlob": blob, "EncryptionContext": {"Project": "x"}}, caller=stranger
        )
    found = events(service, Filter(key=key["Arn"]))
    assert [(one["eventName"], one.get("errorCode")) for one in found] == [
        ("CreateKey", None),
        ("Encrypt", None),
        ("Decrypt", None),
        ("Decrypt", "InvalidCiphertextException"),
        ("Decrypt", "AccessDenied"),
    ]
    assert len({one["eventID"] for one in found}) == 5
    assert SECRET.decode() not in json.dumps(found)
    assert [one["eventName"] for one in events(service, Filter(context={"Project": "x"}, error=""))] == [
        "Encrypt", "Decrypt",
    ]  # fmt: skip


def test_a_violation_is_recorded_without_the_tokens_that_it_is_about(service: Service) -> None:
    key = service.create_key()["KeyMetadata"]["KeyId"]
    grant = service.create_grant(
        KeyId=key, GranteePrincipal="arn:aws:iam::000000000000:user/alice", Operations=["Encrypt"]
    )
    for tokens in ([grant["GrantToken"]] * 11, [grant["GrantToken"] * 100]):
        with pytest.raises(KmsError, match=r"Value at 'grantTokens.*Member must have length") as caught:
            service.encrypt(KeyId=key, Plaintext=b"x", GrantTokens=tokens)
        assert grant["GrantToken"] not in str(caught.value)
    assert grant["GrantToken"] not in repr(service.store.query("SELECT * FROM audit"))


def test_follow_yields_what_comes_and_ends_when_told(service: Service) -> None:
    rounds = iter([True, True, False])

    def wait() -> bool:
        service.list_keys()
        return next(rounds)

    def read(after: int) -> list[tuple[Any, ...]]:
        return service.store.query(*Filter(operation="ListKeys").select(after=after))

    assert [one["eventName"] for one in follow(read, wait)] == ["ListKeys"] * 2


# --- files -------------------------------------------------------------------------------------------


def test_cloudtrail_files_in_every_form(tmp_path: Path) -> None:
    made = make()
    foreign = {**made, "eventSource": "s3.amazonaws.com"}
    (tmp_path / "a.json").write_text(json.dumps({"Records": [made, foreign]}))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps({"Records": [made]}).encode()))
    (tmp_path / "c.json").write_text(json.dumps([made]))
    (tmp_path / "d.json").write_text("\n".join([json.dumps(made), "", json.dumps(foreign), json.dumps(made)]))
    (tmp_path / "e.json").write_text(json.dumps(made))
    (tmp_path / "f.json").write_text(json.dumps({"events": [made]}))
    (tmp_path / "notes.txt").write_text("not read")
    assert list(read_cloudtrail([tmp_path])) == [made] * 7
    assert list(read_cloudtrail([str(tmp_path / "b.json.gz"), tmp_path / "e.json"])) == [made] * 2


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"[1, 2]", b'{"a": ', gzip.compress(b"x" * 100, mtime=0)[:-9], b"\xff\xfe", b"null"],
)
def test_what_is_no_log_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log.json"
    path.write_bytes(content)
    if content == b"":
        assert list(read_cloudtrail([path])) == []  # a file without a line has no event
        return
    with pytest.raises(SourceError, match=r"log\.json"):
        list(read_cloudtrail([path]))


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="absent"):
        list(read_cloudtrail([tmp_path / "absent"]))


def test_events_of_other_makers_need_no_member() -> None:
    """Real logs lack members: no user ARN, null parameters, a time that is none."""
    bare = {
        "eventSource": "kms.amazonaws.com",
        "eventName": "Decrypt",
        "requestParameters": None,
        "resources": None,
    }
    assert Filter(operation="Decrypt").matches(bare)
    assert not Filter(since=1.0).matches(bare)
    assert not Filter(principal="x", key="y", context={"a": "b"}).matches(bare)
    by_service = {**bare, "userIdentity": {"type": "AWSService", "invokedBy": "s3.amazonaws.com"}}
    assert audit.principal_of(by_service) == "s3.amazonaws.com"
