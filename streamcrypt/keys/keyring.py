"""Keyrings: what wraps a data key for a message, and unwraps it again.

    generate    a new data key, wrapped            the first key of a message
    wrap        an existing data key, wrapped      every further key of it
    unwrap      the data key of a message          walks the wrapped keys, takes the first that opens

Every wrapped key of one message holds the same data key.  A keyring skips what it did not wrap,
collects the errors of what fails, and raises them all when nothing opened.  A data key whose
length is not the suite's is never returned.

Source: AWS Encryption SDK specification, framework/keyring-interface.md and multi-keyring.md.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, NoReturn

from streamcrypt.errors import (
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    StreamcryptError,
    WrappedKeyError,
)
from streamcrypt.hygiene import forget_variables
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import AlgorithmSuite

KMS_PROVIDER: Final = "aws-kms"
KMS_RSA_PROVIDER: Final = "aws-kms-rsa"
KMS_ECDH_PROVIDER: Final = "aws-kms-ecdh"
HIERARCHY_PROVIDER: Final = "aws-kms-hierarchy"
RAW_ECDH_PROVIDER: Final = "raw-ecdh"
RESERVED_PROVIDERS: Final = frozenset(
    (KMS_PROVIDER, KMS_RSA_PROVIDER, KMS_ECDH_PROVIDER, HIERARCHY_PROVIDER, RAW_ECDH_PROVIDER)
)


class KeyHolder:
    """Base of everything that holds a key: it is neither pickled nor copied."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} holds keys or access to keys; it is neither pickled nor copied"
        )


class DataKey(KeyHolder, bytes):
    """A plaintext data key: bytes that are not shown, in a log or among the variables of a traceback."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<data key>"

    __str__ = __repr__


class NoMatchingKeyError(WrappedKeyError):
    """None of the wrapped keys was made for this keyring, or what says so was altered; nothing was tried."""


class Keyring(KeyHolder, abc.ABC):
    """One way to wrap data keys.  Safe to use from many threads.

    A subclass has ``wrap``, and to unwrap either ``_matches`` with ``_open`` or a whole ``unwrap``.
    """

    #: True where a wrapped key that does not open yields a random data key instead of an error, so
    #: that the failure shows only when the header does not authenticate (PKCS#1 v1.5, raw.py).
    fails_silently: bool = False

    @property
    def identity(self) -> Hashable:
        """What a cache takes to be the same keyring; by default this object alone.

        Two keyrings of one identity wrap with the same keys under the same rights.
        """
        return self

    def describe(self) -> str:
        """The keyring for people: which key it is."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"

    def generate(
        self, suite: AlgorithmSuite, context: Mapping[str, str]
    ) -> tuple[bytes, tuple[EncryptedDataKey, ...]]:
        """A new data key of the suite's length, and that key wrapped."""
        data_key = DataKey(os.urandom(suite.key_length))
        return data_key, self.wrap(suite, context, data_key)

    @abc.abstractmethod
    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        """``data_key`` wrapped, bound to ``context`` where the kind of keyring can do that."""

    def unwrap(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
    ) -> bytes:
        """The data key, of the suite's length.

        KeyAccessError when a key could not be used, WrappedKeyError when a wrapped key was altered,
        KeyUnavailableError when a retry may help.
        """
        failures: list[StreamcryptError] = []
        for encrypted in encrypted_data_keys:
            if not self._matches(encrypted):
                continue
            try:
                data_key = DataKey(self._open(suite, context, encrypted))
                check_length(suite, data_key, self.describe())
            except StreamcryptError as error:
                forget_variables(error)
                failures.append(error)
            else:
                return data_key
        raise none_opened(encrypted_data_keys, failures)

    def kms_key_arns(self) -> tuple[str, ...]:
        """The KMS keys that it opens with: for wrapped keys that do not name theirs (s3client.py)."""
        return ()

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        """Whether this wrapped key was made for this keyring, as far as its provider and info say."""
        raise NotImplementedError

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        """The data key of one wrapped key that matches, or a StreamcryptError."""
        raise NotImplementedError


