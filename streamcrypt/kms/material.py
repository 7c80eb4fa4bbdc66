"""Key material: the table of key specs, what each can do, and the ciphertext blob.

    blob of a symmetric key
    version 01 | key flavour u8 | key uuid 16 | material id 32 | salt 16 | nonce 12 | ciphertext | tag 16

    flavour      0 single-Region, 1 multi-Region (``mrk-``)
    key          HKDF-Expand(SHA-256, material, "streamcrypt kms blob 1" | salt)
    AAD          everything before the nonce, then the encryption context

Every blob has a key of its own, so the random nonce is drawn once per key and the limit of
2^32 messages under one AES-GCM key is out of reach.  Asymmetric ciphertext is the bare output
of the algorithm, as with AWS.  Primitives are those of ``cryptography``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from streamcrypt.kms.errors import KmsError, refuse, uuid_text
from streamcrypt.tuples import NamedTuple

# Data keys need none of the asymmetric algorithms: the functions that do import them.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import padding

SYMMETRIC: Final = "SYMMETRIC_DEFAULT"
_SYMMETRIC_LENGTH: Final = 32

ENCRYPT_DECRYPT: Final = "ENCRYPT_DECRYPT"
SIGN_VERIFY: Final = "SIGN_VERIFY"
GENERATE_VERIFY_MAC: Final = "GENERATE_VERIFY_MAC"
KEY_AGREEMENT: Final = "KEY_AGREEMENT"
ENCAPSULATE_DECAPSULATE: Final = "ENCAPSULATE_DECAPSULATE"

# The member of KeyMetadata that lists a usage's algorithms.
ALGORITHM_MEMBERS: Final = {
    ENCRYPT_DECRYPT: "EncryptionAlgorithms",
    SIGN_VERIFY: "SigningAlgorithms",
    GENERATE_VERIFY_MAC: "MacAlgorithms",
    KEY_AGREEMENT: "KeyAgreementAlgorithms",
    ENCAPSULATE_DECAPSULATE: "EncapsulationAlgorithms",
}

_RSA_ENCRYPTION: Final = ("RSAES_OAEP_SHA_1", "RSAES_OAEP_SHA_256")
_RSA_SIGNATURES: Final = (
    "RSASSA_PKCS1_V1_5_SHA_256", "RSASSA_PKCS1_V1_5_SHA_384", "RSASSA_PKCS1_V1_5_SHA_512",
    "RSASSA_PSS_SHA_256", "RSASSA_PSS_SHA_384", "RSASSA_PSS_SHA_512",
)  # fmt: skip
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "SHA_1": hashes.SHA1(),  # noqa: S303 - RSAES_OAEP_SHA_1 is AWS's; OAEP needs no collision resistance
    "SHA_224": hashes.SHA224(),
    "SHA_256": hashes.SHA256(),
    "SHA_384": hashes.SHA384(),
    "SHA_512": hashes.SHA512(),
}


class KeySpec(NamedTuple):
    """A row of the table: what a key of this spec is and which algorithms each usage has."""

    name: str
    kind: str
    """symmetric, rsa, ec, ed25519, ml-dsa, ml-kem, hmac, sm2"""
    usages: Mapping[str, tuple[str, ...]]
    parameter: Any = None
    """RSA: bits; EC: the name of the curve's class; HMAC: bytes of key; ML-DSA, ML-KEM: the parameter set."""

    @property
    def public(self) -> bool:
        return self.kind not in ("symmetric", "hmac")


def _rsa(bits: int) -> KeySpec:
    usages = {ENCRYPT_DECRYPT: _RSA_ENCRYPTION, SIGN_VERIFY: _RSA_SIGNATURES}
    return KeySpec(f"RSA_{bits}", "rsa", usages, bits)


def _nist(bits: int, digest: int) -> KeySpec:
    usages = {SIGN_VERIFY: (f"ECDSA_SHA_{digest}",), KEY_AGREEMENT: ("ECDH",)}
    return KeySpec(f"ECC_NIST_P{bits}", "ec", usages, f"SECP{bits}R1")


def _hmac(bits: int, key_length: int) -> KeySpec:
    return KeySpec(f"HMAC_{bits}", "hmac", {GENERATE_VERIFY_MAC: (f"HMAC_SHA_{bits}",)}, key_length)


