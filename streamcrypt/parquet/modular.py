"""Keys of modular Parquet files, from key references.

A modular file's data keys are wrapped twice: by a key encryption key, and that by ours, in the file's
key material as Base64 of JSON

    {"version": 1, "context": {...}, "keys": [[provider, info, ciphertext], ...]}

which holds what a message's header holds.  What a file says never decides which key is asked or
where: it is opened with the keys that the reader names, or those that its ARNs name.

Source: Apache Parquet Modular Encryption, Encryption.md of parquet-format; the key material is that of
parquet-java's and Arrow's key tools (PKMT1).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from streamcrypt.errors import (
    ContextMismatchError,
    FormatError,
    IntegrityError,
    KeyAccessError,
    StreamcryptError,
)
from streamcrypt.keys.keyring import Keyring
from streamcrypt.keys.reference import References, decrypting_keyring, encrypting_keyring
from streamcrypt.message.context import check_caller_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import SUITES, AlgorithmSuite
from streamcrypt.parquet.footer import Footer, column_key_metadata, read_footer

if TYPE_CHECKING:
    import pyarrow.parquet.encryption as pe


def encryption_properties(
    keys: References,
    schema: pa.Schema,
    column_keys: Mapping[str, str | Sequence[str]] | None = None,
    *,
    plaintext_footer: bool = False,
    context: Mapping[str, str] | None = None,
) -> Any:
    """``encryption_properties=`` of ``pyarrow.parquet``'s writers, for one file of this schema."""
    names, config = _encryption(keys, schema, column_keys, plaintext_footer)
    factory = crypto_factory(names=names, context=context)
    return factory.file_encryption_properties(_encryption_module().KmsConnectionConfig(), config)


def decryption_properties(
    keys: References | None = None, *, source: Any = None, context: Mapping[str, str] | None = None
) -> Any:
    """``decryption_properties=`` of ``pyarrow.parquet``'s readers.

    A file that Polars wrote has no key material; given as ``source``, a path or a binary file that
    seeks, it gets properties of its own.
    """
    if source is not None:
        return file_decryption_properties(_footer_of(source), keys, context=context)
    factory = crypto_factory(keys=keys, context=context)
    return factory.file_decryption_properties(_encryption_module().KmsConnectionConfig())


def encryption_config(
    keys: References,
    schema: pa.Schema,
    column_keys: Mapping[str, str | Sequence[str]] | None = None,
    *,
    plaintext_footer: bool = False,
    context: Mapping[str, str] | None = None,
) -> Any:
    """``encryption_config=`` of ``pyarrow.dataset.ParquetFileFormat.make_write_options``."""
    names, config = _encryption(keys, schema, column_keys, plaintext_footer)
    factory = crypto_factory(names=names, context=context)
    connection = _encryption_module().KmsConnectionConfig()
    return pyarrow.dataset.ParquetEncryptionConfig(factory, connection, config)


def decryption_config(keys: References | None = None, *, context: Mapping[str, str] | None = None) -> Any:
    """``decryption_config=`` of ``pyarrow.dataset.ParquetFragmentScanOptions``."""
    module = _encryption_module()
    factory = crypto_factory(keys=keys, context=context)
    return pyarrow.dataset.ParquetDecryptionConfig(
        factory, module.KmsConnectionConfig(), module.DecryptionConfiguration()
    )


def crypto_factory(
    *,
    keys: References | None = None,
    names: Mapping[str, References] | None = None,
    context: Mapping[str, str] | None = None,
) -> pe.CryptoFactory:
    """pyarrow's factory with our client in it.

    ``keys`` may unwrap (None: those that the ARNs in a file name); ``names`` maps the master key
    identifiers of a file that is written to the references that wrap under them.
    """
    client = key_client(keys=keys, names=names, context=context)

    class Factory(_encryption_module().CryptoFactory):  # type: ignore[misc]  # pyarrow is not annotated
        """Seals nothing by AES_GCM_CTR_V1, whose pages no reader can check (footer.py)."""

        def file_encryption_properties(self, connection: Any, config: Any) -> Any:
            if config.encryption_algorithm != "AES_GCM_V1":
                raise ValueError(f"{config.encryption_algorithm} does not authenticate pages: use AES_GCM_V1")
            return super().file_encryption_properties(connection, config)

    return Factory(lambda connection: client)


def key_client(
    *,
    keys: References | None = None,
    names: Mapping[str, References] | None = None,
    context: Mapping[str, str] | None = None,
) -> pe.KmsClient:
    """A ``pyarrow.parquet.encryption.KmsClient`` on key references; see ``crypto_factory``."""
    wrapping = _Wrapping(keys, dict(names or {}), dict(context or {}))

    class KeyClient(_encryption_module().KmsClient):  # type: ignore[misc]  # pyarrow is not annotated
        """Wraps and unwraps key encryption keys by key references."""

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return wrapping.wrap(bytes(key_bytes), master_key_identifier)

        def unwrap_key(self, wrapped_key: bytes | str, master_key_identifier: str) -> bytes:
            return wrapping.unwrap(wrapped_key)

    return KeyClient()


