"""Other people's clients on ``kms serve``: the AWS CLI word for word, the AWS Encryption SDK, the S3 client."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from streamcrypt.kms import Service, principals
from streamcrypt.kms.server import Server
from streamcrypt.kms.store import Store

CONTEXT = {"Project": "CustomerChurn"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A running server, and the variables that point a client at it."""
    service = Service(Store(tmp_path_factory.mktemp("interop")))
    key = principals.access_key(service.store, principals.principal_arn(None))
    server = Server(service, port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda _: ready.set()})
    thread.start()
    assert ready.wait(10)
    yield {
        "AWS_ENDPOINT_URL_KMS": server.url,
        "AWS_ACCESS_KEY_ID": key.id,
        "AWS_SECRET_ACCESS_KEY": key.secret,
        "AWS_DEFAULT_REGION": "local",
    }
    server.stop()
    thread.join()
    service.close()


@pytest.fixture
def kms(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return client()


def client(region: str = "local") -> Any:
    return boto3.session.Session().client("kms", region_name=region)


# -- the AWS CLI ---------------------------------------------------------------------------------------


@pytest.fixture
def aws(environment: dict[str, str], tmp_path: Path) -> Any:
    program = shutil.which("aws", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("THE AWS CLI IS MISSING: pip install awscli")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    nowhere = str(tmp_path / "none")
    clean |= environment | {
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
        "AWS_PAGER": "",
    }

    def run(*words: str, check: bool = True) -> str:
        done = subprocess.run(
            [program, *words],
            env=clean,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert (done.returncode == 0) == check, done.stderr
        return done.stdout if check else done.stderr

    return run


@pytest.mark.timeout(600)  # ten processes of a second of processor time each
def test_the_aws_cli_word_for_word(aws: Any, tmp_path: Path):
    made = json.loads(aws("kms", "create-key", "--description", "KMS key for ML models"))["KeyMetadata"]
    assert made["Description"] == "KMS key for ML models"
    aws("kms", "create-alias", "--alias-name", "alias/ml-key", "--target-key-id", made["KeyId"])
    (tmp_path / "model.bin").write_bytes(bytes(range(256)))
    sealed = aws(
        "kms", "encrypt", "--key-id", "alias/ml-key", "--plaintext", "fileb://model.bin",
        "--encryption-context", "Project=CustomerChurn,Stage=train", "--output", "text",
        "--query", "CiphertextBlob",
    )  # fmt: skip
    (tmp_path / "model.enc").write_bytes(base64.b64decode(sealed))
    opened = aws(
        "kms", "decrypt", "--ciphertext-blob", "fileb://model.enc",
        "--encryption-context", "Project=CustomerChurn,Stage=train", "--output", "text", "--query", "Plaintext",
    )  # fmt: skip
    assert base64.b64decode(opened) == bytes(range(256))
    listed = json.loads(aws("kms", "list-keys"))
    assert made["KeyId"] in [key["KeyId"] for key in listed["Keys"]]
    assert set(listed) == {"Keys"}  # as `streamcrypt kms list-keys` says it
    data_key = json.loads(
        aws("kms", "generate-data-key", "--key-id", "alias/ml-key", "--key-spec", "AES_256")
    )
    assert len(base64.b64decode(data_key["Plaintext"])) == 32
    aws("kms", "enable-key-rotation", "--key-id", made["KeyId"], "--rotation-period-in-days", "90")
    aws("kms", "tag-resource", "--key-id", made["KeyId"], "--tags", "TagKey=team,TagValue=ml")
    refused = aws("kms", "decrypt", "--ciphertext-blob", "fileb://model.enc", check=False)
    assert "(InvalidCiphertextException) when calling the Decrypt operation" in refused


# -- the AWS Encryption SDK ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def providers() -> Any:
    pytest.importorskip("aws_encryption_sdk", reason="THE AWS ENCRYPTION SDK IS MISSING")
    from aws_cryptographic_material_providers.mpl import AwsCryptographicMaterialProviders
    from aws_cryptographic_material_providers.mpl.config import MaterialProvidersConfig

    return AwsCryptographicMaterialProviders(config=MaterialProvidersConfig())


def _round_trip(encrypting: Any, decrypting: Any) -> None:
    from aws_encryption_sdk import EncryptionSDKClient

    sdk = EncryptionSDKClient()
    message, _ = sdk.encrypt(source=b"plaintext", keyring=encrypting, encryption_context=CONTEXT)
    plaintext, header = sdk.decrypt(source=message, keyring=decrypting)
    assert plaintext == b"plaintext"
    assert header.encryption_context["Project"] == "CustomerChurn"


def test_encryption_sdk_strict(kms: Any, providers: Any):
    from aws_cryptographic_material_providers.mpl.models import CreateAwsKmsKeyringInput

    arn = kms.create_key()["KeyMetadata"]["Arn"]
    keyring = providers.create_aws_kms_keyring(CreateAwsKmsKeyringInput(kms_key_id=arn, kms_client=kms))
    _round_trip(keyring, keyring)


def test_encryption_sdk_discovery(kms: Any, providers: Any):
    from aws_cryptographic_material_providers.mpl.models import (
        CreateAwsKmsDiscoveryKeyringInput,
        CreateAwsKmsKeyringInput,
        DiscoveryFilter,
    )

    arn = kms.create_key()["KeyMetadata"]["Arn"]
    strict = providers.create_aws_kms_keyring(CreateAwsKmsKeyringInput(kms_key_id=arn, kms_client=kms))
    accounts = DiscoveryFilter(account_ids=["000000000000"], partition="aws")
    discovery = providers.create_aws_kms_discovery_keyring(
        CreateAwsKmsDiscoveryKeyringInput(kms_client=kms, discovery_filter=accounts)
    )
    _round_trip(strict, discovery)


def test_encryption_sdk_multi_region(kms: Any, providers: Any):
    from aws_cryptographic_material_providers.mpl.models import CreateAwsKmsMrkKeyringInput

    primary = kms.create_key(MultiRegion=True)["KeyMetadata"]
    replica = kms.replicate_key(KeyId=primary["KeyId"], ReplicaRegion="eu-west-1")["ReplicaKeyMetadata"]
    here = providers.create_aws_kms_mrk_keyring(
        CreateAwsKmsMrkKeyringInput(kms_key_id=primary["Arn"], kms_client=kms)
    )
    there = providers.create_aws_kms_mrk_keyring(
        CreateAwsKmsMrkKeyringInput(kms_key_id=replica["Arn"], kms_client=client("eu-west-1"))
    )
    _round_trip(here, there)


# -- the Amazon S3 Encryption Client ----------------------------------------------------------------------


def test_s3_encryption_client(kms: Any, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("s3_encryption", reason="THE S3 ENCRYPTION CLIENT IS MISSING")
    moto = pytest.importorskip("moto", reason="moto IS MISSING: there is no S3 for the S3 client")
    from s3_encryption import S3EncryptionClient, S3EncryptionClientConfig
    from s3_encryption.materials.kms_keyring import KmsKeyring

    key = kms.create_key()["KeyMetadata"]
    kms.create_alias(AliasName="alias/s3", TargetKeyId=key["KeyId"])
    address = re.escape(environment["AWS_ENDPOINT_URL_KMS"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # moto answers S3 only; requests to our server pass through it.
    with moto.mock_aws(config={"core": {"passthrough": {"urls": [f"{address}.*"]}}}):
        passing = boto3.session.Session().client(
            "kms",
            region_name="local",
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],  # moto puts its own into the environment
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        )
        s3 = boto3.session.Session().client("s3", region_name="us-east-1")
        s3.create_bucket(Bucket="bucket")
        encrypting = S3EncryptionClient(s3, S3EncryptionClientConfig(KmsKeyring(passing, "alias/s3")))
        encrypting.put_object(
            Bucket="bucket", Key="o", Body=io.BytesIO(b"plaintext"), EncryptionContext=dict(CONTEXT)
        )
        # The encryption client has put its handlers on s3: look with another one.
        plain = boto3.session.Session().client("s3", region_name="us-east-1")
        stored = plain.get_object(Bucket="bucket", Key="o")["Body"].read()
        assert b"plaintext" not in stored
        read = encrypting.get_object(Bucket="bucket", Key="o", EncryptionContext=dict(CONTEXT))
        assert read["Body"].read() == b"plaintext"
