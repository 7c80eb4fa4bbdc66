"""Signatures by a key of a KMS, and their verification with the public key alone.

    ECDSA_SHA_256, _384, _512                 P-256, P-384, P-521: the key decides
    RSASSA_PSS_SHA_256, _384, _512            MGF1 with the same hash, salt as long as the hash
    RSASSA_PKCS1_V1_5_SHA_256, _384, _512

KMS signs a digest that was made here: it takes no more than 4096 bytes of a message itself.  The
signature is that of the whole document, as ``openssl dgst -verify`` checks it: DER for ECDSA, the
bare number for RSA.

Sources: AWS KMS API reference, Sign; FIPS 186-5; RFC 8017, sections 8.1 and 8.2.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from streamcrypt.errors import IntegrityError, KeyAccessError
from streamcrypt.keys.calls import KmsStats, require_bytes, require_public_key
from streamcrypt.keys.keyring import printable
from streamcrypt.keys.reference import load_public_key, reach_kms

if TYPE_CHECKING:
    from hashlib import _Hash

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "256": hashes.SHA256(),
    "384": hashes.SHA384(),
    "512": hashes.SHA512(),
}
_CURVES: Final = {"secp256r1": "ECDSA_SHA_256", "secp384r1": "ECDSA_SHA_384", "secp521r1": "ECDSA_SHA_512"}
_PSS: Final = "RSASSA_PSS_SHA_"
_PKCS1: Final = "RSASSA_PKCS1_V1_5_SHA_"
RSA_ALGORITHMS: Final = tuple(prefix + bits for prefix in (_PSS, _PKCS1) for bits in _HASHES)
ALGORITHMS: Final = (*_CURVES.values(), *RSA_ALGORITHMS)

_LEAST_RSA_BITS: Final = 2048
_MAX_PUBLIC_KEY: Final = 64 * 1024  # bytes of a file


def new_hash(algorithm: str) -> _Hash:
    """The hash that a document is put through before it is signed by ``algorithm``."""
    return hashlib.new("sha" + algorithm.rpartition("_")[2])


def read_public_key_file(path: Path) -> PublicKey:
    """The public key in a PEM or DER file; KeyAccessError when there is none that verifies here."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_PUBLIC_KEY)
    except OSError as error:
        raise KeyAccessError(f"{path}: the public key cannot be read: {error.strerror}") from error
    if b"PRIVATE KEY" in content:
        raise KeyAccessError(f"{path}: a private key; verifying takes the public one alone")
    if not content.lstrip().startswith(b"-----BEGIN"):
        content = _as_pem(content)
    return check_public_key(load_public_key(content, str(path)), str(path))


def _as_pem(der: bytes) -> bytes:
    import base64

    return (
        b"-----BEGIN PUBLIC KEY-----\n" + base64.encodebytes(der) + b"-----END PUBLIC KEY-----\n"
    )  # KMS gives it as DER


def check_public_key(key: Any, name: str) -> PublicKey:
    """``key`` if signatures are verified with it here: P-256, P-384, P-521, or RSA of at least 2048 bits."""
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA_BITS:
        return key
    raise KeyAccessError(
        f"{name}: manifests are signed with P-256, P-384, P-521 or RSA of at least {_LEAST_RSA_BITS} bits, "
        "and this is none of these"
    )


def fingerprint(key: PublicKey) -> str:
    """Which key this is, in 16 hexadecimal digits."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:16]


def fits(key: PublicKey, algorithm: str) -> bool:
    """Whether this key makes signatures by this algorithm."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return _CURVES[key.curve.name] == algorithm
    return algorithm in RSA_ALGORITHMS


def verify_digest(key: PublicKey, algorithm: str, digest: bytes, signature: bytes) -> None:
    """IntegrityError unless ``signature`` is this key's over a document with this digest."""
    if algorithm not in ALGORITHMS or not fits(key, algorithm):
        raise IntegrityError("the signature is by another kind of key than the one given")
    chosen = _HASHES[algorithm.rpartition("_")[2]]
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, digest, ec.ECDSA(Prehashed(chosen)))
        elif algorithm.startswith(_PSS):
            scheme = padding.PSS(padding.MGF1(chosen), padding.PSS.DIGEST_LENGTH)
            key.verify(signature, digest, scheme, Prehashed(chosen))
        else:
            key.verify(signature, digest, padding.PKCS1v15(), Prehashed(chosen))
    except InvalidSignature:
        raise IntegrityError("the signature does not verify with the key given") from None


