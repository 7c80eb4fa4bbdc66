"""KMS keyrings: data keys made, wrapped and unwrapped by a key that never leaves the KMS.

    aws-kms        info  key ARN as KMS returned it      ciphertext  CiphertextBlob
    aws-kms-rsa    info  key ARN as configured           ciphertext  RSA-OAEP(SHA-384(context) ‖ data key)

Every Decrypt names the key that is expected, and an answer for another key, or with a data key of
another length, is refused: otherwise a message could choose which key it is opened with.

Source: AWS Encryption SDK specification, framework/aws-kms/aws-kms-*.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives import hashes

from streamcrypt.errors import IntegrityError, KeyAccessError, WrappedKeyError
from streamcrypt.keys.calls import KmsCalls, KmsStats, require_bytes, require_public_key
from streamcrypt.keys.keyring import (
    KMS_PROVIDER,
    KMS_RSA_PROVIDER,
    DataKey,
    Keyring,
    printable,
)
from streamcrypt.message.context import serialize_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import AlgorithmSuite
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

__all__ = ["KeyArn", "KmsCalls", "KmsDiscoveryKeyring", "KmsKeyring", "KmsRsaKeyring", "KmsStats"]

_MULTI_REGION_PREFIX: Final = "mrk-"


class KeyArn(NamedTuple):
    """An ARN of a KMS key or alias, in its parts."""

    partition: str
    service: str
    region: str
    account: str
    kind: str
    id: str

    @classmethod
    def parse(cls, text: str) -> KeyArn:
        """The parts of ``text``, or ValueError: six parts, none empty, type ``key`` or ``alias``."""
        parts = text.split(":", 5)
        kind, slash, name = parts[-1].partition("/")
        if (
            len(parts) != 6
            or parts[0] != "arn"
            or parts[2] != "kms"
            or not all(parts)
            or kind not in ("key", "alias")
            or not slash
            or not name
        ):
            raise ValueError(f"{printable(text)!r} is not the ARN of a KMS key or alias")
        return cls(parts[1], parts[2], parts[3], parts[4], kind, name)

    def __str__(self) -> str:
        return f"arn:{self.partition}:{self.service}:{self.region}:{self.account}:{self.kind}/{self.id}"

    @property
    def multi_region(self) -> bool:
        return self.kind == "key" and self.id.startswith(_MULTI_REGION_PREFIX)

    def matches_multi_region(self, other: KeyArn) -> bool:
        """Whether both are one key: equal, or replicas of one multi-Region key."""
        if self == other:
            return True
        return self.multi_region and other.multi_region and self._replace(region=other.region) == other


def is_multi_region(key_id: str) -> bool:
    """Whether an identifier (ARN or bare key ID) is that of a multi-Region key; an alias never is."""
    if key_id.startswith("arn:"):
        return KeyArn.parse(key_id).multi_region
    return key_id.startswith(_MULTI_REGION_PREFIX)


def wrapped_by(encrypted: EncryptedDataKey) -> KeyArn:
    """The key ARN in the info of an ``aws-kms`` wrapped key.

    IntegrityError for anything else: the specification lets the whole operation fail then.
    """
    try:
        arn = KeyArn.parse(encrypted.info.decode())
    except ValueError:
        arn = None
    if arn is None or arn.kind != "key":
        raise IntegrityError(f"a wrapped data key names no KMS key ARN: {printable(encrypted.info)}")
    return arn


class _SymmetricKms(Keyring):
    """What the strict and the discovery keyring share: one Decrypt."""

    def __init__(self, grant_tokens: Sequence[str]) -> None:
        self._grants: dict[str, Any] = {"GrantTokens": list(grant_tokens)} if grant_tokens else {}
        self._grant_tokens = tuple(grant_tokens)

    def _decrypt(
        self,
        calls: KmsCalls,
        key_arn: str,
        suite: AlgorithmSuite,
        context: Mapping[str, str],
        encrypted: EncryptedDataKey,
    ) -> bytes:
        response = calls.call(
            "Decrypt",
            key_arn,
            KeyId=key_arn,
            CiphertextBlob=encrypted.ciphertext,
            EncryptionContext=dict(context),
            **self._grants,
        )
        return _checked_data_key(response, "Decrypt", key_arn, suite)


def _checked_data_key(
    response: Mapping[str, Any], operation: str, key_arn: str, suite: AlgorithmSuite
) -> bytes:
    if response.get("KeyId") != key_arn:
        raise IntegrityError(f"{key_arn}: KMS answered {operation} for another key; the answer is refused")
    data_key = DataKey(require_bytes(response, "Plaintext", key_arn, operation))
    if len(data_key) != suite.key_length:
        raise IntegrityError(
            f"{key_arn}: KMS answered {operation} with a data key of {len(data_key)} bytes where suite "
            f"{suite.name} needs {suite.key_length}; the answer is refused"
        )
    return data_key


class KmsKeyring(_SymmetricKms):
    """Wraps and unwraps with one symmetric KMS key.

    ``client`` is a boto3 KMS client, the embedded KMS's Service, or a KmsCalls.  ``key_id`` may be
    any identifier to encrypt.  To decrypt, the wrapped key's ARN must equal it, so an alias or bare
    key ID decrypts nothing, unless ``resolve`` lets DescribeKey say which key it means now.
    ``multi_region``: replicas of a multi-Region key count as the same key (MRK-aware keyring).
    ``label`` names the key in errors (default: the identifier).
    """

    def __init__(
        self,
        client: Any,
        key_id: str,
        *,
        grant_tokens: Sequence[str] = (),
        multi_region: bool = False,
        resolve: bool = False,
        label: str | None = None,
        stats: KmsStats | None = None,
    ) -> None:
        super().__init__(grant_tokens)
        if not key_id:
            raise ValueError("a KMS key needs an identifier")
        self._calls = client if isinstance(client, KmsCalls) else KmsCalls(client, stats=stats)
        self._key_id = key_id
        self._label = printable(label or key_id)
        self._configured = KeyArn.parse(key_id) if key_id.startswith("arn:") else None
        self._multi_region = multi_region
        self._resolve = resolve
        known = self._configured is not None and self._configured.kind == "key"
        self._arn: KeyArn | None = self._configured if known else None

    @property
    def identity(self) -> Hashable:
        options = (self._grant_tokens, self._multi_region, self._resolve)
        return (KMS_PROVIDER, self._calls.identity, self._key_id, *options)

    def describe(self) -> str:
        return self._label

    @property
    def key_id(self) -> str:
        """The identifier as configured."""
        return self._key_id

    def key_arn(self) -> str:
        """The key's ARN; asks DescribeKey, once, where the identifier is another form."""
        if self._arn is None:
            response = self._calls.call("DescribeKey", self.describe(), KeyId=self._key_id)
            try:
                arn = KeyArn.parse(str(response["KeyMetadata"]["Arn"]))
            except (KeyError, TypeError, ValueError) as error:
                raise IntegrityError(
                    f"{self.describe()}: KMS's answer to DescribeKey names no key ARN"
                ) from error
            self._arn = arn
        return str(self._arn)

    def kms_key_arns(self) -> tuple[str, ...]:
        return (self.key_arn(),)

    def generate(
        self, suite: AlgorithmSuite, context: Mapping[str, str]
    ) -> tuple[bytes, tuple[EncryptedDataKey, ...]]:
        response = self._calls.call(
            "GenerateDataKey",
            self.describe(),
            KeyId=self._key_id,
            NumberOfBytes=suite.key_length,
            EncryptionContext=dict(context),
            **self._grants,
        )
        arn = self._answering_key(response, "GenerateDataKey")
        data_key = _checked_data_key(response, "GenerateDataKey", arn, suite)
        blob = require_bytes(response, "CiphertextBlob", arn, "GenerateDataKey")
        return data_key, (EncryptedDataKey(KMS_PROVIDER, arn.encode(), blob),)

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        response = self._calls.call(
            "Encrypt",
            self.describe(),
            KeyId=self._key_id,
            Plaintext=data_key,
            EncryptionContext=dict(context),
            **self._grants,
        )
        arn = self._answering_key(response, "Encrypt")
        blob = require_bytes(response, "CiphertextBlob", arn, "Encrypt")
        return (EncryptedDataKey(KMS_PROVIDER, arn.encode(), blob),)

    def _answering_key(self, response: Mapping[str, Any], operation: str) -> str:
        """The ARN of the key that KMS says it used; IntegrityError unless it can be the one asked for."""
        try:
            arn = KeyArn.parse(str(response.get("KeyId")))
        except ValueError:
            arn = None
        asked = self._configured
        fits = arn is not None and arn.kind == "key"
        if fits and asked is not None:
            if asked.kind == "key":
                fits = arn == asked
            else:  # an alias stands for a key of its own partition, region and account
                fits = arn == asked._replace(kind="key", id=arn.id if arn is not None else "")
        elif fits and arn is not None and not self._key_id.startswith("alias/"):
            fits = arn.id == self._key_id
        if not fits:
            raise IntegrityError(
                f"{self.describe()}: KMS answered {operation} for another key; the answer is refused"
            )
        return str(arn)

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        if encrypted.provider_id != KMS_PROVIDER:
            return False
        arn = wrapped_by(encrypted)
        if self._arn is None and self._resolve:
            self.key_arn()
        if self._arn is None:
            return False
        return arn.matches_multi_region(self._arn) if self._multi_region else arn == self._arn

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        # For a replica this is our own ARN, not the message's.
        return self._decrypt(self._calls, self.key_arn(), suite, context, encrypted)


