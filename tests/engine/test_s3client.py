"""Objects of the Amazon S3 Encryption Client: read whole or not at all, by every way in.

Three sources: objects that the real client wrote (s3client_objects.json, made by families/s3client.py),
the real client itself where it is installed, and an independent writer here for what it does not write.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from families import s3client as real
from families.s3 import Bucket, MiB

import streamcrypt as sc
from streamcrypt.kms.backup import restore_backup

ALLOW = {"commitment_policy": "require-encrypt-allow-decrypt"}
CONTEXT = {"Project": "CustomerChurn"}
RECORDED = Path(__file__).parent / "s3client_objects.json"


class Writer:
    """Writes objects by the specification, with a key of the embedded KMS."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self.key = bucket, key
        self.kms = sc.kms_client("local")

    def write(
        self, name: str, data: bytes, *, version: int = 3, instructions: bool = False
    ) -> dict[str, str]:
        context = {**CONTEXT, "aws:x-amz-cek-alg": "115" if version == 3 else "AES/GCM/NoPadding"}
        made = self.kms.generate_data_key(
            KeyId=self.key.removeprefix("local:"), KeySpec="AES_256", EncryptionContext=context
        )
        wrapped, data_key = encode(made["CiphertextBlob"]), made["Plaintext"]
        if version == 3:
            message_id = os.urandom(28)

            def derive(purpose: bytes, length: int) -> bytes:
                return HKDF(SHA512(), length, message_id, b"\x00\x73" + purpose).derive(data_key)

            body = AESGCM(derive(b"DERIVEKEY", 32)).encrypt(b"\x01" * 12, data, b"\x00\x73")
            wrapping = {"x-amz-3": wrapped, "x-amz-w": "12", "x-amz-t": json.dumps(context)}
            content = {
                "x-amz-c": "115",
                "x-amz-d": encode(derive(b"COMMITKEY", 28)),
                "x-amz-i": encode(message_id),
            }
        else:
            iv = os.urandom(12)
            body = AESGCM(data_key).encrypt(iv, data, None)
            wrapping = {
                "x-amz-key-v2": wrapped,
                "x-amz-wrap-alg": "kms+context",
                "x-amz-matdesc": json.dumps(context),
                "x-amz-cek-alg": "AES/GCM/NoPadding",
                "x-amz-iv": encode(iv),
                "x-amz-tag-len": "128",
            }
            content = {}
        if instructions:
            self.bucket.put(name, body, Metadata=content)
            self.bucket.put(
                f"{name}.instruction",
                json.dumps(wrapping).encode(),
                Metadata={"x-amz-crypto-instr-file": ""},
            )
        else:
            self.bucket.put(name, body, Metadata=content | wrapping)
        return content | wrapping

    def alter(self, name: str, **metadata: str | None) -> None:
        """The same object with other metadata; '_' stands for '-', None for left out."""
        found = self.bucket.client.head_object(Bucket=self.bucket.name, Key=name)["Metadata"]
        for key, value in metadata.items():
            found[key.replace("_", "-")] = value
        found = {key: value for key, value in found.items() if value is not None}
        self.bucket.put(name, self.bucket.get(name), Metadata=found)


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def writer(bucket: Bucket, key: str) -> Writer:
    return Writer(bucket, key)


@pytest.mark.parametrize("instructions", [False, True], ids=["metadata", "instruction file"])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("size", [0, MiB + 5, 9 * MiB + 1])
def test_by_every_way_in(writer: Writer, tmp_path: Path, size: int, version: int, instructions: bool) -> None:
    data = random.Random(size).randbytes(size)
    url = f"{writer.bucket.url}/o"
    writer.write("o", data, version=version, instructions=instructions)
    options: dict[str, Any] = {"keys": writer.key, "context": CONTEXT, **ALLOW}
    with sc.open(url, **options) as file:
        assert file.size == size
        assert file.read_at(size // 2, 100_000) == data[size // 2 :][:100_000]
        file.seek(-min(size, 7), io.SEEK_END)
        assert file.read() == data[-7:]
        file.seek(0)
        assert file.read() == data
    report = sc.decrypt(url, tmp_path / "out", **options)
    assert (report.files, report.bytes_in) == (1, size + 16)
    assert (tmp_path / "out").read_bytes() == data
    assert sc.verify(url, against=tmp_path / "out", **options).files == 1
    found = sc.inspect(url)
    assert (found.version, found.committing, found.plaintext_size) == (version, version == 3, size)
    assert found.encryption_context.items() > CONTEXT.items()
    sc.rekey(url, f"{writer.bucket.url}/ours", keys=writer.key, from_keys=writer.key, **ALLOW)
    assert sc.decrypt_bytes(writer.bucket.get("ours")) == data


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "streamcrypt", *arguments]
    return subprocess.run(command, capture_output=True, timeout=240, check=False)


