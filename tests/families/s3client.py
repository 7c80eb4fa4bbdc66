"""The real Amazon S3 Encryption Client, and the objects that it wrote once for the tests.

    python tests/families/s3client.py        writes tests/engine/s3client_objects.json anew

Needs moto and `amazon-s3-encryption-client-python`, whose pins contradict ours: install it without its
dependencies into a folder of its own and name that in PYTHONPATH (tests/README.md).
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Of the backup of the KMS that wrapped the data keys of these objects, and nothing else.
PASSPHRASE = b"objects of the S3 Encryption Client"


def client(s3: Any, kms: Any, key_id: str, *, committing: bool) -> Any:
    """A client over a boto3 client of its own; ``s3`` says where the store is."""
    import boto3
    from s3_encryption import S3EncryptionClient, S3EncryptionClientConfig
    from s3_encryption.materials.kms_keyring import KmsKeyring
    from s3_encryption.materials.materials import AlgorithmSuite, CommitmentPolicy

    own = boto3.client(
        "s3",
        endpoint_url=s3.meta.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    options: dict[str, Any] = {}
    if not committing:
        options = {
            "encryption_algorithm": AlgorithmSuite.ALG_AES_256_GCM_IV12_TAG16_NO_KDF,
            "commitment_policy": CommitmentPolicy.FORBID_ENCRYPT_ALLOW_DECRYPT,
        }
    return S3EncryptionClient(own, S3EncryptionClientConfig(keyring=KmsKeyring(kms, key_id), **options))


def main() -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    import streamcrypt as sc
    from streamcrypt.kms import open_service
    from streamcrypt.kms.backup import write_backup

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    target = Path(__file__).parent.parent / "engine" / "s3client_objects.json"
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STREAMCRYPT_HOME"] = f"{folder}/home"
        kms = sc.kms_client("local")
        key_id = kms.create_key()["KeyMetadata"]["KeyId"]
        plain = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{moto.get_host_and_port()[1]}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        plain.create_bucket(Bucket="bucket")
        objects = []
        for committing in (True, False):
            real = client(plain, kms, key_id, committing=committing)
            for size, context in (
                (0, {}),
                (100, {"Project": "CustomerChurn"}),
                (5_000, {"a": "1", "b": "2"}),
            ):
                data = random.Random(size).randbytes(size)
                real.put_object(Bucket="bucket", Key="o", Body=data, EncryptionContext=context)
                found = plain.get_object(Bucket="bucket", Key="o")
                objects.append(
                    {
                        "metadata": found["Metadata"],
                        "body": base64.b64encode(found["Body"].read()).decode(),
                        "seeded_plaintext": size,
                        "context": {
                            name: value for name, value in context.items() if not name.startswith("aws:")
                        },
                    }
                )
        backup = Path(folder) / "backup"
        write_backup(open_service().store, backup, passphrase=lambda: PASSPHRASE)
        record = {
            "written_by": f"amazon-s3-encryption-client-python {version('amazon-s3-encryption-client-python')}",
            "key": f"local:{key_id}",
            "kms_backup": base64.b64encode(zlib.compress(backup.read_bytes(), 9)).decode(),
            "objects": objects,
        }
    moto.stop()
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{target}: {len(objects)} objects, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