class _Wrapping:
    """Keys wrapped by keyrings, as text for a Parquet file's key material."""

    def __init__(
        self, keys: References | None, names: dict[str, References], context: dict[str, str]
    ) -> None:
        self._keys = keys
        self._names = names
        self._context = check_caller_context(context)
        self._opening: Keyring | None = None
        self._key_encryption_keys: dict[bytes, bytes] = {}

    def wrap(self, key: bytes, name: str) -> bytes:
        keyring = encrypting_keyring(self._names[name])
        wrapped = keyring.wrap(_suite_for(len(key)), self._context, key)
        record = {
            "version": 1,
            "context": self._context,
            "keys": [[one.provider_id, _text(one.info), _text(one.ciphertext)] for one in wrapped],
        }
        return base64.b64encode(json.dumps(record, separators=(",", ":")).encode())

    def data_key(self, key_metadata: bytes) -> bytes:
        """The data key in a file's key material (PKMT1), wrapped once or twice."""
        material = _key_material(key_metadata)
        try:
            if not material["doubleWrapping"]:
                return self.unwrap(material["wrappedDEK"])
            identifier = base64.b64decode(material["keyEncryptionKeyID"])
            wrapped = material["wrappedKEK"]
            if identifier not in self._key_encryption_keys:
                self._key_encryption_keys[identifier] = self.unwrap(wrapped)
            sealed = base64.b64decode(material["wrappedDEK"])
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(f"the file's key material cannot be used: {error}") from error
        return _open(self._key_encryption_keys[identifier], sealed, identifier)

    def unwrap(self, wrapped: bytes | str) -> bytes:
        if self._opening is None:
            self._opening = decrypting_keyring(self._keys)
        context, encrypted = _parse_wrapped(wrapped)
        for name, value in self._context.items():
            if context.get(name) != value:
                raise ContextMismatchError(
                    f"the file's encryption context does not hold the pair {name}={value}"
                )
        failure: StreamcryptError | None = None
        # The record does not say how long the key is; a keyring checks it against a suite.
        for suite in _SUITES:
            try:
                return self._opening.unwrap(suite, context, encrypted)
            except IntegrityError as error:
                failure = failure or error
        assert failure is not None
        raise failure


def _key_material(key_metadata: bytes) -> dict[str, Any]:
    """The JSON of one data key in a file; FormatError when it is kept elsewhere or of another kind."""
    try:
        material = json.loads(key_metadata)
        if material["keyMaterialType"] != "PKMT1" or not material["internalStorage"]:
            raise ValueError("of another kind, or kept outside the file")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the file's key material cannot be used: {error}") from error
    return dict(material)


def _encryption(
    keys: References,
    schema: pa.Schema,
    column_keys: Mapping[str, str | Sequence[str]] | None,
    plaintext_footer: bool,
) -> tuple[dict[str, References], Any]:
    """Names for the references, as they will stand in the file, and pyarrow's configuration."""
    names: dict[str, References] = {}
    footer = _name(keys, names)
    leaves = _leaves(schema)
    columns: dict[str, list[str]] = {}
    for reference, given in (column_keys or {}).items():
        sealed = columns.setdefault(_name(reference, names), [])
        for column in [given] if isinstance(given, str) else given:
            below = [leaf for leaf in leaves if leaf == column or leaf.startswith(f"{column}.")]
            if not below:
                raise ValueError(f"column_keys: there is no column {column!r} to be sealed")
            sealed += below
            leaves = [leaf for leaf in leaves if leaf not in below]
    if columns and leaves:
        # pyarrow leaves a column in the clear when none or another has a key of its own.
        columns.setdefault(footer, []).extend(leaves)
    config = _encryption_module().EncryptionConfiguration(
        footer_key=footer,
        column_keys=columns or None,
        uniform_encryption=not columns,
        plaintext_footer=plaintext_footer,
        double_wrapping=True,
        data_key_length_bits=256,
    )
    return names, config


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns that a Parquet file of this schema has, by their dotted paths."""
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.read_metadata(pa.BufferReader(empty.getvalue())).schema
    return [columns.column(index).path for index in range(len(columns))]


def file_schema(data: Any, options: Mapping[str, Any]) -> pa.Schema:
    """The schema of the files of a dataset: that of the data, less the columns that become folders."""
    schema = options.get("schema") or getattr(data, "schema", None)
    if schema is None:
        if not isinstance(data, list | tuple) or not data:
            raise ValueError("give schema=, so that every column is sealed")
        schema = data[0].schema
    partitioning = options.get("partitioning") or ()
    folders = partitioning.schema.names if hasattr(partitioning, "schema") else list(partitioning)
    return pa.schema([field for field in schema if field.name not in folders], metadata=schema.metadata)


def _name(reference: References, names: dict[str, References]) -> str:
    """What a file calls a key.  Nobody looks it up, and a path on this machine is nobody's business."""
    text = reference if isinstance(reference, str) else "keys"
    name = text if text.startswith(("local:", "aws:", "arn:")) else text.partition("@")[0]
    name = quote(name, safe="/@=&?")  # pyarrow's configuration is one string with : ; , in it
    while name in names and names[name] != reference:
        name += "'"
    names[name] = reference
    return name


