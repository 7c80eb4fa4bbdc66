"""Key references: every form, both directions, and every error with its way out."""

from __future__ import annotations

import logging
import os

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from families.aws import aws_client
from families.keyring import CONTEXT, UNSIGNED

from streamcrypt.errors import KeyAccessError
from streamcrypt.keys.calls import KmsStats
from streamcrypt.keys.keyring import NoMatchingKeyError
from streamcrypt.keys.raw import RSA_PADDINGS, RawAesKeyring
from streamcrypt.keys.reference import check_endpoint, decrypting_keyring, encrypting_keyring
from streamcrypt.kms import open_service
from streamcrypt.message.suites import SIGNED

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEYS = [ec.generate_private_key(ec.SECP384R1()) for _ in range(2)]


def round_trip(encrypting, decrypting, suite=UNSIGNED) -> None:
    data_key, encrypted = encrypting_keyring(encrypting).generate(suite, CONTEXT)
    assert decrypting_keyring(decrypting).unwrap(suite, CONTEXT, encrypted) == data_key


def private_pem(key, password=None) -> bytes:
    protection = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def public_pem(key) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def files(tmp_path):
    """Key files, mode 0600."""
    contents = {
        "aes": os.urandom(32),
        "aes16": os.urandom(16),
        "rsa.pem": private_pem(RSA_KEY),
        "rsa-public.pem": public_pem(RSA_KEY),
        "one.pem": private_pem(EC_KEYS[0]),
        "one-public.pem": public_pem(EC_KEYS[0]),
        "two.pem": private_pem(EC_KEYS[1]),
        "two-public.pem": public_pem(EC_KEYS[1]),
        "locked.pem": private_pem(RSA_KEY, b"password"),
        "text": b"not a key\n",
        "short": bytes(31),
        "large": bytes(70_000),
        "odd?name@x": os.urandom(32),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    return tmp_path


@pytest.fixture
def local_key(home):
    service = open_service(home)
    metadata = service.create_key()["KeyMetadata"]
    service.create_alias(AliasName="alias/ml", TargetKeyId=metadata["KeyId"])
    return metadata


def test_local(local_key):
    forms = ["local:alias/ml", f"local:{local_key['KeyId']}", local_key["Arn"], f"local:{local_key['Arn']}"]
    for encrypting in forms:
        for decrypting in (None, "local:discovery", *forms):
            round_trip(encrypting, decrypting)
        round_trip(encrypting, None, SIGNED)


def test_local_through_a_server(local_key, served):
    for form in (f"local:alias/ml@{served}", f"local:{local_key['KeyId']}@{served}"):
        round_trip(form, form)
        round_trip(form, None)
        round_trip("local:alias/ml", form)


def test_aws(aws):
    kms = aws_client("kms")
    metadata = kms.create_key()["KeyMetadata"]
    alias = f"alias/key-{metadata['KeyId']}"
    kms.create_alias(AliasName=alias, TargetKeyId=metadata["KeyId"])
    account = metadata["Arn"].split(":")[4]
    alias_arn = f"arn:aws:kms:eu-central-1:{account}:{alias}"
    forms = [metadata["Arn"], f"aws:{alias}", f"aws:{metadata['KeyId']}", alias_arn]
    for form in forms:
        round_trip(form, form)
        round_trip(form, None)
    round_trip(forms[0], "aws:discovery")
    round_trip(forms[0], f"aws:discovery?partition=aws&accounts=111122223333,{account}")
    round_trip(forms[0], f"aws:discovery?accounts={account}")
    with pytest.raises(NoMatchingKeyError):
        round_trip(forms[0], "aws:discovery?partition=aws&accounts=111122223333")
    with pytest.raises(NoMatchingKeyError):
        round_trip(forms[0], "local:discovery")


def test_multi_region(home):
    arn = open_service(home).create_key(MultiRegion=True)["KeyMetadata"]["Arn"]
    round_trip(arn, arn)
    round_trip(arn, None)
    one = "arn:aws:kms:eu-central-1:111122223333:key/mrk-00000000000000000000000000000001"
    replica = one.replace("eu-central-1", "us-east-1")
    for references in ([one, replica], [replica, "local:alias/x", one]):
        with pytest.raises(ValueError, match="given twice"):
            encrypting_keyring(references)
        with pytest.raises(ValueError, match="given twice"):
            decrypting_keyring(references)
    decrypting_keyring("aws:discovery?mrk=yes&region=eu-west-1&accounts=111122223333")


def test_kms_rsa(home, files):
    service = open_service(home)
    arn = service.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["Arn"]
    service.create_alias(AliasName="alias/rsa", TargetKeyId=arn)
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    public = load_der_public_key(service.get_public_key(KeyId=arn)["PublicKey"])
    (files / "kms.pem").write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    stats = KmsStats()
    offline = encrypting_keyring(f"kms-rsa:{arn}@{files / 'kms.pem'}", stats=stats)
    data_key, encrypted = offline.generate(UNSIGNED, CONTEXT)
    assert stats.calls == {}
    assert decrypting_keyring(f"kms-rsa:{arn}").unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
    round_trip("kms-rsa:local:alias/rsa?padding=oaep-sha1", f"kms-rsa:{arn}?padding=oaep-sha1")
    with pytest.raises(KeyAccessError, match="kms-rsa:arn"):
        decrypting_keyring(None).unwrap(UNSIGNED, CONTEXT, encrypted)


def test_raw_aes(files):
    for name in ("aes", "aes16", "odd?name@x"):
        round_trip(f"raw-aes:space/name@{files / name}", f"raw-aes:space/name@{files / name}")


@pytest.mark.parametrize("padding", [None, *RSA_PADDINGS])
def test_raw_rsa(files, padding):
    suffix = f"?padding={padding}" if padding else ""
    private = f"raw-rsa:space/name@{files / 'rsa.pem'}{suffix}"
    round_trip(f"raw-rsa:space/name@{files / 'rsa-public.pem'}{suffix}", private)
    round_trip(private, private)


def test_ecdh(files):
    one = f"ecdh:{files / 'one.pem'}&recipient={files / 'two-public.pem'}"
    two = f"ecdh:{files / 'two.pem'}&recipient={files / 'one-public.pem'}"
    round_trip(one, two)
    round_trip(one, one)
    round_trip(one, f"ecdh:{files / 'two.pem'}")
    round_trip(f"ecdh:ephemeral&recipient={files / 'two-public.pem'}", f"ecdh:{files / 'two.pem'}")


def test_kms_ecdh(home, files):
    service = open_service(home)
    arn = service.create_key(KeySpec="ECC_NIST_P384", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]["Arn"]
    service.create_alias(AliasName="alias/ecdh", TargetKeyId=arn)
    for form in (arn, "local:alias/ecdh", f"local:{arn.rpartition('/')[2]}"):
        reference = f"ecdh:{form}&recipient={files / 'two-public.pem'}"
        round_trip(reference, reference)
        round_trip(reference, f"ecdh:{files / 'two.pem'}")


def test_several_keys(local_key, files):
    references = [
        "local:alias/ml",
        f"raw-aes:space/name@{files / 'aes'}",
        f"raw-rsa:space/rsa@{files / 'rsa.pem'}",
    ]
    encrypting = encrypting_keyring(references)
    data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
    assert [key.provider_id for key in encrypted] == ["aws-kms", "space", "space"]
    for one in (*references, references, None, reversed(references)):
        assert decrypting_keyring(one).unwrap(UNSIGNED, CONTEXT, encrypted) == data_key


def test_keyrings_are_taken_as_they_are(files):
    keyring = RawAesKeyring("space", "name", bytes(32))
    assert encrypting_keyring(keyring) is keyring
    assert decrypting_keyring([keyring]) is keyring


def test_statistics_of_one_job(local_key):
    stats = KmsStats()
    _, encrypted = encrypting_keyring(["local:alias/ml", local_key["Arn"]], stats=stats).generate(
        UNSIGNED, CONTEXT
    )
    decrypting_keyring("local:alias/ml", stats=stats).unwrap(UNSIGNED, CONTEXT, encrypted)
    assert stats.to_json()["calls"] == {"Decrypt": 1, "DescribeKey": 1, "Encrypt": 1, "GenerateDataKey": 1}


def test_equal_references_have_one_identity(local_key, files, aws):
    for reference in (
        "local:alias/ml",
        f"raw-aes:space/name@{files / 'aes'}",
        f"raw-rsa:space/name@{files / 'rsa.pem'}",
        "aws:alias/one",
        f"ecdh:{files / 'one.pem'}&recipient={files / 'two-public.pem'}",
    ):
        assert encrypting_keyring(reference).identity == encrypting_keyring(reference).identity
    assert decrypting_keyring(None).identity == decrypting_keyring(None).identity


def test_identity_follows_the_home_and_the_credentials(local_key, aws, monkeypatch, tmp_path):
    local, remote, found = (
        encrypting_keyring("local:alias/ml"),
        encrypting_keyring("aws:alias/a"),
        decrypting_keyring(None),
    )
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert encrypting_keyring("local:alias/ml").identity != local.identity
    assert encrypting_keyring("aws:alias/a").identity != remote.identity
    assert decrypting_keyring(None).identity != found.identity


MALFORMED = [
    "", "foo", "local", "local:", "aws:", "raw-aes:", "foo:bar", "local:a/b", "aws:key/1", "arn:aws:s3:::bucket",
    "arn:aws:kms:eu-central-1:111122223333:key", "raw-aes:name@file", "raw-aes:space/name", "raw-aes:space/@file",
    "raw-aes:/name@file", "raw-aes:aws-kms/name@aes", "raw-rsa:space/name", "raw-rsa:space/name@rsa.pem?padding=none",
    "raw-rsa:space/name@rsa.pem?pading=pkcs1", "ecdh:one.pem", "ecdh:one.pem&sender=two.pem", "ecdh:ephemeral",
    "hierarchy:id", "hierarchy:@local", "hierarchy:id@elsewhere", "hierarchy:id@dynamodb:", "kms-rsa:file.pem",
    "local:alias/x@ftp://host", "local:alias/x@host:8400", "aws:alias/x@http://127.0.0.1:1", "aws:discovery",
    "local:discovery", "local:arn:aws:kms:eu-central-1:111122223333:key/x", "aws:arn:aws:kms:local:000000000000:key/x",
    "aws:alias/x?region=eu-west-1", "local:alias/x?mrk=yes", "arn:aws:kms:eu-west-1:111122223333:key/x?accounts=1",
    "local:alias/x@http://kms.example.com:8400", "local:alias/x@http://10.0.0.1:8400",
]  # fmt: skip


@pytest.mark.parametrize("reference", MALFORMED)
def test_malformed_references(files, monkeypatch, reference):
    monkeypatch.chdir(files)
    with pytest.raises(ValueError, match=r"\w") as caught:
        encrypting_keyring(reference)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) > 30


