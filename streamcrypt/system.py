"""Functions of the C library that Python does not offer.

By the half of ctypes that is written in C: importing the other takes four times as long, and every
command does this first (benchmarks/README.md, "start-up").
"""

from __future__ import annotations

from functools import cache


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
