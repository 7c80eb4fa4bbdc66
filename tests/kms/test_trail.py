"""What a log tells: datasets by encryption context, calls and cost by principal, and what is odd."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from streamcrypt.cli import main
from streamcrypt.kms import Caller, KmsError, open_service
from streamcrypt.kms.trail import summary

ACCOUNT = "111122223333"
KEY = f"arn:aws:kms:us-west-2:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ALICE = f"arn:aws:iam::{ACCOUNT}:user/Alice"
JOB = f"arn:aws:sts::{ACCOUNT}:assumed-role/Trainer/job-7"
CHURN, OTHER = {"Project": "Churn"}, {"Project": "Other"}

_numbers = itertools.count()


def record(name: str, who: str = ALICE, context: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """A record as CloudTrail delivers it (AWS KMS Developer Guide, examples of 2025), shortened."""
    number = next(_numbers)
    parameters: dict[str, Any] = {"keyId": KEY, "encryptionAlgorithm": "SYMMETRIC_DEFAULT"}
    if context is not None:
        parameters["encryptionContext"] = context
    return {
        "eventVersion": "1.11",
        "userIdentity": {"type": "IAMUser", "arn": who, "accountId": ACCOUNT},
        "eventTime": f"2026-11-24T07:{number // 60:02}:{number % 60:02}Z",
        "eventSource": "kms.amazonaws.com",
        "eventName": name,
        "awsRegion": "us-west-2",
        "requestParameters": more.pop("parameters", parameters),
        "responseElements": None,
        "eventID": f"event-{number}",
        "resources": [{"accountId": ACCOUNT, "type": "AWS::KMS::Key", "ARN": KEY}],
        "eventType": "AwsApiCall",
        **more,
    }


def kinds(events: list[dict[str, Any]], **options: Any) -> list[str]:
    return [anomaly["kind"] for anomaly in summary(events, **options)["anomalies"]]


def test_who_decrypted_which_dataset() -> None:
    signed = {**CHURN, "aws-crypto-public-key": "A0"}
    told = summary(
        [
            record("GenerateDataKey", ALICE, signed),
            record("Decrypt", JOB, CHURN),
            record("Decrypt", JOB, {"aws-crypto-public-key": "A1", **CHURN}),
            record("Decrypt", ALICE, OTHER, errorCode="AccessDenied"),
            record(
                "ReEncrypt",
                ALICE,
                parameters={"sourceEncryptionContext": CHURN, "destinationEncryptionContext": OTHER},
            ),
        ]
    )
    churn, other = told["datasets"]
    assert (churn["context"], churn["decrypted_by"]) == (CHURN, {JOB: 2, ALICE: 1})
    assert (churn["encrypted_by"], churn["keys"]) == ({ALICE: 1}, [KEY])
    assert (other["context"], other["decrypted_by"], other["encrypted_by"]) == (OTHER, {}, {ALICE: 1})
    by_name = {entry["principal"]: entry for entry in told["principals"]}
    assert by_name[ALICE]["calls"] == {"GenerateDataKey": 1, "Decrypt": 1, "ReEncrypt": 1}
    assert (by_name[ALICE]["failed"], by_name[JOB]["failed"]) == (1, 0)
    assert told["cost"]["requests"] == 4


def test_cost_by_principal() -> None:
    # Outside the free tier: 2 RSA data key pairs at 12 dollars for 10,000.
    pair = {"keyId": KEY, "keyPairSpec": "RSA_2048"}
    told = summary([record("GenerateDataKeyPair", JOB, parameters=pair) for _ in range(2)])
    assert told["principals"][0]["usd"] == pytest.approx(0.0024)
    assert told["cost"]["kms_requests"] == pytest.approx(0.0024)


def test_an_event_counts_once() -> None:
    event = record("Decrypt", JOB, CHURN)
    assert summary([event, dict(event), record("Decrypt", JOB, CHURN)])["events"] == 2


ANOMALIES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "nothing odd": ([record("GenerateDataKey", ALICE, CHURN), record("Decrypt", JOB, CHURN)], {}, []),
    "denied": ([record("Decrypt", JOB, CHURN, errorCode="AccessDenied", errorMessage="User: …")], {}, ["denied"]),
    "did not open": ([record("Decrypt", JOB, CHURN, errorCode="InvalidCiphertextException")], {}, ["not-opened"]),
    "a context that nobody encrypted": (
        [record("GenerateDataKey", ALICE, CHURN), record("Decrypt", JOB, OTHER)], {}, ["unknown-context"]),
    "a log of readers only": ([record("Decrypt", JOB, OTHER)], {}, []),
    "a context that is not known": ([record("Decrypt", JOB, OTHER)], {"known": [CHURN]}, ["unknown-context"]),
    "a known context with more pairs": ([record("Decrypt", JOB, {**CHURN, "a": "b"})], {"known": [CHURN]}, []),
    "no context where one is known": ([record("Decrypt", JOB)], {"known": [CHURN]}, ["unknown-context"]),
    "deletion scheduled": ([record("Decrypt", JOB, CHURN), record("ScheduleKeyDeletion")], {}, ["key-deletion"]),
    "deletion refused": ([record("ScheduleKeyDeletion", ALICE, errorCode="AccessDenied")], {}, ["denied"]),
    "disabled key": ([record("Decrypt", JOB, CHURN, errorCode="DisabledException")], {}, ["key-unusable"]),
    "throttled": ([record("Decrypt", JOB, CHURN, errorCode="ThrottlingException")], {}, ["throttled"]),
    "a dry run": ([record("Decrypt", JOB, CHURN, errorCode="DryRunOperationException")], {}, []),
    "deletion cancelled": ([record("ScheduleKeyDeletion"), record("CancelKeyDeletion")], {}, []),
}  # fmt: skip


@pytest.mark.parametrize(("events", "options", "expected"), ANOMALIES.values(), ids=ANOMALIES)
def test_anomalies(events: list[dict[str, Any]], options: dict[str, Any], expected: list[str]) -> None:
    """Whatever the order in which the files are read: the events' times decide."""
    assert kinds(events, **options) == expected
    assert kinds(list(reversed(events)), **options) == expected


