"""What the end of a modular Parquet file says, as far as it must be known before pyarrow reads it.

    … | file crypto metadata, sealed footer | length u32 | "PARE"      sealed footer
    … | footer, signature 28                | length u32 | "PAR1"      plaintext footer, signed
    … | footer                              | length u32 | "PAR1"      a plain file

pyarrow takes a plain file where an encrypted one is expected, so the difference is made here: whoever
can replace a file could otherwise replace it by one without any encryption.  For the same reason
AES_GCM_CTR_V1 is refused: it seals pages with AES-CTR, so that a flipped bit is a wrong value.

Source: Apache Parquet, Encryption.md section 5 and parquet.thrift; Thrift's compact protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

from streamcrypt.errors import FormatError, IntegrityError

MAGIC_SEALED: Final = b"PARE"
MAGIC_PLAIN: Final = b"PAR1"
MAX_FOOTER_LENGTH: Final = 256 * 2**20

# FileMetaData.encryption_algorithm, FileMetaData.footer_signing_key_metadata;
# FileCryptoMetaData.encryption_algorithm, FileCryptoMetaData.key_metadata (parquet.thrift).
_PLAIN_ALGORITHM, _PLAIN_KEY_METADATA = 8, 9
_SEALED_ALGORITHM, _SEALED_KEY_METADATA = 1, 2
# EncryptionAlgorithm, a union: AES_GCM_V1 (1) or AES_GCM_CTR_V1 (2).
_AES_GCM_V1 = 1


@dataclass(frozen=True, slots=True)
class Footer:
    """``sealed``: the footer is encrypted, not only signed.  ``algorithm`` is the Thrift struct."""

    sealed: bool
    algorithm: dict[int, Any]
    key_metadata: bytes
    body: bytes
    """What follows the file crypto metadata: the sealed footer; or the plain footer with its signature."""

    @property
    def aad_prefix(self) -> bytes:
        """The prefix that is stored in the file; empty when there is none, or the reader must know it."""
        return self._of_algorithm(1)

    @property
    def aad_file_unique(self) -> bytes:
        return self._of_algorithm(2)

    def _of_algorithm(self, field: int) -> bytes:
        value = next(iter(self.algorithm.values()))
        found = value.get(field, b"") if isinstance(value, dict) else b""
        return found if isinstance(found, bytes) else b""


def read_footer(file: IO[bytes], name: str) -> Footer:
    """The footer of an encrypted Parquet file; FormatError when it is none, IntegrityError when cut."""
    size = file.seek(0, 2)
    if size < 12:
        raise FormatError(f"{name}: too short for a Parquet file", recognised=False)
    file.seek(size - 8)
    end = file.read(8)
    magic, length = bytes(end[4:]), int.from_bytes(end[:4], "little")
    if magic not in (MAGIC_SEALED, MAGIC_PLAIN):
        raise FormatError(f"{name}: does not end like a Parquet file: truncated, or another format")
    if length > min(size - 12, MAX_FOOTER_LENGTH):
        raise IntegrityError(f"{name}: its footer is longer than the file: truncated or damaged")
    file.seek(size - 8 - length)
    data = file.read(length)
    fields, position = read_struct(data)
    sealed = magic == MAGIC_SEALED
    algorithm = fields.get(_SEALED_ALGORITHM if sealed else _PLAIN_ALGORITHM)
    if not isinstance(algorithm, dict) or not algorithm:
        raise FormatError(f"{name}: this Parquet file is not encrypted", recognised=False)
    if list(algorithm) != [_AES_GCM_V1]:
        raise FormatError(
            f"{name}: nothing authenticates its pages (AES_GCM_CTR_V1, not AES_GCM_V1), so it is not read"
        )
    key_metadata = fields.get(_SEALED_KEY_METADATA if sealed else _PLAIN_KEY_METADATA, b"")
    return Footer(sealed, algorithm, bytes(key_metadata), bytes(data[position:] if sealed else data))


def column_key_metadata(metadata: bytes) -> Iterator[tuple[str, bytes]]:
    """The columns that have keys of their own, by their dotted paths, with their key metadata."""
    seen = set()
    for group in read_struct(metadata)[0].get(_ROW_GROUPS, []):
        for column in group.get(_COLUMNS, []):
            with_key = column.get(_CRYPTO_METADATA, {}).get(_WITH_COLUMN_KEY)
            if with_key is None:
                continue
            path = ".".join(part.decode() for part in with_key[1])
            if path not in seen:
                seen.add(path)
                yield path, bytes(with_key.get(2, b""))


# FileMetaData.row_groups, RowGroup.columns, ColumnChunk.crypto_metadata, ColumnCryptoMetaData.
_ROW_GROUPS, _COLUMNS, _CRYPTO_METADATA, _WITH_COLUMN_KEY = 4, 1, 8, 2


# Thrift's compact protocol: what a reader needs of it

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_MAX_DEPTH: Final = 32


def read_struct(data: bytes, position: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their ids, and where it ends; IntegrityError when it is none."""
    try:
        return _struct(data, position, 0)
    except (IndexError, struct.error) as error:
        raise IntegrityError("the Parquet footer is cut short or damaged") from error


def _struct(data: bytes, position: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth > _MAX_DEPTH:
        raise IntegrityError("the Parquet footer is nested too deep: damaged")
    fields: dict[int, Any] = {}
    field_id = 0
    while (head := data[position]) != _STOP:
        position += 1
        if head >> 4:
            field_id += head >> 4
        else:
            number, position = _varint(data, position)
            field_id = (number >> 1) ^ -(number & 1)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            fields[field_id] = kind == _TRUE
        else:
            fields[field_id], position = _value(data, position, kind, depth)
    return fields, position + 1


def _value(data: bytes, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE, _BYTE):
        return data[position], position + 1
    if kind in (_I16, _I32, _I64):
        number, position = _varint(data, position)
        return (number >> 1) ^ -(number & 1), position
    if kind == _DOUBLE:
        return struct.unpack_from("<d", data, position)[0], position + 8
    if kind == _BINARY:
        length, position = _varint(data, position)
        if length > len(data) - position:
            raise IndexError
        return data[position : position + length], position + length
    if kind in (_LIST, _SET):
        count, element = data[position] >> 4, data[position] & 15
        position += 1
        if count == 15:
            count, position = _varint(data, position)
        if count > len(data) - position:  # every element takes a byte at least
            raise IndexError
        values = []
        for _ in range(count):
            value, position = _value(data, position, element, depth + 1)
            values.append(value)
        return values, position
    if kind == _STRUCT:
        return _struct(data, position, depth + 1)
    raise IntegrityError("the Parquet footer holds a type that it cannot have: damaged")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        octet = data[position]
        position += 1
        number |= (octet & 0x7F) << shift
        if octet < 0x80:
            return number, position
        shift += 7
        if shift > 63:
            raise IndexError
