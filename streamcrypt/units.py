"""Sizes, durations and ranges as people write them, and back."""

from __future__ import annotations

import re

_SIZE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "PIB": 2**50,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50,
}  # fmt: skip
_DURATION_UNITS = {
    "": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}

_NUMBER_AND_UNIT = r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*"


def parse_size(text: str | int) -> int:
    """Bytes from ``64KiB``, ``1MiB``, ``2GB`` or a bare number; ValueError otherwise."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(_NUMBER_AND_UNIT, text, re.ASCII)
    unit = _SIZE_UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write 64KiB, 1MiB or 2GB")
    size = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def parse_duration(text: str | float) -> float:
    """Seconds from ``30s``, ``5m``, ``250ms`` or a bare number of seconds; ValueError otherwise."""
    if isinstance(text, int | float):
        return float(text)
    match = re.fullmatch(_NUMBER_AND_UNIT, text, re.ASCII)
    unit = _DURATION_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a duration; write 30s, 5m or 250ms")
    return float(match[1]) * unit


def parse_range(text: str) -> tuple[int, int | None]:
    """``START:END`` as byte positions; an absent START is 0, an absent END is None (the end)."""
    start_text, colon, end_text = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not a range; write START:END, in bytes")
    start = parse_size(start_text) if start_text else 0
    end = parse_size(end_text) if end_text else None
    if end is not None and end < start:
        raise ValueError(f"{text!r} ends before it starts")
    return start, end


def format_size(size: float) -> str:
    """``1.5 GiB`` for people; exact below 1 KiB."""
    if size < 1024:
        return f"{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.4g} {unit}"
    return f"{size / 1024:.4g} PiB"
