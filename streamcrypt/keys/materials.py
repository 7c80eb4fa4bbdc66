"""Materials: what one message is made with, or read with.

A signed message has a key pair of its own (or of its cached data key).  The public half stands in
the encryption context as ``aws-crypto-public-key``, the compressed point in Base64, from before the
data key is wrapped: so it is bound to every wrapped key, and no other key can sign for the message.

Source: AWS Encryption SDK specification, framework/default-cmm.md and caching-cmm.md.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from streamcrypt.errors import IntegrityError, LimitExceededError, StreamcryptError
from streamcrypt.hygiene import forget_variables, lock
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.keyring import KeyHolder, Keyring
from streamcrypt.message.context import PUBLIC_KEY_NAME, check_caller_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import AlgorithmSuite

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

DEFAULT_MAX_ENCRYPTED_DATA_KEYS = 10


class EncryptionMaterials(KeyHolder):
    """What a message is written with; shared by all messages of one cached data key.

    ``context`` is the full map under which the data key is wrapped, read-only.
    """

    __slots__ = ("context", "data_key", "encrypted_data_keys", "signing_key", "suite")

    def __init__(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: tuple[EncryptedDataKey, ...],
        data_key: bytes,
        signing_key: ec.EllipticCurvePrivateKey | None = None,
    ) -> None:
        self.suite = suite
        self.context = context
        self.encrypted_data_keys = encrypted_data_keys
        self.data_key = data_key
        self.signing_key = signing_key


class DecryptionMaterials(KeyHolder):
    """What a message is read with."""

    __slots__ = ("context", "data_key", "suite", "verification_key")

    def __init__(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        data_key: bytes,
        verification_key: ec.EllipticCurvePublicKey | None = None,
    ) -> None:
        self.suite = suite
        self.context = context
        self.data_key = data_key
        self.verification_key = verification_key


class Materials:
    """Materials from a keyring, through a cache where one is given.

    At most ``max_encrypted_data_keys`` wrapped keys are written to a message or accepted from one
    (None: no limit): each one that looks like ours costs a call to the key service.
    """

    def __init__(
        self,
        keyring: Keyring,
        *,
        cache: DataKeyCache | None = None,
        max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    ) -> None:
        if max_encrypted_data_keys is not None and max_encrypted_data_keys < 1:
            raise ValueError("max_encrypted_data_keys is at least 1")
        self._keyring = keyring
        self._identity: Hashable = keyring.identity
        self._cache = cache
        self._max_encrypted_data_keys = max_encrypted_data_keys

    def for_encryption(
        self, suite: AlgorithmSuite, context: Mapping[str, str], plaintext_length: int | None
    ) -> EncryptionMaterials:
        """Materials for one message of ``plaintext_length`` bytes (None: unknown, never cached).

        ValueError for a context with a reserved name; KeyAccessError and its family from the keyring.
        """
        cache = self._cache
        # Without a derivation the data key is the content key, and a second message under it would
        # repeat key and IV.
        if cache is None or suite.kdf_hash is None:
            return self._new_materials(suite, context)
        return cache.encryption(
            (self._identity, suite.id, frozenset(context.items())),
            plaintext_length,
            lambda: self._new_materials(suite, context),
        )

    def for_encryption_of_several(
        self, suite: AlgorithmSuite, context: Mapping[str, str], plaintext_lengths: Sequence[int]
    ) -> tuple[EncryptionMaterials, int]:
        """Materials for as many of these messages, from the first on, as may share them; and their number."""
        cache = self._cache
        if cache is None or suite.kdf_hash is None:
            return self._new_materials(suite, context), 1
        return cache.encryption_of_several(
            (self._identity, suite.id, frozenset(context.items())),
            plaintext_lengths,
            lambda: self._new_materials(suite, context),
        )

    def for_decryption(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
    ) -> DecryptionMaterials:
        """Materials for a message with these wrapped keys.

        ``context`` is the whole one: the stored pairs and those that are authenticated only.
        IntegrityError where suite and public key contradict each other, LimitExceededError for too
        many wrapped keys; both before any key is used.
        """
        self._check_count(len(encrypted_data_keys))
        cache = self._cache
        if cache is None or suite.kdf_hash is None:
            return self._open_materials(suite, context, encrypted_data_keys)
        return cache.decryption(
            (self._identity, suite.id, frozenset(context.items()), tuple(encrypted_data_keys)),
            lambda: self._open_materials(suite, context, encrypted_data_keys),
        )

    def for_decryption_of_several(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
        count: int,
    ) -> tuple[DecryptionMaterials, int]:
        """The same for as many of so many messages with these wrapped keys as may share it; and their number."""
        cache = self._cache
        if cache is None or suite.kdf_hash is None:
            return self.for_decryption(suite, context, encrypted_data_keys), 1
        self._check_count(len(encrypted_data_keys))
        materials = cache.decryption_of_several(
            (self._identity, suite.id, frozenset(context.items()), tuple(encrypted_data_keys)),
            lambda: self._open_materials(suite, context, encrypted_data_keys),
            count,
        )
        return materials, count

    def kms_key_arns(self) -> tuple[str, ...]:
        """The KMS keys that open messages here, as far as they are named; none for discovery."""
        return self._keyring.kms_key_arns()

    def describe(self) -> str:
        """The keys for people: which they are."""
        return self._keyring.describe()

    def _new_materials(self, suite: AlgorithmSuite, context: Mapping[str, str]) -> EncryptionMaterials:
        full = check_caller_context(context)
        signing_key = None
        if suite.curve is not None:
            from cryptography.hazmat.primitives.asymmetric import ec

            signing_key = ec.generate_private_key(suite.curve)
            full[PUBLIC_KEY_NAME] = encode_public_key(signing_key.public_key())
        try:
            data_key, encrypted = self._keyring.generate(suite, full)
        except StreamcryptError as error:
            forget_variables(error)
            raise
        lock(data_key)
        self._check_count(len(encrypted))
        return EncryptionMaterials(suite, MappingProxyType(full), encrypted, data_key, signing_key)

    def _open_materials(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
    ) -> DecryptionMaterials:
        full = dict(context)
        verification_key = read_public_key(suite, full)
        data_key = self._keyring.unwrap(suite, full, encrypted_data_keys)
        lock(data_key)
        return DecryptionMaterials(suite, MappingProxyType(full), data_key, verification_key)

    def _check_count(self, count: int) -> None:
        if self._max_encrypted_data_keys is not None and count > self._max_encrypted_data_keys:
            raise LimitExceededError(
                f"{count} encrypted data keys in one message; the limit is {self._max_encrypted_data_keys} "
                "(--max-encrypted-data-keys)"
            )


def encode_public_key(public_key: ec.EllipticCurvePublicKey) -> str:
    """The value of ``aws-crypto-public-key``: Base64 of the compressed SEC 1 point."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    point = public_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return base64.b64encode(point).decode()


def read_public_key(suite: AlgorithmSuite, context: Mapping[str, str]) -> ec.EllipticCurvePublicKey | None:
    """The key that the footer must verify with: None for unsigned suites.

    IntegrityError when a signed suite has no public key in its context, an unsigned one has one, or
    it is not a compressed point of the suite's curve.
    """
    encoded = context.get(PUBLIC_KEY_NAME)
    curve = suite.curve
    if curve is None:
        if encoded is not None:
            raise IntegrityError(
                f"suite {suite.name} is unsigned, yet the encryption context holds a public key: altered"
            )
        return None
    if encoded is None:
        raise IntegrityError(
            f"suite {suite.name} is signed, but the encryption context holds no public key: altered"
        )
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        point = base64.b64decode(encoded, validate=True)
        if len(point) != 1 + (curve.key_size + 7) // 8:
            raise ValueError("not a compressed point of this curve")
        return ec.EllipticCurvePublicKey.from_encoded_point(curve, point)
    except (ValueError, binascii.Error) as error:
        raise IntegrityError(
            f"the public key in the encryption context is not a compressed point on {curve.name}"
        ) from error
