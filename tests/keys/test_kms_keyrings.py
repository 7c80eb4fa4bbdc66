"""KMS keyrings on every door of the embedded KMS and on moto."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from families.keyring import CONTEXT, FOREIGN, UNSIGNED, KeyringTests

from streamcrypt.errors import (
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    WrappedKeyError,
)
from streamcrypt.keys.ecdh import KmsEcdhKeyring, RawEcdhKeyring
from streamcrypt.keys.keyring import MultiKeyring, NoMatchingKeyError
from streamcrypt.keys.kms import (
    KeyArn,
    KmsCalls,
    KmsDiscoveryKeyring,
    KmsKeyring,
    KmsRsaKeyring,
    KmsStats,
    is_multi_region,
)
from streamcrypt.kms import open_service
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import SIGNED, SUITES


@pytest.fixture
def key_arn(kms) -> str:
    return str(kms.create_key()["KeyMetadata"]["Arn"])


class TestStrict(KeyringTests):
    @pytest.fixture(params=["service", "kms serve", "moto"])
    def door(self, request):
        return request.param

    @pytest.fixture
    def encrypting(self, kms, key_arn):
        return KmsKeyring(kms, key_arn)

    def test_the_arn_stands_in_the_message(self, kms, key_arn, encrypting):
        kms.create_alias(AliasName="alias/one", TargetKeyId=key_arn)
        for key_id in (key_arn, key_arn.rpartition("/")[2], "alias/one"):
            _, (generated,) = KmsKeyring(kms, key_id).generate(UNSIGNED, CONTEXT)
            (wrapped,) = KmsKeyring(kms, key_id).wrap(UNSIGNED, CONTEXT, bytes(32))
            for encrypted in (generated, wrapped):
                assert (encrypted.provider_id, encrypted.info) == ("aws-kms", key_arn.encode())

    def test_an_alias_decrypts_only_where_it_may_be_resolved(self, kms, key_arn, encrypting):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        kms.create_alias(AliasName="alias/two", TargetKeyId=key_arn)
        with pytest.raises(NoMatchingKeyError):
            KmsKeyring(kms, "alias/two").unwrap(UNSIGNED, CONTEXT, encrypted)
        stats = KmsStats()
        resolving = KmsKeyring(kms, "alias/two", resolve=True, stats=stats)
        for _ in range(3):
            assert resolving.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        assert stats.calls == {"DescribeKey": 1, "Decrypt": 3}
        other = kms.create_key()["KeyMetadata"]["Arn"]
        kms.create_alias(AliasName="alias/three", TargetKeyId=other)
        with pytest.raises(NoMatchingKeyError):
            KmsKeyring(kms, "alias/three", resolve=True).unwrap(UNSIGNED, CONTEXT, encrypted)

    def test_another_key_is_not_asked(self, kms, encrypting):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        stats = KmsStats()
        other = KmsKeyring(kms, kms.create_key()["KeyMetadata"]["Arn"], stats=stats)
        with pytest.raises(NoMatchingKeyError):
            other.unwrap(UNSIGNED, CONTEXT, encrypted)
        assert stats.calls == {}

    @pytest.mark.parametrize(
        "info",
        [
            b"",
            b"alias/x",
            b"arn:aws:kms:local:000000000000:alias/x",
            b"arn:aws:s3:local:0:key/x",
            b"\xff",
            b"a:" * 9,
        ],
    )
    def test_a_wrapped_key_without_a_key_arn_fails_the_operation(self, encrypting, info):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        with pytest.raises(IntegrityError, match="names no KMS key ARN"):
            encrypting.unwrap(UNSIGNED, CONTEXT, [EncryptedDataKey("aws-kms", info, b"x"), *encrypted])

    def test_several_keys(self, kms, door, encrypting):
        others = [KmsKeyring(kms, kms.create_key()["KeyMetadata"]["Arn"]) for _ in range(2)]
        data_key, encrypted = MultiKeyring(encrypting, others).generate(UNSIGNED, CONTEXT)
        assert len(encrypted) == 3
        for keyring in (encrypting, *others, MultiKeyring(None, others)):
            assert keyring.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        if door != "moto":  # moto fails on the ARN here
            kms.disable_key(KeyId=others[0].key_id)
        assert MultiKeyring(None, [*others, encrypting]).unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        assert KmsDiscoveryKeyring(kms).unwrap(UNSIGNED, CONTEXT, list(reversed(encrypted))) == data_key

    def test_the_region_of_another_key_is_not_the_same_key(self, encrypting):
        _, (encrypted,) = encrypting.generate(UNSIGNED, CONTEXT)
        arn = KeyArn.parse(encrypted.info.decode())._replace(region="mars-north-1")
        moved = encrypted._replace(info=str(arn).encode())
        with pytest.raises(NoMatchingKeyError):
            encrypting.unwrap(UNSIGNED, CONTEXT, [moved])


class TestDiscovery(KeyringTests):
    @pytest.fixture(params=["boto3 in process"])
    def door(self, request):
        return request.param

    @pytest.fixture
    def encrypting(self, kms, key_arn):
        return KmsKeyring(kms, key_arn)

    @pytest.fixture
    def decrypting(self, kms):
        return KmsDiscoveryKeyring(kms)

    def test_it_does_not_encrypt(self, decrypting):
        with pytest.raises(KeyAccessError, match="name the key"):
            decrypting.generate(UNSIGNED, CONTEXT)

    def test_filter(self, kms, key_arn, encrypting):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        account = KeyArn.parse(key_arn).account
        allowed = KmsDiscoveryKeyring(kms, partition="aws", accounts=["111122223333", account])
        assert allowed.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        stats = KmsStats()
        for partition, accounts in (("aws", ["111122223333"]), ("aws-cn", [account])):
            refusing = KmsDiscoveryKeyring(kms, partition=partition, accounts=accounts, stats=stats)
            with pytest.raises(NoMatchingKeyError):
                refusing.unwrap(UNSIGNED, CONTEXT, encrypted)
        assert stats.calls == {}

    @pytest.mark.parametrize("options", [{"partition": "aws"}, {"accounts": ["1"]}])
    def test_half_a_filter(self, kms, options):
        with pytest.raises(ValueError, match="partition"):
            KmsDiscoveryKeyring(kms, **options)


class TestRsa(KeyringTests):
    suites = [suite for suite in SUITES.values() if not suite.signed]  # noqa: RUF012 - a constant
    padding = "oaep-sha256"

    @pytest.fixture
    def rsa_arn(self, kms):
        key = kms.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")
        return key["KeyMetadata"]["Arn"]

    @pytest.fixture
    def encrypting(self, kms, rsa_arn):
        public_key = load_der_public_key(kms.get_public_key(KeyId=rsa_arn)["PublicKey"])
        return KmsRsaKeyring(rsa_arn, public_key=public_key, padding=self.padding)  # no client: offline

    @pytest.fixture
    def decrypting(self, kms, rsa_arn):
        return KmsRsaKeyring(rsa_arn, client=kms, padding=self.padding)

    def test_signed_suites_are_refused(self, encrypting, decrypting):
        with pytest.raises(KeyAccessError, match="signed suites"):
            encrypting.generate(SIGNED, CONTEXT)
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        with pytest.raises(KeyAccessError, match="signed suites"):
            decrypting.unwrap(SIGNED, CONTEXT, encrypted)

    def test_the_public_key_is_fetched_once(self, kms, rsa_arn, decrypting):
        stats = KmsStats()
        keyring = KmsRsaKeyring(rsa_arn, client=kms, padding=self.padding, stats=stats)
        for _ in range(3):
            data_key, encrypted = keyring.generate(UNSIGNED, CONTEXT)
        assert stats.calls == {"GetPublicKey": 1}
        assert decrypting.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key

    def test_the_public_key_alone_does_not_open(self, encrypting):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        with pytest.raises(KeyAccessError, match="only the public key"):
            encrypting.unwrap(UNSIGNED, CONTEXT, encrypted)


def test_an_rsa_key_too_short_to_be_a_kms_s(key_arn):
    public_key = rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()
    with pytest.raises(ValueError, match="at least 2048 bits"):
        KmsRsaKeyring(key_arn, public_key=public_key)


class TestRsaSha1(TestRsa):
    padding = "oaep-sha1"


class TestEcdh(KeyringTests):
    @pytest.fixture(params=["ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521"])
    def pair(self, request, home):
        kms = open_service(home)
        keys = [
            kms.create_key(KeySpec=request.param, KeyUsage="KEY_AGREEMENT")["KeyMetadata"]["Arn"]
            for _ in range(2)
        ]
        return kms, *((key, load_der_public_key(kms.get_public_key(KeyId=key)["PublicKey"])) for key in keys)

    @pytest.fixture
    def encrypting(self, pair):
        kms, (sender, _), (_, recipient_public) = pair
        return KmsEcdhKeyring(kms, sender, recipient_public)

    @pytest.fixture
    def decrypting(self, pair):
        kms, _, (recipient, _) = pair
        return KmsEcdhKeyring(kms, recipient)

    def test_both_parties_open_and_strangers_do_not(self, pair, encrypting):
        kms, (sender, sender_public), (recipient, recipient_public) = pair
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        assert encrypted[0].provider_id == "aws-kms-ecdh"
        for keyring in (
            encrypting,
            KmsEcdhKeyring(kms, recipient, sender_public),
            KmsEcdhKeyring(kms, recipient),
        ):
            assert keyring.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        for keyring in (KmsEcdhKeyring(kms, sender), KmsEcdhKeyring(kms, recipient, recipient_public)):
            with pytest.raises(NoMatchingKeyError):
                keyring.unwrap(UNSIGNED, CONTEXT, encrypted)

    def test_from_a_raw_key(self, pair):
        from cryptography.hazmat.primitives.asymmetric import ec

        kms, _, (recipient, recipient_public) = pair
        raw = RawEcdhKeyring(ec.generate_private_key(recipient_public.curve), recipient_public)
        data_key, encrypted = raw.generate(UNSIGNED, CONTEXT)
        assert KmsEcdhKeyring(kms, recipient).unwrap(UNSIGNED, CONTEXT, encrypted) == data_key

    def test_a_key_for_another_use(self, pair):
        kms = pair[0]
        signing = kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["Arn"]
        with pytest.raises(KeyAccessError, match="KEY_AGREEMENT"):
            KmsEcdhKeyring(kms, signing)


# Multi-Region keys: ARNs only; what Decrypt is asked is recorded


MRK = "arn:aws:kms:us-east-1:111122223333:key/mrk-00000000000000000000000000000001"
EUROPE = MRK.replace("us-east-1", "eu-west-1")
SINGLE = "arn:aws:kms:us-east-1:111122223333:key/11111111-2222-3333-4444-555555555555"


class RegionalKms:
    """A KMS of one region that opens everything: the plaintext is the ciphertext."""

    class meta:
        region_name = "eu-west-1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def decrypt(self, *, KeyId, CiphertextBlob, EncryptionContext):
        self.asked.append(KeyId)
        return {"KeyId": KeyId, "Plaintext": CiphertextBlob}


def wrapped(arn: str) -> EncryptedDataKey:
    return EncryptedDataKey("aws-kms", arn.encode(), b"k" * 32)


def test_mrk_aware_strict():
    kms = RegionalKms()
    aware = KmsKeyring(kms, EUROPE, multi_region=True)
    assert aware.unwrap(UNSIGNED, {}, [wrapped(MRK)]) == b"k" * 32
    assert aware.unwrap(UNSIGNED, {}, [wrapped(EUROPE)]) == b"k" * 32
    assert kms.asked == [EUROPE, EUROPE]
    with pytest.raises(NoMatchingKeyError):
        KmsKeyring(kms, EUROPE).unwrap(UNSIGNED, {}, [wrapped(MRK)])
    for other in (
        SINGLE,
        MRK.replace("111122223333", "444455556666"),
        MRK.replace("aws:kms", "aws-cn:kms"),
        MRK[:-1] + "2",
    ):
        with pytest.raises(NoMatchingKeyError):
            aware.unwrap(UNSIGNED, {}, [wrapped(other)])
    assert len(kms.asked) == 2


def test_mrk_aware_discovery():
    kms = RegionalKms()
    aware = KmsDiscoveryKeyring(kms, multi_region=True)
    aware.unwrap(UNSIGNED, {}, [wrapped(MRK)])
    assert kms.asked == [EUROPE]
    with pytest.raises(NoMatchingKeyError):
        aware.unwrap(UNSIGNED, {}, [wrapped(SINGLE)])
    here = SINGLE.replace("us-east-1", "eu-west-1")
    aware.unwrap(UNSIGNED, {}, [wrapped(here)])
    assert kms.asked == [EUROPE, here]


@pytest.mark.parametrize(
    ("key_id", "expected"),
    [
        (MRK, True),
        (SINGLE, False),
        ("mrk-1", True),
        ("alias/mrk-1", False),
        (MRK.replace("key/", "alias/"), False),
    ],
)
def test_what_is_a_multi_region_key(key_id, expected):
    assert is_multi_region(key_id) is expected


@pytest.mark.parametrize(
    "text",
    [
        "", "arn", "arn:aws:kms:us-east-1:111122223333", "arn:aws:kms:us-east-1:111122223333:", "arn:aws:kms::1:key/x",
        "arn::kms:us-east-1:1:key/x", "arn:aws:s3:us-east-1:1:key/x", "arn:aws:kms:us-east-1::key/x",
        "arn:aws:kms:us-east-1:1:key", "arn:aws:kms:us-east-1:1:key/", "arn:aws:kms:us-east-1:1:kex/x",
        "arn:aws:kms:us-east-1:1:key:x", "Arn:aws:kms:us-east-1:1:key/x",
    ],
)  # fmt: skip
def test_what_is_no_key_arn(text):
    with pytest.raises(ValueError, match="not the ARN"):
        KeyArn.parse(text)


def test_extra_slashes_belong_to_the_id():
    text = "arn:aws:kms:us-east-1:1:alias/a/b:c"
    assert KeyArn.parse(text).id == "a/b:c"
    assert str(KeyArn.parse(text)) == text


# A KMS that answers wrongly


class LyingKms:
    """The embedded KMS, with one member of its answers changed."""

    def __init__(self, service, **lies) -> None:
        self.service = service
        self.lies = lies

    def _lie(self, answer):
        return {name: value for name, value in (answer | self.lies).items() if value is not None}

    def generate_data_key(self, **request):
        return self._lie(self.service.generate_data_key(**request))

    def encrypt(self, **request):
        return self._lie(self.service.encrypt(**request))

    def decrypt(self, **request):
        return self._lie(self.service.decrypt(**request))


OTHER_KEY = "arn:aws:kms:local:000000000000:key/11111111-2222-3333-4444-555555555555"
LIES = {
    "no key": {"KeyId": None},
    "another key": {"KeyId": OTHER_KEY},
    "a bare key id": {"KeyId": "11111111-2222-3333-4444-555555555555"},
    "an alias": {"KeyId": "arn:aws:kms:local:000000000000:alias/one"},
    "no data key": {"Plaintext": None},
    "an empty data key": {"Plaintext": b""},
    "16 bytes": {"Plaintext": bytes(16)},
    "31 bytes": {"Plaintext": bytes(31)},
    "33 bytes": {"Plaintext": bytes(33)},
    "text": {"Plaintext": "0" * 32},
}


@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_wrong_answers_are_refused(home, lies):
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    _, encrypted = KmsKeyring(service, arn).generate(UNSIGNED, CONTEXT)
    lying = LyingKms(service, **lies)
    keyring = KmsKeyring(lying, arn)
    with pytest.raises(IntegrityError, match="refused"):
        keyring.generate(UNSIGNED, CONTEXT)
    with pytest.raises(IntegrityError, match="refused"):
        keyring.unwrap(UNSIGNED, CONTEXT, encrypted)
    with pytest.raises(IntegrityError, match="refused"):
        KmsDiscoveryKeyring(lying).unwrap(UNSIGNED, CONTEXT, encrypted)
    if "KeyId" in lies:
        with pytest.raises(IntegrityError, match="refused"):
            keyring.wrap(UNSIGNED, CONTEXT, bytes(32))
    service.create_alias(AliasName="alias/one", TargetKeyId=arn)
    if lies.get("KeyId") != OTHER_KEY:  # an alias may stand for any key of the account
        with pytest.raises(IntegrityError, match="refused"):
            KmsKeyring(lying, "alias/one").generate(UNSIGNED, CONTEXT)


@pytest.mark.parametrize("operation", ["generate", "wrap"])
def test_a_missing_blob_is_refused(home, operation):
    service = open_service(home)
    keyring = KmsKeyring(LyingKms(service, CiphertextBlob=None), service.create_key()["KeyMetadata"]["Arn"])
    arguments = (bytes(32),) if operation == "wrap" else ()
    with pytest.raises(IntegrityError, match="CiphertextBlob"):
        getattr(keyring, operation)(UNSIGNED, {}, *arguments)


# Refusals in our words


def refused(keyring, encrypted) -> KeyAccessError:
    with pytest.raises(KeyAccessError) as caught:
        keyring.unwrap(UNSIGNED, CONTEXT, encrypted)
    assert not isinstance(caught.value, KeyUnavailableError)
    return caught.value


@pytest.mark.parametrize("door", ["service", "boto3 in process", "kms serve"])
def test_keys_that_cannot_be_used(kms, key_arn):
    stats = KmsStats()
    keyring = KmsKeyring(kms, key_arn, stats=stats)
    _, encrypted = keyring.generate(UNSIGNED, CONTEXT)
    error = refused(keyring, [encrypted[0]._replace(ciphertext=b"x" * 100)])
    assert isinstance(error, WrappedKeyError)
    assert error.code == "InvalidCiphertextException"
    kms.disable_key(KeyId=key_arn)
    error = refused(keyring, encrypted)
    assert (error.code, error.operation, error.key) == ("DisabledException", "Decrypt", key_arn)
    assert key_arn in str(error)
    assert "enable the key" in str(error)
    kms.enable_key(KeyId=key_arn)
    kms.schedule_key_deletion(KeyId=key_arn, PendingWindowInDays=7)
    error = refused(keyring, encrypted)
    assert error.code in ("KMSInvalidStateException", "DisabledException")
    absent = KeyArn.parse(key_arn)._replace(id="00000000-0000-0000-0000-000000000000")
    error = refused(KmsDiscoveryKeyring(kms), [encrypted[0]._replace(info=str(absent).encode())])
    assert error.code in ("NotFoundException", "IncorrectKeyException", "AccessDeniedException")
    assert stats.retries == 0
    assert stats.calls == {"GenerateDataKey": 1, "Decrypt": 3}


def test_access_denied_says_what_is_missing(home):
    from streamcrypt.kms import Caller, kms_client

    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    _, encrypted = KmsKeyring(service, arn).generate(UNSIGNED, {"Project": "CustomerChurn"})
    stranger = kms_client("local", home=home, caller=Caller("arn:aws:iam::000000000000:user/alice"))
    with pytest.raises(KeyAccessError) as caught:
        KmsKeyring(stranger, arn).unwrap(UNSIGNED, {"Project": "CustomerChurn"}, encrypted)
    error = caught.value
    assert error.code == "AccessDeniedException"
    for part in (arn, "kms:Decrypt", "user/alice", "key policy", "Project=CustomerChurn"):
        assert part in str(error)


def test_several_failures_are_told_together(home):
    service = open_service(home)
    arns = [service.create_key()["KeyMetadata"]["Arn"] for _ in range(2)]
    keyrings = [KmsKeyring(service, arn) for arn in arns]
    _, encrypted = MultiKeyring(keyrings[0], keyrings[1:]).generate(UNSIGNED, CONTEXT)
    service.disable_key(KeyId=arns[0])
    damaged = encrypted[1]._replace(ciphertext=bytes(100))
    with pytest.raises(KeyAccessError, match="none of its 2 encrypted data keys opened") as caught:
        MultiKeyring(None, keyrings).unwrap(UNSIGNED, CONTEXT, [encrypted[0], damaged])
    assert not isinstance(caught.value, IntegrityError)
    assert caught.value.code == "DisabledException"
    for part in (*arns, "DisabledException", "InvalidCiphertextException"):
        assert part in str(caught.value)


def test_grant_tokens_are_sent(home):
    asked = []

    class Recording(LyingKms):
        def decrypt(self, **request):
            asked.append(request.pop("GrantTokens", None))
            return super().decrypt(**request)

    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    _, encrypted = KmsKeyring(service, arn).generate(UNSIGNED, CONTEXT)
    KmsKeyring(Recording(service), arn, grant_tokens=["token"]).unwrap(UNSIGNED, CONTEXT, encrypted)
    assert asked == [["token"]]


def test_foreign_exceptions_pass_through():
    class Broken:
        def decrypt(self, **request):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        KmsKeyring(Broken(), SINGLE).unwrap(UNSIGNED, {}, [wrapped(SINGLE)])


def test_calls_may_be_shared():
    kms = RegionalKms()
    calls = KmsCalls(kms)
    KmsKeyring(calls, SINGLE).unwrap(UNSIGNED, {}, [wrapped(SINGLE)])
    KmsDiscoveryKeyring(calls).unwrap(UNSIGNED, {}, [*FOREIGN, wrapped(SINGLE)])
    assert calls.stats.calls == {"Decrypt": 2}
