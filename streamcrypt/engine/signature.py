"""The signed manifest: what a dataset consists of, provable with a public key alone.

    _streamcrypt/manifest.signed    the statement: which objects there are, and the SHA-256 of each
    _streamcrypt/manifest.sig       KMS's signature over the statement's bytes

The statement is one JSON object a line, without spaces, names ascending as in the manifest:

    {"streamcrypt": "signed manifest", "version": 1, "key", "algorithm", "digest": "SHA-256", "time"}
    {"name", "length", "sha256"}                       a message: all of its bytes as they are stored
    {"name", "folder": true}                           an empty folder
    {"manifest": "_streamcrypt/manifest", "length", "sha256"}
    {"files", "bytes"}                                 what was listed; the end

It holds nothing that the storage does not show: no plaintext sizes, no keys, no context.  Because it
covers every byte of every message, it proves origin and completeness to somebody who can open none
of them, and against somebody who can open them all: who holds a data key can seal another body
under the same header, but cannot make it hash to what was signed.  It cannot prove that the dataset
is the newest one.

Sources: FIPS 180-4 (SHA-256); keys/signing.py for the signature.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from streamcrypt.engine.hashing import NOT_SIGNED, HashingSource, HashingTarget
from streamcrypt.engine.job import Failure, Job, Progress, Report
from streamcrypt.engine.manifest import Listed
from streamcrypt.engine.run import merge
from streamcrypt.engine.scan import scan
from streamcrypt.engine.spans import MANIFEST, SIGNATURE, STATEMENT
from streamcrypt.errors import IntegrityError, SourceError, StreamcryptError
from streamcrypt.keys.signing import PublicKey, SigningKey, new_hash, verify_digest
from streamcrypt.storage import Entry, Source, Tree, check_name, sort_key
from streamcrypt.streams import SequentialReader, UnlockedMessage, located, read_bytes
from streamcrypt.system import page_aligned

_VERSION: Final = 1
_DIGEST: Final = "SHA-256"
_BLOCK: Final = 2**20
_MAX_SIGNATURE: Final = 4096  # bytes; RSA 4096 takes 512
_MAX_FIRST_LINE: Final = 4096
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NOT_WHOLE: Final = "is not a whole signed manifest of this version"


# -- writing


class StatementWriter:
    """Writes the statement in walk order, and signs it at the end."""

    def __init__(self, tree: Tree, key: SigningKey, *, overwrite: bool, durable: bool) -> None:
        self._tree = tree
        self._key = key
        self._overwrite = overwrite
        self._durable = durable
        self._target: HashingTarget | None = None
        self._hash = new_hash(key.algorithm)
        self._held = bytearray()
        self._files = 0
        self._bytes = 0
        self._time = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._line(
            {
                "streamcrypt": "signed manifest",
                "version": _VERSION,
                "key": key.arn,
                "algorithm": key.algorithm,
                "digest": _DIGEST,
                "time": self._time,
            }
        )

    def add(self, listed: Listed) -> None:
        """A message with its digest, or an empty folder."""
        if listed.folder:
            self._line({"name": listed.name, "folder": True})
        elif listed.failed is None:
            self._files += 1
            self._bytes += listed.message_length
            self._line({"name": listed.name, "length": listed.message_length, "sha256": listed.sha256})
        # A file that failed is not there; `publish` is not called then.

    def publish(self, manifest: HashingTarget) -> dict[str, str]:
        """End the statement, sign it, publish both; returns what the report says of it."""
        self._line({"manifest": MANIFEST, "length": manifest.length, "sha256": manifest.sha256()})
        self._line({"files": self._files, "bytes": self._bytes})
        self._flush()
        assert self._target is not None
        signature = self._key.sign(self._hash.digest())
        if self._durable:
            self._target.flush()
        self._target.publish(overwrite=self._overwrite)
        target = self._tree.create(SIGNATURE, overwrite=self._overwrite)
        try:
            target.write_at(0, signature)
            if self._durable:
                target.flush()
            target.publish(overwrite=self._overwrite)
        finally:
            target.discard()
        return _summary(self._key.arn, self._key.algorithm, self._time, self._target.sha256())

    def discard(self) -> None:
        if self._target is not None:
            self._target.discard()

    def _line(self, record: dict[str, Any]) -> None:
        self._held += json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if len(self._held) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if self._target is None:
            self._target = HashingTarget(self._tree.create(STATEMENT, overwrite=self._overwrite))
        self._hash.update(self._held)
        self._target.write_at(self._target.length, bytes(self._held))
        self._held.clear()


def _summary(key: str, algorithm: str, when: str, sha256: str) -> dict[str, str]:
    return {"key": key, "algorithm": algorithm, "time": when, "statement": sha256}


def authenticated_sha256(source: Source, message: UnlockedMessage) -> str:
    """The digest of a message that was made before: every frame of it is opened on the way."""
    hashing = HashingSource(source)
    for _ in SequentialReader(hashing, message).chunks():
        pass
    return hashing.sha256()


# -- reading


class Statement:
    """The statement of a tree, whose signature has been verified; it is closed by whoever opened it."""

    def __init__(self, tree: Tree, public_key: PublicKey) -> None:
        """IntegrityError unless there is one, and it is this key's."""
        for name in (STATEMENT, SIGNATURE):
            if not tree.exists(name):
                raise IntegrityError(f"{tree.path(name)}: is missing: the tree has no signed manifest")
        self._path = tree.path(STATEMENT)
        signature = _content(tree, SIGNATURE, _MAX_SIGNATURE)
        self._source = tree.open(STATEMENT)
        try:
            first = self._first_line()
            digest, sha256 = self._hashes(first["algorithm"])
            try:
                verify_digest(public_key, first["algorithm"], digest, signature)
            except IntegrityError as error:
                raise IntegrityError(f"{tree.path(SIGNATURE)}: {error}") from error
            _expect(first == _first_record(first))
            self._first = first
        except BaseException:
            self._source.close()
            raise
        self.summary = _summary(first["key"], first["algorithm"], first["time"], sha256)
        self.manifest = Listed(MANIFEST)

    def __enter__(self) -> Statement:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def lines(self) -> Iterator[Listed]:
        """Its messages and empty folders, names ascending; after the last one ``manifest`` is known.

        IntegrityError when it is not whole, or, before a line of it is given out, no longer the one whose
        signature was verified.
        """
        lines = self._signed_lines()
        _expect(_parse(next(lines, b"")) == self._first)
        files = total = 0
        previous = ""
        for line in lines:
            record = _parse(line)
            if "manifest" in record:
                self.manifest = self._message(record, "manifest")
                _expect(self.manifest.name == MANIFEST)
                _expect(_parse(next(lines, b"")) == {"files": files, "bytes": total} and not next(lines, b""))
                return
            listed = self._message(record, "name")
            _expect(previous < sort_key(check_name(listed.name)))
            previous = sort_key(listed.name)
            if not listed.folder:
                files += 1
                total += listed.message_length
            yield listed
        _expect(False)

    def _message(self, record: dict[str, Any], member: str) -> Listed:
        name, length, sha256 = record.get(member), record.get("length"), record.get("sha256")
        _expect(isinstance(name, str))
        assert isinstance(name, str)
        if record == {"name": name, "folder": True}:
            return Listed(name, folder=True)
        _expect(record.keys() == {member, "length", "sha256"})
        _expect(type(length) is int and length >= 0)
        _expect(isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None)
        assert isinstance(length, int)
        return Listed(name, message_length=length, sha256=str(sha256))

    def _first_line(self) -> dict[str, str]:
        """What the first line says, before anything is verified: the algorithm must be known to begin."""
        start = bytes(read_bytes(self._source, 0, _MAX_FIRST_LINE))
        line, newline, _ = start.partition(b"\n")
        record = _parse(line + newline)
        if record.get("streamcrypt") != "signed manifest" or record.get("version") != _VERSION:
            raise IntegrityError(f"{self._path}: {_NOT_WHOLE}")
        _expect(all(isinstance(record.get(name), str) for name in ("key", "algorithm", "time")))
        _expect(re.fullmatch(r"[A-Z0-9_]+_(256|384|512)", record["algorithm"]) is not None)
        return record

    def _hashes(self, algorithm: str) -> tuple[bytes, str]:
        """The digest that was signed, and the statement's SHA-256 for people."""
        signed, plain = new_hash(algorithm), hashlib.sha256()
        self._digests: list[bytes] = []  # of its blocks: no line of one that changes since is given out
        for block in _blocks(self._source):
            signed.update(block)
            plain.update(block)
            self._digests.append(hashlib.sha256(block).digest())
        return signed.digest(), plain.hexdigest()

    def _signed_lines(self) -> Iterator[bytes]:
        """The lines of what the signature was verified for."""
        rest = b""
        digests = iter(self._digests)
        for block in _blocks(self._source):
            if hashlib.sha256(block).digest() != next(digests, None):
                raise IntegrityError(f"{self._path}: changed after its signature was verified")
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if rest:
            yield rest


