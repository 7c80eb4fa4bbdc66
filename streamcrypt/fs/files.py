"""The files that a filesystem opens: plaintext to the caller, one message below.

CryptFile           reads; large reads in threads; gives pyarrow memory that was opened in place
CryptWriter         writes; appears when it is closed cleanly, or when its transaction ends
TargetFile          writes what encrypts itself, as it is
"""

from __future__ import annotations

import contextlib
import io
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from streamcrypt.fs.below import RemoteSource
from streamcrypt.fs.process import keep_scratch, scratch
from streamcrypt.keys.materials import Materials
from streamcrypt.storage import Buffer, Source, State, Target
from streamcrypt.streams import (
    BEFORE_FORK,
    DecryptingFile,
    EncryptingFile,
    FrameReader,
    ReadingRules,
    filled,
    octets_of,
)
from streamcrypt.system import prefer_huge_pages
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from streamcrypt.fs.crypt import CryptFileSystem

# A read this long is cut into spans that threads open side by side: see benchmarks/README.md, "Readers".
PARALLEL_LENGTH: Final = 2 * 2**20
# A file that is not longer than this is sealed when it is closed, because only a message of known
# length may share its data key with others.
HELD_LENGTH: Final = 8 * 2**20

Info = dict[str, Any]


class SourceOfFile(DecryptingFile):
    """A message whose source is known, so that a thread can fetch all of its span at once."""

    def __init__(self, source: Source, materials: Materials, rules: ReadingRules, *, name: str) -> None:
        self.source = source
        self._idle: deque[FrameReader] = deque()
        super().__init__(source, materials, rules, name=name, scratch=scratch())

    @contextlib.contextmanager
    def lent_reader(self) -> Iterator[FrameReader]:
        """A reader for this thread, with its memory: one that another is done with, where there is one."""
        try:
            reader = self._idle.pop()
        except IndexError:
            found = self.frame_reader(scratch=scratch())
            assert found is not None
            reader = found
        yield reader
        self._idle.append(reader)

    def close(self) -> None:
        # Only of readers that no thread has: a frame must not change while it is opened.
        with self._lock:
            if not self.closed and self._reader is not None:
                keep_scratch(self._reader.give_up_scratch())
            while self._idle:
                keep_scratch(self._idle.pop().give_up_scratch())
            super().close()


class Span:
    """A part of the plaintext that one thread opens."""

    __slots__ = ("_message", "_offset", "_view")

    def __init__(self, message: SourceOfFile, offset: int, view: memoryview) -> None:
        self._message, self._offset, self._view = message, offset, view

    def __call__(self) -> None:
        with self._message.lent_reader() as reader:
            source, geometry = self._message.source, reader.geometry
            if isinstance(source, RemoteSource):
                first, stop = geometry.frames_covering(self._offset, self._offset + len(self._view))
                begin = geometry.frame_offset(first)
                source.prefetch(begin, geometry.frames_end(stop) - begin)
            reader.read_into(self._offset, self._view)


class Held(NamedTuple):
    """Plaintext from ``start`` to ``stop`` (excluded) that has been opened already: a pyarrow.Buffer."""

    start: int
    stop: int
    buffer: Any


