"""The header of a message: what it says, its bytes, and the tag that authenticates it.

    version 1   01 80 | suite 2 | message id 16 | context | keys | content type 1 | 00000000 | 0C | frame length 4
    version 2   02    | suite 2 | message id 32 | context | keys | content type 1 | frame length 4 | commitment 32
    context     length u16 | serialized pairs (context.py)
    keys        count u16 | for each: provider id, provider info, ciphertext, each with a u16 length before it
    then        version 1: IV 12 | tag 16       version 2: tag 16, under an all-zero IV

The tag is AES-GCM over an empty plaintext; its AAD is the body exactly as it stands, so the raw
bytes are kept and never serialized again.  A version 2 header has no IV of its own: never seal two
different headers under one content key (specification reference, section 12).

Source: AWS Encryption SDK specification, data-format/message-header.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NoReturn, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from streamcrypt.errors import FormatError, IntegrityError, LimitExceededError
from streamcrypt.message.context import parse_context, serialize_context
from streamcrypt.message.suites import COMMITMENT_LENGTH, IV_LENGTH, TAG_LENGTH, AlgorithmSuite, suite_by_id
from streamcrypt.tuples import NamedTuple

Buffer: TypeAlias = bytes | bytearray | memoryview

DEFAULT_MAX_ENCRYPTED_DATA_KEYS: Final = 10
# No header of the format's own limits need be longer for ten wrapped keys; with the limit lifted it
# keeps a hostile header (65,535 keys of 196 kB) from being read into memory.
MAX_HEADER_LENGTH: Final = 16 * 2**20

_ZERO_IV: Final = bytes(IV_LENGTH)
_NOT_AUTHENTIC: Final = "the header did not authenticate: it was altered"
_V1_TYPE: Final = 0x80
_UNFRAMED: Final = 1
_FRAMED: Final = 2

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class HeaderCutShortError(FormatError):
    """The buffer ends before the header does; ``needed`` is the least length that could hold it."""

    def __init__(self, needed: int) -> None:
        super().__init__("the message ends within its header: it is truncated")
        self.needed = needed


class EncryptedDataKey(NamedTuple):
    """A data key as one keyring wrapped it."""

    provider_id: str
    info: bytes
    ciphertext: bytes

    def serialize(self) -> bytes:
        """The three strings, each with its length; LimitExceededError above 65,535 bytes."""
        parts: list[bytes] = []
        for field in (self.provider_id.encode(), self.info, self.ciphertext):
            if len(field) > 0xFFFF:
                raise LimitExceededError("a field of an encrypted data key exceeds 65,535 bytes")
            parts += (_U16.pack(len(field)), field)
        return b"".join(parts)


class Header(NamedTuple):
    """What a header says.  ``context`` holds the pairs that are stored in the message.

    ``frame_length`` is in bytes of plaintext, 0 for unframed content; ``commitment`` is empty for
    suites that do not commit; ``body`` is the header up to its authentication, as it stands.
    """

    suite: AlgorithmSuite
    message_id: bytes
    context: Mapping[str, str]
    encrypted_data_keys: tuple[EncryptedDataKey, ...]
    framed: bool
    frame_length: int
    commitment: bytes
    body: bytes
    iv: bytes
    tag: bytes

    @property
    def length(self) -> int:
        """Bytes in the message, authentication included."""
        return len(self.body) + (len(self.iv) if self.suite.version == 1 else 0) + len(self.tag)

    def serialize(self) -> bytes:
        return self.body + (self.iv if self.suite.version == 1 else b"") + self.tag


class _Fields:
    """Reads fields off a buffer; every length is checked against what is there before it is used."""

    __slots__ = ("buffer", "end", "position")

    def __init__(self, buffer: Buffer) -> None:
        # A slice of bytes is bytes already.
        self.buffer = buffer if isinstance(buffer, bytes) else memoryview(buffer)
        self.end = len(buffer)
        self.position = 0

    def take(self, length: int) -> bytes:
        start = self.position
        self.position = start + length
        if self.position > self.end:
            if self.position > MAX_HEADER_LENGTH:
                raise LimitExceededError(f"the header exceeds {MAX_HEADER_LENGTH} bytes")
            raise HeaderCutShortError(self.position)
        return bytes(self.buffer[start : self.position])

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "big")

    def counted(self) -> bytes:
        position = self.position
        if position + 2 > self.end:
            self.take(2)  # says what is wrong
        self.position = position + 2
        return self.take(_U16.unpack_from(self.buffer, position)[0])


def parse_header(
    buffer: Buffer, *, max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS
) -> tuple[Header, int]:
    """The header at the start of ``buffer``, and how many bytes it takes.

    Nothing of it is authenticated yet.  Raises HeaderCutShortError when the buffer ends first,
    FormatError when this is not a message or not its one encoding, and LimitExceededError, before
    any wrapped key is parsed, when there are more of them than ``max_encrypted_data_keys``.
    """
    fields = _Fields(buffer)
    version = fields.number(1)
    if version not in (1, 2):
        _refuse_start(buffer)
    if version == 1 and fields.number(1) != _V1_TYPE:
        _refuse_start(buffer)
    suite = suite_by_id(fields.number(2))
    if suite.version != version:
        raise FormatError(f"algorithm suite {suite.name} does not belong to message version {version}")
    message_id = fields.take(suite.message_id_length)
    context = parse_context(fields.counted())
    encrypted_data_keys = _parse_encrypted_data_keys(fields, max_encrypted_data_keys)
    content_type = fields.number(1)
    if content_type not in (_UNFRAMED, _FRAMED):
        raise FormatError(f"unknown content type {content_type}")
    if version == 1:
        if fields.number(4) != 0:
            raise FormatError("the header's reserved field is not zero")
        if fields.number(1) != IV_LENGTH:
            raise FormatError("the header's IV length is not 12")
    frame_length = fields.number(4)
    if (frame_length == 0) != (content_type == _UNFRAMED):
        raise FormatError(f"frame length {frame_length} does not go with content type {content_type}")
    commitment = fields.take(COMMITMENT_LENGTH) if suite.committing else b""
    body = bytes(fields.buffer[: fields.position])
    iv = fields.take(IV_LENGTH) if version == 1 else _ZERO_IV
    tag = fields.take(TAG_LENGTH)
    header = Header(
        suite, message_id, context, encrypted_data_keys,
        content_type == _FRAMED, frame_length, commitment, body, iv, tag,
    )  # fmt: skip
    return header, fields.position


def parse_alike(known: Header, buffer: Buffer) -> Header | None:
    """The header at the start of ``buffer`` if it is ``known`` but for message id, commitment and tag; else None.

    So are those of a tree's messages, and comparing them takes a fraction of parsing them.  Whatever limit
    ``known`` was parsed under holds for this one too.
    """
    suite, stop = known.suite, len(known.body)
    if not suite.committing or len(buffer) < stop + TAG_LENGTH:
        return None
    body = bytes(buffer[:stop])
    start, shared, commitment = 3, 3 + suite.message_id_length, stop - COMMITMENT_LENGTH
    if body[:start] != known.body[:start] or body[shared:commitment] != known.body[shared:commitment]:
        return None
    return Header(
        suite, body[start:shared], known.context, known.encrypted_data_keys,
        known.framed, known.frame_length, body[commitment:], body, known.iv,
        bytes(buffer[stop : stop + TAG_LENGTH]),
    )  # fmt: skip


def _parse_encrypted_data_keys(fields: _Fields, limit: int | None) -> tuple[EncryptedDataKey, ...]:
    count = fields.number(2)
    if count == 0:
        raise FormatError("the message has no encrypted data key")
    if limit is not None and count > limit:
        raise LimitExceededError(
            f"the message has {count} encrypted data keys, the limit is {limit}; "
            "raise max_encrypted_data_keys if you expect that many"
        )
    keys = []
    for _ in range(count):
        try:
            provider_id = fields.counted().decode()
        except UnicodeDecodeError:
            raise FormatError("the provider id of an encrypted data key is not UTF-8") from None
        keys.append(EncryptedDataKey(provider_id, fields.counted(), fields.counted()))
    return tuple(keys)


def _refuse_start(buffer: Buffer) -> NoReturn:
    start = bytes(buffer[:4])
    if start[:2] == b"AY" or start in (b"AgR4", b"AgV4"):
        raise FormatError("this is Base64 text, not a message; decode it first", recognised=False)
    raise FormatError("not a message of the AWS Encryption SDK", recognised=False)


class HeaderTemplate:
    """All of a header but its message id, commitment and tag: serialized once for many messages.

    ``stored_context`` are the pairs that the header holds.  ``authenticated_context`` are pairs that
    its tag covers but the message does not hold: a reader must supply them.
    """

    def __init__(
        self,
        suite: AlgorithmSuite,
        stored_context: Mapping[str, str],
        encrypted_data_keys: tuple[EncryptedDataKey, ...],
        frame_length: int,
        authenticated_context: Mapping[str, str] | None = None,
    ) -> None:
        if not suite.committing:
            raise ValueError(f"messages of suite {suite.name} are read, never written")
        context = serialize_context(stored_context)
        if not 0 < len(encrypted_data_keys) <= 0xFFFF:
            raise LimitExceededError(
                f"{len(encrypted_data_keys)} encrypted data keys; the format takes 1 to 65,535"
            )
        self.suite = suite
        self._start = b"\x02" + suite.id_bytes
        self._middle = b"".join(
            (
                _U16.pack(len(context)),
                context,
                _U16.pack(len(encrypted_data_keys)),
                *(key.serialize() for key in encrypted_data_keys),
                bytes((_FRAMED,)),
                _U32.pack(frame_length),
            )
        )
        self._unstored = serialize_context(authenticated_context or {})

    @classmethod
    def of(cls, header: Header, authenticated_context: Mapping[str, str]) -> HeaderTemplate:
        """The template of a header that was read, as it stands."""
        made = cls.__new__(cls)
        start, end = 3 + header.suite.message_id_length, len(header.body) - COMMITMENT_LENGTH
        made.suite = header.suite
        made._start, made._middle = header.body[:3], header.body[start:end]
        made._unstored = serialize_context(authenticated_context)
        return made

    @property
    def length(self) -> int:
        """Bytes of every header made from this template, authentication included."""
        return (
            len(self._start)
            + self.suite.message_id_length
            + len(self._middle)
            + COMMITMENT_LENGTH
            + TAG_LENGTH
        )

    def body(self, message_id: bytes, commitment: bytes) -> bytes:
        """The header of one message without its tag."""
        return b"".join((self._start, message_id, self._middle, commitment))

    def seal(self, message_id: bytes, commitment: bytes, aead: AESGCM) -> bytes:
        """The header of one message, with its tag.  Once for a content key, never twice."""
        body = self.body(message_id, commitment)
        return body + aead.encrypt(_ZERO_IV, b"", body + self._unstored)

    def authenticate(self, header: bytes, aead: AESGCM) -> None:
        """Check the tag at the end of a header that is of this template; IntegrityError when it does not hold."""
        try:
            aead.decrypt(_ZERO_IV, header[-TAG_LENGTH:], header[:-TAG_LENGTH] + self._unstored)
        except InvalidTag:
            raise IntegrityError(_NOT_AUTHENTIC) from None


def authenticate_header(
    header: Header, aead: AESGCM, authenticated_context: Mapping[str, str] | None = None
) -> None:
    """Check the header's tag; IntegrityError when the header, or a pair supplied to it, is not the writer's."""
    unstored = serialize_context(authenticated_context or {})
    try:
        aead.decrypt(header.iv, header.tag, header.body + unstored)
    except InvalidTag:
        raise IntegrityError(_NOT_AUTHENTIC) from None
