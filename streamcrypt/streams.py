"""One message as a stream: sealed as it is written, opened as it is read, at any place.

    seal_message, open_message     a message that is in memory
    MessageWriter                  plaintext in, message out, in order, of any length
    FrameReader                    any range of a message that can be read at offsets
    open_stream, open_messages     a message that arrives in order (a pipe), and several in a row
    EncryptingFile, DecryptingFile the same two as Python file objects

Before any plaintext is given out: the header is parsed within limits, the commitment policy is
checked, a data key is unwrapped, the commitment compared, the header's tag verified.  A message that
can be read at offsets then has its final frame opened, which proves its length.  After that each
frame is given out only when it has been authenticated.
"""

from __future__ import annotations

import contextlib
import io
import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from streamcrypt.errors import (
    ContextMismatchError,
    FormatError,
    IntegrityError,
    KeyAccessError,
    LimitExceededError,
    StreamcryptError,
)
from streamcrypt.hygiene import forget_variables
from streamcrypt.message.derive import DerivedKeys, derive_for_reading, derive_keys
from streamcrypt.message.footer import MAX_FOOTER_LENGTH, Signer, Verifier, parse_footer
from streamcrypt.message.frames import (
    FINAL_MARK,
    FINAL_OVERHEAD,
    REGULAR_OVERHEAD,
    UNFRAMED_OVERHEAD,
    UNFRAMED_PREFIX,
    FrameCipher,
    Geometry,
    unframed_length,
)
from streamcrypt.message.header import (
    DEFAULT_MAX_ENCRYPTED_DATA_KEYS,
    Buffer,
    Header,
    HeaderCutShortError,
    HeaderTemplate,
    authenticate_header,
    parse_alike,
    parse_header,
)
from streamcrypt.message.suites import AlgorithmSuite, CommitmentPolicy
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from streamcrypt.keys.materials import EncryptionMaterials, Materials
    from streamcrypt.storage import Source, Target

DEFAULT_FRAME_LENGTH: Final = 2**20
# How many bytes of frames go through one system call: see benchmarks/README.md, "batch".
BATCH_LENGTH: Final = 2**20
# Unframed content has one tag at its end, so nothing of it may be given out before all of it is in
# memory; `cryptography` opens at most this much in one call.
MAX_UNFRAMED_IN_MEMORY: Final = 2**31 - 1 - UNFRAMED_OVERHEAD

_FIRST_READ: Final = 4096


def located(error: StreamcryptError, path: str) -> StreamcryptError:
    """The error with the name of the object that it is about before it."""
    text = str(error)
    if not text.startswith(path):
        error.args = (f"{path}: {text}",)
    return error


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """What is wrong with a message is told with its name."""
    try:
        yield
    except (IntegrityError, KeyAccessError, LimitExceededError) as error:
        raise located(error, path) from error.__cause__


def filled(length: int, fill: Callable[[memoryview], object]) -> bytes:
    """Bytes that ``fill`` writes in place: BytesIO gives its buffer away without copying it."""
    room = io.BytesIO(bytes(length))
    view = room.getbuffer()
    try:
        with view:
            fill(view)
    except BaseException as error:
        # They hold slices of the buffer, part of which may be plaintext; Python 3.13 complains of them, too.
        forget_variables(error)
        del room, view
        raise
    return room.getvalue()


