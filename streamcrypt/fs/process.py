"""What all filesystems of a process share: threads, and data keys to read with."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from streamcrypt.keys.cache import DataKeyCache

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


def _forget_in_child() -> None:
    global _shared_lock, _shared_pool
    _shared_lock = threading.Lock()
    _shared_pool = None  # a fork does not take the threads along


os.register_at_fork(after_in_child=_forget_in_child)
