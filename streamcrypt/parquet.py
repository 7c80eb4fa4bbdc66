"""Encrypted Parquet: read and written as pyarrow.parquet does, in one of two forms.

    messages    each file is one message (the default): everything is hidden, the footer too, and any
                file of any format is treated alike
    modular     Parquet Modular Encryption (``column_keys=``): the file stays Parquet, its parts are
                sealed under keys of its own, a key per column if wanted; other Parquet readers open it

Both take the same key references.  A modular file's data keys are wrapped twice: by a key encryption
key, and that by ours (``KeyClient``), in the file's key material as Base64 of JSON

    {"version": 1, "context": {...}, "keys": [[provider, info, ciphertext], ...]}

which holds what a message's header holds.  As with messages, what a file says never decides which
key is asked or where: it is opened with the keys that the reader names, or those that its ARNs name.

Every read checks before it gives: a frame that does not authenticate is an IntegrityError.
"""

from __future__ import annotations

import base64
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from streamcrypt.errors import ContextMismatchError, FormatError, IntegrityError, StreamcryptError
from streamcrypt.fs import CryptFileSystem, TargetFile, crypt_filesystem, filesystem
from streamcrypt.keys.keyring import Keyring
from streamcrypt.keys.reference import References, decrypting_keyring, encrypting_keyring
from streamcrypt.message.context import check_caller_context
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import SUITES, AlgorithmSuite

try:
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet as pq
except ImportError as error:  # pragma: no cover - a test starts an interpreter without pyarrow
    raise ImportError("streamcrypt.parquet needs pyarrow: pip install 'streamcrypt[parquet]'") from error

if TYPE_CHECKING:
    import pyarrow.parquet.encryption as pe

# A file is decrypted as a whole, by threads into one buffer, when all of its columns are wanted and it
# is not longer than this: see benchmarks/README.md, "Readers".
WHOLE_FILE_LENGTH: Final = 2 * 2**30

_FS_OPTIONS: Final = frozenset(
    name for name, parameter in inspect.signature(CryptFileSystem.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY or name == "target_options"
)  # fmt: skip

Path = str | os.PathLike[str]


def read_table(
    source: Path,
    *,
    columns: Sequence[str] | None = None,
    filters: Any = None,
    keys: References | None = None,
    **options: Any,
) -> pa.Table:
    """An encrypted Parquet file or folder as a table; ``pyarrow.parquet.read_table`` plus ``keys``.

        table = parquet.read_table("train.enc/", columns=["id", "label"])

    ``source`` is a path or URL, chained or not; it may be of either form.  With ``columns`` or
    ``filters`` only the frames that hold them are read.  Further options go to pyarrow, and those of
    ``streamcrypt.fs.CryptFileSystem`` (``context``, ``verify_manifest`` …) to the filesystem.
    Raises IntegrityError for what does not authenticate, KeyAccessError and its family, FormatError
    for a file that is not encrypted.
    """
    fs, path, options = _place(source, keys, options)
    if fs.isdir(path):
        return _read_folder(fs, path, columns, filters, keys, options)
    kind = _kind(fs, path)
    if kind != "message":
        with _translated(path), fs.fs.open(path, "rb") as file:
            properties = decryption_properties(keys, context=fs.context)
            options = {"decryption_properties": properties, **options}
            return pq.read_table(file, columns=columns, filters=filters, **options)
    with fs.open(path) as file:
        if columns is None and filters is None and file.size <= WHOLE_FILE_LENGTH:
            whole = pa.BufferReader(file.buffer_at(0, file.size))
            return pq.read_table(whole, **{"pre_buffer": False, **options})
        # Read when needed and no more than that: a local file gains nothing from reading ahead.
        options = {"pre_buffer": not fs.is_local, **options}
        return pq.read_table(file, columns=columns, filters=filters, **options)


def _read_folder(
    fs: CryptFileSystem,
    path: str,
    columns: Any,
    filters: Any,
    keys: References | None,
    options: dict[str, Any],
) -> pa.Table:
    below = filesystem(fs)
    if _folder_kind(fs, path) != "message":
        below = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs.fs))
        options = {"decryption_properties": decryption_properties(keys, context=fs.context), **options}
    with _translated(path):
        return pq.read_table(path, columns=columns, filters=filters, filesystem=below, **options)


def dataset(
    source: Path | Sequence[Path],
    *,
    keys: References | None = None,
    partitioning: Any = "hive",
    **options: Any,
) -> pyarrow.dataset.Dataset:
    """An encrypted Parquet tree as a ``pyarrow.dataset.Dataset``.

    It sees data files only.  Columns and row groups that are not asked for are not read.  One of
    messages pickles without keys; one of modular files does not keep its keys when it is pickled (a
    limit of pyarrow): call this again in the worker.
    """
    first = source if isinstance(source, str | os.PathLike) else next(iter(source))
    fs, path, options = _place(first, keys, options)
    paths: Any = path
    if not isinstance(source, str | os.PathLike):
        paths = [fs._strip_protocol(one) for one in source]
    options.setdefault("format", "parquet")
    below = filesystem(fs)
    if (_folder_kind(fs, path) if fs.isdir(path) else _kind(fs, path)) != "message":
        below = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs.fs))
        scan = pyarrow.dataset.ParquetFragmentScanOptions(
            decryption_config=decryption_config(keys, context=fs.context)
        )
        options["format"] = pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=scan)
    return pyarrow.dataset.dataset(paths, filesystem=below, partitioning=partitioning, **options)


