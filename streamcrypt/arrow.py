"""Encrypted Arrow IPC files and streams.

    open_file      the file format: record batches at random, each opened when it is asked for
    open_stream    the stream format, in order, also from a pipe
    read_table     all of a file at once
    write_file     a table or record batches as one encrypted file
    write_stream   the same in the stream format

A record batch is opened by threads straight into the memory that its arrays then use: there is no
further copy.  All of its frames have been authenticated before pyarrow sees any of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

from streamcrypt.keys.reference import References

if TYPE_CHECKING:  # pyarrow and fsspec are imported when a function is first used
    import pyarrow as pa

    from streamcrypt.fs import CryptFile, CryptFileSystem

Path = str | os.PathLike[str]


def open_file(
    source: Path | IO[bytes], *, keys: References | None = None, ipc_options: Any = None, **options: Any
) -> pa.RecordBatchFileReader:
    """An encrypted IPC file; ``pyarrow.ipc.open_file`` plus ``keys``.

        with arrow.open_file("train.arrow") as reader: batch = reader.get_batch(3)

    ``get_batch`` opens only the frames that the batch lies in.  ``source`` is a path, a URL or a
    binary file that seeks; ``ipc_options`` is pyarrow's IpcReadOptions, the other options are those of
    ``streamcrypt.fs.CryptFileSystem``.  Raises IntegrityError, KeyAccessError and their families; closing
    the reader closes nothing that the caller opened.
    """
    import pyarrow as pa

    return pa.ipc.open_file(pa.PythonFile(_open(source, keys, options), mode="r"), options=ipc_options)


def read_table(
    source: Path | IO[bytes], *, keys: References | None = None, ipc_options: Any = None, **options: Any
) -> pa.Table:
    """All record batches of an encrypted IPC file as a table over one decrypted buffer."""
    import pyarrow as pa

    with _open(source, keys, options) as file:
        whole = pa.BufferReader(file.buffer_at(0, file.size))
    return pa.ipc.open_file(whole, options=ipc_options).read_all()


def open_stream(
    source: Path | IO[bytes], *, keys: References | None = None, ipc_options: Any = None, **options: Any
) -> pa.RecordBatchStreamReader:
    """An encrypted IPC stream, in order; ``pyarrow.ipc.open_stream`` plus ``keys``.

    ``source`` may be a pipe.  Each batch has been authenticated when it comes; that nothing follows
    or is missing is known at the end, which a cut stream does not reach: it raises IntegrityError.
    From a pipe it is copied, out of the frames' memory, and comes when the next frame has.
    """
    import pyarrow as pa

    if not isinstance(source, str | os.PathLike) and not source.seekable():
        fs, _ = _place(None, keys, options)
        file: Any = _InOrder(fs.open_in_order(source))
    else:
        file = _open(source, keys, options)
    return pa.ipc.open_stream(pa.PythonFile(file, mode="r"), options=ipc_options)


def write_file(
    data: pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch],
    where: Path,
    *,
    keys: References,
    schema: pa.Schema | None = None,
    max_chunksize: int | None = None,
    ipc_options: Any = None,
    **options: Any,
) -> None:
    """Write an encrypted IPC file; it appears under its name only when it is whole.

    ``data`` is a table, a batch, a reader or any iterable of batches, then with ``schema``;
    ``max_chunksize`` rows at most go into one batch of a table.
    """
    import pyarrow as pa

    _write(pa.ipc.new_file, data, where, keys, schema, max_chunksize, ipc_options, options)


def write_stream(
    data: pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch],
    where: Path,
    *,
    keys: References,
    schema: pa.Schema | None = None,
    max_chunksize: int | None = None,
    ipc_options: Any = None,
    **options: Any,
) -> None:
    """Write an encrypted IPC stream; as ``write_file``."""
    import pyarrow as pa

    _write(pa.ipc.new_stream, data, where, keys, schema, max_chunksize, ipc_options, options)


def _write(
    new: Any,
    data: Any,
    where: Path,
    keys: References,
    schema: pa.Schema | None,
    max_chunksize: int | None,
    ipc_options: Any,
    options: dict[str, Any],
) -> None:
    import pyarrow as pa

    schema = schema or getattr(data, "schema", None)
    if schema is None:
        raise ValueError("give schema= with an iterable of record batches")
    fs, path = _place(where, keys, options)
    with fs.open(path, "wb") as file, new(file, schema, options=ipc_options) as writer:
        if isinstance(data, pa.Table):
            writer.write_table(data, max_chunksize=max_chunksize)
        elif isinstance(data, pa.RecordBatch):
            writer.write_batch(data)
        else:
            for batch in data:
                writer.write_batch(batch)


def _place(
    source: Path | None, keys: References | None, options: dict[str, Any]
) -> tuple[CryptFileSystem, str]:
    from streamcrypt.fs import crypt_filesystem, crypt_place

    given = options.pop("filesystem", None)
    if keys is not None:
        options["keys"] = keys
    if given is None and source is not None:
        return crypt_place(source, **options)
    fs, _ = crypt_filesystem(given, **options)
    return fs, "" if source is None else str(fs._strip_protocol(source))


def _open(source: Path | IO[bytes], keys: References | None, options: dict[str, Any]) -> CryptFile:
    if isinstance(source, str | os.PathLike):
        fs, path = _place(source, keys, options)
        file: CryptFile = fs.open(path)
        return file
    fs, _ = _place(None, keys, options)
    return fs.open_object(source)


class _InOrder:
    """The plaintext of a message that arrives in order, as the file that pyarrow reads a stream from.

    It is one frame ahead: bytes at the end of a frame are given out when the next one is there, or the
    message has proved to be whole.  So a reader that stops at the end of the data knows that too.
    """

    def __init__(self, chunks: Iterator[memoryview]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._ended = False
        self._position = 0
        self.closed = False
        self._advance()

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        parts = bytearray()
        while not self._ended and (size < 0 or len(parts) < size):
            parts += self._take(len(self._chunk) if size < 0 else size - len(parts))
        return bytes(parts)

    def read_buffer(self, size: int) -> pa.Buffer:
        """The next ``size`` bytes, fewer only at the end."""
        import pyarrow as pa

        # Grows as bytes come: a length that a stream claims costs no memory by itself.
        room = pa.BufferOutputStream()
        while not self._ended and room.tell() < size:
            room.write(self._take(size - room.tell()))
        return room.getvalue()

    def close(self) -> None:
        self.closed = True

    def _take(self, size: int) -> bytes:
        # A copy, because the frame's memory is reused for the next one.
        part = bytes(self._chunk[:size])
        self._chunk = self._chunk[size:]
        self._position += len(part)
        self._advance()
        return part

    def _advance(self) -> None:
        while not len(self._chunk) and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            self._chunk = memoryview(b"") if chunk is None else chunk


__all__ = ["open_file", "open_stream", "read_table", "write_file", "write_stream"]
