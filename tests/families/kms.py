"""One family of tests for every KMS: the embedded one through each of its doors, and moto where it is right.

A subclass gives ``kms``, anything with boto3's KMS methods.  ``KmsBasics`` holds what every KMS answers
alike; ``KmsTests`` adds what no emulator but ours does, and needs ``clock`` (a FakeClock) as well.
Texts are those that AWS sends, as recorded in the project's reference of AWS KMS's behaviour.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

DAY = 86400.0
CONTEXT = {"Project": "CustomerChurn", "Stage": "train"}
MISSING = "12345678-1234-4234-8234-123456789012"


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_days(self, days: float) -> None:
        self.now += days * DAY


def refusal(call: Callable[..., Any], **request: Any) -> tuple[str, int, str]:
    """Code, HTTP status and text with which a call was refused."""
    try:
        answer = call(**request)
    except Exception as error:
        response = getattr(error, "response", None)
        if response is None:
            raise
        status = response["ResponseMetadata"]["HTTPStatusCode"]
        return response["Error"]["Code"], status, response["Error"]["Message"]
    raise AssertionError(f"answered {sorted(answer)} instead of refusing")


class KmsBasics:
    """What every KMS does."""

    @pytest.fixture
    def key(self, kms: Any) -> dict[str, Any]:
        return kms.create_key(Description="a test")["KeyMetadata"]

    def test_encrypt_decrypt(self, kms, key):
        sealed = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"secret", EncryptionContext=CONTEXT)
        assert sealed["KeyId"] == key["Arn"]
        opened = kms.decrypt(CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=CONTEXT)
        assert opened["Plaintext"] == b"secret"
        assert opened["KeyId"] == key["Arn"]

    @pytest.mark.parametrize(
        ("asked", "length"),
        [({"KeySpec": "AES_256"}, 32), ({"KeySpec": "AES_128"}, 16), ({"NumberOfBytes": 1024}, 1024)],
    )
    def test_data_key(self, kms, key, asked, length):
        made = kms.generate_data_key(KeyId=key["KeyId"], EncryptionContext=CONTEXT, **asked)
        assert len(made["Plaintext"]) == length
        opened = kms.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT)
        assert opened["Plaintext"] == made["Plaintext"]

    def test_data_key_without_plaintext(self, kms, key):
        made = kms.generate_data_key_without_plaintext(KeyId=key["KeyId"], KeySpec="AES_256")
        assert "Plaintext" not in made
        assert len(kms.decrypt(CiphertextBlob=made["CiphertextBlob"])["Plaintext"]) == 32

    @pytest.mark.parametrize(
        "context", [{}, {"Project": "CustomerChurn"}, {**CONTEXT, "More": "x"}, {"project": "CustomerChurn"}]
    )
    def test_another_context_is_refused_without_a_word(self, kms, key, context):
        sealed = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"secret", EncryptionContext=CONTEXT)
        refused = refusal(kms.decrypt, CiphertextBlob=sealed["CiphertextBlob"], EncryptionContext=context)
        assert refused[:2] == ("InvalidCiphertextException", 400)

    def test_alias(self, kms, key):
        kms.create_alias(AliasName="alias/ml", TargetKeyId=key["KeyId"])
        sealed = kms.encrypt(KeyId="alias/ml", Plaintext=b"x")
        assert sealed["KeyId"] == key["Arn"]
        assert kms.describe_key(KeyId="alias/ml")["KeyMetadata"]["KeyId"] == key["KeyId"]
        other = kms.create_key()["KeyMetadata"]
        kms.update_alias(AliasName="alias/ml", TargetKeyId=other["KeyId"])
        assert kms.encrypt(KeyId="alias/ml", Plaintext=b"x")["KeyId"] == other["Arn"]
        kms.delete_alias(AliasName="alias/ml")
        assert refusal(kms.encrypt, KeyId="alias/ml", Plaintext=b"x")[:2] == ("NotFoundException", 400)

    def test_re_encrypt(self, kms, key):
        other = kms.create_key()["KeyMetadata"]
        sealed = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"secret", EncryptionContext=CONTEXT)
        moved = kms.re_encrypt(
            CiphertextBlob=sealed["CiphertextBlob"],
            SourceEncryptionContext=CONTEXT,
            DestinationKeyId=other["KeyId"],
            DestinationEncryptionContext={"a": "b"},
        )
        assert moved["SourceKeyId"] == key["Arn"]
        assert moved["KeyId"] == other["Arn"]
        opened = kms.decrypt(CiphertextBlob=moved["CiphertextBlob"], EncryptionContext={"a": "b"})
        assert (opened["KeyId"], opened["Plaintext"]) == (other["Arn"], b"secret")

    @pytest.mark.parametrize("spec", ["ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_P521", "ECC_SECG_P256K1"])
    def test_ecdsa(self, kms, spec):
        made = kms.create_key(KeySpec=spec, KeyUsage="SIGN_VERIFY")["KeyMetadata"]
        (algorithm,) = made["SigningAlgorithms"]
        request = {"KeyId": made["KeyId"], "Message": b"message", "SigningAlgorithm": algorithm}
        signature = kms.sign(**request)["Signature"]
        assert kms.verify(Signature=signature, **request)["SignatureValid"] is True
        public = serialization.load_der_public_key(kms.get_public_key(KeyId=made["KeyId"])["PublicKey"])
        digest = getattr(hashes, algorithm.removeprefix("ECDSA_").replace("_", ""))()
        public.verify(signature, b"message", ec.ECDSA(digest))

    def test_generate_random(self, kms):
        assert len(kms.generate_random(NumberOfBytes=64)["Plaintext"]) == 64


class KmsTests(KmsBasics):
    """What AWS KMS does, and the embedded KMS with it."""

    def test_answers_name_algorithm_and_material(self, kms, key):
        sealed = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"secret")
        assert sealed["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
        opened = kms.decrypt(CiphertextBlob=sealed["CiphertextBlob"])
        assert opened["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
        assert opened["KeyMaterialId"] == key["CurrentKeyMaterialId"]

    # -- errors: code, status and text --------------------------------------------------------

    def test_keys_that_are_not_there(self, kms):
        account = "000000000000"
        arn = f"arn:aws:kms:local:{account}:key/{MISSING}"
        cases = {
            "fake-key-id": ("NotFoundException", 400, "Invalid keyId 'fake-key-id'"),
            MISSING.replace("-", ""): (
                "NotFoundException",
                400,
                f"Invalid keyId '{MISSING.replace('-', '')}'",
            ),
            "mrk-fake-key-id": ("NotFoundException", 400, "Invalid keyId 'mrk-fake-key-id'"),
            MISSING: ("NotFoundException", 400, f"Key '{arn}' does not exist"),
            arn: ("NotFoundException", 400, f"Key '{arn}' does not exist"),
            arn.replace(":local:", ":eu-west-1:"): ("NotFoundException", 400, "Invalid arn eu-west-1"),
            "alias/none": (
                "NotFoundException",
                400,
                f"Alias arn:aws:kms:local:{account}:alias/none is not found.",
            ),
        }
        for reference, expected in cases.items():
            assert refusal(kms.encrypt, KeyId=reference, Plaintext=b"x") == expected, reference

    def test_malformed_arns(self, kms, key):
        for arn in ("arn:aws:kms:local:12345:key/" + MISSING, "arn:aws:s3:::bucket"):
            assert refusal(kms.encrypt, KeyId=arn, Plaintext=b"x") == (
                "InvalidArnException",
                400,
                f"Invalid arn {arn}",
            )
        grant = {"KeyId": key["KeyId"], "Operations": ["Decrypt"]}
        assert refusal(kms.create_grant, GranteePrincipal="alice", **grant)[:2] == (
            "InvalidArnException",
            400,
        )
        by_id = refusal(kms.retire_grant, KeyId=key["KeyId"], GrantId="0" * 64)
        assert by_id[:2] == ("InvalidArnException", 400)

    def test_shape_violations_are_reported_together(self, kms, key):
        code, status, text = refusal(
            kms.create_key,
            Description="x" * 8193,
            KeySpec="DES",
            Tags=[{"TagKey": "k" * 129, "TagValue": "v" * 257}],
        )
        assert (code, status) == ("ValidationException", 400)
        assert text.startswith("4 validation errors detected: ")
        assert (
            "at 'description' failed to satisfy constraint: Member must have length less than or equal to 8192"
            in text
        )
        assert (
            "Value 'DES' at 'keySpec' failed to satisfy constraint: Member must satisfy enum value set: ["
            in text
        )
        assert "at 'tags.1.member.tagValue' failed" in text
        assert refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x" * 4097) == (
            "ValidationException",
            400,
            "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: "
            "Member must have length less than or equal to 4096",
        )

    @pytest.mark.parametrize("asked", [{}, {"KeySpec": "AES_256", "NumberOfBytes": 32}])
    def test_data_key_wants_one_length(self, kms, key, asked):
        expected = ("ValidationException", 400, "Please specify either number of bytes or key spec.")
        assert refusal(kms.generate_data_key, KeyId=key["KeyId"], **asked) == expected

    def test_create_key_combinations(self, kms):
        assert refusal(kms.create_key, KeySpec="RSA_2048") == (
            "ValidationException",
            400,
            "You must specify a KeyUsage value for all KMS keys except for symmetric encryption keys.",
        )
        assert refusal(kms.create_key, KeySpec="RSA_2048", KeyUsage="KEY_AGREEMENT") == (
            "ValidationException",
            400,
            "KeyUsage KEY_AGREEMENT is not compatible with KeySpec RSA_2048",
        )
        assert refusal(kms.create_key, KeySpec="SM2", KeyUsage="SIGN_VERIFY")[:2] == (
            "UnsupportedOperationException",
            400,
        )

    def test_usage_and_algorithm(self, kms):
        key = kms.create_key(KeySpec="HMAC_256", KeyUsage="GENERATE_VERIFY_MAC")["KeyMetadata"]
        assert refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x") == (
            "InvalidKeyUsageException",
            400,
            f"{key['Arn']} key usage is GENERATE_VERIFY_MAC which is not valid for Encrypt.",
        )
        assert refusal(kms.generate_mac, KeyId=key["KeyId"], Message=b"x", MacAlgorithm="HMAC_SHA_512") == (
            "InvalidKeyUsageException",
            400,
            "Algorithm HMAC_SHA_512 is incompatible with key spec HMAC_256.",
        )

    def test_blobs_that_do_not_open(self, kms, key):
        other = kms.create_key()["KeyMetadata"]
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"secret")["CiphertextBlob"]
        wrong_key = "The key ID in the request does not identify a CMK that can perform this operation."
        assert refusal(kms.decrypt, CiphertextBlob=blob, KeyId=other["KeyId"]) == (
            "IncorrectKeyException",
            400,
            wrong_key,
        )
        silent = ("InvalidCiphertextException", 400, "")
        assert refusal(kms.decrypt, CiphertextBlob=b"not a blob") == silent
        assert refusal(kms.decrypt, CiphertextBlob=blob[:-1]) == silent
        assert refusal(kms.decrypt, CiphertextBlob=blob + b"\0") == silent
        for position in range(len(blob)):
            changed = bytearray(blob)
            changed[position] ^= 1
            code = refusal(kms.decrypt, CiphertextBlob=bytes(changed))[0]
            # A changed key id names another key, which is absent.
            assert code in ("InvalidCiphertextException", "AccessDeniedException"), position

    # -- states -----------------------------------------------------------------------------------

    def test_disabled(self, kms, key):
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x")["CiphertextBlob"]
        kms.disable_key(KeyId=key["KeyId"])
        expected = ("DisabledException", 400, f"{key['Arn']} is disabled.")
        assert refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x") == expected
        assert refusal(kms.decrypt, CiphertextBlob=blob) == expected
        assert refusal(kms.generate_data_key, KeyId=key["KeyId"], KeySpec="AES_256") == expected
        assert refusal(kms.enable_key_rotation, KeyId=key["KeyId"]) == expected
        kms.enable_key(KeyId=key["KeyId"])
        assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"

    def test_deletion(self, kms, clock, key):
        kms.create_alias(AliasName="alias/doomed", TargetKeyId=key["KeyId"])
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x")["CiphertextBlob"]
        assert refusal(kms.schedule_key_deletion, KeyId=key["KeyId"], PendingWindowInDays=6)[:2] == (
            "ValidationException",
            400,
        )
        assert refusal(kms.cancel_key_deletion, KeyId=key["KeyId"]) == (
            "KMSInvalidStateException",
            400,
            f"{key['Arn']} is not pending deletion.",
        )
        scheduled = kms.schedule_key_deletion(KeyId=key["KeyId"], PendingWindowInDays=7)
        assert (scheduled["KeyId"], scheduled["KeyState"]) == (key["Arn"], "PendingDeletion")
        pending = ("KMSInvalidStateException", 400, f"{key['Arn']} is pending deletion.")
        for call, request in (
            (kms.decrypt, {"CiphertextBlob": blob}),
            (kms.enable_key, {"KeyId": key["KeyId"]}),
            (kms.create_alias, {"AliasName": "alias/more", "TargetKeyId": key["KeyId"]}),
            (kms.schedule_key_deletion, {"KeyId": key["KeyId"]}),
        ):
            assert refusal(call, **request) == pending
        assert kms.cancel_key_deletion(KeyId=key["KeyId"])["KeyId"] == key["Arn"]
        assert kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"]["KeyState"] == "Disabled"
        kms.schedule_key_deletion(KeyId=key["KeyId"], PendingWindowInDays=7)
        clock.pass_days(6.9)
        assert kms.describe_key(KeyId="alias/doomed")["KeyMetadata"]["KeyState"] == "PendingDeletion"
        clock.pass_days(0.2)
        assert refusal(kms.describe_key, KeyId=key["KeyId"])[0] == "NotFoundException"
        assert refusal(kms.describe_key, KeyId="alias/doomed")[0] == "NotFoundException"
        assert refusal(kms.decrypt, CiphertextBlob=blob)[0] == "AccessDeniedException"

    @pytest.mark.parametrize("state", ["Disabled", "PendingDeletion", "PendingImport"])
    def test_what_a_state_allows(self, kms, state):
        """The table of the AWS KMS Developer Guide, "Key states": every operation on a symmetric key."""
        blob = None
        if state == "PendingImport":
            key = kms.create_key(Origin="EXTERNAL")["KeyMetadata"]
        else:
            key = kms.create_key()["KeyMetadata"]
            blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x")["CiphertextBlob"]
        named = {"KeyId": key["KeyId"]}
        if state == "Disabled":
            kms.disable_key(**named)
        elif state == "PendingDeletion":
            kms.schedule_key_deletion(**named)
        invalid = {
            "PendingDeletion": ("KMSInvalidStateException", 400, f"{key['Arn']} is pending deletion."),
            "PendingImport": ("KMSInvalidStateException", 400, f"{key['Arn']} is pending import."),
        }
        unusable = invalid.get(state, ("DisabledException", 400, f"{key['Arn']} is disabled."))
        alice = {"GranteePrincipal": "arn:aws:iam::000000000000:user/alice", "Operations": ["Decrypt"]}
        using = [
            (kms.encrypt, {**named, "Plaintext": b"x"}),
            (kms.generate_data_key, {**named, "KeySpec": "AES_256"}),
            (kms.generate_data_key_without_plaintext, {**named, "KeySpec": "AES_256"}),
            (kms.generate_data_key_pair, {**named, "KeyPairSpec": "ECC_NIST_P256"}),
            (kms.generate_data_key_pair_without_plaintext, {**named, "KeyPairSpec": "ECC_NIST_P256"}),
            (kms.get_public_key, named),
            (kms.create_grant, {**named, **alice}),
            (kms.rotate_key_on_demand, named),
        ]
        if blob is not None:
            using += [
                (kms.decrypt, {"CiphertextBlob": blob}),
                (kms.re_encrypt, {"CiphertextBlob": blob, "DestinationKeyId": key["KeyId"]}),
            ]
        for call, request in using:
            assert refusal(call, **request) == unusable, call
        wrong_origin = (
            "UnsupportedOperationException",
            400,
            f"{key['Arn']} origin is EXTERNAL which is not valid for this operation.",
        )
        for call in (kms.enable_key_rotation, kms.disable_key_rotation):
            assert refusal(call, **named) == (wrong_origin if state == "PendingImport" else unusable)
        changing = [
            (kms.tag_resource, {**named, "Tags": [{"TagKey": "a", "TagValue": "b"}]}),
            (kms.untag_resource, {**named, "TagKeys": ["a"]}),
            (kms.update_key_description, {**named, "Description": "x"}),
            (kms.create_alias, {"AliasName": "alias/a", "TargetKeyId": key["KeyId"]}),
            (kms.update_alias, {"AliasName": "alias/a", "TargetKeyId": key["KeyId"]}),
            (kms.delete_alias, {"AliasName": "alias/a"}),
        ]
        for number, (call, request) in enumerate(changing):
            if state != "PendingDeletion":
                call(**request)
            elif number < 4:  # and no alias was made that the others could change
                assert refusal(call, **request) == invalid[state], number
        always = ("describe_key", "get_key_policy", "list_grants", "list_key_policies", "list_resource_tags",
                  "list_key_rotations")  # fmt: skip
        for name in always:
            getattr(kms, name)(**named)
        kms.put_key_policy(**named, Policy=kms.get_key_policy(**named)["Policy"])
        switching = (kms.enable_key, kms.disable_key)
        if state == "Disabled":
            for call in (*switching, kms.schedule_key_deletion):
                call(**named)
        else:
            for call in switching:
                assert refusal(call, **named) == invalid[state], call
            if state == "PendingDeletion":
                assert refusal(kms.schedule_key_deletion, **named) == invalid[state]

    # -- key metadata -------------------------------------------------------------------------------

    def test_metadata_has_the_recorded_members(self, kms, key):
        assert set(key) == {
            "AWSAccountId", "KeyId", "Arn", "CreationDate", "Enabled", "Description", "KeyUsage", "KeyState",
            "Origin", "KeyManager", "CustomerMasterKeySpec", "KeySpec", "EncryptionAlgorithms", "MultiRegion",
            "CurrentKeyMaterialId",
        }  # fmt: skip
        assert len(key["CurrentKeyMaterialId"]) == 64
        assert kms.describe_key(KeyId=key["Arn"])["KeyMetadata"] == key

    # -- asymmetric ---------------------------------------------------------------------------------

    def test_rsa_encryption(self, kms):
        key = kms.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]
        for algorithm, limit in (("RSAES_OAEP_SHA_1", 214), ("RSAES_OAEP_SHA_256", 190)):
            request = {"KeyId": key["KeyId"], "EncryptionAlgorithm": algorithm}
            blob = kms.encrypt(Plaintext=b"x" * limit, **request)["CiphertextBlob"]
            assert len(blob) == 256
            assert kms.decrypt(CiphertextBlob=blob, **request)["Plaintext"] == b"x" * limit
            assert refusal(kms.encrypt, Plaintext=b"x" * (limit + 1), **request) == (
                "ValidationException",
                400,
                f"Algorithm {algorithm} and key spec RSA_2048 cannot encrypt data larger than {limit} bytes.",
            )
        assert refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x")[0] == "InvalidKeyUsageException"
        public = serialization.load_der_public_key(kms.get_public_key(KeyId=key["KeyId"])["PublicKey"])
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        blob = public.encrypt(b"offline", oaep)
        opened = kms.decrypt(CiphertextBlob=blob, KeyId=key["Arn"], EncryptionAlgorithm="RSAES_OAEP_SHA_256")
        assert opened["Plaintext"] == b"offline"
        # The public key encrypts nothing, too.
        symmetric = kms.create_key()["KeyMetadata"]["KeyId"]
        again = kms.re_encrypt(
            CiphertextBlob=public.encrypt(b"", oaep), SourceKeyId=key["Arn"], DestinationKeyId=symmetric,
            SourceEncryptionAlgorithm="RSAES_OAEP_SHA_256",
        )  # fmt: skip
        assert kms.decrypt(CiphertextBlob=again["CiphertextBlob"])["Plaintext"] == b""

    def test_rsa_signatures(self, kms):
        key = kms.create_key(KeySpec="RSA_2048", KeyUsage="SIGN_VERIFY")["KeyMetadata"]
        assert len(key["SigningAlgorithms"]) == 6
        for algorithm in key["SigningAlgorithms"]:
            request = {"KeyId": key["KeyId"], "SigningAlgorithm": algorithm}
            signature = kms.sign(Message=b"message", **request)["Signature"]
            assert kms.verify(Message=b"message", Signature=signature, **request)["SignatureValid"]
            assert refusal(kms.verify, Message=b"other", Signature=signature, **request) == (
                "KMSInvalidSignatureException",
                400,
                "",
            )

    def test_digest_of_a_wrong_length(self, kms):
        key = kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]
        request = {"KeyId": key["KeyId"], "MessageType": "DIGEST", "SigningAlgorithm": "ECDSA_SHA_256"}
        assert refusal(kms.sign, Message=b"x" * 31, **request) == (
            "ValidationException",
            400,
            "Digest is invalid length for algorithm ECDSA_SHA_256.",
        )
        assert kms.sign(Message=b"x" * 32, **request)["Signature"]

    @pytest.mark.parametrize("spec", ["ECC_NIST_EDWARDS25519", "ML_DSA_44", "ML_DSA_65", "ML_DSA_87"])
    def test_newer_signatures(self, kms, spec):
        key = kms.create_key(KeySpec=spec, KeyUsage="SIGN_VERIFY")["KeyMetadata"]
        algorithm = key["SigningAlgorithms"][0]
        request = {"KeyId": key["KeyId"], "Message": b"message", "SigningAlgorithm": algorithm}
        signature = kms.sign(**request)["Signature"]
        assert kms.verify(Signature=signature, **request)["SignatureValid"]
        changed = signature[:-1] + bytes([signature[-1] ^ 1])
        assert refusal(kms.verify, Signature=changed, **request)[0] == "KMSInvalidSignatureException"

    def test_ml_dsa_external_mu(self, kms):
        """FIPS 204, 6.2: mu is SHAKE256(SHAKE256(public key, 64) | 0 | 0 | message, 64) without a context."""
        key = kms.create_key(KeySpec="ML_DSA_44", KeyUsage="SIGN_VERIFY")["KeyMetadata"]
        der = kms.get_public_key(KeyId=key["KeyId"])["PublicKey"]
        public = serialization.load_der_public_key(der)
        digest = hashlib.shake_256(public.public_bytes_raw()).digest(64)
        mu = hashlib.shake_256(digest + b"\0\0" + b"message").digest(64)
        request = {"KeyId": key["KeyId"], "SigningAlgorithm": "ML_DSA_SHAKE_256"}
        signature = kms.sign(Message=mu, MessageType="EXTERNAL_MU", **request)["Signature"]
        assert kms.verify(Message=b"message", Signature=signature, **request)["SignatureValid"]
        raw = kms.sign(Message=b"message", **request)["Signature"]
        assert kms.verify(Message=mu, MessageType="EXTERNAL_MU", Signature=raw, **request)["SignatureValid"]
        short = refusal(kms.sign, Message=mu[:-1], MessageType="EXTERNAL_MU", **request)
        assert short == (
            "ValidationException",
            400,
            "Digest is invalid length for algorithm ML_DSA_SHAKE_256.",
        )

    @pytest.mark.parametrize(("spec", "length"), [("ML_KEM_768", 1088), ("ML_KEM_1024", 1568)])
    def test_encapsulation(self, kms, spec, length):
        if not hasattr(kms, "encapsulate"):
            pytest.skip("THE INSTALLED BOTOCORE KNOWS NO ML-KEM")
        key = kms.create_key(KeySpec=spec, KeyUsage="ENCAPSULATE_DECAPSULATE")["KeyMetadata"]
        assert key["EncapsulationAlgorithms"] == ["ML_KEM"]
        request = {"KeyId": key["KeyId"], "EncapsulationAlgorithm": "ML_KEM"}
        made = kms.encapsulate(**request)
        blob, secret = made["SharedSecretCiphertextBlob"], made["SharedSecret"]
        assert (len(blob), len(secret)) == (length, 32)
        assert kms.decapsulate(SharedSecretCiphertextBlob=blob, **request)["SharedSecret"] == secret
        short = refusal(kms.decapsulate, SharedSecretCiphertextBlob=blob[:-1], **request)
        assert short[:2] == ("InvalidCiphertextException", 400)

    @pytest.mark.parametrize("bits", [224, 256, 384, 512])
    def test_mac(self, kms, bits):
        key = kms.create_key(KeySpec=f"HMAC_{bits}", KeyUsage="GENERATE_VERIFY_MAC")["KeyMetadata"]
        request = {"KeyId": key["KeyId"], "Message": b"message", "MacAlgorithm": f"HMAC_SHA_{bits}"}
        mac = kms.generate_mac(**request)["Mac"]
        assert len(mac) * 8 == bits
        assert kms.verify_mac(Mac=mac, **request)["MacValid"] is True
        wrong = bytes([mac[0] ^ 1]) + mac[1:]
        assert refusal(kms.verify_mac, Mac=wrong, **request) == ("KMSInvalidMacException", 400, "")

    @pytest.mark.parametrize(
        ("spec", "curve"), [("P256", ec.SECP256R1()), ("P384", ec.SECP384R1()), ("P521", ec.SECP521R1())]
    )
    def test_key_agreement(self, kms, spec, curve):
        key = kms.create_key(KeySpec=f"ECC_NIST_{spec}", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]
        ours = ec.generate_private_key(curve)
        public = ours.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        request = {"KeyId": key["KeyId"], "KeyAgreementAlgorithm": "ECDH"}
        agreed = kms.derive_shared_secret(PublicKey=public, **request)
        theirs = serialization.load_der_public_key(kms.get_public_key(KeyId=key["KeyId"])["PublicKey"])
        assert agreed["SharedSecret"] == ours.exchange(ec.ECDH(), theirs)
        assert refusal(kms.derive_shared_secret, PublicKey=b"nonsense", **request) == (
            "ValidationException",
            400,
            "",
        )

    @pytest.mark.parametrize("spec", ["RSA_2048", "ECC_NIST_P256", "ECC_SECG_P256K1"])
    def test_data_key_pair(self, kms, key, spec):
        made = kms.generate_data_key_pair(KeyId=key["KeyId"], KeyPairSpec=spec, EncryptionContext=CONTEXT)
        private = serialization.load_der_private_key(made["PrivateKeyPlaintext"], None)
        public = private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        assert made["PublicKey"] == public
        opened = kms.decrypt(CiphertextBlob=made["PrivateKeyCiphertextBlob"], EncryptionContext=CONTEXT)
        assert opened["Plaintext"] == made["PrivateKeyPlaintext"]
        quiet = kms.generate_data_key_pair_without_plaintext(KeyId=key["KeyId"], KeyPairSpec=spec)
        assert "PrivateKeyPlaintext" not in quiet

    def test_public_key_of_a_symmetric_key(self, kms, key):
        assert refusal(kms.get_public_key, KeyId=key["KeyId"])[:2] == ("UnsupportedOperationException", 400)

    # -- rotation -----------------------------------------------------------------------------------

    def test_automatic_rotation(self, kms, clock, key):
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"old")["CiphertextBlob"]
        kms.enable_key_rotation(KeyId=key["KeyId"], RotationPeriodInDays=90)
        status = kms.get_key_rotation_status(KeyId=key["KeyId"])
        assert (status["KeyRotationEnabled"], status["RotationPeriodInDays"]) == (True, 90)
        assert status["NextRotationDate"].timestamp() == clock.now + 90 * DAY
        clock.pass_days(91)
        rotated = kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"]["CurrentKeyMaterialId"]
        assert rotated != key["CurrentKeyMaterialId"]
        (entry,) = kms.list_key_rotations(KeyId=key["KeyId"])["Rotations"]
        assert (entry["KeyMaterialId"], entry["RotationType"]) == (rotated, "AUTOMATIC")
        opened = kms.decrypt(CiphertextBlob=blob)
        assert (opened["Plaintext"], opened["KeyMaterialId"]) == (b"old", key["CurrentKeyMaterialId"])
        assert kms.generate_data_key(KeyId=key["KeyId"], KeySpec="AES_256")["KeyMaterialId"] == rotated
        kms.disable_key_rotation(KeyId=key["KeyId"])
        assert kms.get_key_rotation_status(KeyId=key["KeyId"])["KeyRotationEnabled"] is False

    def test_rotation_on_demand_has_a_limit(self, kms, key):
        for _ in range(25):
            assert kms.rotate_key_on_demand(KeyId=key["KeyId"])["KeyId"] == key["Arn"]
        assert refusal(kms.rotate_key_on_demand, KeyId=key["KeyId"]) == (
            "LimitExceededException",
            400,
            "The on-demand rotations limit has been reached for the given keyId. No more on-demand rotations "
            f"can be performed for this key: {key['Arn']}",
        )
        everything = kms.list_key_rotations(KeyId=key["KeyId"], IncludeKeyMaterial="ALL_KEY_MATERIAL")
        states = [entry["KeyMaterialState"] for entry in everything["Rotations"]]
        assert states == ["NON_CURRENT"] * 25 + ["CURRENT"]

    def test_rotation_on_demand_while_an_automatic_one_is_near(self, kms, clock, key):
        kms.enable_key_rotation(KeyId=key["KeyId"], RotationPeriodInDays=90)
        clock.pass_days(90 - 19 / (24 * 60))
        assert refusal(kms.rotate_key_on_demand, KeyId=key["KeyId"])[:2] == ("ConflictException", 400)
        clock.pass_days(20 / (24 * 60))
        assert kms.rotate_key_on_demand(KeyId=key["KeyId"])["KeyId"] == key["Arn"]

    # -- import ----------------------------------------------------------------------------------------

    def wrapped(self, parameters: dict[str, Any], algorithm: str, material: bytes) -> bytes:
        public = serialization.load_der_public_key(parameters["PublicKey"])
        digest = hashes.SHA1() if algorithm.endswith("SHA_1") else hashes.SHA256()
        oaep = padding.OAEP(padding.MGF1(digest), digest, None)
        if not algorithm.startswith("RSA_AES"):
            return public.encrypt(material, oaep)
        wrapping = bytes(range(32))
        return public.encrypt(wrapping, oaep) + aes_key_wrap_with_padding(wrapping, material)

    def bring(
        self, kms: Any, key_id: str, material: bytes, algorithm: str = "RSAES_OAEP_SHA_256", **more: Any
    ) -> Any:
        parameters = kms.get_parameters_for_import(
            KeyId=key_id, WrappingAlgorithm=algorithm, WrappingKeySpec="RSA_2048"
        )
        return kms.import_key_material(
            KeyId=key_id,
            ImportToken=parameters["ImportToken"],
            EncryptedKeyMaterial=self.wrapped(parameters, algorithm, material),
            **{"ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE", **more},
        )

    def test_import(self, kms, clock):
        key = kms.create_key(Origin="EXTERNAL")["KeyMetadata"]
        assert key["KeyState"] == "PendingImport"
        pending = ("KMSInvalidStateException", 400, f"{key['Arn']} is pending import.")
        assert refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x") == pending
        until = datetime.fromtimestamp(clock.now + 10 * DAY, UTC)
        self.bring(kms, key["KeyId"], b"\x07" * 32, ExpirationModel="KEY_MATERIAL_EXPIRES", ValidTo=until)
        described = kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"]
        assert (described["KeyState"], described["ExpirationModel"]) == ("Enabled", "KEY_MATERIAL_EXPIRES")
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x")["CiphertextBlob"]
        clock.pass_days(11)
        assert refusal(kms.decrypt, CiphertextBlob=blob) == pending
        assert (
            refusal(self.bring, kms=kms, key_id=key["KeyId"], material=b"\x08" * 32)[0]
            == "IncorrectKeyMaterialException"
        )
        self.bring(kms, key["KeyId"], b"\x07" * 32, "RSA_AES_KEY_WRAP_SHA_256")
        assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"
        kms.delete_imported_key_material(KeyId=key["KeyId"])
        assert refusal(kms.decrypt, CiphertextBlob=blob) == pending

    def test_import_refusals(self, kms, clock, key):
        request = {"WrappingAlgorithm": "RSAES_OAEP_SHA_256", "WrappingKeySpec": "RSA_2048"}
        assert refusal(kms.get_parameters_for_import, KeyId=key["KeyId"], **request) == (
            "UnsupportedOperationException",
            400,
            f"{key['Arn']} origin is AWS_KMS which is not valid for this operation.",
        )
        external = kms.create_key(Origin="EXTERNAL")["KeyMetadata"]["KeyId"]
        parameters = kms.get_parameters_for_import(KeyId=external, **request)
        token = {"KeyId": external, "ImportToken": parameters["ImportToken"]}
        good = self.wrapped(parameters, "RSAES_OAEP_SHA_256", b"k" * 32)
        forever = {"ExpirationModel": "KEY_MATERIAL_DOES_NOT_EXPIRE"}
        assert refusal(kms.import_key_material, EncryptedKeyMaterial=good, **token) == (
            "ValidationException",
            400,
            "A validTo date must be set if the ExpirationModel is KEY_MATERIAL_EXPIRES",
        )
        short = self.wrapped(parameters, "RSAES_OAEP_SHA_256", b"k" * 31)
        cases = {
            "InvalidCiphertextException": {**token, "EncryptedKeyMaterial": short},
            "InvalidImportTokenException": {**token, "EncryptedKeyMaterial": good, "ImportToken": b"token"},
        }
        for code, import_request in cases.items():
            assert refusal(kms.import_key_material, **import_request, **forever)[:2] == (code, 400)
        clock.pass_days(1.1)
        late = refusal(kms.import_key_material, EncryptedKeyMaterial=good, **token, **forever)
        assert late[:2] == ("ExpiredImportTokenException", 400)

    def test_rotation_of_imported_material(self, kms):
        key = kms.create_key(Origin="EXTERNAL")["KeyMetadata"]
        self.bring(kms, key["KeyId"], b"1" * 32)
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"first")["CiphertextBlob"]
        assert refusal(kms.rotate_key_on_demand, KeyId=key["KeyId"]) == (
            "KMSInvalidStateException",
            400,
            f"No available key material pending rotation for the key: {key['Arn']}.",
        )
        brought = self.bring(kms, key["KeyId"], b"2" * 32, ImportType="NEW_KEY_MATERIAL")
        kms.rotate_key_on_demand(KeyId=key["KeyId"])
        described = kms.describe_key(KeyId=key["KeyId"])["KeyMetadata"]
        assert described["CurrentKeyMaterialId"] == brought["KeyMaterialId"]
        assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == b"first"

    # -- multi-Region ---------------------------------------------------------------------------------

    def test_replica(self, kms, region_of):
        primary = kms.create_key(MultiRegion=True)["KeyMetadata"]
        assert primary["KeyId"].startswith("mrk-")
        assert primary["MultiRegionConfiguration"]["MultiRegionKeyType"] == "PRIMARY"
        blob = kms.encrypt(KeyId=primary["KeyId"], Plaintext=b"x", EncryptionContext=CONTEXT)[
            "CiphertextBlob"
        ]
        replica = kms.replicate_key(KeyId=primary["KeyId"], ReplicaRegion="eu-west-1")["ReplicaKeyMetadata"]
        assert replica["KeyState"] == "Creating"
        there = region_of("eu-west-1")
        opened = there.decrypt(CiphertextBlob=blob, EncryptionContext=CONTEXT)
        assert opened["Plaintext"] == b"x"
        assert opened["KeyId"] == primary["Arn"].replace(":local:", ":eu-west-1:")
        assert refusal(there.replicate_key, KeyId=primary["KeyId"], ReplicaRegion="us-east-1") == (
            "UnsupportedOperationException",
            400,
            f"{replica['Arn']} is not a multi-region primary key.",
        )
        assert (
            refusal(kms.replicate_key, KeyId=primary["KeyId"], ReplicaRegion="eu-west-1")[0]
            == "AlreadyExistsException"
        )
        assert kms.schedule_key_deletion(KeyId=primary["KeyId"])["KeyState"] == "PendingReplicaDeletion"
        kms.cancel_key_deletion(KeyId=primary["KeyId"])
        kms.enable_key(KeyId=primary["KeyId"])
        kms.update_primary_region(KeyId=primary["KeyId"], PrimaryRegion="eu-west-1")
        described = there.describe_key(KeyId=primary["KeyId"])["KeyMetadata"]
        assert described["MultiRegionConfiguration"]["MultiRegionKeyType"] == "PRIMARY"

    def test_replica_of_imported_material_takes_its_own_import(self, kms, region_of):
        primary = kms.create_key(MultiRegion=True, Origin="EXTERNAL")["KeyMetadata"]["KeyId"]
        self.bring(kms, primary, b"m" * 32)
        blob = kms.encrypt(KeyId=primary, Plaintext=b"x")["CiphertextBlob"]
        kms.replicate_key(KeyId=primary, ReplicaRegion="eu-west-1")
        there = region_of("eu-west-1")
        described = there.describe_key(KeyId=primary)["KeyMetadata"]
        assert described["KeyState"] == "PendingImport"
        assert refusal(there.decrypt, CiphertextBlob=blob)[2] == f"{described['Arn']} is pending import."
        other = refusal(self.bring, kms=there, key_id=primary, material=b"n" * 32)
        assert other[0] == "IncorrectKeyMaterialException"
        self.bring(there, primary, b"m" * 32)
        assert there.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"

    def test_a_replica_s_imported_material_ends_in_its_region_alone(self, kms, region_of, clock):
        primary = kms.create_key(MultiRegion=True, Origin="EXTERNAL")["KeyMetadata"]["KeyId"]
        self.bring(kms, primary, b"m" * 32)
        blob = kms.encrypt(KeyId=primary, Plaintext=b"x")["CiphertextBlob"]
        kms.replicate_key(KeyId=primary, ReplicaRegion="eu-west-1")
        there = region_of("eu-west-1")
        until = datetime.fromtimestamp(clock.now + DAY, UTC)

        def states() -> list[str]:
            return [one.describe_key(KeyId=primary)["KeyMetadata"]["KeyState"] for one in (kms, there)]

        self.bring(there, primary, b"m" * 32, ExpirationModel="KEY_MATERIAL_EXPIRES", ValidTo=until)
        assert states() == ["Enabled", "Enabled"]
        assert "ValidTo" not in kms.describe_key(KeyId=primary)["KeyMetadata"]
        clock.pass_days(2)  # expired there
        assert states() == ["Enabled", "PendingImport"]
        assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"
        self.bring(there, primary, b"m" * 32)
        there.delete_imported_key_material(KeyId=primary)
        assert states() == ["Enabled", "PendingImport"]
        assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"
        self.bring(there, primary, b"m" * 32)
        kms.delete_imported_key_material(KeyId=primary)
        assert states() == ["PendingImport", "Enabled"]
        assert there.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"

    # -- aliases, tags, policies ------------------------------------------------------------------------

    def test_alias_refusals(self, kms, key):
        kms.create_alias(AliasName="alias/one", TargetKeyId=key["KeyId"])
        assert refusal(kms.create_alias, AliasName="alias/one", TargetKeyId=key["KeyId"]) == (
            "AlreadyExistsException",
            400,
            "An alias with the name arn:aws:kms:local:000000000000:alias/one already exists",
        )
        assert refusal(kms.create_alias, AliasName="one", TargetKeyId=key["KeyId"]) == (
            "ValidationException",
            400,
            'Alias must start with the prefix "alias/". Please see '
            "https://docs.aws.amazon.com/kms/latest/developerguide/kms-alias.html",
        )
        assert refusal(kms.delete_alias, AliasName="alias/aws/s3")[:2] == ("NotAuthorizedException", 400)
        empty = refusal(kms.create_alias, AliasName="alias/", TargetKeyId=key["KeyId"])
        assert empty[:2] == ("InvalidAliasNameException", 400)
        mac = kms.create_key(KeySpec="HMAC_256", KeyUsage="GENERATE_VERIFY_MAC")["KeyMetadata"]
        assert (
            refusal(kms.update_alias, AliasName="alias/one", TargetKeyId=mac["KeyId"])[0]
            == "ValidationException"
        )

    def test_aws_managed_aliases(self, kms):
        names = {alias["AliasName"]: alias for alias in kms.list_aliases(Limit=100)["Aliases"]}
        assert "TargetKeyId" not in names["alias/aws/s3"]
        managed = kms.describe_key(KeyId="alias/aws/sagemaker")["KeyMetadata"]
        assert managed["KeyManager"] == "AWS"
        # Only the service uses it; and nobody deletes it.
        assert refusal(kms.encrypt, KeyId="alias/aws/sagemaker", Plaintext=b"x")[0] == "AccessDeniedException"
        assert refusal(kms.schedule_key_deletion, KeyId=managed["KeyId"])[0] == "AccessDeniedException"

    def test_tags(self, kms, key):
        kms.tag_resource(
            KeyId=key["KeyId"], Tags=[{"TagKey": "b", "TagValue": "2"}, {"TagKey": "a", "TagValue": "1"}]
        )
        tags = kms.list_resource_tags(KeyId=key["KeyId"])["Tags"]
        assert tags == [{"TagKey": "a", "TagValue": "1"}, {"TagKey": "b", "TagValue": "2"}]
        kms.untag_resource(KeyId=key["KeyId"], TagKeys=["a"])
        assert [tag["TagKey"] for tag in kms.list_resource_tags(KeyId=key["KeyId"])["Tags"]] == ["b"]
        twice = [{"TagKey": "c", "TagValue": "1"}, {"TagKey": "c", "TagValue": "2"}]
        many = [{"TagKey": f"t{n}", "TagValue": ""} for n in range(51)]
        for tags, text in (
            (twice, "Duplicate tag keys"),
            (many, "Too many tags"),
            ([{"TagKey": "AWS:x", "TagValue": ""}], "Tags beginning with aws: are reserved"),
        ):
            assert refusal(kms.tag_resource, KeyId=key["KeyId"], Tags=tags) == ("TagException", 400, text)

    def test_key_policy(self, kms, key):
        policy = json.loads(kms.get_key_policy(KeyId=key["KeyId"])["Policy"])
        assert policy["Statement"][0]["Principal"] == {"AWS": "arn:aws:iam::000000000000:root"}
        assert kms.list_key_policies(KeyId=key["KeyId"])["PolicyNames"] == ["default"]
        locked = {**policy, "Statement": [{**policy["Statement"][0], "Action": "kms:Describe*"}]}
        assert refusal(kms.put_key_policy, KeyId=key["KeyId"], Policy=json.dumps(locked)) == (
            "MalformedPolicyDocumentException",
            400,
            "The new key policy will not allow you to update the key policy in the future.",
        )
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": "kms:Decrypt",
            "Resource": "*",
            "Condition": {"StringEquals": {"kms:EncryptionContext:Stage": "train"}},
        }
        denying = {**policy, "Statement": [*policy["Statement"], statement]}
        kms.put_key_policy(KeyId=key["KeyId"], Policy=json.dumps(denying))
        train = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
        test = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x", EncryptionContext={"Stage": "test"})[
            "CiphertextBlob"
        ]
        caller = "arn:aws:iam::000000000000:root"
        assert refusal(kms.decrypt, CiphertextBlob=train, EncryptionContext=CONTEXT, KeyId=key["KeyId"]) == (
            "AccessDeniedException",
            400,
            f"User: {caller} is not authorized to perform: kms:Decrypt on resource: {key['Arn']} "
            "with an explicit deny in a resource-based policy",
        )
        assert kms.decrypt(CiphertextBlob=test, EncryptionContext={"Stage": "test"})["Plaintext"] == b"x"

    def test_authorization_comes_before_state(self, kms, key, as_user):
        kms.disable_key(KeyId=key["KeyId"])
        refused = refusal(as_user("stranger").encrypt, KeyId=key["KeyId"], Plaintext=b"x")
        assert refused[0] == "AccessDeniedException"

    # -- grants ---------------------------------------------------------------------------------------------

    def test_grant(self, kms, key, as_user):
        alice = as_user("alice")
        blob = kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]
        asked = {"CiphertextBlob": blob, "EncryptionContext": CONTEXT, "KeyId": key["Arn"]}
        assert refusal(alice.decrypt, **asked)[:2] == ("AccessDeniedException", 400)
        request = {
            "KeyId": key["KeyId"],
            "GranteePrincipal": "arn:aws:iam::000000000000:user/alice",
            "Operations": ["Decrypt"],
            "Constraints": {"EncryptionContextSubset": {"Project": "CustomerChurn"}},
            "Name": "read",
        }
        grant = kms.create_grant(**request)
        assert kms.create_grant(**request)["GrantId"] == grant["GrantId"]
        assert alice.decrypt(**asked)["Plaintext"] == b"x"
        assert refusal(alice.encrypt, KeyId=key["Arn"], Plaintext=b"x")[0] == "AccessDeniedException"
        (entry,) = kms.list_grants(KeyId=key["KeyId"])["Grants"]
        assert (entry["GrantId"], entry["KeyId"], entry["Name"]) == (grant["GrantId"], key["Arn"], "read")
        assert "GrantToken" not in entry
        kms.revoke_grant(KeyId=key["KeyId"], GrantId=grant["GrantId"])
        assert refusal(alice.decrypt, **asked)[0] == "AccessDeniedException"
        assert (
            refusal(kms.revoke_grant, KeyId=key["KeyId"], GrantId=grant["GrantId"])[0] == "NotFoundException"
        )
        assert refusal(kms.revoke_grant, KeyId=key["KeyId"], GrantId="x")[0] == "InvalidGrantIdException"

    def test_a_token_that_is_none_is_refused_on_a_key_without_grants_too(self, kms, key):
        for _ in range(2):
            refused = refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x", GrantTokens=["nonsense"])
            assert refused[:2] == ("InvalidGrantTokenException", 400)
            kms.create_grant(
                KeyId=key["KeyId"],
                GranteePrincipal="arn:aws:iam::000000000000:user/alice",
                Operations=["Encrypt"],
            )

    def test_retire_grant(self, kms, key, as_user):
        bob = "arn:aws:iam::000000000000:user/bob"
        grant = kms.create_grant(
            KeyId=key["KeyId"], GranteePrincipal=bob, RetiringPrincipal=bob, Operations=["Encrypt"]
        )
        (entry,) = kms.list_retirable_grants(RetiringPrincipal=bob)["Grants"]
        assert entry["GrantId"] == grant["GrantId"]
        assert (
            refusal(as_user("mallory").retire_grant, GrantToken=grant["GrantToken"])[0]
            == "AccessDeniedException"
        )
        assert refusal(kms.retire_grant, GrantToken="nonsense")[0] == "InvalidGrantTokenException"
        as_user("bob").retire_grant(GrantToken=grant["GrantToken"])
        assert kms.list_grants(KeyId=key["KeyId"])["Grants"] == []

    # -- dry runs and pages ---------------------------------------------------------------------------------

    def test_dry_run_never_runs(self, kms, key):
        would = (
            "DryRunOperationException",
            400,
            "The request would have succeeded, but the DryRun option is set.",
        )
        assert refusal(kms.generate_data_key, KeyId=key["KeyId"], KeySpec="AES_256", DryRun=True) == would
        request = {
            "KeyId": key["KeyId"],
            "GranteePrincipal": "arn:aws:iam::000000000000:user/alice",
            "Operations": ["Decrypt"],
        }
        assert refusal(kms.create_grant, DryRun=True, **request) == would
        assert kms.list_grants(KeyId=key["KeyId"])["Grants"] == []
        assert (
            refusal(kms.decrypt, KeyId=key["KeyId"], DryRun=True, DryRunModifiers=["IGNORE_CIPHERTEXT"])
            == would
        )
        kms.disable_key(KeyId=key["KeyId"])
        assert refusal(kms.encrypt, KeyId=key["KeyId"], Plaintext=b"x", DryRun=True)[0] == "DisabledException"

    def test_every_operation_that_has_a_dry_run(self, kms, key):
        made = {
            usage: kms.create_key(KeySpec=spec, KeyUsage=usage)["KeyMetadata"]["KeyId"]
            for usage, spec in (
                ("SIGN_VERIFY", "ECC_NIST_P256"),
                ("KEY_AGREEMENT", "ECC_NIST_P256"),
                ("GENERATE_VERIFY_MAC", "HMAC_256"),
            )
        }
        named = {"KeyId": key["KeyId"]}
        blob = kms.encrypt(**named, Plaintext=b"x")["CiphertextBlob"]
        signing = {"KeyId": made["SIGN_VERIFY"], "Message": b"x", "SigningAlgorithm": "ECDSA_SHA_256"}
        mac = {"KeyId": made["GENERATE_VERIFY_MAC"], "Message": b"x", "MacAlgorithm": "HMAC_SHA_256"}
        public = kms.get_public_key(KeyId=made["KEY_AGREEMENT"])["PublicKey"]
        alice = {"GranteePrincipal": "arn:aws:iam::000000000000:user/alice", "Operations": ["Decrypt"]}
        grant = kms.create_grant(**named, **alice)
        before = len(kms.list_grants(**named)["Grants"])
        calls = {
            "create_grant": {**named, **alice},
            "retire_grant": {"GrantToken": grant["GrantToken"]},
            "revoke_grant": {**named, "GrantId": grant["GrantId"]},
            "encrypt": {**named, "Plaintext": b"x"},
            "decrypt": {"CiphertextBlob": blob},
            "re_encrypt": {"CiphertextBlob": blob, "DestinationKeyId": key["KeyId"]},
            "generate_data_key": {**named, "KeySpec": "AES_256"},
            "generate_data_key_without_plaintext": {**named, "KeySpec": "AES_256"},
            "generate_data_key_pair": {**named, "KeyPairSpec": "ECC_NIST_P256"},
            "generate_data_key_pair_without_plaintext": {**named, "KeyPairSpec": "ECC_NIST_P256"},
            "sign": signing,
            "verify": {**signing, "Signature": kms.sign(**signing)["Signature"]},
            "generate_mac": mac,
            "verify_mac": {**mac, "Mac": kms.generate_mac(**mac)["Mac"]},
            "derive_shared_secret": {
                "KeyId": made["KEY_AGREEMENT"], "KeyAgreementAlgorithm": "ECDH", "PublicKey": public,
            },
        }  # fmt: skip
        would = (
            "DryRunOperationException",
            400,
            "The request would have succeeded, but the DryRun option is set.",
        )
        for name, request in calls.items():
            assert refusal(getattr(kms, name), **request, DryRun=True) == would, name
        assert len(kms.list_grants(**named)["Grants"]) == before
        # One that would have failed fails as the call itself does.
        wrong = {**calls["verify"], "Message": b"y", "DryRun": True}
        assert refusal(kms.verify, **wrong) == ("KMSInvalidSignatureException", 400, "")

    def test_quotas(self, kms, key, monkeypatch):
        for number in range(50):
            kms.create_alias(AliasName=f"alias/{number}", TargetKeyId=key["KeyId"])
        refused = refusal(kms.create_alias, AliasName="alias/more", TargetKeyId=key["KeyId"])
        assert refused[:2] == ("LimitExceededException", 400)
        kms.describe_key(KeyId="alias/aws/s3")  # its key does not count
        monkeypatch.setattr("streamcrypt.kms.keys.KEYS_PER_ACCOUNT", 2)
        kms.create_key()
        assert refusal(kms.create_key)[:2] == ("LimitExceededException", 400)

    def test_there_are_no_custom_key_stores(self, kms):
        assert kms.describe_custom_key_stores()["CustomKeyStores"] == []
        absent = ("CustomKeyStoreNotFoundException", 400, "cks-1234 does not exist.")
        assert refusal(kms.describe_custom_key_stores, CustomKeyStoreId="cks-1234") == absent
        assert refusal(kms.delete_custom_key_store, CustomKeyStoreId="cks-1234") == absent
        assert refusal(kms.generate_random, NumberOfBytes=1, CustomKeyStoreId="cks-1234") == absent
        assert refusal(kms.create_key, Origin="AWS_CLOUDHSM")[:2] == ("UnsupportedOperationException", 400)
        assert refusal(kms.create_custom_key_store, CustomKeyStoreName="x")[:2] == (
            "UnsupportedOperationException",
            400,
        )

    def test_pages(self, kms):
        made = {kms.create_key()["KeyMetadata"]["KeyId"] for _ in range(5)}
        seen: list[str] = []
        request: dict[str, Any] = {"Limit": 2}
        while True:
            page = kms.list_keys(**request)
            seen += [key["KeyId"] for key in page["Keys"]]
            if not page["Truncated"]:
                break
            request["Marker"] = page["NextMarker"]
        assert len(seen) == 5
        assert set(seen) == made
        bad = base64.b64encode(b"nonsense").decode()
        assert refusal(kms.list_keys, Marker=bad)[:2] == ("InvalidMarkerException", 400)

    def test_last_usage(self, kms, key):
        assert kms.get_key_last_usage(KeyId=key["KeyId"])["KeyLastUsage"] == {}
        kms.encrypt(KeyId=key["KeyId"], Plaintext=b"x")
        assert kms.get_key_last_usage(KeyId=key["KeyId"])["KeyLastUsage"]["Operation"] == "Encrypt"
