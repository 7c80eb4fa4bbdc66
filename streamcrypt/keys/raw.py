"""Raw keyrings: a wrapping key that the caller keeps, without any key service.

    raw AES    info  name ‖ tag bits u32 = 128 ‖ IV length u32 = 12 ‖ IV 12
               ciphertext  AES-GCM(wrapping key, IV, data key, AAD = encryption context)
    raw RSA    info  name
               ciphertext  RSA(data key), PKCS#1 v1.5 or OAEP; the context is not bound

The IV of raw AES is random: NIST SP 800-38D allows 2^32 wraps under one wrapping key.

PKCS#1 v1.5 must not become an oracle (D. Bleichenbacher, CRYPTO 1998): whether a wrapped key was
well-formed must not show in the outcome.  The library answers a malformed one with random bytes
(implicit rejection, draft-irtf-cfrg-rsa-guidance); we answer a wrong length the same way, so that
either fails alike where the header does not authenticate.

Source: AWS Encryption SDK specification, framework/raw-aes-keyring.md and raw-rsa-keyring.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Hashable, Mapping, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding as asymmetric_padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC

from streamcrypt.errors import KeyAccessError, WrappedKeyError
from streamcrypt.keys.keyring import RESERVED_PROVIDERS, DataKey, Keyring, none_opened, printable
from streamcrypt.message.context import serialize_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import IV_LENGTH, TAG_LENGTH, AlgorithmSuite

AES_KEY_LENGTHS: Final = (16, 24, 32)
MIN_RSA_BITS: Final = 2048

_LENGTHS: Final = struct.pack(">II", 8 * TAG_LENGTH, IV_LENGTH)
_INFO_TAIL: Final = len(_LENGTHS) + IV_LENGTH

_FINGERPRINT_KEY: Final = os.urandom(32)


def fingerprint(key: bytes) -> bytes:
    """A name of ``key`` that is the same all through this process and says nothing about the key."""
    mac = HMAC(_FINGERPRINT_KEY, hashes.SHA256())
    mac.update(key)
    return mac.finalize()


def _check_name(namespace: str, name: str) -> None:
    if not namespace or not name:
        raise ValueError("a raw key needs a namespace and a name, as NAMESPACE/NAME")
    if namespace in RESERVED_PROVIDERS:
        raise ValueError(f"key namespace {namespace!r} is reserved by the message format; choose another")
    if len(namespace.encode()) > 0xFFFF or len(name.encode()) > 0xFFFF - _INFO_TAIL:
        raise ValueError("key namespace and name are each at most 65,515 bytes")


class RawAesKeyring(Keyring):
    """Wraps with AES-GCM under a 128-, 192- or 256-bit wrapping key; the context is authenticated."""

    def __init__(self, namespace: str, name: str, wrapping_key: bytes) -> None:
        _check_name(namespace, name)
        if len(wrapping_key) not in AES_KEY_LENGTHS:
            raise ValueError(f"an AES wrapping key has 16, 24 or 32 bytes, not {len(wrapping_key)}")
        self._namespace = namespace
        self._name = name
        self._info_head = name.encode() + _LENGTHS
        self._cipher = AESGCM(wrapping_key)
        self._fingerprint = fingerprint(wrapping_key)

    @property
    def identity(self) -> Hashable:
        return ("raw-aes", self._namespace, self._name, self._fingerprint)

    def describe(self) -> str:
        return f"raw-aes:{printable(self._namespace)}/{printable(self._name)}"

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        iv = os.urandom(IV_LENGTH)
        ciphertext = self._cipher.encrypt(iv, data_key, serialize_context(context))
        return (EncryptedDataKey(self._namespace, self._info_head + iv, ciphertext),)

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        return (
            encrypted.provider_id == self._namespace
            and len(encrypted.info) == len(self._info_head) + IV_LENGTH
            and encrypted.info.startswith(self._info_head)
        )

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        iv = encrypted.info[-IV_LENGTH:]
        try:
            return self._cipher.decrypt(iv, encrypted.ciphertext, serialize_context(context))
        except InvalidTag as error:
            raise WrappedKeyError(
                f"{self.describe()}: the wrapped data key does not open; "
                "this is another key of that name, or the message or its encryption context was altered",
                key=self.describe(),
            ) from error


def _oaep(hash_algorithm: hashes.HashAlgorithm) -> asymmetric_padding.AsymmetricPadding:
    return asymmetric_padding.OAEP(asymmetric_padding.MGF1(hash_algorithm), hash_algorithm, None)


RSA_PADDINGS: Final[dict[str, asymmetric_padding.AsymmetricPadding]] = {
    "pkcs1": asymmetric_padding.PKCS1v15(),
    "oaep-sha1": _oaep(hashes.SHA1()),  # noqa: S303 - the format has it; OAEP does not need collision resistance
    "oaep-sha256": _oaep(hashes.SHA256()),
    "oaep-sha384": _oaep(hashes.SHA384()),
    "oaep-sha512": _oaep(hashes.SHA512()),
}
DEFAULT_RSA_PADDING: Final = "oaep-sha256"


class RawRsaKeyring(Keyring):
    """Wraps with an RSA public key, unwraps with the private one.

    The public key comes from the private one where only that is given.  The encryption context is
    not bound to the wrapped key, only to the message's header.
    """

    def __init__(
        self,
        namespace: str,
        name: str,
        *,
        public_key: RSAPublicKey | None = None,
        private_key: RSAPrivateKey | None = None,
        padding: str = DEFAULT_RSA_PADDING,
    ) -> None:
        _check_name(namespace, name)
        if padding not in RSA_PADDINGS:
            raise ValueError(f"RSA padding {padding!r} is unknown; write one of {', '.join(RSA_PADDINGS)}")
        if public_key is None:
            if private_key is None:
                raise ValueError("a raw RSA keyring needs a public or a private key")
            public_key = private_key.public_key()
        if public_key.key_size < MIN_RSA_BITS:
            raise ValueError(
                f"an RSA wrapping key has at least {MIN_RSA_BITS} bits, not {public_key.key_size}"
            )
        self._namespace = namespace
        self._name = name
        self._info = name.encode()
        self._padding_name = padding
        self._padding = RSA_PADDINGS[padding]
        self._public_key = public_key
        self._private_key = private_key
        self.fails_silently = padding == "pkcs1"

    @property
    def identity(self) -> Hashable:
        numbers = self._public_key.public_numbers()
        may_open = self._private_key is not None
        return ("raw-rsa", self._namespace, self._name, numbers.n, numbers.e, self._padding_name, may_open)

    def describe(self) -> str:
        return f"raw-rsa:{printable(self._namespace)}/{printable(self._name)}"

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        try:
            ciphertext = self._public_key.encrypt(data_key, self._padding)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyAccessError(
                f"{self.describe()}: this RSA key cannot wrap with {self._padding_name}: {error}",
                key=self.describe(),
            ) from error
        return (EncryptedDataKey(self._namespace, self._info, ciphertext),)

    def unwrap(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
    ) -> bytes:
        if not self.fails_silently:
            return super().unwrap(suite, context, encrypted_data_keys)
        matching = [encrypted for encrypted in encrypted_data_keys if self._matches(encrypted)]
        if not matching:
            raise none_opened(encrypted_data_keys, [])
        private_key = self._need_private_key()
        # Every one is opened and all must agree: if a bad one were skipped for a good one, success
        # would say which of them was well-formed.
        found: set[bytes] = set()
        for encrypted in matching:
            try:
                found.add(private_key.decrypt(encrypted.ciphertext, self._padding))
            except ValueError:  # the length of the ciphertext is wrong, which anyone can see
                found.add(b"")
        data_key = found.pop()
        if found or len(data_key) != suite.key_length:
            return DataKey(os.urandom(suite.key_length))
        return DataKey(data_key)

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        return encrypted.provider_id == self._namespace and encrypted.info == self._info

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        try:
            return self._need_private_key().decrypt(encrypted.ciphertext, self._padding)
        except ValueError as error:
            raise WrappedKeyError(
                f"{self.describe()}: the wrapped data key does not open; it was altered, "
                f"or wrapped for another key or with another padding than {self._padding_name}",
                key=self.describe(),
            ) from error

    def _need_private_key(self) -> RSAPrivateKey:
        if self._private_key is None:
            raise KeyAccessError(
                f"{self.describe()}: only the public key is given, which cannot unwrap; give the private key",
                key=self.describe(),
            )
        return self._private_key
