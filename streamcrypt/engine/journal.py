"""The journal of a job on a folder: what is finished already, should the job be interrupted.

It lies at ``_streamcrypt/journal`` of the destination while the job runs and is removed when the job
has finished.  A job that encrypts writes it only with its keys, and believes only what they wrote:

    {"streamcrypt": "journal", "operation", "header"}         the first line of a process that writes on
    tag, 64 hexadecimal digits | space | [time, [[...], ...]]   files that have their names, several a line

``header`` is that of a message without a body (Base64), whose content key K only those can derive who
can use the job's keys.  With T0 the first line, the tag of the n-th one after it is

    Tn = HMAC-SHA-256(HKDF-Expand-SHA-256(K, "streamcrypt journal 1"), Tn-1 | line n without its tag)

(RFC 2104, RFC 5869 section 2.3: K is uniformly random, so nothing is extracted), so that no line is made,
moved or left out by anybody else.  A torn last line is what an interruption leaves and is ignored, with
all that follows it.  Where nothing is encrypted there is no key, the tag is a SHA-256 and guards against
accidents only.

A file is taken over as the journal names it when its state is the one that was noted and it has not
changed since ``time``, when the line was written (``Seen`` in storage.py).  Any other is taken over only
when it is the message of the line by its id, its header's tag and its length, and its header and final
frame authenticate (engine/run.py).

On an object store nothing is appended to, and to look at every object would take as long as writing it.
There the journal is a folder of parts, and a proof: each part is a message of its own under the job's keys
and context, and a line also names the ETag that the store gave the object.  Its plaintext:

    CRC-32 of all that follows, 8 hexadecimal digits | space | {"operation", "host", "process"}
    [[names], [sizes], ...]                                     files that have their names, several at once
    their lines of the manifest and of the digest of its sources

Such a block has its files in walk order: most often they are all taken over at once, with these lines (``left`` in
engine/run.py).  An object is taken over when the store's listing shows it with that ETag.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from streamcrypt.engine.job import Job
from streamcrypt.engine.manifest import file_line, quoted, source_line
from streamcrypt.errors import DestinationError, FormatError, IntegrityError
from streamcrypt.message.footer import Signer
from streamcrypt.message.frames import FINAL_OVERHEAD
from streamcrypt.message.header import parse_header
from streamcrypt.storage import RESERVED_FOLDER, Entry, LocalTree, State, Tree, sort_key
from streamcrypt.streams import (
    OutgoingMessage,
    ReadingRules,
    header_template,
    open_message,
    unlock,
)
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from streamcrypt.keys.materials import EncryptionMaterials
    from streamcrypt.message.header import Header
    from streamcrypt.stores import StoreTree, Writer

_FLUSH_INTERVAL: Final = 5.0  # seconds
# On a store: the same, and later this part of the time that the job has run; so parts do not grow many.
_FLUSH_SHARE: Final = 0.01
_NAME: Final = "journal"
JOURNAL: Final = f"{RESERVED_FOLDER}/{_NAME}"
# The frame length in the header of a part, which a job's own messages never have (MAX_WRITTEN_FRAME_LENGTH):
# whatever somebody got encrypted as a file, its message is not taken for a part.
_PART_FRAME_LENGTH: Final = 2**32 - 1
_READERS: Final = 16
_BLOCK: Final = 256
_KEY_INFO: Final = b"streamcrypt journal 1"
_KEY_LENGTH: Final = 32


def is_interrupted(tree: Tree) -> bool:
    """Whether a journal lies in a folder: the job there did not finish, or still runs."""
    if isinstance(tree, LocalTree):
        return tree.exists(JOURNAL)
    return not tree.subtree(JOURNAL).is_empty()


class Finished(NamedTuple):
    """A finished file: its source as it was, and what was made of it.

    ``source`` and ``made`` are the states of the two files;
    ``message_id`` and ``header_tag`` (hexadecimal) name the message that was written, or read.
    ``noted`` is when this was written down (ns since 1970), 0 where the store's ETag says more.
    """

    name: str
    source: State
    made: State
    size: int
    message_length: int
    message_id: str
    header_tag: str
    noted: int = 0


class Block(NamedTuple):
    """Several finished files in walk order: of each its name, both states, and its lines in the manifest's two texts.

    As text: the columns of names and states and the lengths of both texts, as JSON in one line, then the texts.
    """

    names: Sequence[str]
    sources: Sequence[State]
    made: Sequence[State]
    lines: str
    source_lines: str

    @classmethod
    def of(cls, rows: Sequence[Finished]) -> Block:
        names, sources, made, *_ = zip(*rows, strict=True)
        lines = [file_line(quoted(row.name), *row[3:7]) for row in rows]
        source_lines = [source_line(quoted(row.name), row.source) for row in rows]
        return cls(names, sources, made, "".join(lines), "".join(source_lines))

    @classmethod
    def parse(cls, text: str, start: int) -> tuple[Block, int]:
        """The block that begins there, and where it ends; for what ``text`` never gave a ValueError or the like."""
        first = text.index("\n", start) + 1
        names, size, modified, identity, made, written, etag, length, source_length = json.loads(
            text[start:first]
        )
        second, end = first + length, first + length + source_length
        states = (
            zip(*columns, strict=True) for columns in ((size, modified, identity), (made, written, etag))
        )
        sources, made = map(list, states)
        if not len(names) == len(sources) == len(made) > 0 or min(length, source_length) < 0:
            raise ValueError("columns and texts that do not fit")
        return cls(names, sources, made, text[first:second], text[second:end]), end

    def text(self) -> str:
        columns = [self.names, *zip(*self.sources, strict=True), *zip(*self.made, strict=True)]
        lengths = [len(self.lines), len(self.source_lines)]
        return json.dumps([*columns, *lengths], separators=(",", ":")) + "\n" + self.lines + self.source_lines

    def rows(self) -> list[Finished]:
        """The same, file by file."""
        records = json.loads(f"[{','.join(self.lines.splitlines())}]")
        return [
            Finished(
                name,
                source,
                made,
                record["size"],
                record["message_length"],
                record["message_id"],
                record["header_tag"],
            )
            for name, source, made, record in zip(self.names, self.sources, self.made, records, strict=True)
        ]


class Journal:
    """Appends a line for each batch of outcomes."""

    def __init__(self, tree: LocalTree, operation: str, job: Job) -> None:
        self._tree = tree
        self._operation = operation
        self._job = job
        self._descriptor: int | None = None
        self._lines: list[Finished] = []
        self._flush_at = 0.0
        self._whole_length: int | None = None  # of what an interrupted job left, without a torn line
        self._tags: _Tags | None = None

    def read(self) -> dict[str, Finished]:
        """What an interrupted job of the same kind had finished, by name; empty when there was none."""
        finished: dict[str, Finished] = {}
        try:
            with self._folder() as folder, open(_NAME, "rb", opener=_opener(folder)) as file:
                self._whole_length = 0
                tags: _Tags | None = None
                for line in file:
                    if line.startswith(b"{"):
                        tags = self._reading_tags(line)
                        if tags is None:
                            break
                    else:
                        mark, _, text = line.partition(b" ")
                        if tags is None or not line.endswith(b"\n") or not tags.is_next(mark, text):
                            break
                        noted, rows = json.loads(text)
                        for name, source, made, size, length, message_id, tag in rows:
                            finished[name] = Finished(
                                name, tuple(source), tuple(made), size, length, message_id, tag, noted
                            )
                    self._whole_length += len(line)
        except FileNotFoundError:
            pass
        except (OSError, TypeError, ValueError) as error:
            raise DestinationError(f"{self._tree.path(JOURNAL)}: cannot be read: {error}") from error
        return finished

    def _reading_tags(self, line: bytes) -> _Tags | None:
        """The tags of the lines after this first one; None where it is not of a job like this under our keys."""
        try:
            start = json.loads(line)
            if (start["streamcrypt"], start["operation"]) != ("journal", self._operation):
                return None
            sealed = start["header"]
            if self._job.resuming is None:
                return _Tags(line, None) if sealed is None else None
            header, _ = parse_header(base64.b64decode(sealed), max_encrypted_data_keys=None)
            is_ours = header.frame_length == _PART_FRAME_LENGTH
            return _Tags(line, _content_key(header, self._job)) if is_ours else None
        except (IntegrityError, ValueError, TypeError, KeyError):  # not ours, whoever put it there
            return None

    def begin(self, materials: EncryptionMaterials | None) -> None:
        """Say that a job has begun here, which its first file then follows."""
        if self._tags is not None:
            return
        sealed = message = None
        if materials is not None:
            template = header_template(materials, _PART_FRAME_LENGTH, self._job.authenticated_context)
            message = OutgoingMessage.begin(materials, template, _PART_FRAME_LENGTH)
            sealed = base64.b64encode(message.header).decode()
        start = {"streamcrypt": "journal", "operation": self._operation, "header": sealed}
        line = json.dumps(start, separators=(",", ":")).encode() + b"\n"
        self._tags = _Tags(line, message.content_key if message is not None else None)
        # What is replaced no longer is what the manifest there lists, and that must be known first.
        self._append(line, flush=self._job.durable and self._job.overwrite)

    def add(self, finished: Finished) -> None:
        self._lines.append(finished)

    def write(self, *, last: bool = False) -> None:
        """Write the lines that were added since the last time."""
        if not self._lines:
            return
        self.begin(None)
        assert self._tags is not None
        rows = [line[:-1] for line in self._lines]
        text = json.dumps([time.time_ns(), rows], separators=(",", ":")).encode() + b"\n"
        # For speed of resuming only: lines that a power loss takes cost their files' work again.
        flush = self._job.durable and time.monotonic() > self._flush_at
        self._append(self._tags.next(text) + b" " + text, flush=flush)
        if flush:
            self._flush_at = time.monotonic() + _FLUSH_INTERVAL
        self._lines.clear()

    def _append(self, data: bytes, *, flush: bool) -> None:
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                with self._folder(create=True) as folder:
                    self._descriptor = _opener(folder)(_NAME, flags)
                    if self._whole_length is not None:
                        os.ftruncate(self._descriptor, self._whole_length)
                    if flush:
                        os.fsync(folder)
            os.write(self._descriptor, data)
            if flush:
                os.fdatasync(self._descriptor)
        except OSError as error:
            path = self._tree.path(JOURNAL)
            raise DestinationError(f"{path}: cannot be written: {error.strerror}") from error

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


class _Tags:
    """The tags of lines that follow a first one."""

    def __init__(self, first: bytes, content_key: bytes | None) -> None:
        self._last = first
        self._mac: HMAC | None = None
        if content_key is not None:
            key = HKDFExpand(SHA256(), _KEY_LENGTH, _KEY_INFO).derive(content_key)
            self._mac = HMAC(key, SHA256())

    def next(self, text: bytes) -> bytes:
        if self._mac is None:
            chained = Hash(SHA256())
            chained.update(self._last + text)
            tag = chained.finalize()
        else:
            mac = self._mac.copy()
            mac.update(self._last + text)
            tag = mac.finalize()
        self._last = tag
        return tag.hex().encode()

    def is_next(self, tag: bytes, text: bytes) -> bool:
        # Here, because it imports hashlib and with it a second OpenSSL, which writing has no use for.
        from cryptography.hazmat.primitives.constant_time import bytes_eq

        return bytes_eq(self.next(text), tag)


class StoreJournal:
    """The same on an object store: parts, each with a first line that says who wrote it."""

    def __init__(self, tree: StoreTree, operation: str, job: Job) -> None:
        from streamcrypt.stores import Writer

        self._tree = tree
        self._parts = tree.subtree(JOURNAL)
        self._operation = operation
        self._job = job
        self._lines: list[Finished] = []
        self._start = {"operation": operation, **Writer.this()._asdict()}
        self._began = time.monotonic()
        self._write_at = self._began + _FLUSH_INTERVAL
        self._has_begun = False
        self.writers: set[Writer] = set()  # of the parts that were read

    def read(self) -> list[Block]:
        """What an interrupted job of the same kind had finished, from the parts that authenticate, the oldest first."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_READERS, thread_name_prefix="streamcrypt-journal") as readers:
            parts = readers.map(self._read_part, list(self._parts.walk()))
            return [block for part in parts for block in part]

    def begin(self, materials: EncryptionMaterials | None) -> None:
        """Say that a job has begun here, where it replaces what a manifest there lists."""
        if not self._has_begun and self._job.overwrite:
            self._put([])
        self._has_begun = True

    def add(self, finished: Finished) -> None:
        self._lines.append(finished)

    def write(self, *, last: bool = False) -> None:
        """Make a part of the lines that were added, when it is time for one, or when it is the ``last``."""
        now = time.monotonic()
        if not self._lines or (now < self._write_at and not last):
            return
        self._put(self._lines)
        self._lines.clear()
        self._write_at = now + max(_FLUSH_INTERVAL, _FLUSH_SHARE * (now - self._began))

    def _put(self, lines: Sequence[Finished]) -> None:
        rows = sorted(lines, key=_place)
        blocks = (Block.of(rows[at : at + _BLOCK]).text() for at in range(0, len(rows), _BLOCK))
        text = "".join([json.dumps(self._start), "\n", *blocks]).encode()
        data = self._seal(b"%08x %s" % (zlib.crc32(text), text))
        # Names in the order in which parts were made: a later line about a file replaces an earlier one.
        target = self._parts.create(f"{time.time_ns():020}-{os.urandom(4).hex()}", size=len(data))
        try:
            target.write_at(0, data)
            target.publish(overwrite=False)
        finally:
            target.discard()

    def close(self) -> None:
        pass

    def remove(self) -> None:
        """The job has finished, or begins anew: nothing is left to resume."""
        with contextlib.suppress(DestinationError):  # parts that stay prove nothing wrong
            names = [f"{JOURNAL}/{entry.name}" for entry in self._parts.walk()]
            if names:
                self._tree.delete(names)

    def _read_part(self, entry: Entry) -> list[Block]:
        from streamcrypt.stores import Writer

        part = self._parts.read_whole(entry.name, entry.size)
        if part is None:
            return []
        blocks: list[Block] = []
        try:
            checksum, _, plaintext = self._open(part[0]).partition(b" ")
            if int(checksum, 16) != zlib.crc32(plaintext):
                return []
            first, _, text = str(plaintext, "ascii").partition("\n")
            start = json.loads(first)
            if start.pop("operation", None) != self._operation:
                return []
            writer = Writer(**start)
            position = 0
            while position < len(text):
                block, position = Block.parse(text, position)
                if self._job.resuming is None:  # whoever wrote it
                    block.rows()
                blocks.append(block)
        except (
            IntegrityError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
        ):  # not ours, whoever put it there
            return []
        self.writers.add(writer)
        return blocks

    def _seal(self, lines: bytes) -> bytes:
        """The part as it is stored: as it is where the job has no key to encrypt with."""
        job = self._job
        if job.writing is None:
            return lines
        context = {**job.context, **job.authenticated_context}
        materials = job.writing.for_encryption(job.suite, context, len(lines))
        template = header_template(materials, _PART_FRAME_LENGTH, job.authenticated_context)
        message = OutgoingMessage.begin(materials, template, _PART_FRAME_LENGTH)
        frame = bytearray(FINAL_OVERHEAD + len(lines))
        message.cipher.seal_final(lines, 0, memoryview(frame))
        part = message.header + frame
        if message.signing_key is not None:
            signer = Signer(job.suite, message.signing_key)
            signer.update(part)
            part += signer.footer()
        return part

    def _open(self, part: memoryview) -> bytes:
        job = self._job
        if job.resuming is None:
            return bytes(part)
        header, _ = parse_header(part, max_encrypted_data_keys=None)
        if header.frame_length != _PART_FRAME_LENGTH:
            raise FormatError("a message, but not a part of a journal")
        rules = ReadingRules(
            max_encrypted_data_keys=None,
            authenticated_context=job.authenticated_context,
            require_signed=job.suite.signed,
        )
        return open_message(part, job.resuming, rules)


def _place(finished: Finished) -> str:
    return sort_key(finished.name)


def _opener(folder: int) -> Callable[[str, int], int]:
    return lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=folder)


def _content_key(header: Header, job: Job) -> bytes:
    """The key of a message of the job's own, whose header authenticates."""
    assert job.resuming is not None
    rules = ReadingRules(max_encrypted_data_keys=None, authenticated_context=job.authenticated_context)
    return unlock(header, job.resuming, rules).content_key
