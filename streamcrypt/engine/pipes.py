"""A job that reads standard input or writes standard output: one stream, in one process.

Its length is not known, so it is sealed and opened in order, in constant memory.  It is the one case
where payload passes through the parent.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from streamcrypt.engine.audit import audit_line
from streamcrypt.engine.job import Job, Progress, Report
from streamcrypt.errors import DestinationError, IntegrityError, SourceError, StreamcryptError
from streamcrypt.storage import Source
from streamcrypt.streams import (
    BATCH_LENGTH,
    MessageWriter,
    OutgoingMessage,
    header_template,
    located,
    open_stream,
)
from streamcrypt.system import page_aligned

if TYPE_CHECKING:
    from streamcrypt.s3client import ClientObject

_F_SETPIPE_SZ: Final = getattr(fcntl, "F_SETPIPE_SZ", None)
_PIPE_LENGTH: Final = 2**20
_BEGINNING_LENGTH: Final = 2**16  # of a message that is read; longer headers are left out of the audit line


def run(job: Job, client_object: ClientObject | None = None) -> Report:
    """Do a job whose source or destination is a stream; the first failure ends it.

    ``client_object``: the source where it is no message but an object of the S3 Encryption Client.
    """
    started = time.perf_counter()
    report = Report(job.operation, workers=1, dry_run=job.dry_run)
    beginning = bytearray()
    done = 0
    try:
        with contextlib.ExitStack() as cleanup:
            if client_object is not None:
                cleanup.callback(client_object.close)
            if job.dry_run:  # nothing is read of a stream: whoever writes to it may want to do that once
                report.files = 1
                report.bytes_in = 0 if job.source.is_stream else _source_length(job)
                return report
            if client_object is not None:
                chunks = _located(_unlocked(job, report, client_object), client_object.path)
            else:
                chunks = _chunks(job, report, cleanup, beginning)
            write, finish = _writer(job, report, cleanup, beginning)
            for chunk in chunks:
                write(chunk)
                done += len(chunk)
                if job.progress is not None:
                    job.progress(Progress(0, done))
            finish()
    except StreamcryptError as error:
        _audit(job, bytes(beginning), done, error)
        raise
    _audit(job, bytes(beginning), done, None)
    report.files = 1
    report.seconds = time.perf_counter() - started
    return report


def _chunks(
    job: Job, report: Report, cleanup: contextlib.ExitStack, beginning: bytearray
) -> Iterator[memoryview]:
    readinto = _reader(job, report, cleanup)
    if job.reading is None:
        return _plain(readinto, job.frame_length)
    if job.writing is None:
        readinto = _keeping(readinto, beginning)
    name = "standard input" if job.source.is_stream else job.source.path
    return _located(open_stream(readinto, job.reading, job.rules), name)


def _unlocked(job: Job, report: Report, client_object: ClientObject) -> Iterator[memoryview]:
    assert job.reading is not None
    opened = client_object.unlock(job.reading, job.rules)
    report.bytes_in = client_object.source.size
    yield from opened.chunks()


def _audit(job: Job, beginning: bytes, done: int, error: StreamcryptError | None) -> None:
    if job.audit is not None:
        name = "-" if job.source.is_stream else str(job.source.name)
        job.audit(audit_line(job.operation, name, beginning, done, error))


def _keeping(readinto: Callable[[memoryview], int], beginning: bytearray) -> Callable[[memoryview], int]:
    """The same, keeping the beginning of the message for the audit line."""

    def read(view: memoryview) -> int:
        count = readinto(view)
        if len(beginning) < _BEGINNING_LENGTH:
            beginning.extend(view[: min(count, _BEGINNING_LENGTH - len(beginning))])
        return count

    return read


def _located(chunks: Iterator[memoryview], name: str) -> Iterator[memoryview]:
    """The same chunks; an error says which message it is about."""
    try:
        yield from chunks
    except StreamcryptError as error:
        raise located(error, name) from error.__cause__


def _plain(readinto: Callable[[memoryview], int], frame_length: int) -> Iterator[memoryview]:
    buffer = page_aligned(max(1, BATCH_LENGTH // frame_length) * frame_length)
    while count := _fill(readinto, buffer):
        yield buffer[:count]


def _fill(readinto: Callable[[memoryview], int], buffer: memoryview) -> int:
    """Read until the buffer is full: whole frames need no further copy."""
    done = 0
    while done < len(buffer) and (count := readinto(buffer[done:])):
        done += count
    return done


def _reader(job: Job, report: Report, cleanup: contextlib.ExitStack) -> Callable[[memoryview], int]:
    if job.source.is_stream:
        if sys.stdin is None:
            raise SourceError("standard input: is closed")
        descriptor = sys.stdin.fileno()
        _widen(descriptor)

        def read_stream(view: memoryview) -> int:
            try:
                count = os.readv(descriptor, (view,))
            except OSError as error:
                raise SourceError(f"standard input: cannot be read: {error.strerror}") from error
            report.bytes_in += count
            return count

        return read_stream
    assert job.source.name is not None
    source: Source = job.source.tree.open(job.source.name)
    cleanup.callback(source.close)

    def read_file(view: memoryview) -> int:
        count = source.read_at(report.bytes_in, view)
        report.bytes_in += count
        if count < len(view):
            source.check_unchanged()
        return count

    return read_file


def _writer(
    job: Job, report: Report, cleanup: contextlib.ExitStack, beginning: bytearray
) -> tuple[Callable[[memoryview], None], Callable[[], None]]:
    """Where plaintext goes, and what is to be done when all of it has been written.

    ``beginning`` gets the header of a message that is made.
    """
    emit, publish = _emitter(job, report, cleanup)
    if job.against is not None:
        return _comparer(job, cleanup)
    if job.writing is None:
        return emit, publish
    context = {**job.context, **job.authenticated_context}
    length = None if job.source.is_stream or job.reading is not None else _source_length(job)
    materials = job.writing.for_encryption(job.suite, context, length)
    report.data_keys = 1
    template = header_template(materials, job.frame_length, job.authenticated_context)
    message = OutgoingMessage.begin(materials, template, job.frame_length)
    beginning += message.header
    writer = MessageWriter(message, emit)

    def finish() -> None:
        writer.finish()
        publish()

    return writer.write, finish


def _source_length(job: Job) -> int:
    assert job.source.name is not None
    return job.source.tree.entry(job.source.name).size


def _emitter(
    job: Job, report: Report, cleanup: contextlib.ExitStack
) -> tuple[Callable[[memoryview], None], Callable[[], None]]:
    destination = job.destination
    if destination is None:
        return (lambda data: None), (lambda: None)
    if destination.is_stream:
        if sys.stdout is None:
            raise DestinationError("standard output: is closed")
        sys.stdout.flush()
        descriptor = sys.stdout.fileno()
        _widen(descriptor)

        def emit_stream(data: memoryview) -> None:
            try:
                done = 0
                while done < len(data):
                    done += os.write(descriptor, data[done:])
            except OSError as error:
                raise DestinationError(f"standard output: cannot be written: {error.strerror}") from error
            report.bytes_out += len(data)

        return emit_stream, lambda: None
    assert destination.name is not None
    folder = destination.name.rpartition("/")[0]
    destination.tree.remove_leftovers(folder)
    target = destination.tree.create(destination.name, overwrite=job.overwrite)
    cleanup.callback(target.discard)

    def emit_file(data: memoryview) -> None:
        target.write_at(report.bytes_out, data)
        report.bytes_out += len(data)

    def publish() -> None:
        if job.durable:
            target.flush()
        target.publish(overwrite=job.overwrite)
        if job.durable:
            destination.tree.sync_folder(folder)

    return emit_file, publish


def _comparer(
    job: Job, cleanup: contextlib.ExitStack
) -> tuple[Callable[[memoryview], None], Callable[[], None]]:
    assert job.against is not None
    assert job.against.name is not None
    path = job.against.path
    source = job.against.tree.open(job.against.name)
    cleanup.callback(source.close)
    position = 0

    def compare(data: memoryview) -> None:
        nonlocal position
        expected = bytearray(len(data))
        with memoryview(expected) as view:
            source.read_at(position, view)
        if expected != data or position + len(data) > source.size:
            raise IntegrityError(f"differs from {path}, at or after byte {position}")
        position += len(data)

    def finish() -> None:
        if position != source.size:
            raise IntegrityError(f"differs from {path}, which is longer")

    return compare, finish


def _widen(descriptor: int) -> None:
    """A pipe of 1 MiB instead of 64 KiB: fewer turns between the two processes."""
    if _F_SETPIPE_SZ is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_LENGTH)