class KmsDiscoveryKeyring(_SymmetricKms):
    """Opens what any KMS key wrapped that the caller may use; it cannot encrypt.

    ``client`` is a client, or a function from the wrapped key's KeyArn to the KmsCalls that reach its
    KMS (None: not reachable, skip).  Only keys of ``partition`` and ``accounts`` are tried where
    these are given.  With ``multi_region``, a multi-Region key is asked for in the client's own
    region and a single-Region key of another region is skipped (MRK-aware discovery).

    Whoever can write a message chooses which key is asked for.  A filter keeps that to known accounts.
    """

    def __init__(
        self,
        client: Any,
        *,
        partition: str | None = None,
        accounts: Collection[str] = (),
        multi_region: bool = False,
        grant_tokens: Sequence[str] = (),
        stats: KmsStats | None = None,
        identity: Hashable = None,
    ) -> None:
        super().__init__(grant_tokens)
        if (partition is None) != (not accounts):
            raise ValueError("a discovery filter names one partition and at least one account")
        self._reach: Callable[[KeyArn], KmsCalls | None]
        if isinstance(client, KmsCalls) or hasattr(client, "decrypt"):
            calls = client if isinstance(client, KmsCalls) else KmsCalls(client, stats=stats)
            self._reach = lambda arn: calls
            identity = calls.identity
        else:
            self._reach = client
        self._client_identity: Hashable = identity if identity is not None else self._reach
        self._partition = partition
        self._accounts = frozenset(accounts)
        self._multi_region = multi_region

    @property
    def identity(self) -> Hashable:
        filters = (self._partition, self._accounts, self._multi_region, self._grant_tokens)
        return ("aws-kms-discovery", self._client_identity, *filters)

    def describe(self) -> str:
        if not self._accounts:
            return "any KMS key that the message names"
        return f"KMS keys of {self._partition} accounts {', '.join(sorted(self._accounts))}"

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        raise KeyAccessError("discovery finds keys to decrypt with; name the key to encrypt with")

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        if encrypted.provider_id != KMS_PROVIDER:
            return False
        arn = wrapped_by(encrypted)
        if self._partition is not None and arn.partition != self._partition:
            return False
        if self._accounts and arn.account not in self._accounts:
            return False
        calls = self._reach(arn)
        if calls is None:
            return False
        return not self._multi_region or arn.multi_region or arn.region == calls.region

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        arn = wrapped_by(encrypted)
        calls = self._reach(arn)
        assert calls is not None, "_matches() reached it"
        if self._multi_region and arn.multi_region:
            arn = arn._replace(region=calls.region)
        return self._decrypt(calls, str(arn), suite, context, encrypted)


