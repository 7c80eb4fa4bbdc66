"""Tables and datasets of encrypted Parquet files, of either form (__init__.py)."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq

from streamcrypt.errors import FormatError, IntegrityError
from streamcrypt.fs import CryptFileSystem, TargetFile, crypt_filesystem, crypt_place, filesystem
from streamcrypt.keys.reference import References
from streamcrypt.parquet.footer import MAGIC_PLAIN, MAGIC_SEALED, read_footer
from streamcrypt.parquet.modular import (
    decryption_config,
    decryption_properties,
    encryption_config,
    encryption_properties,
    file_decryption_properties,
    file_schema,
)
from streamcrypt.streams import naming

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
    plaintext_footer: bool = False,
    **options: Any,
) -> pa.Table:
    """An encrypted Parquet file or folder as a table; ``pyarrow.parquet.read_table`` plus ``keys``.

        table = parquet.read_table("train.enc/", columns=["id", "label"])

    ``source`` is a path or URL, chained or not; it may be of either form.  With ``columns`` or
    ``filters`` only the frames that hold them are read.  Further options go to pyarrow, and those of
    ``streamcrypt.fs.CryptFileSystem`` (``context``, ``verify_manifest`` …) to the filesystem.
    ``plaintext_footer`` allows modular files whose footer is signed but not sealed.  Raises
    IntegrityError for what does not authenticate, KeyAccessError and its family, FormatError for a
    file that is not encrypted.
    """
    fs, path, options = _place(source, keys, options)
    folder = fs.isdir(path)
    modular = _is_modular(fs, path, folder=folder)
    if folder:
        if modular:
            options = {"decryption_properties": decryption_properties(keys, context=fs.context), **options}
        below = _below(fs, modular=modular, plaintext_footer=plaintext_footer)
        with _translated(path):
            return pq.read_table(path, columns=columns, filters=filters, filesystem=below, **options)
    if modular:
        with _translated(path), open_modular(fs.fs, path, plaintext_footer=plaintext_footer) as file:
            properties = file_decryption_properties(read_footer(file, path), keys, context=fs.context)
            file.seek(0)
            options = {"decryption_properties": properties, **options}
            return pq.read_table(file, columns=columns, filters=filters, **options)
    with fs.open(path) as file:
        if columns is None and filters is None and file.size <= WHOLE_FILE_LENGTH:
            whole = pa.BufferReader(file.buffer_at(0, file.size))
            return pq.read_table(whole, **{"pre_buffer": False, **options})
        # What will be read is opened beforehand, all at once; reading ahead only helps where that is too much.
        reading = {name: options.pop(name) for name in _READ_OPTIONS & options.keys()}
        options = {"pre_buffer": not fs.is_local, **options}
        opened = pq.ParquetDataset(file, filters=filters, **options)
        chunks = list(_chunks(opened, columns, filters))
        if sum(length for _, length in chunks) <= WHOLE_FILE_LENGTH:
            file.hold(chunks)
        return opened.read(columns=columns, **reading)


_READ_OPTIONS: Final = {"use_threads", "use_pandas_metadata"}


def _chunks(
    dataset: pq.ParquetDataset, columns: Sequence[str] | None, filters: Any
) -> Iterator[tuple[int, int]]:
    """Where the column chunks of these columns lie, in the row groups that the filters leave: offset, length.

    Those of columns that only a filter names are not among them.
    """
    for fragment in dataset.fragments:
        wanted = None
        if filters is not None:
            fragment = fragment.subset(pq.filters_to_expression(filters), schema=dataset.schema)
        for group in fragment.row_groups:
            metadata = fragment.metadata.row_group(group.id)
            if wanted is None:
                paths = [metadata.column(index).path_in_schema for index in range(metadata.num_columns)]
                wanted = [
                    index for index, path in enumerate(paths)
                    if columns is None or any(path == name or path.startswith(f"{name}.") for name in columns)
                ]  # fmt: skip
            for index in wanted:
                chunk = metadata.column(index)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                yield min(start, chunk.data_page_offset), chunk.total_compressed_size


def dataset(
    source: Path | Iterable[Path],
    *,
    keys: References | None = None,
    plaintext_footer: bool = False,
    partitioning: Any = "hive",
    **options: Any,
) -> pyarrow.dataset.Dataset:
    """An encrypted Parquet tree as a ``pyarrow.dataset.Dataset``.

    It sees data files only.  Columns and row groups that are not asked for are not read.  One of
    messages pickles without keys; one of modular files does not keep its keys when it is pickled (a
    limit of pyarrow): call this again in the worker.  Damage in a modular file is reported by pyarrow's
    scanner in its own words, as an OSError.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not sources:
        raise ValueError("a dataset needs a source")
    fs, path, options = _place(sources[0], keys, options)
    paths: Any = path
    if not isinstance(source, str | os.PathLike):
        paths = [fs._strip_protocol(one) for one in sources]
    options.setdefault("format", "parquet")
    modular = _is_modular(fs, path, folder=fs.isdir(path))
    below = _below(fs, modular=modular, plaintext_footer=plaintext_footer)
    if modular:
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
        schema = file_schema(data, options)
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
# Where a file is, and which form it has

_MESSAGE_STARTS: Final = (b"\x01\x80", b"\x02")


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
    fs, path = crypt_place(source, keys=keys, **ours)
    return fs, path, theirs


def _is_modular(fs: CryptFileSystem, path: str, *, folder: bool) -> bool:
    """The form of a file, or of a folder's first one: all are to be of one form; opening checks each."""
    if folder:
        names = (name for name in fs.find(path) if not name.rpartition("/")[2].startswith((".", "_")))
        path = next(names, "")
        if not path:
            return False
    start = bytes(fs.fs.cat_file(path, start=0, end=4))
    if start in (MAGIC_SEALED, MAGIC_PLAIN):
        return True
    if start.startswith(_MESSAGE_STARTS):
        return False
    raise FormatError(f"{path}: neither a message nor an encrypted Parquet file", recognised=False)


def _below(fs: CryptFileSystem, *, modular: bool, plaintext_footer: bool) -> Any:
    if modular:
        return pyarrow.fs.PyFileSystem(ModularHandler(fs.fs, plaintext_footer))
    return filesystem(fs)


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """Raises what pyarrow says of a damaged modular file as an IntegrityError; ours name the file."""
    try:
        with naming(path):
            yield
    except (OSError, pa.ArrowInvalid) as error:
        # An OSError of the system has a number; without one it is what pyarrow says of the bytes.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, pa.ArrowInvalid) and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise IntegrityError(f"{path}: does not authenticate, or is damaged ({error})") from error


_SIGNS: Final = ("decrypt", "Decrypt", "thrift", "magic bytes", "Parquet file size")


class ModularHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc, unused-ignore]  # pyarrow is not annotated
    """The filesystem below, for modular files; opens no file that is not encrypted."""

    def __init__(self, fs: Any, plaintext_footer: bool) -> None:
        super().__init__(fs)
        self._plaintext_footer = plaintext_footer

    def open_input_file(self, path: str) -> Any:
        return pa.PythonFile(open_modular(self.fs, path, plaintext_footer=self._plaintext_footer), mode="r")

    open_input_stream = open_input_file


def open_modular(fs: Any, path: str, *, plaintext_footer: bool = False) -> Any:
    """A modular file of ``fs``, its footer found to be sealed, or signed where that is allowed."""
    file = fs.open(path, "rb")
    try:
        footer = read_footer(file, path)
        if not footer.sealed and not plaintext_footer:
            raise FormatError(
                f"{path}: its footer is not sealed, only signed; allow it with plaintext_footer=True"
            )
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