SPECS: Final[dict[str, KeySpec]] = {
    spec.name: spec
    for spec in (
        KeySpec(SYMMETRIC, "symmetric", {ENCRYPT_DECRYPT: (SYMMETRIC,)}),
        _rsa(2048), _rsa(3072), _rsa(4096),
        _nist(256, 256), _nist(384, 384), _nist(521, 512),
        KeySpec("ECC_SECG_P256K1", "ec", {SIGN_VERIFY: ("ECDSA_SHA_256",)}, "SECP256K1"),
        KeySpec("ECC_NIST_EDWARDS25519", "ed25519", {SIGN_VERIFY: ("ED25519_SHA_512", "ED25519_PH_SHA_512")}),
        _hmac(224, 28), _hmac(256, 32), _hmac(384, 48), _hmac(512, 64),
        KeySpec("ML_DSA_44", "ml-dsa", {SIGN_VERIFY: ("ML_DSA_SHAKE_256",)}, 44),
        KeySpec("ML_DSA_65", "ml-dsa", {SIGN_VERIFY: ("ML_DSA_SHAKE_256",)}, 65),
        KeySpec("ML_DSA_87", "ml-dsa", {SIGN_VERIFY: ("ML_DSA_SHAKE_256",)}, 87),
        KeySpec("ML_KEM_512", "ml-kem", {ENCAPSULATE_DECAPSULATE: ("ML_KEM",)}, 512),
        KeySpec("ML_KEM_768", "ml-kem", {ENCAPSULATE_DECAPSULATE: ("ML_KEM",)}, 768),
        KeySpec("ML_KEM_1024", "ml-kem", {ENCAPSULATE_DECAPSULATE: ("ML_KEM",)}, 1024),
        KeySpec("SM2", "sm2", {ENCRYPT_DECRYPT: ("SM2PKE",), SIGN_VERIFY: ("SM2DSA",), KEY_AGREEMENT: ("ECDH",)}),
    )
}  # fmt: skip


# -- making and reading material -----------------------------------------------------------------


def generate(spec: KeySpec) -> bytes:
    """Fresh material: raw bytes (symmetric, HMAC) or a PKCS#8 private key in DER."""
    if spec.kind == "symmetric":
        return os.urandom(_SYMMETRIC_LENGTH)
    if spec.kind == "hmac":
        return os.urandom(spec.parameter)
    return private_der(generate_private_key(spec))


def generate_private_key(spec: KeySpec) -> Any:
    """A fresh private key of ``cryptography``; UnsupportedOperationException where it has none."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if spec.kind == "rsa":
        return rsa.generate_private_key(public_exponent=65537, key_size=spec.parameter)
    if spec.kind == "ec":
        return ec.generate_private_key(getattr(ec, spec.parameter)())
    if spec.kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if spec.kind in ("ml-dsa", "ml-kem"):
        return _post_quantum_class(spec).generate()
    # Outside China, AWS refuses SM2 with this exception.
    raise KmsError("UnsupportedOperationException", f"KeySpec {spec.name} is not supported in this region.")


def _post_quantum_class(spec: KeySpec) -> Any:
    """The private key class of an ML-DSA or ML-KEM parameter set, where this cryptography has one."""
    try:
        if spec.kind == "ml-dsa":
            from cryptography.hazmat.primitives.asymmetric import mldsa

            found = getattr(mldsa, f"MLDSA{spec.parameter}PrivateKey")
        else:
            from cryptography.hazmat.primitives.asymmetric import mlkem

            found = getattr(mlkem, f"MLKEM{spec.parameter}PrivateKey")
    except (ImportError, AttributeError):
        refuse("UnsupportedOperationException", f"KeySpec {spec.name} is not supported by this installation.")
    return found


def private_der(key: Any) -> bytes:
    """PKCS#8 in DER, not encrypted: for the store, which seals it, and for data key pairs."""
    from cryptography.hazmat.primitives import serialization

    der: bytes = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return der


def public_der(key: Any) -> bytes:
    """SubjectPublicKeyInfo in DER of a private key's public half."""
    from cryptography.hazmat.primitives import serialization

    der: bytes = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return der


def load_private(material: bytes) -> Any:
    from cryptography.hazmat.primitives import serialization

    return serialization.load_der_private_key(material, password=None, unsafe_skip_rsa_key_validation=True)