class MultiKeyring(Keyring):
    """Several keyrings as one: the generator makes the data key, everyone wraps it, anyone opens it.

    A failure of any of them to wrap fails the whole.  Without a generator it only opens.
    """

    def __init__(self, generator: Keyring | None, children: Sequence[Keyring] = ()) -> None:
        if generator is None and not children:
            raise ValueError("a multi-keyring needs at least one keyring")
        self._generator = generator
        self._children = tuple(children)
        keyrings = ((generator,) if generator is not None else ()) + self._children
        # Keyrings that fail silently come last: a damaged wrapped key of theirs must neither hide a
        # good one of another keyring nor let the outcome tell whether it was well-formed.
        self._openers = tuple(sorted(keyrings, key=lambda keyring: keyring.fails_silently))
        self.fails_silently = any(keyring.fails_silently for keyring in keyrings)

    def kms_key_arns(self) -> tuple[str, ...]:
        return tuple(arn for keyring in self._openers for arn in keyring.kms_key_arns())

    @property
    def identity(self) -> Hashable:
        generator = self._generator.identity if self._generator is not None else None
        return ("multi", generator, *(child.identity for child in self._children))

    def describe(self) -> str:
        return ", ".join(keyring.describe() for keyring in self._openers)

    def generate(
        self, suite: AlgorithmSuite, context: Mapping[str, str]
    ) -> tuple[bytes, tuple[EncryptedDataKey, ...]]:
        if self._generator is None:
            raise KeyAccessError("these keys only decrypt; encrypting needs a key that makes data keys")
        data_key, encrypted = self._generator.generate(suite, context)
        for child in self._children:
            encrypted += child.wrap(suite, context, data_key)
        return data_key, encrypted

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        if self._generator is None:
            raise KeyAccessError("these keys only decrypt; encrypting needs a key that wraps data keys")
        encrypted = self._generator.wrap(suite, context, data_key)
        for child in self._children:
            encrypted += child.wrap(suite, context, data_key)
        return encrypted

    def unwrap(
        self,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted_data_keys: Sequence[EncryptedDataKey],
    ) -> bytes:
        failures: list[StreamcryptError] = []
        for keyring in self._openers:
            try:
                return keyring.unwrap(suite, context, encrypted_data_keys)
            except NoMatchingKeyError:
                continue
            except StreamcryptError as error:
                failures.append(error)
        raise none_opened(encrypted_data_keys, failures)


def check_length(suite: AlgorithmSuite, data_key: bytes, key: str) -> None:
    """IntegrityError unless ``data_key`` has the suite's length (the derivation depends on it)."""
    if len(data_key) != suite.key_length:
        raise IntegrityError(f"{key}: the data key has not the length that suite {suite.name} needs")


def none_opened(
    encrypted_data_keys: Sequence[EncryptedDataKey], failures: Sequence[StreamcryptError]
) -> StreamcryptError:
    """The one error for a message whose wrapped keys all failed.

    A lone failure speaks for itself.  Of several, the class is that of the most hopeful one: worth a
    retry, then a key that could not be used, then damage.
    """
    count = len(encrypted_data_keys)
    keys = (
        f"none of its {count} encrypted data keys opened"
        if count != 1
        else "its encrypted data key did not open"
    )
    if not failures:
        wrapped_by = ", ".join(dict.fromkeys(describe_wrapped_key(key) for key in encrypted_data_keys[:10]))
        return NoMatchingKeyError(
            f"{keys}: wrapped by {wrapped_by or 'nothing'}, and the given keys are others; "
            "give the key that wrapped it (--key; for rekey --from-key)"
        )
    if len(failures) == 1:
        return failures[0]
    leading = min(failures, key=_rank)
    details: dict[str, Any] = {}
    if isinstance(leading, KeyAccessError):
        details = {"code": leading.code, "operation": leading.operation, "key": leading.key}
    error = type(leading)(f"{keys}: " + "; ".join(dict.fromkeys(map(str, failures))), **details)
    error.__cause__ = leading
    return error


def _rank(error: StreamcryptError) -> int:
    if isinstance(error, KeyUnavailableError):
        return 0
    return 2 if isinstance(error, IntegrityError) else 1


def describe_wrapped_key(encrypted: EncryptedDataKey) -> str:
    """Who wrapped it, for an error message.  The bytes come from an unauthenticated message."""
    provider, info = printable(encrypted.provider_id), encrypted.info
    if provider == KMS_PROVIDER:
        return f"KMS key {printable(info)}"
    if provider == KMS_RSA_PROVIDER:
        return f"KMS RSA key kms-rsa:{printable(info)}"
    if provider == HIERARCHY_PROVIDER:
        return f"branch key {printable(info)}"
    if provider in (RAW_ECDH_PROVIDER, KMS_ECDH_PROVIDER):
        return f"key agreement ({provider})"
    # The info of a raw AES key ends in lengths and IV, 20 bytes that begin with 128 as u32.
    if len(info) > 20 and info[-20:-12] == b"\0\0\0\x80\0\0\0\x0c":
        return f"raw AES key {provider}/{printable(info[:-20])}"
    return f"raw key {provider}/{printable(info)}"


def printable(text: str | bytes, limit: int = 200) -> str:
    """Text from a message, safe on a terminal: control characters escaped, length bounded."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if len(text) <= limit and text.isprintable():  # the usual name: this is asked of every message
        return text
    shown = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit]
    )
    return shown + "…" if len(text) > limit else shown
