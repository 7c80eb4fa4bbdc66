"""Objects that the Amazon S3 Encryption Client wrote; they are read, never written.

    V2    AES-256-GCM under the data key itself, the IV in the metadata; does not commit to its key
    V3    AES-256-GCM under a key that HKDF derives from data key and message id; commits to its key

What opens an object stands in its metadata or, in part or whole, in an object beside it that is called
``KEY.instruction``.  The data key is wrapped by KMS under the encryption context (``kms+context``).

An object has one tag, over all of it: nothing of it is given out before all of it has been read and
the tag has been verified.  A short one is kept in memory meanwhile.  Of a long one, whose store may
give out other bytes the next time, a SHA-256 of each MiB is kept; a range is then read again, held
against its hashes, and decrypted in counter mode, which is what GCM does between its tags.  So memory
is bounded, 32 bytes a MiB, and no plaintext comes to lie anywhere.

Source: awslabs/aws-encryption-sdk-specification, s3-encryption/: data-format/content-metadata.md and
metadata-strategy.md (what stands where), key-derivation.md (V3), decryption.md (ranges in counter mode),
materials/s3-kms-keyring.md; NIST SP 800-38D, section 7 (the counter).
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from streamcrypt.errors import (
    ContextMismatchError,
    FormatError,
    IntegrityError,
    KeyAccessError,
    LimitExceededError,
    SourceError,
)
from streamcrypt.keys.keyring import KMS_PROVIDER, KeyHolder
from streamcrypt.keys.materials import Materials
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import MAX_UNFRAMED_LENGTH, TAG_LENGTH, UNSIGNED, CommitmentPolicy
from streamcrypt.storage import Source
from streamcrypt.stores import StoreTree
from streamcrypt.streams import DecryptingFile, ReadingRules, read_bytes, source_header
from streamcrypt.tuples import NamedTuple

_BLOCK: Final = 2**20
# Objects up to this are read once.
_KEPT_LENGTH: Final = 8 * 2**20

INSTRUCTION_SUFFIX: Final = ".instruction"
_MAX_INSTRUCTIONS: Final = 64 * 2**10

# content-metadata.md#content-metadata-mapkeys.  What tells the versions apart is their wrapped key.
_V1_KEY, _V2_KEY, _V3_KEY = "x-amz-key", "x-amz-key-v2", "x-amz-3"
_WRAPPED_KEYS: Final = frozenset((_V1_KEY, _V2_KEY, _V3_KEY))
_V2_CONTENT: Final = frozenset(
    ("x-amz-iv", "x-amz-cek-alg", "x-amz-tag-len", "x-amz-wrap-alg", "x-amz-matdesc")
)
_V3_CONTENT: Final = frozenset(("x-amz-c", "x-amz-d", "x-amz-i"))
_V3_WRAPPING: Final = frozenset(("x-amz-w", "x-amz-m", "x-amz-t"))
_MARKS: Final = frozenset(("x-amz-crypto-instr-file", "x-amz-unencrypted-content-length"))
_NAMES: Final = _WRAPPED_KEYS | _V2_CONTENT | _V3_CONTENT | _V3_WRAPPING | _MARKS

_GCM: Final = "AES/GCM/NoPadding"
_COMMITTING_GCM: Final = "115"  # ALG_AES_256_GCM_HKDF_SHA512_COMMIT_KEY, 0x0073
_SUITE_ID: Final = b"\x00\x73"
_V3_IV: Final = b"\x01" * 12
_MESSAGE_ID_LENGTH: Final = 28
_COMMITMENT_LENGTH: Final = 28
# The pair of the context that binds the content's algorithm to the wrapped data key.
_ALGORITHM_PAIR: Final = "aws:x-amz-cek-alg"


class Envelope(NamedTuple):
    """What an object says of how it was encrypted; nothing of it is authenticated."""

    version: int
    wrapped_key: bytes
    context: Mapping[str, str]
    iv: bytes
    message_id: bytes = b""
    commitment: bytes = b""

    @property
    def algorithm(self) -> str:
        return "AES-256-GCM, HKDF-SHA-512" if self.committing else "AES-256-GCM"

    @property
    def committing(self) -> bool:
        return self.version == 3


class ClientObject:
    """An object of the client, recognised but not opened.  ``size`` is its plaintext's, in bytes."""

    def __init__(self, source: Source, path: str, envelope: Envelope) -> None:
        self.path = path
        self.envelope = envelope
        self.source = source
        self.size = source.size - TAG_LENGTH
        if not 0 <= self.size <= MAX_UNFRAMED_LENGTH:
            raise IntegrityError(f"{path}: its length is none that AES-GCM gives: it is truncated or damaged")

    def close(self) -> None:
        self.source.close()

    def unlock(self, materials: Materials, rules: ReadingRules) -> OpenedObject:
        """Check the rules, unwrap the data key, compare the commitment, then authenticate all of the object.

        IntegrityError where something does not authenticate, KeyAccessError where no key can be used.
        """
        envelope = self.envelope
        self._check(rules)
        algorithm = _COMMITTING_GCM if envelope.committing else _GCM
        if envelope.context.get(_ALGORITHM_PAIR) != algorithm:
            raise IntegrityError(
                f"its encryption context binds the data key to another algorithm than {algorithm}: altered"
            )
        arns = materials.kms_key_arns()
        if not arns:
            raise KeyAccessError(
                "objects of the S3 Encryption Client do not name their key: name the KMS key to open them with"
            )
        wrapped = [EncryptedDataKey(KMS_PROVIDER, arn.encode(), envelope.wrapped_key) for arn in arns]
        data_key = materials.for_decryption(UNSIGNED, envelope.context, wrapped).data_key
        if not envelope.committing:
            return OpenedObject(self.source, self.size, data_key, envelope.iv, b"")
        # The commitment comes first: decryption.md#decrypting-with-commitment.
        commitment = _derive(data_key, envelope.message_id, b"COMMITKEY", _COMMITMENT_LENGTH)
        if not hmac.compare_digest(commitment, envelope.commitment):
            raise IntegrityError("the key commitment does not fit the data key: the object was altered")
        content_key = _derive(data_key, envelope.message_id, b"DERIVEKEY", 32)
        return OpenedObject(self.source, self.size, content_key, envelope.iv, _SUITE_ID)

    def _check(self, rules: ReadingRules) -> None:
        """Refuse an object by what it says, before any key is asked for."""
        if rules.require_signed:
            raise IntegrityError("the object is not signed and a signature is required")
        if rules.commitment_policy is not CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT and (
            not self.envelope.committing
        ):
            raise IntegrityError(
                "the object (S3 Encryption Client, format V2) does not commit to its data key and the commitment "
                "policy requires that; if you trust where it comes from, allow it with commitment policy "
                "require-encrypt-allow-decrypt"
            )
        # All of the context is stored in this format: a pair that is only authenticated cannot be in it.
        for name, value in {**rules.authenticated_context, **rules.context}.items():
            if self.envelope.context.get(name) != value:
                raise ContextMismatchError(
                    f"the object's encryption context does not hold the pair {name}={value}; "
                    "`streamcrypt inspect` shows what it holds"
                )