def test_a_key_about_to_be_deleted_names_who_needs_it() -> None:
    [found] = summary(
        [
            record("Decrypt", JOB, CHURN),
            record("ScheduleKeyDeletion", responseElements={"deletionDate": "Dec 24, 2026, 7:00:00 AM"}),
        ]
    )["anomalies"]
    assert (found["key"], found["principal"], found["used_by"]) == (KEY, ALICE, {JOB: 1})
    assert found["deletion_date"] == "Dec 24, 2026, 7:00:00 AM"


def test_equal_refusals_are_one_anomaly_with_a_count() -> None:
    denied = [record("Decrypt", JOB, CHURN, errorCode="AccessDenied") for _ in range(5)]
    [found] = summary(denied)["anomalies"]
    assert (found["count"], found["principal"], found["operation"], found["key"]) == (5, JOB, "Decrypt", KEY)
    assert found["last"] == denied[-1]["eventTime"]


def test_no_events() -> None:
    told = summary([])
    assert (told["events"], told["from"], told["datasets"], told["anomalies"]) == (0, None, [], [])


# --- the command ------------------------------------------------------------------------------------


def test_audit_reads_logs_of_aws_and_our_own_alike(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = open_service(home)
    key = service.create_key()["KeyMetadata"]["Arn"]
    made = service.generate_data_key(KeyId=key, NumberOfBytes=32, EncryptionContext=CHURN)
    blob = made["CiphertextBlob"]
    service.decrypt(CiphertextBlob=blob, EncryptionContext=CHURN)
    stranger = Caller("arn:aws:iam::000000000000:user/stranger")
    with pytest.raises(KmsError):
        service.call("Decrypt", {"CiphertextBlob": blob, "EncryptionContext": CHURN}, caller=stranger)
    assert main(["kms", "audit", "--json"]) == 0
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "ours.json").write_text(capsys.readouterr().out)
    aws = logs / "aws.json.gz"
    aws.write_bytes(gzip.compress(json.dumps({"Records": [record("Decrypt", JOB, CHURN)]}).encode()))

    assert main(["kms", "audit", "--cloudtrail", str(logs / "ours.json"), str(aws), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [dataset] = told["datasets"]
    assert dataset["decrypted_by"] == {"arn:aws:iam::000000000000:root": 1, JOB: 1}
    assert [(odd["kind"], odd["principal"]) for odd in told["anomalies"]] == [("denied", stranger.arn)]

    assert main(["kms", "audit", "--cloudtrail", str(logs)]) == 0
    text = capsys.readouterr().out
    assert 'dataset {"Project": "Churn"}' in text
    assert f"decrypted by {JOB}: 1" in text
    assert f"odd: denied: {stranger.arn}" in text

    assert main(["kms", "audit", "--cloudtrail", str(aws), "--known-context", "Project=Other", "--json"]) == 0
    assert [odd["kind"] for odd in json.loads(capsys.readouterr().out)["anomalies"]] == ["unknown-context"]

    assert main(["kms", "audit", "--summary", "--principal", "stranger", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["events"] == 1


# A record as AWS delivers it, whole (AWS KMS Developer Guide, "Decrypt", the identifiers those of the guide).
REAL = {
    "eventVersion": "1.11",
    "userIdentity": {
        "type": "AssumedRole", "principalId": "AROAIGDTESTANDEXAMPLE:job-7", "arn": JOB, "accountId": ACCOUNT,
        "accessKeyId": "ASIAIOSFODNN7EXAMPLE",
        "sessionContext": {
            "sessionIssuer": {
                "type": "Role", "principalId": "AROAIGDTESTANDEXAMPLE", "accountId": ACCOUNT, "userName": "Trainer",
                "arn": f"arn:aws:iam::{ACCOUNT}:role/Trainer",
            },
            "attributes": {"creationDate": "2026-11-24T06:30:00Z", "mfaAuthenticated": "false"},
        },
    },
    "eventTime": "2026-11-24T08:00:00Z",
    "eventSource": "kms.amazonaws.com",
    "eventName": "Decrypt",
    "awsRegion": "us-west-2",
    "sourceIPAddress": "192.0.2.0",
    "userAgent": "aws-sdk-python",
    "errorCode": "AccessDenied",
    "errorMessage": f"User: {JOB} is not authorized to perform: kms:Decrypt on the resource associated with this "
    "ciphertext because no identity-based policy allows the kms:Decrypt action",
    "requestParameters": None,
    "responseElements": None,
    "requestID": "12345126-30d5-4b28-98b9-9153da559963",
    "eventID": "abcde202-ba1a-467c-b4ba-f729d45ae521",
    "readOnly": True,
    "eventType": "AwsApiCall",
    "managementEvent": True,
    "recipientAccountId": ACCOUNT,
    "eventCategory": "Management",
    "tlsDetails": {"tlsVersion": "TLSv1.3", "clientProvidedHostHeader": "kms.us-west-2.amazonaws.com"},
}  # fmt: skip
CONTEXT_WITH_A_LINE_BREAK = {"Project": "a\u2028b"}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"Records": [REAL]}),
        json.dumps([REAL]),
        json.dumps(REAL),
        json.dumps(record("Decrypt", ALICE, CONTEXT_WITH_A_LINE_BREAK), ensure_ascii=False) + "\n" + json.dumps(REAL),
        "".join(f"2026-11-24T08:00:00.000Z {json.dumps({**REAL, 'eventID': name})}\n" for name in "ab"),
        json.dumps({"Events": [{"EventId": REAL["eventID"], "CloudTrailEvent": json.dumps(REAL)}]}),
        json.dumps({"detail-type": "AWS API Call via CloudTrail", "source": "aws.kms", "detail": REAL}),
    ],
    ids=["file", "array", "event", "lines", "CloudWatch Logs", "lookup-events", "EventBridge"],
)  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
def test_every_form_in_which_aws_gives_the_events(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, compressed: bool
) -> None:
    logs = tmp_path / "AWSLogs" / ACCOUNT / "CloudTrail" / "us-west-2" / "2026" / "11" / "24"
    logs.mkdir(parents=True)
    data = content.encode()
    (logs / "events.json.gz").write_bytes(gzip.compress(data) if compressed else data)
    digest = logs.parents[4] / "CloudTrail-Digest"  # lies beside the logs, and holds no events
    digest.mkdir()
    (digest / "digest.json.gz").write_bytes(
        gzip.compress(b'{"awsAccountId": "111122223333", "logFiles": []}')
    )
    assert main(["kms", "audit", "--cloudtrail", str(tmp_path / "AWSLogs"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [denied] = [odd for odd in told["anomalies"] if odd["kind"] == "denied"]
    assert (denied["principal"], denied["code"], denied["operation"]) == (JOB, "AccessDenied", "Decrypt")
    assert "no identity-based policy allows" in denied["message"]


def test_a_damaged_log_is_named(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = gzip.compress(json.dumps({"Records": [record("Decrypt", JOB, CHURN)] * 50}).encode())
    for damaged in (whole[: len(whole) // 2], whole[:30] + bytes(20) + whole[50:]):
        path = tmp_path / "log.json.gz"
        path.write_bytes(damaged)
        assert main(["kms", "audit", "--cloudtrail", str(path)]) == 1
        assert "log.json.gz: cannot be read as a CloudTrail log" in capsys.readouterr().err


def test_a_file_that_is_no_log(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text("text")
    assert main(["kms", "audit", "--cloudtrail", str(path)]) == 1
    assert "x.json" in capsys.readouterr().err
