"""The manifest of an encrypted tree: which messages belong to it, and which is which.

It is a message itself, at ``_streamcrypt/manifest``, written last, under the same keys and context.
Its plaintext is one JSON object a line:

    {"streamcrypt": "manifest", "version": 1}
    {"name", "size", "message_length", "message_id", "header_tag"}        a file, names in walk order
    {"name", "folder": true}                                              an empty folder
    {"name", "failed": "why"}                                             a file that was left out
    {"files", "bytes", "sources", "time"}                                 what was listed; the end

``sources`` is a digest of what the job read and of its settings, and ``time`` when all of its files
were there (ns since 1970): by these a resumed job knows a folder that is finished (engine/complete.py).
Both are left out where a file failed, and in what earlier versions wrote.

A message proves that it is whole; only the manifest proves that nothing was added, removed or put
in another's place.  It binds a name to a message by message id and header tag.  It cannot prove that
the whole tree is the newest one: for that, keep the manifest's digest elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from operator import lt
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256, Hash

from streamcrypt.errors import IntegrityError
from streamcrypt.message.header import Header
from streamcrypt.storage import State, check_name, sort_key
from streamcrypt.streams import EncryptingFile
from streamcrypt.tuples import NamedTuple

quoted: Final = json.encoder.encode_basestring_ascii  # a name as json.dumps writes it
_VERSION: Final = 1
_BLOCK_LINES: Final = 256
_HASHED_LENGTH: Final = 2**18
MANIFEST_START: Final = b'{"streamcrypt":"manifest","version":1}\n'  # its first line
# Up to this the lines are held back, so that the manifest's length is known when its data key is
# asked for and counted; longer ones are written as they come, in constant memory.
HELD_LENGTH: Final = 8 * 2**20


class Listed(NamedTuple):
    """One line: a file with its message, an empty folder, or a file that was left out (``failed``).

    A line of a signed manifest (signature.py) knows the message by the ``sha256`` of all its bytes instead.
    """

    name: str
    size: int = 0
    message_length: int = 0
    message_id: str = ""
    header_tag: str = ""
    folder: bool = False
    failed: str | None = None
    sha256: str = ""

    def check(self, header: Header, message_length: int) -> None:
        """IntegrityError unless this is the header of the message that was listed under the name."""
        # Where there is a digest, whoever reads the message compares it.
        if not self.sha256 and (
            header.message_id.hex() != self.message_id or header.tag.hex() != self.header_tag
        ):
            raise IntegrityError(
                "is not the message that the manifest lists under this name: swapped or replaced"
            )
        if message_length != self.message_length:
            raise IntegrityError("has another length than the manifest lists: truncated or extended")

    def line(self) -> bytes:
        if self.folder:
            return _line({"name": self.name, "folder": True})
        if self.failed is not None:
            return _line({"name": self.name, "failed": self.failed})
        return file_line(
            quoted(self.name), self.size, self.message_length, self.message_id, self.header_tag
        ).encode()


def file_line(quoted_name: str, size: int, message_length: int, message_id: str, header_tag: str) -> str:
    # Written out for speed: numbers and hexadecimal digits need no escapes.
    return (
        f'{{"name":{quoted_name},"size":{size},"message_length":{message_length},'
        f'"message_id":"{message_id}","header_tag":"{header_tag}"}}\n'
    )


def source_line(quoted_name: str, state: State) -> str:
    size, modified, identity = state
    if isinstance(identity, str):
        identity = quoted(identity)
    return f"[{quoted_name},{size},{modified or identity}]\n"


class Ending(NamedTuple):
    """The last line.  ``sources`` is empty where it does not say what the job read."""

    files: int
    bytes: int
    sources: str = ""
    time: int = 0


class SourcesDigest:
    """What a job reads, in walk order, and its settings, as one SHA-256.

    A file counts by its name, size and modification time, an object of a store by its ETag: not by what
    changes when a folder is copied with its times.
    """

    def __init__(self, settings: str) -> None:
        # Not hashlib's, which brings a second OpenSSL that few commands need.
        self._hash = Hash(SHA256())
        self._held = bytearray(_line({"settings": settings}))  # many lines are hashed at once

    def add(self, name: str, state: State) -> None:
        self.add_lines(source_line(quoted(name), state))

    def add_lines(self, lines: str) -> None:
        """Several lines of ``source_line``."""
        self._held += lines.encode()
        if len(self._held) > _HASHED_LENGTH:
            self._hash_held()

    def add_folder(self, name: str) -> None:
        self._held += _line({"folder": name})

    def hexdigest(self) -> str:
        self._hash_held()
        return self._hash.copy().finalize().hex()

    def _hash_held(self) -> None:
        self._hash.update(self._held)
        self._held.clear()


class ManifestWriter:
    """Writes lines in walk order.  ``create(length)`` begins the message; None: length unknown."""

    def __init__(self, create: Callable[[int | None], EncryptingFile]) -> None:
        self._create = create
        self._file: EncryptingFile | None = None
        self._held = bytearray()
        self._files = 0
        self._bytes = 0
        self._write(_line({"streamcrypt": "manifest", "version": _VERSION}))

    def add(self, listed: Listed) -> None:
        if not listed.folder and listed.failed is None:
            self._files += 1
            self._bytes += listed.size
        self._write(listed.line())

    def add_files(self, lines: str, files: int, size: int) -> None:
        """Add several lines of ``file_line``, of files whose sizes make ``size``."""
        self._files += files
        self._bytes += size
        self._write(lines.encode())

    def publish(self, sources: str | None) -> None:
        """Write the last line and give the manifest its name."""
        ending: dict[str, Any] = {"files": self._files, "bytes": self._bytes}
        if sources is not None:
            ending |= {"sources": sources, "time": time.time_ns()}
        self._write(_line(ending))
        if self._file is None:
            self._begin(len(self._held))
        assert self._file is not None
        self._file.close()

    def discard(self) -> None:
        if self._file is not None:
            self._file.discard()

    def _write(self, line: bytes) -> None:
        self._held += line
        if self._file is None and len(self._held) > HELD_LENGTH:
            self._begin(None)
        elif self._file is not None:
            self._file.write(self._held)
            self._held.clear()

    def _begin(self, length: int | None) -> None:
        self._file = self._create(length)
        self._file.write(self._held)
        self._held.clear()


def read_manifest(file: Iterable[bytes]) -> Generator[Listed, None, Ending]:
    """The lines of a manifest whose message is open; IntegrityError when it is not one, or not whole.

    The generator's value is the last line.
    """
    ending = Ending(0, 0)

    def blocks() -> Iterator[list[dict[str, Any]]]:
        nonlocal ending
        ending = yield from read_blocks(file)

    yield from chain.from_iterable(map(as_listed, blocks()))
    return ending


def read_blocks(file: Iterable[bytes]) -> Generator[list[dict[str, Any]], None, Ending]:
    """The same lines, several at a time and each as its JSON object, which holds fields of ``Listed``."""
    lines = iter(file)
    _expect(_parse(next(lines, b"")) == {"streamcrypt": "manifest", "version": _VERSION})
    files = total = 0
    previous = ""
    for records in _blocks(lines):
        ending = records.pop() if "name" not in records[-1] else None
        _expect(all("name" in fields and _FIELDS.issuperset(fields) for fields in {*map(tuple, records)}))
        names = [record["name"] for record in records]
        _expect({*map(type, names)} <= {str})
        places = [*map(sort_key, map(check_name, names))]
        _expect(all(map(lt, (previous, *places), places)))
        previous = places[-1] if places else previous
        sizes = [
            record.get("size", 0)
            for record in records
            if not record.get("folder") and record.get("failed") is None
        ]
        if records:
            yield records
        files += len(sizes)
        total += sum(sizes)
        if ending is not None:
            _expect({"files", "bytes"} <= ending.keys() <= frozenset(Ending._fields))
            _expect((ending["files"], ending["bytes"]) == (files, total) and next(lines, None) is None)
            return Ending(**ending)
    raise IntegrityError(_NOT_WHOLE)


def as_listed(records: Sequence[dict[str, Any]]) -> list[Listed]:
    """The lines of such a block."""
    return [
        _new_listed((*record.values(), False, None, "")) if [*record] == _FILE_FIELDS else Listed(**record)
        for record in records
    ]


_FIELDS: Final = frozenset(Listed._fields) - {"sha256"}
_FILE_FIELDS: Final = [*Listed._fields[:5]]
# As ``Listed._make``, in less than half the time.
_new_listed: Final[Callable[[tuple[object, ...]], Listed]] = partial(tuple.__new__, Listed)
_NOT_WHOLE: Final = "is not a whole manifest of this version"


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(str(line, "utf-8"))
    except ValueError:
        record = None
    _expect(isinstance(record, dict))
    return dict(record)


def _blocks(lines: Iterator[bytes]) -> Iterator[list[dict[str, Any]]]:
    """The objects of lines of one each, many parsed at a time: one by one takes twice as long."""
    while block := list(islice(lines, _BLOCK_LINES)):
        try:
            records = json.loads(str(b"[%s]" % b",".join(block), "utf-8"))
        except ValueError:
            records = []
        _expect(len(records) == len(block) and all(type(record) is dict for record in records))
        yield records


def _expect(holds: bool) -> None:
    if not holds:
        raise IntegrityError(_NOT_WHOLE)
