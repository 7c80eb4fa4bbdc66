"""What the parsers are fed, and the one question asked of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from families import craft

from streamcrypt.errors import FormatError, LimitExceededError
from streamcrypt.message.header import Header, parse_header


def header_or_refusal(data: bytes, limit: int | None = 10) -> Header | None:
    """The header, or None when it was refused as documented.  Any other exception is a finding."""
    try:
        header, end = parse_header(data, max_encrypted_data_keys=limit)
    except (FormatError, LimitExceededError):
        return None
    # A value means: this is the one encoding of what it says.
    assert end == header.length <= len(data)
    assert header.serialize() == data[:end]
    return header


def seeds() -> list[bytes]:
    """A header of every suite, framed and unframed, with few and with many pairs and wrapped keys."""
    rng = random.Random(1)
    found = []
    for suite_id in craft.SUITES:
        for frame_length in (0, 4096):
            for context in ({}, {"k": "v"}, {f"name {i}": "wert é" * i for i in range(5)}):
                for count in (1, 3):
                    draft = craft.Draft(
                        suite_id,
                        frame_length=frame_length,
                        context=dict(context),
                        edks=[
                            ("aws-kms", rng.randbytes(rng.randrange(80)), rng.randbytes(rng.randrange(60)))
                            for _ in range(count)
                        ],
                    )
                    parts = craft.assemble(draft)
                    found.append(parts.header + parts.authentication)
    return found


@dataclass(frozen=True)
class Field:
    """A number in a header."""

    name: str
    offset: int
    size: int


def number_fields(header: bytes) -> list[Field]:
    """Every number field of a well-formed header, found by walking it without our parser."""
    version = header[0]
    position = 4 if version == 1 else 3
    found = [Field("version", 0, 1), Field("suite id", position - 2, 2)]
    if version == 1:
        found.append(Field("type", 1, 1))
    position += 16 if version == 1 else 32

    def number(name: str, size: int) -> int:
        nonlocal position
        found.append(Field(name, position, size))
        value = int.from_bytes(header[position : position + size], "big")
        position += size
        return value

    if number("context length", 2):
        for i in range(number("context pair count", 2)):
            position += number(f"context name {i} length", 2)
            position += number(f"context value {i} length", 2)
    for i in range(number("encrypted data key count", 2)):
        for what in ("provider id", "info", "ciphertext"):
            position += number(f"encrypted data key {i} {what} length", 2)
    number("content type", 1)
    if version == 1:
        number("reserved", 4)
        number("IV length", 1)
    number("frame length", 4)
    return found


def field_mutations(header: bytes) -> Iterator[tuple[str, bytes]]:
    """Every number field set to 0, 1, max - 1, max, the sign bit, and to its neighbours."""
    for field in number_fields(header):
        top = 256**field.size - 1
        value = int.from_bytes(header[field.offset : field.offset + field.size], "big")
        for new in {0, 1, top - 1, top, top // 2, top // 2 + 1, value - 1, value + 1, value ^ 0xFF} - {value}:
            if 0 <= new <= top:
                encoded = new.to_bytes(field.size, "big")
                yield (
                    f"{field.name} = {new}",
                    header[: field.offset] + encoded + header[field.offset + field.size :],
                )


def random_mutation(rng: random.Random, seed: bytes) -> bytes:
    """Some random damage: bytes set, cut, repeated, inserted; a length field made extreme."""
    data = bytearray(seed)
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(6)
        at = rng.randrange(len(data) + 1)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del data[at : at + rng.randrange(1, 9)]
        else:
            data[at : at + 2] = struct.pack(">H", rng.choice((0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)))
    return bytes(data)