class OpenedObject(KeyHolder):
    """The plaintext of an object, all of which was authenticated when this was made.  One thread at a time."""

    def __init__(
        self, source: Source, size: int, content_key: bytes, iv: bytes, associated_data: bytes
    ) -> None:
        self.size = size
        self._source = source
        self._key = algorithms.AES256(content_key)
        self._iv = iv
        self._kept = bytearray()
        self._digests: list[bytes] = []
        self._block = memoryview(bytearray(min(_BLOCK, max(size, 1))))
        self._plaintext = memoryview(bytearray(len(self._block)))
        self._open_index = -1
        self._authenticate(associated_data)

    def chunks(self) -> Iterator[memoryview]:
        """The plaintext in order; a chunk's memory is reused for the next one."""
        for index in range(-(-self.size // _BLOCK)):
            yield self._open(index)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the plaintext from ``start`` on, which must lie within the object."""
        done = 0
        while done < len(view):
            index, within = divmod(start + done, _BLOCK)
            part = self._open(index)[within : within + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def _authenticate(self, associated_data: bytes) -> None:
        tag = bytes(read_bytes(self._source, self.size, TAG_LENGTH))
        # What is decrypted here is dropped: only the tag counts.
        decryptor = Cipher(self._key, modes.GCM(self._iv, tag)).decryptor()
        decryptor.authenticate_additional_data(associated_data)
        dropped = bytearray(len(self._block) + 15)
        for index in range(-(-self.size // _BLOCK)):
            block = self._read(index)
            decryptor.update_into(block, dropped)
            if self.size <= _KEPT_LENGTH:
                self._kept += block
            else:
                self._digests.append(_digest(block))
        try:
            decryptor.finalize()
        except InvalidTag:
            raise IntegrityError("the object did not authenticate: it was altered or truncated") from None

    def _open(self, index: int) -> memoryview:
        start = index * _BLOCK
        length = min(_BLOCK, self.size - start)
        if index != self._open_index:
            self._open_index = -1
            if self._kept:
                block = memoryview(self._kept)[start : start + length]
            else:
                block = self._read(index)
                if not hmac.compare_digest(_digest(block), self._digests[index]):
                    raise IntegrityError("the object is another one than was authenticated a moment ago")
            # The first block of a GCM plaintext has counter 2 (SP 800-38D, 7.1 with a 96-bit IV).
            counter = (2 + start // 16).to_bytes(4, "big")
            decryptor = Cipher(self._key, modes.CTR(self._iv + counter)).decryptor()
            decryptor.update_into(block, self._plaintext)
            self._open_index = index
        return self._plaintext[:length]

    def _read(self, index: int) -> memoryview:
        start = index * _BLOCK
        block = self._block[: min(_BLOCK, self.size - start)]
        if self._source.read_at(start, block) < len(block):
            raise IntegrityError("the object ends before its tag: it was truncated")
        return block


class ClientFile(DecryptingFile):
    """The plaintext of an object as a read-only file that seeks; what ``sc.open`` returns for it.

    All of the object was read and authenticated when it was opened.  It has no ``header``; ``context``
    is its encryption context.
    """

    def __init__(
        self, found: ClientObject, materials: Materials, rules: ReadingRules, *, name: str = ""
    ) -> None:
        io.BufferedIOBase.__init__(self)
        self.name = name
        self.size = found.size
        self.context = dict(found.envelope.context)
        self._source = found.source
        self._lock = threading.Lock()
        self._position = 0
        self._reader = None
        try:
            self._object = found.unlock(materials, rules)
        except BaseException:
            found.close()
            self._source_closed = True
            raise

    def verify_signature(self) -> None:
        raise IntegrityError("objects of the S3 Encryption Client are not signed")

    def _fill(self, offset: int, view: memoryview) -> None:
        if len(view):
            self._object.read_into(offset, view)


def find(tree: StoreTree, name: str) -> ClientObject | None:
    """The object, when it is no message and it says, or an instruction file does, that the client wrote it.

    IntegrityError when what it says is of a kind that is not read, or contradicts itself.
    """
    source = tree.open(name)
    found: ClientObject | None = None
    try:
        path = tree.path(name)
        if _is_message(source):
            return None
        said = {key: value for key, value in source.metadata.items() if key in _NAMES}
        try:
            if _WRAPPED_KEYS.isdisjoint(said):
                instructions = _instructions(tree, name)
                if instructions is None:
                    if said.keys() >= _V3_CONTENT:
                        raise IntegrityError("the instruction file with its wrapped data key is missing")
                    return None
                said = _joined(said, instructions)
            found = ClientObject(source, path, parse_envelope(said))
        except IntegrityError as error:
            raise IntegrityError(f"{path}: {error}") from error
        return found
    finally:
        if found is None:
            source.close()


def _is_message(source: Source) -> bool:
    try:
        source_header(source, max_encrypted_data_keys=None)
    except (FormatError, LimitExceededError):
        return False
    return True


def _instructions(tree: StoreTree, name: str) -> dict[str, Any] | None:
    """What the instruction file of an object holds; None when there is none, or it is none of the client's."""
    try:
        source = tree.open(name + INSTRUCTION_SUFFIX)
    except SourceError:
        return None
    try:
        if source.size > _MAX_INSTRUCTIONS:
            return None
        found = json.loads(read_bytes(source, 0, source.size))
    except ValueError:
        return None
    finally:
        source.close()
    return found if isinstance(found, dict) and found.keys() <= _NAMES else None


def _joined(said: Mapping[str, Any], instructions: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata and instruction file together: in V2 all stands in the file, in V3 what wraps the key.

    metadata-strategy.md#v1v2-instruction-files and #v3-instruction-files.  Any other distribution is one
    that only somebody makes who wants an object to be read as what it is not.
    """
    in_metadata = _V3_CONTENT if _V3_KEY in instructions else frozenset()
    if said.keys() - _MARKS != in_metadata or instructions.keys() & _V3_CONTENT:
        raise IntegrityError("its metadata and its instruction file do not belong together: altered")
    return {**instructions, **said}


def parse_envelope(said: Mapping[str, Any]) -> Envelope:
    """The envelope from metadata and instructions; IntegrityError when it is not one that is read.

    content-metadata.md#determining-s3ec-object-status.
    """
    kinds = _WRAPPED_KEYS & said.keys()
    if len(kinds) != 1:
        raise IntegrityError(
            "its metadata holds keys of several formats of the S3 Encryption Client: altered"
        )
    if kinds == {_V1_KEY} or said.get("x-amz-cek-alg") == "AES/CBC/PKCS5Padding":
        raise IntegrityError(
            "was written by an old S3 Encryption Client in CBC mode, which authenticates nothing: it is not read"
        )
    if kinds == {_V2_KEY}:
        if said.keys() & (_V3_CONTENT | _V3_WRAPPING):
            raise IntegrityError(
                "its metadata holds keys of several formats of the S3 Encryption Client: altered"
            )
        _expect(said, "x-amz-cek-alg", _GCM)
        _expect(said, "x-amz-wrap-alg", "kms+context")
        if said.get("x-amz-tag-len", "128") != "128":
            raise IntegrityError("its metadata states a tag that is not of 128 bits")
        return Envelope(
            2, _base64(said, _V2_KEY), _context(said, "x-amz-matdesc"), _base64(said, "x-amz-iv", len(_V3_IV))
        )
    if said.keys() & _V2_CONTENT:
        raise IntegrityError(
            "its metadata holds keys of several formats of the S3 Encryption Client: altered"
        )
    _expect(said, "x-amz-c", _COMMITTING_GCM)
    _expect(said, "x-amz-w", "12", "kms+context")
    return Envelope(
        3,
        _base64(said, _V3_KEY),
        _context(said, "x-amz-t"),
        _V3_IV,
        _base64(said, "x-amz-i", _MESSAGE_ID_LENGTH),
        _base64(said, "x-amz-d", _COMMITMENT_LENGTH),
    )


def _expect(said: Mapping[str, Any], name: str, *values: str) -> None:
    if said.get(name) not in values:
        raise IntegrityError(
            f"was written by the S3 Encryption Client in a way that is not read: {name} is {said.get(name)!r}, "
            f"{values[0]!r} is read"
        )


def _base64(said: Mapping[str, Any], name: str, length: int | None = None) -> bytes:
    try:
        value = base64.b64decode(said.get(name) or "", validate=True)
    except (ValueError, TypeError):
        value = b""
    if not value or length not in (None, len(value)):
        raise IntegrityError(f"its metadata holds no proper value of {name}: damaged or altered")
    return value


def _context(said: Mapping[str, Any], name: str) -> dict[str, str]:
    context = said.get(name, "{}")
    try:
        if isinstance(context, str):
            context = json.loads(context)
    except ValueError:
        context = None
    if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
        raise IntegrityError(f"its metadata holds no proper encryption context in {name}: damaged or altered")
    return context


def _derive(data_key: bytes, message_id: bytes, purpose: bytes, length: int) -> bytes:
    """key-derivation.md#hkdf-operation."""
    return HKDF(hashes.SHA512(), length, salt=message_id, info=_SUITE_ID + purpose).derive(data_key)


def _digest(data: memoryview) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize()