KMS_RSA_ALGORITHMS: Final = {"oaep-sha1": "RSAES_OAEP_SHA_1", "oaep-sha256": "RSAES_OAEP_SHA_256"}
_CONTEXT_DIGEST_LENGTH: Final = 48
_LEAST_RSA_BITS: Final = 2048


class KmsRsaKeyring(Keyring):
    """Wraps offline with the public half of an RSA KMS key; KMS unwraps with the private half.

    So a key of another account can be encrypted to without any call or permission.  ``key_arn`` must
    be the key's ARN.  The context is bound by its SHA-384 digest beside the data key.  Signed suites
    are refused, as the specification asks.  Without ``public_key`` GetPublicKey is asked, once;
    without ``client`` nothing is decrypted.
    """

    def __init__(
        self,
        key_arn: str,
        *,
        public_key: RSAPublicKey | None = None,
        client: Any = None,
        padding: str = "oaep-sha256",
        grant_tokens: Sequence[str] = (),
        stats: KmsStats | None = None,
    ) -> None:
        if KeyArn.parse(key_arn).kind != "key":
            raise ValueError("a KMS RSA keyring needs a key ARN: an alias is not allowed in the message")
        if padding not in KMS_RSA_ALGORITHMS:
            raise ValueError(f"KMS RSA keys wrap with oaep-sha1 or oaep-sha256, not {padding!r}")
        if public_key is None and client is None:
            raise ValueError("a KMS RSA keyring needs a public key, a client, or both")
        if public_key is not None and public_key.key_size < _LEAST_RSA_BITS:
            raise ValueError(
                f"an RSA key of a KMS has at least {_LEAST_RSA_BITS} bits; this public key has {public_key.key_size}"
            )
        self._key_arn = key_arn
        self._public_key = public_key
        self._calls = (
            client if isinstance(client, KmsCalls) or client is None else KmsCalls(client, stats=stats)
        )
        self._padding = padding
        self._grant_tokens = tuple(grant_tokens)

    @property
    def identity(self) -> Hashable:
        numbers = self._public_key.public_numbers() if self._public_key is not None else None
        modulus = numbers.n if numbers is not None else None
        client = self._calls.identity if self._calls is not None else None
        return (KMS_RSA_PROVIDER, client, self._key_arn, modulus, self._padding, self._grant_tokens)

    def describe(self) -> str:
        return printable(self._key_arn)

    def wrap(
        self, suite: AlgorithmSuite, context: Mapping[str, str], data_key: bytes
    ) -> tuple[EncryptedDataKey, ...]:
        self._refuse_signed(suite)
        payload = _context_digest(context) + data_key
        from streamcrypt.keys.raw import RSA_PADDINGS

        ciphertext = self._load_public_key().encrypt(payload, RSA_PADDINGS[self._padding])
        return (EncryptedDataKey(KMS_RSA_PROVIDER, self._key_arn.encode(), ciphertext),)

    def _load_public_key(self) -> RSAPublicKey:
        if self._public_key is None:
            assert self._calls is not None, "checked by __init__"
            response = self._calls.call("GetPublicKey", self._key_arn, KeyId=self._key_arn)
            if response.get("KeyId") != self._key_arn:
                raise IntegrityError(f"{self._key_arn}: KMS answered GetPublicKey for another key; refused")

            public_key = require_public_key(response, self._key_arn)
            from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

            if not isinstance(public_key, RSAPublicKey):
                raise KeyAccessError(f"{self._key_arn}: not an RSA key", key=self._key_arn)
            self._public_key = public_key
        return self._public_key

    def _matches(self, encrypted: EncryptedDataKey) -> bool:
        return encrypted.provider_id == KMS_RSA_PROVIDER and encrypted.info == self._key_arn.encode()

    def _open(self, suite: AlgorithmSuite, context: Mapping[str, str], encrypted: EncryptedDataKey) -> bytes:
        self._refuse_signed(suite)
        if self._calls is None:
            raise KeyAccessError(
                f"{self._key_arn}: only the public key is given, which cannot unwrap", key=self._key_arn
            )
        grants = {"GrantTokens": list(self._grant_tokens)} if self._grant_tokens else {}
        response = self._calls.call(
            "Decrypt",
            self._key_arn,
            KeyId=self._key_arn,
            CiphertextBlob=encrypted.ciphertext,
            EncryptionAlgorithm=KMS_RSA_ALGORITHMS[self._padding],
            **grants,
        )
        if response.get("KeyId") != self._key_arn:
            raise IntegrityError(f"{self._key_arn}: KMS answered Decrypt for another key; refused")
        payload = require_bytes(response, "Plaintext", self._key_arn, "Decrypt")
        digest, data_key = payload[:_CONTEXT_DIGEST_LENGTH], payload[_CONTEXT_DIGEST_LENGTH:]
        from cryptography.hazmat.primitives.constant_time import bytes_eq

        if not bytes_eq(digest, _context_digest(context)):
            raise WrappedKeyError(
                f"{self._key_arn}: the encryption context is not the one under which the data key was wrapped",
                key=self._key_arn,
            )
        return data_key

    @staticmethod
    def _refuse_signed(suite: AlgorithmSuite) -> None:
        if suite.signed:
            raise KeyAccessError(
                f"KMS RSA keys do not serve signed suites such as {suite.name}; leave out --sign"
            )


def _context_digest(context: Mapping[str, str]) -> bytes:
    digest = hashes.Hash(hashes.SHA384())
    digest.update(serialize_context(context))
    return digest.finalize()
