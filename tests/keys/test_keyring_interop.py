"""Wrapped keys of ours open in AWS's Material Providers Library, and its in ours.

Origin of the other side: aws-cryptographic-material-providers from PyPI.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)
from families.aws import aws_client
from families.keyring import CONTEXT

pytest.importorskip("aws_cryptographic_material_providers")

from aws_cryptographic_material_providers.keystore import KeyStore
from aws_cryptographic_material_providers.keystore.config import KeyStoreConfig
from aws_cryptographic_material_providers.keystore.models import (
    CreateKeyInput,
    KMSConfigurationKmsKeyArn,
    VersionKeyInput,
)
from aws_cryptographic_material_providers.mpl import AwsCryptographicMaterialProviders
from aws_cryptographic_material_providers.mpl import models as mpl
from aws_cryptographic_material_providers.mpl.config import MaterialProvidersConfig

from streamcrypt.keys.ecdh import EphemeralEcdhKeyring, KmsEcdhKeyring, RawEcdhKeyring
from streamcrypt.keys.hierarchy import HierarchyKeyring
from streamcrypt.keys.kms import KmsDiscoveryKeyring, KmsKeyring, KmsRsaKeyring
from streamcrypt.keys.raw import RawAesKeyring, RawRsaKeyring
from streamcrypt.keys.reference import branch_key_store, decrypting_keyring, encrypting_keyring
from streamcrypt.kms import kms_client
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import SUITES, AlgorithmSuite


@pytest.fixture(scope="module")
def library() -> AwsCryptographicMaterialProviders:
    return AwsCryptographicMaterialProviders(config=MaterialProvidersConfig())


class Theirs:
    """A keyring of the library, with our interface."""

    def __init__(self, library: Any, keyring: Any) -> None:
        self.library = library
        self.keyring = keyring

    def generate(
        self, suite: AlgorithmSuite, context: dict[str, str]
    ) -> tuple[bytes, list[EncryptedDataKey]]:
        materials = self.library.initialize_encryption_materials(
            mpl.InitializeEncryptionMaterialsInput(
                algorithm_suite_id=self._id(suite),
                encryption_context=context,
                required_encryption_context_keys=[],
            )
        )
        out = self.keyring.on_encrypt(mpl.OnEncryptInput(materials=materials)).materials
        wrapped = [
            EncryptedDataKey(key.key_provider_id, bytes(key.key_provider_info), bytes(key.ciphertext))
            for key in out.encrypted_data_keys
        ]
        return bytes(out.plaintext_data_key), wrapped

    def unwrap(self, suite: AlgorithmSuite, context: dict[str, str], encrypted: Any) -> bytes:
        materials = self.library.initialize_decryption_materials(
            mpl.InitializeDecryptionMaterialsInput(
                algorithm_suite_id=self._id(suite),
                encryption_context=context,
                required_encryption_context_keys=[],
            )
        )
        theirs = [
            mpl.EncryptedDataKey(
                key_provider_id=k.provider_id, key_provider_info=k.info, ciphertext=k.ciphertext
            )
            for k in encrypted
        ]
        out = self.keyring.on_decrypt(mpl.OnDecryptInput(materials=materials, encrypted_data_keys=theirs))
        return bytes(out.materials.plaintext_data_key)

    @staticmethod
    def _id(suite: AlgorithmSuite) -> Any:
        names = {
            0x0014: "ALG_AES_128_GCM_IV12_TAG16_NO_KDF",
            0x0146: "ALG_AES_192_GCM_IV12_TAG16_HKDF_SHA256",
            0x0178: "ALG_AES_256_GCM_IV12_TAG16_HKDF_SHA256",
            0x0478: "ALG_AES_256_GCM_HKDF_SHA512_COMMIT_KEY",
        }
        return mpl.AlgorithmSuiteIdESDK(getattr(mpl.ESDKAlgorithmSuiteId, names[suite.id]))


UNSIGNED_IDS = [0x0014, 0x0146, 0x0178, 0x0478]


def both_directions(ours_in, ours_out, theirs_in, theirs_out) -> None:
    for suite in (SUITES[number] for number in UNSIGNED_IDS):
        for context in (CONTEXT, {}):
            data_key, encrypted = ours_in.generate(suite, context)
            assert theirs_out.unwrap(suite, context, encrypted) == data_key
            data_key, encrypted = theirs_in.generate(suite, context)
            assert ours_out.unwrap(suite, context, encrypted) == data_key


def test_raw_aes(library):
    algorithms = {
        16: mpl.AesWrappingAlg.ALG_AES128_GCM_IV12_TAG16,
        24: mpl.AesWrappingAlg.ALG_AES192_GCM_IV12_TAG16,
        32: mpl.AesWrappingAlg.ALG_AES256_GCM_IV12_TAG16,
    }
    for length, algorithm in algorithms.items():
        key = bytes(range(length))
        theirs = library.create_raw_aes_keyring(
            mpl.CreateRawAesKeyringInput(
                key_namespace="space", key_name="näme", wrapping_key=key, wrapping_alg=algorithm
            )
        )
        ours = RawAesKeyring("space", "näme", key)
        both_directions(ours, ours, Theirs(library, theirs), Theirs(library, theirs))


@pytest.mark.parametrize("padding", ["pkcs1", "oaep-sha1", "oaep-sha256", "oaep-sha384", "oaep-sha512"])
def test_raw_rsa(library, padding):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    scheme = {
        "pkcs1": mpl.PaddingScheme.PKCS1,
        "oaep-sha1": mpl.PaddingScheme.OAEP_SHA1_MGF1,
        "oaep-sha256": mpl.PaddingScheme.OAEP_SHA256_MGF1,
        "oaep-sha384": mpl.PaddingScheme.OAEP_SHA384_MGF1,
        "oaep-sha512": mpl.PaddingScheme.OAEP_SHA512_MGF1,
    }[padding]
    theirs = library.create_raw_rsa_keyring(
        mpl.CreateRawRsaKeyringInput(
            key_namespace="space",
            key_name="name",
            padding_scheme=scheme,
            public_key=key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            private_key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )
    )
    ours = RawRsaKeyring("space", "name", private_key=key, padding=padding)
    both_directions(ours, ours, Theirs(library, theirs), Theirs(library, theirs))


CURVES = {
    "ECC_NIST_P256": (ec.SECP256R1(), "ECC_NIST_P256"),
    "ECC_NIST_P384": (ec.SECP384R1(), "ECC_NIST_P384"),
    "ECC_NIST_P521": (ec.SECP521R1(), "ECC_NIST_P521"),
}


def der(public_key) -> bytes:
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def pem(private_key) -> bytes:
    return private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("name", CURVES)
def test_raw_ecdh(library, name):
    from aws_cryptography_primitives.smithygenerated.aws_cryptography_primitives.models import ECDHCurveSpec

    curve, spec = CURVES[name][0], getattr(ECDHCurveSpec, CURVES[name][1])
    one, two = (ec.generate_private_key(curve) for _ in range(2))

    def theirs(schema) -> Theirs:
        made = library.create_raw_ecdh_keyring(
            mpl.CreateRawEcdhKeyringInput(curve_spec=spec, key_agreement_scheme=schema)
        )
        return Theirs(library, made)

    static = theirs(
        mpl.RawEcdhStaticConfigurationsRawPrivateKeyToStaticPublicKey(
            mpl.RawPrivateKeyToStaticPublicKeyInput(
                sender_static_private_key=pem(one), recipient_public_key=der(two.public_key())
            )
        )
    )
    discovery = theirs(
        mpl.RawEcdhStaticConfigurationsPublicKeyDiscovery(
            mpl.PublicKeyDiscoveryInput(recipient_static_private_key=pem(two))
        )
    )
    ephemeral = theirs(
        mpl.RawEcdhStaticConfigurationsEphemeralPrivateKeyToStaticPublicKey(
            mpl.EphemeralPrivateKeyToStaticPublicKeyInput(recipient_public_key=der(two.public_key()))
        )
    )
    ours_static = RawEcdhKeyring(one, two.public_key())
    both_directions(ours_static, RawEcdhKeyring(two, one.public_key()), static, static)
    both_directions(ours_static, RawEcdhKeyring(two), static, discovery)
    both_directions(EphemeralEcdhKeyring(two.public_key()), RawEcdhKeyring(two), ephemeral, discovery)


def test_kms_strict_and_discovery(library, home):
    client = kms_client("local", home=home)
    arn = client.create_key()["KeyMetadata"]["Arn"]
    strict = Theirs(
        library,
        library.create_aws_kms_keyring(mpl.CreateAwsKmsKeyringInput(kms_key_id=arn, kms_client=client)),
    )
    discovery = Theirs(
        library,
        library.create_aws_kms_discovery_keyring(mpl.CreateAwsKmsDiscoveryKeyringInput(kms_client=client)),
    )
    both_directions(KmsKeyring(client, arn), KmsKeyring(client, arn), strict, strict)
    both_directions(encrypting_keyring(arn), decrypting_keyring(None), strict, discovery)
    both_directions(KmsKeyring(client, arn), KmsDiscoveryKeyring(client), strict, discovery)


def test_kms_rsa(library, home):
    client = kms_client("local", home=home)
    arn = client.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["Arn"]
    public = load_der_public_key(client.get_public_key(KeyId=arn)["PublicKey"])
    theirs = Theirs(
        library,
        library.create_aws_kms_rsa_keyring(
            mpl.CreateAwsKmsRsaKeyringInput(
                kms_key_id=arn,
                kms_client=client,
                encryption_algorithm="RSAES_OAEP_SHA_256",
                public_key=public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            )
        ),
    )
    offline = KmsRsaKeyring(arn, public_key=public)
    both_directions(offline, KmsRsaKeyring(arn, client=client), theirs, theirs)


def test_kms_ecdh(library, home):
    from aws_cryptography_primitives.smithygenerated.aws_cryptography_primitives.models import ECDHCurveSpec

    client = kms_client("local", home=home)
    one, two = (
        client.create_key(KeySpec="ECC_NIST_P384", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]["Arn"]
        for _ in range(2)
    )
    two_public = client.get_public_key(KeyId=two)["PublicKey"]
    static = mpl.KmsEcdhStaticConfigurationsKmsPrivateKeyToStaticPublicKey(
        mpl.KmsPrivateKeyToStaticPublicKeyInput(sender_kms_identifier=one, recipient_public_key=two_public)
    )
    theirs = Theirs(
        library,
        library.create_aws_kms_ecdh_keyring(
            mpl.CreateAwsKmsEcdhKeyringInput(
                key_agreement_scheme=static, curve_spec=ECDHCurveSpec.ECC_NIST_P384, kms_client=client
            )
        ),
    )
    ours = KmsEcdhKeyring(client, one, load_der_public_key(two_public))
    both_directions(ours, KmsEcdhKeyring(client, two), theirs, theirs)


def test_hierarchy_and_its_store(library, aws):
    """One DynamoDB table: branch keys made and rotated by either side serve both."""
    kms, dynamodb = aws_client("kms"), aws_client("dynamodb")
    arn = kms.create_key()["KeyMetadata"]["Arn"]
    table = f"keys-{uuid.uuid4()}"
    their_store = KeyStore(
        KeyStoreConfig(
            ddb_client=dynamodb,
            ddb_table_name=table,
            logical_key_store_name="logical",
            kms_client=kms,
            kms_configuration=KMSConfigurationKmsKeyArn(arn),
        )
    )
    from aws_cryptographic_material_providers.keystore.models import CreateKeyStoreInput

    their_store.create_key_store(CreateKeyStoreInput())
    our_store = branch_key_store(f"dynamodb:{table}?logical=logical", kms_key_arn=arn)
    made_by_them = their_store.create_key(
        CreateKeyInput(branch_key_identifier="theirs", encryption_context={"tenant": "a"})
    ).branch_key_identifier
    made_by_us = our_store.create("ours", {"tenant": "b"})
    for branch_key_id in (made_by_them, made_by_us):
        for rotate in (
            None,
            our_store.rotate,
            lambda id: their_store.version_key(VersionKeyInput(branch_key_identifier=id)),
        ):
            if rotate is not None:
                rotate(branch_key_id)
            theirs = library.create_aws_kms_hierarchical_keyring(
                mpl.CreateAwsKmsHierarchicalKeyringInput(
                    branch_key_id=branch_key_id, key_store=their_store, ttl_seconds=60
                )
            )
            ours = HierarchyKeyring(our_store, branch_key_id)
            both_directions(ours, ours, Theirs(library, theirs), Theirs(library, theirs))