def test_by_command(writer: Writer) -> None:
    data = random.Random(1).randbytes(3 * MiB)
    url = f"{writer.bucket.url}/o"
    writer.write("o", data)
    assert run("cat", url, "--key", writer.key, "--range", "2000000:2000100").stdout == data[2000000:2000100]
    assert run("decrypt", url, "-", "--key", writer.key).stdout == data
    shown = run("inspect", url).stdout.decode()
    assert "object of the Amazon S3 Encryption Client" in shown
    refused = run("decrypt", url, "-")
    assert (refused.returncode, refused.stdout) == (4, b"")
    assert b"name the KMS key" in refused.stderr


def test_no_altered_bit_is_accepted(writer: Writer, tmp_path: Path) -> None:
    writer.write("o", b"secret" * 10)
    body = writer.bucket.get("o")
    metadata = writer.bucket.client.head_object(Bucket=writer.bucket.name, Key="o")["Metadata"]
    for bit in [*range(0, 8 * len(body), 37), 8 * len(body) - 1]:
        altered = bytearray(body)
        altered[bit // 8] ^= 1 << bit % 8
        writer.bucket.put("o", bytes(altered), Metadata=metadata)
        with pytest.raises(sc.IntegrityError):
            sc.decrypt(f"{writer.bucket.url}/o", tmp_path / "out", keys=writer.key)
    for altered in (body[:-1], body + b"\0", body[:15]):
        writer.bucket.put("o", altered, Metadata=metadata)
        with pytest.raises(sc.IntegrityError):
            sc.decrypt(f"{writer.bucket.url}/o", tmp_path / "out", keys=writer.key)
    assert not list(tmp_path.glob("out*"))
    for name in ("x-amz-3", "x-amz-d", "x-amz-i"):
        value = bytearray(base64.b64decode(metadata[name]))
        value[-1] ^= 1
        writer.bucket.put("o", body, Metadata=metadata | {name: encode(bytes(value))})
        with pytest.raises(sc.IntegrityError):
            sc.decrypt(f"{writer.bucket.url}/o", tmp_path / "out", keys=writer.key)


REFUSED = {
    "no commitment": (2, {}, "does not commit"),
    "CBC": (2, {"x_amz_cek_alg": "AES/CBC/PKCS5Padding"}, "authenticates nothing"),
    "first format": (2, {"x_amz_key_v2": None, "x_amz_key": "AAAA"}, "authenticates nothing"),
    "KMS without context": (2, {"x_amz_wrap_alg": "kms"}, "x-amz-wrap-alg is 'kms'"),
    "another wrapping": (3, {"x_amz_w": "02"}, "x-amz-w is '02'"),
    "another cipher": (3, {"x_amz_c": "116"}, "x-amz-c is '116'"),
    "short tag": (2, {"x_amz_tag_len": "96"}, "not of 128 bits"),
    "two formats": (3, {"x_amz_key_v2": "AAAA"}, "several formats"),
    "content of two formats": (3, {"x_amz_iv": "AAAA"}, "several formats"),
    "no message id": (3, {"x_amz_i": None}, "no proper value of x-amz-i"),
    "context is no map": (3, {"x_amz_t": "[1]"}, "no proper encryption context"),
    "context without the algorithm": (3, {"x_amz_t": '{"Project":"CustomerChurn"}'}, "another algorithm"),
    "no wrapped key": (3, {"x_amz_3": None}, "instruction file with its wrapped data key is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("version", "metadata", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read(writer: Writer, version: int, metadata: dict[str, Any], words: str) -> None:
    writer.write("o", b"data", version=version)
    writer.alter("o", **metadata)
    with pytest.raises(sc.IntegrityError, match=words):
        sc.open(f"{writer.bucket.url}/o", keys=writer.key)


def test_a_committing_object_is_not_read_as_one_that_does_not_commit(writer: Writer) -> None:
    said = writer.write("o", b"data")
    as_v2 = {
        "x-amz-key-v2": said["x-amz-3"],
        "x-amz-matdesc": said["x-amz-t"],
        "x-amz-wrap-alg": "kms+context",
        "x-amz-cek-alg": "AES/GCM/NoPadding",
        "x-amz-iv": encode(bytes(12)),
    }
    body = writer.bucket.get("o")
    writer.bucket.put("o", body, Metadata=as_v2)
    with pytest.raises(sc.IntegrityError, match="another algorithm"):
        sc.open(f"{writer.bucket.url}/o", keys=writer.key, **ALLOW)
    # By an instruction file beside the metadata of the committing object.
    writer.bucket.put("o", body, Metadata={name: said[name] for name in ("x-amz-c", "x-amz-d", "x-amz-i")})
    writer.bucket.put("o.instruction", json.dumps(as_v2).encode())
    with pytest.raises(sc.IntegrityError, match="do not belong together"):
        sc.open(f"{writer.bucket.url}/o", keys=writer.key, **ALLOW)


def test_context_and_signature_are_demanded(writer: Writer) -> None:
    writer.write("o", b"data")
    with pytest.raises(sc.ContextMismatchError):
        sc.open(f"{writer.bucket.url}/o", keys=writer.key, context={"Project": "other"})
    with pytest.raises(sc.IntegrityError, match="not signed"):
        sc.open(f"{writer.bucket.url}/o", keys=writer.key, require_signed=True)


def test_what_is_neither_is_no_message(bucket: Bucket, key: str) -> None:
    bucket.put("o", b"plain", Metadata={"x-amz-iv": "AAAA"})
    bucket.put("p", b"plain")
    bucket.put("p.instruction", b'{"x-amz-key-v2": "AAAA", "else": 1}')
    for name in ("o", "p"):
        with pytest.raises(sc.FormatError, match="not a message"):
            sc.open(f"{bucket.url}/{name}", keys=key)


class TwoFaced:
    """A source that gives out other bytes of its end the second time."""

    state = (0, 0, 0)

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = bytearray(data)
        self._reads = 0

    def read_at(self, offset: int, buffer: memoryview) -> int:
        part = self._data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._reads += len(part)
        if self._reads >= self.size > self._reads - len(part):
            self._data[-100] ^= 1
        return len(part)

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_store_that_gives_out_other_bytes_after_the_tag_was_checked() -> None:
    from streamcrypt.s3client import OpenedObject

    data = random.Random(5).randbytes(9 * MiB)
    body = AESGCM(bytes(32)).encrypt(bytes(12), data, b"")
    opened = OpenedObject(TwoFaced(body), len(data), bytes(32), bytes(12), b"")
    start, end = bytearray(100), bytearray(100)
    opened.read_into(0, memoryview(start))
    assert start == data[:100]
    with pytest.raises(sc.IntegrityError, match="another one than was authenticated"):
        opened.read_into(len(data) - 100, memoryview(end))
    assert end == bytes(100)


# -- the real client


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Objects that the real client wrote, and the embedded KMS that wrapped their data keys."""
    record = json.loads(RECORDED.read_text())
    (tmp_path / "kms.backup").write_bytes(zlib.decompress(base64.b64decode(record["kms_backup"])))
    home = tmp_path / "home"
    restore_backup(tmp_path / "kms.backup", home, passphrase=lambda: real.PASSPHRASE)
    monkeypatch.setenv("STREAMCRYPT_HOME", str(home))
    return record


def test_objects_that_the_real_client_wrote(bucket: Bucket, recorded: dict[str, Any]) -> None:
    assert len(recorded["objects"]) == 6
    for number, found in enumerate(recorded["objects"]):
        bucket.put(f"o{number}", base64.b64decode(found["body"]), Metadata=found["metadata"])
        with sc.open(
            f"{bucket.url}/o{number}", keys=recorded["key"], context=found["context"], **ALLOW
        ) as file:
            size = found["seeded_plaintext"]
            assert file.read() == random.Random(size).randbytes(size)


def test_with_the_real_client(writer: Writer, tmp_path: Path) -> None:
    pytest.importorskip(
        "s3_encryption",
        reason="THE AMAZON S3 ENCRYPTION CLIENT IS NOT TESTED LIVE: it is not installed (tests/README.md)",
    )
    bucket = writer.bucket
    for committing in (True, False):
        client = real.client(
            bucket.client, writer.kms, writer.key.removeprefix("local:"), committing=committing
        )
        for size in (0, 1, 5 * MiB + 3):
            data = random.Random(size).randbytes(size)
            client.put_object(Bucket=bucket.name, Key="theirs", Body=data, EncryptionContext=dict(CONTEXT))
            with sc.open(f"{bucket.url}/theirs", keys=writer.key, context=CONTEXT, **ALLOW) as file:
                assert file.read() == data
            # What our own writer makes of the specification is what the client reads.
            for instructions in (False, True):
                version = 3 if committing else 2
                writer.write("ours", data, version=version, instructions=instructions)
                read = client.get_object(Bucket=bucket.name, Key="ours", EncryptionContext=dict(CONTEXT))
                assert read["Body"].read() == data
