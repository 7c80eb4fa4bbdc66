"""Files into tasks: plain data that a worker of any kind can take.

    FileTask   a whole file: the worker opens, writes, flushes and publishes it
    SpanTask   some whole frames of one large file, whose target the parent has made
    SmallFiles several files that become messages of one frame each
    SmallMessages  several messages of a store that one request each brings

A task carries a message's own derived key, never a data key; where it goes to another process it
goes through that process's own pipe.  Tasks are named tuples, which pickle several times faster than
dataclasses with slots; their ``repr`` shows no key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from streamcrypt.message.frames import Geometry
from streamcrypt.message.header import HeaderTemplate
from streamcrypt.message.suites import TAG_LENGTH
from streamcrypt.storage import RESERVED_FOLDER
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from streamcrypt.engine.manifest import Listed

# A file of more than this is cut, so that the last one does not keep one worker busy while the
# others have nothing left to do; a span is long enough for its hand-over (0.1 ms) not to count.
SPLIT_LENGTH: Final = 128 * 2**20
SPAN_LENGTH: Final = 32 * 2**20
# Small files travel together: up to so many, or so many bytes.
BATCH_FILES: Final = 64
BATCH_BYTES: Final = 16 * 2**20
# Above this the cost of a file is its bytes.
SMALL_LENGTH: Final = 256 * 2**10

MANIFEST: Final = f"{RESERVED_FOLDER}/manifest"
# What is signed of a tree, and the signature (signature.py).
STATEMENT: Final = f"{RESERVED_FOLDER}/manifest.signed"
SIGNATURE: Final = f"{RESERVED_FOLDER}/manifest.sig"


class Sealing(NamedTuple):
    """How a worker makes a message: everything is drawn and derived already.

    ``signing_key`` is the PKCS#8 DER of the message's own key pair, for a signed suite.
    """

    suite_id: int
    header: bytes
    message_id: bytes
    content_key: bytes
    geometry: Geometry
    signing_key: bytes | None = None

    def __repr__(self) -> str:
        return f"<Sealing {self.message_id.hex()}>"


class Opening(NamedTuple):
    """How a worker reads a message whose header the parent has authenticated.

    ``geometry`` is None for unframed content.
    """

    header: bytes
    message_id: bytes
    content_key: bytes
    geometry: Geometry | None
    signed: bool = False

    def __repr__(self) -> str:
        return "<Opening>"

    @property
    def in_order(self) -> bool:
        """Whether the message must be read by one worker from its start to its end."""
        return self.signed or self.geometry is None


class FileTask(NamedTuple):
    """One file.  ``target`` None: nothing is written.  ``against``: a plaintext that must be equal.

    ``length`` is the plaintext's, in bytes.  ``sha256``: what the message that is read must have.
    """

    number: int
    source: str
    target: str | None
    length: int
    opening: Opening | None = None
    sealing: Sealing | None = None
    against: str | None = None
    attempt: int = 1
    undivided: bool = False  # it is read or written only from its start to its end
    sha256: str = ""

    def __repr__(self) -> str:
        return f"<FileTask {self.source!r}>"

    @property
    def target_length(self) -> int | None:
        """The bytes that will be written, None where nothing is."""
        if self.target is None:
            return None
        return self.length if self.sealing is None else self.sealing.geometry.message_length

    @property
    def in_order(self) -> bool:
        return (
            self.undivided
            or (self.opening is not None and self.opening.in_order)
            or (self.sealing is not None and self.sealing.signing_key is not None)
        )


class SpanTask(NamedTuple):
    """The plaintext bytes ``start`` to ``stop`` of one file, into its target's temporary file."""

    file: FileTask
    temporary: str | None
    start: int
    stop: int

    def __repr__(self) -> str:
        return f"<SpanTask {self.file.source!r} {self.start}:{self.stop}>"

    @property
    def number(self) -> int:
        return self.file.number