def octets_of(data: Any) -> memoryview:
    """The memory of a contiguous buffer of any shape, byte by byte."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an array of no rows is not cast


# ---------------------------------------------------------------------------------------------
# Writing


class OutgoingMessage(NamedTuple):
    """A message that has been begun: its id is drawn, its keys derived, its header sealed."""

    header: bytes
    message_id: bytes
    content_key: bytes
    cipher: FrameCipher
    frame_length: int
    signing_key: ec.EllipticCurvePrivateKey | None
    materials: EncryptionMaterials

    def __repr__(self) -> str:
        return f"<OutgoingMessage {self.message_id.hex()}>"

    @classmethod
    def begin(
        cls, materials: EncryptionMaterials, template: HeaderTemplate, frame_length: int
    ) -> OutgoingMessage:
        message_id = new_message_ids(materials.suite, 1)
        keys = derive_keys(materials.suite, materials.data_key, message_id)
        cipher = FrameCipher(keys.content_key, message_id)
        header = template.seal(message_id, keys.commitment, cipher.aead)
        return cls(
            header, message_id, keys.content_key, cipher, frame_length, materials.signing_key, materials
        )

    def geometry(self, plaintext_length: int) -> Geometry:
        return Geometry.for_plaintext(
            len(self.header), self.frame_length, plaintext_length, signed=self.signing_key is not None
        )


def new_message_ids(suite: AlgorithmSuite, count: int) -> bytes:
    """Ids for so many messages, one after the other."""
    # 256 random bits each: the salt of the derivation, so that no two messages share a content key.
    return os.urandom(count * suite.message_id_length)


def header_template(
    materials: EncryptionMaterials, frame_length: int, authenticated_context: Mapping[str, str] | None = None
) -> HeaderTemplate:
    """The header for messages under these materials.

    The pairs of ``authenticated_context`` are part of the materials' context, but not stored.
    """
    unstored = authenticated_context or {}
    stored = {name: value for name, value in materials.context.items() if name not in unstored}
    return HeaderTemplate(materials.suite, stored, materials.encrypted_data_keys, frame_length, unstored)


def seal_message(message: OutgoingMessage, plaintext: Buffer) -> bytes:
    """The whole message for a plaintext that is in memory."""
    if message.signing_key is None and len(plaintext) < message.frame_length:  # the usual one, in one frame
        start = len(message.header)
        sealed = bytearray(start + FINAL_OVERHEAD + len(plaintext))
        sealed[:start] = message.header
        with memoryview(sealed) as view:
            message.cipher.seal_final(plaintext, 0, view[start:])
        return bytes(sealed)
    geometry = message.geometry(len(plaintext))
    sealed = bytearray(geometry.body_end)
    sealed[: geometry.header_length] = message.header
    seal_frames(
        message.cipher,
        geometry,
        0,
        geometry.frames,
        memoryview(plaintext),
        memoryview(sealed)[geometry.header_length :],
    )
    if message.signing_key is not None:
        signer = Signer(message.materials.suite, message.signing_key)
        signer.update(sealed)
        sealed += signer.footer()
    return bytes(sealed)


def seal_one_frame(
    template: HeaderTemplate,
    message_id: bytes,
    content_key: bytes,
    commitment: bytes,
    plaintext: Buffer,
    message: memoryview,
) -> bytes:
    """The whole message of a plaintext that is shorter than a frame, into ``message``; returns its header."""
    cipher = FrameCipher(content_key, message_id)
    header = template.seal(message_id, commitment, cipher.aead)
    start = len(header)
    message[:start] = header
    cipher.seal_final(plaintext, 0, message[start:])
    return header


def seal_frames(
    cipher: FrameCipher, geometry: Geometry, start: int, stop: int, plaintext: memoryview, frames: memoryview
) -> int:
    """Seal frames ``start`` to ``stop`` (excluded), whose plaintext this is; returns the bytes written."""
    regular = min(stop, geometry.regular_frames) - start
    split = regular * geometry.frame_length
    length = cipher.seal_regular(plaintext[:split], start, geometry.frame_length, frames) if regular else 0
    if stop > geometry.regular_frames:
        length += cipher.seal_final(plaintext[split:], geometry.regular_frames, frames[length:])
    return length


class MessageWriter:
    """Seals a plaintext of unknown length as it comes; ``emit`` gets the message's bytes in order.

    One thread at a time: two would seal different plaintexts under one IV.

    What ``emit`` is given is a reused buffer: it must be done with it when it returns.
    """

    def __init__(self, message: OutgoingMessage, emit: Callable[[memoryview], None]) -> None:
        frame_length = message.frame_length
        self._frame_length = frame_length
        self._batch = max(1, BATCH_LENGTH // frame_length) * frame_length
        self._cipher = message.cipher
        self._signer = (
            Signer(message.materials.suite, message.signing_key) if message.signing_key is not None else None
        )
        self._emit_to = emit
        self._frames_sealed = 0
        self._held = bytearray()  # less than a batch, until a frame is known to be full or the last
        self._sealed = memoryview(bytearray(0))
        self.plaintext_length = 0
        self.message_length = 0
        self._emit(memoryview(message.header))

    def write(self, data: Buffer) -> None:
        """Take some plaintext; whole frames leave at once when there are enough of them."""
        view = memoryview(data).cast("B")
        self.plaintext_length += len(view)
        if self._held:
            room = self._batch - len(self._held)
            self._held += view[:room]
            view = view[room:]
            if len(self._held) < self._batch:
                return
            with memoryview(self._held) as held:
                self._seal(held)
            self._held.clear()
        whole = len(view) - len(view) % self._batch
        for start in range(0, whole, self._batch):
            self._seal(view[start : start + self._batch])
        self._held += view[whole:]

    def finish(self) -> None:
        """Seal what is left and the final frame, and sign."""
        whole = len(self._held) - len(self._held) % self._frame_length
        with memoryview(self._held) as held:
            if whole:
                self._seal(held[:whole])
            rest = held[whole:]
            frame = self._room(FINAL_OVERHEAD + len(rest))
            length = self._cipher.seal_final(rest, self._frames_sealed, frame)
            self._emit(frame[:length])
        if self._signer is not None:
            self._emit_to(memoryview(footer := self._signer.footer()))
            self.message_length += len(footer)

    def _seal(self, plaintext: memoryview) -> None:
        frames = len(plaintext) // self._frame_length
        if self._frames_sealed + frames >= 2**32 - 1:
            raise LimitExceededError("the message would exceed 2^32 - 1 frames; take longer frames")
        sealed = self._room(frames * (self._frame_length + REGULAR_OVERHEAD))
        length = self._cipher.seal_regular(plaintext, self._frames_sealed, self._frame_length, sealed)
        self._frames_sealed += frames
        self._emit(sealed[:length])

    def _room(self, length: int) -> memoryview:
        if len(self._sealed) < length:
            self._sealed = memoryview(bytearray(length))
        return self._sealed

    def _emit(self, data: memoryview) -> None:
        if self._signer is not None:
            self._signer.update(data)
        self._emit_to(data)
        self.message_length += len(data)


# ---------------------------------------------------------------------------------------------
# Reading


class ReadingRules(NamedTuple):
    """What a caller demands of a message before it is read.

    ``context``: pairs that must stand in the message's encryption context.
    ``authenticated_context``: pairs that the writer bound to the message without storing them.
    """

    commitment_policy: CommitmentPolicy = CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
    max_encrypted_data_keys: int | None = DEFAULT_MAX_ENCRYPTED_DATA_KEYS
    context: Mapping[str, str] = MappingProxyType({})
    authenticated_context: Mapping[str, str] = MappingProxyType({})
    require_signed: bool = False

    def check(self, header: Header) -> None:
        """Refuse a message by what its header says, before any key is asked for."""
        self.commitment_policy.check_reading(header.suite)
        if self.require_signed and not header.suite.signed:
            raise IntegrityError("the message is not signed and a signature is required")
        for name, value in self.context.items():
            if header.context.get(name) != value:
                raise ContextMismatchError(
                    f"the message's encryption context does not hold the pair {name}={value}; "
                    "`streamcrypt inspect` shows what it holds"
                )
        for name, value in self.authenticated_context.items():
            if header.context.get(name, value) != value:
                raise ContextMismatchError(
                    f"the message's encryption context holds another value of {name} than the one supplied"
                )


class UnlockedMessage(NamedTuple):
    """A message whose header has been authenticated, and the key that opens its frames."""

    header: Header
    content_key: bytes
    cipher: FrameCipher
    verification_key: ec.EllipticCurvePublicKey | None

    def __repr__(self) -> str:
        return f"<UnlockedMessage {self.header.message_id.hex()}>"

    @classmethod
    def of(
        cls, header: Header, content_key: bytes, verification_key: ec.EllipticCurvePublicKey | None
    ) -> UnlockedMessage:
        return cls(header, content_key, FrameCipher(content_key, header.message_id), verification_key)


def unlock(header: Header, materials: Materials, rules: ReadingRules) -> UnlockedMessage:
    """Check the rules, unwrap the data key, compare the commitment, authenticate the header."""
    rules.check(header)
    context, unstored = _contexts(header, rules)
    unwrapped = materials.for_decryption(header.suite, context, header.encrypted_data_keys)
    # No variable of its own for the content key: one is shown with a traceback by many tools.
    message = UnlockedMessage.of(
        header, derive_for_reading(header, unwrapped.data_key), unwrapped.verification_key
    )
    authenticate_header(header, message.cipher.aead, unstored)
    return message


def keys_alike(
    known: Header, materials: Materials, rules: ReadingRules, message_ids: list[bytes]
) -> tuple[HeaderTemplate, list[DerivedKeys]]:
    """What the headers and keys of messages are that are like one that was unlocked under these rules.

    Of as many of these as may share a data key, from the first on.  It is for whoever reads them to see that
    each begins with that very header, commitment included, and that its tag holds.
    """
    context, unstored = _contexts(known, rules)
    unwrapped, count = materials.for_decryption_of_several(
        known.suite, context, known.encrypted_data_keys, len(message_ids)
    )
    return HeaderTemplate.of(known, unstored), [
        derive_keys(known.suite, unwrapped.data_key, message_id) for message_id in message_ids[:count]
    ]


def _contexts(header: Header, rules: ReadingRules) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The whole encryption context of a message, and the pairs of it that are not stored."""
    if not rules.authenticated_context:
        return header.context, {}
    unstored = {
        name: value for name, value in rules.authenticated_context.items() if name not in header.context
    }
    return {**header.context, **unstored}, unstored


