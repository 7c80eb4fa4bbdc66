"""DataKeyCache: one data key for many messages, within limits.

    encryption entry    ends by age, by its messages, by its bytes, or for want of room
    decryption entry    ends by age, or for want of room

A use is counted first and refused if a limit is then exceeded: a limit of 2 messages gives exactly
2 per data key, a limit of 20 bytes two messages of 10.  Entries are made by one thread each while
the others wait (single flight), and a thread that waits has its use counted already; so n messages
take exactly ceil(n / limit) calls, whatever the number of threads.

What must never happen: a data key in use beyond its limits, or in two processes.  A forked child
therefore begins with an empty cache.

Source: AWS Encryption SDK specification, framework/caching-cmm.md.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Generic, NoReturn, TypeVar, cast

from streamcrypt.errors import StreamcryptError
from streamcrypt.units import parse_duration, parse_size

MAX_MESSAGES: Final = 2**32
MAX_BYTES: Final = 2**63 - 1

_CONTEXTS_BEFORE_ADVICE: Final = 8

M = TypeVar("M")


def elapsed_clock() -> float:
    """Seconds that have passed, the time in which the machine slept included (unlike time.monotonic)."""
    return time.clock_gettime(_CLOCK)


_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class _Entry(Generic[M]):
    """Materials, or the wait for them.  All fields but ``ready`` are guarded by the cache's lock."""

    __slots__ = ("bytes", "created", "error", "materials", "messages", "ready")

    def __init__(self, plaintext_length: int) -> None:
        self.messages = 1
        self.bytes = plaintext_length
        self.created = 0.0
        self.materials: M | None = None
        self.error: BaseException | None = None
        self.ready = threading.Event()


