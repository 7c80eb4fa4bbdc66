"""What the kernel says about processes (Linux)."""

from __future__ import annotations

import os
from pathlib import Path


def child_processes(pid: int | None = None) -> list[int]:
    """The processes that ``pid`` (default: this one) started and that still run, zombies left out."""
    found = []
    for task in Path(f"/proc/{pid or os.getpid()}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        found += [int(child) for child in children if is_running(int(child))]
    return found


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def peak_memory(pid: int) -> int:
    """The most memory in bytes that a process has had resident so far; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * int((status.partition("\nVmHWM:")[2].split() or ["0"])[0])
