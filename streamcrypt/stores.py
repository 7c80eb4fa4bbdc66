"""Object stores as trees: ``s3://``, ``gs://`` and ``az://``, with the shape of a local folder.

    s3://BUCKET/PREFIX      Amazon S3 and what speaks its protocol
    gs://BUCKET/PREFIX      Google Cloud Storage
    az://CONTAINER/PREFIX   Azure Blob Storage

    read    one ranged GET gives an object's state and its first bytes; every further one carries
            If-Match, so that a Source never mixes two versions
    write   up to one part: a single conditional PUT.  More: a multipart upload, several parts in
            flight, completed last and under the same condition
    walk    the store's listing, put into our order as it comes, in bounded memory

The one thing that must never happen: an object that is not whole under its name, or one that was
there replaced without being asked.  A store shows an object only when its PUT or its upload is
complete; ``If-None-Match: *`` makes it refuse where there is one already.

Credentials, endpoints, regions and proxies come from where the store's own tools take them: a tree
is a URL and nothing else, and every process makes its own clients.  `obstore` does the work; S3's
multipart uploads go through boto3, because only there the completion can be conditional and an
upload be found again by its id.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import math
import os
import platform
import queue
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from streamcrypt.errors import (
    DestinationError,
    LimitExceededError,
    SourceError,
    StreamcryptError,
    TemporaryError,
)
from streamcrypt.storage import (
    RESERVED_FOLDER,
    Buffer,
    Entry,
    Filters,
    State,
    check_name,
    is_ours,
    new_entry,
    sort_key,
)
from streamcrypt.tuples import NamedTuple
from streamcrypt.units import parse_duration

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

Item = TypeVar("Item")

_URL: Final = re.compile(r"(s3|gs|az)://([^/]+)(?:/(.*))?", re.DOTALL)

# Bytes of an object that come with its state: the header of a message, or all of a small one.
FIRST_READ: Final = 64 * 2**10
# The same for who reads all of it.
_WHOLE_READ: Final = 2**20
# An object of up to so many bytes is read by one request: a message of 1 MiB.
WHOLE_LENGTH: Final = _WHOLE_READ + FIRST_READ
# Bytes of objects that were opened, or are about to be, and wait for who needs them.
_OPENED_BYTES: Final = 64 * 2**20
# Who reads on without a gap is given what comes next before it is asked for: after so many bytes, in
# requests that grow to the second number, so many at once.
_SEQUENTIAL: Final = 4 * 2**20
_AHEAD_LENGTH: Final = 8 * 2**20
_AHEAD: Final = 2

# S3 takes parts of at least 5 MiB, all but the last, and at most 10,000 of them.
PART_LENGTH: Final = 8 * 2**20
MAX_PARTS: Final = 10_000
_PARTS_IN_FLIGHT: Final = 4
_BYTES_IN_FLIGHT: Final = 64 * 2**20
# An upload whose length is not known doubles its parts every so many.
_PARTS_OF_A_LENGTH: Final = 1_000
# The same, where the library wants one length for all parts.
_STREAMED_PART_LENGTH: Final = 32 * 2**20

# Every object that we write carries a random value in its metadata under this name: after a lost
# answer it tells whether the object that is there is the one that was just sent.  Azure takes only names
# that could be variables.
_MARK: Final = "streamcryptupload"
_UPLOADS: Final = f"{RESERVED_FOLDER}/uploads"
# The record of an upload of another machine is left alone until then.
_ABANDONED_AFTER: Final = timedelta(days=7)

# Objects of a listing that are told at once.
_PAGE: Final = 1000
# Entries that wait in memory for others that may come before them.
HELD_ENTRIES: Final = 10_000
_UP_TO_SLASH: Final = re.compile(r"(?<!/)[\x01-/]")

_RETRY_SECONDS: Final = 120.0  # an outage of a minute is waited out; RETRY_VARIABLE sets another limit
_LONGEST_RETRY: Final = 366 * 86400.0  # what the library's clock can hold
_LONGEST_PAUSE: Final = 2.0
RETRY_VARIABLE: Final = "STREAMCRYPT_STORE_RETRY_SECONDS"
_THREADS: Final = 32
# What boto3 gives is good for ten minutes at least, which is when it renews them at the latest; `obstore` takes half an
# hour for granted, and asks again five minutes before.
_CREDENTIALS_HOLD: Final = timedelta(minutes=10)


def split_url(text: str) -> tuple[str, str, str]:
    """Scheme, bucket and key of a URL; the key without slashes at its ends.  Nothing is unquoted."""
    match = _URL.fullmatch(text)
    if match is None:
        raise ValueError(f"{text}: is not the URL of an object store; s3://BUCKET/KEY is one")
    return match[1], match[2], (match[3] or "").strip("/")


class StoreTree:
    """The objects of a bucket whose keys begin with ``PREFIX/``.  May be used by several threads."""

    def __init__(self, root: str, bucket: _Bucket | None = None) -> None:
        scheme, name, self._prefix = split_url(root)
        self.root = f"{scheme}://{name}" + (f"/{self._prefix}" if self._prefix else "")
        self._bucket = bucket or _Bucket(scheme, name)
        self._swept = False
        self._first_read = FIRST_READ
        self.held_entries = HELD_ENTRIES

    def __repr__(self) -> str:
        return f"StoreTree({self.root!r})"

    def __reduce__(self) -> tuple[type[StoreTree], tuple[str]]:
        return StoreTree, (self.root,)

    @property
    def in_order(self) -> bool:
        return True

    def copy(self) -> StoreTree:
        tree = StoreTree(self.root, self._bucket)
        tree._first_read = _WHOLE_READ  # a worker reads whole objects
        return tree

    def subtree(self, name: str) -> StoreTree:
        return StoreTree(self.path(name), self._bucket)

    def above(self) -> tuple[StoreTree, str]:
        """The folder that this one lies in, over the same connections, and its name there."""
        folder, _, name = self._prefix.rpartition("/")
        return StoreTree(f"{self._bucket.scheme}://{self._bucket.name}/{folder}", self._bucket), name

    def close(self) -> None:
        pass  # connections are the library's own

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def key(self, name: str) -> str:
        return f"{self._prefix}/{check_name(name)}" if self._prefix else check_name(name)

    # -- reading

    def walk(self, filters: Filters | None = None) -> Iterator[Entry]:
        """Every object, names ascending part by part as in a local folder; ours are left out."""
        # What is done for every object is what finding out what is done costs (benchmarks/README.md, "Object stores").
        admit = filters.admit if filters is not None and filters != Filters() else None
        marker: Entry | None = None
        name = ""
        for entry in self._in_our_order(""):
            before, name = name, entry.name
            if marker is not None:
                if not name.startswith(marker.name + "/"):
                    yield marker
                marker = None
            if (name[0] in "._" or "/." in name) and is_ours(name):
                continue
            # "name/", as consoles make it, is listed as an empty object "name" that does not exist.
            if entry.size == 0 and name[-1] == "/":
                entry = entry._replace(name=name[:-1])
                if before == entry.name:
                    continue  # beside an object of that name
            if entry.size == 0 and self._is_marker(entry.name):
                marker = entry._replace(folder=True)
            elif admit is None or admit(entry.name):
                yield entry
        if marker is not None:
            yield marker

    def _is_marker(self, name: str) -> bool:
        return self._bucket.head(self.key(name), self.path(name), SourceError) is None

    def _in_our_order(self, folder: str) -> Iterator[Entry]:
        """The objects below ``folder`` by their parts, from a listing by their bytes.

        The two differ where a name continues with a character below '/' what is a folder elsewhere:
        a store lists "a-b" before "a/x", we list "a/x" first.  So "a-b" waits until the listing has
        passed all of "a/".  Too many that wait, and the store is asked whether there is an "a/" at
        all; if so, it is listed first.  Memory is bounded either way.
        """
        held: list[Entry] = []  # as they were listed
        settled: set[str] = set()  # there is no such folder, or it was listed
        taken: tuple[str, ...] = ()
        for page in _one_ahead(self._listing(folder)):
            last = page[-1].name
            # Only what begins as the last name does can wait: the listing has passed all other folders.
            folders = [last[: match.start()] for match in _UP_TO_SLASH.finditer(last, len(folder) + 1)]
            held += [entry for entry in page if not entry.name.startswith(taken)] if taken else page
            ready, held = _ready(held, [before for before in folders if before not in settled])
            yield from ready
            for before in folders:
                # A folder that the listing has come to passes by itself.
                if len(held) > self.held_entries and before not in settled and last[len(before)] != "/":
                    inner = before + "/"
                    if next(self._listing(inner, chunk=1), None) is not None:
                        yield from self._in_our_order(inner)
                        taken += (inner,)
                    settled.add(before)
                    ready, held = _ready(held, [before for before in folders if before not in settled])
                    yield from ready
        yield from _ready(held, [])[0]

    def _listing(self, folder: str, *, chunk: int = _PAGE) -> Iterator[list[Entry]]:
        """The store's own listing of ``folder`` ("" or ending in '/'), several at a time."""
        skip = self._name_starts
        last = folder.rstrip("/")
        for objects in self._pages(folder, chunk):
            page = [
                new_entry(
                    (
                        found["path"][skip:],
                        found["size"],
                        False,
                        None,
                        _state(found),
                        int(found["last_modified"].timestamp() * 1e9),
                    )
                )
                for found in objects
            ]
            last = _mark_folders(page, last)
            yield page

    def states(self) -> Iterator[dict[str, State]]:
        """The states of all objects by their names, as the store lists them: by bytes of the key.

        The first page is asked for at once, each further one while that before it is looked at.
        """
        skip = self._name_starts
        return _one_ahead(
            {found["path"][skip:]: _state(found) for found in page} for page in self._pages("", _PAGE)
        )

    @property
    def _name_starts(self) -> int:
        """Where in a key a name of this tree begins."""
        return len(self._prefix) + 1 if self._prefix else 0

    def _pages(self, folder: str, chunk: int) -> Iterator[list[Any]]:
        """What the library tells of the objects below ``folder``, several at a time."""
        import obstore

        prefix = "/".join(part for part in (self._prefix, folder.rstrip("/")) if part)
        itself = len(self._prefix)  # the root's own marker
        with _translated(SourceError, f"{self.root}/{folder}"):
            for objects in obstore.list(self._bucket.store, prefix or None, chunk_size=chunk):
                if page := [found for found in objects if len(found["path"]) > itself]:
                    yield page

    def is_empty(self) -> bool:
        """Whether there is no object below the root, ours included."""
        return next(self._listing("", chunk=1), None) is None

    def entry(self, name: str) -> Entry:
        meta = self._bucket.head(self.key(name), self.path(name), SourceError)
        if meta is None:
            raise SourceError(f"{self.path(name)}: does not exist")
        return Entry(name, meta["size"], state=_state(meta))

    def state(self, name: str) -> State | None:
        meta = self._bucket.head(self.key(name), self.path(name), SourceError)
        return None if meta is None else _state(meta)

    def exists(self, name: str) -> bool:
        return self._bucket.head(self.key(name), self.path(name), SourceError) is not None

    def open(self, name: str) -> StoreSource:
        """Open an object for reading: one request, which also brings its first bytes."""
        opened = self._bucket.take_opened(self.key(name))
        if opened is not None:
            return opened if isinstance(opened, StoreSource) else opened.result()
        return StoreSource(self._bucket, self.key(name), self.path(name), self._first_read)

    def read_whole(self, name: str, length: int) -> tuple[memoryview, State] | None:
        """All of an object by one request, and its state; None where it has another length."""
        import obstore

        with _translated(SourceError, self.path(name)):
            found = obstore.get(self._bucket.store, self.key(name))
            meta = found.meta
            if meta["size"] != length:  # known before any of it is taken into memory
                return None
            data = memoryview(found.bytes())
        return (data, _state(meta)) if len(data) == length else None

    def expect(self, name: str, size: int) -> None:
        """Begin to open an object that will soon be opened and read; one of up to 1 MiB comes whole."""
        key, path = self.key(name), self.path(name)
        length = size if size <= WHOLE_LENGTH else FIRST_READ
        opened = _threads().submit(StoreSource, self._bucket, key, path, max(1, length))
        self._bucket.keep_opened(key, opened, length)

    def lend(self, name: str, source: StoreSource) -> None:
        """Leave an open object to whoever opens it next: the same version, without a request."""
        source.is_read_whole = True
        self._bucket.keep_opened(self.key(name), source, source.head_length)

    # -- writing

    def create(self, name: str, *, size: int | None = None, overwrite: bool = False) -> StoreTarget:
        """A new object that will be called ``name``; ``size`` fits the parts to it, where it is known."""
        target = StoreTarget(self, name, size, overwrite=overwrite)
        # A small object finds out when it is published; a large one had better know before.
        if not overwrite and (size is None or size > PART_LENGTH) and self.exists(name):
            raise _exists_already(target.path)
        return target

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        self._bucket.delete(self.key(name), self.path(name))

    def make_folder(self, name: str) -> None:
        pass  # a store has none; the manifest lists the empty ones

    def sync_folder(self, folder: str) -> None:
        pass  # what a store has confirmed is durable

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects of ours; those that do not exist do no harm."""
        for _ in _threads().map(self.remove, names):
            pass

    # -- multipart uploads that were left open

    def remove_leftovers(self, folder: str) -> None:
        """Abort multipart uploads below the root that a killed job left; those of running jobs stay."""
        if not self._swept:
            with contextlib.suppress(StreamcryptError):  # creating objects will say so
                self.abort_uploads()

    def abort_uploads(self, of: Collection[Writer] = ()) -> None:
        """Abort the uploads on record whose processes have ended, as far as that is known, and those ``of`` these.

        Only uploads that are on record below the root are ours; others are not touched.
        """
        self._swept = True
        if self._bucket.scheme == "s3":
            for name, record, written in self._records():
                ended = record.is_abandoned() or datetime.now(UTC) - written > _ABANDONED_AFTER
                if ended or record.writer in of:
                    if self._has(record.key):  # what lies there is data, not an order to obey
                        _abort(self._bucket, record.key, record.upload_id)
                    self.delete((name,))

    def open_uploads(self) -> Iterator[OpenUpload]:
        """The multipart uploads below the root that the store holds open, whoever began them (S3 only)."""
        if self._bucket.scheme != "s3":
            return
        ours = {record.upload_id: record for _, record, _ in self._records()}
        request: dict[str, Any] = {"Prefix": f"{self._prefix}/"} if self._prefix else {}
        while True:
            answer = self._bucket.call("list_multipart_uploads", self.root, **request)
            for found in answer.get("Uploads") or ():
                record = ours.get(found["UploadId"])
                yield OpenUpload(
                    f"s3://{self._bucket.name}/{found['Key']}",
                    found["UploadId"],
                    found["Initiated"],
                    record.writer if record is not None else None,
                    record is not None and record.is_abandoned(),
                )
            if not answer.get("IsTruncated"):
                return
            request |= {
                "KeyMarker": answer["NextKeyMarker"],
                "UploadIdMarker": answer["NextUploadIdMarker"],
            }

    def _records(self) -> Iterator[tuple[str, _Record, datetime]]:
        """What is on record of uploads: the record's name, the record, and when it was written."""
        import obstore

        for entry in chain.from_iterable(list(self.subtree(_UPLOADS)._listing(""))):
            name = f"{_UPLOADS}/{entry.name}"
            try:
                with _translated(DestinationError, self.path(name)):
                    found = obstore.get(self._bucket.store, self.key(name))
                    record = _Record.parse(bytes(found.bytes()))
            except DestinationError:
                continue  # the upload was completed meanwhile
            if record is not None:
                yield name, record, found.meta["last_modified"]

    def _has(self, key: str) -> bool:
        return not self._prefix or key.startswith(f"{self._prefix}/")