def _first_record(first: dict[str, str]) -> dict[str, Any]:
    return {
        "streamcrypt": "signed manifest",
        "version": _VERSION,
        "key": first["key"],
        "algorithm": first["algorithm"],
        "digest": _DIGEST,
        "time": first["time"],
    }


def _content(tree: Tree, name: str, most: int) -> bytes:
    source = tree.open(name)
    try:
        return bytes(read_bytes(source, 0, most))
    finally:
        source.close()


def _blocks(source: Source) -> Iterator[memoryview]:
    buffer = page_aligned(_BLOCK)
    offset = 0
    while count := source.read_at(offset, buffer):
        yield buffer[:count]
        offset += count


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the first line is read before anything is verified
        record = None
    _expect(isinstance(record, dict) and line.endswith(b"\n"))
    return dict(record)


def _expect(holds: bool) -> None:
    if not holds:
        raise IntegrityError(f"{STATEMENT}: {_NOT_WHOLE}")


# -- a tree against its statement, without any key


def verify(job: Job) -> Report:
    """Hold a tree against its signed manifest; no key is used and no KMS is called.

    What is missing, added, altered or renamed is a failure of the report each.
    """
    started = time.perf_counter()
    tree = job.source.tree
    report = Report("verify", job.workers)
    assert job.signed_by is not None
    try:
        with Statement(tree, job.signed_by) as statement:
            report.signature = statement.summary
            _compare(job, statement, report)
    finally:
        tree.close()
        report.seconds = time.perf_counter() - started
    return report


