"""The boto3 clients: where they go, and what they never write into a log."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, ParamValidationError

from streamcrypt.errors import KeyAccessError
from streamcrypt.kms import kms_client
from streamcrypt.kms.simulation import Simulation


def test_local_needs_no_aws_configuration(home: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_PROFILE", "there-is-no-such-profile")
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
    kms = kms_client("local")
    key = kms.create_key()["KeyMetadata"]["KeyId"]
    made = kms.generate_data_key(KeyId=key, KeySpec="AES_256")
    assert kms.decrypt(CiphertextBlob=made["CiphertextBlob"])["Plaintext"] == made["Plaintext"]
    assert (home / "kms" / "kms.sqlite").exists()


def test_it_is_a_real_client(home: Path):
    kms = kms_client("local")
    with pytest.raises(ParamValidationError):
        kms.encrypt(KeyId="x")
    with pytest.raises(kms.exceptions.NotFoundException) as caught:
        kms.describe_key(KeyId="x")
    assert isinstance(caught.value, ClientError)
    assert caught.value.response["Error"]["Message"] == "Invalid keyId 'x'"
    assert len(caught.value.response["ResponseMetadata"]["RequestId"]) == 36
    pages = kms.get_paginator("list_aliases").paginate(PaginationConfig={"PageSize": 5})
    names = [alias["AliasName"] for page in pages for alias in page["Aliases"]]
    assert "alias/aws/s3" in names
    assert names == sorted(names)


@pytest.mark.parametrize("reference", ["", "remote", "localhost"])
def test_unknown_references(reference: str):
    with pytest.raises(ValueError, match="is no KMS"):
        kms_client(reference)


def test_http_without_an_access_key(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises(KeyAccessError, match="kms env"):
        kms_client("local@http://127.0.0.1:9")
    assert not home.exists()


def test_nothing_secret_is_logged_at_debug(home: Path):
    kms = kms_client("local")
    key = kms.create_key()["KeyMetadata"]["KeyId"]
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        made = kms.generate_data_key(KeyId=key, KeySpec="AES_256")
        kms.encrypt(KeyId=key, Plaintext=b"a canary in the mine")
        pair = kms.generate_data_key_pair(KeyId=key, KeyPairSpec="ECC_NIST_P256")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    log = written.getvalue()
    assert "GenerateDataKey" in log  # the log was on
    for secret in (made["Plaintext"], pair["PrivateKeyPlaintext"], b"a canary in the mine"):
        assert base64.b64encode(secret).decode() not in log
        assert secret.decode("latin-1") not in log
        assert repr(secret)[2:-1] not in log


def test_every_call_is_audited_without_secrets(home: Path):
    from streamcrypt.kms import audit, open_service

    kms = kms_client("local")
    key = kms.create_key()["KeyMetadata"]["Arn"]
    made = kms.generate_data_key(KeyId=key, KeySpec="AES_256", EncryptionContext={"a": "b"})
    with pytest.raises(ClientError):
        kms.decrypt(CiphertextBlob=made["CiphertextBlob"])
    rows = open_service().store.query(*audit.Filter().select())
    events = [audit.event(row) for row in rows]
    assert [event["eventName"] for event in events] == ["CreateKey", "GenerateDataKey", "Decrypt"]
    assert events[2]["errorCode"] == "InvalidCiphertextException"
    assert events[1]["requestParameters"]["encryptionContext"] == {"a": "b"}
    assert events[1]["requestID"] == made["ResponseMetadata"]["RequestId"]
    text = json.dumps(events)
    for secret in (made["Plaintext"], made["CiphertextBlob"]):
        assert base64.b64encode(secret).decode() not in text


def test_the_service_model_is_read_once_a_process(home: Path, monkeypatch: pytest.MonkeyPatch):
    from botocore.loaders import JSONFileLoader

    read: list[str] = []
    load = JSONFileLoader.load_file

    def counting(self, path):
        read.append(path)
        return load(self, path)

    kms_client("local")
    monkeypatch.setattr(JSONFileLoader, "load_file", counting)
    kms_client("local").list_keys()
    assert read == []


def test_every_attempt_is_one_call(home: Path):
    """What succeeds is answered early; what is refused, or throttled and tried again, by botocore's own way."""
    from botocore.config import Config

    from streamcrypt.kms import audit, open_service

    kms = kms_client("local", config=Config(retries={"total_max_attempts": 2, "mode": "standard"}))
    key = kms.create_key()
    assert key["ResponseMetadata"]["RetryAttempts"] == 0
    service = open_service()
    with pytest.raises(kms.exceptions.NotFoundException):
        kms.describe_key(KeyId="absent")
    service.simulation = Simulation(rate=1e-9, burst=1)
    try:
        kms.list_keys()
        with pytest.raises(ClientError, match="ThrottlingException") as throttled:
            kms.list_keys()
    finally:
        service.simulation = None
    assert throttled.value.response["ResponseMetadata"]["RetryAttempts"] == 1
    events = [audit.event(row) for row in service.store.query(*audit.Filter().select())]
    told = [(event["eventName"], event.get("errorCode")) for event in events]
    assert told == [
        ("CreateKey", None), ("DescribeKey", "NotFoundException"), ("ListKeys", None),
        ("ListKeys", "ThrottlingException"), ("ListKeys", "ThrottlingException"),
    ]  # fmt: skip
    assert events[-1]["requestID"] == throttled.value.response["ResponseMetadata"]["RequestId"]