def _mark_folders(page: list[Entry], last: str) -> str:
    """Give "name/" its slash back, of which the library says "name"; the page's last name.

    It is listed after "name-b", and then only is its place not that of "name".
    """
    for number, entry in enumerate(page):
        if entry.size == 0 and entry.name <= (page[number - 1].name if number else last):
            page[number] = entry._replace(name=f"{entry.name}/")
    return page[-1].name


def _one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread waits for the one after that which is given out."""
    following = _threads().submit(next, items, None)

    def given_out() -> Iterator[Item]:
        nonlocal following
        while (item := following.result()) is not None:
            following = _threads().submit(next, items, None)
            yield item

    return given_out()


def _ready(listed: list[Entry], folders: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Of what was listed: what waits for none of these folders, in our order; and what waits, as it was listed."""
    ready: list[Entry] = []
    waiting: list[Entry] = []
    done = 0
    for (
        folder
    ) in folders:  # each begins as the one before it, so what waits for it comes later, or waits already
        start, stop = (bisect.bisect_left(listed, folder + end, key=_name) for end in ("\x01", "/"))
        if start >= done:
            ready += listed[done:start]
            waiting += listed[start:stop]
            done = stop
    ready += listed[done:]
    ready.sort(key=_order)
    return ready, waiting


def _name(entry: Entry) -> str:
    return entry.name