def test_other_types():
    for wrong in (1, [1], [None], b"local:alias/x"):
        with pytest.raises(TypeError):
            encrypting_keyring(wrong)
    with pytest.raises(ValueError, match="needs a key"):
        encrypting_keyring([])
    with pytest.raises(ValueError, match="empty list"):
        decrypting_keyring([])
    with pytest.raises(ValueError, match="accounts"):
        decrypting_keyring("aws:discovery?partition=aws")
    for ignored in (
        "aws:discovery?accounts=111122223333&region=eu-west-1",
        "aws:discovery?mrk=true",
        "local:discovery?mrk=yes",
        "aws:discovery?accounts",
        "aws:discovery?acounts=111122223333",
    ):
        with pytest.raises(ValueError, match="discovery"):
            decrypting_keyring(ignored)


UNUSABLE = {
    "raw-aes:s/n@absent": "cannot be read",
    "raw-aes:s/n@.": "cannot be read",
    "raw-aes:s/n@short": "31 bytes.*head -c 32",
    "raw-aes:s/n@text": "10 bytes",
    "raw-aes:s/n@large": "too large",
    "raw-rsa:s/n@text": "not a public key",
    "raw-rsa:s/n@locked.pem": "password",
    "raw-rsa:s/n@one.pem": "not an RSA key",
    "raw-rsa:s/n@one-public.pem": "not an RSA key",
    "ecdh:rsa.pem&recipient=two-public.pem": "not an elliptic-curve key",
    "ecdh:one.pem&recipient=two.pem": "a private key",
    "ecdh:one.pem&recipient=rsa-public.pem": "not an elliptic-curve public key",
    "ecdh:one-public.pem&recipient=two-public.pem": "not a private key",
    "kms-rsa:arn:aws:kms:local:000000000000:key/x@one-public.pem": "not an RSA public key",
}