def open_whole(cipher: FrameCipher, geometry: Geometry, message: memoryview, plaintext: memoryview) -> None:
    """Open all frames of an unsigned message; nothing of a frame that does not authenticate stays in ``plaintext``."""
    frame_length, frames = geometry.frame_length, geometry.regular_frames
    end, split = geometry.frame_offset(frames), frames * frame_length
    cipher.open_final(
        message[end:], frames, frame_length, plaintext[split:]
    )  # first of all: it proves the length
    if frames:
        cipher.open_regular(message[geometry.header_length : end], 0, frame_length, plaintext[:split])


def read_header(
    read: Callable[[int], Buffer], *, max_encrypted_data_keys: int | None
) -> tuple[Header, Buffer]:
    """The header at the start of what ``read(n)`` gives, and all the bytes that were read for it."""
    buffer: Buffer = read(_FIRST_READ)
    while True:
        try:
            header, _ = parse_header(buffer, max_encrypted_data_keys=max_encrypted_data_keys)
        except HeaderCutShortError as error:
            # At least as much again as there is: a header that comes by drops is parsed a few times,
            # not once a drop.
            enough = max(error.needed, 2 * len(buffer), _FIRST_READ)
            grown = bytearray(buffer)
            while len(grown) < enough and (more := read(enough - len(grown))):
                grown += more
            if len(grown) == len(buffer):
                if not buffer:
                    raise FormatError("the input is empty, not a message", recognised=False) from None
                raise
            buffer = grown
        else:
            return header, buffer