def _order(entry: Entry) -> str:
    return sort_key(entry.name)


class StoreSource:
    """An object that is being read, always the same version of it."""

    def __init__(self, bucket: _Bucket, key: str, path: str, first_read: int = FIRST_READ) -> None:
        import obstore
        from obstore.exceptions import GenericError

        self._bucket = bucket
        self._key = key
        self._path = path
        with _translated(SourceError, path):
            try:
                found = obstore.get(bucket.store, key, options={"range": (0, first_read)})
                meta, metadata, self._head = found.meta, found.attributes, memoryview(found.bytes())
            except GenericError as error:
                if " 416" not in str(error) and "only 0 bytes" not in str(error):  # as stores answer it
                    raise
                meta, metadata, self._head = (
                    obstore.head(bucket.store, key),
                    {},
                    memoryview(b""),
                )  # it is empty
        self.size: int = meta["size"]
        self.state: State = _state(meta)
        self.metadata: Mapping[str, str] = metadata
        self._etag: str | None = meta["e_tag"]
        self._lock = threading.Lock()
        self._expected = 0  # where a reader that reads on would read next
        self._read_on = 0  # how much it has read without a gap
        self._from_start = True
        # Then a read that begins after the header is the first of all.
        self.is_read_whole = first_read >= _WHOLE_READ
        self._blocks: deque[_Block] = deque()
        self._window = 2**20

    @property
    def head_length(self) -> int:
        """The bytes from its start on that came when it was opened."""
        return len(self._head)

    def read_at(self, offset: int, buffer: memoryview) -> int:
        done = 0
        for piece in self._pieces(offset, len(buffer)):
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def view_at(self, offset: int, buffer: memoryview) -> memoryview:
        """What ``read_at`` gives: where it lies already if that is one piece, in ``buffer`` otherwise."""
        pieces = self._pieces(offset, len(buffer))
        if len(pieces) == 1:
            return pieces[0]
        done = 0
        for piece in pieces:
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        return buffer[:done]

    def _pieces(self, offset: int, length: int) -> list[memoryview]:
        """The bytes from ``offset`` on, up to ``length``, as they came from the store."""
        stop = max(offset, min(offset + length, self.size))
        pieces = [self._head[offset:stop]] if offset < len(self._head) else []
        position = max(offset, min(stop, len(self._head)))
        with self._lock:
            if offset != self._expected:
                self._read_on = 0
                self._from_start = offset == 0 or (self.is_read_whole and offset < len(self._head))
            self._expected = stop
            self._read_on += stop - offset
            if position < stop and (self._from_start or self._read_on > _SEQUENTIAL):
                return pieces + self._read_ahead(position, stop)
        if position < stop:
            pieces.append(self._get(position, stop))
        return pieces

    def check_unchanged(self) -> None:
        """Every request named the version that it wanted; only a store without ETags must be asked."""
        if self._etag is None:
            meta = self._bucket.head(self._key, self._path, SourceError)
            if meta is None or _state(meta) != self.state:
                raise _changed(self._path)

    def close(self) -> None:
        with self._lock:
            while self._blocks:
                self._blocks.pop().data.cancel()

    def _read_ahead(self, position: int, stop: int) -> list[memoryview]:
        pieces = []
        while position < stop:
            while self._blocks and not self._blocks[0].start <= position < self._blocks[0].stop:
                self._blocks.popleft().data.cancel()
            start = self._blocks[-1].stop if self._blocks else position
            while len(self._blocks) < _AHEAD and start < self.size:
                end = min(start + self._window, self.size)
                self._blocks.append(_Block(start, end, _threads().submit(self._get, start, end)))
                start = end
                self._window = min(2 * self._window, _AHEAD_LENGTH)
            block = self._blocks[0]
            pieces.append(block.data.result()[position - block.start : stop - block.start])
            position += len(pieces[-1])
        return pieces

    def _get(self, start: int, stop: int) -> memoryview:
        import obstore

        options: GetOptions = {"range": (start, stop)}
        if self._etag is not None:
            options["if_match"] = self._etag
        with _translated(SourceError, self._path):
            found = obstore.get(self._bucket.store, self._key, options=options)
            data = memoryview(found.bytes())
        # There are stores that pass over the condition: what they answered says of which version it is.
        if found.meta["e_tag"] != self._etag or len(data) != stop - start:
            raise _changed(self._path)
        return data


