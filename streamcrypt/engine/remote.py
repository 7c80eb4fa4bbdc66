"""The same tasks on a Ray cluster: lists of whole messages, or of spans of large ones, on any node.

    driver    walks, counts data keys, writes journal and manifest     keeps: data keys
    worker    reads, seals or opens, publishes                         asks for data keys itself

What must never happen: a plaintext key crosses the network.  A task carries the encrypted data keys
of its message, and the worker unwraps them by its own references and its own rights.  For a whole
message it also draws the message id itself, so that a task that is done twice makes two messages.

Source and destination are folders that every node sees under the same name, or object stores.  A
worker or node that dies gives its tasks back (``Lost``), and the engine starts their messages again,
as it does locally; what did not authenticate is never tried again.  A node that cannot do the work,
because it may not use the key or does not see the folders, is left out and its tasks go to the
others; without any other the job ends with that node's error.  Signed messages are made by the local
engine: their signing key is made with the data key, and would have to travel.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from streamcrypt import __version__
from streamcrypt.engine.job import Failure, Job, Place, Report
from streamcrypt.engine.pool import Lost, Pool, Taken
from streamcrypt.engine.run import SAMPLE, _Item, _Run, made_by, outcome_of, own_rules
from streamcrypt.engine.spans import (
    BATCH_BYTES,
    BATCH_FILES,
    FileTask,
    Opening,
    Sealing,
    SmallFile,
    SpanTask,
    Tasks,
)
from streamcrypt.engine.worker import Cancelled, Outcome, Setup, Worker, unexpected
from streamcrypt.errors import (
    DestinationError,
    IntegrityError,
    KeyAccessError,
    SourceError,
    StreamcryptError,
    TemporaryError,
)
from streamcrypt.hygiene import protect_process
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsStats
from streamcrypt.keys.keyring import KMS_PROVIDER, Keyring
from streamcrypt.keys.materials import DecryptionMaterials, EncryptionMaterials, Materials
from streamcrypt.keys.reference import References, decrypting_keyring
from streamcrypt.message.frames import Geometry
from streamcrypt.message.header import EncryptedDataKey, Header, HeaderTemplate, parse_header
from streamcrypt.storage import Entry, LocalTarget, LocalTree
from streamcrypt.streams import (
    FrameReader,
    OutgoingMessage,
    ReadingRules,
    header_template,
    read_bytes,
    source_geometry,
    source_header,
    unlock,
)
from streamcrypt.tuples import NamedTuple

# Lists of tasks for each CPU of the cluster: one that is worked on, and one that waits there.
HELD: Final = 2
# Handing out a list costs 0.7 ms and more, and the first answer comes when a whole list is done, so lists
# are longer than locally; every CPU still gets so many of them, where there is enough to do.
LISTS: Final = 4
LIST_FILES: Final = 256
LIST_BYTES: Final = 256 * 2**20

_CONNECT: Final = 12.0  # seconds that the head has to show itself
_LOOK: Final = 5.0  # seconds between two looks at which nodes there are
_NO_NODE: Final = 300.0  # seconds without any node after which the job gives up
_ENDING: Final = 10.0  # seconds that stopped tasks get to end
_STOP_LOOK: Final = 0.5  # seconds between two looks of a task whether it is to stop
_REFUSALS: Final = 3  # for each CPU, without a result in between: then the KMS is away for everybody
_LOCAL_KEY: Final = b":kms:local:"  # in the ARN of a key of the embedded KMS

_log = logging.getLogger("streamcrypt.engine")


class Wrapped(NamedTuple):
    """A message's header, with its wrapped keys, in place of its plaintext ones."""

    header: bytes
    geometry: Geometry | None


class WrappedTask(NamedTuple):
    """A task without any key: ``opening`` is the message to be read, ``sealing`` the one to be made.

    Of a whole message's ``sealing`` only what all messages of its data key share counts; a span's is
    the message itself.
    """

    task: FileTask | SpanTask
    opening: Wrapped | None
    sealing: Wrapped | None


class Made(NamedTuple):
    """A message that a worker made."""

    header: bytes
    message_id: bytes


class Result(NamedTuple):
    """What a worker did of a list.

    The first tasks have outcomes, and ``made`` the messages of them by number; where there is a
    ``refusal``, the node cannot do the others.
    """

    node: str
    outcomes: list[Outcome]
    made: dict[int, Made]
    refusal: StreamcryptError | None
    stats: KmsStats