def source_header(
    source: Source, *, max_encrypted_data_keys: int | None, known: Header | None = None
) -> Header:
    """The header of a message that can be read at offsets; nothing of it is authenticated.

    ``known``: one that was read so, which this one probably resembles.
    """
    if known is not None:
        alike = parse_alike(known, read_bytes(source, 0, known.length))
        if alike is not None:
            return alike
    position = 0

    def read(length: int) -> Buffer:
        nonlocal position
        data = read_bytes(source, position, min(length, source.size - position))
        position += len(data)
        return data

    return read_header(read, max_encrypted_data_keys=max_encrypted_data_keys)[0]


def source_geometry(source: Source, header: Header) -> Geometry:
    """Where the frames of a framed message lie; unauthenticated until its final frame is opened."""
    return Geometry.of_message(header, source.size, lambda offset, length: read_bytes(source, offset, length))


def read_bytes(source: Source, offset: int, length: int) -> bytearray:
    """Up to ``length`` bytes from ``offset`` on, fewer at the end."""
    data = bytearray(max(0, min(length, source.size - offset)))
    with memoryview(data) as view:
        count = source.read_at(offset, view)
    del data[count:]
    return data


class FrameReader:
    """Any range of the plaintext of one framed message that can be read at offsets.

    ``open_final`` must come first: it proves the length.  One thread at a time; ``copy`` gives
    another reader of the same message to another thread.
    """

    def __init__(
        self,
        source: Source,
        cipher: FrameCipher,
        geometry: Geometry,
        *,
        scratch: memoryview | None = None,
        name: str = "",
    ) -> None:
        """``scratch``: memory for sealed frames, to be reused by the caller for one reader after another.

        ``name``: what errors call the message.
        """
        self.geometry = geometry
        self._name = name
        self._source = source
        self._cipher = cipher
        self._stride = geometry.frame_length + REGULAR_OVERHEAD
        self._batch = max(1, BATCH_LENGTH // self._stride)
        self._frames = memoryview(bytearray()) if scratch is None else scratch
        # A source whose bytes are in memory already shows them there.
        self._view_at = getattr(source, "view_at", None)
        # The last frame that was opened for only a part of it: the next read often wants the rest.
        self._kept = memoryview(bytearray())
        self._kept_index = -1
        self._kept_length = 0

    def copy(self, *, scratch: memoryview | None = None) -> FrameReader:
        return FrameReader(self._source, self._cipher, self.geometry, scratch=scratch, name=self._name)

    def give_up_scratch(self) -> memoryview:
        """The memory for sealed frames, for the next reader; this one takes other memory if it goes on."""
        scratch, self._frames = self._frames, memoryview(b"")
        return scratch

    def open_final(self) -> None:
        """Open the final frame: its tag binds its number and length, so the message is whole."""
        self._open_into_kept(self.geometry.regular_frames)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the plaintext from ``start`` on, which must lie within the message.

        Whole frames are opened straight into ``view``: give it memory that nobody else sees until
        this returns.  When a frame does not authenticate, nothing of it stays in ``view``.
        """
        assert 0 <= start <= start + len(view) <= self.geometry.plaintext_length
        try:
            self._read_into(start, view)
        except IntegrityError as error:
            raise located(error, self._name) from error.__cause__

    def _read_into(self, start: int, view: memoryview) -> None:
        geometry, frame_length = self.geometry, self.geometry.frame_length
        position, end = start, start + len(view)
        while position < end:
            index = min(position // frame_length, geometry.regular_frames)
            within = position - index * frame_length
            whole = min((end - position) // frame_length, geometry.regular_frames - index)
            if within == 0 and whole > 0 and index != self._kept_index:
                count = min(whole, self._batch)
                self._open_regular(
                    index, count, view[position - start : position - start + count * frame_length]
                )
                position += count * frame_length
            else:
                if index != self._kept_index:
                    self._open_into_kept(index)
                length = min(end - position, self._kept_length - within)
                view[position - start : position - start + length] = self._kept[within : within + length]
                position += length

    def _open_regular(self, index: int, count: int, plaintext: memoryview) -> None:
        length = count * self._stride
        frames = self._read(self.geometry.frame_offset(index), length)
        self._cipher.open_regular(frames, index, self.geometry.frame_length, plaintext)

    def _open_into_kept(self, index: int) -> None:
        geometry = self.geometry
        final = index == geometry.regular_frames
        length = geometry.final_length if final else geometry.frame_length
        if len(self._kept) < length:
            self._kept = memoryview(bytearray(length))
        self._kept_index = -1  # until the frame has been authenticated
        frame = self._read(
            geometry.frame_offset(index), length + (FINAL_OVERHEAD if final else REGULAR_OVERHEAD)
        )
        if final:
            self._cipher.open_final(frame, index, geometry.frame_length, self._kept)
        else:
            self._cipher.open_regular(frame, index, geometry.frame_length, self._kept[:length])
        self._kept_index, self._kept_length = index, length

    def _read(self, offset: int, length: int) -> memoryview:
        if len(self._frames) < length:
            self._frames = memoryview(bytearray(length))
        frames = self._frames[:length]
        if self._view_at is not None:
            frames = self._view_at(offset, frames)
            count = len(frames)
        else:
            count = self._source.read_at(offset, frames)
        if count < length:
            raise IntegrityError("the message ends before its last frame: it was truncated")
        return frames


class SequentialReader:
    """The plaintext of a signed or unframed message, in order, with its signature checked at the end.

    ``chunks`` gives memory that is reused for the next chunk.  What it gave of a signed message is
    authenticated by the data key as it comes, but signed only once the iteration has ended: the
    final frame is given out after the signature was verified.
    """

    def __init__(self, source: Source, message: UnlockedMessage) -> None:
        self._source = source
        self._message = message

    def chunks(self) -> Iterator[memoryview]:
        position = 0

        def read_into(view: memoryview) -> int:
            nonlocal position
            count = self._source.read_at(position, view)
            position += count
            return count

        header_bytes = self._message.header.serialize()
        start = read_bytes(self._source, 0, len(header_bytes))
        if start != header_bytes:
            raise IntegrityError("the header changed while the message was read")
        position = len(header_bytes)
        return _open_body(self._message, header_bytes, _Inbox(b"", read_into))


def open_stream(
    readinto: Callable[[memoryview], int], materials: Materials, rules: ReadingRules
) -> Iterator[memoryview]:
    """The plaintext of a message that arrives in order; ``readinto`` gives 0 at its end.

    Each chunk is authenticated; the last is given out only when the message has proved to be whole
    and, if it is signed, its signature holds.  A chunk's memory is reused for the next one.
    """

    def read(length: int) -> bytes:
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            return bytes(view[: readinto(view)])

    header, buffered = read_header(read, max_encrypted_data_keys=rules.max_encrypted_data_keys)
    message = unlock(header, materials, rules)
    length = header.length
    return _open_body(message, bytes(buffered[:length]), _Inbox(bytes(buffered[length:]), readinto))


def open_messages(
    readinto: Callable[[memoryview], int], materials: Materials, rules: ReadingRules
) -> Iterator[tuple[Header, Iterator[memoryview]]]:
    """Messages that arrive one after the other, until ``readinto`` gives 0: each header, and its plaintext.

    As ``open_stream`` for each of them.  What the caller leaves of one is authenticated and passed over
    before the next is given out.  That none is missing at the end is not proved: a manifest does that.
    """
    inbox = _Inbox(b"", readinto)
    while len(inbox.peek(1)):
        header, length = _next_header(inbox, rules.max_encrypted_data_keys)
        header_bytes = bytes(inbox.peek(length))
        inbox.drop(length)
        chunks = _open_body(unlock(header, materials, rules), header_bytes, inbox, alone=False)
        yield header, chunks
        for _ in chunks:
            pass


def _next_header(inbox: _Inbox, max_encrypted_data_keys: int | None) -> tuple[Header, int]:
    """The header that comes next, still in the inbox, and its length."""
    wanted = _FIRST_READ
    while True:
        buffer = inbox.peek(wanted)
        try:
            return parse_header(buffer, max_encrypted_data_keys=max_encrypted_data_keys)
        except HeaderCutShortError as error:
            if len(buffer) < wanted:
                raise
            wanted = max(error.needed, 2 * wanted)


def _open_body(
    message: UnlockedMessage, header_bytes: bytes, inbox: _Inbox, *, alone: bool = True
) -> Iterator[memoryview]:
    """Open frames as they come into the inbox; ``alone``: nothing may follow the message."""
    header, cipher = message.header, message.cipher
    verifier = None
    if message.verification_key is not None:
        verifier = Verifier(header.suite, message.verification_key)
        verifier.update(header_bytes)
    if not header.framed:
        yield _open_unframed_body(cipher, inbox, verifier, alone)
        return
    frame_length = header.frame_length
    stride = frame_length + REGULAR_OVERHEAD
    batch = max(1, BATCH_LENGTH // stride) * stride
    plaintext = memoryview(b"")
    index = 0
    while True:
        frames = inbox.peek(batch)
        regular = 0
        while regular + stride <= len(frames) and bytes(frames[regular : regular + 4]) != FINAL_MARK:
            regular += stride
        if regular:
            room = regular // stride * frame_length
            if len(plaintext) < room:
                plaintext = memoryview(bytearray(room))
            length = cipher.open_regular(frames[:regular], index, frame_length, plaintext)
            if verifier is not None:
                verifier.update(frames[:regular])
            inbox.drop(regular)
            index += regular // stride
            yield plaintext[:length]
        else:
            yield _open_final_frame(cipher, inbox, verifier, index, frame_length, alone)
            return


def _open_final_frame(
    cipher: FrameCipher, inbox: _Inbox, verifier: Verifier | None, index: int, frame_length: int, alone: bool
) -> memoryview:
    head = inbox.peek(24)
    if bytes(head[:4]) != FINAL_MARK or len(head) < 24:
        raise IntegrityError("the message ends without its final frame: it was truncated")
    length = int.from_bytes(head[20:24], "big")
    if length > frame_length:
        raise IntegrityError("the final frame is longer than the message's frames")
    rest = inbox.peek(FINAL_OVERHEAD + length + MAX_FOOTER_LENGTH + 1)
    frame = rest[: FINAL_OVERHEAD + length]
    plaintext = memoryview(bytearray(min(length, len(frame))))
    cipher.open_final(frame, index, frame_length, plaintext)
    inbox.drop(_check_end(rest, len(frame), frame, verifier, alone))
    return plaintext


def _open_unframed_body(
    cipher: FrameCipher, inbox: _Inbox, verifier: Verifier | None, alone: bool
) -> memoryview:
    head = inbox.peek(UNFRAMED_PREFIX)
    if len(head) < UNFRAMED_PREFIX:
        raise IntegrityError("the body is cut short: the message is truncated")
    length = unframed_length(head)
    if length > MAX_UNFRAMED_IN_MEMORY:
        raise LimitExceededError(
            f"unframed content of {length} bytes has to be held in memory to be verified; "
            f"the limit is {MAX_UNFRAMED_IN_MEMORY}"
        )
    rest = inbox.peek(UNFRAMED_OVERHEAD + length + MAX_FOOTER_LENGTH + 1)
    body = rest[: UNFRAMED_OVERHEAD + length]
    plaintext = cipher.open_unframed(body)
    inbox.drop(_check_end(rest, len(body), body, verifier, alone))
    return memoryview(plaintext)


def _check_end(
    rest: memoryview, body_end: int, body: memoryview, verifier: Verifier | None, alone: bool
) -> int:
    """Where in ``rest`` the message ends: after the footer of a signed one; ``alone``: nothing follows."""
    if verifier is not None:
        end = len(rest) if alone else body_end + parse_footer(rest[body_end:])[1]
        verifier.update(body)
        verifier.verify(rest[body_end:end])
        return end
    if alone and len(rest) > body_end:
        raise IntegrityError("bytes follow the message")
    return body_end


class _Inbox:
    """Bytes that arrive in order, of which some are looked at before they are taken.

    It never makes room for bytes that have not come: a length that a message claims costs nothing.
    """

    _STEP: Final = 2**20

    def __init__(self, buffered: bytes, readinto: Callable[[memoryview], int]) -> None:
        self._buffer = bytearray(buffered)
        self._length = len(buffered)
        self._start = 0
        self._readinto = readinto
        self._ended = False

    def peek(self, length: int) -> memoryview:
        """The next ``length`` bytes, fewer only where the input ends; valid until the next call."""
        if self._start and self._length - self._start < length:
            rest = self._length - self._start
            self._buffer[:rest] = self._buffer[self._start : self._length]
            self._start, self._length = 0, rest
        while self._length - self._start < length and not self._ended:
            missing = self._start + length - self._length
            room = min(missing, max(self._STEP, self._length))
            if len(self._buffer) < self._length + room:
                # A new buffer, because views of the old one may be alive.
                self._buffer = self._buffer[: self._length] + bytes(room)
            with memoryview(self._buffer) as view:
                count = self._readinto(view[self._length : self._length + room])
            self._ended = count == 0
            self._length += count
        return memoryview(self._buffer)[self._start : min(self._start + length, self._length)]

    def drop(self, length: int) -> None:
        self._start += length


def open_message(blob: Buffer, materials: Materials, rules: ReadingRules) -> bytes:
    """The plaintext of a whole message in memory; IntegrityError unless all of it authenticates."""
    header, header_length = parse_header(blob, max_encrypted_data_keys=rules.max_encrypted_data_keys)
    message = unlock(header, materials, rules)
    view = memoryview(blob)
    if not header.framed or header.suite.signed:
        position = header_length

        def read_into(target: memoryview) -> int:
            nonlocal position
            data = view[position : position + len(target)]
            target[: len(data)] = data
            position += len(data)
            return len(data)

        return b"".join(
            bytes(chunk) for chunk in _open_body(message, bytes(view[:header_length]), _Inbox(b"", read_into))
        )
    geometry = Geometry.of_message(header, len(blob))
    plaintext = bytearray(geometry.plaintext_length)
    with memoryview(plaintext) as target:
        open_whole(message.cipher, geometry, view, target)
    return bytes(plaintext)


# ---------------------------------------------------------------------------------------------
# File objects


class DecryptingFile(io.BufferedIOBase):
    """The plaintext of one message as a read-only file that seeks; what ``sc.open`` returns.

    A read opens only the frames that it covers and gives out only what has been authenticated.
    With a signed message that has been read at random, the signature has not been checked:
    ``verify_signature`` does it in one pass over all bytes.

    Attributes: ``header`` (suite, message id, encryption context …) and ``size`` in bytes of plaintext.
    """

    def __init__(
        self,
        source: Source,
        materials: Materials,
        rules: ReadingRules,
        *,
        name: str = "",
        scratch: memoryview | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self._source = source
        self._lock = threading.Lock()
        self._position = 0
        self._reader: FrameReader | None = None
        try:
            self.header = source_header(source, max_encrypted_data_keys=rules.max_encrypted_data_keys)
            self._message = unlock(self.header, materials, rules)
            self._unframed = b""
            if self.header.framed:
                self._reader = FrameReader(
                    source,
                    self._message.cipher,
                    source_geometry(source, self.header),
                    scratch=scratch,
                    name=name,
                )
                self._reader.open_final()
                self.size = self._reader.geometry.plaintext_length
            else:
                chunks = SequentialReader(source, self._message).chunks()
                self._unframed = b"".join(bytes(chunk) for chunk in chunks)
                self.size = len(self._unframed)
        except BaseException as error:
            source.close()
            self._source_closed = True
            if isinstance(error, IntegrityError | KeyAccessError | LimitExceededError):
                raise located(error, name) from error.__cause__
            raise

    _source_closed = False

    # -- what a file object needs

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._check_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}.get(whence)
        if base is None:
            raise ValueError(f"invalid whence {whence}")
        offset = operator.index(offset)  # numpy's integers would overflow in what is computed from it
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        with self._lock:
            self._check_open()
            length = self._available(size)
            data = filled(length, lambda view: self._fill(self._position, view))
            self._position += length
            return data

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size)

    def peek(self, size: int = 0, /) -> bytes:
        """Some of the plaintext that comes next, without taking it; ``readline`` uses this."""
        return self.read_at(self._position, max(size, io.DEFAULT_BUFFER_SIZE))

    def readinto(self, buffer: Any, /) -> int:
        """Fill a caller's buffer.  It never holds a byte that has not been authenticated, not even for a moment."""
        view = octets_of(buffer)
        with self._lock:
            self._check_open()
            length = self._available(len(view))
            step = BATCH_LENGTH
            for start in range(0, length, step):
                part = view[start : min(start + step, length)]
                # Frames are opened in memory of ours and copied: `decrypt_into` writes before it checks.
                part[:] = self._private(self._position + start, len(part))
            self._position += length
            return length

    def readinto1(self, buffer: Any, /) -> int:
        return self.readinto(buffer)

    def read_at(self, offset: int, length: int) -> bytes:
        """The plaintext from ``offset`` on, up to ``length`` bytes; the file's position stays."""
        with self._lock:
            self._check_open()
            offset, length = operator.index(offset), operator.index(length)
            if offset < 0:
                raise ValueError("negative offset")
            length = max(0, min(length, self.size - offset))
            return filled(length, lambda view: self._fill(offset, view))

    def fill(self, offset: int, view: memoryview) -> None:
        """Open the plaintext from ``offset`` on straight into memory that only the caller sees until this returns."""
        with self._lock:
            self._check_open()
            self._fill(offset, view)

    def frame_reader(self, *, scratch: memoryview | None = None) -> FrameReader | None:
        """A reader of its own for one more thread; None when the content is unframed."""
        return self._reader.copy(scratch=scratch) if self._reader is not None else None

    def verify_signature(self) -> None:
        """Read every byte and check the signature; IntegrityError when it fails or there is none."""
        if self._message.verification_key is None:
            raise IntegrityError("the message is not signed")
        with naming(self.name):
            for _ in SequentialReader(self._source, self._message).chunks():
                pass

    def close(self) -> None:
        if not self.closed and not self._source_closed:
            self._source_closed = True
            self._source.close()
        super().close()

    def __repr__(self) -> str:
        return f"<DecryptingFile {self.name!r}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an open DecryptingFile holds keys and is not pickled; open the message where it is used"
        )

    # -- within

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _available(self, size: int | None) -> int:
        left = max(0, self.size - self._position)
        size = -1 if size is None else operator.index(size)
        return left if size < 0 else min(size, left)

    def _fill(self, offset: int, view: memoryview) -> None:
        if not len(view):
            return  # also beyond the end, where a file has nothing to give
        if self._reader is not None:
            self._reader.read_into(offset, view)
        else:
            view[:] = self._unframed[offset : offset + len(view)]

    _scratch = memoryview(b"")

    def _private(self, offset: int, length: int) -> memoryview:
        if len(self._scratch) < length:
            self._scratch = memoryview(bytearray(length))
        part = self._scratch[:length]
        self._fill(offset, part)
        return part