def import_material(spec: KeySpec, material: bytes) -> bytes:
    """Imported bytes as material; InvalidCiphertextException unless they are a key of this spec."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if spec.kind == "symmetric" or spec.kind == "hmac":
        if len(material) != (spec.parameter or _SYMMETRIC_LENGTH):
            refuse("InvalidCiphertextException")
        return material
    try:
        key: Any = serialization.load_der_private_key(material, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        refuse("InvalidCiphertextException")
    fits = (
        (spec.kind == "rsa" and isinstance(key, rsa.RSAPrivateKey) and key.key_size == spec.parameter)
        or (
            spec.kind == "ec"
            and isinstance(key, ec.EllipticCurvePrivateKey)
            and isinstance(key.curve, getattr(ec, spec.parameter))
        )
        or (spec.kind == "ed25519" and isinstance(key, ed25519.Ed25519PrivateKey))
        or (spec.kind in ("ml-dsa", "ml-kem") and isinstance(key, _post_quantum_class(spec)))
    )
    if not fits:
        refuse("InvalidCiphertextException")
    return private_der(key)


def material_id(key_id: str, material: bytes) -> str:
    """64 hex digits that name material without telling anything about it: equal for equal material of a key."""
    salt = b"streamcrypt kms material id 1"
    return HKDF(hashes.SHA256(), 32, salt, key_id.encode()).derive(material).hex()


# -- symmetric ciphertext --------------------------------------------------------------------------

_VERSION: Final = 1
_UUID_LENGTH: Final = 16
_MATERIAL_ID_LENGTH: Final = 32
_SALT_LENGTH: Final = 16
_NONCE_LENGTH: Final = 12
_TAG_LENGTH: Final = 16
_HEADER_LENGTH: Final = 2 + _UUID_LENGTH + _MATERIAL_ID_LENGTH + _SALT_LENGTH
BLOB_OVERHEAD: Final = _HEADER_LENGTH + _NONCE_LENGTH + _TAG_LENGTH


class BlobHeader(NamedTuple):
    """What a blob says about itself before anything is authenticated."""

    key_id: str
    material_id: str


def key_prefix(key_id: str) -> bytes:
    """The bytes with which every blob of a key begins."""
    if key_id.startswith("mrk-"):
        return bytes((_VERSION, 1)) + bytes.fromhex(key_id[4:])
    return bytes((_VERSION, 0)) + bytes.fromhex(key_id.replace("-", ""))


class BlobKey:
    """Symmetric material, ready to seal and to open blobs of its key."""

    __slots__ = ("_expand", "_prefix")

    def __init__(self, key_id: str, identity: str, material: bytes) -> None:
        self._prefix = key_prefix(key_id) + bytes.fromhex(identity)
        # HKDF-Expand to the length of one hash is one HMAC: T(1) = HMAC(PRK, info | 0x01) (RFC 5869, 2.3).
        # Begun once and copied for each blob it takes a fifth of HKDFExpand's time.
        self._expand = HMAC(material, _HASHES["SHA_256"])
        self._expand.update(b"streamcrypt kms blob 1|")

    def seal(self, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """A ciphertext blob."""
        return self._seal(plaintext, context, os.urandom(_SALT_LENGTH + _NONCE_LENGTH))

    def generate(self, length: int, context: Mapping[str, str]) -> tuple[bytes, bytes]:
        """``length`` random bytes, and the blob that holds them."""
        fresh = os.urandom(length + _SALT_LENGTH + _NONCE_LENGTH)
        plaintext = fresh[:length]
        return plaintext, self._seal(plaintext, context, fresh[length:])

    def _seal(self, plaintext: bytes, context: Mapping[str, str], fresh: bytes) -> bytes:
        salt, nonce = fresh[:_SALT_LENGTH], fresh[_SALT_LENGTH:]
        header = self._prefix + salt
        sealed = self._cipher(salt).encrypt(nonce, plaintext, header + encode_context(context))
        return header + nonce + sealed

    def open(self, blob: bytes, context: Mapping[str, str]) -> bytes:
        """The plaintext; InvalidCiphertextException when blob or context are not those that were sealed."""
        header = blob[:_HEADER_LENGTH]
        nonce = blob[_HEADER_LENGTH : _HEADER_LENGTH + _NONCE_LENGTH]
        sealed = blob[_HEADER_LENGTH + _NONCE_LENGTH :]
        try:
            return self._cipher(header[-_SALT_LENGTH:]).decrypt(
                nonce, sealed, header + encode_context(context)
            )
        except InvalidTag:
            refuse("InvalidCiphertextException")

    def _cipher(self, salt: bytes) -> AESGCM:
        expand = self._expand.copy()
        expand.update(salt + b"\x01")
        return AESGCM(expand.finalize())


def parse_blob(blob: bytes) -> BlobHeader:
    """The header of a blob; InvalidCiphertextException when the bytes are none of ours."""
    if len(blob) < BLOB_OVERHEAD or blob[0] != _VERSION or blob[1] > 1:
        refuse("InvalidCiphertextException")
    raw = blob[2 : 2 + _UUID_LENGTH]
    key_id = f"mrk-{raw.hex()}" if blob[1] else uuid_text(raw.hex())
    identity = blob[2 + _UUID_LENGTH : 2 + _UUID_LENGTH + _MATERIAL_ID_LENGTH].hex()
    return BlobHeader(key_id, identity)


def encode_context(context: Mapping[str, str]) -> bytes:
    """One encoding for one set of pairs: sorted, each string with its length before it."""
    if not context:
        return b""
    pieces: list[bytes] = []
    for name in sorted(context):
        encoded, value = name.encode(), context[name].encode()
        pieces += (len(encoded).to_bytes(4, "big"), encoded, len(value).to_bytes(4, "big"), value)
    return b"".join(pieces)


# -- asymmetric encryption ---------------------------------------------------------------------------


def _oaep(algorithm: str) -> padding.OAEP:
    from cryptography.hazmat.primitives.asymmetric import padding

    digest = _HASHES[algorithm.removeprefix("RSAES_OAEP_")]
    return padding.OAEP(mgf=padding.MGF1(digest), algorithm=digest, label=None)


def oaep_limit(spec: KeySpec, algorithm: str) -> int:
    """The longest plaintext in bytes (RFC 8017, 7.1.1)."""
    digest = _HASHES[algorithm.removeprefix("RSAES_OAEP_")]
    return int(spec.parameter) // 8 - 2 * digest.digest_size - 2


def rsa_encrypt(spec: KeySpec, algorithm: str, key: Any, plaintext: bytes) -> bytes:
    limit = oaep_limit(spec, algorithm)
    if len(plaintext) > limit:
        refuse(
            "ValidationException",
            f"Algorithm {algorithm} and key spec {spec.name} cannot encrypt data larger than {limit} bytes.",
        )
    ciphertext: bytes = key.public_key().encrypt(plaintext, _oaep(algorithm))
    return ciphertext


def rsa_decrypt(algorithm: str, key: Any, ciphertext: bytes) -> bytes:
    try:
        plaintext: bytes = key.decrypt(ciphertext, _oaep(algorithm))
    except ValueError:
        refuse("InvalidCiphertextException")
    return plaintext


# -- signatures ----------------------------------------------------------------------------------------


def sign(algorithm: str, key: Any, message: bytes, message_type: str) -> bytes:
    """The signature over a message, a digest or an external mu, in AWS's encoding."""
    if algorithm == "ML_DSA_SHAKE_256":
        _check_ml_dsa(algorithm, message, message_type)
        if message_type == "EXTERNAL_MU":
            return _ml_dsa_mu(key, "sign_mu")(message)  # type: ignore[no-any-return]
        return key.sign(message)  # type: ignore[no-any-return]
    if algorithm.startswith("ED25519"):
        return _sign_ed25519(algorithm, key, message, message_type)
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    digest, data, prehashed = _digest_input(algorithm, message, message_type)
    chosen = utils.Prehashed(digest) if prehashed else digest
    if algorithm.startswith("ECDSA"):
        return key.sign(data, ec.ECDSA(chosen))  # type: ignore[no-any-return]
    return key.sign(data, _rsa_padding(algorithm, digest), chosen)  # type: ignore[no-any-return]