class CryptFile(io.BufferedIOBase):
    """The plaintext of one message of a filesystem; reads as ``sc.open`` does, large reads in threads.

    It pickles as its place, not with its keys.
    """

    mode = "rb"

    def __init__(self, fs: CryptFileSystem, path: str, message: SourceOfFile) -> None:
        super().__init__()
        self.fs = fs
        self.path = path
        self.size = message.size
        self.header = message.header
        self._message = message
        self._held: list[Held] = []
        self._lock = threading.Lock()
        self._position = 0
        self._seeks = threading.local()
        self._turn = 0

    @property
    def name(self) -> str:
        return self.path

    @property
    def full_name(self) -> str:
        return self.fs.unstrip_protocol(self.path)

    @property
    def details(self) -> Info:
        return self.info()

    def info(self) -> Info:
        return self.fs.info(self.path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    # Some readers (DuckDB) share one file among threads, each of which seeks and then reads.  So a
    # thread reads where it has itself sought to, if no other thread has taken up the position since.

    def tell(self) -> int:
        self._check_open()
        with self._lock:
            sought = self._sought()
            return self._position if sought is None else sought

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._check_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.size}.get(whence)
        if base is None:
            raise ValueError(f"invalid whence {whence}")
        offset = operator.index(offset)  # numpy's integers would overflow in what is computed from it
        if base + offset < 0:
            raise ValueError("negative seek position")
        with self._lock:
            self._position = base + offset
            self._seeks.mine = self._turn, self._position
        return base + offset

    def _sought(self) -> int | None:
        """Where this thread has sought to, if that still holds.  Needs the lock."""
        turn, position = getattr(self._seeks, "mine", (-1, 0))
        return position if turn == self._turn else None

    def _take(self, size: int | None) -> tuple[int, int]:
        """The place and length of the next read; moves the position behind it."""
        self._check_open()
        size = -1 if size is None else operator.index(size)
        with self._lock:
            offset = self._sought()
            self._seeks.mine = -1, 0
            if offset is None:
                offset = self._position
                self._turn += 1  # the position went from one thread to another: what they sought is over
            left = max(0, self.size - offset)
            length = left if size < 0 else min(size, left)
            self._position = offset + length
            return offset, length

    def read(self, size: int | None = -1, /) -> bytes:
        return self.read_at(*self._take(size))

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size if size >= 0 else io.DEFAULT_BUFFER_SIZE)

    def peek(self, size: int = 0, /) -> bytes:
        return self.read_at(self.tell(), max(size, io.DEFAULT_BUFFER_SIZE))

    def readinto(self, buffer: Any, /) -> int:
        with octets_of(buffer) as octets:
            offset, length = self._take(len(octets))
            with self._lock:  # the message has one position of its own
                self._message.seek(offset)
                return self._message.readinto(octets[:length])

    def readinto1(self, buffer: Any, /) -> int:
        return self.readinto(buffer)

    def read_at(self, offset: int, length: int) -> bytes:
        """The plaintext from ``offset`` on, up to ``length`` bytes; the file's position stays."""
        offset, length = operator.index(offset), operator.index(length)
        length = max(0, min(length, self.size - offset))
        held = self._held_at(offset, length)
        if held is not None:
            return bytes(memoryview(held))
        if length < PARALLEL_LENGTH:
            return self._message.read_at(offset, length)

        def fill(view: memoryview) -> None:
            prefer_huge_pages(view)
            self.fs.fill(self._message, [(offset, view)])

        return filled(length, fill)

    def read_buffer(self, size: int | None = -1, /) -> Any:
        """The next ``size`` bytes as a ``pyarrow.Buffer``, opened in place: pyarrow asks for this."""
        return self.buffer_at(*self._take(size))

    def buffer_at(self, offset: int, length: int) -> Any:
        """``length`` bytes from ``offset`` on as a ``pyarrow.Buffer``; nothing is copied."""
        import pyarrow

        length = max(0, min(length, self.size - offset))
        held = self._held_at(offset, length)
        if held is not None:
            return held
        buffer = pyarrow.allocate_buffer(length)
        with octets_of(buffer) as octets:
            if len(octets):
                self.fs.fill(self._message, [(offset, octets)])
        return buffer

    def hold(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Open what these ranges (offset, length) cover now, in threads, and answer later reads from it.

        For a reader that says beforehand what it will read.  Whole frames are held, so that none is
        opened twice or copied; what was held before is given up.
        """
        import pyarrow

        self._check_open()
        reader = self._message.frame_reader()
        if reader is None:
            return  # unframed content is in memory as it is
        frame_length = reader.geometry.frame_length
        runs: list[tuple[int, int]] = []
        for offset, length in sorted(ranges):
            start = offset - offset % frame_length
            stop = min(-(-(offset + length) // frame_length) * frame_length, self.size)
            if runs and start <= runs[-1][1]:
                last = runs.pop()
                start, stop = last[0], max(stop, last[1])
            runs.append((start, stop))
        buffers = [pyarrow.allocate_buffer(stop - start) for start, stop in runs]
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        self.fs.fill(self._message, [(start, view) for (start, _), view in zip(runs, views, strict=True)])
        self._held = [Held(*run, buffer) for run, buffer in zip(runs, buffers, strict=True)]

    def _held_at(self, offset: int, length: int) -> Any:
        """The plaintext there as a pyarrow.Buffer, where it is held; else None."""
        for start, stop, buffer in self._held:
            if start <= offset and offset + length <= stop:
                return buffer.slice(offset - start, length)
        return None

    def verify_signature(self) -> None:
        self._message.verify_signature()

    def close(self) -> None:
        self._held = []
        self._message.close()
        super().close()

    def __repr__(self) -> str:
        return f"<CryptFile {self.path!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.fs, self.path, self.tell())

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


def _reopen(fs: CryptFileSystem, path: str, position: int) -> CryptFile:
    file: CryptFile = fs.open(path)
    file.seek(position)
    return file


class CryptWriter(io.BufferedIOBase):
    """A new file that becomes one message and appears when it is closed cleanly.

    Within a transaction of the filesystem it appears when the transaction ends (``commit``).  Threads that
    write to it wait for each other; a forked child leaves it to its parent.
    """

    mode = "wb"

    def __init__(
        self,
        fs: CryptFileSystem,
        path: str,
        begin: Callable[[int | None], tuple[EncryptingFile, LateTarget]],
    ) -> None:
        super().__init__()
        self.fs = fs
        self.path = path
        self._begin = begin
        self._held = bytearray()
        self._file: EncryptingFile | None = None
        self._target: LateTarget | None = None
        self._position = 0
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def name(self) -> str:
        return self.path

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._process != os.getpid():
            raise ValueError(BEFORE_FORK)
        with octets_of(data) as octets, self._lock:
            length = len(octets)
            if self._file is None and len(self._held) + length <= HELD_LENGTH:
                self._held += octets
            else:
                self._flush_held(None).write(octets)
            self._position += length
        return length

    def _flush_held(self, length: int | None) -> EncryptingFile:
        if self._file is None:
            try:
                self._file, self._target = self._begin(length)
            except BaseException:
                self.discard()
                raise
            self._file.write(self._held)
            self._held = bytearray()
        return self._file

    def close(self) -> None:
        if self._process != os.getpid():
            self.discard()
            return
        with self._lock:
            if self.closed:
                return
            try:
                self._flush_held(len(self._held)).close()
                self.fs.forget(self.path)
            finally:
                self._file = None
                super().close()

    def commit(self) -> None:
        """Make the closed file of a transaction appear."""
        if self._target is not None:
            self._target.commit()
            self.fs.forget(self.path)

    def discard(self) -> None:
        """Close without making the message appear."""
        file, self._file = self._file, None
        self._held = bytearray()
        if file is not None:
            file.discard()
        if self._target is not None and self._process == os.getpid():
            self._target.abandon()
        super().close()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        if not self.closed:
            self.discard()  # not close(): a file that was forgotten is not whole

    def __repr__(self) -> str:
        return f"<CryptWriter {self.path!r}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a file that is being written is not pickled")


class TargetFile(io.BufferedIOBase):
    """A file of the filesystem below, written as it is; it appears when it is closed cleanly.

    For what encrypts itself, as modular Parquet files do.
    """

    mode = "wb"

    def __init__(self, fs: CryptFileSystem, path: str) -> None:
        super().__init__()
        self._fs = fs
        self._path = path
        self._target: Target | None = fs.target(path, overwrite=True)
        self._position = 0
        self._process = os.getpid()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        if self._target is None:
            raise ValueError("I/O operation on closed file")
        if self._process != os.getpid():
            raise ValueError(BEFORE_FORK)
        with octets_of(data) as octets:
            self._target.write_at(self._position, octets)
            self._position += len(octets)
            return len(octets)

    def close(self) -> None:
        target, self._target = self._target, None
        if target is not None and self._process == os.getpid():
            try:
                target.flush()
                target.publish(overwrite=True)
                self._fs.sync_name(self._path)
            finally:
                target.discard()
            self._fs.forget(self._path)
        super().close()

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._discard()
        self.close()

    def __del__(self) -> None:
        self._discard()  # not close(): a file that was forgotten is not whole

    def _discard(self) -> None:
        target, self._target = getattr(self, "_target", None), None
        if target is not None and self._process == os.getpid():  # a forked child leaves it to its parent
            target.discard()


class CompressedWriter(io.BufferedIOBase):
    """What is written is compressed; closing it closes the file, too, which compressors leave open."""

    def __init__(self, file: CryptWriter, compressor: Any) -> None:
        super().__init__()
        self._file = file
        self._compressor = compressor

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        return int(self._compressor.write(data))

    def close(self) -> None:
        if not self.closed:
            self._compressor.close()
            self._file.close()
            super().close()

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self._file.discard()
            super().close()
        self.close()

    def __del__(self) -> None:
        if not self.closed:
            self._file.discard()


class LateTarget:
    """A target that appears when it is committed, at once or at the end of a transaction."""

    def __init__(self, target: Target, *, autocommit: bool, sync_name: Callable[[], None]) -> None:
        self._target = target
        self._autocommit = autocommit
        self._sync_name = sync_name
        self._overwrite: bool | None = None

    def write_at(self, offset: int, data: Buffer) -> None:
        self._target.write_at(offset, data)

    def state(self) -> State:
        return self._target.state()

    def flush(self) -> None:
        self._target.flush()

    def publish(self, *, overwrite: bool) -> None:
        self._overwrite = overwrite
        if self._autocommit:
            self.commit()

    def commit(self) -> None:
        if self._overwrite is not None:
            overwrite, self._overwrite = self._overwrite, None
            self._target.publish(overwrite=overwrite)
            self._sync_name()

    def discard(self) -> None:
        if self._overwrite is None:  # else it is whole and waits for its commit
            self._target.discard()

    def abandon(self) -> None:
        """Drop it though it is whole."""
        self._target.discard()
