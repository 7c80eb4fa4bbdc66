"""Signing by a KMS through boto3; verifying what `cryptography` signs itself."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from families.aws import aws_client
from families.trees import make_tree

import streamcrypt as sc
from streamcrypt.cli import main
from streamcrypt.keys.signing import SigningKey, fits, new_hash, verify_digest
from streamcrypt.kms import open_service, principals

DOCUMENT = b"a document"


@pytest.fixture(scope="module")
def rsa_key():
    return rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize("bits", [256, 384, 512])
def test_rsa_signatures(rsa_key, bits):
    chosen = {256: hashes.SHA256(), 384: hashes.SHA384(), 512: hashes.SHA512()}[bits]
    digest = hashlib.new(f"sha{bits}", DOCUMENT).digest()
    pss = padding.PSS(padding.MGF1(chosen), bits // 8)
    signed = {
        f"RSASSA_PSS_SHA_{bits}": rsa_key.sign(DOCUMENT, pss, chosen),
        f"RSASSA_PKCS1_V1_5_SHA_{bits}": rsa_key.sign(DOCUMENT, padding.PKCS1v15(), chosen),
    }
    for algorithm, signature in signed.items():
        verify_digest(rsa_key.public_key(), algorithm, digest, signature)
        for other in signed.keys() - {algorithm}:
            with pytest.raises(sc.IntegrityError):
                verify_digest(rsa_key.public_key(), other, digest, signature)
        with pytest.raises(sc.IntegrityError):
            verify_digest(rsa_key.public_key(), algorithm, bytes(len(digest)), signature)
        with pytest.raises(sc.IntegrityError):
            verify_digest(rsa_key.public_key(), algorithm, digest, signature[:-1] + b"\0")
    # KMS's salt is as long as the hash; another one is another scheme.
    short = rsa_key.sign(DOCUMENT, padding.PSS(padding.MGF1(chosen), 20), chosen)
    with pytest.raises(sc.IntegrityError):
        verify_digest(rsa_key.public_key(), f"RSASSA_PSS_SHA_{bits}", digest, short)


@pytest.mark.parametrize(
    ("curve", "algorithm"),
    [(ec.SECP256R1(), "ECDSA_SHA_256"), (ec.SECP384R1(), "ECDSA_SHA_384"), (ec.SECP521R1(), "ECDSA_SHA_512")],
)
def test_ecdsa_signatures_are_of_the_curve_s_own_hash(curve, algorithm):
    key = ec.generate_private_key(curve)
    digest = new_hash(algorithm)
    digest.update(DOCUMENT)
    chosen = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}[algorithm[-3:]]
    signature = key.sign(DOCUMENT, ec.ECDSA(chosen))
    verify_digest(key.public_key(), algorithm, digest.digest(), signature)
    for other in {"ECDSA_SHA_256", "ECDSA_SHA_384", "ECDSA_SHA_512", "RSASSA_PSS_SHA_256", "none"} - {
        algorithm
    }:
        assert not fits(key.public_key(), other)
        with pytest.raises(sc.IntegrityError, match="another kind of key"):
            verify_digest(key.public_key(), other, digest.digest(), signature)
    with pytest.raises(sc.IntegrityError, match="does not verify"):
        verify_digest(ec.generate_private_key(curve).public_key(), algorithm, digest.digest(), signature)


@pytest.fixture
def caller(served, home, monkeypatch):
    """The credentials of the account's root at ``kms serve``."""
    key = principals.access_key(open_service(home).store, principals.principal_arn(None))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret)


def test_signing_through_boto3(served, caller, home, tmp_path):
    kms = open_service(home)
    signer = kms.create_key(KeySpec="ECC_NIST_P384", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
    data = kms.create_key()["KeyMetadata"]["Arn"]
    (tmp_path / "public.der").write_bytes(kms.get_public_key(KeyId=signer)["PublicKey"])
    make_tree(tmp_path / "in", {"a/x": 1000, "b": 10})
    report = sc.encrypt(
        tmp_path / "in",
        tmp_path / "enc",
        keys=f"local:{data}@{served}",
        sign_manifest=f"local:{signer}@{served}",
    )
    assert report["signature"]["key"] == signer
    assert report["kms"]["calls"] == {"GenerateDataKey": 1, "GetPublicKey": 1, "Sign": 2}
    assert sc.verify(tmp_path / "enc", signed_by=tmp_path / "public.der").files == 2
    cancel = sc.erase(f"local:{data}@{served}", tmp_path / "enc").cancel
    assert cancel == f"streamcrypt kms cancel-key-deletion --key-id {data} --kms local@{served}"
    assert main(cancel.split()[1:]) == 0


def test_keys_by_partition_and_erasing_with_keys_of_aws(aws, tmp_path):
    """moto hashes a digest once more before it signs it, and decrypts with keys that are about to be deleted."""
    kms = aws_client("kms")
    data, doomed = (kms.create_key()["KeyMetadata"]["Arn"] for _ in range(2))
    make_tree(tmp_path / "in", {"a/x": 1000, "b": 10})
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=data, key_map={"a/*": doomed})
    done = sc.erase(doomed, tmp_path / "enc", pending_window=7)
    assert done.unreadable == [f"{tmp_path}/enc/a/x"]
    assert [str(failure.error).partition(":key/")[2][36:] for failure in done.failed] == [
        ": KMS still opens it; look again with --check in a minute"
    ]
    assert done.proved is False
    assert done.cancel == (
        f"streamcrypt kms cancel-key-deletion --key-id {doomed} --kms aws --region eu-central-1"
    )
    assert kms.describe_key(KeyId=doomed)["KeyMetadata"]["KeyState"] == "PendingDeletion"


def test_a_wrong_answer_of_the_kms_is_refused(home, monkeypatch):
    """Not what it signed with another key, nor a signature of something else."""
    service = open_service(home)
    one, two = (
        service.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
        for _ in range(2)
    )
    key = SigningKey(one)
    key.prepare()
    digest = hashlib.sha256(DOCUMENT).digest()
    assert key.sign(digest)
    right = key._calls.call

    def by_another_key(operation, label, **request):
        return right(operation, label, **{**request, "KeyId": two})

    def of_another_document(operation, label, **request):
        return right(operation, label, **{**request, "Message": bytes(32)})

    monkeypatch.setattr(key._calls, "call", by_another_key)
    with pytest.raises(sc.IntegrityError, match="for another key"):
        key.sign(digest)
    monkeypatch.setattr(key._calls, "call", of_another_document)
    with pytest.raises(sc.IntegrityError, match="is refused"):
        key.sign(digest)
    monkeypatch.setattr(key._calls, "call", lambda *_, **__: {"KeyId": one})
    with pytest.raises(sc.IntegrityError, match="no Signature"):
        key.sign(digest)
