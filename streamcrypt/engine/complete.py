"""A job that is asked to go on and finds that it had ended: nothing is done, and nothing replaced.

A folder is finished when no job's journal lies in it and a manifest does.  It is this job's when the
manifest opens under the job's keys and its last line names what the job would read, and how
(``SourcesDigest``).  Then each file that is listed must be there with its length, and unchanged since the
manifest was written; one that the system says was changed later (a copy, say) must be the listed message
by its header, and that and its final frame authenticate.  What was altered without that showing,
``verify`` finds.

A single file leaves nothing that says what it was made of: it is done when it holds what the job's source
holds, all of which is read and authenticated.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

from streamcrypt.engine.job import Failure, Job, Report
from streamcrypt.engine.journal import is_interrupted
from streamcrypt.engine.manifest import Ending, Listed, SourcesDigest, as_listed, read_blocks
from streamcrypt.engine.run import entries, is_made, made_by, merge, own_rules, settings
from streamcrypt.engine.scan import scan
from streamcrypt.engine.spans import MANIFEST, SIGNATURE
from streamcrypt.errors import (
    DestinationError,
    IntegrityError,
    KeyAccessError,
    StreamcryptError,
    TemporaryError,
)
from streamcrypt.message.context import PUBLIC_KEY_NAME
from streamcrypt.storage import Entry, Source, Tree
from streamcrypt.streams import (
    BATCH_LENGTH,
    DecryptingFile,
    SequentialReader,
    UnlockedMessage,
    located,
    source_header,
    unlock,
)
from streamcrypt.system import page_aligned

_Pairs = Iterator[tuple[Entry | None, Listed | None]]


def completed(job: Job) -> Report | None:
    """The report of a job that finds everything done; None when there is something to do.

    DestinationError when what is there is neither this job's nor to be replaced.
    """
    started = time.perf_counter()
    report = Report(job.operation, job.workers)
    is_done = _is_folder_done(job, report) if job.source.name is None else _is_file_done(job, report)
    report.seconds = time.perf_counter() - started
    return report if is_done else None


# -- a folder


def _is_folder_done(job: Job, report: Report) -> bool:
    assert job.destination is not None
    tree = job.destination.tree
    if job.writing is None or job.overwrite or is_interrupted(tree) or not tree.exists(MANIFEST):
        return False
    refused = DestinationError(
        f"{tree.root}: holds a finished job of other files, keys or settings; choose another folder "
        "(overwrite replaces it)"
    )
    try:
        ending, latest = _look_into(job, report, None)
    except TemporaryError:
        raise
    except KeyAccessError as error:
        raise refused from error
    if not ending.sources or ending.sources != _sources(job):
        raise refused
    if latest > ending.time:
        _look_into(job, report, ending.time)
    if job.signing is not None and not tree.exists(SIGNATURE):
        report.failed.append(Failure(SIGNATURE, IntegrityError(f"{tree.path(SIGNATURE)}: is missing")))
    report.skipped = ending.files - len(report.failed)
    return True


def _look_into(job: Job, report: Report, since: int | None) -> tuple[Ending, int]:
    """Hold what is there against the manifest: its last line, and when a file was last changed.

    ``since``: the messages of what was changed later are looked into, and nothing else is told.
    """
    assert job.destination is not None
    assert job.resuming is not None
    tree, path, rules = job.destination.tree, job.destination.tree.path(MANIFEST), own_rules(job)
    ending, latest = Ending(0, 0), 0

    def blocks(manifest: DecryptingFile) -> Iterator[list[dict[str, Any]]]:
        nonlocal ending
        ending = yield from read_blocks(io.BufferedReader(manifest, 2**20))

    def left(entries: Iterator[Entry], blocks: Iterator[list[dict[str, Any]]]) -> _Pairs:
        """What is there beside what is listed, from the first block of lines whose files are not all there."""
        nonlocal latest
        for block in blocks:
            there = list(islice(entries, len(block)))
            if not _are_there(block, there):
                lines = chain.from_iterable(map(as_listed, chain((block,), blocks)))
                return merge(chain(there, entries), lines)
            latest = max(latest, max(entry.changed for entry in there))
        return merge(entries, iter(()))

    def suspects(pairs: _Pairs) -> Iterator[Listed]:
        nonlocal latest
        for entry, line in pairs:
            if line is None or entry is None:
                name, is_folder = (line or entry).name, (line or entry).folder  # type: ignore[union-attr]
                if not is_folder and since is None:
                    reason = "is missing: the manifest lists it" if entry is None else "was added"
                    fail(name, reason)
            elif entry.size != line.message_length or entry.folder != line.folder or entry.problem:
                if since is None:
                    fail(line.name, "is not the message that the manifest lists")
            elif since is None:
                latest = max(latest, entry.changed)
            elif entry.changed > since and not entry.folder:
                yield line

    def fail(name: str, reason: str) -> None:
        error = IntegrityError(f"{tree.path(name)}: {reason}; overwrite makes all of it again")
        report.failed.append(Failure(name, error))

    def look(tree: Tree, line: Listed) -> bool:
        return is_made(tree, line.name, line, made_by(job, line.name), rules)

    try:
        manifest = DecryptingFile(tree.open(MANIFEST), job.resuming, rules, name=path)
    except StreamcryptError as error:
        raise located(error, path) from error.__cause__
    with manifest:
        header = manifest.header
        report.manifest_digest = f"{header.message_id.hex()}{header.tag.hex()}"
        if header.suite.signed and since is None:
            manifest.verify_signature()
        # Most often all is as it should be, and what is done for a file is what finding that out costs.
        if since is None:
            pairs = left(tree.walk(), blocks(manifest))
        else:
            pairs = merge(tree.walk(), chain.from_iterable(map(as_listed, blocks(manifest))))
        for line, is_there in scan(tree, job.workers, suspects(pairs), look):
            if not is_there:
                fail(line.name, "is not the message that the manifest lists")
    return ending, latest


def _are_there(lines: Sequence[dict[str, Any]], entries: Sequence[Entry]) -> bool:
    """Whether these are the files and folders that the lines list, by name and length."""
    listed = [
        (line["name"], line.get("message_length", 0), line.get("folder", False), None) for line in lines
    ]
    return listed == [entry[:4] for entry in entries]


def _sources(job: Job) -> str:
    """What the manifest of this job would say of its sources."""
    digest = SourcesDigest(settings(job))
    for entry in entries(job):
        if entry.problem is not None or (entry.state is None and not entry.folder):
            return ""  # it would not finish
        if entry.state is not None and not entry.folder:
            digest.add(entry.name, entry.state)
        elif job.reading is None:
            digest.add_folder(entry.name)
    return digest.hexdigest()


# -- a single file


def _is_file_done(job: Job, report: Report) -> bool:
    place = job.destination
    assert place is not None
    assert place.name is not None
    if not place.tree.exists(place.name):
        return False
    there = _digest_of_made(job, place.tree, place.name)
    is_done = there is not None and there == _digest_of_source(job)
    if not is_done and not job.overwrite:
        raise DestinationError(
            f"{place.path}: exists already, and is not what this job makes; overwrite must be asked for"
        )
    report.skipped = int(is_done)
    return is_done


def _digest_of_made(job: Job, tree: Tree, name: str) -> bytes | None:
    """Of the plaintext of what is there; None where that is no message of a job like this."""
    with closing(tree.open(name)) as made:
        if job.writing is None:
            return _digest(made, None)
        assert job.resuming is not None
        try:
            header = source_header(made, max_encrypted_data_keys=None)
            stored = {name: value for name, value in header.context.items() if name != PUBLIC_KEY_NAME}
            if (header.suite, header.frame_length, stored) != (job.suite, job.frame_length, job.context):
                return None
            return _digest(made, unlock(header, job.resuming, own_rules(job)))
        except TemporaryError:
            raise
        except (IntegrityError, KeyAccessError):
            return None


def _digest_of_source(job: Job) -> bytes:
    assert job.source.name is not None
    with closing(job.source.tree.open(job.source.name)) as source:
        if job.reading is None:
            return _digest(source, None)
        try:
            header = source_header(source, max_encrypted_data_keys=job.rules.max_encrypted_data_keys)
            return _digest(source, unlock(header, job.reading, job.rules))
        except StreamcryptError as error:
            raise located(error, job.source.path) from error.__cause__


def _digest(source: Source, message: UnlockedMessage | None) -> bytes:
    """Of all the plaintext, which is authenticated on the way where it is that of a message."""
    digest = hashlib.sha256()
    if message is not None:
        for chunk in SequentialReader(source, message).chunks():
            digest.update(chunk)
    else:
        block, offset = page_aligned(BATCH_LENGTH), 0
        while count := source.read_at(offset, block):
            digest.update(block[:count])
            offset += count
        source.check_unchanged()
    return digest.digest()