def verify(algorithm: str, key: Any, message: bytes, message_type: str, signature: bytes) -> None:
    """KMSInvalidSignatureException unless the signature holds."""
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    public = key.public_key()
    try:
        if algorithm == "ML_DSA_SHAKE_256":
            _check_ml_dsa(algorithm, message, message_type)
            if message_type == "EXTERNAL_MU":
                _ml_dsa_mu(public, "verify_mu")(signature, message)
            else:
                public.verify(signature, message)
        elif algorithm.startswith("ED25519"):
            _verify_ed25519(algorithm, public, message, message_type, signature)
        else:
            digest, data, prehashed = _digest_input(algorithm, message, message_type)
            chosen = utils.Prehashed(digest) if prehashed else digest
            if algorithm.startswith("ECDSA"):
                public.verify(signature, data, ec.ECDSA(chosen))
            else:
                public.verify(signature, data, _rsa_padding(algorithm, digest), chosen)
    except InvalidSignature:
        refuse("KMSInvalidSignatureException")


def _rsa_padding(algorithm: str, digest: hashes.HashAlgorithm) -> padding.AsymmetricPadding:
    from cryptography.hazmat.primitives.asymmetric import padding

    if algorithm.startswith("RSASSA_PSS"):
        return padding.PSS(mgf=padding.MGF1(digest), salt_length=digest.digest_size)
    return padding.PKCS1v15()


