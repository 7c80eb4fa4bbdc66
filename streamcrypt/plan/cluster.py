"""A job on a Ray cluster (engine/remote.py): one driver, many nodes, a KMS that all of them ask.

    driver     its own work for every file, a hand-over for every list, one call for each data key
    workers    each asks for every data key that it meets, and then works
    KMS        one quota for all of them

``closed_form`` gives the outcome by formulas, ``simulate.simulate_cluster`` plays it list by list, and
a property test holds the two together.  Seconds, bytes and calls a second throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from streamcrypt.engine.remote import LIST_BYTES, LIST_FILES, LISTS
from streamcrypt.engine.run import SAMPLE
from streamcrypt.engine.spans import BATCH_BYTES, SPLIT_LENGTH
from streamcrypt.plan.closed import messages_by_bytes

# Of the driver for one list, and of a worker, which waits for the next one meanwhile; to connect, and to
# import what a worker needs: benchmarks/test_ray.py.
HAND_OVER: Final = 1e-3
START: Final = 2.0


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """What a cluster has to do.  ``service`` and ``driver`` are seconds for one file, of one worker and
    of the driver; ``data_keys`` above zero means reading: that many data keys in runs over the files."""

    files: int
    nodes: int
    workers: int  # of each node
    service: float
    driver: float
    lists: int
    size: float = 1.0
    variation: float = 0.0  # coefficient of variation of a list's work
    hand_over: float = HAND_OVER
    latency: float = 0.0
    quota: float = math.inf
    burst: float | None = None
    max_messages: float = math.inf
    max_age: float = math.inf
    max_bytes: float = math.inf
    data_keys: int = 0
    questions: int = 1  # a rekey opens the old data key and asks for a new one

    @property
    def tokens(self) -> float:
        """Calls that the KMS answers at once before the quota's rate applies."""
        return self.quota if self.burst is None else self.burst

    @property
    def all_workers(self) -> int:
        return self.nodes * self.workers

    @property
    def per_key(self) -> float:
        """Messages of one data key, as far as age does not end it."""
        if self.data_keys:
            return self.files / min(self.data_keys, self.files)
        return max(1.0, min(self.max_messages, messages_by_bytes(self.max_bytes, self.size, 0.0)))


@dataclass(frozen=True, slots=True)
class ClusterOutcome:
    """What a load comes to.  ``driver_seconds``, ``worker_seconds`` and ``quota_seconds`` are what each
    alone would need, ``driver_calls`` and ``worker_calls`` KMS calls."""

    seconds: float
    driver_seconds: float
    worker_seconds: float
    quota_seconds: float
    stall_seconds: float  # of a worker, waiting for data keys
    driver_calls: float
    worker_calls: float
    peak_per_second: float

    @property
    def calls(self) -> float:
        return self.driver_calls + self.worker_calls


def lists_of(files: int, total: float, cpus: int) -> int:
    """Into how many lists the engine puts a job's files."""
    size = total / max(files, 1)
    list_files, list_bytes = LIST_FILES, float(LIST_BYTES)
    if files < SAMPLE:
        list_files = max(1, min(LIST_FILES, files // (LISTS * cpus)))
        list_bytes = max(BATCH_BYTES, min(LIST_BYTES, total // (LISTS * cpus)))
    if size > SPLIT_LENGTH:
        return max(files, math.ceil(total / list_bytes))
    return max(1, math.ceil(files / max(1, min(list_files, list_bytes // max(size, 1)))))


def closed_form(load: ClusterLoad) -> ClusterOutcome:
    """The outcome by formulas."""
    workers, lists, latency = load.all_workers, load.lists, load.latency * load.questions
    work = load.service * load.files / lists  # of one list
    handed = (load.driver * load.files + load.hand_over * lists) / lists
    worked = load.service * load.files / workers
    if load.variation == 0:
        worked = math.ceil(lists / workers) * work
    elif lists > workers:
        worked += work * (1 + load.variation**2) / 2
    keys = max(1, math.ceil(load.files / load.per_key - 1e-9))
    pairs = _pairs(load, keys)
    # Where the driver is slow, whoever has become free gets the next list, and the others never one.
    active = min(workers, lists, 1 + (work * (1 + load.variation) + latency) / max(handed, 1e-9))

    seconds = max(worked, handed * lists)
    for _ in range(30):  # the keys that age ends depend on the time, and the time on the keys
        renewed = max(1.0, seconds / keys / load.max_age)
        driver_calls = min(keys * renewed, float(load.files))
        # A key goes to every worker that gets one of its lists.
        holders = min(active, (pairs + driver_calls - keys) / driver_calls)
        worker_calls = driver_calls * holders
        calls = (driver_calls + worker_calls) * load.questions
        forced = max(0.0, calls - load.tokens) / load.quota
        # Workers that ask at once are answered one after the other; those that come later are late.
        at_once = min(holders * load.questions, calls)
        late = max(0.0, at_once - load.tokens)
        each = worker_calls / workers
        stall = each * latency + late * late / (2 * load.quota * at_once) * min(each, 1.0)
        by_workers = worked + stall
        by_driver = handed * lists + driver_calls * latency
        end = work + latency
        by_quota = forced + end if forced > 0 else 0.0
        # What the slower side still has to do when the other has done all it can.
        now = max(by_workers + handed + latency, by_driver + end, by_quota)
        if abs(now - seconds) < 1e-6 * now:
            break
        seconds = (seconds + now) / 2
    fastest = workers / load.latency if load.latency > 0 else calls
    most = at_once + calls / max(now, 1.0)  # all ask for the first key, and then as they go
    return ClusterOutcome(
        now,
        by_driver,
        by_workers,
        by_quota,
        stall,
        driver_calls * load.questions,
        worker_calls * load.questions,
        min(calls, fastest, load.tokens + load.quota, most),
    )


def _pairs(load: ClusterLoad, keys: int) -> float:
    """How many lists need how many keys: every end of either is one more, unless both end together."""
    in_list, in_key = load.files / load.lists, load.per_key
    together = 0
    if in_list == int(in_list) and math.isfinite(in_key) and in_key == int(in_key):
        together = max(0, math.ceil(load.files / math.lcm(int(in_list), int(in_key))) - 1)
    return load.lists + keys - 1 - together
