"""A job before it is run: seconds, KMS calls, money, and which resource decides.

    Job          what is to be done, on which hosts, with which cache and KMS
    predict      Job and measured records -> Prediction
    solve        the least number of hosts or workers, the deadline, or the cache limit that will do

A host's work comes from rates fitted to records (``model.py``), its waits from the queue
(``closed.py``, and ``simulate.py`` where two bounds nearly tie), the interval from repeating the
closed form with resampled rates and with the errors that the fit made on cells it had not seen.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Final, Literal

import numpy as np

from streamcrypt.bench.records import Records
from streamcrypt.engine.manifest import HELD_LENGTH
from streamcrypt.engine.run import PROCESSES_PAY, SAMPLE, UNLOCKED_PER_BYTE, interpreter_seconds
from streamcrypt.engine.spans import BATCH_BYTES, BATCH_FILES, SMALL_LENGTH, SPAN_LENGTH, SPLIT_LENGTH
from streamcrypt.message.suites import MAX_FRAMES, MAX_WRITTEN_FRAME_LENGTH
from streamcrypt.plan import cluster, limits
from streamcrypt.plan.closed import Load, Outcome, Sharing, closed_form, messages_by_bytes
from streamcrypt.plan.model import CPU_TERMS, TERMS, Fit, Vector, Work, alone_from, describe, fit
from streamcrypt.plan.simulate import simulate
from streamcrypt.stores import MAX_PARTS, PART_LENGTH, part_length
from streamcrypt.units import format_size

TRIALS: Final = 1000
CONFIDENCE: Final = 0.9  # share of trials that must meet the deadline
HEADER: Final = 400  # bytes: one KMS key and a few context pairs
DIRTY: Final = 0.2  # of the memory: Linux holds back so much before whoever writes waits for the disk
KNEE: Final = 8.0  # exponent of the norm that joins bounds; two equal ones come to 1.09 of one
MOST_HOSTS: Final = 1 << 16
MOST_USD: Final = 1e6  # an hour of a host

# INTERFACE.md: the cache's defaults.
MAX_AGE: Final = 300.0
MAX_MESSAGES: Final = 100_000
MAX_BYTES: Final = 1 << 40
CAPACITY: Final = 1000

# A limiter keeps to a quota within some per cent.
_QUOTA_SPREAD: Final = 0.02
# Terms that grow with the size of a file.
_BY_SIZE: Final = ("frame", "byte_serial", "byte", "sync_byte", "hash")

# What the page's sliders change.
_MOVABLE: Final = (
    "bytes", "files", "hosts", "frame_size", "kms_latency", "cache_max_messages", "cache_max_age",
)  # fmt: skip

_KMS_OPERATION: Final = {
    "encrypt": "GenerateDataKey",
    "decrypt": "Decrypt",
    "verify": "Decrypt",
    "rekey": "GenerateDataKey",
}


class PlanError(ValueError):
    """A job that cannot be planned; the message says why and what to change."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A distribution of file sizes as points of equal weight, in bytes."""

    points: tuple[float, ...]

    @classmethod
    def constant(cls, mean: float) -> Sizes:
        return cls((mean,))

    @classmethod
    def lognormal(cls, mean: float, sigma: float) -> Sizes:
        """64 quantiles of a lognormal distribution, scaled to ``mean``."""
        normal = NormalDist()
        points = [math.exp(sigma * normal.inv_cdf((i + 0.5) / 64)) for i in range(64)]
        scale = mean * len(points) / sum(points)
        return cls(tuple(point * scale for point in points))

    @classmethod
    def listing(cls, sizes: Sequence[int]) -> Sizes:
        """The sizes themselves, or 512 groups of neighbours by their means; PlanError for none."""
        if not sizes:
            raise PlanError("the listing holds no files; name a folder or bucket that does")
        ordered = sorted(sizes)
        if len(ordered) <= 512:
            return cls(tuple(float(size) for size in ordered))
        groups = [ordered[i * len(ordered) // 512 : (i + 1) * len(ordered) // 512] for i in range(512)]
        return cls(tuple(sum(group) / len(group) for group in groups))

    def scaled(self, mean: float) -> Sizes:
        """The same shape with another mean."""
        if self.mean == 0:
            return Sizes.constant(mean)
        return Sizes(tuple(point * mean / self.mean for point in self.points))

    @property
    def mean(self) -> float:
        return sum(self.points) / len(self.points)

    @property
    def variation(self) -> float:
        """Coefficient of variation."""
        mean = self.mean
        if mean == 0:
            return 0.0
        return math.sqrt(sum((point - mean) ** 2 for point in self.points) / len(self.points)) / mean

    @property
    def largest(self) -> float:
        return max(self.points)

    def frames(self, frame_size: int) -> float:
        """Mean frames of a message; a whole number of frames is followed by an empty final one."""
        return sum(point // frame_size + 1 for point in self.points) / len(self.points)

    def share_from(self, length: int) -> float:
        """The share of files of at least so many bytes."""
        return sum(point >= length for point in self.points) / len(self.points)

    def spans(self) -> float:
        """Mean pieces that the engine cuts a message into."""
        spans = (math.ceil(point / SPAN_LENGTH) if point > SPLIT_LENGTH else 1 for point in self.points)
        return sum(spans) / len(self.points)


@functools.lru_cache(maxsize=64)
def _scaled(sizes: Sizes | None, mean: float) -> Sizes:
    return sizes.scaled(mean) if sizes else Sizes.constant(mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be planned.  Bytes, seconds, calls per second; bandwidths are per host.

    ``workers`` None: as many as the records' machine has cores.  ``kms_quota`` None: the dated table.
    ``data_keys`` matters to decryption: how many the files were sealed under (None: as this job's
    cache would have made).
    """

    bytes: int
    files: int
    sizes: Sizes | None = None
    operation: str = "encrypt"
    signed: bool = False
    frame_size: int = 1 << 20
    hosts: int = 1
    workers: int | None = None
    cores: int | None = None  # of each host; None: as the records' machine
    fsync: bool = True
    storage: str = "disk"
    cache: bool = True
    cache_max_age: float = MAX_AGE
    cache_max_messages: float = MAX_MESSAGES
    cache_max_bytes: float = MAX_BYTES
    capacity: int = CAPACITY
    sharing: Sharing = "shared"
    contexts: int = 1
    data_keys: int | None = None
    order: Literal["sequential", "random"] = "sequential"
    kms_latency: float = limits.KMS_LATENCY
    kms_latency_spread: float = 0.2  # sigma: how far the mean may be from what is said, as a logarithm
    kms_quota: float | None = None
    kms_quota_share: float = limits.QUOTA_SHARE
    region: str | None = None
    keys: int = 1
    read_bandwidth: float | None = None
    write_bandwidth: float | None = None
    network_bandwidth: float | None = None
    deadline: float | None = None
    price_host_hour: float | None = None
    prices: limits.Prices = limits.PRICES
    object_store: bool = False
    engine: Literal["local", "ray"] = "local"

    def __post_init__(self) -> None:
        counts = {
            "files": self.files,
            "hosts": self.hosts,
            "frame size": self.frame_size,
            "contexts": self.contexts,
        }
        for name, value in counts.items():
            if value < 1:
                raise PlanError(f"{name} is {value}: it must be at least 1")
        if self.workers is not None and self.workers < 1:
            raise PlanError(f"workers is {self.workers}: it must be at least 1")
        if self.bytes < 0:
            raise PlanError(f"bytes is {self.bytes}: a size is not negative")
        if self.operation not in _KMS_OPERATION:
            raise PlanError(f"{self.operation!r} cannot be planned; choose from {', '.join(_KMS_OPERATION)}")
        if self.kms_quota is not None and not self.kms_quota > 0:
            raise PlanError(
                "a KMS quota of 0 calls a second lets no job finish; give the quota of your account"
            )
        if self.kms_latency < 0:
            raise PlanError("a KMS latency is not negative")
        if self.price_host_hour is not None and not 0 <= self.price_host_hour <= MOST_USD:
            raise PlanError(
                f"a price of {self.price_host_hour:g} USD an hour: it must be from 0 to {MOST_USD:,.0f}"
            )
        if self.frame_size > MAX_WRITTEN_FRAME_LENGTH:
            raise PlanError(f"frame size is {self.frame_size}: it must be at most {MAX_WRITTEN_FRAME_LENGTH}")
        largest = self.size_points.largest
        if largest // self.frame_size >= MAX_FRAMES:
            raise PlanError(
                f"a file of {format_size(math.ceil(largest))} in frames of {self.frame_size} bytes: a message has at "
                f"most {MAX_FRAMES} frames; a larger frame size holds it"
            )
        if self.engine == "ray" and self.signed:
            raise PlanError("a cluster does not sign messages; leave --sign out, or plan with --engine local")
        positive = {
            "deadline": self.deadline,
            "read bandwidth": self.read_bandwidth,
            "write bandwidth": self.write_bandwidth,
            "network bandwidth": self.network_bandwidth,
            "cache max age": self.cache_max_age,
            "cache max messages": self.cache_max_messages,
        }
        for name, limit in positive.items():
            if limit is not None and not limit > 0:
                raise PlanError(f"{name} is {limit:g}: it must be above 0")

    @property
    def size_points(self) -> Sizes:
        return _scaled(self.sizes, self.bytes / self.files)

    @property
    def busy_hosts(self) -> int:
        """Hosts that get a file, and ask for a data key."""
        return min(self.hosts, self.files)

    @property
    def kms_operation(self) -> str:
        return _KMS_OPERATION[self.operation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One evaluation of the model: a point, before any interval."""

    seconds: float
    calls: float
    messages_per_key: float
    peak_per_second: float
    parts: dict[str, float]  # seconds that each resource alone would need
    cost: dict[str, float]  # USD, by what it is for, and their total
    worker_calls: float = 0.0  # of ``calls``: what the workers of a cluster unwrap for themselves

    @property
    def limit(self) -> str:
        """The resource that decides; the one that would need longest."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a job will take, and how sure that is.  Intervals hold 80 and 95 % of the trials."""

    job: Job
    hosts: int
    workers: int
    cores: int
    estimate: Estimate
    interval: tuple[float, float]
    interval_95: tuple[float, float]
    meets_deadline: float | None  # share of trials
    quota: limits.KmsQuota
    bytes_out: float
    cost: dict[str, Any]
    sensitivity: dict[str, float]
    what_if: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    records: dict[str, Any] = field(default_factory=dict)
    fit: Fit

    @property
    def feasible(self) -> bool:
        return self.meets_deadline is None or self.meets_deadline >= CONFIDENCE

    def to_json(self) -> dict[str, Any]:
        """The object of ``plan --json`` (INTERFACE.md), and every figure on the way to it."""
        job, estimate = self.job, self.estimate
        inputs = {
            name: getattr(job, name) for name in Job.__dataclass_fields__ if name not in ("sizes", "prices")
        }
        return {
            "operation": job.operation,
            "bytes": job.bytes,
            "files": job.files,
            "hosts": self.hosts,
            "workers_per_host": self.workers,
            "seconds": estimate.seconds,
            "seconds_interval": list(self.interval),
            "seconds_interval_95": list(self.interval_95),
            "bytes_per_second": job.bytes / estimate.seconds if estimate.seconds else 0.0,
            "bytes_out": round(self.bytes_out),
            "limit": estimate.limit,
            "limits": estimate.parts,
            "deadline": None
            if job.deadline is None
            else {"seconds": job.deadline, "met": self.feasible, "share_of_trials": self.meets_deadline},
            "kms": {
                "calls": _calls_of(job, estimate),
                "messages_per_key": estimate.messages_per_key,
                "peak_per_second": estimate.peak_per_second,
                "quota_per_second": self.quota.per_second,
                "quota_source": self.quota.source,
            },
            "cost": self.cost,
            "sensitivity": self.sensitivity,
            "what_if": self.what_if,
            "notes": self.notes,
            "records": self.records,
            "model": describe(self.fit),
            "inputs": inputs,
            "page": self._page(),
        }

    def _page(self) -> dict[str, Any]:
        """What the report's page needs to compute the closed form again."""
        job, prices = self.job, self.job.prices
        sizes = job.size_points
        start = {name: getattr(job, name) for name in _MOVABLE} | {
            "workers": self.workers,
            "kms_quota": self.quota.per_second,
        }
        return {
            "live": job.engine == "local" and job.sharing == "shared" and job.order == "sequential",
            "start": start,
            "coefficients": dict(zip(TERMS, self.fit.coefficients.tolist(), strict=True)),
            "cpu_coefficients": dict(zip(CPU_TERMS, self.fit.cpu.tolist(), strict=True)),
            "interpreter": [interpreter_seconds(1, 0), interpreter_seconds(0, 1)],
            "processes_pay": PROCESSES_PAY,
            "unlocked_per_byte": UNLOCKED_PER_BYTE,
            "on_store": job.storage == "store",
            "by_size": _BY_SIZE,
            "sample": SAMPLE,
            "sizes": sizes.points,
            "mean": sizes.mean,
            "cores": self.cores,
            "workers": self.workers,
            "signed": job.signed,
            "sync": job.fsync and job.operation != "verify",
            "reading": job.operation in ("decrypt", "verify"),
            "in_memory": job.storage == "memory",
            "writing": {"verify": "nothing", "decrypt": "plain"}.get(job.operation, "message"),
            "questions": _questions(job),
            "data_keys": job.data_keys,
            "contexts": job.contexts,
            "capacity": job.capacity,
            "keys": job.keys,
            "read_bandwidth": job.read_bandwidth,
            "write_bandwidth": job.write_bandwidth,
            "network_bandwidth": job.network_bandwidth,
            "held_back": None if job.fsync or job.storage != "disk" else DIRTY * self.fit.memory,
            "manifest_line": MANIFEST_LINE,
            "manifest_held": HELD_LENGTH,
            "lists_held": LISTS_HELD,
            "batch_files": BATCH_FILES,
            "batch_bytes": BATCH_BYTES,
            "columns": job.operation == "encrypt",
            "small": SMALL_LENGTH,
            "split": SPLIT_LENGTH,
            "span": SPAN_LENGTH,
            "header": HEADER,
            "knee": KNEE,
            "host_hour": host_hour(job, self.cores),
            "object_store": job.object_store,
            "part": PART_LENGTH,
            "most_parts": MAX_PARTS,
            "put_request": prices.put_requests.each,
            "get_request": prices.get_requests.each,
            "request_price": prices.kms.request(job.kms_operation),
            "free_requests": prices.kms.free_requests,
            "key_month": prices.kms.key_month,
            "hours_per_month": limits.HOURS_PER_MONTH,
        }


def _load(
    job: Job, work: Work, product: dict[str, float], per_key: float, quota: float, variation: float
) -> Load:
    """One host's queue for seconds by term; ``per_key`` are what a data key costs besides the KMS's latency."""
    lanes, files, batch = max(1, round(work.parallel)), round(work.files), work.list_files
    sizes = job.size_points
    pieces = 1 if job.signed else max(1, round(sizes.spans()))
    encrypting = job.operation in ("encrypt", "rekey")
    questions = _questions(job)
    data_keys = 0
    if not encrypting:
        data_keys = max(1, round(job.data_keys / job.hosts)) if job.data_keys else _made_keys(job, files)
    apart = encrypting and _manifest_apart(files)
    messages = files + (not apart)  # the manifest is a message too
    return Load(
        files=messages,
        workers=lanes,
        service=_busy(product) * lanes / messages,
        handing=product["file_serial"] / messages,
        variation=0.0 if pieces > 1 else variation,
        latency=job.kms_latency * questions + per_key,
        quota=quota / job.busy_hosts / questions,
        max_messages=job.cache_max_messages if job.cache else 1,
        max_age=job.cache_max_age if job.cache else math.inf,
        max_bytes=job.cache_max_bytes if job.cache else math.inf,
        size=sizes.mean,
        size_variation=sizes.variation,
        sharing=job.sharing,
        groups=min(job.contexts, files),
        prefetch=batch - 1 if work.alone else max(0, LISTS_HELD * batch * min(work.workers, files) - lanes),
        batch=batch,
        idle=_starting(product),
        closing=encrypting and not apart,
        data_keys=data_keys if job.cache else (messages if data_keys else 0),
        order=job.order,
        capacity=job.capacity,
        pieces=pieces,
    )


def _calls_of(job: Job, estimate: Estimate) -> dict[str, int]:
    """KMS calls by operation."""
    asked = round(estimate.calls - estimate.worker_calls)
    unwrapped = round(estimate.worker_calls) * _questions(job) + (asked if job.operation == "rekey" else 0)
    calls = {job.kms_operation: asked}
    if unwrapped:
        calls["Decrypt"] = calls.get("Decrypt", 0) + unwrapped
    return calls


def _questions(job: Job) -> int:
    """KMS calls for one data key: a rekey asks to open the old one, then for a new one."""
    return 2 if job.operation == "rekey" else 1


# engine.pool: the lists of files that a worker holds, the one it works on included.
LISTS_HELD: Final = 2
MANIFEST_LINE: Final = 200  # bytes of the manifest for a file, with a name of middling length


def _manifest_apart(files: int) -> bool:
    """Whether the manifest of so many files is longer than what is held back of it: then its length is
    not known when its data key is asked for, and the key serves nothing else."""
    return files * MANIFEST_LINE > HELD_LENGTH


def _made_keys(job: Job, files: int) -> int:
    """Data keys that this job's cache would have made when the files were encrypted."""
    sizes = job.size_points
    per_key = min(job.cache_max_messages, messages_by_bytes(job.cache_max_bytes, sizes.mean, sizes.variation))
    apart = _manifest_apart(files)
    return max(job.contexts, math.ceil((files + (not apart)) / per_key)) + apart


def _work(job: Job, files: int, workers: int, cores: int) -> Work:
    share = files / job.files
    return Work(
        files=files,
        bytes=job.bytes * share,
        frames=job.size_points.frames(job.frame_size) * files,
        workers=workers,
        cores=cores,
        fsync=job.fsync and job.operation != "verify",
        signed=job.signed,
        keys=0,  # the queue counts them
        singles=files * job.size_points.share_from(alone_from(job.frame_size))
        if job.operation == "encrypt"
        else 0.0,
        apart=job.engine == "ray",
        on_store=job.storage == "store",
    )


def _outcome(load: Load, *, exact: bool) -> Outcome:
    """The closed form; where two bounds nearly tie and a point is wanted, the simulation."""
    outcome = closed_form(load)
    if exact and outcome.near_tie and load.files * load.pieces <= 200_000:
        return dataclasses.replace(simulate(load), quota_seconds=outcome.quota_seconds)
    return outcome


def _bytes_out(job: Job) -> float:
    frames = job.size_points.frames(job.frame_size) * job.files
    overhead = job.files * (HEADER + 8 + (105 if job.signed else 0)) + 32 * frames
    if job.operation in ("encrypt", "rekey"):
        return job.bytes + overhead
    return float(job.bytes) if job.operation == "decrypt" else 0.0


def _products(work: Work, coefficients: Vector) -> dict[str, float]:
    """Seconds of ``work`` by term."""
    return dict(zip(TERMS, (coefficients * work.features()).tolist(), strict=True))


def _starting(product: dict[str, float]) -> float:
    """Seconds in which workers are started."""
    return product["starting"] + product["process"]


def _busy(product: dict[str, float]) -> float:
    """Seconds of all but the starting."""
    return max(sum(product.values()) - product["start"] - _starting(product), 1e-9)


def _estimate(
    job: Job, rates: Fit, coefficients: Vector, workers: int, cores: int, quota: float, *, exact: bool = False
) -> Estimate:
    """The model at one point."""
    files = math.ceil(job.files / job.hosts)
    work = _work(job, files, workers, cores)
    product = _products(work, coefficients)
    overhead, busy = product["start"] + _starting(product), _busy(product)
    by_size = sum(product[term] for term in _BY_SIZE) / busy
    if job.engine == "ray":
        return _on_cluster(job, work, product, quota, job.size_points.variation * by_size, cores)
    per_key = float(coefficients[TERMS.index("key")])
    load = _load(job, work, product, per_key, quota, job.size_points.variation * by_size)
    outcome = _outcome(load, exact=exact)

    bounds = _bounds(job, files / job.files)
    beyond = _unheld(job, rates, files / job.files) * float(coefficients[TERMS.index("sync_byte")])
    bounds["storage-write"] = max(bounds["storage-write"], beyond)
    joined = _joined(outcome.seconds, bounds)

    # What the cores had to do, and what they do not account for: that is the storage's.
    worked = overhead + busy
    cpu_seconds = float(rates.cpu @ dataclasses.replace(work, keys=outcome.calls).cpu_features())
    # In memory no device makes anybody wait: what is left there are the interpreter's lock and hand-overs.
    known = rates.cpu.any() and job.storage != "memory"
    cpu = min(worked, cpu_seconds / work.lanes(cpu_seconds)) if known else worked
    stored = worked - cpu
    reads_only = job.operation == "verify"
    parts = {
        "cpu": cpu,
        "storage-write": max(bounds["storage-write"], 0.0 if reads_only else stored),
        "storage-read": max(bounds["storage-read"], stored if reads_only else 0.0),
        "network": bounds["network"],
        "kms-latency": outcome.stall_seconds if outcome.quota_seconds <= outcome.worker_seconds else 0.0,
        "kms-quota": outcome.quota_seconds,
    }
    if outcome.quota_seconds and outcome.quota_seconds >= 0.97 * outcome.seconds:
        parts = {name: 0.0 if name == "kms-latency" else value for name, value in parts.items()}
    apart = job.operation in ("encrypt", "rekey") and _manifest_apart(files)
    seconds, calls = overhead + joined, (outcome.calls + apart) * job.busy_hosts
    questions = _questions(job)
    return Estimate(
        seconds=seconds,
        calls=calls,
        messages_per_key=outcome.messages_per_key,
        peak_per_second=float(
            min(outcome.peak_per_second * job.busy_hosts * questions, quota * 2, calls * questions)
        ),
        parts=parts,
        cost=_cost(job, calls, seconds, cores),
    )


def _bounds(job: Job, share: float) -> dict[str, float]:
    """Seconds that storage and network of one host would need for its share."""
    return {
        "storage-read": job.bytes * share / job.read_bandwidth if job.read_bandwidth else 0.0,
        "storage-write": _bytes_out(job) * share / job.write_bandwidth if job.write_bandwidth else 0.0,
        "network": (job.bytes + _bytes_out(job)) * share / job.network_bandwidth
        if job.network_bandwidth
        else 0.0,
    }


def _unheld(job: Job, rates: Fit, share: float) -> float:
    """Bytes that a host writes to a disk without flushing them and that its memory does not hold back."""
    if job.fsync or job.storage != "disk":
        return 0.0
    return max(0.0, _bytes_out(job) * share - DIRTY * rates.memory)


def _joined(seconds: float, bounds: dict[str, float]) -> float:
    """The time under all bounds: somewhat more than the largest where others come near it."""
    all_of_them = [seconds, *(bound for bound in bounds.values() if bound > 0)]
    top = max(all_of_them)
    if len(all_of_them) == 1:
        return top
    together: float = sum((value / top) ** KNEE for value in all_of_them) ** (1 / KNEE)
    return top * together


def cluster_load(job: Job, records: Records) -> cluster.ClusterLoad:
    """What the job is for a cluster, at the fitted rates: for ``simulate.simulate_cluster``."""
    rates, _ = _rates(job, records)
    cores = job.cores or max(records.machine.cores, job.workers or 0)
    work = _work(job, math.ceil(job.files / job.hosts), job.workers or cores, cores)
    return _cluster_load(job, work, _products(work, rates.coefficients), _quota(job).per_second, 0.0)


def _cluster_load(
    job: Job, work: Work, products: dict[str, float], quota: float, variation: float
) -> cluster.ClusterLoad:
    """``products`` are the seconds of one host by term; what the parent does for a file is the driver's here."""
    driver = products["file_serial"]
    busy = max(_busy(products) - driver, 1e-9)
    workers = max(1, min(work.workers, work.cores))
    encrypting = job.operation in ("encrypt", "rekey")
    return cluster.ClusterLoad(
        files=job.files,
        nodes=job.hosts,
        workers=workers,
        service=busy * work.parallel / work.files,
        driver=driver / work.files,
        lists=cluster.lists_of(job.files, job.bytes, job.hosts * workers),
        size=job.size_points.mean,
        variation=variation,
        latency=job.kms_latency,
        quota=quota,
        max_messages=job.cache_max_messages if job.cache else 1,
        max_age=job.cache_max_age if job.cache else math.inf,
        max_bytes=job.cache_max_bytes if job.cache else math.inf,
        data_keys=0
        if encrypting
        else (job.data_keys or _made_keys(job, job.files))
        if job.cache
        else job.files,
        questions=_questions(job),
    )


def _on_cluster(
    job: Job, work: Work, products: dict[str, float], quota: float, variation: float, cores: int
) -> Estimate:
    """The model of one driver and many nodes, at one point."""
    load = _cluster_load(job, work, products, quota, variation)
    outcome = cluster.closed_form(load)
    bounds = _bounds(job, work.files / job.files)
    stored = sum(products[term] for term in ("byte_serial", "sync_serial", "sync", "sync_byte"))
    reads_only = job.operation == "verify"
    quota_decides = outcome.quota_seconds >= 0.97 * outcome.seconds
    seconds, calls = cluster.START + _joined(outcome.seconds, bounds), outcome.calls / load.questions
    return Estimate(
        seconds=seconds,
        calls=calls,
        messages_per_key=load.files * load.questions / outcome.driver_calls,
        peak_per_second=outcome.peak_per_second,
        parts={
            "cpu": max(0.0, outcome.worker_seconds - outcome.stall_seconds - stored),
            "driver": outcome.driver_seconds,
            "storage-write": max(bounds["storage-write"], 0.0 if reads_only else stored),
            "storage-read": max(bounds["storage-read"], stored if reads_only else 0.0),
            "network": bounds["network"],
            "kms-latency": 0.0 if quota_decides else outcome.stall_seconds,
            "kms-quota": outcome.quota_seconds,
            "start-up": cluster.START,
        },
        cost=_cost(job, calls, seconds, cores),
        worker_calls=outcome.worker_calls / load.questions,
    )


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def _trials(
    job: Job, rates: Fit, workers: int, cores: int, quota: float, widen: float, trials: int, seed: int
) -> list[float]:
    """Seconds of repeated evaluations, sorted: resampled rates, the fit's own errors, a KMS faster or slower."""
    rng = np.random.default_rng(seed)
    residuals = rates.residuals or (0.0,)
    picked = rng.integers(0, len(residuals), trials)
    rates_picked = rng.integers(0, max(1, len(rates.resampled)), trials)
    latencies = np.exp(rng.normal(0, job.kms_latency_spread, trials))
    quotas = quota * np.exp(rng.normal(0, _QUOTA_SPREAD, trials))
    seconds = []
    for residual, chosen, slower, admitted in zip(
        picked.tolist(), rates_picked.tolist(), latencies.tolist(), quotas.tolist(), strict=True
    ):
        # The fit's own errors are errors of the host's work; waiting for the KMS has its own spread.
        coefficients = rates.resampled[chosen] if rates.resampled else rates.coefficients
        scaled = coefficients * max(0.1, 1 + widen * residuals[residual])
        trial = dataclasses.replace(job, kms_latency=job.kms_latency * slower)
        seconds.append(_estimate(trial, rates, scaled, workers, cores, admitted).seconds)
    return sorted(seconds)


def _changed(job: Job, **changes: Any) -> Job:
    return dataclasses.replace(job, **changes)


def _sensitivity(job: Job, point: Any, workers: int) -> dict[str, float]:
    """d ln(seconds) / d ln(input): -1 means that twice the input halves the time."""
    base = point(job, workers).seconds
    found: dict[str, float] = {}

    def elasticity(changed: Job, with_workers: int, ratio: float) -> float:
        return math.log(point(changed, with_workers).seconds / base) / math.log(ratio)

    for name in ("bytes", "files", "frame_size", "hosts"):
        value = getattr(job, name)
        if not value:
            continue
        for ratio in (2.0, 0.5):  # a frame at its limit can only be halved
            with contextlib.suppress(PlanError):
                found[name] = elasticity(_changed(job, **{name: round(value * ratio)}), workers, ratio)
                break
    found["workers"] = elasticity(job, workers * 2, 2)
    for name in ("kms_latency", "cache_max_messages", "cache_max_age", "cache_max_bytes",
                 "read_bandwidth", "write_bandwidth", "network_bandwidth"):  # fmt: skip
        value = getattr(job, name)
        if value:
            found[name] = elasticity(_changed(job, **{name: value * 1.1}), workers, 1.1)
    return {
        name: round(value, 4) + 0.0 for name, value in sorted(found.items(), key=lambda item: -abs(item[1]))
    }


def evaluate(job: Job, records: Records, *, workers: int | None = None) -> Estimate:
    """The closed form alone, at the fitted rates: what the report's page computes.

    ``workers`` None: as the job says.
    """
    rates, _ = _rates(job, records)
    quota = _quota(job)
    planned = job.workers or job.cores or records.machine.cores
    cores = job.cores or max(records.machine.cores, job.workers or 0)
    used = workers or planned
    if used != planned:
        cores = max(cores, used)
    return _estimate(job, rates, rates.coefficients, used, cores, quota.per_second)


def calls_within(job: Job, records: Records, seconds: float) -> float:
    """KMS calls of the job if its work takes so long that the job takes ``seconds``.

    Where age ends data keys, calls follow the time: this tells an error of theirs from one of its.
    """
    rates, _ = _rates(job, records)
    cores = job.cores or max(records.machine.cores, job.workers or 0)

    def at(factor: float) -> Estimate:
        return _estimate(
            job, rates, rates.coefficients * factor, job.workers or cores, cores, _quota(job).per_second
        )

    low, high = 0.01, 100.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle).seconds < seconds else (low, middle)
    return at(high).calls


# The fits of the records used last: a search for the least number of hosts plans many times.
_fits: list[tuple[Records, tuple[str, bool, str], Fit]] = []


def _fit(records: Records, kind: tuple[str, bool, str]) -> Fit:
    for known, its_kind, found in _fits:
        if known is records and its_kind == kind:
            return found
    operation, signed, storage = kind
    found = fit(records, operation, signed=signed, storage=storage)
    _fits.append((records, kind, found))
    del _fits[:-16]
    return found


def _rates(job: Job, records: Records) -> tuple[Fit, list[str]]:
    """The fit for the job's operation; where its storage was not measured, that of memory, and a note."""
    measured = {run.cell.storage for run in records.usable() if run.cell.operation == job.operation}
    if job.storage not in measured and "memory" in measured:
        note = f"nothing was measured on {job.storage}: rates are those of a memory file system"
        return _fit(records, (job.operation, job.signed, "memory")), [note]
    return _fit(records, (job.operation, job.signed, job.storage)), []


def _quota(job: Job) -> limits.KmsQuota:
    if job.kms_quota is not None:
        return limits.KmsQuota(job.kms_quota, "given")
    return limits.kms_quota(job.kms_operation, job.region, job.kms_quota_share)


def predict(job: Job, records: Records, *, trials: int = TRIALS, seed: int = 1) -> Prediction:
    """Plan ``job`` from measured ``records``.  ModelError when they hold too little for its operation."""
    rates, notes = _rates(job, records)
    cores = job.cores or max(records.machine.cores, job.workers or 0)
    workers = job.workers or cores
    quota = _quota(job)

    def point(changed: Job, with_workers: int, *, exact: bool = False) -> Estimate:
        at_cores = max(cores, with_workers) if with_workers != workers else cores
        return _estimate(
            changed, rates, rates.coefficients, with_workers, at_cores, quota.per_second, exact=exact
        )

    widen = 1.0
    if workers > 2 * rates.largest_workers:
        widen = 1 + math.log2(workers / (2 * rates.largest_workers)) / 2
        notes.append(
            f"{workers} workers are {workers / rates.largest_workers:.3g} times the most that was measured "
            f"({rates.largest_workers}); the interval is widened {widen:.2g} times and may still be too narrow"
        )
    disturbed = sum(1 for run in records.usable() if run.noise)
    if disturbed > len(records.usable()) / 5:
        notes.append(
            f"{disturbed} of the {len(records.usable())} runs behind these rates were disturbed by other work: "
            "the time is likely too long; measure again on a quiet machine"
        )
    if _unheld(job, rates, 1 / job.hosts):
        notes.append(
            "more is written than memory holds back: without fsync too the disk's own rate counts, as measured with it"
        )
    if job.hosts > 1:
        shared = "the driver and the KMS quota are" if job.engine == "ray" else "only the KMS quota is"
        notes.append(f"hosts are assumed equal and independent; {shared} shared")
    estimate = point(job, workers, exact=True)
    drawn = _trials(job, rates, workers, cores, quota.per_second, widen, trials, seed)
    meets = bisect.bisect_right(drawn, job.deadline) / len(drawn) if job.deadline is not None else None

    sizes = job.size_points
    longest = sizes.largest * job.files / max(job.bytes, 1)
    if job.signed and longest * workers * job.hosts > job.files:
        notes.append("one file is longer than a worker's share of the job; a signed message is not split")
    what_if = []
    variants: list[tuple[str, Job]] = [("no cache", _changed(job, cache=False))] if job.cache else []
    variants += [
        (f"frames of {label}", _changed(job, frame_size=size))
        for label, size in (("4 KiB", 1 << 12), ("64 KiB", 1 << 16), ("1 MiB", 1 << 20))
        if size != job.frame_size and sizes.largest // size < MAX_FRAMES
    ]
    for label, variant in variants:
        other = point(variant, workers)
        what_if.append(
            {
                "change": label,
                "seconds": other.seconds,
                "ratio": other.seconds / estimate.seconds,
                "calls": round(other.calls),
                "limit": other.limit,
            }
        )
    return Prediction(
        job=job,
        hosts=job.hosts,
        workers=workers,
        cores=cores,
        estimate=estimate,
        interval=(_quantile(drawn, 0.1), _quantile(drawn, 0.9)),
        interval_95=(_quantile(drawn, 0.025), _quantile(drawn, 0.975)),
        meets_deadline=meets,
        quota=quota,
        bytes_out=_bytes_out(job),
        cost=_costs(job, estimate),
        sensitivity=_sensitivity(job, point, workers),
        what_if=what_if,
        notes=notes,
        records={
            "machine": records.machine.name,
            "date": records.date,
            "runs": rates.runs,
            "noise": rates.noise,
        },
        fit=rates,
    )


def host_hour(job: Job, cores: int) -> float:
    """USD for an hour of one host."""
    return job.price_host_hour if job.price_host_hour is not None else job.prices.vcpu_hour.each * cores


def _cost(job: Job, calls: float, seconds: float, cores: int) -> dict[str, float]:
    """USD, by what it is for; ``calls`` are questions for data keys."""
    requests, keys = limits.kms_cost(
        job.kms_operation, calls * _questions(job), job.keys, seconds, job.prices
    )
    compute = host_hour(job, cores) * job.hosts * seconds / 3600
    store = 0.0
    if job.object_store:
        puts, gets = _store_requests(job)
        store = puts * job.prices.put_requests.each + gets * job.prices.get_requests.each
    return {
        "kms_requests": requests,
        "kms_keys": keys,
        "compute": compute,
        "store_requests": store,
        "total": requests + keys + compute + store,
    }


def _store_requests(job: Job) -> tuple[float, float]:
    """Requests that write and that read all files: a long object goes in parts, which are opened and joined."""
    points = job.size_points.points
    parts = [math.ceil(point / part_length(math.ceil(point), 0)) for point in points]
    puts = sum(number + 2 if number > 1 else 1 for number in parts) / len(points)
    gets = sum(max(1, math.ceil(point / PART_LENGTH)) for point in points) / len(points)
    return (0.0 if job.operation == "verify" else job.files * puts), job.files * gets


def _costs(job: Job, estimate: Estimate) -> dict[str, Any]:
    """The cost, and where its prices are from."""
    prices = job.prices

    def origin(price: limits.Price) -> dict[str, str]:
        return {"date": price.date, "source": price.source}

    sources = {
        "kms": {"date": prices.kms.date, "source": prices.kms.source},
        "compute": origin(prices.vcpu_hour) if job.price_host_hour is None else {"source": "given"},
    }
    if job.object_store:
        sources["store_requests"] = origin(prices.put_requests)
    return {"currency": "USD", **estimate.cost, "prices": sources}


def _within(job: Job, records: Records) -> Prediction | None:
    """The prediction, if it meets the deadline."""
    found = predict(job, records)
    return found if found.feasible else None


def _least(low: int, high: int, enough: Any) -> int | None:
    """The least number for which ``enough`` holds, in [low, high]; None when it never does."""
    step = low
    while not enough(step):
        if step >= high:
            return None
        low, step = step + 1, min(step * 2, high)
    while low < step:
        middle = (low + step) // 2
        if enough(middle):
            step = middle
        else:
            low = middle + 1
    return step


def solve(what: str, job: Job, records: Records) -> Prediction:
    """The job with the least ``hosts``, ``workers``, ``deadline`` or ``cache`` limit that will do.

    PlanError when no value will: then the message says which resource stands in the way.
    """
    if what == "deadline":
        found = predict(dataclasses.replace(job, deadline=None), records)
        # The time that nine of ten trials keep.
        wanted = found.interval[1]
        return predict(dataclasses.replace(job, deadline=math.ceil(wanted * 1000 + 1) / 1000), records)
    if what == "cache":
        base = predict(
            dataclasses.replace(job, cache_max_messages=float(job.files), cache=True), records, trials=1
        )

        def good(messages: int) -> bool:
            tried = dataclasses.replace(job, cache=True, cache_max_messages=float(messages))
            return predict(tried, records, trials=1).estimate.seconds <= base.estimate.seconds * 1.01

        least = _least(1, max(1, job.files), good)
        return predict(
            dataclasses.replace(job, cache=True, cache_max_messages=float(least or job.files)), records
        )
    if job.deadline is None:
        raise PlanError(f"--solve {what} needs a --deadline")
    if what == "hosts":
        most = min(MOST_HOSTS, job.files)
        least = _least(1, most, lambda hosts: _within(dataclasses.replace(job, hosts=hosts), records))
        best = dataclasses.replace(job, hosts=least or most)
    elif what == "workers":
        most = 1024
        least = _least(1, most, lambda workers: _within(dataclasses.replace(job, workers=workers), records))
        best = dataclasses.replace(job, workers=least or most)
    else:
        raise PlanError(f"--solve takes hosts, workers, deadline or cache, not {what!r}")
    found = predict(best, records)
    if least is None:
        raise PlanError(
            f"no number of {what} up to {most} meets the deadline of {job.deadline:g} s: "
            f"{found.estimate.limit} alone needs {found.estimate.parts[found.estimate.limit]:.3g} s there; "
            "allow more time, or change that resource"
        )
    return found


def check(report: dict[str, Any], job: Job, records: Records) -> dict[str, Any]:
    """A finished job's report against its plan: predicted and actual seconds and calls, and their ratio."""
    predicted = predict(job, records)
    actual = float(report["seconds"])
    if not 0 < actual < math.inf:
        raise ValueError(f"a finished job did not take {actual:g} s")
    calls: Iterable[int] = report.get("kms", {}).get("calls", {}).values()
    return {
        "predicted_seconds": predicted.estimate.seconds,
        "actual_seconds": actual,
        "ratio": actual / predicted.estimate.seconds,
        "in_interval": predicted.interval[0] <= actual <= predicted.interval[1],
        "predicted_calls": round(predicted.estimate.calls),
        "actual_calls": sum(calls),
        "drifted": abs(actual / predicted.estimate.seconds - 1) > 0.15,
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.3g} min"
    hours = minutes / 60
    return f"{hours:.3g} h" if hours < 72 else f"{hours / 24:.3g} days"


def describe_plan(found: Prediction) -> str:
    """The prediction for people: what it takes, what decides, what would change it."""
    job, estimate = found.job, found.estimate
    sizes = job.size_points
    spread = (
        "equal"
        if sizes.variation == 0
        else f"variation {sizes.variation:.2g}, largest {format_size(sizes.largest)}"
    )
    low, high = found.interval
    lowest, highest = found.interval_95
    shares = sorted(
        ((part / estimate.seconds, name) for name, part in estimate.parts.items() if part), reverse=True
    )
    limit = ", ".join(f"{name} {share:.0%}" for share, name in shares[:4])
    moves = [f"{one['change']} → × {one['ratio']:.3g}, {one['calls']:,} calls" for one in found.what_if]
    elasticities = [
        f"{name} {value:+.2f}" for name, value in list(found.sensitivity.items())[:5] if abs(value) > 0.005
    ]
    cost = found.cost
    calls = ", ".join(f"{count:,} {operation}" for operation, count in _calls_of(job, estimate).items())
    lines = [
        f"plan: {job.operation} {format_size(job.bytes)} in {job.files:,} files "
        f"(mean {format_size(sizes.mean)}, {spread})",
        f"  hosts        {found.hosts}, {found.workers} workers each",
        f"  time         {_duration(estimate.seconds)}   80 %: {_duration(low)} – {_duration(high)}"
        f"   95 %: {_duration(lowest)} – {_duration(highest)}",
        f"  rate         {format_size(job.bytes / estimate.seconds)}/s",
        f"  limit        {estimate.limit}   (seconds alone, of the time: {limit})",
        f"  KMS          {calls}, peak {estimate.peak_per_second:,.4g}/s, "
        f"quota {found.quota.per_second:,.6g}/s ({found.quota.source})",
        f"  cost         {cost['total']:.2f} USD: compute {cost['compute']:.2f}, "
        f"KMS requests {cost['kms_requests']:.2f}, "
        f"KMS keys {cost['kms_keys']:.2f}, store requests {cost['store_requests']:.2f}",
        f"  written      {format_size(found.bytes_out)}",
    ]
    if job.deadline is not None:
        met = "met" if found.feasible else "not met"
        lines.append(
            f"  deadline     {_duration(job.deadline)}: {met} ({found.meets_deadline:.0%} of trials)"
        )
    lines += [f"  what if      {moves[0]}"] + [f"               {move}" for move in moves[1:]]
    lines.append(f"  elasticity   {', '.join(elasticities)}   (-1: twice as much halves the time)")
    records = found.records
    lines.append(
        f"  basis        {records['machine']}, {records['date']}, {records['runs']} runs, "
        f"noise {'unknown (no run was repeated)' if records['noise'] is None else format(records['noise'], '.0%')}"
    )
    lines += [f"  note         {note}" for note in found.notes]
    return "\n".join(lines)