BEFORE_FORK: Final = "this file was begun before the fork and is the parent's; open one of this process"


class EncryptingFile(io.BufferedIOBase):
    """A write-only file that becomes one message; what ``sc.open(…, "wb")`` returns.

    The message appears under its name only when the file is closed cleanly: a ``with`` block that
    raises, ``discard``, or an object that is forgotten leaves nothing behind.

    Two writes at once would seal two plaintexts as one frame, under one key and one IV.  Threads therefore
    wait for each other, a write within a write (a signal handler's) is an error, and so is one in a forked
    child, which leaves the message to its parent.
    """

    _target: Target | None = None

    def __init__(
        self,
        target: Target,
        message: OutgoingMessage,
        *,
        overwrite: bool,
        durable: bool,
        name: str = "",
        sync_name: Callable[[], None] | None = None,
    ) -> None:
        """``sync_name`` makes the message's name durable, where the caller does not do that itself."""
        super().__init__()
        self.name = name
        self._overwrite = overwrite
        self._durable = durable
        self._sync_name = sync_name
        self._offset = 0
        self._lock = threading.RLock()
        self._writing = False
        self._process = os.getpid()
        self._target = target
        try:
            self._writer = MessageWriter(message, self._append)
        except BaseException:
            self.discard()
            raise

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._writer.plaintext_length

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._process != os.getpid():
            raise ValueError(BEFORE_FORK)
        view = octets_of(data)
        with self._lock:
            self._check_alone()
            if self._target is None:
                raise ValueError("I/O operation on closed file")
            self._writing = True
            try:
                self._writer.write(view)
            except BaseException:
                self.discard()  # what is missing now can never be made good: no later close() may publish it
                raise
            finally:
                self._writing = False
        return len(view)

    def close(self) -> None:
        if self._process != os.getpid():
            self.discard()
            return
        with self._lock:
            if self._target is None:
                super().close()
                return
            self._check_alone()
            self._writing = True
            try:
                self._writer.finish()
                if self._durable:
                    self._target.flush()
                self._target.publish(overwrite=self._overwrite)
                if self._durable and self._sync_name is not None:
                    self._sync_name()
            finally:
                self._writing = False
                self.discard()

    def discard(self) -> None:
        """Close without making the message appear."""
        if self._target is None:
            pass
        elif self._process != os.getpid():
            self._target = None  # its temporary file is the parent's
        else:
            with self._lock:
                target, self._target = self._target, None
                if target is not None:
                    target.discard()
        super().close()

    def _check_alone(self) -> None:
        if self._writing:
            raise RuntimeError(f"{self!r}: a write or close within another")

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        self.discard()  # not close(): a file that was forgotten is not whole

    def __repr__(self) -> str:
        return f"<EncryptingFile {self.name!r}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("an open EncryptingFile is not pickled")

    def _append(self, data: memoryview) -> None:
        assert self._target is not None
        self._target.write_at(self._offset, data)
        self._offset += len(data)


__all__ = [
    "DecryptingFile",
    "EncryptingFile",
    "FrameReader",
    "MessageWriter",
    "OutgoingMessage",
    "ReadingRules",
    "SequentialReader",
    "UnlockedMessage",
    "header_template",
    "located",
    "naming",
    "octets_of",
    "open_message",
    "open_stream",
    "seal_frames",
    "seal_message",
    "source_geometry",
    "source_header",
    "unlock",
]