@pytest.mark.parametrize("reference", UNUSABLE)
def test_unusable_key_files(files, monkeypatch, reference):
    monkeypatch.chdir(files)
    with pytest.raises(KeyAccessError, match=UNUSABLE[reference]) as caught:
        encrypting_keyring(reference)
    assert "not a key\n" not in str(caught.value)


def test_a_public_key_does_not_decrypt(files):
    with pytest.raises(KeyAccessError, match="cannot decrypt"):
        decrypting_keyring(f"raw-rsa:space/name@{files / 'rsa-public.pem'}")


def test_no_embedded_kms_yet(home):
    with pytest.raises(KeyAccessError, match="kms create-key"):
        encrypting_keyring("local:alias/ml").generate(UNSIGNED, {})
    assert not home.exists()


def test_an_alias_that_is_not_there(local_key):
    for keyring in (encrypting_keyring("local:alias/other"),):
        with pytest.raises(KeyAccessError, match=r"local:alias/other.*kms list-aliases") as caught:
            keyring.generate(UNSIGNED, {})
        assert caught.value.code == "NotFoundException"


@pytest.mark.parametrize("name", ["key", "key?1", "key?old=1"])
def test_a_key_file_that_changes_is_read_again(tmp_path, name):
    """Also one whose name looks like another file's with options."""
    (tmp_path / "key").write_bytes(bytes(32))
    path = tmp_path / name
    path.write_bytes(bytes(16))
    before = encrypting_keyring(f"raw-aes:space/name@{path}")
    assert encrypting_keyring(f"raw-aes:space/name@{path}") is before
    path.unlink()
    path.write_bytes(bytes(24))
    assert encrypting_keyring(f"raw-aes:space/name@{path}").identity != before.identity