class SmallFile(NamedTuple):
    """A file that is going to be one of ``SmallFiles``; its keys are derived when those are put together.

    With its line of the manifest it is a message that is going to be one of ``SmallMessages``.
    """

    number: int
    source: str
    length: int
    listed: Listed | None = None


class SmallFiles(NamedTuple):
    """Files of following numbers, each shorter than a frame, that are encrypted under their own names.

    Columns instead of an object for each: what a small file costs is the interpreter's time
    (benchmarks/README.md, "small files").  Ids are drawn and keys derived already; the worker makes the
    headers too, since it has the ciphers.
    """

    number: int
    names: list[str]
    lengths: list[int]
    template: HeaderTemplate
    message_ids: list[bytes]
    content_keys: list[bytes]
    commitments: list[bytes]

    def __repr__(self) -> str:
        return f"<SmallFiles {self.number} to {self.number + len(self.names) - 1}>"

    def task(self, row: int, tag: bytes = bytes(TAG_LENGTH)) -> FileTask:
        """One of them as a task of its own, with the tag that its header got."""
        name, length, message_id = self.names[row], self.lengths[row], self.message_ids[row]
        header = self.template.body(message_id, self.commitments[row]) + tag
        # It is shorter than a frame, so how long a frame may be does not matter.
        geometry = Geometry(len(header), length + 1, 0, length)
        sealing = Sealing(self.template.suite.id, header, message_id, self.content_keys[row], geometry)
        return FileTask(self.number + row, name, name, length, sealing=sealing)


class SmallMessages(NamedTuple):
    """Messages of following numbers that are decrypted under their own names, in columns for the same reason.

    Ids are those that the manifest lists, and keys are derived from the data key of a message that was read
    before: each header must be what these make it, else the message is one to be looked at by itself.
    ``lengths`` are those of the messages.
    """

    number: int
    names: list[str]
    lengths: list[int]
    template: HeaderTemplate
    geometries: list[Geometry]
    message_ids: list[bytes]
    content_keys: list[bytes]
    commitments: list[bytes]
    tags: list[bytes]

    def __repr__(self) -> str:
        return f"<SmallMessages {self.number} to {self.number + len(self.names) - 1}>"


# A list of them, one where there is a SpanTask or SmallMessages.
Tasks: TypeAlias = Sequence[FileTask | SpanTask | SmallFiles | SmallMessages]


def is_large(task: FileTask) -> bool:
    """Whether a file is cut into spans."""
    return task.length > SPLIT_LENGTH and not task.in_order


def cut(task: FileTask, temporary: str | None) -> list[SpanTask]:
    """The spans of a large file, each but the last a whole number of the frames it writes or reads."""
    step = max(1, SPAN_LENGTH // unit_length(task)) * unit_length(task)
    return [
        SpanTask(task, temporary, start, min(start + step, task.length))
        for start in range(0, task.length, step)
    ]


def unit_length(task: FileTask) -> int:
    """The plaintext bytes that are sealed, opened or copied together, one by one."""
    if task.sealing is not None:
        return task.sealing.geometry.frame_length
    if task.opening is not None and task.opening.geometry is not None:
        return task.opening.geometry.frame_length
    return 2**20


def in_batches(
    tasks: Iterable[FileTask | SmallFile], files: int = BATCH_FILES, small_files: int = BATCH_FILES
) -> Iterator[list[FileTask] | list[SmallFile]]:
    """Tasks in lists of up to so many that are worth a hand-over each; a large one is a list of its own."""
    batch: list[Any] = []
    size = 0
    for task in tasks:
        if batch and (
            len(batch) >= (small_files if isinstance(task, SmallFile) else files)
            or size + task.length > BATCH_BYTES
            or not _go_together(batch[-1], task)
        ):
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += task.length
    if batch:
        yield batch


def _go_together(task: FileTask | SmallFile, following: FileTask | SmallFile) -> bool:
    if isinstance(task, SmallFile):
        return isinstance(following, SmallFile) and following.number == task.number + 1
    return not isinstance(following, SmallFile)
