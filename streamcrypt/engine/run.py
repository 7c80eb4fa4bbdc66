"""encrypt, decrypt, verify, rekey: the story of a job, with files and workers.

    for each entry of the source: open it or seal it as a task   (keys, derived keys, geometry)
    tasks to workers, a bounded number in flight                 (engine.pool)
    outcomes in any order; the manifest's lines in walk order

The parent alone asks for data keys, so the cache's limits hold over all workers.  One file that
fails does not stop the others; a key that cannot be used to encrypt stops the job, since it would
fail every file.  A message whose worker died starts again under a new message id.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import time
import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

from streamcrypt.engine.audit import audit_line
from streamcrypt.engine.job import Failure, Job, Place, Progress, Report
from streamcrypt.engine.journal import Block, Finished, Journal, StoreJournal
from streamcrypt.engine.manifest import (
    Listed,
    ManifestWriter,
    SourcesDigest,
    file_line,
    quoted,
    read_manifest,
    source_line,
)
from streamcrypt.engine.pool import Lost, Pool, ProcessPool, ThreadPool
from streamcrypt.engine.spans import (
    BATCH_BYTES,
    BATCH_FILES,
    MANIFEST,
    SIGNATURE,
    SMALL_LENGTH,
    SPAN_LENGTH,
    SPLIT_LENGTH,
    STATEMENT,
    FileTask,
    Opening,
    Sealing,
    SmallFile,
    SmallFiles,
    SmallMessages,
    Tasks,
    cut,
    in_batches,
    is_large,
)
from streamcrypt.engine.worker import Outcome, Setup, SmallOutcome, Worker
from streamcrypt.errors import (
    ContextMismatchError,
    DestinationError,
    FormatError,
    IntegrityError,
    KeyAccessError,
    SourceError,
    StreamcryptError,
    TemporaryError,
)
from streamcrypt.keys.materials import EncryptionMaterials, Materials
from streamcrypt.message.derive import derive_keys
from streamcrypt.message.frames import FINAL_OVERHEAD, UNFRAMED_PREFIX, FrameCipher, Geometry, unframed_length
from streamcrypt.message.header import Header, HeaderTemplate, authenticate_header, parse_header
from streamcrypt.message.suites import TAG_LENGTH
from streamcrypt.storage import (
    KEPT_FOLDERS,
    Entry,
    LocalTarget,
    LocalTree,
    Source,
    State,
    Target,
    Tree,
    sort_key,
)
from streamcrypt.streams import (
    DEFAULT_FRAME_LENGTH,
    DecryptingFile,
    EncryptingFile,
    FrameReader,
    OutgoingMessage,
    ReadingRules,
    header_template,
    keys_alike,
    located,
    new_message_ids,
    read_bytes,
    source_geometry,
    source_header,
    unlock,
)
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from streamcrypt.engine.hashing import HashingTarget
    from streamcrypt.engine.signature import StatementWriter
    from streamcrypt.stores import StoreSource, StoreTree

_ATTEMPTS: Final = 3
# Messages in a store that are being opened while those before them become tasks.
_OPENED_AHEAD: Final = 32
# Threads that decrypt small messages of a store each ask for them themselves.  Where a request takes longer than so
# many seconds they mostly wait, and there are up to so many, who ask for at most so many bytes at once; elsewhere
# more threads than a job's workers cost more than they bring (benchmarks/README.md, "Object stores").
_STORE_LATENCY: Final = 0.002
_STORE_READERS: Final = 32
_STORE_BYTES_ASKED: Final = 16 * 2**20
# Files that a worker holds until all of them are whole, where they are held in memory; and small ones, which
# it holds a few of at a time and waits for the store at each.
_STORE_BATCH_FILES: Final = 4
_STORE_BATCH_SMALL_FILES: Final = 16
# The first entries are looked at to choose threads or processes.
SAMPLE: Final = 4096
# What the interpreter itself spends on a file and on a frame, and what starting processes costs, in
# seconds: see benchmarks/README.md, "threads or processes".
_INTERPRETER_PER_FILE: Final = 150e-6
_INTERPRETER_PER_FRAME: Final = 4e-6
PROCESSES_PAY: Final = 0.4
# What cipher and kernel need for a byte, which they do without the interpreter's lock.
UNLOCKED_PER_BYTE: Final = 0.65e-9
# Descriptors that are left to whatever else this process opens meanwhile.
_OTHER_DESCRIPTORS: Final = 32


def interpreter_seconds(files: float, frames: float) -> float:
    """What the interpreter itself spends on so many files and frames; threads spend it one at a time."""
    return files * _INTERPRETER_PER_FILE + frames * _INTERPRETER_PER_FRAME


def processes_pay(files: float, frames: float) -> bool:
    """Whether a job of these is worth starting processes for, when it has more than one worker.

    `files` are those of the sample by which a job chooses, at most ``SAMPLE``.  A plan asks it too.
    """
    return interpreter_seconds(files, frames) > PROCESSES_PAY


def threads_pay(files: float, frames: float, length: float) -> bool:
    """Whether workers side by side shorten a job of so many files, frames and bytes.

    Where the interpreter's part is the larger one they only take its lock from each other, and each time wake a
    processor that sleeps: half as fast as one of them alone.
    """
    return length * UNLOCKED_PER_BYTE > interpreter_seconds(files, frames)


def way_of_working(
    files: float, frames: float, length: float, workers: int, *, flushed: bool = False, on_store: bool = False
) -> Literal["alone", "threads", "processes"]:
    """What so many workers are for a job that begins with so many files, frames and bytes.

    ``alone``: one thread, in turns with the one that hands out.  ``flushed``: to a disk, file by file.
    """
    # Who waits for a store needs no processor of its own.
    if workers > 1 and not on_store and processes_pay(files, frames):
        return "processes"
    # Who waits for a store or for a disk to flush leaves the lock to others.
    waiting = on_store or (workers > 1 and flushed)
    return "threads" if waiting or threads_pay(files, frames, length) else "alone"


def encrypt(job: Job) -> Report:
    """Encrypt every entry of the source; each becomes visible when it is whole."""
    with _Run(job) as run:
        run.drive(run.readable(run.left(run.entries())), run.seal)
    return run.report


def decrypt(job: Job) -> Report:
    """Decrypt every message of the source, in the order of its manifest where it has one."""
    with _Run(job) as run:
        run.drive(run.listed(run.entries()), run.open)
    return run.report


# Verifying is decrypting to nowhere (or to a comparison); rekeying opens and seals in the worker.
verify = decrypt
rekey = decrypt


_Line = TypeVar("_Line", Listed, Entry)


class _Item(NamedTuple):
    """A file of the job: its number in walk order, and its line of the manifest where there is one."""

    number: int
    entry: Entry
    listed: Listed | None


class _Large:
    """A file that is cut into spans: its target, how many spans are out, and what went wrong."""

    def __init__(self, task: FileTask, source_state: State, target: LocalTarget | None) -> None:
        self.task = task
        self.source_state = source_state
        self.target = target
        self.spans_out = 0
        self.all_sent = False
        self.error: StreamcryptError | None = None
        self.lost: str | None = None


class _Lines(NamedTuple):
    """Lines of the manifest for files of following numbers."""

    lines: str
    files: int
    bytes: int
    sources: str


class _Run:
    """The state of one job while it runs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.report = Report(job.operation, dry_run=job.dry_run)
        self._whole_tree = job.source.name is None
        self._next_number = 0
        self._tasks: dict[int, FileTask] = {}  # that are with a worker
        self._large: dict[int, _Large] = {}
        self._feeds: list[Iterator[Tasks]] = []  # the last one is served first
        self._small: dict[int, SmallFiles] = {}  # the same, by their first number
        self._messages: dict[int, tuple[SmallMessages, list[SmallFile]]] = {}
        # Finished, and waiting for those before them: the line of each, and its source as it was read.
        self._listings: dict[int, tuple[Listed | _Lines | None, State | None]] = {}
        self._next_listing = 0
        self._folders: set[str] = set()  # that were looked through for leftovers
        self._written_folders: set[str] = set()
        self._template: tuple[EncryptionMaterials, HeaderTemplate, bytes | None] | None = None
        self._done_bytes = 0
        self._deaths = False
        self._pool: Pool | None = None
        self._manifest: ManifestWriter | None = None
        self._manifest_target: HashingTarget | None = None
        self._statement: StatementWriter | None = None
        self._wrapped: set[int] = set()  # data keys that were made, of a job with a key map
        self._header: Header | None = None  # the last one that was read
        # The last one that was unlocked, of a kind whose messages can come in columns; and how many came so and
        # were not like it, less those that were.
        self._known: Header | None = None
        self._unlike = 0
        self._refused: dict[Hashable, KeyAccessError] = {}  # data keys that no key opens, and why
        self._batch_files = self._batch_small_files = BATCH_FILES
        # A resumed job replaces what the interrupted one made; `_resumed` looks before it does.
        self._may_replace = job.overwrite or job.resume
        self._journal: Journal | StoreJournal | None = None
        self._before: dict[str, Finished] = {}
        self._blocks: deque[Block] = deque()  # what else was finished, in walk order
        self._made: _Listing | None = None  # what a store holds already, for a job that goes on there
        self._looked_at: set[int] = set()  # by `_resumed`, and not done
        self._unlisted: set[int] = set()  # decrypted files that are there without a line in the journal
        tree = job.destination.tree if job.destination is not None else None
        self._undivided = (tree is not None and tree.in_order) or job.signing is not None
        self._small_below = self._small_files_below()
        self._messages_to = self._small_messages_to()
        if self._whole_tree and tree is not None and not job.dry_run:
            self._journal = self._open_journal(tree)
        if self._whole_tree and job.writing is not None and not job.dry_run:
            self._manifest = ManifestWriter(self._create_manifest)
            self._sources = SourcesDigest(settings(job))
            if job.signing is not None:
                from streamcrypt.engine.signature import StatementWriter

                assert tree is not None
                self._statement = StatementWriter(
                    tree, job.signing, overwrite=self._may_replace, durable=job.durable
                )

    def _small_files_below(self) -> int:
        """Files of fewer bytes are encrypted several at a time (``SmallFiles``); none where a job asks for more."""
        job = self.job
        if (
            not self._whole_tree
            or job.writing is None
            or job.reading is not None
            or job.suite.signed
            or job.signing is not None
            or job.key_map is not None
            or job.audit is not None
            or job.destination is None
        ):
            return 0
        return min(job.frame_length, SMALL_LENGTH)

    def _small_messages_to(self) -> int:
        """Messages of up to so many bytes are decrypted several at a time (``SmallMessages``)."""
        job = self.job
        if (
            not job.source.tree.in_order  # one request brings an object, from a disk it is several calls
            or job.reading is None
            or job.writing is not None
            or job.against is not None
            or job.signed_by is not None
            or job.resume
            or job.audit is not None
            or job.dry_run
        ):
            return 0
        from streamcrypt.stores import WHOLE_LENGTH  # start-up: few jobs read from a store

        return WHOLE_LENGTH

    def _open_journal(self, tree: Tree) -> Journal | StoreJournal:
        job = self.job
        kind = _kind(job)
        if isinstance(tree, LocalTree):
            journal = Journal(tree, kind, job)
            if job.resume:
                self._before = journal.read()
            else:
                journal.remove()
            return journal
        store = cast("StoreTree", tree)
        store_journal = StoreJournal(store, kind, job)
        if job.resume:
            self._made = _Listing(store.states())
            self._note_finished(store_journal.read())
            # Whoever resumes a job says that it has ended, on whichever machine.
            store.abort_uploads(of=store_journal.writers)
        elif job.overwrite:
            store_journal.remove()
        return store_journal

    def _note_finished(self, blocks: list[Block]) -> None:
        """Keep what an interrupted job on a store had finished, the newest of what several parts tell of one file."""
        job = self.job
        names = {name for block in blocks for name in block.names}
        told_once = len(names) == sum(len(block.names) for block in blocks)
        # A key map may have changed since, and what is signed is read again: those are looked at one by one.
        if told_once and job.operation == "encrypt" and job.key_map is None and job.signing is None:
            self._blocks.extend(sorted(blocks, key=lambda block: sort_key(block.names[0])))
        else:
            self._before = {row.name: row for block in blocks for row in block.rows()}

    def __enter__(self) -> _Run:
        self._started = time.perf_counter()
        self.report.workers = self.job.workers
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._end(failed=kind is not None)
        except BaseException:
            if kind is None:  # interrupted at the very end, say: then nothing partial may stay either
                self._end(failed=True)
            raise
        finally:
            if self._journal is not None:
                self._journal.close()
            for place in (self.job.source, self.job.destination, self.job.against):
                if place is not None:
                    place.tree.close()
            self.report.seconds = time.perf_counter() - self._started

    def _end(self, *, failed: bool) -> None:
        """Stop the workers, drop what is not whole, and finish the folder unless the job failed."""
        if self._pool is not None:
            self._pool.close(cancel=failed)
        for large in self._large.values():
            if large.target is not None:
                large.target.discard()
        destination = self.job.destination
        if destination is not None and not self.job.dry_run:
            if failed or self._deaths:
                # Workers that were killed could not remove theirs.
                for folder in self._folders:
                    destination.tree.remove_leftovers(folder)
            if not failed:
                self._finish(destination)
            else:
                if self._manifest is not None:
                    self._manifest.discard()
                if self._statement is not None:
                    self._statement.discard()
                if self._journal is not None:
                    self._journal.write(last=True)

    def _finish(self, destination: Place) -> None:
        """Names first, manifest last: what was reported as done is durable."""
        if self._manifest is None and self._whole_tree and not self.report.failed:
            destination.tree.make_folder("")  # also where no file was to be put into it
            self._written_folders.add("")
        self._tell_left_behind(destination)
        for folder in sorted(self._written_folders) if self.job.durable else ():
            try:
                destination.tree.sync_folder(folder)
            except DestinationError as error:
                self.report.failed.append(Failure(folder or ".", error))
        if self._manifest is not None:
            self._manifest.publish(None if self.report.failed else self._sources.hexdigest())
            if self._statement is not None:
                if self.report.failed:  # what is not whole is not signed
                    self._statement.discard()
                else:
                    assert self._manifest_target is not None
                    self.report.signature = self._statement.publish(self._manifest_target)
            if self.job.durable:
                destination.tree.sync_folder(MANIFEST.rpartition("/")[0])
        if self._journal is not None:
            if any(not isinstance(failure.error, IntegrityError) for failure in self.report.failed):
                # What failed can be tried again, but what did not authenticate.
                self._journal.write(last=True)
            else:
                self._journal.remove()

    # -- what there is to do

    def entries(self) -> Iterator[Entry]:
        return entries(self.job)

    def readable(self, entries: Iterable[Entry], line: Listed | None = None) -> Iterator[_Item]:
        """The files among the entries; the others fail, or are made at once (empty folders)."""
        for entry in entries:
            number = self._take_number()
            if entry.problem is not None:
                self._fail(number, entry.name, SourceError(f"{self._path(entry.name)}: {entry.problem}"))
            elif entry.folder:
                if self.job.destination is not None and not self.job.dry_run:
                    self.job.destination.tree.make_folder(entry.name)
                self._list(number, Listed(entry.name, folder=True))
            else:
                yield _Item(number, entry, line)

    def listed(self, entries: Iterator[Entry]) -> Iterator[_Item]:
        """The messages of a tree together with their lines of its manifest, both in walk order.

        What only one side has fails: a message that the manifest does not list was added, one that
        is not there was removed.
        """
        without_message: list[Entry] = []
        if self.job.against is not None and self._whole_tree and self.job.names is None:
            entries = self._beside_plaintext(entries, without_message)
        yield from self._listed(entries)
        told = {failure.path for failure in self.report.failed} if without_message else set()
        for plain in without_message:
            if plain.problem is not None:
                error = SourceError(f"{self._against_path(plain.name)}: {plain.problem}")
                self._fail(self._take_number(), plain.name, error)
            elif plain.name not in told:
                self._fail_integrity(
                    plain.name, f"is missing: {self._against_path(plain.name)} has no message"
                )

    def _beside_plaintext(self, entries: Iterator[Entry], without_message: list[Entry]) -> Iterator[Entry]:
        """The same entries; notes what of the plaintext has none."""
        assert self.job.against is not None
        for plain, entry in merge(self.job.against.tree.walk(self.job.filters), entries):
            if entry is not None:
                yield entry
            elif plain is not None and not plain.folder:
                without_message.append(plain)

    def _against_path(self, name: str) -> str:
        assert self.job.against is not None
        return self.job.against.tree.path(name)

    def _listed(self, entries: Iterator[Entry]) -> Iterator[_Item]:
        if self.job.signed_by is not None and not self.job.dry_run:
            yield from self._matched(entries, self._admitted(self._signed_lines()))
            return
        manifest = self._open_manifest() if self._whole_tree and not self.job.dry_run else None
        if manifest is None:
            yield from self.readable(entries)
            return
        with manifest:
            yield from self._matched(entries, self._admitted(self._lines(manifest)))

    def _matched(self, entries: Iterator[Entry], lines: Iterator[Listed]) -> Iterator[_Item]:
        for entry, line in merge(entries, lines):
            if line is None:
                assert entry is not None
                if not entry.folder:  # an empty folder that was added holds nothing
                    self._fail_integrity(entry.name, "is not listed in the manifest: it was added")
            elif line.failed is not None:
                reason = f"was left out when the tree was encrypted: {line.failed}"
                self._fail(self._take_number(), line.name, SourceError(f"{self._path(line.name)}: {reason}"))
            elif entry is None:
                if line.folder:
                    yield from self.readable((Entry(line.name, 0, folder=True),))
                else:
                    self._fail_integrity(line.name, "is missing: the manifest lists it")
            elif entry.folder != line.folder:
                self._fail_integrity(entry.name, "is a folder in one place and a file in the other")
            else:
                yield from self.readable((entry,), line)

    def _lines(self, manifest: DecryptingFile) -> Iterator[Listed]:
        try:
            yield from read_manifest(io.BufferedReader(manifest, 2**20))
        except StreamcryptError as error:
            raise located(error, self._path(MANIFEST)) from error.__cause__

    def _signed_lines(self) -> Iterator[Listed]:
        """The lines of the signed manifest, which then stands in for the encrypted one."""
        from streamcrypt.engine.signature import Statement, check_manifest

        tree, signed_by = self.job.source.tree, self.job.signed_by
        assert signed_by is not None
        with Statement(tree, signed_by) as statement:
            self.report.signature = statement.summary
            yield from statement.lines()
            if (error := check_manifest(tree, statement)) is not None:
                self.report.failed.append(Failure(MANIFEST, error))

    def _admitted(self, lines: Iterator[Listed]) -> Iterator[Listed]:
        names = frozenset(self.job.names) if self.job.names is not None else None
        for line in lines:
            if self.job.filters.admit(line.name) and (names is None or line.name in names):
                yield line

    def _open_manifest(self) -> DecryptingFile | None:
        tree = self.job.source.tree
        assert self.job.reading is not None
        if not tree.exists(MANIFEST):
            if self.job.require_manifest:
                instead = (
                    "--no-manifest checks the messages one by one"
                    if self.job.operation == "verify"
                    else "leave out --require-manifest to take the messages one by one"
                )
                raise IntegrityError(
                    f"{tree.path(MANIFEST)}: there is no manifest, so nothing proves that the tree is complete; "
                    + instead
                )
            return None
        source = tree.open(MANIFEST)
        try:
            file = DecryptingFile(source, self.job.reading, self.job.rules, name=tree.path(MANIFEST))
            self.report.manifest_digest = f"{file.header.message_id.hex()}{file.header.tag.hex()}"
            if file.header.suite.signed:
                file.verify_signature()
        except StreamcryptError as error:
            raise located(_of_a_message(error), tree.path(MANIFEST)) from error.__cause__
        return file

    # -- one file into a task

    def seal(self, item: _Item) -> FileTask | SmallFile | None:
        """The task that encrypts a file; a key that cannot be used ends the job."""
        number, entry, _ = item
        if self.job.dry_run:
            return FileTask(number, entry.name, None, entry.size)
        if entry.size < self._small_below:
            return SmallFile(number, entry.name, entry.size)
        sealing = self._sealing_or_failure(number, entry.name, entry.size)
        if sealing is None:
            return None
        target = self._target_name(entry.name)
        return FileTask(number, entry.name, target, entry.size, sealing=sealing, undivided=self._undivided)

    def open(self, item: _Item) -> FileTask | SmallFile | None:
        """The task that decrypts, verifies or rekeys a message; None when its header is refused."""
        if self._known is not None and self._is_small_message(item):
            return SmallFile(item.number, item.entry.name, item.entry.size, item.listed)
        task = self._open(item)
        if self._known is None and self._is_small_message(item):
            self._unlike += 1
        return task

    def _is_small_message(self, item: _Item) -> bool:
        """Whether a message can be one of ``SmallMessages``, as far as the store's listing and the manifest tell."""
        size, listed = item.entry.size, item.listed
        return (
            0 < size <= self._messages_to
            and listed is not None
            and listed.message_length == size
            and self._unlike <= 0
        )

    def _open(self, item: _Item) -> FileTask | None:
        job, (number, entry, listed) = self.job, item
        assert job.reading is not None
        source: Source | None = None
        header: Header | None = None
        try:
            source = job.source.tree.open(entry.name)
            header = self._header = source_header(
                source, max_encrypted_data_keys=job.rules.max_encrypted_data_keys, known=self._header
            )
            if listed is not None:
                listed.check(header, source.size)
            if job.resume and number not in self._looked_at and self._resumed(number, entry, header):
                return None
            content_key = b"" if job.dry_run else self._content_key(header, job.reading)
            if header.framed and header.suite.committing and not header.suite.signed:
                self._known = header
            geometry = source_geometry(source, header) if header.framed else None
            if geometry is not None:
                length = geometry.plaintext_length
            else:
                body = read_bytes(source, header.length, UNFRAMED_PREFIX)
                length = unframed_length(body) if len(body) == UNFRAMED_PREFIX else 0
                if length > source.size:  # nothing is claimed for a length that cannot be true
                    raise IntegrityError("the body is cut short: the message is truncated")
            if job.source.tree.in_order:
                cast("StoreTree", job.source.tree).lend(entry.name, cast("StoreSource", source))
                source = None
        except StreamcryptError as error:
            if listed is not None:
                error = _of_a_message(error)
            self._fail(number, entry.name, located(error, self._path(entry.name)), header=header)
            return None
        finally:
            if source is not None:
                source.close()
        if job.dry_run:
            return FileTask(number, entry.name, None, length)
        opening = Opening(header.serialize(), header.message_id, content_key, geometry, header.suite.signed)
        sha256 = listed.sha256 if listed is not None else ""
        if number in self._unlisted and not job.overwrite:
            # A file that is there, but not in the journal, is the interrupted job's last or somebody
            # else's: it stays if it is what the message holds, and is an error if not.
            self._unlisted.remove(number)
            return FileTask(
                number,
                entry.name,
                None,
                length,
                opening,
                None,
                entry.name,
                undivided=bool(sha256),
                sha256=sha256,
            )
        sealing = None
        if job.writing is not None:
            sealing = self._sealing_or_failure(number, entry.name, length)
            if sealing is None:
                return None
        sha256 = listed.sha256 if listed is not None else ""
        return FileTask(
            number,
            entry.name,
            self._target_name(entry.name) if job.destination is not None else None,
            length,
            opening,
            sealing,
            None if job.against is None else job.against.name or entry.name,
            undivided=self._undivided or bool(sha256),
            sha256=sha256,
        )

    def _content_key(self, header: Header, reading: Materials) -> bytes:
        """The key that opens a message's frames; a data key that a key refused to unwrap is not asked for again."""
        if self._refused and (refused := self._refused.get(_data_key(header))) is not None:
            raise copy.copy(refused)
        try:
            return unlock(header, reading, self.job.rules).content_key
        except KeyAccessError as error:
            if not isinstance(error, TemporaryError | IntegrityError | ContextMismatchError):
                self._refused[_data_key(header)] = copy.copy(error)
            raise

    def _sealing_or_failure(self, number: int, name: str, plaintext_length: int) -> Sealing | None:
        """As ``_sealing``; with a key map, a key that cannot be used fails its own files only."""
        try:
            return self._sealing(name, plaintext_length)
        except KeyAccessError as error:
            if self.job.key_map is None or isinstance(error, TemporaryError):
                raise
            self._fail(number, name, located(error, self._path(name)))
            return None

    def _sealing(self, name: str, plaintext_length: int) -> Sealing:
        job = self.job
        assert job.writing is not None
        context = {**job.context, **job.authenticated_context}
        writing = job.writing if job.key_map is None else job.key_map.of(name)
        materials = writing.for_encryption(job.suite, context, plaintext_length)
        if self._journal is not None:
            self._journal.begin(materials)
        template, signing_key = self._template_for(materials)
        message = OutgoingMessage.begin(materials, template, job.frame_length)
        return Sealing(
            materials.suite.id,
            message.header,
            message.message_id,
            message.content_key,
            message.geometry(plaintext_length),
            signing_key,
        )

    def _template_for(self, materials: EncryptionMaterials) -> tuple[HeaderTemplate, bytes | None]:
        """The header that all messages of one data key share, and their signing key for the workers."""
        if self._template is None or self._template[0] is not materials:
            if self.job.key_map is None:
                self.report.data_keys += 1
            else:  # its data keys take turns, and each is counted once
                self._wrapped.add(hash(materials.encrypted_data_keys))
                self.report.data_keys = len(self._wrapped)
            key, encoded = materials.signing_key, None
            if key is not None:
                from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

                encoded = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
            template = header_template(materials, self.job.frame_length, self.job.authenticated_context)
            self._template = (materials, template, encoded)
        return self._template[1], self._template[2]

    def _target_name(self, source_name: str) -> str:
        destination = self.job.destination
        assert destination is not None
        name = destination.name if destination.name is not None else source_name
        folder = name.rpartition("/")[0]
        if folder not in self._folders:
            destination.tree.remove_leftovers(folder)
            self._folders.add(folder)
        return name

    # -- a job that goes on

    def _resumed(self, number: int, entry: Entry, header: Header | None = None) -> bool:
        """Whether the interrupted job has finished this file; it is then taken over as it is.

        ``header`` is the source's, where that is a message that was opened.  A file that the journal lists is
        taken over when it has not changed since (engine/journal.py), and so is an object that a store lists with
        the ETag that it had.  A message that has changed is taken over when it is the one that was listed
        and its final frame authenticates under our keys, a decrypted file is not.  What is there but not
        in the journal is replaced if it is a message under our keys, the remains of the moment of the
        interruption; DestinationError if it is somebody else's.
        """
        destination = self.job.destination
        assert destination is not None
        finished = self._before.pop(entry.name, None)
        listing = self._made
        if listing is None:
            found = cast("LocalTree", destination.tree).seen(entry.name)
            if found is None:
                return False
            made, proved = found.state, finished is not None and found.changed <= finished.noted
        else:
            state = listing.state(entry.name)
            if state is None:
                return False
            made, proved = state, bool(state[2])
        proved = proved and finished is not None and finished.made == made
        same = finished is not None and (
            finished.source == (entry.state or self.job.source.tree.state(entry.name))
        )
        if self.job.writing is None:
            return self._resumed_plaintext(number, entry, header, finished, proved and same)
        # A key map may have changed since: the message must be under the key that it names now.
        proved = proved and self.job.key_map is None
        if not proved and not self._is_ours(entry.name, finished if same else None):
            theirs = self.job.resuming
            assert theirs is not None
            rules = own_rules(self.job)
            tree = destination.tree
            if (
                finished is None
                and not self.job.overwrite
                and not is_made(tree, entry.name, None, theirs, rules)
            ):
                raise DestinationError(
                    f"{destination.tree.path(entry.name)}: exists, and the interrupted job did not make it"
                )
            return False
        if finished is None or not same:
            return False
        sha256 = ""
        if self._statement is not None:
            try:
                sha256 = self._sha256_of_made(entry.name, entry.name)
            except StreamcryptError:
                return False
        self.report.skipped += 1
        listed = Listed(entry.name, *finished[3:7], sha256=sha256)
        self._list(number, listed, finished.source)
        return True

    def left(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """The same entries without the objects that both listings prove to be done, as ``_resumed`` says it.

        Those are taken over a block of the journal at a time, if all of its files are as it says: what each costs
        is what finding out what is done costs.  The files of other blocks are looked at one by one.
        """
        blocks = self._blocks
        waiting: deque[Entry] = deque()
        while waiting or (blocks and (waiting := deque(islice(entries, 1)))):
            name = waiting[0].name
            if not blocks or sort_key(name) < sort_key(blocks[0].names[0]):
                yield waiting.popleft()
                continue
            block = blocks.popleft()
            if block.names[0] == name:
                count = len(block.names)
                waiting.extend(islice(entries, max(0, count - len(waiting))))
                there = [*islice(waiting, count)]
                if self._is_done(block, there):
                    self._take_over(block)
                    for _ in there:
                        waiting.popleft()
                    continue
            self._before.update((row.name, row) for row in block.rows())
        yield from entries

    def _is_done(self, block: Block, there: Sequence[Entry]) -> bool:
        """Whether all files of a block are what comes next in the source, as they were, and in the store."""
        assert self._made is not None
        names, _, _, _, sources, _ = zip(*there, strict=True)
        if [*names] != block.names or [*sources] != block.sources:
            return False
        return self._made.states(names) == block.made and all(etag for _, _, etag in block.made)

    def _take_over(self, block: Block) -> None:
        assert self._made is not None
        self._made.forget(block.names)
        count = len(block.names)
        self.report.skipped += count
        self._next_number += count
        total = sum(size for size, _, _ in block.sources)
        self._list(self._next_number - count, _Lines(block.lines, count, total, block.source_lines))

    def _to_do(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """Those that are not done already, as far as that is known without opening the source."""
        for item in items:
            if self.job.reading is None or self._is_told(item):
                if self._resumed(item.number, item.entry):
                    continue
                self._looked_at.add(item.number)
            yield item

    def _is_told(self, item: _Item) -> bool:
        """Whether the source's listing tells that the interrupted job read this very message, unopened."""
        finished = self._before.get(item.entry.name)
        if finished is None or item.entry.state != finished.source:
            return False
        listed = item.listed
        return listed is None or (
            (listed.message_id, listed.header_tag) == (finished.message_id, finished.header_tag)
        )

    def _resumed_plaintext(
        self, number: int, entry: Entry, header: Header | None, finished: Finished | None, proved: bool
    ) -> bool:
        if (
            finished is None
            or not proved
            or (
                header is not None
                and (finished.message_id, finished.header_tag) != (header.message_id.hex(), header.tag.hex())
            )
        ):
            if finished is None:
                self._unlisted.add(number)
            return False
        self.report.skipped += 1
        self._list(number, None)
        return True

    def _is_ours(self, name: str, finished: Finished | None) -> bool:
        """Whether the destination holds a message of this job, and the finished one where there is one."""
        assert self.job.destination is not None
        tree, rules = self.job.destination.tree, own_rules(self.job)
        return is_made(tree, name, finished, made_by(self.job, name), rules)

    def _tell_left_behind(self, destination: Place) -> None:
        """What the interrupted job made of files that this one has not seen is in nobody's manifest."""
        told = {failure.path for failure in self.report.failed}
        for name in chain(self._before, *(block.names for block in self._blocks)):
            if name not in told and destination.tree.exists(name):
                error = SourceError(
                    f"{self._path(name)}: is not among the files any more, but the interrupted job made "
                    f"{destination.tree.path(name)} of it: remove that, then go on"
                )
                self.report.failed.append(Failure(name, error))

    def _sha256_of_made(self, target_name: str, source_name: str) -> str:
        """The digest of a message of this job, every frame of which is opened on the way."""
        from streamcrypt.engine.signature import authenticated_sha256

        assert self.job.destination is not None
        with contextlib.closing(self.job.destination.tree.open(target_name)) as source:
            header = source_header(source, max_encrypted_data_keys=None)
            message = unlock(header, made_by(self.job, source_name), own_rules(self.job))
            return authenticated_sha256(source, message)

    # -- tasks to workers, outcomes back

    def drive(
        self,
        items: Iterator[_Item],
        task_of: Callable[[_Item], FileTask | SmallFile | None],
    ) -> None:
        """Make a task of every entry, and keep the workers fed until each has an outcome."""
        if self.job.dry_run:
            for item in items:
                if isinstance(task := task_of(item), FileTask):
                    self._finish_file(task, Outcome(task.number, bytes_in=task.length))
            return
        if self._manifest is not None and self._may_replace:
            assert self.job.destination is not None
            tree = self.job.destination.tree
            for name in (SIGNATURE, STATEMENT):  # of what was there before
                if tree.exists(name):
                    tree.remove(name)
        if self.job.resume:
            items = self._to_do(items)
        # Items, not tasks: nothing waits for data keys that are not needed yet.
        sample = list(islice(items, SAMPLE))
        if not sample:
            return
        pool = self._pool = self._choose_pool([item.entry for item in sample])
        tasks = (task_of(item) for item in self._expected(chain(sample, items)))
        self._feeds = [self._lists(task for task in tasks if task is not None)]
        while True:
            while pool.has_room and (tasks_to_send := self._next_list()) is not None:
                pool.submit(tasks_to_send)
            if not pool.busy:
                return
            for outcome in pool.collect():
                if isinstance(outcome, Lost):
                    self._lost(outcome)
                elif isinstance(outcome, SmallOutcome):
                    self._take_small(outcome)
                else:
                    self._take(outcome)
            if self._journal is not None:
                self._journal.write()

    def _expected(self, items: Iterator[_Item]) -> Iterator[_Item]:
        """The same items; the messages of those that come next are being opened where that takes a request."""
        if self.job.reading is None or not self.job.source.tree.in_order:
            return items
        return self._expected_of(cast("StoreTree", self.job.source.tree), items)

    def _expected_of(self, tree: StoreTree, items: Iterator[_Item]) -> Iterator[_Item]:
        waiting: deque[_Item] = deque()
        for item in items:
            if not self._is_small_message(item):
                tree.expect(item.entry.name, item.entry.size)
            waiting.append(item)
            if len(waiting) > _OPENED_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _choose_pool(self, sample: list[Entry]) -> Pool:
        """Workers for a job that begins with these entries."""
        job, workers = self.job, self.job.workers
        target = job.destination.tree if job.destination is not None else None
        # A resumed job compares what is there already with what it would have made.
        compared = target if job.resume else job.against.tree if job.against is not None else None
        setup = Setup(
            job.source.tree, target, compared, self._may_replace, job.durable, job.signing is not None
        )
        began = time.perf_counter()
        frame_length = job.frame_length if job.writing is not None else self._frame_length_of(sample[0])
        waited = time.perf_counter() - began
        if self._messages_to and waited > _STORE_LATENCY:
            largest = max(entry.size for entry in sample)
            workers = max(workers, min(_STORE_READERS, _STORE_BYTES_ASKED // max(1, largest)))
        if len(sample) < SAMPLE:  # all: no more workers than there is work for, and every one gets some
            pieces = sum(
                1 + (entry.size // SPAN_LENGTH if entry.size > SPLIT_LENGTH else 0) for entry in sample
            )
            workers = max(1, min(workers, pieces))
            self._batch_files = max(1, min(BATCH_FILES, len(sample) // (4 * workers)))
        frames = sum(entry.size // frame_length + 1 for entry in sample)
        on_a_store = any(tree is not None and tree.in_order for tree in (job.source.tree, target, compared))
        self._batch_small_files = self._batch_files
        if on_a_store:
            self._batch_small_files = min(self._batch_files, _STORE_BATCH_SMALL_FILES)
            self._batch_files = min(self._batch_files, _STORE_BATCH_FILES)
        way = way_of_working(
            len(sample),
            frames,
            sum(entry.size for entry in sample),
            workers,
            flushed=job.durable and target is not None,
            on_store=on_a_store,
        )
        if way == "processes":
            return ProcessPool(setup, workers)
        if way == "alone":
            workers = 1
        # Threads share this process's descriptors: a file that is being written holds its own and perhaps
        # its folder's, and source and target each keep some folders open.
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors != resource.RLIM_INFINITY:
            spare = descriptors - _used_descriptors() - 2 * KEPT_FOLDERS * (workers + 1)
            most = max(1, spare // (2 * workers))
            self._batch_files = min(self._batch_files, most)
            self._batch_small_files = min(self._batch_small_files, most)
        return ThreadPool(setup, workers, in_turns=way == "alone")

    def _frame_length_of(self, entry: Entry) -> int:
        """The frame length of a message, to choose workers by; its task will say what is wrong with it."""
        try:
            source = self.job.source.tree.open(entry.name)
        except SourceError:
            return DEFAULT_FRAME_LENGTH
        try:
            return source_header(source, max_encrypted_data_keys=None).frame_length or DEFAULT_FRAME_LENGTH
        except StreamcryptError:
            return DEFAULT_FRAME_LENGTH
        finally:
            source.close()

    def _next_list(self) -> Tasks | None:
        while self._feeds:
            tasks = next(self._feeds[-1], None)
            if tasks is not None:
                return tasks
            self._feeds.pop()
        return None

    def _lists(self, tasks: Iterator[FileTask | SmallFile]) -> Iterator[Tasks]:
        """What goes to workers: files that are worth a hand-over together, a large one span by span.

        Groups that are small because small files and others take turns go together, but none waits for a second
        data key.
        """
        together: list[FileTask | SmallFiles] = []
        files = size = 0
        for group in in_batches(tasks, self._batch_files, self._batch_small_files):
            small = [file for file in group if isinstance(file, SmallFile)]
            if small and self.job.reading is not None:
                yield from self._small_messages(small)
                continue
            if not small and is_large(first := cast("FileTask", group[0])):
                yield from self._spans(first)
                continue
            length = sum(task.length for task in group)
            if together and (files + len(group) > self._batch_files or size + length > BATCH_BYTES):
                yield together
                together, files, size = [], 0, 0
            if small:
                for number, of_one_key in enumerate(self._small_files(small)):
                    if number:
                        yield together
                        together, files, size = [], 0, 0
                    together.append(of_one_key)
            else:
                whole = [task for task in group if isinstance(task, FileTask)]
                self._tasks.update((task.number, task) for task in whole)
                together += whole
            files += len(group)
            size += length
        if together:
            yield together

    def _small_files(self, files: list[SmallFile]) -> Iterator[SmallFiles]:
        """Their ids and keys; those of one data key together."""
        job = self.job
        assert job.writing is not None
        context = {**job.context, **job.authenticated_context}
        for file in files:
            self._target_name(file.source)
        while files:
            lengths = [file.length for file in files]
            materials, count = job.writing.for_encryption_of_several(job.suite, context, lengths)
            suite, data_key = materials.suite, materials.data_key
            if self._journal is not None:
                self._journal.begin(materials)
            template, _ = self._template_for(materials)
            drawn, width = new_message_ids(suite, count), suite.message_id_length
            ids = [drawn[start : start + width] for start in range(0, len(drawn), width)]
            keys = [derive_keys(suite, data_key, message_id) for message_id in ids]
            small = self._small[files[0].number] = SmallFiles(
                files[0].number,
                [file.source for file in files[:count]],
                lengths[:count],
                template,
                ids,
                [key.content_key for key in keys],
                [key.commitment for key in keys],
            )
            yield small
            files = files[count:]

    def _small_messages(self, files: list[SmallFile]) -> Iterator[Tasks]:
        """The keys that they have if they are like the last one that was unlocked; those of one data key together."""
        known, reading = self._known, self.job.reading
        assert known is not None
        assert reading is not None
        if self.job.destination is not None:
            for file in files:
                self._target_name(file.source)
        while files:
            listed = [file.listed for file in files if file.listed is not None]
            try:
                ids = [bytes.fromhex(line.message_id) for line in listed]
                tags = [bytes.fromhex(line.header_tag) for line in listed]
                geometries = [Geometry.of_message(known, file.length) for file in files]
                template, keys = keys_alike(known, reading, self.job.rules, ids)
            except (StreamcryptError, ValueError):  # whatever it is, each of them will say it
                yield from self._lists(self._one_by_one(files))
                return
            count, number = len(keys), files[0].number
            small = SmallMessages(
                number,
                [file.source for file in files[:count]],
                [file.length for file in files[:count]],
                template,
                geometries[:count],
                ids[:count],
                [key.content_key for key in keys],
                [key.commitment for key in keys],
                tags[:count],
            )
            self._messages[number] = small, files[:count]
            yield [small]
            files = files[count:]

    def _one_by_one(self, files: Iterable[SmallFile]) -> Iterator[FileTask]:
        """The tasks of messages that were to come in columns."""
        for file in files:
            task = self._open(_Item(file.number, Entry(file.source, file.length), file.listed))
            if task is not None:
                yield task

    def _spans(self, task: FileTask) -> Iterator[Tasks]:
        """Begin a large file: its target, its final frame; then its spans."""
        try:
            large = self._begin_large(task)
        except StreamcryptError as error:
            self._fail(task.number, task.source, located(error, self._path(task.source)), task)
            return
        for span in cut(task, large.target.temporary if large.target is not None else None):
            if large.error is not None or large.lost is not None:
                break  # no use in sending the rest
            large.spans_out += 1
            yield [span]
        large.all_sent = True
        self._end_large_if_done(large)

    def _begin_large(self, task: FileTask) -> _Large:
        source = self.job.source.tree.open(task.source)
        try:
            if task.opening is not None and task.opening.geometry is not None:
                cipher = FrameCipher(task.opening.content_key, task.opening.message_id)
                FrameReader(source, cipher, task.opening.geometry).open_final()  # it proves the length
            target: LocalTarget | None = None
            if task.target is not None:
                assert self.job.destination is not None
                tree = self.job.destination.tree
                assert isinstance(tree, LocalTree)  # the others take a file in order
                target = tree.create(task.target, size=task.target_length, overwrite=self._may_replace)
            # Known to the job at once: an interrupt from here on finds it and drops it.
            large = self._large[task.number] = _Large(task, source.state, target)
        finally:
            source.close()
        return large

    def _take(self, outcome: Outcome) -> None:
        """An outcome of a file, or of one span of a large one."""
        self._done_bytes += outcome.plaintext_bytes
        large = self._large.get(outcome.number)
        if large is not None:
            large.error = large.error or outcome.error
            if large.error is None and outcome.source_state != large.source_state:
                path = self._path(large.task.source)
                large.error = SourceError(
                    f"{path}: changed while it was read; run again when nobody writes to it"
                )
            large.spans_out -= 1
            self._end_large_if_done(large)
        elif outcome.error is not None:
            task = self._tasks.pop(outcome.number)
            self._fail(outcome.number, task.source, outcome.error, task)
        else:
            self._finish_file(self._tasks.pop(outcome.number), outcome)

    def _take_small(self, outcome: SmallOutcome) -> None:
        """As ``_take`` and ``_finish_file``, for several at once."""
        if outcome.number in self._messages:
            self._take_messages(outcome)
            return
        files = self._small.pop(outcome.number)
        self._done_bytes += sum(files.lengths)
        if outcome.errors:
            for row, name in enumerate(files.names):
                if (error := outcome.errors.get(row)) is not None:
                    self._fail(files.number + row, name, error)
                else:
                    self._finish_small(files, row, outcome)
            return
        overhead = files.template.length + FINAL_OVERHEAD
        total, count = sum(files.lengths), len(files.names)
        report = self.report
        report.files += count
        report.bytes_in += total
        report.bytes_out += total + count * overhead
        lines, sources = [], []
        for name, length, message_id, tag, source, made in zip(
            files.names,
            files.lengths,
            files.message_ids,
            outcome.tags,
            outcome.source_states,
            outcome.made_states,
            strict=True,
        ):
            assert source is not None
            assert made is not None
            message = length + overhead, message_id.hex(), tag.hex()
            quoted_name = quoted(name)
            lines.append(file_line(quoted_name, length, *message))
            sources.append(source_line(quoted_name, source))
            if self._journal is not None:
                self._journal.add(Finished(name, source, made, length, *message))
        self._written_folders.update({name.rpartition("/")[0] for name in files.names})
        self._list(files.number, _Lines("".join(lines), count, total, "".join(sources)))

    def _take_messages(self, outcome: SmallOutcome) -> None:
        """The same for messages; those that are not like the others are looked at by themselves."""
        messages, files = self._messages.pop(outcome.number)
        report, errors, on_a_tree = self.report, outcome.errors, self.job.destination is not None
        unlike: list[SmallFile] = []
        for row, (file, geometry) in enumerate(zip(files, messages.geometries, strict=True)):
            name, listed = file.source, file.listed
            if row in errors:
                error = errors[row]
                if error is not None:
                    self._fail(file.number, name, error)
                else:
                    unlike.append(file)
                continue
            length = geometry.plaintext_length
            report.files += 1
            report.bytes_in += file.length
            self._done_bytes += length
            if on_a_tree:
                report.bytes_out += length
                self._written_folders.add(name.rpartition("/")[0])
                read, made = outcome.source_states[row], outcome.made_states[row]
                if self._journal is not None and listed is not None and read is not None and made is not None:
                    self._journal.add(
                        Finished(name, read, made, length, file.length, listed.message_id, listed.header_tag)
                    )
            if errors:
                self._list(file.number, None)
        if not errors:
            self._list(outcome.number, _Lines("", len(files), 0, ""))
        self._unlike += 2 * len(unlike) - len(files)
        if unlike:
            self._feeds.append(self._lists(self._one_by_one(unlike)))

    def _finish_small(self, files: SmallFiles, row: int, outcome: SmallOutcome) -> None:
        task = files.task(row, outcome.tags[row])
        read, made = outcome.source_states[row], outcome.made_states[row]
        self._finish_file(
            task, Outcome(task.number, task.length, task.target_length or 0, task.length, None, read, made)
        )

    def _end_large_if_done(self, large: _Large) -> None:
        if large.spans_out or not (large.all_sent or large.error or large.lost):
            return
        task, target = large.task, large.target
        if self._large.pop(task.number, None) is None:
            return
        try:
            if large.error is not None:
                raise large.error
            if large.lost is not None:
                self._retry(task, large.lost)
                return
            made = None
            if target is not None:
                if self.job.durable:
                    target.flush()
                made = target.state()
                target.publish(overwrite=self._may_replace)
        except StreamcryptError as error:
            self._fail(task.number, task.source, error, task)
        else:
            size = large.source_state[0]
            outcome = Outcome(task.number, size, task.target_length or 0, 0, None, large.source_state, made)
            self._finish_file(task, outcome)
        finally:
            if target is not None:
                target.discard()

    def _lost(self, lost: Lost) -> None:
        """A worker died: its messages start again, each under a new message id."""
        self._deaths = True
        for task in lost.tasks:
            if isinstance(task, SmallMessages):
                for again in self._one_by_one(self._messages.pop(task.number)[1]):
                    self._retry(again, lost.reason)
                continue
            if isinstance(task, SmallFiles):
                del self._small[task.number]
                for row in range(len(task.names)):
                    self._retry(task.task(row), lost.reason)
                continue
            large = self._large.get(task.number)
            if large is not None:
                large.lost = lost.reason
                large.spans_out -= 1
                self._end_large_if_done(large)
            elif isinstance(task, FileTask):
                del self._tasks[task.number]
                self._retry(task, lost.reason)

    def _retry(self, task: FileTask, reason: str) -> None:
        if (published := self._published(task)) is not None:
            self._finish_file(published, outcome_of(published))
        elif task.attempt >= _ATTEMPTS:
            error = StreamcryptError(f"{self._path(task.source)}: {reason} each time it had this file")
            self._fail(task.number, task.source, error, task)
        else:
            sealing = self._sealing(task.source, task.length) if task.sealing is not None else None
            again = task._replace(sealing=sealing, attempt=task.attempt + 1)
            self._feeds.append(self._lists(iter((again,))))

    def _published(self, task: FileTask) -> FileTask | None:
        """The task, if the worker that died had already given this very file its name."""
        destination = self.job.destination
        if task.target is None or destination is None or not destination.tree.exists(task.target):
            return None
        if task.sealing is None:
            compare = task._replace(target=None, against=task.target)
            worker = Worker(Setup(self.job.source.tree, None, destination.tree))
            try:
                return task if worker.run([compare])[0].error is None else None
            finally:
                worker.close()
        try:
            source = destination.tree.open(task.target)
        except SourceError:
            return None
        try:
            # The tag of a small file's header was made by its worker, and so is known from there.
            sealing, body = task.sealing, task.sealing.header[:-TAG_LENGTH]
            found = bytes(read_bytes(source, 0, len(sealing.header)))
            if found[: len(body)] != body:
                return None
            header, _ = parse_header(found, max_encrypted_data_keys=None)
            cipher = FrameCipher(sealing.content_key, sealing.message_id)
            authenticate_header(header, cipher.aead, self.job.authenticated_context)
            return task._replace(sealing=sealing._replace(header=found))
        except IntegrityError:
            return None
        finally:
            source.close()

    # -- what became of it

    def _finish_file(self, task: FileTask, outcome: Outcome) -> None:
        report = self.report
        if self.job.resume and task.against is not None:  # it was there, and is what the message holds
            report.skipped += 1
        else:
            report.files += 1
        report.bytes_in += outcome.bytes_in
        report.bytes_out += outcome.bytes_out
        if task.target is not None:
            self._written_folders.add(task.target.rpartition("/")[0])
        listed = None
        if task.sealing is not None:
            sealing = task.sealing
            listed = Listed(
                task.source,
                task.length,
                sealing.geometry.message_length,
                sealing.message_id.hex(),
                sealing.header[-TAG_LENGTH:].hex(),
                sha256=outcome.sha256,
            )
            if self._statement is not None and not outcome.sha256:  # its worker died before it could say it
                assert task.target is not None
                listed = listed._replace(sha256=self._sha256_of_made(task.target, task.source))
            if self.job.key_map is not None:
                partition = self.job.key_map.of(task.source)
                partition.files += 1
                partition.bytes += task.length
        if self._journal is not None and outcome.source_state is not None and outcome.made_state is not None:
            self._journal.add(self._journal_line(task, listed, outcome.source_state, outcome.made_state))
        self._list(task.number, listed, outcome.source_state or self.job.source.tree.state(task.source))
        if self.job.audit is not None:
            self.job.audit(self._audit_line(task.source, task, None))

    def _journal_line(self, task: FileTask, listed: Listed | None, source: State, made: State) -> Finished:
        if listed is not None:
            return Finished(task.source, source, made, *listed[1:5])
        assert task.opening is not None
        header = task.opening.header
        return Finished(
            task.source,
            source,
            made,
            task.length,
            source[0],
            task.opening.message_id.hex(),
            header[-TAG_LENGTH:].hex(),
        )

    def _fail(
        self,
        number: int,
        name: str,
        error: StreamcryptError,
        task: FileTask | None = None,
        header: Header | None = None,
    ) -> None:
        self.report.failed.append(Failure(name, error))
        self._list(number, Listed(name, failed=type(error).__name__))
        if self.job.audit is not None:
            self.job.audit(self._audit_line(name, task, error, header))

    def _fail_integrity(self, name: str, reason: str) -> None:
        self._fail(self._take_number(), name, IntegrityError(f"{self._path(name)}: {reason}"))

    def _list(self, number: int, listed: Listed | _Lines | None, source: State | None = None) -> None:
        """Lines of the manifest leave in walk order, whatever the order in which files are done."""
        self._listings[number] = listed, source
        while self._next_listing in self._listings:
            line, state = self._listings.pop(self._next_listing)
            if isinstance(line, _Lines):
                self._next_listing += line.files
                if self._manifest is not None:
                    self._manifest.add_files(line.lines, line.files, line.bytes)
                    self._sources.add_lines(line.sources)
                continue
            self._next_listing += 1
            if self._manifest is not None and line is not None:
                self._manifest.add(line)
                if state is not None:
                    self._sources.add(line.name, state)
                elif line.folder and self.job.reading is None:
                    self._sources.add_folder(line.name)
                if self._statement is not None:
                    self._statement.add(line)
        if self.job.progress is not None:
            self.job.progress(Progress(self.report.files, self._done_bytes))

    def _create_manifest(self, length: int | None) -> EncryptingFile:
        job = self.job
        assert job.writing is not None
        assert job.destination is not None
        tree = job.destination.tree
        materials = job.writing.for_encryption(
            job.suite, {**job.context, **job.authenticated_context}, length
        )
        template, _ = self._template_for(materials)
        message = OutgoingMessage.begin(materials, template, job.frame_length)
        self.report.manifest_digest = f"{message.message_id.hex()}{message.header[-TAG_LENGTH:].hex()}"
        tree.remove_leftovers(MANIFEST.rpartition("/")[0])
        target: Target = tree.create(MANIFEST, overwrite=self._may_replace)
        if self._statement is not None:
            from streamcrypt.engine.hashing import HashingTarget

            target = self._manifest_target = HashingTarget(target)
        return EncryptingFile(
            target, message, overwrite=self._may_replace, durable=job.durable, name=tree.path(MANIFEST)
        )

    def _audit_line(
        self, name: str, task: FileTask | None, error: StreamcryptError | None, header: Header | None = None
    ) -> dict[str, Any]:
        """The line of a file; of one that failed it says what is known of its message, and no bytes."""
        found = header.serialize() if header is not None else None
        if task is not None and task.sealing is not None:
            found = task.sealing.header
        elif task is not None and task.opening is not None:
            found = task.opening.header
        length = task.length if task is not None and error is None else 0
        return audit_line(self.job.operation, name, found, length, error)

    # -- small things

    def _take_number(self) -> int:
        number = self._next_number
        self._next_number += 1
        return number

    def _path(self, name: str) -> str:
        return self.job.source.tree.path(name)


class _Listing:
    """The states of what a store holds, as far as they were asked for: a page at a time, not one by one."""

    def __init__(self, pages: Iterator[dict[str, State]]) -> None:
        self._pages = pages
        self._last = ""  # a store lists by the bytes of keys, so all names up to this one are known
        self._is_whole = False
        self._found: dict[str, State] = {}

    def state(self, name: str) -> State | None:
        """The state of the object of that name, None when there is none."""
        self._list_up_to(name)
        return self._found.get(name)

    def states(self, names: Sequence[str]) -> list[State | None]:
        """The same for several."""
        self._list_up_to(max(names))
        return [*map(self._found.get, names)]

    def forget(self, names: Sequence[str]) -> None:
        """Keep no states that nobody will ask for again."""
        for name in names:
            del self._found[name]

    def _list_up_to(self, name: str) -> None:
        while self._last < name and not self._is_whole:
            page = next(self._pages, None)
            if page is None:
                self._is_whole = True
            else:
                self._found |= page
                self._last = next(reversed(page))


def entries(job: Job) -> Iterator[Entry]:
    """What there is of a job's source, in walk order."""
    tree = job.source.tree
    if job.source.name is not None:
        return iter((tree.entry(job.source.name),))
    return tree.walk(job.filters) if job.names is None else _named(job, job.names)


def _named(job: Job, names: Iterable[str]) -> Iterator[Entry]:
    tree = job.source.tree
    for name in sorted(set(names), key=sort_key):
        if job.filters.admit(name):
            try:
                yield tree.entry(name)
            except SourceError as error:
                yield Entry(name, 0, problem=str(error).removeprefix(tree.path(name) + ": "))


def own_rules(job: Job) -> ReadingRules:
    """Those for the messages that a job like this has made."""
    return ReadingRules(max_encrypted_data_keys=None, authenticated_context=job.authenticated_context)


def made_by(job: Job, source_name: str) -> Materials:
    """What opens the messages that this job makes, or an interrupted one has made."""
    if job.key_map is not None:
        return job.key_map.of(source_name).resuming
    materials = job.resuming or job.writing
    assert materials is not None
    return materials


def _of_a_message(error: StreamcryptError) -> StreamcryptError:
    """The error of what was a message once: if it does not look like one now, it is not the wrong file."""
    if isinstance(error, FormatError) and not error.recognised:
        return FormatError(f"{error}: it was replaced, or cut short")
    return error


def is_made(
    tree: Tree, name: str, listed: Finished | Listed | None, materials: Materials, rules: ReadingRules
) -> bool:
    """Whether a message is there that authenticates under these keys, and is the one that was listed."""
    try:
        source = tree.open(name)
    except SourceError:
        return False
    try:
        header = source_header(source, max_encrypted_data_keys=None)
        if listed is not None and (
            header.message_id.hex() != listed.message_id
            or header.tag.hex() != listed.header_tag
            or source.size != listed.message_length
        ):
            return False
        cipher = unlock(header, materials, rules).cipher
        FrameReader(source, cipher, source_geometry(source, header)).open_final()
    except (IntegrityError, SourceError):
        return False
    finally:
        source.close()
    return True


def settings(job: Job) -> str:
    """What two jobs must have in common for their results to be alike, other than their files."""
    assert job.writing is not None
    keys = job.writing.describe() if job.key_map is None else job.key_map.describe()
    signing = job.signing.arn if job.signing is not None else None
    return json.dumps([job.suite.id, job.frame_length, sorted(job.context.items()), keys, signing])


def _kind(job: Job) -> str:
    """What a resumed job must have in common with the interrupted one for their results to be alike."""
    signer = ""
    if job.signed_by is not None:
        from streamcrypt.keys.signing import fingerprint

        signer = f", signed by {fingerprint(job.signed_by)}"
    if job.writing is None:
        return job.operation + signer
    # A key map may change meanwhile, and whether the whole is signed: `_resumed` sees to both.
    shared = (
        settings(job._replace(signing=None))
        if job.key_map is None
        else json.dumps([job.suite.id, job.frame_length, sorted(job.context.items())])
    )
    return f"{job.operation} {zlib.crc32(shared.encode()):08x}{signer}"


def _data_key(header: Header) -> Hashable:
    """What a KMS is asked for: the wrapped keys, and the context that is bound to them."""
    return header.encrypted_data_keys, frozenset(header.context.items())


def outcome_of(task: FileTask) -> Outcome:
    """What became of a file whose worker published it and was lost before it could say so."""
    read = task.length
    if task.opening is not None:
        read = task.opening.geometry.message_length if task.opening.geometry is not None else 0
    return Outcome(task.number, read, task.target_length or 0, task.length)


def merge(entries: Iterator[Entry], lines: Iterator[_Line]) -> Iterator[tuple[Entry | None, _Line | None]]:
    """Two sequences in the order of their names, side by side; None where one lacks a name."""
    entry, line = next(entries, None), next(lines, None)
    while entry is not None or line is not None:
        if entry is not None and line is not None and entry.name == line.name:  # nearly always
            yield entry, line
            entry, line = next(entries, None), next(lines, None)
        elif line is None or (entry is not None and sort_key(entry.name) < sort_key(line.name)):
            yield entry, None
            entry = next(entries, None)
        else:
            yield None, line
            line = next(lines, None)


def _used_descriptors() -> int:
    try:
        return len(os.listdir("/dev/fd")) + _OTHER_DESCRIPTORS
    except OSError:  # there is none left to look with
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
