"""The SHA-256 of an object, taken while it is written or read, in order, each byte once.

What is hashed is what was sealed, or what was opened; never what the storage says afterwards.

Source: FIPS 180-4.
"""

from __future__ import annotations

import hashlib

from streamcrypt.errors import IntegrityError
from streamcrypt.storage import Buffer, Source, State, Target


class HashingTarget:
    """A target that is written from its start to its end; ``sha256()`` and ``length`` tell what went in."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.length = 0

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write_at(self, offset: int, data: Buffer) -> None:
        if offset != self.length:
            raise RuntimeError("internal error: what is hashed is written in order")
        self._hash.update(data)
        self._target.write_at(offset, data)
        self.length += len(data)

    def state(self) -> State:
        return self._target.state()

    def flush(self) -> None:
        self._target.flush()

    def publish(self, *, overwrite: bool) -> None:
        self._target.publish(overwrite=overwrite)

    def discard(self) -> None:
        self._target.discard()


class HashingSource:
    """A source that is read from its start to its end."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self._position = 0
        self.size = source.size
        self.state = source.state

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def check(self, sha256: str) -> None:
        """IntegrityError unless all that was read has this digest."""
        if self.sha256() != sha256:
            raise IntegrityError(NOT_SIGNED)

    def read_at(self, offset: int, buffer: memoryview) -> int:
        if offset != self._position:
            raise RuntimeError("internal error: what is hashed is read in order")
        count = self._source.read_at(offset, buffer)
        self._hash.update(buffer[:count])
        self._position += count
        return count

    def check_unchanged(self) -> None:
        self._source.check_unchanged()

    def close(self) -> None:
        self._source.close()


NOT_SIGNED = "is not the message that was signed under this name: altered, swapped or replaced"