_SUITES: Final[tuple[AlgorithmSuite, ...]] = (SUITES[0x0078], SUITES[0x0014], SUITES[0x0046])


def _suite_for(length: int) -> AlgorithmSuite:
    for suite in _SUITES:
        if suite.key_length == length:
            return suite
    raise ValueError(f"a key of {length} bytes is no AES key")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _parse_wrapped(wrapped: bytes | str) -> tuple[dict[str, str], list[EncryptedDataKey]]:
    try:
        record = json.loads(base64.b64decode(wrapped, validate=True))
        if record["version"] != 1 or len(record["keys"]) > 10:
            raise ValueError("of another version")
        context = {str(name): str(value) for name, value in record["context"].items()}
        encrypted = [
            EncryptedDataKey(str(provider), base64.b64decode(info), base64.b64decode(ciphertext))
            for provider, info, ciphertext in record["keys"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"the file's key material holds no key that streamcrypt wrapped: {error}"
        ) from error
    return context, encrypted


def _encryption_module() -> Any:
    try:
        import pyarrow.parquet.encryption
    except ImportError as error:
        raise ImportError("this build of pyarrow has no Parquet encryption: pip install pyarrow") from error
    return pyarrow.parquet.encryption


# ---------------------------------------------------------------------------------------------
# Polars, which takes the data keys themselves


def polars_encryption(keys: References, *, context: Mapping[str, str] | None = None) -> Any:
    """``encryption=`` of Polars' ``write_parquet`` and ``sink_parquet``, for one file; all of it is sealed.

    Polars keeps no key material, so the wrapped data key travels as the file's AAD prefix, which is
    stored in it and bound to every part.  ``polars_decryption`` and ``read_table`` open such a file.
    """
    import polars

    data_key = os.urandom(_SUITES[0].key_length)
    wrapped = _Wrapping(None, {"": keys}, dict(context or {})).wrap(data_key, "")
    return polars.ParquetEncryptionProperties(
        footer_key=data_key, aad_prefix=_PREFIX_MARK + wrapped, store_aad_prefix=True
    )


def file_decryption_properties(
    footer: Footer, keys: References | None, *, context: Mapping[str, str] | None = None
) -> Any:
    """``decryption_properties=`` for pyarrow, for the file that has this footer."""
    prefix = footer.aad_prefix
    if footer.key_metadata or not prefix.startswith(_PREFIX_MARK):
        return decryption_properties(keys, context=context)
    data_key = _Wrapping(keys, {}, dict(context or {})).unwrap(prefix[len(_PREFIX_MARK) :])
    return _encryption_module().create_decryption_properties(data_key)


_PREFIX_MARK: Final = b"streamcrypt:"


def polars_decryption(
    source: Any, keys: References | None = None, *, context: Mapping[str, str] | None = None
) -> Any:
    """``decryption=`` of ``polars.read_parquet`` and ``scan_parquet``, for one modular file.

    The properties hold the file's data keys: they are neither printed nor pickled by us, and serve for
    this file only.  ``source`` is a path, or a binary file that seeks.  Columns whose key may not be
    used are left out: Polars refuses to read them.
    """
    import polars

    footer = _footer_of(source)
    wrapping = _Wrapping(keys, {}, dict(context or {}))
    prefix = footer.aad_prefix
    if not footer.key_metadata and prefix.startswith(_PREFIX_MARK):
        data_key = wrapping.unwrap(prefix[len(_PREFIX_MARK) :])
        return polars.ParquetDecryptionProperties(footer_key=data_key)
    footer_key = wrapping.data_key(footer.key_metadata)
    metadata = footer.body
    if footer.sealed:
        metadata = _open_module(footer_key, metadata, prefix + footer.aad_file_unique + _FOOTER_MODULE)
    column_keys: dict[str, bytes] = {}
    for path, key_metadata in column_key_metadata(metadata):
        with contextlib.suppress(KeyAccessError):
            column_keys[path] = wrapping.data_key(key_metadata)
    return polars.ParquetDecryptionProperties(footer_key=footer_key, column_keys=column_keys or None)


def _footer_of(source: Any) -> Footer:
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return read_footer(file, str(source))
    return read_footer(source, str(getattr(source, "name", "the file")))


_FOOTER_MODULE: Final = b"\x00"
_NONCE_LENGTH: Final = 12


def _open_module(key: bytes, module: bytes, aad: bytes) -> bytes:
    """One sealed part of a file: length u32 | nonce 12 | ciphertext | tag 16."""
    length = int.from_bytes(module[:4], "little")
    return _open(key, module[4 : 4 + length], aad)


def _open(key: bytes, sealed: bytes, aad: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_LENGTH], sealed[_NONCE_LENGTH:], aad)
    except (InvalidTag, ValueError) as error:
        raise IntegrityError("the Parquet footer or its key material does not authenticate") from error
