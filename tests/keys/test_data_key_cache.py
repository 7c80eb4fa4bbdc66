"""The data-key cache: exact limits, by a model, by many threads, and across a fork."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import pickle
import random
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
from families.clock import Clock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from streamcrypt.errors import KeyAccessError, KeyUnavailableError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.raw import RawAesKeyring
from streamcrypt.message.suites import UNSIGNED


def maker():
    """A function that makes 0, 1, 2 …, and counts."""
    return itertools.count().__next__


# Limits, one by one


def test_a_limit_of_two_messages_gives_exactly_two():
    cache, make = DataKeyCache(max_messages=2), maker()
    assert [cache.encryption("key", 1, make) for _ in range(7)] == [0, 0, 1, 1, 2, 2, 3]
    assert cache.stats() == {
        "hits": 3,
        "misses": 4,
        "evictions": {"age": 0, "messages": 3, "bytes": 0, "capacity": 0},
    }


def test_a_limit_of_20_bytes_gives_two_messages_of_10():
    cache, make = DataKeyCache(max_bytes=20), maker()
    assert [cache.encryption("key", 10, make) for _ in range(5)] == [0, 0, 1, 1, 2]
    assert cache.stats()["evictions"]["bytes"] == 2


@pytest.mark.parametrize(
    "limits", [{"max_messages": 7}, {"max_bytes": 50}, {"max_messages": 5, "max_bytes": 37}, {}]
)
def test_several_messages_at_once_are_counted_as_one_by_one(limits):
    lengths = random.Random(7).choices(range(60), k=300)  # some longer than a limit of bytes
    one, several = DataKeyCache(**limits), DataKeyCache(**limits)
    make, make_several = maker(), maker()
    singly = [one.encryption("key", length, make) for length in lengths]
    together: list[int] = []
    while len(together) < len(lengths):
        part = lengths[len(together) : len(together) + 64]
        materials, count = several.encryption_of_several("key", part, make_several)
        assert 1 <= count <= len(part)
        together += [materials] * count
    assert together == singly
    assert several.stats() == one.stats()


def test_a_first_message_that_reaches_the_byte_limit_is_not_stored():
    cache, make = DataKeyCache(max_bytes=20), maker()
    assert [cache.encryption("key", size, make) for size in (20, 21, 19, 1, 1)] == [0, 1, 2, 2, 3]


def test_a_use_that_is_refused_drops_the_entry():
    cache, make = DataKeyCache(max_bytes=20), maker()
    assert [cache.encryption("key", size, make) for size in (10, 25, 5)] == [0, 1, 2]


def test_an_unknown_length_is_never_cached():
    cache, make = DataKeyCache(), maker()
    assert [cache.encryption("key", None, make) for _ in range(3)] == [0, 1, 2]
    assert cache.encryption("key", 1, make) == 3


def test_age_is_checked_at_use():
    uses = {
        "encryption": lambda cache, make: cache.encryption("key", 1, make),
        "decryption": lambda cache, make: cache.decryption("key", make),
    }
    for use in uses.values():
        clock = Clock()
        cache, make = DataKeyCache(max_age=10, clock=clock), maker()
        assert use(cache, make) == 0
        clock.now += 10
        assert use(cache, make) == 0
        clock.now += 0.001
        assert use(cache, make) == 1
        assert cache.stats()["evictions"]["age"] == 1


def test_age_counts_from_the_answer():
    clock = Clock()
    cache = DataKeyCache(max_age=1, clock=clock)

    def slow():
        clock.now += 5
        return "made"

    cache.encryption("key", 1, slow)
    assert cache.encryption("key", 1, lambda: "again") == "made"


def test_the_default_clock_runs_on():
    cache = DataKeyCache(max_age=1e-9)
    make = maker()
    assert cache.encryption("key", 1, make) == 0
    assert cache.encryption("key", 1, make) == 1


def test_expired_entries_do_not_stay_in_memory():
    clock = Clock()
    cache = DataKeyCache(max_age=10, clock=clock)
    for i in range(20):
        cache.encryption(i, 1, lambda: "materials")
    clock.now += 11
    cache.encryption("new", 1, lambda: "materials")
    assert len(cache._entries) == 1
    assert cache.stats()["evictions"]["age"] == 20


def test_the_least_recently_used_leaves():
    cache, make = DataKeyCache(capacity=2), maker()
    cache.encryption("a", 1, make)
    cache.encryption("b", 1, make)
    assert cache.encryption("a", 1, make) == 0
    cache.encryption("c", 1, make)
    assert cache.encryption("a", 1, make) == 0
    assert cache.encryption("b", 1, make) == 3
    assert cache.stats()["evictions"]["capacity"] == 2


def test_encryption_and_decryption_do_not_meet():
    cache, make = DataKeyCache(), maker()
    assert cache.encryption("key", 1, make) == 0
    assert cache.decryption("key", make) == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"capacity": 0},
        {"max_age": 0},
        {"max_age": -1},
        {"max_age": float("nan")},
        {"max_messages": 0},
        {"max_messages": 2**32 + 1},
        {"max_bytes": -1},
        {"max_bytes": 2**63},
    ],
)
def test_limits_out_of_bounds(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        DataKeyCache(**limits)


def test_limits_in_words():
    """As on the command line."""
    words, numbers = DataKeyCache(max_age="5m", max_bytes="1MiB"), DataKeyCache(max_age=300, max_bytes=2**20)
    assert repr(words) == repr(numbers)
    for limits in ({"max_age": "soon"}, {"max_bytes": "many"}):
        with pytest.raises(ValueError, match="is not a"):
            DataKeyCache(**limits)


def test_a_negative_length():
    with pytest.raises(ValueError, match="plaintext_length"):
        DataKeyCache().encryption("key", -1, maker())


def test_it_keeps_its_secrets():
    cache = DataKeyCache()
    cache.encryption("key", 1, lambda: b"\x5a" * 32)
    assert "ZZZ" not in repr(cache)
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="holds keys"):
            duplicate(cache)


# Advice


def test_no_advice_when_it_works():
    cache = DataKeyCache()
    for _ in range(100):
        cache.encryption("key", 1, lambda: "materials")
    assert cache.advice() == ()


def test_advice_on_a_context_for_each_file():
    cache = DataKeyCache()
    for i in range(20):
        cache.encryption(i, 1, lambda: "materials")
    (advice,) = cache.advice()
    assert "20 encryption contexts for 20 messages" in advice
    assert "one context for the dataset" in advice


def test_advice_on_unknown_lengths_and_large_messages():
    cache = DataKeyCache(max_bytes=100)
    cache.encryption("key", None, lambda: "materials")
    assert cache.advice() == ()  # one message takes a data key anyway
    cache.encryption("key", None, lambda: "materials")
    cache.encryption("key", 100, lambda: "materials")
    unknown, large = cache.advice()
    assert "2 messages of unknown length" in unknown
    assert "--cache-max-bytes" in large


def test_advice_on_a_limit_of_one_message():
    cache = DataKeyCache(max_messages=1)
    for _ in range(3):
        cache.encryption("key", 1, lambda: "materials")
    (advice,) = cache.advice()
    assert "--cache-max-messages" in advice


# A model


class Model(RuleBasedStateMachine):
    """The cache against a plain model of the specification's rules."""

    CAPACITY, MAX_AGE, MAX_MESSAGES, MAX_BYTES = 3, 10.0, 4, 100

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.cache = DataKeyCache(self.CAPACITY, self.MAX_AGE, self.MAX_MESSAGES, self.MAX_BYTES, self.clock)
        self.make = maker()
        self.made = 0
        self.entries: OrderedDict[object, dict] = OrderedDict()
        self.uses: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()
        self.born: dict[int, float] = {}

    def _expected(self, key, length) -> int:
        entry = self.entries.get(key)
        if entry is not None:
            fits = self.clock.now - entry["born"] <= self.MAX_AGE
            if fits and length is not None:
                entry["messages"] += 1
                entry["bytes"] += length
                fits = entry["messages"] <= self.MAX_MESSAGES and entry["bytes"] <= self.MAX_BYTES
            if fits:
                self.entries.move_to_end(key)
                return entry["value"]
            del self.entries[key]
        value = self.made
        self.made += 1
        if length is None or length < self.MAX_BYTES:
            self.entries[key] = {
                "value": value, "born": self.clock.now, "messages": 1, "bytes": length or 0
            }  # fmt: skip
            # Expired entries may be swept before one is pushed out for want of room; both are gone
            # for good, and an expired one is never used, so only the living count here.
            while len(self.entries) > self.CAPACITY:
                self.entries.popitem(last=False)
        return value

    @rule(key=st.integers(0, 4), length=st.integers(0, 120))
    def encrypt(self, key, length):
        value = self.cache.encryption(key, length, self.make)
        self._forget_swept()
        assert value == self._expected(("e", key), length)
        self.uses[value] += 1
        self.bytes[value] += length
        self.born.setdefault(value, self.clock.now)
        assert self.clock.now - self.born[value] <= self.MAX_AGE

    @rule(key=st.integers(0, 4))
    def decrypt(self, key):
        value = self.cache.decryption(key, self.make)
        self._forget_swept()
        assert value == self._expected(("d", key), None)
        self.born.setdefault(value, self.clock.now)
        assert self.clock.now - self.born[value] <= self.MAX_AGE

    @rule(key=st.integers(0, 4))
    def encrypt_unknown(self, key):
        assert self.cache.encryption(key, None, self.make) == self.made
        self.made += 1

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0, 10.5]))
    def wait(self, seconds):
        self.clock.now += seconds

    def _forget_swept(self) -> None:
        """The sweep may drop what has expired, which the model would keep until it is asked for."""
        stored = {("d", key[1]) if isinstance(key, tuple) else ("e", key) for key in self.cache._entries}
        for key in list(self.entries):
            if key not in stored and self.clock.now - self.entries[key]["born"] > self.MAX_AGE:
                del self.entries[key]

    @invariant()
    def limits_hold(self):
        assert len(self.cache._entries) <= self.CAPACITY
        assert all(count <= self.MAX_MESSAGES for count in self.uses.values())
        assert all(total <= self.MAX_BYTES or self.uses[value] == 1 for value, total in self.bytes.items())

    @invariant()
    def counts_add_up(self):
        assert self.cache.stats()["misses"] == self.made


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


