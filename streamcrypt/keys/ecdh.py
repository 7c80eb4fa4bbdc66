"""ECDH keyrings: the wrapping key comes from key agreement with the recipient's public key.

    info        01 ‖ length u32 ‖ recipient point ‖ length u32 ‖ sender point     (compressed SEC 1)
    ciphertext  salt 32 ‖ commit key 32 ‖ AES-256-GCM(wrapping key, IV = zeros, data key)

    fixed = "ecdh-key-derivation" ‖ 00 ‖ curve ‖ 00 ‖ "HMAC_SHA384" ‖ 00 ‖ sender ‖ recipient
            ‖ 00 ‖ 01 ‖ 00 ‖ encryption context
    commit key ‖ wrapping key = KDF-CTR(HMAC-SHA-384, shared x-coordinate, fixed, salt, 64 bytes)

The AAD is ``fixed``.  The zero IV is safe only because a random salt makes every wrapping key new:
never wrap twice under one salt.

The curve's name is in lower case in what every implementation writes; the specification's text has
it in upper case.  Sources: AWS Encryption SDK specification, framework/raw-ecdh-keyring.md and
aws-kms/aws-kms-ecdh-keyring.md; NIST SP 800-108 (counter mode).
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from streamcrypt.errors import IntegrityError, KeyAccessError, WrappedKeyError
from streamcrypt.keys.calls import KmsCalls, KmsStats, require_bytes, require_public_key
from streamcrypt.keys.keyring import KMS_ECDH_PROVIDER, RAW_ECDH_PROVIDER, Keyring, printable
from streamcrypt.keys.raw import fingerprint
from streamcrypt.message.context import serialize_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import COMMITMENT_LENGTH, IV_LENGTH, AlgorithmSuite

_VERSION: Final = b"\x01"
_SALT_LENGTH: Final = 32
_WRAPPING_KEY_LENGTH: Final = 32
_ZERO_IV: Final = bytes(IV_LENGTH)
_CURVES: Final = {"secp256r1": b"p256", "secp384r1": b"p384", "secp521r1": b"p521"}
_LENGTH: Final = struct.Struct(">I")


def kdf_counter(
    algorithm: hashes.HashAlgorithm, key: bytes, label: bytes, context: bytes, length: int
) -> bytes:
    """``length`` bytes by NIST SP 800-108 counter mode; counter and length are 32 bits."""
    kdf = KBKDFHMAC(
        algorithm=algorithm,
        mode=Mode.CounterMode,
        length=length,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    )
    return kdf.derive(key)


def compress(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """The compressed SEC 1 point."""
    return public_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)


def check_curve(curve: ec.EllipticCurve) -> ec.EllipticCurve:
    """ValueError unless it is P-256, P-384 or P-521."""
    if curve.name not in _CURVES:
        raise ValueError(f"curve {curve.name} does not serve key agreement here; use P-256, P-384 or P-521")
    return curve


@dataclass(frozen=True, slots=True)
class _Parties:
    """The two points of a wrapped key."""

    curve: ec.EllipticCurve
    sender: bytes
    recipient: bytes

    def to_info(self) -> bytes:
        parts = (_VERSION, _LENGTH.pack(len(self.recipient)), self.recipient)
        return b"".join((*parts, _LENGTH.pack(len(self.sender)), self.sender))

    def fixed(self, context: Mapping[str, str]) -> bytes:
        return b"\0".join(
            (
                b"ecdh-key-derivation",
                _CURVES[self.curve.name],
                b"HMAC_SHA384",
                self.sender + self.recipient,
                _VERSION,
                serialize_context(context),
            )
        )


def _parse_info(info: bytes, curve: ec.EllipticCurve) -> _Parties | None:
    """The two points in ``info``; None when they are not of this curve, or not points' bytes at all."""
    length = 1 + (curve.key_size + 7) // 8
    prefix = _LENGTH.pack(length)
    middle = 5 + length
    if len(info) != 1 + 2 * (4 + length) or info[:1] != _VERSION:
        return None
    if info[1:5] != prefix or info[middle : middle + 4] != prefix:
        return None
    return _Parties(curve, sender=info[middle + 4 :], recipient=info[5:middle])


def _wrap(parties: _Parties, shared: bytes, context: Mapping[str, str], data_key: bytes) -> bytes:
    salt = os.urandom(_SALT_LENGTH)
    fixed = parties.fixed(context)
    commitment, wrapping_key = _derive(shared, fixed, salt)
    return salt + commitment + AESGCM(wrapping_key).encrypt(_ZERO_IV, data_key, fixed)