class SigningKey:
    """An asymmetric key of a KMS that signs.

    ``reference`` is a ``local:``, ``aws:`` or ``arn:`` reference.  ``algorithm`` chooses among those
    of an RSA key (default: RSASSA_PSS_SHA_256).  The caller needs kms:GetPublicKey and kms:Sign.
    """

    def __init__(
        self, reference: str, algorithm: str | None = None, *, stats: KmsStats | None = None
    ) -> None:
        if algorithm is not None and algorithm not in ALGORITHMS:
            raise ValueError(f"signing algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")
        self._calls, self._key_id = reach_kms(reference, stats=stats)
        self._label = printable(reference)
        self._asked = algorithm
        self._public_key: PublicKey | None = None
        self.arn = ""
        self.algorithm = ""

    def prepare(self) -> None:
        """Make sure, before there is anything to sign, that the key can: its state, its kind, our rights."""
        make_one = "streamcrypt kms create-key --key-usage SIGN_VERIFY --key-spec ECC_NIST_P384"
        try:
            answer = self._calls.call("GetPublicKey", self._label, KeyId=self._key_id)
        except KeyAccessError as error:
            if error.code != "UnsupportedOperationException":
                raise
            raise KeyAccessError(
                f"{self._label}: has no public key, so nobody could verify what it signs; make one that has: "
                f"{make_one}",
                code=error.code,
                operation="GetPublicKey",
                key=self._label,
            ) from error
        if answer.get("KeyUsage") != "SIGN_VERIFY":
            raise KeyAccessError(
                f"{self._label}: its usage is {printable(str(answer.get('KeyUsage')))}, not SIGN_VERIFY; "
                f"make one that signs: {make_one}",
                key=self._label,
            )
        self._public_key = check_public_key(require_public_key(answer, self._label), self._label)
        self.arn = str(answer.get("KeyId"))
        self.algorithm = self._choose(self._public_key)
        try:
            self._call_sign(bytes(new_hash(self.algorithm).digest_size), DryRun=True)
        except KeyAccessError as error:
            if error.code != "DryRunOperationException":
                raise

    def _choose(self, key: PublicKey) -> str:
        if isinstance(key, ec.EllipticCurvePublicKey):
            algorithm = _CURVES[key.curve.name]
            if self._asked not in (None, algorithm):
                raise ValueError(f"{self._label}: this key signs by {algorithm}, not by {self._asked}")
            return algorithm
        if self._asked is not None and self._asked not in RSA_ALGORITHMS:
            raise ValueError(f"{self._label}: an RSA key signs by {', '.join(RSA_ALGORITHMS)}")
        return self._asked or _PSS + "256"

    def sign(self, digest: bytes) -> bytes:
        """KMS's signature over a document with this digest; it was verified with the key's public half."""
        assert self._public_key is not None, "prepare() first"
        answer = self._call_sign(digest)
        if answer.get("KeyId") != self.arn:
            raise IntegrityError(f"{self._label}: KMS answered Sign for another key; the answer is refused")
        signature = require_bytes(answer, "Signature", self._label, "Sign")
        try:
            verify_digest(self._public_key, self.algorithm, digest, signature)
        except IntegrityError as error:
            raise IntegrityError(f"{self._label}: KMS's answer to Sign is refused: {error}") from None
        return signature

    def _call_sign(self, digest: bytes, **options: Any) -> dict[str, Any]:
        return self._calls.call(
            "Sign",
            self._label,
            KeyId=self.arn,
            Message=digest,
            MessageType="DIGEST",
            SigningAlgorithm=self.algorithm,
            **options,
        )

    def __repr__(self) -> str:
        return f"<SigningKey {self._label}>"