# Threads


class SlowMaker:
    """Makes numbers; every call is held at a gate until enough threads are about, or none is left out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls = 0

    def __call__(self) -> int:
        with self.lock:
            value = self.calls
            self.calls += 1
        threading.Event().wait(0.0002)  # lets other threads run, as a call to a KMS does
        return value


@pytest.mark.parametrize(("messages", "limit"), [(64, 1000), (640, 10), (640, 7), (300, 1)])
def test_64_threads_make_exactly_as_many_calls_as_the_limit_asks(messages, limit):
    """ceil(messages / limit) calls, no data key used more often: 25 times each, 100 in all."""
    with ThreadPoolExecutor(64) as pool:
        for _ in range(25):
            cache, make = DataKeyCache(max_messages=limit), SlowMaker()
            barrier = threading.Barrier(64)

            def work(i: int, cache=cache, make=make, barrier=barrier) -> int:
                if i < 64:
                    barrier.wait()
                return cache.encryption("key", 1, make)

            uses = Counter(pool.map(work, range(messages)))
            assert make.calls == -(-messages // limit)
            assert max(uses.values()) <= limit
            assert sum(uses.values()) == messages
            assert cache.stats()["misses"] == make.calls
            assert cache.stats()["hits"] == messages - make.calls


def test_byte_limit_under_threads():
    cache, make = DataKeyCache(max_bytes=100), SlowMaker()
    with ThreadPoolExecutor(32) as pool:
        uses = Counter(pool.map(lambda _: cache.encryption("key", 10, make), range(1000)))
    assert set(uses.values()) == {10}


def test_decryption_asks_once():
    cache, make = DataKeyCache(), SlowMaker()
    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(lambda _: cache.decryption("key", make), range(640))) == {0}
    assert make.calls == 1


def test_calls_for_several_limits_run_side_by_side():
    """With a limit of one, eight threads have eight calls in flight: waiting for one another would deadlock."""
    cache, barrier = DataKeyCache(max_messages=1), threading.Barrier(8)

    def make() -> int:
        barrier.wait(20)
        return 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.encryption("key", 1, make), range(8)))


def wait_until_all_wait(cache: DataKeyCache, uses: int) -> None:
    while cache.stats()["hits"] + cache.stats()["misses"] < uses:
        threading.Event().wait(0.001)


def test_a_refusal_reaches_every_waiting_thread():
    cache, calls = DataKeyCache(), []

    def make():
        wait_until_all_wait(cache, 16)
        calls.append(1)
        raise KeyAccessError("denied", code="AccessDeniedException")

    def work(_):
        with pytest.raises(KeyAccessError, match="denied") as caught:
            cache.encryption("key", 1, make)
        return caught.value

    with ThreadPoolExecutor(16) as pool:
        failures = list(pool.map(work, range(16)))
    assert len(calls) == 1
    assert {failure.code for failure in failures} == {"AccessDeniedException"}
    assert len(set(map(id, failures))) == 16
    assert cache.encryption("key", 1, lambda: "made") == "made"


def test_a_temporary_failure_leaves_nothing_behind():
    cache = DataKeyCache()
    with pytest.raises(KeyUnavailableError):
        cache.decryption("key", lambda: (_ for _ in ()).throw(KeyUnavailableError("away")))
    assert cache.decryption("key", lambda: "made") == "made"


def test_an_interrupt_of_one_thread_is_not_shared():
    cache, turns = DataKeyCache(), itertools.count()

    def make():
        if next(turns) == 0:
            wait_until_all_wait(cache, 4)
            raise KeyboardInterrupt
        return "made"

    def work(_):
        try:
            return cache.encryption("key", 1, make)
        except KeyboardInterrupt:
            return "interrupted"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(work, range(4))) == ["interrupted", "made", "made", "made"]


def test_a_million_messages_from_64_threads():
    cache, make = DataKeyCache(max_messages=1000), SlowMaker()

    def work(_):
        return Counter(cache.encryption("key", 1, make) for _ in range(15_625))

    with ThreadPoolExecutor(64) as pool:
        uses = sum(pool.map(work, range(64)), Counter())
    assert make.calls == 1000
    assert set(uses.values()) == {1000}


# Forks


def _child(cache, keyring, queue) -> None:
    materials = Materials(keyring, cache=cache)
    made = [materials.for_encryption(UNSIGNED, {}, 1) for _ in range(50)]
    queue.put(([bytes(each.data_key) for each in made], cache.stats()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_with_an_empty_cache():
    context = multiprocessing.get_context("fork")
    cache = DataKeyCache(max_messages=100)
    keyring = RawAesKeyring("namespace", "name", os.urandom(32))
    warm = Materials(keyring, cache=cache).for_encryption(UNSIGNED, {}, 1).data_key
    queue = context.Queue()
    with cache._lock:  # as if another thread of the parent held it
        children = [context.Process(target=_child, args=(cache, keyring, queue)) for _ in range(8)]
        for child in children:
            child.start()
    answers = [queue.get(timeout=240) for _ in children]
    for child in children:
        child.join(60)
    keys = [set(data_keys) for data_keys, _ in answers]
    assert all(len(each) == 1 for each in keys)
    assert len(set.union(*keys, {warm})) == 9
    assert all(stats["misses"] == 1 for _, stats in answers)
    assert Materials(keyring, cache=cache).for_encryption(UNSIGNED, {}, 1).data_key == warm
