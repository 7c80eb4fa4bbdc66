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