class Access(NamedTuple):
    """How a worker comes to data keys and folders.

    ``reading`` and ``writing`` are key references; ``cache`` the capacity and the age in seconds of
    the data-key cache, None for no cache.  ``marker`` is a file of the driver's in the destination:
    a node that does not see it sees another folder.  ``protect``: the worker processes are this job's
    alone, and keep their keys from core dumps and the swap.
    """

    reading: tuple[str, ...] | None
    writing: tuple[str, ...] | None
    rules: ReadingRules = ReadingRules()
    authenticated_context: Mapping[str, str] = MappingProxyType({})
    cache: tuple[int, float] | None = None
    marker: str | None = None
    protect: bool = False
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster and what a job may use there; ``stats`` gets the workers' KMS calls too."""

    address: str | None
    reading: References | None
    writing: References | None
    stats: KmsStats
    cache: DataKeyCache | None = None

    def run(self, job: Job) -> Report:
        """Do the job on the cluster.

        ValueError for keys that other machines cannot use, before anything is touched.
        """
        access = Access(
            None if job.reading is None else _travelling(self.reading),
            None if job.writing is None else _unwrapping(_travelling(self.writing)),
            job.rules,
            dict(job.authenticated_context),
            None if self.cache is None else (self.cache.capacity, self.cache.max_age),
        )
        if job.suite.signed and job.writing is not None:
            raise ValueError(
                "signed messages are made by the local engine: their signing key does not leave the machine; "
                "leave out --sign or --engine ray"
            )
        with (
            _connected(self.address) as (ray, ours),
            _ClusterRun(job, ray, access._replace(protect=ours), self.stats) as run,
        ):
            if job.operation == "encrypt":
                run.drive(run.readable(run.left(run.entries())), run.seal)
            else:
                run.drive(run.listed(run.entries()), run.open)
        return run.report


def _travelling(references: References | None) -> tuple[str, ...] | None:
    """The references, if a worker on another machine can use them; ValueError otherwise."""
    if references is None:
        return None
    given = [references] if isinstance(references, str | Keyring) else list(references)
    for reference in given:
        if not isinstance(reference, str):
            raise ValueError("keys for a cluster are key references: a keyring does not travel")
        body, at, place = reference.partition("@")
        if body.startswith("hierarchy:") and place.partition("?")[0] == "local":
            raise ValueError(
                f"{reference}: branch keys of this machine's home, which the nodes of a cluster do not reach; "
                "keep them in DynamoDB (hierarchy:BRANCH-KEY-ID@dynamodb:TABLE)"
            )
        # The @ of kms-rsa: names a file, not an address.
        if body.startswith("kms-rsa:local:") or (
            (not at or body.startswith("kms-rsa:"))
            and (body.startswith(("local:", "ecdh:local:")) or _LOCAL_KEY.decode() in body)
        ):
            raise ValueError(_local_key(reference))
    return tuple(str(reference) for reference in given)


def _local_key(reference: str) -> str:
    return (
        f"{reference}: a key of this machine's file, which the nodes of a cluster do not reach; start "
        "`streamcrypt kms serve` and write local:alias/NAME@http://HOST:PORT (https:// to other machines)"
    )


