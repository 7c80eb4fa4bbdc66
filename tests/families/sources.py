"""Sources that lie in memory and count what is read of them."""

from __future__ import annotations

from collections.abc import Callable


class MemorySource:
    """A Source (streamcrypt.storage) over bytes; ``reads`` lists every (offset, length) that was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []
        self.closed = False

    def read_at(self, offset: int, buffer: memoryview) -> int:
        data = self.data[offset : offset + len(buffer)]
        self.reads.append((offset, len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def dribble(data: bytes, step: int) -> Callable[[memoryview], int]:
    """A ``readinto`` that gives at most ``step`` bytes at a time, as a slow pipe does."""
    position = 0

    def readinto(view: memoryview) -> int:
        nonlocal position
        piece = data[position : position + min(step, len(view))]
        view[: len(piece)] = piece
        position += len(piece)
        return len(piece)

    return readinto
