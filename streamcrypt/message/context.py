"""Encryption context: authenticated name–value pairs, and their one encoding.

    empty map    no bytes at all
    otherwise    pair count u16 | for each pair, names ascending: length u16, name, length u16, value

Names ascend by their UTF-8 bytes; strings are UTF-8.  Source: AWS Encryption SDK specification,
framework/structures.md#encryption-context and data-format/message-header.md#aad.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from streamcrypt.errors import FormatError, LimitExceededError

RESERVED_PREFIX: Final = "aws-crypto-"
PUBLIC_KEY_NAME: Final = "aws-crypto-public-key"
MAX_LENGTH: Final = 0xFFFF  # the header has a 16-bit field for the whole serialisation

_U16 = struct.Struct(">H")


def serialize_context(context: Mapping[str, str]) -> bytes:
    """The one encoding of ``context``; LimitExceededError above 65,535 bytes."""
    if not context:
        return b""
    pairs = sorted((name.encode(), value.encode()) for name, value in context.items())
    if len(pairs) > MAX_LENGTH:
        raise LimitExceededError(f"encryption context of {len(pairs)} pairs; the format allows {MAX_LENGTH}")
    parts = [_U16.pack(len(pairs))]
    for pair in pairs:
        for text in pair:
            if len(text) > MAX_LENGTH:
                raise LimitExceededError("a name or value of the encryption context exceeds 65,535 bytes")
            parts += (_U16.pack(len(text)), text)
    serialized = b"".join(parts)
    if len(serialized) > MAX_LENGTH:
        raise LimitExceededError(
            f"encryption context of {len(serialized)} bytes; the message format allows {MAX_LENGTH}"
        )
    return serialized


def parse_context(serialized: bytes) -> dict[str, str]:
    """The pairs of a header's context field, in the order in which they stand.

    Unsorted pairs are accepted (official messages hold them); everything else that deviates from
    the one encoding is a FormatError.
    """
    if not serialized:
        return {}
    end = len(serialized)
    if end < 2:
        raise FormatError("encryption context is cut short")
    (count,) = _U16.unpack_from(serialized, 0)
    if count == 0:
        raise FormatError("encryption context of zero pairs has a non-zero length")
    context: dict[str, str] = {}
    position = 2
    for _ in range(count):
        texts = []
        for _ in range(2):
            if position + 2 > end:
                raise FormatError("encryption context holds fewer pairs than it counts")
            (length,) = _U16.unpack_from(serialized, position)
            position += 2
            if position + length > end:
                raise FormatError("encryption context holds fewer pairs than it counts")
            try:
                texts.append(serialized[position : position + length].decode())
            except UnicodeDecodeError:
                raise FormatError("encryption context is not UTF-8") from None
            position += length
        name, value = texts
        if name in context:
            raise FormatError("encryption context repeats a name")
        context[name] = value
    if position != end:
        raise FormatError("bytes are left over after the last pair of the encryption context")
    return context


def check_caller_context(context: Mapping[str, str]) -> dict[str, str]:
    """A caller's context as a new dict, or ValueError/TypeError: strings only, no reserved name.

    The specification reserves the prefix ``aws-crypto-`` (framework/structures.md).
    """
    for name, value in context.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("an encryption context maps text to text")
        if name.startswith(RESERVED_PREFIX):
            raise ValueError(f"encryption context name {name!r}: the prefix {RESERVED_PREFIX!r} is reserved")
        try:
            name.encode(), value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"encryption context pair {name!r} is not valid Unicode text") from None
    serialize_context(context)
    return dict(context)