def _digest_input(
    algorithm: str, message: bytes, message_type: str
) -> tuple[hashes.HashAlgorithm, bytes, bool]:
    digest = _HASHES[algorithm[algorithm.index("SHA_") :]]
    if message_type == "EXTERNAL_MU":
        refuse("ValidationException", f"MessageType EXTERNAL_MU is not compatible with {algorithm}.")
    if message_type == "DIGEST" and len(message) != digest.digest_size:
        refuse("ValidationException", f"Digest is invalid length for algorithm {algorithm}.")
    return digest, message, message_type == "DIGEST"


def _check_ml_dsa(algorithm: str, message: bytes, message_type: str) -> None:
    if message_type == "DIGEST":
        refuse("ValidationException", f"MessageType DIGEST is not compatible with {algorithm}.")
    if message_type == "EXTERNAL_MU" and len(message) != 64:
        refuse("ValidationException", f"Digest is invalid length for algorithm {algorithm}.")


def _ml_dsa_mu(key: Any, name: str) -> Any:
    method = getattr(key, name, None)
    if method is None:
        refuse(
            "UnsupportedOperationException", "MessageType EXTERNAL_MU is not supported by this installation."
        )
    return method


# cryptography has pure Ed25519 only, and composing Ed25519ph by hand is not ours to do.
_NO_ED25519_PH: Final = "ED25519_PH_SHA_512 is not supported by this installation."


def _sign_ed25519(algorithm: str, key: Any, message: bytes, message_type: str) -> bytes:
    _check_ed25519(algorithm, message_type)
    if algorithm == "ED25519_SHA_512":
        signature: bytes = key.sign(message)
        return signature
    raise KmsError("UnsupportedOperationException", _NO_ED25519_PH)


def _verify_ed25519(algorithm: str, public: Any, message: bytes, message_type: str, signature: bytes) -> None:
    _check_ed25519(algorithm, message_type)
    if algorithm != "ED25519_SHA_512":
        refuse("UnsupportedOperationException", _NO_ED25519_PH)
    public.verify(signature, message)


def _check_ed25519(algorithm: str, message_type: str) -> None:
    wanted = "RAW" if algorithm == "ED25519_SHA_512" else "DIGEST"
    if message_type != wanted:
        refuse("ValidationException", f"MessageType {message_type} is not compatible with {algorithm}.")


# -- MAC, agreement, encapsulation --------------------------------------------------------------------


def mac(algorithm: str, material: bytes, message: bytes) -> bytes:
    computed = HMAC(material, _HASHES[algorithm.removeprefix("HMAC_")])
    computed.update(message)
    return computed.finalize()


def verify_mac(algorithm: str, material: bytes, message: bytes, given: bytes) -> None:
    from cryptography.hazmat.primitives.constant_time import bytes_eq

    if not bytes_eq(mac(algorithm, material, message), given):
        refuse("KMSInvalidMacException")


def derive_shared_secret(key: Any, public_key: bytes) -> bytes:
    """The raw x coordinate (SP 800-56A, cofactor ECDH; the cofactor of these curves is 1)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        other = serialization.load_der_public_key(public_key)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        refuse("ValidationException", "")
    if not isinstance(other, ec.EllipticCurvePublicKey) or other.curve.name != key.curve.name:
        refuse("ValidationException", "")
    secret: bytes = key.exchange(ec.ECDH(), other)
    return secret


def encapsulate(key: Any) -> tuple[bytes, bytes]:
    """A shared secret and the blob that carries it."""
    secret, blob = key.public_key().encapsulate()
    return secret, blob


def decapsulate(key: Any, blob: bytes) -> bytes:
    try:
        secret: bytes = key.decapsulate(blob)
    except ValueError:
        refuse("InvalidCiphertextException")
    return secret