def _unwrap(
    parties: _Parties, shared: bytes, context: Mapping[str, str], ciphertext: bytes, key: str
) -> bytes:
    salt, rest = ciphertext[:_SALT_LENGTH], ciphertext[_SALT_LENGTH:]
    stored, sealed = rest[:COMMITMENT_LENGTH], rest[COMMITMENT_LENGTH:]
    fixed = parties.fixed(context)
    commitment, wrapping_key = _derive(shared, fixed, salt)
    try:
        if not hmac.compare_digest(stored, commitment):
            raise InvalidTag
        return AESGCM(wrapping_key).decrypt(_ZERO_IV, sealed, fixed)
    except InvalidTag as error:
        raise WrappedKeyError(
            f"{key}: the wrapped data key does not open; it or the encryption context was altered", key=key
        ) from error


def _derive(shared: bytes, fixed: bytes, salt: bytes) -> tuple[bytes, bytes]:
    length = COMMITMENT_LENGTH + _WRAPPING_KEY_LENGTH
    derived = kdf_counter(hashes.SHA384(), shared, fixed, salt, length)
    return derived[:COMMITMENT_LENGTH], derived[COMMITMENT_LENGTH:]


class _EcdhKeyring(Keyring):
    """What raw and KMS ECDH share.  A subclass computes the shared secret.

    static      own key and a recipient: both points must match, in either role
    ephemeral   a recipient alone: a new sender key for every message; only encrypts
    discovery   own key alone: opens what was wrapped for it; only decrypts
    """

    _provider: str

    def __init__(self, curve: ec.EllipticCurve, recipient: ec.EllipticCurvePublicKey | None) -> None:
        self._curve = check_curve(curve)
        if recipient is not None and recipient.curve.name != curve.name:
            raise ValueError(f"the recipient's key is on {recipient.curve.name}, the other on {curve.name}")
        self._recipient = recipient
        self._recipient_point = compress(recipient) if recipient is not None else None

    def _own_point(self) -> bytes | None:
        """Our public key, or None (ephemeral)."""
        raise NotImplementedError

    def _agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        """The x-coordinate of the point shared with ``peer``."""
        raise NotImplementedError

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        own = self._own_point()
        if self._recipient is None or self._recipient_point is None or own is None:
            raise KeyAccessError(
                f"{self.describe()}: encrypting needs the recipient's public key (&recipient=FILE)"
            )
        parties = _Parties(self._curve, sender=own, recipient=self._recipient_point)
        ciphertext = _wrap(parties, self._agree(self._recipient), context, data_key)
        return (EncryptedDataKey(self._provider, parties.to_info(), ciphertext),)

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        if encrypted.provider_id not in (RAW_ECDH_PROVIDER, KMS_ECDH_PROVIDER):
            return False
        parties = _parse_info(encrypted.info, self._curve)
        own = self._own_point()
        if parties is None or own is None:
            return False
        if self._recipient_point is None:
            return parties.recipient == own
        return {parties.sender, parties.recipient} == {own, self._recipient_point}

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        parties = _parse_info(encrypted.info, self._curve)
        assert parties is not None, "_matches() parsed it"
        peer_point = parties.sender if parties.recipient == self._own_point() else parties.recipient
        try:
            # Checks that the point lies on the curve: an invalid one would reveal the private key.
            peer = ec.EllipticCurvePublicKey.from_encoded_point(self._curve, peer_point)
        except ValueError as error:
            raise WrappedKeyError(
                f"{self.describe()}: a public key in the wrapped data key is not on {self._curve.name}: altered",
                key=self.describe(),
            ) from error
        return _unwrap(parties, self._agree(peer), context, encrypted.ciphertext, self.describe())