def _unwrapping(references: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those that also open what they wrap, since a worker is given wrapped keys; ValueError without any."""
    assert references is not None
    kept, reason = [], ""
    for reference in references:
        try:
            decrypting_keyring(reference)
        except (KeyAccessError, ValueError) as error:
            reason = str(error)
        else:
            kept.append(reference)
    if not kept:
        raise ValueError(
            f"on a cluster each worker unwraps the data keys itself, and none of the keys can: {reason}; "
            "add a key that decrypts, or use the local engine"
        )
    return tuple(kept)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[tuple[Any, bool]]:
    """Ray, and whether it was connected for us: a caller that is connected already stays so."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("the engine ray needs ray: pip install 'streamcrypt[ray]'") from error
    if ray.is_initialized():
        yield ray, False
        return
    # Ray tells of workers that die on standard output, which is the result's.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _find_head(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StreamcryptError(f"{address or 'ray'}: no Ray cluster is reached there: {error}") from error
        except SystemExit as error:  # so Ray ends when it has tried for minutes
            raise TemporaryError(f"{address or 'ray'}: no Ray cluster is reached there") from error
        try:
            yield ray, True
        finally:
            ray.shutdown()


def _find_head(address: str | None) -> None:
    """TemporaryError unless a server of gRPC is there; ``ray.init`` would try for minutes.

    Ray has no call with a deadline, and no gRPC of its own for Python.  A server of HTTP/2 answers the
    client's preface with a frame of settings (RFC 9113, 3.4).
    """
    from ray._private.services import canonicalize_bootstrap_address

    if address is not None and "://" in address:  # a server that speaks for the head
        return
    found = canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
    if found is None:  # Ray starts a cluster of this process
        return
    host, _, port = found.rpartition(":")
    deadline = time.monotonic() + _CONNECT
    answer = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            while len(answer) < 9:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                if not (more := connection.recv(9 - len(answer))):
                    break
                answer += more
    except (OSError, OverflowError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        raise TemporaryError(f"{found}: no Ray cluster is reached there: {reason}") from error
    if answer[3:4] != b"\x04" or len(answer) < 9:  # a frame of settings
        raise TemporaryError(f"{found}: no Ray cluster is reached there: what answers is no Ray head")


class _ClusterRun(_Run):
    """A job whose workers are elsewhere."""

    def __init__(self, job: Job, ray: Any, access: Access, stats: KmsStats) -> None:
        super().__init__(job)
        self._small_below = self._messages_to = 0  # a node draws the ids and derives the keys itself
        self._ray = ray
        self._access = access
        self._stats = stats
        self._marker: LocalTarget | None = None
        self._list_files, self._list_bytes = LIST_FILES, LIST_BYTES
        self._given_up: dict[int, list[FileTask]] = {}  # attempts that were lost, by number
        self._made_again: list[FileTask] = []

    def _open(self, item: _Item) -> FileTask | None:
        task = super()._open(item)
        if task is not None and task.opening is not None and self._access.reading is None:
            _refuse_local_keys(task.opening.header)
        return task

    def _choose_pool(self, sample: list[Entry]) -> Pool:
        job = self.job
        target = job.destination.tree if job.destination is not None else None
        compared = target if job.resume else job.against.tree if job.against is not None else None
        setup = Setup(
            job.source.tree, target, compared, self._may_replace, job.durable, job.signing is not None
        )
        if isinstance(target, LocalTree):
            target.remove_leftovers("")
            self._marker = target.create("marker", overwrite=True)  # it never gets that name
            self._access = self._access._replace(marker=self._marker.temporary)
        pool = RayPool(self._ray, setup, self._access, self._stats, self._note_made)
        self.report.workers = cpus = pool.cpus
        if len(sample) < SAMPLE:  # all: every CPU gets some
            total = sum(entry.size for entry in sample)
            self._list_bytes = max(BATCH_BYTES, min(LIST_BYTES, total // (LISTS * cpus)))
            self._list_files = max(1, min(LIST_FILES, len(sample) // (LISTS * cpus)))
        self._batch_files = min(BATCH_FILES, self._list_files)
        return pool

    def _lists(self, tasks: Iterator[FileTask | SmallFile]) -> Iterator[Tasks]:
        """The lists of the local engine, several of them put together."""
        held: list[FileTask | SpanTask] = []
        size = 0
        for tasks_of_one in super()._lists(tasks):
            group = [task for task in tasks_of_one if isinstance(task, FileTask | SpanTask)]
            length = sum(_length(task) for task in group)
            if held and (
                type(held[0]) is not type(group[0])
                or size + length > self._list_bytes
                or len(held) + len(group) > self._list_files
            ):
                yield held
                held, size = [], 0
            held = [*held, *group]
            size += length
        if held:
            yield held

    def _note_made(self, number: int, made: Made) -> None:
        """The worker drew the message id: the manifest is to list its header, not ours."""
        task = self._tasks[number]
        assert task.sealing is not None
        sealing = task.sealing._replace(header=made.header, message_id=made.message_id)
        self._tasks[number] = task._replace(sealing=sealing)

    # -- workers that are lost

    def _retry(self, task: FileTask, reason: str) -> None:
        self._given_up.setdefault(task.number, []).append(task)
        super()._retry(task, reason)

    def _take(self, outcome: Outcome) -> None:
        if isinstance(outcome.error, DestinationError) and outcome.number in self._given_up:
            task = self._tasks.get(outcome.number)
            if task is not None and (published := self._published(task)) is not None:
                # Whoever was given up for lost has finished it meanwhile: its message stands.
                del self._tasks[task.number]
                self._finish_file(published, outcome_of(published))
                return
        super()._take(outcome)

    def _published(self, task: FileTask) -> FileTask | None:
        """The task as a worker that was lost has published it: a message under its own data key."""
        destination = self.job.destination
        if task.target is None or destination is None or not destination.tree.exists(task.target):
            return None
        if task.sealing is None:
            return super()._published(task)
        assert self.job.writing is not None
        ours = {_header(lost.sealing.header).encrypted_data_keys
                for lost in self._given_up[task.number] if lost.sealing is not None}  # fmt: skip
        rules = own_rules(self.job)
        try:
            source = destination.tree.open(task.target)
        except SourceError:
            return None
        try:
            header = source_header(source, max_encrypted_data_keys=None)
            if header.encrypted_data_keys not in ours:
                return None
            geometry = source_geometry(source, header)
            FrameReader(
                source, unlock(header, made_by(self.job, task.source), rules).cipher, geometry
            ).open_final()
        except (IntegrityError, KeyAccessError, SourceError):
            return None
        finally:
            source.close()
        if geometry.plaintext_length != task.length:
            return None
        sealing = task.sealing._replace(header=header.serialize(), message_id=header.message_id)
        return task._replace(sealing=sealing)

    def _finish_file(self, task: FileTask, outcome: Outcome) -> None:
        if task.number in self._given_up:
            self._made_again.append(task)
        super()._finish_file(task, outcome)

    def _finish(self, destination: Place) -> None:
        if self._may_replace:
            for task in self._made_again:
                self._check_not_replaced(destination, task)
        super()._finish(destination)

    def _check_not_replaced(self, destination: Place, task: FileTask) -> None:
        """A worker given up for lost may end later still, and where names are replaced, replace ours."""
        if task.sealing is None or task.target is None:
            return
        with contextlib.closing(destination.tree.open(task.target)) as source:
            if read_bytes(source, 0, len(task.sealing.header)) != task.sealing.header:
                error = DestinationError(
                    f"{destination.tree.path(task.target)}: a worker that had been lost replaced it; "
                    "run the job again with --resume"
                )
                self.report.failed.append(Failure(task.source, error))

    def _end(self, *, failed: bool) -> None:
        try:
            super()._end(failed=failed)
        finally:
            if self._marker is not None:
                self._marker.discard()


def _refuse_local_keys(header: bytes) -> None:
    """ValueError where a node would look for a message's key in an embedded KMS of its own."""
    keys = _header(header).encrypted_data_keys
    local = [key for key in keys if key.provider_id == KMS_PROVIDER and _LOCAL_KEY in key.info]
    if local and len(local) == len(keys):
        raise ValueError(_local_key(local[0].info.decode("utf-8", "replace")))


def _header(header: bytes) -> Header:
    return parse_header(header, max_encrypted_data_keys=None)[0]


def _length(task: FileTask | SpanTask) -> int:
    return task.stop - task.start if isinstance(task, SpanTask) else task.length


# ---------------------------------------------------------------------------------------------
# Lists to nodes


class _Node(NamedTuple):
    id: str
    address: str
    cpus: int

    def __str__(self) -> str:
        return f"node {self.address} ({self.id[:8]})"


class RayPool:
    """Workers as Ray tasks: at most ``HELD`` lists for each CPU are with the cluster at a time."""

    def __init__(
        self,
        ray: Any,
        setup: Setup,
        access: Access,
        stats: KmsStats,
        made: Callable[[int, Made], None],
    ) -> None:
        self._ray = ray
        # Once for the job, not with every list.
        self._stop_name = f"streamcrypt/stop/{os.urandom(16).hex()}".encode()
        self._common = ray.put((setup, access, self._stop_name))
        # Our own engine repeats what was lost, since it knows what had been published already, and
        # gives a span that is done again another key.
        self._work = ray.remote(num_cpus=1, max_retries=0)(work)
        self._stats = stats
        self._made = made
        self._held: dict[Any, tuple[Tasks, str | None]] = {}
        self._nodes: dict[str, _Node] = {}
        self._left_out: dict[str, StreamcryptError] = {}
        self._delivered: set[str] = set()
        self._refusals = 0
        self._looked = self._seen = -math.inf
        self._look()

    @property
    def cpus(self) -> int:
        """Those of the nodes that take part."""
        return max(1, sum(node.cpus for node in self._nodes.values() if node.id not in self._left_out))

    @property
    def has_room(self) -> bool:
        return len(self._held) < HELD * self.cpus

    @property
    def busy(self) -> bool:
        return bool(self._held)

    def submit(self, tasks: Tasks) -> None:
        work, node = self._work, None
        if self._left_out:  # Ray would give it to any node, so the choice is ours now
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            node = self._least_busy()
            work = work.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        self._held[
            work.remote(
                self._common, [_wrapped(task) for task in tasks if isinstance(task, FileTask | SpanTask)]
            )
        ] = (tasks, node)

    def collect(self) -> list[Taken]:
        results: list[Taken] = []
        errors = self._ray.exceptions
        for reference in self._ready():
            tasks, _ = self._held.pop(reference)
            try:
                result = self._ray.get(reference)
            except errors.RayTaskError as error:
                reason = str(error.cause or error).strip().splitlines()[-1]
                raise StreamcryptError(
                    f"a node of the cluster cannot do the work: {reason}; every node needs Python as here, "
                    f"streamcrypt {__version__} and what its keys need"
                ) from error
            except errors.RayError as error:
                self._looked = -math.inf
                results.append(Lost(tasks, f"a worker of the cluster was lost ({type(error).__name__})"))
                continue
            results += self._taken(result, tasks)
        return results

    def close(self, *, cancel: bool = False) -> None:
        if cancel and self._held:
            from ray.experimental.internal_kv import _internal_kv_put

            # Not `ray.cancel`: a task that ends meanwhile makes Ray 2.60 abort this process, as often as
            # one interrupt in four.  The tasks look at this entry.
            with contextlib.suppress(self._ray.exceptions.RayError):
                _internal_kv_put(self._stop_name, b"1")
                # What they leave behind can be removed when they have ended.
                self._ray.wait(list(self._held), num_returns=len(self._held), timeout=_ENDING)
        self._held.clear()
        self._common = None

    def _ready(self) -> list[Any]:
        """The lists that are done; waits for the first."""
        while not self._ray.wait(list(self._held), timeout=_LOOK)[0]:
            self._look()
            if time.monotonic() - self._seen > _NO_NODE:
                raise TemporaryError(
                    "the cluster has no node with processors left; --resume goes on when it has"
                )
        self._look()
        ready: list[Any] = self._ray.wait(list(self._held), num_returns=len(self._held), timeout=0)[0]
        return ready

    def _look(self) -> None:
        """See which nodes there are, now and then: they come and go."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        nodes = (
            _Node(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("CPU", 0)))
            for node in self._ray.nodes()
            if node["Alive"]
        )
        self._nodes = {node.id: node for node in nodes if node.cpus}
        self._looked = now
        if self._nodes or self._seen == -math.inf:
            self._seen = now

    def _taken(self, result: Result, tasks: Tasks) -> list[Outcome | Lost]:
        self._stats.merge(result.stats)
        if result.outcomes:
            self._delivered.add(result.node)
            self._refusals = 0
        outcomes: list[Outcome | Lost] = []
        for outcome in result.outcomes:
            if outcome.error is None and outcome.number in result.made:
                self._made(outcome.number, result.made[outcome.number])
            if isinstance(outcome.error, SourceError | DestinationError):
                outcome.error.args = (f"{outcome.error} (on {self._name(result.node)})",)
            outcomes.append(outcome)
        if result.refusal is not None:
            self._refused(result.node, result.refusal)
            self.submit(tasks[len(result.outcomes) :])
        return outcomes

    def _refused(self, node: str, error: StreamcryptError) -> None:
        """A node cannot do the work: for now only, or it is left out from here on."""
        if isinstance(error, TemporaryError) and node in self._delivered:
            self._refusals += 1
            if self._refusals > _REFUSALS * self.cpus:
                raise error
        elif node not in self._left_out:
            self._left_out[node] = error
            self._looked = -math.inf
            self._look()
            if any(other not in self._left_out for other in self._nodes):
                _log.warning("%s is left out: %s", self._name(node), error)

    def _least_busy(self) -> str:
        """The node with the fewest lists for its CPUs; without any, the error of the last one."""
        nodes = [node for node in self._nodes.values() if node.id not in self._left_out]
        if not nodes:
            name, error = next(reversed(self._left_out.items()))
            error.args = (f"no node of the cluster can do the work; {self._name(name)}: {error}",)
            raise error
        held = Counter(node for _, node in self._held.values())
        return min(nodes, key=lambda node: held[node.id] / node.cpus).id

    def _name(self, node: str) -> str:
        return str(self._nodes.get(node, f"node {node[:8]}"))


def _wrapped(task: FileTask | SpanTask) -> WrappedTask:
    """The task without its keys."""
    file = task.file if isinstance(task, SpanTask) else task
    opening, sealing = file.opening, file.sealing
    bare = file._replace(opening=None, sealing=None)
    return WrappedTask(
        task._replace(file=bare) if isinstance(task, SpanTask) else bare,
        Wrapped(opening.header, opening.geometry) if opening is not None else None,
        Wrapped(sealing.header, sealing.geometry) if sealing is not None else None,
    )


# ---------------------------------------------------------------------------------------------
# On a node


class _Stop(threading.Event):
    """Set when the job's driver has said so in the cluster's key-value store; asked twice a second."""

    def __init__(self, name: bytes) -> None:
        super().__init__()
        self._name = name
        self._asked = -math.inf

    def is_set(self) -> bool:
        from ray.experimental.internal_kv import _internal_kv_exists

        if not super().is_set() and time.monotonic() - self._asked > _STOP_LOOK:
            self._asked = time.monotonic()
            if _internal_kv_exists(self._name):
                self.set()
        return super().is_set()


def work(common: tuple[Setup, Access, bytes], tasks: Sequence[WrappedTask]) -> Result:
    """Do the tasks; what goes wrong with one is its outcome, and what the node cannot do its refusal."""
    import ray

    setup, access, stop_name = common
    node, stats, stop = ray.get_runtime_context().get_node_id(), KmsStats(), _Stop(stop_name)
    if stop.is_set():
        return Result(node, [], {}, None, stats)
    made: dict[int, Made] = {}
    ready: list[FileTask | SpanTask] = []
    refusal: StreamcryptError | None = None
    if access.protect:
        protect_process()
    try:
        _check_node(setup, access)
        keys = _keys_of(os.getpid(), access)
        stats = keys.stats
        for wrapped in tasks:
            ready.append(_unwrapped(wrapped, keys, access, made))
    except StreamcryptError as error:
        refusal = error
    except (ValueError, ImportError) as error:
        refusal = KeyAccessError(str(error))
    except Exception as error:  # noqa: BLE001  (the outermost loop: the error goes home)
        refusal = unexpected(setup.source.root, error)
    outcomes: list[Outcome] = []
    worker = Worker(setup, stop)
    try:
        for start in range(0, len(ready), BATCH_FILES):
            outcomes += worker.run(ready[start : start + BATCH_FILES])
    except Cancelled:  # nobody waits for what was done
        return Result(node, [], {}, None, stats)
    finally:
        worker.close()
    if setup.durable and isinstance(setup.target, LocalTree):
        outcomes = _flushed(setup.target, ready, outcomes)
    return Result(node, outcomes, made, refusal, stats.take())


def _check_node(setup: Setup, access: Access) -> None:
    """StreamcryptError where this node is no part of the job's world."""
    if access.version != __version__:
        raise StreamcryptError(
            f"streamcrypt {__version__} is installed there, and the job is one of {access.version}"
        )
    for tree in (setup.source, setup.against):
        if isinstance(tree, LocalTree) and not os.path.isdir(tree.root):
            raise SourceError(f"{tree.root}: is not seen there; every node must see it under this name")
    if access.marker is not None:
        assert setup.target is not None
        if not os.path.lexists(setup.target.path(access.marker)):
            raise DestinationError(
                f"{setup.target.root}: is not seen there, or is another folder; every node must see the "
                "destination under this name"
            )


def _flushed(
    target: LocalTree, tasks: Sequence[FileTask | SpanTask], outcomes: list[Outcome]
) -> list[Outcome]:
    """The outcomes, after spans have left this node's page cache: the driver can only flush its own."""
    spans = [task for task in tasks if isinstance(task, SpanTask) and task.temporary is not None]
    failed: dict[str, StreamcryptError] = {}
    with contextlib.closing(target.copy()) as tree:
        for temporary, task in {task.temporary: task for task in spans}.items():
            assert temporary is not None
            assert task.file.target is not None
            try:
                with contextlib.closing(tree.open_part(task.file.target, temporary)) as part:
                    part.flush()
            except StreamcryptError as error:
                failed[temporary] = error
    if not failed:
        return outcomes
    return [
        outcome._replace(error=outcome.error or failed.get(task.temporary or ""))
        if isinstance(task, SpanTask)
        else outcome
        for task, outcome in zip(tasks, outcomes, strict=True)
    ]


def _unwrapped(
    wrapped: WrappedTask, keys: _Keys, access: Access, made: dict[int, Made]
) -> FileTask | SpanTask:
    """The task with its keys; what message it will make is noted in ``made``."""
    task = wrapped.task
    file = task.file if isinstance(task, SpanTask) else task
    opening: Opening | None = None
    sealing: Sealing | None = None
    if wrapped.opening is not None:
        assert keys.reading is not None
        header, geometry = wrapped.opening
        parsed = _header(header)
        key = unlock(parsed, keys.reading, access.rules).content_key
        opening = Opening(header, parsed.message_id, key, geometry, parsed.suite.signed)
    if wrapped.sealing is not None and isinstance(task, SpanTask):
        sealing = _same_message(wrapped.sealing, keys, access)
    elif wrapped.sealing is not None:
        sealing = _own_message(wrapped.sealing, file.length, keys, access)
        made[file.number] = Made(sealing.header, sealing.message_id)
    whole = file._replace(opening=opening, sealing=sealing)
    return task._replace(file=whole) if isinstance(task, SpanTask) else whole


def _same_message(wrapped: Wrapped, keys: _Keys, access: Access) -> Sealing:
    """The message that the driver began, to seal a span of it."""
    assert keys.writing is not None
    assert wrapped.geometry is not None
    header = _header(wrapped.header)
    rules = ReadingRules(max_encrypted_data_keys=None, authenticated_context=access.authenticated_context)
    key = unlock(header, keys.writing, rules).content_key
    return Sealing(header.suite.id, wrapped.header, header.message_id, key, wrapped.geometry)


def _own_message(wrapped: Wrapped, length: int, keys: _Keys, access: Access) -> Sealing:
    """Another message than the driver's, under the same data key."""
    assert keys.writing is not None
    assert wrapped.geometry is not None
    frame_length = wrapped.geometry.frame_length
    header = _header(wrapped.header)
    opened = keys.writing.for_decryption(
        header.suite, {**header.context, **access.authenticated_context}, header.encrypted_data_keys
    )
    kept = keys.begun.get(header.encrypted_data_keys)
    if kept is None or kept[0] is not opened:
        materials = EncryptionMaterials(
            header.suite, opened.context, header.encrypted_data_keys, opened.data_key
        )
        template = header_template(materials, frame_length, access.authenticated_context)
        keys.begun.clear()  # messages come in the order of their data keys
        kept = keys.begun[header.encrypted_data_keys] = (opened, materials, template)
    message = OutgoingMessage.begin(kept[1], kept[2], frame_length)
    return Sealing(
        header.suite.id, message.header, message.message_id, message.content_key, message.geometry(length)
    )


class _Keys(NamedTuple):
    """A process's own way to data keys: one call for each, while it works for one kind of job."""

    reading: Materials | None
    writing: Materials | None
    stats: KmsStats
    begun: dict[tuple[EncryptedDataKey, ...], tuple[DecryptionMaterials, EncryptionMaterials, HeaderTemplate]]


_keys: dict[tuple[Any, ...], _Keys] = {}


def _keys_of(process: int, access: Access) -> _Keys:
    limit = access.rules.max_encrypted_data_keys
    name = (process, access.reading, access.writing, limit, access.cache)
    if name not in _keys:
        _keys.clear()  # another job's data keys are not kept
        stats = KmsStats()
        cache = None if access.cache is None else DataKeyCache(*access.cache)

        def materials(references: tuple[str, ...] | None) -> Materials:
            keyring = decrypting_keyring(list(references) if references is not None else None, stats=stats)
            return Materials(keyring, cache=cache, max_encrypted_data_keys=limit)

        writing = materials(access.writing) if access.writing is not None else None
        _keys[name] = _Keys(materials(access.reading), writing, stats, {})
    return _keys[name]
