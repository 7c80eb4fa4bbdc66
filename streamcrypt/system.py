"""What Python's own modules lack: functions of the C library, and names that survive a power loss.

The C library by the half of ctypes that is written in C: importing the other takes four times as long, and
every command does this first (benchmarks/README.md, "start-up").
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Final


def c_call(function: str, *arguments: int | bytes) -> int:
    """The result of a C function of ints and strings; -1 where there is no such function."""
    address = _address(function)
    if address is None:
        return -1
    import _ctypes

    result: int = _ctypes.call_function(address, arguments)
    return result


@cache
def _address(function: str) -> int | None:
    try:
        import _ctypes

        return _ctypes.dlsym(_ctypes.dlopen(None, 0), function)  # type: ignore[arg-type]  # dlopen(3) takes NULL
    except (ImportError, AttributeError, OSError):
        return None


def missing_folders(path: str) -> tuple[str, ...]:
    """Those of a folder and the ones above it that are not there; ``path`` is absolute."""
    missing: list[str] = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return tuple(missing)


def sync_name(path: str) -> None:
    """Make the name of a new folder durable in the one above it."""
    try:
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except PermissionError:  # a folder in which names may be made and not be listed
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def page_aligned(length: int) -> memoryview:
    """Memory for what is read from a file at round offsets; it begins a page, unless it is small.

    Large bytearrays begin 16 bytes into a page, and where the target of a copy lies 1 to 31 bytes
    further into its page than the source does, some processors copy at a fifth of the speed
    (benchmarks/README.md, "where memory begins").
    """
    if length < _LEAST_PAGES:
        return memoryview(bytearray(length))
    import mmap

    return memoryview(mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


_LEAST_PAGES: Final = 2**16


def prefer_huge_pages(fresh: memoryview) -> None:
    """Ask for huge pages for memory that nobody has touched: filling it then takes two thirds of the time.

    For large bytes objects (benchmarks/README.md, "Readers"); without effect where there are none.
    """
    import ctypes  # all of it: an address is too long for the other half's ints

    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if advise is None:
        return
    address = ctypes.addressof(ctypes.c_char.from_buffer(fresh))
    start = -(-address // _PAGE) * _PAGE
    length = (address + len(fresh) - start) // _PAGE * _PAGE
    if length > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)


_PAGE: Final = 4096
_MADV_HUGEPAGE: Final = 14
