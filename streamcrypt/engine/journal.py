"""The journal of a job on a folder: what is finished already, should the job be interrupted.

It lies at ``_streamcrypt/journal`` of the destination while the job runs and is removed when the job
has finished.  One line a finished file, appended after the file has its name:

    CRC-32 of the rest, 8 hexadecimal digits | space | JSON object

A torn last line is what an interruption leaves and is ignored, with all that follows it.  The journal
is a hint, not a proof: nothing that it says is taken over before the object itself was looked at, and
a message before its header and final frame were authenticated (engine/run.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from streamcrypt.errors import DestinationError
from streamcrypt.storage import RESERVED_FOLDER, LocalTree

_FLUSH_INTERVAL: Final = 5.0  # seconds
_NAME: Final = "journal"
JOURNAL: Final = f"{RESERVED_FOLDER}/{_NAME}"


class Finished(NamedTuple):
    """A finished file: its source as it was, and what was made of it.

    ``source`` and ``made`` are the states of the two files (size, modification time in ns, inode);
    ``message_id`` and ``header_tag`` (hexadecimal) name the message that was written, or read.
    """

    name: str
    source: tuple[int, int, int]
    made: tuple[int, int, int]
    size: int
    message_length: int
    message_id: str
    header_tag: str


class Journal:
    """Appends lines, one write for each batch of outcomes."""

    def __init__(self, tree: LocalTree, operation: str, *, durable: bool) -> None:
        self._tree = tree
        self._operation = operation
        self._durable = durable
        self._descriptor: int | None = None
        self._lines: list[bytes] = []
        self._flush_at = 0.0
        self._whole_length: int | None = None  # of what an interrupted job left, without a torn line

    def read(self) -> dict[str, Finished]:
        """What an interrupted job of the same kind had finished, by name; empty when there was none."""
        finished: dict[str, Finished] = {}
        try:
            with self._folder() as folder, open(_NAME, "rb", opener=_opener(folder)) as file:
                self._whole_length = 0
                for line in file:
                    record = _parse(line)
                    if record is None or record.pop("operation", None) != self._operation:
                        break
                    record["source"], record["made"] = tuple(record["source"]), tuple(record["made"])
                    finished[record["name"]] = Finished(**record)
                    self._whole_length += len(line)
        except FileNotFoundError:
            pass
        except (OSError, TypeError, KeyError) as error:
            raise DestinationError(f"{self._tree.path(JOURNAL)}: cannot be read: {error}") from error
        return finished

    def add(self, finished: Finished) -> None:
        text = json.dumps(
            {"operation": self._operation, **finished._asdict()}, separators=(",", ":")
        ).encode()
        self._lines.append(b"%08x %s\n" % (zlib.crc32(text), text))

    def write(self) -> None:
        """Write the lines that were added since the last time."""
        if not self._lines:
            return
        path = self._tree.path(JOURNAL)
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                with self._folder(create=True) as folder:
                    self._descriptor = _opener(folder)(_NAME, flags)
                if self._whole_length is not None:
                    os.ftruncate(self._descriptor, self._whole_length)
            os.write(self._descriptor, b"".join(self._lines))
            # For speed of resuming only: lines that a power loss takes cost their files' work again.
            if self._durable and time.monotonic() > self._flush_at:
                os.fdatasync(self._descriptor)
                self._flush_at = time.monotonic() + _FLUSH_INTERVAL
        except OSError as error:
            raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error
        self._lines.clear()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """The job has finished: nothing is left to resume."""
        self.close()
        try:
            with self._folder() as folder:
                os.unlink(_NAME, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        with contextlib.suppress(OSError):  # the manifest is there
            os.rmdir(RESERVED_FOLDER, dir_fd=self._tree.directory(""))

    @contextlib.contextmanager
    def _folder(self, *, create: bool = False) -> Iterator[int]:
        """A descriptor of our own folder, which is not followed if it is a symbolic link."""
        root = self._tree.directory("", create=create)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(RESERVED_FOLDER, 0o700, dir_fd=root)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(RESERVED_FOLDER, flags, dir_fd=root)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _opener(folder: int) -> Callable[[str, int], int]:
    return lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=folder)


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    try:
        if not line.endswith(b"\n") or int(checksum, 16) != zlib.crc32(text):
            return None
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
