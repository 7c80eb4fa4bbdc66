"""The hot loop, the same in a thread, in a worker process and in a test.

    read_at(source) -> seal or open -> write_at(target)

A worker opens source and target itself: payload never crosses a process boundary.  Its buffers are
reused from batch to batch; a new buffer for each read would halve the speed (benchmarks/README.md).
Files of one batch are written, then flushed together, then published: the first flush takes the
others' metadata with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from streamcrypt.engine.spans import (
    FileTask,
    Opening,
    Sealing,
    SmallFiles,
    SmallMessages,
    SpanTask,
    Tasks,
    unit_length,
)
from streamcrypt.errors import IntegrityError, SourceError, StreamcryptError
from streamcrypt.keys.materials import read_public_key
from streamcrypt.message.footer import Signer
from streamcrypt.message.frames import FINAL_OVERHEAD, REGULAR_OVERHEAD, FrameCipher, Geometry
from streamcrypt.message.header import Buffer, parse_header
from streamcrypt.message.suites import TAG_LENGTH, suite_by_id
from streamcrypt.storage import LocalTree, Source, State, Target, Tree
from streamcrypt.streams import (
    BATCH_LENGTH,
    FrameReader,
    SequentialReader,
    UnlockedMessage,
    located,
    open_whole,
    seal_frames,
    seal_one_frame,
)
from streamcrypt.system import page_aligned
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from streamcrypt.engine.hashing import HashingSource, HashingTarget
    from streamcrypt.stores import StoreTree

# Plaintext bytes per system call, in whole frames: see benchmarks/README.md, "batch".
LOOP_LENGTH: Final = 2**20

# Small files that are read, then sealed, then written together: see benchmarks/README.md, "small files".
_STEP_BYTES: Final = 256 * 2**10


class Setup(NamedTuple):
    """What all tasks of a job have in common; sent to a worker once."""

    source: Tree
    target: Tree | None
    against: Tree | None = None
    overwrite: bool = False
    durable: bool = True
    hashing: bool = False  # of what is written


class Outcome(NamedTuple):
    """What became of one task: bytes read and written, or an error.

    ``source_state`` is the source as it was read, ``made_state`` the file that was made of it.
    """

    number: int
    bytes_in: int = 0
    bytes_out: int = 0
    plaintext_bytes: int = 0
    error: StreamcryptError | None = None
    source_state: State | None = None
    made_state: State | None = None
    sha256: str = ""


class SmallOutcome(NamedTuple):
    """What became of ``SmallFiles``: the tag that each header got, the states of what was read and made.

    ``errors``: by row, of those that failed; then the other columns mean nothing there.  None: a message that is
    not like the others.
    """

    number: int
    tags: list[bytes]
    source_states: list[State | None]
    made_states: list[State | None]
    errors: dict[int, StreamcryptError | None]

    @classmethod
    def of(cls, number: int, count: int) -> SmallOutcome:
        """Of so many, about which nothing is known yet."""
        return cls(number, [b""] * count, [None] * count, [None] * count, {})


class _UnlikeError(Exception):
    """A message is not what the columns of its list say."""


class Cancelled(Exception):  # noqa: N818  (not an error of the job: it was told to stop)
    """The job was told to stop while this task ran."""


class Worker:
    """Takes the tasks of one job, one list at a time, in one thread."""

    def __init__(self, setup: Setup, cancelled: threading.Event | None = None) -> None:
        self._source_tree = setup.source.copy()
        self._target_tree = setup.target.copy() if setup.target is not None else None
        self._against_tree = setup.against.copy() if setup.against is not None else None
        self._overwrite = setup.overwrite
        self._durable = setup.durable
        self._hashing = setup.hashing
        self._cancelled = cancelled or threading.Event()
        self._plaintext = memoryview(bytearray())
        self._sealed = memoryview(bytearray())  # frames that are read
        self._frames = memoryview(bytearray())  # frames that are written

    def close(self) -> None:
        for tree in (self._source_tree, self._target_tree, self._against_tree):
            if tree is not None:
                tree.close()

    def take(self, tasks: Tasks) -> list[Outcome | SmallOutcome]:
        """Do the tasks, of any kind; spans come alone."""
        outcomes: list[Outcome | SmallOutcome] = []
        for task in tasks:
            if isinstance(task, SmallFiles):
                outcomes.append(self._small_files(task))
            elif isinstance(task, SmallMessages):
                outcomes.append(self._small_messages(task))
        if rest := [task for task in tasks if isinstance(task, FileTask | SpanTask)]:
            outcomes += self.run(rest)
        return outcomes

    def run(self, tasks: Sequence[FileTask | SpanTask]) -> list[Outcome]:
        """Do the tasks, all of one kind; what goes wrong with one is its outcome and does not stop the others."""
        if isinstance(tasks[0], SpanTask):
            return [self._guard(task, self._span) for task in tasks if isinstance(task, SpanTask)]
        written: list[tuple[Target, Outcome]] = []
        try:
            outcomes = [
                self._guard(task, self._file, written) for task in tasks if isinstance(task, FileTask)
            ]
            self._publish(written, outcomes)
        finally:
            for target, _ in written:
                target.discard()
        return outcomes

    def _guard(self, task: FileTask | SpanTask, work: Callable[..., Outcome], *arguments: Any) -> Outcome:
        try:
            return work(task, *arguments)
        except Cancelled:
            raise
        except StreamcryptError as error:
            return Outcome(task.number, error=error)
        except Exception as error:  # noqa: BLE001  (the outermost loop: the error goes home, not down)
            file = task.file if isinstance(task, SpanTask) else task
            return Outcome(task.number, error=unexpected(self._source_tree.path(file.source), error))

    def _publish(self, written: list[tuple[Target, Outcome]], outcomes: list[Outcome]) -> None:
        failed: dict[int, StreamcryptError] = {}
        made: dict[int, State] = {}
        for step in ("flush", "publish"):
            for target, outcome in written:
                if outcome.number in failed:
                    continue
                try:
                    if step == "publish":
                        state = target.publish(overwrite=self._overwrite)
                        if state is not None:
                            made[outcome.number] = state
                    elif self._durable:
                        target.flush()
                except StreamcryptError as error:
                    failed[outcome.number] = error
        for position, outcome in enumerate(outcomes):
            if outcome.number in failed:
                outcomes[position] = Outcome(outcome.number, error=failed[outcome.number])
            elif outcome.number in made:
                outcomes[position] = outcome._replace(made_state=made[outcome.number])

    # -- small files

    def _small_files(self, files: SmallFiles) -> SmallOutcome:
        """Encrypt them."""
        names, lengths, template = files.names, files.lengths, files.template
        open_source = self._source_tree.open
        outcome = SmallOutcome.of(files.number, len(names))
        contents: dict[int, memoryview] = {}
        messages: dict[int, memoryview] = {}

        def make_room(rows: range) -> None:
            plaintext = self._room("_plaintext", sum(lengths[row] for row in rows))
            overhead = template.length + FINAL_OVERHEAD
            frames = self._room("_frames", sum(lengths[row] + overhead for row in rows))
            start = end = 0
            for row in rows:
                contents[row] = plaintext[start : start + lengths[row]]
                messages[row] = frames[end : end + lengths[row] + overhead]
                start, end = start + lengths[row], end + lengths[row] + overhead

        def read(row: int) -> None:
            source, content = open_source(names[row]), contents[row]
            try:
                if source.size != len(content) or source.read_at(0, content) < len(content):
                    raise _changed(self._source_tree.path(names[row]))
                source.check_unchanged()
                outcome.source_states[row] = source.state
            finally:
                source.close()

        def seal(row: int) -> None:
            header = seal_one_frame(
                template,
                files.message_ids[row],
                files.content_keys[row],
                files.commitments[row],
                contents[row],
                messages[row],
            )
            outcome.tags[row] = header[-TAG_LENGTH:]

        self._make(names, lengths, outcome, make_room, (read, seal), messages)
        return outcome

    def _small_messages(self, files: SmallMessages) -> SmallOutcome:
        """Decrypt them, or only look whether they authenticate."""
        names, lengths, geometries = files.names, files.lengths, files.geometries
        read_whole = cast("StoreTree", self._source_tree).read_whole
        outcome = SmallOutcome.of(files.number, len(names))
        messages: dict[int, memoryview] = {}
        contents: dict[int, memoryview] = {}

        def make_room(rows: range) -> None:
            plaintext = self._room("_plaintext", sum(geometries[row].plaintext_length for row in rows))
            start = 0
            for row in rows:
                end = start + geometries[row].plaintext_length
                contents[row] = plaintext[start:end]
                start = end

        def read(row: int) -> None:
            found = read_whole(names[row], lengths[row])
            if found is None:
                raise _UnlikeError
            messages[row], outcome.source_states[row] = found

        def open_message(row: int) -> None:
            message, message_id = messages.pop(row), files.message_ids[row]
            cipher = FrameCipher(files.content_keys[row], message_id)
            # The commitment is compared with it, before anything is decrypted with the key.
            header = files.template.body(message_id, files.commitments[row]) + files.tags[row]
            if not bytes_eq(bytes(message[: len(header)]), header):
                raise _UnlikeError
            try:
                files.template.authenticate(header, cipher.aead)
                open_whole(cipher, geometries[row], message, contents[row])
            except StreamcryptError as error:
                raise located(error, self._source_tree.path(names[row])) from error.__cause__

        from cryptography.hazmat.primitives.constant_time import (
            bytes_eq,
        )  # it imports hashlib (message/derive.py)

        self._make(names, lengths, outcome, make_room, (read, open_message), contents)
        return outcome

    def _make(
        self,
        names: list[str],
        lengths: list[int],
        outcome: SmallOutcome,
        make_room: Callable[[range], None],
        steps: tuple[Callable[[int], None], ...],
        made: dict[int, memoryview],
    ) -> None:
        """Take these steps for the rows; write what they leave in ``made``, then flush all, then give all their names.

        Each step is done for several files before the next one, since the code of one step stays in the
        processor's cache (benchmarks/README.md, "small files").  A store flushes nothing and holds in memory
        what has no name yet: there those few get their names at once.
        """
        tree, overwrite = self._target_tree, self._overwrite
        targets: dict[int, Target] = {}
        everything = range(len(names))

        def write(row: int) -> None:
            assert tree is not None
            data = made[row]
            target = targets[row] = tree.create(names[row], size=len(data), overwrite=overwrite)
            target.write_at(0, data)
            outcome.made_states[row] = target.state()

        def flush(row: int) -> None:
            targets[row].flush()

        def publish(row: int) -> None:
            state = targets[row].publish(overwrite=overwrite)
            if state is not None:
                outcome.made_states[row] = state

        def each(step: Callable[[int], None], rows: range) -> None:
            for row in rows:
                self._stop_if_cancelled()
                if row in outcome.errors:
                    continue
                try:
                    step(row)
                except _UnlikeError:
                    outcome.errors[row] = None
                except StreamcryptError as error:
                    outcome.errors[row] = error
                except Exception as error:  # noqa: BLE001  (the outermost loop, as in _guard)
                    outcome.errors[row] = unexpected(self._source_tree.path(names[row]), error)

        try:
            for rows in _steps(lengths):
                make_room(rows)
                for step in steps:
                    each(step, rows)
                if tree is not None:
                    each(write, rows)
                    if tree.in_order:
                        each(publish, rows)
            if tree is not None and not tree.in_order:
                if self._durable:
                    each(flush, everything)
                each(publish, everything)
        finally:
            for target in targets.values():
                target.discard()

    # -- one file

    def _file(self, task: FileTask, written: list[tuple[Target, Outcome]]) -> Outcome:
        path = self._source_tree.path(task.source)
        source = self._source_tree.open(task.source)
        target: Target | None = None
        hashed: HashingTarget | None = None
        length = task.target_length
        try:
            if task.opening is None and source.size != task.length:
                raise _changed(path)
            if task.target is not None:
                assert self._target_tree is not None
                target = self._target_tree.create(task.target, size=length, overwrite=self._overwrite)
                if self._hashing:
                    from streamcrypt.engine.hashing import HashingTarget  # few jobs sign

                    target = hashed = HashingTarget(target)
            try:
                self._copy(task, source, target)
                source.check_unchanged()
            except StreamcryptError as error:
                raise located(error, path) from error.__cause__
            if target is None:
                return Outcome(task.number, source.size, 0, task.length, None, source.state)
            outcome = Outcome(
                task.number, source.size, length or 0, task.length, None, source.state, target.state()
            )
            if hashed is not None:
                outcome = outcome._replace(sha256=hashed.sha256())
            written.append((target, outcome))
            target = None
            return outcome
        finally:
            source.close()
            if target is not None:
                target.discard()

    def _copy(self, task: FileTask, source: Source, target: Target | None) -> None:
        """All of one file, from its source to where it goes."""
        writing = self._writing(task, target)
        try:
            if task.opening is not None and (task.opening.in_order or task.sha256):
                self._copy_in_order(task, task.opening, source, writing)
            else:
                reading = self._reading(task, source)
                if isinstance(reading, FrameReader):
                    reading.open_final()  # first of all: it proves the length of the message
                self._loop(task, reading, writing, 0, task.length)
            writing.finish()
        finally:
            writing.close()

    def _copy_in_order(self, task: FileTask, opening: Opening, source: Source, writing: Writing) -> None:
        """A message that must be read in order: its signature, or its one tag, comes at the end."""
        header, _ = parse_header(opening.header, max_encrypted_data_keys=None)
        message = UnlockedMessage.of(
            header, opening.content_key, read_public_key(header.suite, header.context)
        )
        regrouped = _Regrouping(writing, step_length(task))
        position = 0
        signed: HashingSource | None = None
        if task.sha256:
            from streamcrypt.engine.hashing import HashingSource

            source = signed = HashingSource(source)
        for chunk in SequentialReader(source, message).chunks():
            self._stop_if_cancelled()
            position += len(chunk)
            if position > task.length:
                break
            regrouped.take(chunk)
        if position != task.length:
            raise _changed(self._source_tree.path(task.source))
        if signed is not None:
            signed.check(task.sha256)
        regrouped.end()

    # -- one span of a file

    def _span(self, task: SpanTask) -> Outcome:
        file = task.file
        path = self._source_tree.path(file.source)
        source = self._source_tree.open(file.source)
        part = None
        try:
            if file.opening is None and source.size != file.length:
                raise _changed(path)
            if task.temporary is not None:
                assert isinstance(self._target_tree, LocalTree)  # the others take a file in order
                assert file.target is not None
                part = self._target_tree.open_part(file.target, task.temporary)
            try:
                writing = self._writing(file, part)
                try:
                    self._loop(file, self._reading(file, source), writing, task.start, task.stop)
                finally:
                    writing.close()
                source.check_unchanged()
            except StreamcryptError as error:
                raise located(error, path) from error.__cause__
            return Outcome(task.number, plaintext_bytes=task.stop - task.start, source_state=source.state)
        finally:
            source.close()
            if part is not None:
                part.close()

    # -- the loop

    def _loop(self, task: FileTask, reading: Reading, writing: Writing, start: int, stop: int) -> None:
        step = step_length(task)
        plaintext = self._room("_plaintext", min(step, stop - start))
        read_into, write = reading.read_into, writing.write
        for position in range(start, stop, step):
            self._stop_if_cancelled()
            batch = plaintext[: min(step, stop - position)]
            read_into(position, batch)
            write(position, batch)

    def _reading(self, task: FileTask, source: Source) -> Reading:
        opening = task.opening
        if opening is None or opening.geometry is None:
            return _PlainReading(source, self._source_tree.path(task.source))
        geometry = opening.geometry
        frames = min(max(1, BATCH_LENGTH // (geometry.frame_length + REGULAR_OVERHEAD)), geometry.frames)
        # A frame length is what the header says; no more room is made than the message has bytes.
        room = frames * (geometry.frame_length + REGULAR_OVERHEAD) + FINAL_OVERHEAD
        scratch = self._room("_sealed", min(room, geometry.body_end - geometry.header_length))
        return FrameReader(
            source, FrameCipher(opening.content_key, opening.message_id), geometry, scratch=scratch
        )

    def _writing(self, task: FileTask, target: Writable | None) -> Writing:
        if task.against is not None:
            assert self._against_tree is not None
            return _Comparing(self._against_tree, task.against, task.length)
        if target is None:
            return Writing()
        if task.sealing is None:
            return _PlainWriting(target)
        return _SealingInto(
            task.sealing, target, self._room("_frames", _frames_length(task, task.sealing.geometry))
        )

    def _room(self, name: str, length: int) -> memoryview:
        buffer: memoryview = getattr(self, name)
        if len(buffer) < length:
            buffer = page_aligned(length)
            setattr(self, name, buffer)
        return buffer

    def _stop_if_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled


class Writable(Protocol):
    def write_at(self, offset: int, data: Buffer) -> None: ...


class Reading(Protocol):
    def read_into(self, start: int, view: memoryview, /) -> None:
        """Fill ``view`` with the plaintext from ``start`` on."""


class _PlainReading:
    def __init__(self, source: Source, path: str) -> None:
        self._read_at = source.read_at
        self._path = path

    def read_into(self, start: int, view: memoryview, /) -> None:
        if self._read_at(start, view) < len(view):
            raise _changed(self._path)


class Writing:
    """Where plaintext goes, in order within one task; this one goes nowhere: it was authenticated."""

    def write(self, position: int, data: memoryview) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _PlainWriting(Writing):
    def __init__(self, target: Writable) -> None:
        self._write_at = target.write_at

    def write(self, position: int, data: memoryview) -> None:
        self._write_at(position, data)


class _SealingInto(Writing):
    """Seals whole frames, and the final one with the last bytes of the plaintext.

    The header goes out with the first frames: a small message is one write.
    """

    def __init__(self, sealing: Sealing, target: Writable, frames: memoryview) -> None:
        self._geometry = sealing.geometry
        self._header = sealing.header
        self._cipher = FrameCipher(sealing.content_key, sealing.message_id)
        self._target = target
        self._frames = frames
        self._signer: Signer | None = None
        if sealing.signing_key is not None:
            from cryptography.hazmat.primitives.asymmetric import ec
            from cryptography.hazmat.primitives.serialization import load_der_private_key

            key = load_der_private_key(sealing.signing_key, None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self._signer = Signer(suite_by_id(sealing.suite_id), key)

    def write(self, position: int, data: memoryview) -> None:
        geometry = self._geometry
        start = position // geometry.frame_length
        last = position + len(data) == geometry.plaintext_length
        stop = geometry.frames if last else start + len(data) // geometry.frame_length
        offset, begin = geometry.frame_offset(start), 0
        if start == 0:
            offset, begin = 0, geometry.header_length
            self._frames[:begin] = self._header
        length = seal_frames(self._cipher, geometry, start, stop, data, self._frames[begin:])
        sealed = self._frames[: begin + length]
        if self._signer is not None:
            self._signer.update(sealed)
        self._target.write_at(offset, sealed)

    def finish(self) -> None:
        if self._geometry.plaintext_length == 0:
            self.write(0, memoryview(b""))
        if self._signer is not None:
            self._target.write_at(self._geometry.body_end, self._signer.footer())


class _Comparing(Writing):
    """Compares with a plaintext file, byte for byte."""

    def __init__(self, tree: Tree, name: str, length: int) -> None:
        self._source = tree.open(name)
        self._path = tree.path(name)
        self._buffer = bytearray()
        if self._source.size != length:
            self._source.close()
            raise IntegrityError(f"differs from {self._path}, which has another length")

    def write(self, position: int, data: memoryview) -> None:
        if len(self._buffer) != len(data):
            self._buffer = bytearray(len(data))
        with memoryview(self._buffer) as view:
            count = self._source.read_at(position, view)
        # A bytearray compares with memcmp; two memoryviews would compare item by item.
        if count < len(data) or self._buffer != data:
            raise IntegrityError(
                f"differs from {self._path} within bytes {position} to {position + len(data)}"
            )

    def close(self) -> None:
        self._source.close()


class _Regrouping:
    """Chunks of any length, put together to the lengths that the writing side takes."""

    def __init__(self, writing: Writing, step: int) -> None:
        self._write = writing.write
        self._step = step
        self._held = bytearray()
        self._position = 0

    def take(self, chunk: memoryview) -> None:
        while len(self._held) + len(chunk) >= self._step:
            room = self._step - len(self._held)
            if self._held:
                self._held += chunk[:room]
                self.end()
            else:
                self._pass_on(chunk[:room])
            chunk = chunk[room:]
        self._held += chunk

    def end(self) -> None:
        if self._held:
            with memoryview(self._held) as held:
                self._pass_on(held)
            self._held.clear()

    def _pass_on(self, data: memoryview) -> None:
        self._write(self._position, data)
        self._position += len(data)


def _steps(lengths: list[int]) -> Iterator[range]:
    """Files whose steps are done together: few enough for the processor's cache."""
    start = total = 0
    for row, length in enumerate(lengths):
        if total + length > _STEP_BYTES and row > start:
            yield range(start, row)
            start, total = row, 0
        total += length
    yield range(start, len(lengths))


def step_length(task: FileTask) -> int:
    """Plaintext bytes that go through the loop at once: whole frames."""
    unit = unit_length(task)
    return max(1, LOOP_LENGTH // unit) * unit


def _frames_length(task: FileTask, geometry: Geometry) -> int:
    """Room for what one step of the loop seals, the header and the final frame included."""
    step = step_length(task)
    if task.length <= step:
        return geometry.body_end
    frames = step // geometry.frame_length
    return geometry.header_length + step + frames * REGULAR_OVERHEAD + FINAL_OVERHEAD


def unexpected(path: str, error: BaseException) -> StreamcryptError:
    """An error that only a bug of ours (or of what we build on) can raise, as one of ours."""
    return StreamcryptError(f"{path}: internal error: {type(error).__name__}: {error}")


def _changed(path: str) -> SourceError:
    return SourceError(f"{path}: changed while it was read; run again when nobody writes to it")
