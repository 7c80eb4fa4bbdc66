"""Objects of a filesystem that is not local: read by ranges, written in order."""

from __future__ import annotations

import contextlib
import secrets
import threading
from typing import Final

from fsspec import AbstractFileSystem

from streamcrypt.storage import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, Buffer, State

_MAX_READ_AHEAD: Final = 8 * 2**20


class RemoteSource:
    """An object of another filesystem, read by ranges; in each thread it reads ahead of one who reads on."""

    def __init__(self, fs: AbstractFileSystem, path: str, size: int) -> None:
        self.size = size
        self._fs = fs
        self._path = path
        self._ahead = threading.local()
        self.state: State = size, 0, 0

    def read_at(self, offset: int, buffer: memoryview) -> int:
        length = min(len(buffer), max(0, self.size - offset))
        start, data = getattr(self._ahead, "window", (0, b""))
        if not start <= offset <= offset + length <= start + len(data):
            going_on = offset == getattr(self._ahead, "end", None)
            more = min(2 * max(length, len(data)), _MAX_READ_AHEAD) if going_on else length
            self.prefetch(offset, max(length, more))
            start, data = self._ahead.window
        self._ahead.end = offset + length
        piece = memoryview(data)[offset - start : offset - start + length]
        buffer[: len(piece)] = piece
        return len(piece)

    def prefetch(self, offset: int, length: int) -> None:
        """Fetch a range in one request, for this thread's next reads."""
        end = min(offset + length, self.size)
        self._ahead.window = (
            offset,
            self._fs.cat_file(self._path, start=offset, end=end) if end > offset else b"",
        )

    def check_unchanged(self) -> None:
        pass  # every frame that is read has been authenticated, and belongs to one message

    def close(self) -> None:
        self._ahead = threading.local()


class RemoteTarget:
    """An object of another filesystem that is written in order."""

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self._position = 0
        # Object stores show an upload when it is complete; elsewhere a temporary name must do it.
        folder, _, _ = path.rpartition("/")
        name = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        self._written = path if fs.async_impl else f"{folder}/{name}" if folder else name
        if not fs.async_impl and folder:
            fs.makedirs(folder, exist_ok=True)
        self._file = fs.open(self._written, "wb")

    def write_at(self, offset: int, data: Buffer) -> None:
        assert offset == self._position
        self._file.write(data)
        self._position += len(data)

    def state(self) -> State:
        return self._position, 0, 0

    def flush(self) -> None:
        pass  # closing an upload makes it durable

    def publish(self, *, overwrite: bool) -> None:
        file, self._file = self._file, None
        file.close()
        if self._written != self._path:
            self._fs.mv(self._written, self._path)

    def discard(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        if self._written == self._path:
            with contextlib.suppress(AttributeError, NotImplementedError):
                file.discard()
            file.closed = True  # or it would upload what there is when it is forgotten
        else:
            file.close()
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._written)