class DataKeyCache:
    """Data keys for reuse; pass one as ``cache=`` to any call, and to several.

    ``capacity`` entries, the least recently used leaves first; ``max_age`` in seconds or as ``"5m"``,
    for every entry; ``max_messages`` and ``max_bytes`` (of plaintext, also as ``"1GiB"``) for each data
    key that encrypts.
    ``clock`` counts seconds.

    An entry serves one keyring, one algorithm suite and one encryption context, byte for byte: a
    file name in the context gives every file its own data key.  Safe in many threads.
    """

    def __init__(
        self,
        capacity: int = 1000,
        max_age: float | str = 300.0,
        max_messages: int = 100_000,
        max_bytes: int | str = 2**40,
        clock: Callable[[], float] = elapsed_clock,
    ) -> None:
        max_age, max_bytes = parse_duration(max_age), parse_size(max_bytes)
        if capacity < 1:
            raise ValueError(f"capacity {capacity}: it is at least 1 entry")
        if not max_age > 0:
            raise ValueError(f"max_age {max_age}: it is more than 0 seconds")
        if not 1 <= max_messages <= MAX_MESSAGES:
            raise ValueError(f"max_messages {max_messages}: it is from 1 to 2^32")
        if not 0 <= max_bytes <= MAX_BYTES:
            raise ValueError(f"max_bytes {max_bytes}: it is from 0 to 2^63 - 1")
        self._capacity = capacity
        self._max_age = max_age
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._clock = clock
        self._reset()
        _caches.add(self)

    def __repr__(self) -> str:
        return (
            f"DataKeyCache(capacity={self._capacity}, max_age={self._max_age}, "
            f"max_messages={self._max_messages}, max_bytes={self._max_bytes})"
        )

    @property
    def capacity(self) -> int:
        """How many entries it holds."""
        return self._capacity

    @property
    def max_age(self) -> float:
        """Seconds for which an entry serves."""
        return self._max_age

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("DataKeyCache holds keys; it is neither pickled nor copied")

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry[Any]] = OrderedDict()
        self._hits = 0
        self._misses = 0
        self._evictions = {"age": 0, "messages": 0, "bytes": 0, "capacity": 0}
        self._next_sweep = 0.0
        self._unknown_lengths = 0
        self._too_large = 0
        self._encryption_keys = 0
        self._encryption_hits = 0
        self._first_contexts = 0

    def encryption(self, key: Hashable, plaintext_length: int | None, make: Callable[[], M]) -> M:
        """Materials for one more message under ``key``, from the cache or from ``make``."""
        if plaintext_length is None:
            with self._lock:
                self._misses += 1
                self._unknown_lengths += 1
            return make()
        if plaintext_length < 0:
            raise ValueError("plaintext_length is not negative")
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None and self._count_use(key, entry, plaintext_length):
                    self._encryption_hits += 1
                    mine = False
                else:
                    self._misses += 1
                    if plaintext_length >= self._max_bytes:
                        self._too_large += 1
                        break
                    self._encryption_keys += 1
                    self._first_contexts += entry is None
                    entry = self._add(key, plaintext_length)
                    mine = True
            if mine:
                return cast(M, self._fill(key, entry, make))
            if entry.materials is not None or self._wait(entry):
                return cast(M, entry.materials)
        return make()

    def encryption_of_several(
        self, key: Hashable, plaintext_lengths: Sequence[int], make: Callable[[], M]
    ) -> tuple[M, int]:
        """Materials for as many of these messages, from the first on, as one entry takes; and their number."""
        materials = self.encryption(key, plaintext_lengths[0], make)
        count = 1
        with self._lock:
            entry = self._entries.get(key)
            # Another thread may have used it up meanwhile, or it had no room for an entry.
            if entry is not None and entry.materials is materials:
                for length in plaintext_lengths[1:]:
                    if entry.messages >= self._max_messages or entry.bytes + length > self._max_bytes:
                        break  # the next call counts this use, is refused, and drops the entry
                    entry.messages += 1
                    entry.bytes += length
                    count += 1
                self._hits += count - 1
                self._encryption_hits += count - 1
        return materials, count

    def decryption(self, key: Hashable, make: Callable[[], M]) -> M:
        """Materials to read a message with, from the cache or from ``make``; age is the only limit."""
        key = ("decryption", key)
        while True:
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None and self._count_use(key, entry, None):
                    mine = False
                else:
                    self._misses += 1
                    entry = self._add(key, 0)
                    mine = True
            if mine:
                return cast(M, self._fill(key, entry, make))
            if entry.materials is not None or self._wait(entry):
                return cast(M, entry.materials)

    def decryption_of_several(self, key: Hashable, make: Callable[[], M], count: int) -> M:
        """The same for so many messages."""
        materials = self.decryption(key, make)
        with self._lock:
            self._hits += count - 1
        return materials

    def stats(self) -> dict[str, Any]:
        """Uses that were served (hits), calls for a new entry (misses), and evictions by cause."""
        with self._lock:
            return {"hits": self._hits, "misses": self._misses, "evictions": dict(self._evictions)}

    def advice(self) -> tuple[str, ...]:
        """Why the cache could not help so far, each with the way out; empty when it does its work."""
        with self._lock:
            unknown, large = self._unknown_lengths, self._too_large
            keys, hits, contexts = self._encryption_keys, self._encryption_hits, self._first_contexts
        advice = []
        if contexts >= _CONTEXTS_BEFORE_ADVICE and contexts == keys and hits < contexts:
            advice.append(
                f"data keys were hardly reused: {contexts} encryption contexts for {keys + hits} messages, and each "
                "has its own data key; use one context for the dataset (the manifest binds names to messages)"
            )
        if unknown > 1:  # one takes a data key anyway
            advice.append(
                f"{unknown} messages of unknown length took a data key each: a byte limit cannot be kept for them; "
                "read from a file instead of a pipe to reuse data keys"
            )
        if large:
            advice.append(
                f"{large} messages were as large as the cache's byte limit ({self._max_bytes}) or larger and took a "
                "data key each; raise --cache-max-bytes"
            )
        if self._max_messages == 1 and keys > 1:
            advice.append("the cache may use a data key for 1 message only; raise --cache-max-messages")
        return tuple(advice)

    def clear(self) -> None:
        """Drop every entry; the counts stay."""
        with self._lock:
            self._entries.clear()

    def _count_use(self, key: Hashable, entry: _Entry[Any], plaintext_length: int | None) -> bool:
        """Count one more use of ``entry``; when a limit refuses it, drop the entry.  Needs the lock."""
        # An entry without materials is being made: it has no age yet.
        if entry.materials is not None and self._clock() - entry.created > self._max_age:
            cause = "age"
        elif plaintext_length is None:
            self._hits += 1
            self._entries.move_to_end(key)
            return True
        else:
            entry.messages += 1
            entry.bytes += plaintext_length
            if entry.messages > self._max_messages:
                cause = "messages"
            elif entry.bytes > self._max_bytes:
                cause = "bytes"
            else:
                self._hits += 1
                self._entries.move_to_end(key)
                return True
        del self._entries[key]
        self._evictions[cause] += 1
        return False

    def _add(self, key: Hashable, plaintext_length: int) -> _Entry[Any]:
        """A new entry to be filled by the calling thread.  Needs the lock."""
        self._sweep()
        entry: _Entry[Any] = _Entry(plaintext_length)
        self._entries[key] = entry
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
            self._evictions["capacity"] += 1
        return entry

    def _sweep(self) -> None:
        """Drop what has expired, so that keys nobody asks for again don't stay.  Needs the lock."""
        now = self._clock()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self._max_age / 4
        expired = [
            key
            for key, entry in self._entries.items()
            if entry.materials is not None and now - entry.created > self._max_age
        ]
        for key in expired:
            del self._entries[key]
            self._evictions["age"] += 1

    def _fill(self, key: Hashable, entry: _Entry[M], make: Callable[[], M]) -> M:
        lock = self._lock
        try:
            materials = make()
        except BaseException as error:
            with lock:
                entry.error = error
                if self._entries.get(key) is entry:
                    del self._entries[key]
            entry.ready.set()
            raise
        with lock:
            entry.created = self._clock()
            entry.materials = materials
        entry.ready.set()
        return materials

    @staticmethod
    def _wait(entry: _Entry[M]) -> bool:
        """Whether the thread that makes ``entry`` succeeded.

        Its error is raised here too if it is one of ours: so many threads make one denied call, not
        many.  After anything else (an interrupt, say) the caller tries for itself.
        """
        entry.ready.wait()
        if isinstance(entry.error, StreamcryptError):
            # A copy: an exception raised in several threads would gather all their tracebacks.
            raise copy.copy(entry.error) from entry.error
        return entry.error is None


_caches: weakref.WeakSet[DataKeyCache] = weakref.WeakSet()


def _forget_in_child() -> None:
    for cache in list(_caches):
        # The lock as well: another thread may have held it at the fork.
        cache._reset()


os.register_at_fork(after_in_child=_forget_in_child)
