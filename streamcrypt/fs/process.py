"""What all filesystems of a process share: threads, data keys to read with, and memory for sealed frames."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.streams import BATCH_LENGTH

_shared_lock = threading.Lock()
_shared_pool: ThreadPoolExecutor | None = None
_shared_data_keys: dict[float, DataKeyCache] = {}


def pool() -> ThreadPoolExecutor:
    """Threads that open frames and fetch headers.  No task of theirs waits for another."""
    global _shared_pool
    with _shared_lock:
        if _shared_pool is None:
            workers = max(16, 2 * (os.cpu_count() or 1))  # most of them wait for a store
            _shared_pool = ThreadPoolExecutor(workers, thread_name_prefix="streamcrypt-fs")
        return _shared_pool


def data_keys(max_age: float) -> DataKeyCache:
    """One cache for all filesystems of the process: fsspec makes an instance for each thread."""
    with _shared_lock:
        return _shared_data_keys.setdefault(max_age, DataKeyCache(max_age=max_age))


# Fresh memory costs as much as what is read into it: see benchmarks/README.md, "Readers".
_SCRATCH_KEPT: Final = 8
_SCRATCH_LENGTHS: Final = range(2**16, 2 * BATCH_LENGTH)
_scratch: deque[memoryview] = deque(maxlen=_SCRATCH_KEPT)


def scratch() -> memoryview:
    """Memory that a message which has been closed had its sealed frames in; empty where there is none."""
    try:
        return _scratch.pop()
    except IndexError:
        return memoryview(b"")


def keep_scratch(memory: memoryview) -> None:
    """Keep memory for sealed frames (never plaintext) that nobody reads any more, for the next message."""
    if len(memory) in _SCRATCH_LENGTHS:
        _scratch.append(memory)


def _forget_in_child() -> None:
    global _shared_lock, _shared_pool
    _shared_lock = threading.Lock()
    _shared_pool = None  # a fork does not take the threads along


os.register_at_fork(after_in_child=_forget_in_child)