class RawEcdhKeyring(_EcdhKeyring):
    """Key agreement with a private key that the caller keeps.

    ``private_key`` with ``recipient`` is the static schema, without it discovery.
    """

    _provider = RAW_ECDH_PROVIDER

    def __init__(
        self, private_key: ec.EllipticCurvePrivateKey, recipient: ec.EllipticCurvePublicKey | None = None
    ) -> None:
        super().__init__(private_key.curve, recipient)
        self._private_key = private_key
        self._point = compress(private_key.public_key())

    @property
    def identity(self) -> Hashable:
        secret = self._private_key.private_numbers().private_value
        mark = fingerprint(secret.to_bytes((self._curve.key_size + 7) // 8, "big"))
        return (RAW_ECDH_PROVIDER, self._curve.name, mark, self._recipient_point)

    def describe(self) -> str:
        return f"ecdh: key {self._point.hex()[:16]}…"

    def _own_point(self) -> bytes:
        return self._point

    def _agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        return self._private_key.exchange(ec.ECDH(), peer)


class EphemeralEcdhKeyring(_EcdhKeyring):
    """Key agreement with a new sender key for every data key; the recipient alone decrypts."""

    _provider = RAW_ECDH_PROVIDER

    def __init__(self, recipient: ec.EllipticCurvePublicKey) -> None:
        super().__init__(recipient.curve, recipient)

    @property
    def identity(self) -> Hashable:
        return ("ephemeral-ecdh", self._curve.name, self._recipient_point)

    def describe(self) -> str:
        return "ecdh: ephemeral key"

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        return RawEcdhKeyring(ec.generate_private_key(self._curve), self._recipient).wrap(
            suite, context, data_key
        )

    def _own_point(self) -> None:
        return None


class KmsEcdhKeyring(_EcdhKeyring):
    """Key agreement by DeriveSharedSecret: the private key never leaves the KMS.

    ``key_id`` names our key; with ``recipient`` the schema is static, without it discovery.
    ``public_key`` is ours; without it GetPublicKey is asked, when the keyring is made.
    """

    _provider = KMS_ECDH_PROVIDER

    def __init__(
        self,
        client: Any,
        key_id: str,
        recipient: ec.EllipticCurvePublicKey | None = None,
        *,
        public_key: ec.EllipticCurvePublicKey | None = None,
        label: str | None = None,
        grant_tokens: tuple[str, ...] = (),
        stats: KmsStats | None = None,
    ) -> None:
        self._calls = client if isinstance(client, KmsCalls) else KmsCalls(client, stats=stats)
        self._key_id = key_id
        self._label = printable(label or key_id)
        self._grants: dict[str, Any] = {"GrantTokens": list(grant_tokens)} if grant_tokens else {}
        self._grant_tokens = grant_tokens
        if public_key is None:
            public_key = self._get_public_key()
        super().__init__(public_key.curve, recipient)
        self._point = compress(public_key)

    @property
    def identity(self) -> Hashable:
        mark = (self._key_id, self._point, self._recipient_point, self._grant_tokens)
        return (KMS_ECDH_PROVIDER, self._calls.identity, *mark)

    def describe(self) -> str:
        return self._label

    def _own_point(self) -> bytes:
        return self._point

    def _agree(self, peer: ec.EllipticCurvePublicKey) -> bytes:
        response = self._calls.call(
            "DeriveSharedSecret",
            self._label,
            KeyId=self._key_id,
            KeyAgreementAlgorithm="ECDH",
            PublicKey=peer.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            **self._grants,
        )
        self._check_key(response, "DeriveSharedSecret")
        shared = require_bytes(response, "SharedSecret", self._label, "DeriveSharedSecret")
        if len(shared) != (self._curve.key_size + 7) // 8:
            raise IntegrityError(
                f"{self._label}: KMS's shared secret has a wrong length; the answer is refused"
            )
        return shared

    def _get_public_key(self) -> ec.EllipticCurvePublicKey:
        response = self._calls.call("GetPublicKey", self._label, KeyId=self._key_id, **self._grants)
        self._check_key(response, "GetPublicKey")
        public_key = require_public_key(response, self._label)
        if (
            not isinstance(public_key, ec.EllipticCurvePublicKey)
            or response.get("KeyUsage") != "KEY_AGREEMENT"
        ):
            raise KeyAccessError(
                f"{self._label}: not a key for key agreement; make one with kms create-key "
                "--key-spec ECC_NIST_P384 --key-usage KEY_AGREEMENT",
                key=self._label,
            )
        return public_key

    def _check_key(self, response: Mapping[str, Any], operation: str) -> None:
        answered = str(response.get("KeyId"))
        if ":key/" in self._key_id:
            fits = answered == self._key_id
        elif "alias/" in self._key_id:
            fits = ":key/" in answered
        else:
            fits = answered.endswith(f":key/{self._key_id}")
        if not fits:
            raise IntegrityError(
                f"{self._label}: KMS answered {operation} for another key; the answer is refused"
            )
