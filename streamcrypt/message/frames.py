"""Frames: the body of a message, in pieces that are sealed one by one.

    regular   sequence u32 | IV 12 | ciphertext F | tag 16
    final     ffffffff | sequence u32 | IV 12 | length u32 | ciphertext n <= F | tag 16
    unframed  IV 12 | length u64 | ciphertext | tag 16                                    (read only)

The IV is the sequence number.  That is safe only because derive.py makes a new key for every
message: never seal two bodies under one content key.

Each frame's AAD is message id ‖ label ‖ sequence u32 ‖ plaintext length u64; the label tells regular,
final and unframed apart.  So a frame cannot move, change its kind, or come from another message, and
a body that lacks its final frame is not whole.  Frames are counted from 0 here (an index); the
sequence number in the message is the index plus one.

Source: AWS Encryption SDK specification, data-format/message-body.md and message-body-aad.md;
NIST SP 800-38D section 8.2.1 (deterministic IVs).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from streamcrypt.errors import FormatError, IntegrityError, LimitExceededError
from streamcrypt.message.footer import FOOTER_LENGTH, MAX_FOOTER_LENGTH
from streamcrypt.message.header import Buffer, Header
from streamcrypt.message.suites import (
    IV_LENGTH,
    MAX_FRAMES,
    MAX_UNFRAMED_LENGTH,
    MAX_WRITTEN_FRAME_LENGTH,
    TAG_LENGTH,
)
from streamcrypt.tuples import NamedTuple

REGULAR_PREFIX: Final = 4 + IV_LENGTH
FINAL_PREFIX: Final = 4 + 4 + IV_LENGTH + 4
UNFRAMED_PREFIX: Final = IV_LENGTH + 8
REGULAR_OVERHEAD: Final = REGULAR_PREFIX + TAG_LENGTH
FINAL_OVERHEAD: Final = FINAL_PREFIX + TAG_LENGTH
UNFRAMED_OVERHEAD: Final = UNFRAMED_PREFIX + TAG_LENGTH
FINAL_MARK: Final = b"\xff\xff\xff\xff"

_REGULAR_LABEL: Final = b"AWSKMSEncryptionClient Frame"
_FINAL_LABEL: Final = b"AWSKMSEncryptionClient Final Frame"
_UNFRAMED_LABEL: Final = b"AWSKMSEncryptionClient Single Block"

_AAD_END = struct.Struct(">IQ")
_IV = struct.Struct(">QI")
_REGULAR_HEAD = struct.Struct(">IQI")
_FINAL_HEAD = struct.Struct(">IIQII")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Geometry(NamedTuple):
    """Where every frame of one framed message lies.  All lengths and offsets are in bytes.

    ``regular_frames`` frames of ``frame_length`` are followed by one final frame of
    ``final_length``; ``footer_length`` is 0 for unsigned messages.  Taken from a message, it is
    unauthenticated until the final frame has been opened: that frame's tag binds its number and
    its length, and so the size of the whole.
    """

    header_length: int
    frame_length: int
    regular_frames: int
    final_length: int
    footer_length: int = 0

    @classmethod
    def for_plaintext(
        cls, header_length: int, frame_length: int, plaintext_length: int, *, signed: bool = False
    ) -> Geometry:
        """The geometry that we write; LimitExceededError where the format has no room for it.

        The final frame is empty when the plaintext is a whole number of frames (or nothing), as a
        writer that does not know the length in advance must make it; a reader accepts a full one too.
        """
        if not 1 <= frame_length <= MAX_WRITTEN_FRAME_LENGTH:
            raise LimitExceededError(
                f"frame length {frame_length}: it must be 1 to {MAX_WRITTEN_FRAME_LENGTH} bytes"
            )
        regular_frames, final_length = divmod(plaintext_length, frame_length)
        if regular_frames + 1 > MAX_FRAMES:
            raise LimitExceededError(
                f"{regular_frames + 1} frames of {frame_length} bytes; a message holds {MAX_FRAMES}: take longer frames"
            )
        return cls(header_length, frame_length, regular_frames, final_length, FOOTER_LENGTH if signed else 0)

    @classmethod
    def of_message(
        cls, header: Header, message_length: int, read_at: Callable[[int, int], Buffer] | None = None
    ) -> Geometry:
        """The geometry of an existing framed message of ``message_length`` bytes, by arithmetic.

        The footer's length of a signed message is not in its header, so the final frame is looked up
        with ``read_at(offset, length)``.  IntegrityError when no geometry fits: the message is
        truncated or damaged.
        """
        if not header.suite.signed:
            geometry = cls._fit(header, message_length)
            if geometry is None:
                raise IntegrityError(_NO_FIT)
            return geometry
        assert read_at is not None
        # Only a footer that a signature can have is considered; more than one candidate is left
        # only when frames are shorter than a footer.
        stride = header.frame_length + REGULAR_OVERHEAD
        room = message_length - header.length - FINAL_OVERHEAD
        least = max(0, -(-(room - header.frame_length - MAX_FOOTER_LENGTH) // stride))
        for regular_frames in range(least, room // stride + 1):
            offset = header.length + regular_frames * stride
            head = bytes(read_at(offset, FINAL_PREFIX))
            if len(head) < FINAL_PREFIX or head[:4] != FINAL_MARK:
                continue
            sequence, length = int.from_bytes(head[4:8], "big"), int.from_bytes(head[20:24], "big")
            footer_length = message_length - (offset + FINAL_OVERHEAD + length)
            if sequence != regular_frames + 1 or length > header.frame_length or footer_length < 2:
                continue
            stated = bytes(read_at(offset + FINAL_OVERHEAD + length, 2))
            if int.from_bytes(stated, "big") + 2 == footer_length:
                return cls(header.length, header.frame_length, regular_frames, length, footer_length)
        raise IntegrityError(_NO_FIT)

    @classmethod
    def _fit(cls, header: Header, message_length: int) -> Geometry | None:
        room = message_length - header.length - FINAL_OVERHEAD
        regular_frames, final_length = divmod(room, header.frame_length + REGULAR_OVERHEAD)
        if room < 0 or final_length > header.frame_length or regular_frames + 1 > MAX_FRAMES:
            return None
        return cls(header.length, header.frame_length, regular_frames, final_length)

    @property
    def frames(self) -> int:
        return self.regular_frames + 1

    @property
    def plaintext_length(self) -> int:
        return self.regular_frames * self.frame_length + self.final_length

    @property
    def body_end(self) -> int:
        """Offset of the first byte after the final frame."""
        return self.frame_offset(self.regular_frames) + FINAL_OVERHEAD + self.final_length

    @property
    def message_length(self) -> int:
        return self.body_end + self.footer_length

    def frame_offset(self, index: int) -> int:
        """Where frame ``index`` starts in the message."""
        return self.header_length + index * (self.frame_length + REGULAR_OVERHEAD)

    def frames_end(self, stop: int) -> int:
        """Where the frames before index ``stop`` end in the message."""
        return self.body_end if stop > self.regular_frames else self.frame_offset(stop)

    def plaintext_range(self, start: int, stop: int) -> tuple[int, int]:
        """The plaintext bytes that the frames ``start`` to ``stop`` (excluded) hold."""
        return start * self.frame_length, min(stop * self.frame_length, self.plaintext_length)

    def frames_covering(self, start: int, stop: int) -> tuple[int, int]:
        """The frames, as a half-open range, that hold the plaintext bytes ``start`` to ``stop`` (excluded)."""
        if start >= stop:
            return 0, 0
        # The last byte of a full final frame belongs to it, not to a frame that does not exist.
        return start // self.frame_length, min((stop - 1) // self.frame_length, self.regular_frames) + 1


_NO_FIT = "the length of the message fits no number of frames: it is truncated or damaged"


class FrameCipher:
    """Seals or opens the frames of one message under its content key.

    One object serves any number of threads; it holds the key only inside the cipher.
    """

    __slots__ = ("_final_aad", "_regular_aad", "_unframed_aad", "aead")

    def __init__(self, content_key: bytes, message_id: bytes) -> None:
        self.aead = AESGCM(content_key)
        self._regular_aad = message_id + _REGULAR_LABEL
        self._final_aad = message_id + _FINAL_LABEL
        self._unframed_aad = message_id + _UNFRAMED_LABEL

    def seal_regular(self, plaintext: Buffer, index: int, frame_length: int, frames: memoryview) -> int:
        """Seal all of ``plaintext``, a whole number of frames, the first of them frame ``index``.

        Writes into ``frames`` and returns how many bytes it wrote.
        """
        encrypt_into, aad = self.aead.encrypt_into, self._regular_aad
        pack_head, pack_aad = _REGULAR_HEAD.pack_into, _AAD_END.pack
        plaintext = memoryview(plaintext)
        stride = frame_length + REGULAR_OVERHEAD
        offset = 0
        for start in range(0, len(plaintext), frame_length):
            index += 1  # now the sequence number
            pack_head(frames, offset, index, 0, index)
            encrypt_into(
                frames[offset + 4 : offset + REGULAR_PREFIX],
                plaintext[start : start + frame_length],
                aad + pack_aad(index, frame_length),
                frames[offset + REGULAR_PREFIX : offset + stride],
            )
            offset += stride
        return offset

    def seal_final(self, plaintext: Buffer, index: int, frame: memoryview) -> int:
        """Seal the final frame into ``frame``; returns how many bytes it wrote."""
        sequence, length = index + 1, len(plaintext)
        end = FINAL_OVERHEAD + length
        _FINAL_HEAD.pack_into(frame, 0, 0xFFFFFFFF, sequence, 0, sequence, length)
        self.aead.encrypt_into(
            frame[8 : 8 + IV_LENGTH],
            plaintext,
            self._final_aad + _AAD_END.pack(sequence, length),
            frame[FINAL_PREFIX:end],
        )
        return end

    def open_regular(self, frames: Buffer, index: int, frame_length: int, plaintext: memoryview) -> int:
        """Open all of ``frames``, a whole number of regular frames, the first of them frame ``index``.

        Writes into ``plaintext`` and returns how many bytes it wrote.  When a frame does not
        authenticate, nothing of it is left in ``plaintext`` and IntegrityError is raised.
        """
        decrypt_into, aad = self.aead.decrypt_into, self._regular_aad
        unpack, pack_aad = _U32.unpack_from, _AAD_END.pack
        frames = memoryview(frames)
        stride = frame_length + REGULAR_OVERHEAD
        position = 0
        for offset in range(0, len(frames), stride):
            index += 1
            (sequence,) = unpack(frames, offset)
            if sequence != index:
                raise IntegrityError(
                    f"frame {index} carries another frame's number: frames were moved or lost"
                )
            target = plaintext[position : position + frame_length]
            try:
                decrypt_into(
                    frames[offset + 4 : offset + REGULAR_PREFIX],
                    frames[offset + REGULAR_PREFIX : offset + stride],
                    aad + pack_aad(index, frame_length),
                    target,
                )
            except InvalidTag:
                # decrypt_into leaves what it decrypted behind when the tag fails.
                target[:] = bytes(len(target))
                raise IntegrityError(f"frame {index} did not authenticate") from None
            position += frame_length
        return position

    def open_final(self, frame: Buffer, index: int, frame_length: int, plaintext: memoryview) -> int:
        """Open the final frame, which ``frame`` holds exactly; as ``open_regular``."""
        frame = memoryview(frame)
        if len(frame) < FINAL_OVERHEAD:
            raise IntegrityError("the final frame is cut short: the message is truncated")
        mark, sequence, _, _, length = _FINAL_HEAD.unpack_from(frame, 0)
        if mark != 0xFFFFFFFF or sequence != index + 1:
            raise IntegrityError(f"no final frame where frame {index + 1} should end the message")
        if length > frame_length or FINAL_OVERHEAD + length != len(frame):
            raise IntegrityError("the final frame's length does not fit the message")
        target = plaintext[:length]
        try:
            self.aead.decrypt_into(
                frame[8 : 8 + IV_LENGTH],
                frame[FINAL_PREFIX:],
                self._final_aad + _AAD_END.pack(sequence, length),
                target,
            )
        except InvalidTag:
            target[:] = bytes(length)
            raise IntegrityError("the final frame did not authenticate") from None
        return int(length)

    def open_unframed(self, body: Buffer) -> bytes:
        """The plaintext of an unframed body, which ``body`` holds exactly; it has one tag, at its end."""
        if len(body) < UNFRAMED_OVERHEAD:
            raise IntegrityError("the body is cut short: the message is truncated")
        length = unframed_length(body)
        if UNFRAMED_OVERHEAD + length != len(body):
            raise IntegrityError("the length of the unframed body does not fit the message")
        body = memoryview(body)
        aad = self._unframed_aad + _AAD_END.pack(1, length)
        try:
            return self.aead.decrypt(body[:IV_LENGTH], body[UNFRAMED_PREFIX:], aad)
        except InvalidTag:
            raise IntegrityError("the body did not authenticate") from None


def unframed_length(start: Buffer) -> int:
    """The plaintext length that the start of an unframed body states, within the format's limit."""
    length = int.from_bytes(start[IV_LENGTH:UNFRAMED_PREFIX], "big")
    if length > MAX_UNFRAMED_LENGTH:
        raise FormatError("the unframed body states a length beyond the limit of AES-GCM")
    return length