class _Block(NamedTuple):
    """Bytes of an object that were asked for before they are needed."""

    start: int
    stop: int
    data: Future[memoryview]


class StoreTarget:
    """An object that is being written, from its start to its end."""

    def __init__(self, tree: StoreTree, name: str, size: int | None, *, overwrite: bool) -> None:
        self.path = tree.path(name)
        self._tree = tree
        self._key = tree.key(name)
        self._size = size
        self._overwrite = overwrite
        self._mark = secrets.token_hex(16)
        self._held: bytes | bytearray = b""  # one write is kept as it is; it may be all there is
        self._length = 0
        self._parts = 0
        self._upload: _S3Upload | _StreamedUpload | None = None

    def write_at(self, offset: int, data: Buffer) -> None:
        if offset != self._length:
            raise RuntimeError("internal error: an object of a store is written in order")
        if not self._held:
            self._held = bytes(data)
        else:
            if isinstance(self._held, bytes):
                self._held = bytearray(self._held)
            self._held += data
        self._length += len(data)
        # A part ends where a write does, which is where a frame does.
        if len(self._held) >= part_length(self._size, self._parts):
            if self._upload is None:
                bucket = self._tree._bucket
                kind = _S3Upload if bucket.scheme == "s3" else _StreamedUpload
                self._upload = kind(self._tree, self._key, self.path, self._mark, self._size)
            if self._parts >= MAX_PARTS:
                raise LimitExceededError(f"{self.path}: is longer than {MAX_PARTS} parts can hold")
            part, self._held = self._held, b""
            self._parts += 1
            self._upload.add(part)

    def state(self) -> State:
        return self._length, 0, 0  # what it will be is known to the store, and only afterwards

    def flush(self) -> None:
        pass  # what a store has confirmed is durable

    def publish(self, *, overwrite: bool) -> State | None:
        """Make the object appear; its state, None where the store did not tell."""
        if self._upload is None:
            etag = self._put(overwrite=overwrite)
        else:
            etag = self._upload.complete(self._held, overwrite=overwrite)
            self._upload = None
        self._held = b""
        return (self._length, 0, etag.strip('"')) if etag else None

    def discard(self) -> None:
        upload, self._upload = self._upload, None
        self._held = b""
        if upload is not None:
            upload.abort()

    def _put(self, *, overwrite: bool) -> str | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        bucket = self._tree._bucket
        with _translated(DestinationError, self.path):
            try:
                return obstore.put(
                    bucket.store,
                    self._key,
                    self._held,
                    attributes={_MARK: self._mark},
                    mode="overwrite" if overwrite else "create",
                    use_multipart=False,
                )["e_tag"]
            except AlreadyExistsError:
                # An answer that was lost is asked for again, and then our own object is in the way.
                etag = bucket.etag_of(self._key, self._mark)
                if etag is None:
                    raise
                return etag