def test_raw_keys_are_not_found_by_themselves(files, home):
    _, encrypted = encrypting_keyring(f"raw-aes:space/name@{files / 'aes'}").generate(UNSIGNED, CONTEXT)
    with pytest.raises(NoMatchingKeyError, match=r"raw AES key space/name.*--key"):
        decrypting_keyring(None).unwrap(UNSIGNED, CONTEXT, encrypted)


def test_a_key_file_that_everyone_reads_is_named(files, caplog):
    (files / "aes").chmod(0o644)
    with caplog.at_level(logging.WARNING, "streamcrypt.keys"):
        encrypting_keyring(f"raw-aes:space/name@{files / 'aes'}")
        encrypting_keyring(f"raw-aes:space/name@{files / 'aes'}")
        encrypting_keyring(f"raw-aes:space/name@{files / 'aes16'}")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "chmod 600" in caplog.text


def test_endpoints(monkeypatch):
    for url in ("http://127.0.0.1:8400", "http://[::1]:8400", "http://localhost", "https://kms.example.com"):
        check_endpoint(url)
    monkeypatch.delenv("STREAMCRYPT_ALLOW_PLAINTEXT_HTTP", raising=False)
    for url in ("http://kms.example.com", "http://localhost.example.com", "http://127.0.0.1.example.com"):
        with pytest.raises(ValueError, match="plain http"):
            check_endpoint(url)
        check_endpoint(url, plaintext_allowed=True)
    monkeypatch.setenv("STREAMCRYPT_ALLOW_PLAINTEXT_HTTP", "yes")
    check_endpoint("http://kms.example.com")


def test_what_tells_clients_apart_holds_no_credential(monkeypatch):
    names = (
        "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        "AWS_BEARER_TOKEN_BEDROCK",
    )  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "a credential")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/a/file")
    identity = repr(encrypting_keyring("aws:alias/ml").identity)
    assert "a credential" not in identity
    assert "/a/file" in identity


def test_a_plain_http_endpoint_from_the_environment_is_refused(aws, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://kms.example.com:8400")
    keyring = encrypting_keyring("aws:alias/one")
    with pytest.raises(ValueError, match="plain http"):
        keyring.generate(UNSIGNED, {})