_Pair: TypeAlias = tuple[Entry | None, Listed | None]


def _compare(job: Job, statement: Statement, report: Report) -> None:
    tree = job.source.tree
    missing: list[Listed] = []
    added: list[Entry] = []

    def fail(name: str, error: StreamcryptError) -> None:
        report.failed.append(Failure(name, located(error, tree.path(name))))

    for (entry, line), error in scan(tree, job.workers, _pairs(job, statement), _difference):
        if error is not None:
            fail(line.name if line is not None else entry.name if entry is not None else "", error)
        elif line is None:
            assert entry is not None
            if not entry.folder:  # an empty folder that was added holds nothing
                added.append(entry)
        elif entry is None:
            if not line.folder:
                missing.append(line)
        elif not line.folder:
            report.bytes_in += line.message_length
            report.files += line.name != MANIFEST
            if job.progress is not None:
                job.progress(Progress(report.files, report.bytes_in))
    # Of a message that only has another name, both names are told.
    lengths = {line.message_length for line in missing}
    by_digest = {line.sha256: line.name for line in missing}
    renamed: dict[str, str] = {}
    for entry in added:
        found = by_digest.get(sha256_of(tree, entry.name)) if entry.size in lengths else None
        if found is None:
            fail(entry.name, IntegrityError("is not in the signed manifest: it was added"))
        else:
            renamed[found] = entry.name
            fail(entry.name, IntegrityError(f"was signed under another name: {found}"))
    for line in missing:
        where = f"; it was renamed to {renamed[line.name]}" if line.name in renamed else ""
        fail(line.name, IntegrityError(f"is missing: the signed manifest lists it{where}"))


def _pairs(job: Job, statement: Statement) -> Iterator[_Pair]:
    """Objects and lines of one name side by side, None where one lacks it; at the end those of the manifest."""
    tree, filters = job.source.tree, job.filters
    names = frozenset(job.names) if job.names is not None else None
    entries = (entry for entry in tree.walk(filters) if names is None or entry.name in names)
    lines = (
        line
        for line in statement.lines()
        if filters.admit(line.name) and (names is None or line.name in names)
    )
    yield from merge(entries, lines)
    yield tree.entry(MANIFEST) if tree.exists(MANIFEST) else None, statement.manifest


def _difference(tree: Tree, pair: _Pair) -> StreamcryptError | None:
    """What is wrong with an object that was signed and is there."""
    entry, line = pair
    if entry is not None and entry.problem is not None:
        return SourceError(entry.problem)
    if entry is None or line is None:
        return None
    if entry.folder != line.folder:
        return IntegrityError("is a folder in one place and a message in the other")
    if line.folder:
        return None
    if entry.size != line.message_length:
        return IntegrityError("has another length than was signed: truncated or extended")
    try:
        return None if sha256_of(tree, entry.name) == line.sha256 else IntegrityError(NOT_SIGNED)
    except StreamcryptError as error:
        return error


def sha256_of(tree: Tree, name: str) -> str:
    """The digest of an object as it is stored; SourceError when it changes meanwhile."""
    source = tree.open(name)
    try:
        digest = hashlib.sha256()
        for block in _blocks(source):
            digest.update(block)
        source.check_unchanged()
    finally:
        source.close()
    return digest.hexdigest()


def check_manifest(tree: Tree, statement: Statement) -> StreamcryptError | None:
    """What is wrong with the encrypted manifest, after all lines of the statement; None when it is the signed one."""
    line = statement.manifest
    if not tree.exists(MANIFEST):
        error: StreamcryptError | None = IntegrityError("is missing: the signed manifest lists it")
    else:
        error = _difference(tree, (tree.entry(MANIFEST), line))
    return located(error, tree.path(MANIFEST)) if error is not None else None