def part_length(size: int | None, parts: int) -> int:
    """How long the part after the first ``parts`` must be, so that MAX_PARTS are enough."""
    if size is None:
        return int(PART_LENGTH * 2 ** (parts // _PARTS_OF_A_LENGTH))
    return max(PART_LENGTH, math.ceil(size / (MAX_PARTS - 1)))


class _S3Upload:
    """A multipart upload through boto3, whose id is on record until it is completed or aborted."""

    def __init__(self, tree: StoreTree, key: str, path: str, mark: str, size: int | None) -> None:
        import obstore

        self._bucket = tree._bucket
        self._key = key
        self._path = path
        self._mark = mark
        self._parts: list[Future[str]] = []
        self._pending: set[Future[str]] = set()
        answer = self._call("create_multipart_upload", Metadata={_MARK: mark}, **_server_side_encryption())
        self._id: str = answer["UploadId"]
        self._record = tree.key(f"{_UPLOADS}/{mark}")
        # One that is killed before it has a record has no parts yet either: it holds no bytes.
        try:
            with _translated(DestinationError, path):
                obstore.put(self._bucket.store, self._record, _Record.of_this_process(key, self._id).text())
        except BaseException:
            self.abort()
            raise

    def add(self, data: bytes | bytearray) -> None:
        in_flight = max(1, min(_PARTS_IN_FLIGHT, _BYTES_IN_FLIGHT // len(data)))
        while len(self._pending) >= in_flight:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for part in done:
                part.result()
        number = len(self._parts) + 1
        part = _threads().submit(self._send, number, data)
        self._parts.append(part)
        self._pending.add(part)

    def complete(self, rest: bytes | bytearray, *, overwrite: bool) -> str | None:
        if rest:
            self.add(rest)
        etags = [part.result() for part in self._parts]
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        condition = {} if overwrite else {"IfNoneMatch": "*"}
        etag: str | None
        try:
            etag = self._call(
                "complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": parts}, **condition
            ).get("ETag")
        except (SourceError, DestinationError, TemporaryError):
            # The answer to a completion may have been lost: then the upload is gone and the object there.
            etag = self._bucket.etag_of(self._key, self._mark)
            if etag is None:
                self.abort()
                raise
        self._forget()
        return etag

    def abort(self) -> None:
        for part in self._pending:
            part.cancel()
        wait(self._pending)
        with contextlib.suppress(StreamcryptError):  # its record stays, and the next job tries again
            _abort(self._bucket, self._key, self._id)
            self._forget()

    def _send(self, number: int, data: bytes | bytearray) -> str:
        answer = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=data)
        etag: str = answer["ETag"]
        return etag

    def _call(self, operation: str, **request: Any) -> dict[str, Any]:
        return self._bucket.call(operation, self._path, Key=self._key, **request)

    def _forget(self) -> None:
        record = getattr(self, "_record", None)
        if record is not None:
            with contextlib.suppress(StreamcryptError):
                self._bucket.delete(record, self._path)


class _StreamedUpload:
    """A multipart upload by `obstore`, which takes the parts from a thread of its own.

    Its completion has no condition: whether an object is there is looked up just before.
    """

    def __init__(self, tree: StoreTree, key: str, path: str, mark: str, size: int | None) -> None:
        self._tree = tree
        self._key = key
        self._path = path
        self._mark = mark
        self._part_length = part_length(size, 0) if size is not None else _STREAMED_PART_LENGTH
        self._queue: queue.Queue[bytes | bytearray | _Broken | None] = queue.Queue(maxsize=1)
        self._done: Future[str | None] = Future()
        self._thread = threading.Thread(target=self._run, name="streamcrypt-upload", daemon=True)
        self._thread.start()

    def add(self, data: bytes | bytearray) -> None:
        self._hand_over(data)

    def complete(self, rest: bytes | bytearray, *, overwrite: bool) -> str | None:
        if rest:
            self._hand_over(rest)
        if not overwrite and self._tree._bucket.head(self._key, self._path, DestinationError) is not None:
            self.abort()
            raise _exists_already(self._path)
        self._hand_over(None)
        self._thread.join()
        with _translated(DestinationError, self._path):
            return self._done.result()

    def abort(self) -> None:
        with contextlib.suppress(StreamcryptError):
            self._hand_over(_Broken())
        self._thread.join()

    def _hand_over(self, item: bytes | bytearray | _Broken | None) -> None:
        while True:
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                if self._done.done():
                    with _translated(DestinationError, self._path):
                        self._done.result()
                    return
            else:
                return

    def _items(self) -> Iterator[bytes | bytearray]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _Broken):
                raise item
            yield item

    def _run(self) -> None:
        import obstore

        try:
            made = obstore.put(
                self._tree._bucket.store,
                self._key,
                self._items(),
                attributes={_MARK: self._mark},
                chunk_size=self._part_length,
                max_concurrency=_PARTS_IN_FLIGHT,
            )
        except BaseException as error:  # noqa: BLE001  (it goes to whoever waits for the upload)
            self._done.set_exception(error)
        else:
            self._done.set_result(made["e_tag"])


class _Broken(Exception):  # noqa: N818  (it tells the library to abort, and nobody else)
    """An upload that is not to be completed."""


class Writer(NamedTuple):
    """A process of a machine, as long as both run: its start, and that of the machine, are part of it."""

    host: str
    process: str

    @classmethod
    def this(cls) -> Writer:
        return cls(_host(), _process(os.getpid()))


class OpenUpload(NamedTuple):
    """A multipart upload that has been begun.  ``writer`` None: it is not on record, so not ours."""

    path: str
    upload_id: str
    begun: datetime
    writer: Writer | None
    ended: bool
    """Whether the writer is known to have ended: of a process of another machine it never is."""


class _Record(NamedTuple):
    """What is on record of an open upload: which it is, and which process makes it."""

    key: str
    upload_id: str
    host: str
    process: str

    @classmethod
    def of_this_process(cls, key: str, upload_id: str) -> _Record:
        return cls(key, upload_id, *Writer.this())

    @property
    def writer(self) -> Writer:
        return Writer(self.host, self.process)

    def text(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    @classmethod
    def parse(cls, text: bytes) -> _Record | None:
        try:
            record = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        return record if all(isinstance(value, str) for value in record) else None

    def is_abandoned(self) -> bool:
        """Whether the process was of this machine and has ended."""
        if self.host != _host():
            return False
        number = self.process.partition(" ")[0]
        return not number.isdigit() or _process(int(number)) != self.process


def _host() -> str:
    """This machine since its last start, and what it sees of processes."""
    parts = [platform.node()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        parts.append(file.read().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process(number: int) -> str:
    """A process by its number and the time of its start; the number alone once it has ended."""
    try:
        with open(f"/proc/{number}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return f"{number} ended"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(number, 0)
            return str(number)
        return f"{number} ended"
    if fields[0] == "Z":
        return f"{number} ended"
    return f"{number} {fields[19]}"


# -- one bucket and its clients


class _Bucket:
    """A bucket and the clients for it, made when they are first used."""

    def __init__(self, scheme: str, name: str) -> None:
        self.scheme = scheme
        self.name = name
        self._lock = threading.Lock()
        self._store: ObjectStore | None = None
        self._client: Any = None
        self._opened: dict[str, tuple[Future[StoreSource] | StoreSource, int]] = {}
        self._opened_bytes = 0

    def keep_opened(self, key: str, opened: Future[StoreSource] | StoreSource, length: int) -> None:
        """Keep an object, of which so many bytes are in memory, until it is taken, or too many are kept."""
        with self._lock:
            _, before = self._opened.pop(key, (None, 0))
            self._opened[key] = opened, length
            self._opened_bytes += length - before
            while self._opened_bytes > _OPENED_BYTES:
                _, dropped = self._opened.pop(next(iter(self._opened)))
                self._opened_bytes -= dropped

    def take_opened(self, key: str) -> Future[StoreSource] | StoreSource | None:
        with self._lock:
            opened, length = self._opened.pop(key, (None, 0))
            self._opened_bytes -= length
            return opened

    @property
    def store(self) -> ObjectStore:
        with self._lock:
            if self._store is None:
                self._store = _make_store(self.scheme, self.name, self._session, self._endpoint)
            return self._store

    @functools.cached_property
    def _session(self) -> Any:
        return _session() if self.scheme == "s3" else None

    @functools.cached_property
    def _endpoint(self) -> str | None:
        return _s3_endpoint() if self.scheme == "s3" else None

    def head(self, key: str, path: str, kind: type[StreamcryptError]) -> dict[str, Any] | None:
        """What the store says of an object; None when there is none."""
        import obstore

        with _translated(kind, path, reads=True):
            try:
                return dict(obstore.head(self.store, key))
            except FileNotFoundError:
                return None

    def delete(self, key: str, path: str) -> None:
        """Delete an object, if there is one; one at a time, because not every store takes lists of them."""
        import obstore

        if self.scheme == "s3":
            self.call("delete_object", path, Key=key)
            return
        with _translated(DestinationError, path), contextlib.suppress(FileNotFoundError):
            obstore.delete(self.store, key)

    def etag_of(self, key: str, mark: str) -> str | None:
        """The ETag ("" for none) of the object of that key if it was written with this mark."""
        import obstore

        try:
            found = obstore.get(self.store, key, options={"head": True})
        except _not_answered():
            return None
        return (found.meta["e_tag"] or "") if found.attributes.get(_MARK) == mark else None

    def call(self, operation: str, path: str, **request: Any) -> dict[str, Any]:
        """An operation of S3 by boto3's name; tried again while it may help."""
        from botocore.exceptions import BotoCoreError, ClientError

        with self._lock:
            if self._client is None:
                self._client = _make_client(self._session, self._endpoint)
        if _is_true("AWS_REQUEST_PAYER"):  # as `obstore` sends it
            request["RequestPayer"] = "requester"
        give_up = time.monotonic() + _retry_seconds()
        pause = 0.1
        while True:
            try:
                answer: dict[str, Any] = getattr(self._client, operation)(Bucket=self.name, **request)
            except ClientError as error:
                code = str(error.response["Error"].get("Code", ""))
                status = int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
                if status == 412:
                    raise _exists_already(path) from error
                reason = f"{path}: the store refused {operation} ({code or status})"
                refused = status == 501 or (status < 500 and status not in (409, 429))
                if status == 403:
                    reason += f": it denied access; the caller needs {_NEEDED.get(operation, 's3:PutObject')}"
                if refused and code not in ("SlowDown", "RequestTimeout"):
                    raise DestinationError(reason) from error
                failure, cause = TemporaryError(f"{reason}; try again"), error
            except BotoCoreError as error:
                failure = TemporaryError(
                    f"{path}: the store cannot be reached ({type(error).__name__}); try again"
                )
                cause = error  # type: ignore[assignment]
            else:
                return answer
            if time.monotonic() + pause > give_up:
                raise failure from cause
            time.sleep(pause * (0.5 + secrets.randbelow(1000) / 2000))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _make_store(scheme: str, name: str, session: Any, endpoint: str | None) -> ObjectStore:
    try:
        from obstore import store as stores
    except ImportError as error:
        raise ImportError("object stores need obstore: pip install 'streamcrypt[stores]'") from error
    retry: Any = {
        "max_retries": 1000,
        "retry_timeout": timedelta(seconds=_retry_seconds()),
        "backoff": {
            "init_backoff": timedelta(seconds=0.1),
            "max_backoff": timedelta(seconds=_LONGEST_PAUSE),
            "base": 2,
        },
    }
    options: Any = {"timeout": "120s"}
    if scheme == "gs":
        emulator = os.environ.get("STORAGE_EMULATOR_HOST")  # as Google's own libraries name one
        account: Any = {}
        if emulator:
            emulator = _checked_endpoint(emulator if "://" in emulator else f"http://{emulator}")
            options["allow_http"] = True
            nobody = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
            account["service_account_key"] = json.dumps(nobody | {"gcs_base_url": emulator})
        return stores.GCSStore(name, config=account, client_options=options, retry_config=retry)
    if scheme == "az":
        return stores.AzureStore(name, client_options=options, retry_config=retry)
    config: Any = {}
    if endpoint is not None:
        config["endpoint"] = endpoint
        if endpoint.startswith("http:"):
            options["allow_http"] = True
    config["unsigned_payload"] = _is_payload_unsigned(endpoint)
    encryption = _server_side_encryption()
    if encryption:
        config["server_side_encryption"] = encryption["ServerSideEncryption"]
    if session is None:
        config["skip_signature"] = True
        return stores.S3Store(name, config=config, client_options=options, retry_config=retry)
    from obstore.auth.boto3 import Boto3CredentialProvider

    config["region"] = _region(session)
    return stores.S3Store(
        name,
        config=config,
        client_options=options,
        retry_config=retry,
        credential_provider=Boto3CredentialProvider(session, ttl=_CREDENTIALS_HOLD),
    )


def _make_client(session: Any, endpoint: str | None) -> Any:
    import botocore
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # `call` does it, with the same pauses
        max_pool_connections=_THREADS,
        connect_timeout=5,
        s3={"payload_signing_enabled": not _is_payload_unsigned(endpoint)},
        **({} if session is not None else {"signature_version": botocore.UNSIGNED}),
    )
    session = session or _boto3_session()
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=_region(session),
        config=config,
    )


def _session() -> Any:
    """boto3's session, with whatever credentials it finds; None where none are wanted."""
    if _is_true("AWS_SKIP_SIGNATURE"):
        return None
    session = _boto3_session()
    if session.get_credentials() is None:
        raise StreamcryptError(
            "no AWS credentials were found: set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    return session


def _boto3_session() -> Any:
    """A new session, whose service models have been read before where this process had another one."""
    import boto3
    import botocore.session

    session = botocore.session.get_session()
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    return boto3.Session(botocore_session=session)


@functools.cache
def _loader(search_path: str | None) -> Any:
    """botocore's service models, read once a process: that of S3 takes longer than many a job's requests."""
    from botocore.loaders import create_loader

    return create_loader(search_path)


def _region(session: Any) -> str:
    """The Region, also from the variable of all the other AWS SDKs, which boto3 passes over."""
    return os.environ.get("AWS_REGION") or session.region_name or "us-east-1"


def _s3_endpoint() -> str | None:
    """The endpoint that the environment or the profile sets, for both libraries; None for the Region's own."""
    import botocore.session
    from botocore.config import Config

    # The last is one that `obstore` reads by itself.
    named = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    endpoint: str | None = next(filter(None, named), None)
    if endpoint is None:
        session = botocore.session.get_session()
        settings = [session.get_scoped_config().get(name) for name in ("endpoint_url", "services")]
        settings += map(session.get_config_variable, ("use_fips_endpoint", "use_dualstack_endpoint"))
        if any(settings):  # boto3 knows what they come to; asking it always would cost a client
            asked = _boto3_session()
            config = Config(s3={"us_east_1_regional_endpoint": "regional"})
            endpoint = asked.client("s3", region_name=_region(asked), config=config).meta.endpoint_url
    return None if endpoint is None else _checked_endpoint(endpoint)


def _checked_endpoint(endpoint: str) -> str:
    """The endpoint; StreamcryptError for what is none, or would send data in the clear."""
    try:
        url = urlsplit(endpoint)
        is_one = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_one = False
    if not is_one:
        raise StreamcryptError("the store's endpoint is not a URL; write https://HOST or https://HOST:PORT")
    if not _is_guarded(endpoint) and not _is_true("AWS_ALLOW_HTTP"):
        host = urlsplit(endpoint).hostname or ""
        raise StreamcryptError(
            f"the store's endpoint at {host} is not https; AWS_ALLOW_HTTP=true allows plain HTTP all the same"
        )
    return endpoint.rstrip("/")


def _is_guarded(endpoint: str) -> bool:
    """Whether nobody on the way can change what is sent."""
    host = urlsplit(endpoint).hostname or ""
    loopback = host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None
    return endpoint.startswith("https:") or loopback


def _is_payload_unsigned(endpoint: str | None) -> bool:
    """Whether a request's signature leaves its body out: SHA-256 of every byte costs what encrypting it does.

    TLS guards the body on its way; what is sent is authenticated when it is read, in any case.
    """
    return not _is_false("AWS_UNSIGNED_PAYLOAD") and (endpoint is None or _is_guarded(endpoint))


def _server_side_encryption() -> dict[str, Any]:
    """What S3 is asked to do itself, as a second layer; the variables are those of `obstore`."""
    key = os.environ.get("AWS_SSE_KMS_KEY_ID")
    kind = os.environ.get("AWS_SERVER_SIDE_ENCRYPTION") or ("aws:kms" if key else None)
    if kind is None:
        return {}
    asked: dict[str, Any] = {"ServerSideEncryption": kind}
    if key:
        asked["SSEKMSKeyId"] = key
    if os.environ.get("AWS_SSE_BUCKET_KEY_ENABLED"):
        asked["BucketKeyEnabled"] = _is_true("AWS_SSE_BUCKET_KEY_ENABLED")
    return asked


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _is_false(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("0", "false", "no", "off")


def _retry_seconds() -> float:
    try:
        return min(parse_duration(os.environ.get(RETRY_VARIABLE) or _RETRY_SECONDS), _LONGEST_RETRY)
    except ValueError as error:
        raise StreamcryptError(f"{RETRY_VARIABLE}: {error}") from error


def _abort(bucket: _Bucket, key: str, upload_id: str) -> None:
    """Abort an upload until it is gone: a part that was on its way may outlive the first attempt."""
    from botocore.exceptions import ClientError

    path = f"s3://{bucket.name}/{key}"
    for _ in range(3):
        for operation in ("abort_multipart_upload", "list_parts"):
            try:
                bucket.call(operation, path, Key=key, UploadId=upload_id)
            except DestinationError as error:
                cause = error.__cause__
                code = cause.response["Error"]["Code"] if isinstance(cause, ClientError) else ""
                # A store that cannot tell has taken the abort at its word.
                if code == "NoSuchUpload" or (code == "NotImplemented" and operation == "list_parts"):
                    return
                raise
    raise TemporaryError(f"{path}: an upload could not be aborted; try again")


# -- errors


def _not_answered() -> tuple[type[Exception], ...]:
    """What the library raises where there is no object, or no answer."""
    from obstore.exceptions import BaseError

    return FileNotFoundError, BaseError


# What a library says when it finds no credentials, or none that can be used; S3's are boto3's (`_session`).
_ABOUT_CREDENTIALS = re.compile("token request|service account|Account must be specified", re.IGNORECASE)
_CREDENTIALS = {
    "gs://": "; set GOOGLE_APPLICATION_CREDENTIALS, or STORAGE_EMULATOR_HOST for an emulator",
    "az://": "; set AZURE_STORAGE_ACCOUNT_NAME and a key, a SAS token or an identity",
}
_TEMPORARY: Final = re.compile(
    r"error sending request|timed out|timeout|connection|after \d+ retries|status code: (429|50[^1]|5[1-9])"
)


class _translated:  # noqa: N801  (a context manager, as contextlib's; one by a generator takes a request's hundredth)
    """The library's errors as ours; ``reads``: a request that only looks, whatever it is for."""

    __slots__ = ("_kind", "_path", "_reads")

    def __init__(self, kind: type[StreamcryptError], path: str, *, reads: bool = False) -> None:
        self._kind = kind
        self._path = path
        self._reads = reads or kind is SourceError

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            translated = _translation(self._kind, self._path, error, reads=self._reads)
            if translated is not None:
                raise translated from error


def _translation(
    kind: type[StreamcryptError], path: str, error: Exception, *, reads: bool
) -> StreamcryptError | None:
    """Our error for one of the library's; None for any other."""
    from obstore import exceptions

    if isinstance(error, FileNotFoundError):
        return kind(f"{path}: does not exist (or its bucket does not)")
    if isinstance(error, exceptions.AlreadyExistsError):
        return _exists_already(path)
    if isinstance(error, exceptions.PreconditionError):
        return _changed(path)
    _, external, reason = str(error).partition("\n")[0].partition("External AWS credential provider: ")
    if external:
        return kind(f"{path}: AWS credentials cannot be had: {reason.partition(': ')[2]}")
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return kind(f"{path}: the store denied access; the caller needs {_permission(path, reads=reads)}")
    if isinstance(error, exceptions.InvalidPathError):
        found = re.search(r'Path "(.*)"(?:: Enc| contained)', str(error).partition("\n\n")[0], re.DOTALL)
        key = f"the key {found[1]!r}, which is not a name" if found else "a key that is not a name"
        return kind(f"{path}: holds {key}: an empty part, '.' or '..', or a control character")
    if isinstance(error, ValueError):
        return kind(f"{path}: is not a name that can be asked of a store")
    if not isinstance(error, exceptions.BaseError):
        return None
    # The first line; what follows is for the library's authors.  A query may hold a signature, an endpoint a password.
    text = re.sub(r"\?\S+|(?<=//)[^/@\s]+@", "", str(error).partition("\n")[0].partition(": <")[0])
    if "status code: 404" in text:
        return kind(f"{path}: does not exist (or its bucket does not)")
    if _TEMPORARY.search(text):
        return TemporaryError(f"{path}: the store cannot serve the request ({text}); try again")
    hint = _CREDENTIALS.get(path[:5], "") if _ABOUT_CREDENTIALS.search(text) else ""
    return kind(f"{path}: {text}{hint}")


# The permission of an operation, where it is not s3:PutObject.
_NEEDED: Final = {
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_parts": "s3:ListMultipartUploadParts",
}


def _permission(path: str, *, reads: bool) -> str:
    """What a caller who was denied lacks.  S3 answers 403 for an absent object too, unless it may be listed."""
    if path.startswith("s3://"):
        return "s3:GetObject and s3:ListBucket" if reads else "s3:PutObject"
    return "the right to read and list objects" if reads else "the right to create objects"


def _exists_already(path: str) -> DestinationError:
    return DestinationError(f"{path}: exists already; overwrite must be asked for")


def _changed(path: str) -> SourceError:
    return SourceError(f"{path}: changed while it was read; run again when nobody writes to it")


def _state(meta: Any) -> State:
    """An object's size and its ETag; the time of its last change only where there is no ETag.

    A listing tells times more exactly than an answer for the object alone does, and the two must be equal.
    """
    if etag := meta["e_tag"]:
        return meta["size"], 0, etag.strip('"')
    return meta["size"], int(meta["last_modified"].timestamp()), 0


# -- threads for requests

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _threads() -> ThreadPoolExecutor:
    """The threads of this process that wait for stores."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="streamcrypt-store")
        return _pool


def _after_fork() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