def write_table(
    table: pa.Table,
    where: Path,
    *,
    keys: References,
    column_keys: Mapping[str, str | Sequence[str]] | None = None,
    plaintext_footer: bool = False,
    **options: Any,
) -> None:
    """Write an encrypted Parquet file; it appears under its name only when it is whole.

        parquet.write_table(table, "part-0.parquet", keys="local:alias/ml")
        parquet.write_table(table, "part-0.parquet", keys="local:alias/ml",
                            column_keys={"local:alias/pii": ["name", "email"]})

    With ``column_keys`` (which may be empty) the file is a modular one: those columns are sealed under
    the keys named, the footer and all other columns under ``keys``, one reference.
    ``plaintext_footer`` leaves schema and statistics of the other columns readable by anyone, but
    signed.  ``context`` pairs are bound to the wrapped keys.
    """
    fs, path, options = _place(where, keys, options)
    if column_keys is None:
        if plaintext_footer:
            raise ValueError("plaintext_footer is for modular files: give column_keys as well")
        with fs.open(path, "wb") as file:
            pq.write_table(table, file, **options)
        return
    properties = encryption_properties(
        keys, table.schema, column_keys, plaintext_footer=plaintext_footer, context=fs.context
    )
    with TargetFile(fs, path) as file:
        pq.write_table(table, file, encryption_properties=properties, **options)


def write_dataset(
    data: Any,
    base_dir: Path,
    *,
    keys: References,
    column_keys: Mapping[str, str | Sequence[str]] | None = None,
    plaintext_footer: bool = False,
    **options: Any,
) -> None:
    """Write a tree of encrypted Parquet files; ``pyarrow.dataset.write_dataset`` plus ``keys``.

    There is no manifest: each file proves itself, not that the tree is whole (``sc.encrypt`` writes
    one).  With ``column_keys`` the files are modular ones, as with ``write_table``.
    """
    fs, path, options = _place(base_dir, keys, options)
    below: Any = filesystem(fs)
    options.setdefault("format", "parquet")
    if column_keys is not None:
        below = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs.fs))
        schema = _file_schema(data, options)
        config = encryption_config(
            keys, schema, column_keys, plaintext_footer=plaintext_footer, context=fs.context
        )
        format_ = pyarrow.dataset.ParquetFileFormat()
        options["format"] = format_
        options["file_options"] = format_.make_write_options(
            encryption_config=config, **options.pop("parquet_options", {})
        )
    pyarrow.dataset.write_dataset(data, path, filesystem=below, **options)


# ---------------------------------------------------------------------------------------------
# Which form a file has


_MESSAGE_STARTS: Final = (b"\x01\x80", b"\x02")
_MODULAR_STARTS: Final = (b"PARE", b"PAR1")


def _place(
    source: Path, keys: References | None, options: dict[str, Any]
) -> tuple[CryptFileSystem, str, dict[str, Any]]:
    """The filesystem for ``source``, the path there, and the options that are pyarrow's."""
    ours = {name: options[name] for name in options.keys() & _FS_OPTIONS}
    theirs = {name: value for name, value in options.items() if name not in ours}
    given = theirs.pop("filesystem", None)
    if given is not None:
        fs, _ = crypt_filesystem(given, keys=keys, **ours)
        return fs, str(fs._strip_protocol(source)), theirs
    fs, path = crypt_filesystem(os.fspath(source), keys=keys, **ours)
    assert path is not None
    return fs, path, theirs


def _kind(fs: CryptFileSystem, path: str) -> str:
    start = fs.fs.cat_file(path, start=0, end=4)
    if bytes(start) in _MODULAR_STARTS:
        return "modular"
    if start.startswith(_MESSAGE_STARTS):
        return "message"
    raise FormatError(f"{path}: neither a message nor an encrypted Parquet file", recognised=False)


def _folder_kind(fs: CryptFileSystem, path: str) -> str:
    """The form of a folder's first Parquet file: all are to be of one form, and each is checked when read."""
    for name in fs.find(path):
        base = name.rpartition("/")[2]
        if not base.startswith((".", "_")):
            return _kind(fs, name)
    return "message"


class _translated:  # noqa: N801 - reads as a statement
    """Raises what pyarrow's decryption says as an IntegrityError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, OSError | pa.ArrowInvalid) or isinstance(error, StreamcryptError):
            return
        text = str(error)
        if "plaintext file" in text or "not encrypted" in text:
            raise FormatError(
                f"{self._path}: this Parquet file is not encrypted", recognised=False
            ) from error
        if any(sign in text for sign in _DECRYPTION_SIGNS):
            raise IntegrityError(f"{self._path}: does not authenticate, or is damaged ({text})") from error


_DECRYPTION_SIGNS: Final = ("decrypt", "Decrypt", "thrift", "magic bytes", "Parquet file size")


# ---------------------------------------------------------------------------------------------
# Modular encryption: keys


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


def decryption_properties(keys: References | None = None, *, context: Mapping[str, str] | None = None) -> Any:
    """``decryption_properties=`` of ``pyarrow.parquet``'s readers."""
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
    return _encryption_module().CryptoFactory(lambda connection: client)


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

    def wrap(self, key: bytes, name: str) -> bytes:
        keyring = encrypting_keyring(self._names[name])
        wrapped = keyring.wrap(_suite_for(len(key)), self._context, key)
        record = {
            "version": 1,
            "context": self._context,
            "keys": [[one.provider_id, _text(one.info), _text(one.ciphertext)] for one in wrapped],
        }
        return base64.b64encode(json.dumps(record, separators=(",", ":")).encode())

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


def _file_schema(data: Any, options: Mapping[str, Any]) -> pa.Schema:
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


__all__ = [
    "crypto_factory",
    "dataset",
    "decryption_config",
    "decryption_properties",
    "encryption_config",
    "encryption_properties",
    "key_client",
    "read_table",
    "write_dataset",
    "write_table",
]
