"""The same tasks on a Ray cluster: each a whole message, in batches, on any node.

    driver    walks, counts data keys, writes the manifest        keeps: data keys
    worker    reads, seals or opens, publishes                    asks for data keys itself

What must never happen: a plaintext key crosses the network.  A task carries the encrypted data keys
of its message; the worker unwraps them by its own references and its own rights, and draws the
message id itself, so that a task that is done again makes another message.

Source and destination are folders that every node sees under the same name.  A worker or node that
dies gives its tasks back (``Lost``), and the engine starts their messages again, as it does locally;
what did not authenticate is never tried again.  Signed messages stay with the local engine: their
signing key is made with the data key, and would have to travel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from streamcrypt.engine.job import Job, Report
from streamcrypt.engine.pool import Lost, Pool, Tasks
from streamcrypt.engine.run import _Item, _Run
from streamcrypt.engine.spans import BATCH_FILES, FileTask, Opening, Sealing
from streamcrypt.engine.worker import Outcome, Setup, Worker, located, unexpected
from streamcrypt.errors import IntegrityError, KeyAccessError, SourceError, StreamcryptError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.calls import KmsStats
from streamcrypt.keys.keyring import KMS_PROVIDER, Keyring
from streamcrypt.keys.materials import EncryptionMaterials, Materials
from streamcrypt.keys.reference import References, decrypting_keyring
from streamcrypt.message.frames import Geometry
from streamcrypt.message.header import EncryptedDataKey, parse_header
from streamcrypt.message.suites import suite_by_id
from streamcrypt.storage import Entry
from streamcrypt.streams import (
    FrameReader,
    OutgoingMessage,
    ReadingRules,
    header_template,
    source_geometry,
    source_header,
    unlock,
)

# Lists of tasks for each CPU of the cluster: one that is worked on, and one that waits there.
_HELD: Final = 2
_LOCAL_KEY: Final = b":kms:local:"  # in the ARN of a key of the embedded KMS


class WrappedSealing(NamedTuple):
    """How a worker makes a message, without any plaintext key."""

    suite_id: int
    context: Mapping[str, str]
    encrypted_data_keys: tuple[EncryptedDataKey, ...]
    frame_length: int
    authenticated_context: Mapping[str, str]


class WrappedTask(NamedTuple):
    """A FileTask whose keys are wrapped; ``header`` is that of the message to be read."""

    task: FileTask
    header: bytes | None
    geometry: Geometry | None
    sealing: WrappedSealing | None


class Done(NamedTuple):
    """What became of a task, and the header of the message that the worker made."""

    outcome: Outcome
    header: bytes | None


@dataclass(frozen=True, slots=True)
class Access:
    """How a worker comes to data keys: key references, and the rules for messages that are read."""

    reading: tuple[str, ...] | None
    writing: tuple[str, ...] | None
    rules: ReadingRules = field(default_factory=ReadingRules)
    authenticated_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster and what a job may use there; ``stats`` gets the workers' KMS calls too."""

    address: str | None
    reading: References | None
    writing: References | None
    stats: KmsStats

    def run(self, job: Job) -> Report:
        """Do the job on the cluster.

        ValueError for keys that other machines cannot reach, before anything is touched.
        """
        access = Access(
            None if job.reading is None else _travelling(self.reading),
            None if job.writing is None else _travelling(self.writing),
            job.rules,
            dict(job.authenticated_context),
        )
        if job.suite.signed and job.writing is not None:
            raise ValueError(
                "signed messages are made by the local engine: their signing key does not leave the machine; "
                "leave out --sign or --engine ray"
            )
        ray, ours = _connect(self.address)
        try:
            run = _ClusterRun(job, ray, access, self.stats)
            with run:
                if job.operation == "encrypt":
                    run.drive(run.readable(run.entries()), run.seal)
                else:
                    run.drive(run.listed(run.entries()), run.open)
            return run.report
        finally:
            if ours:
                ray.shutdown()


def _travelling(references: References | None) -> tuple[str, ...] | None:
    """The references, if a worker on another machine can use them; ValueError otherwise."""
    if references is None:
        return None
    given = [references] if isinstance(references, str | Keyring) else list(references)
    for reference in given:
        if not isinstance(reference, str):
            raise ValueError("keys for a cluster are key references: a keyring does not travel")
        body, at, _ = reference.partition("@")
        if not at and (body.startswith(("local:", "ecdh:local:")) or _LOCAL_KEY.decode() in body):
            raise ValueError(_local_key(reference))
    return tuple(str(reference) for reference in given)


def _local_key(reference: str) -> str:
    return (
        f"{reference}: a key of this machine's file, which the nodes of a cluster do not reach; start "
        "`streamcrypt kms serve --host ADDRESS` and write local:alias/NAME@http://HOST:PORT"
    )


def _connect(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether we have connected it and so must shut it down."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("the engine ray needs ray: pip install 'streamcrypt[ray]'") from error
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StreamcryptError(f"{address or 'ray'}: no Ray cluster is reached there: {error}") from error
    return ray, True


class _ClusterRun(_Run):
    """A job whose workers are elsewhere."""

    def __init__(self, job: Job, ray: Any, access: Access, stats: KmsStats) -> None:
        super().__init__(job)
        self._ray = ray
        self._access = access
        self._stats = stats

    def seal(self, item: _Item) -> FileTask | None:
        return _undivided(super().seal(item))

    def open(self, item: _Item) -> FileTask | None:
        task = _undivided(super().open(item))
        if task is not None and task.opening is not None and self._access.reading is None:
            _refuse_local_keys(task.opening.header)
        return task

    def _choose_pool(self, sample: list[Entry]) -> Pool:
        job = self.job
        target = job.destination.tree if job.destination is not None else None
        compared = target if job.resume else job.against.tree if job.against is not None else None
        setup = Setup(job.source.tree, target, compared, self._may_replace, job.durable)
        cpus = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self.report.workers = cpus
        self._batch_files = max(1, min(BATCH_FILES, len(sample) // (4 * cpus)))
        return RayPool(self._ray, setup, self._access, cpus, self._stats, self._made)

    def _made(self, number: int, header: bytes) -> None:
        """The worker drew the message id: the manifest is to list its header, not ours."""
        task = self._tasks[number]
        assert task.sealing is not None
        message_id = parse_header(header, max_encrypted_data_keys=None)[0].message_id
        self._tasks[number] = task._replace(
            sealing=task.sealing._replace(header=header, message_id=message_id)
        )

    def _was_published(self, task: FileTask) -> bool:
        """Whether the worker that died had published its message: one under the task's own data key."""
        destination = self.job.destination
        if task.sealing is None or task.target is None or destination is None:
            return super()._was_published(task)
        if not destination.tree.exists(task.target):
            return False
        source = destination.tree.open(task.target)
        try:
            header = source_header(source, max_encrypted_data_keys=None)
            ours = parse_header(task.sealing.header, max_encrypted_data_keys=None)[0]
            if header.encrypted_data_keys != ours.encrypted_data_keys or self.job.writing is None:
                return False
            rules = ReadingRules(
                max_encrypted_data_keys=None, authenticated_context=self.job.authenticated_context
            )
            geometry = source_geometry(source, header)
            FrameReader(source, unlock(header, self.job.writing, rules).cipher, geometry).open_final()
        except (IntegrityError, KeyAccessError, SourceError):
            return False
        finally:
            source.close()
        if geometry.plaintext_length != task.length:
            return False
        self._tasks[task.number] = task
        self._made(task.number, header.serialize())
        return True

    def _retry(self, task: FileTask, reason: str) -> None:
        if self._was_published(task):
            made = self._tasks.pop(task.number, task)
            self._finish_file(made, Outcome(task.number, 0, task.target_length or 0))
        else:
            super()._retry(task, reason)


def _refuse_local_keys(header: bytes) -> None:
    """ValueError where a node would look for a message's key in an embedded KMS of its own."""
    keys = parse_header(header, max_encrypted_data_keys=None)[0].encrypted_data_keys
    local = [key for key in keys if key.provider_id == KMS_PROVIDER and _LOCAL_KEY in key.info]
    if local and len(local) == len(keys):
        raise ValueError(_local_key(local[0].info.decode("utf-8", "replace")))


def _undivided(task: FileTask | None) -> FileTask | None:
    # A span would be sealed again under the same IVs when its worker dies: a message is one task.
    return task._replace(undivided=True) if task is not None else None


class RayPool:
    """Workers as Ray tasks."""

    def __init__(
        self,
        ray: Any,
        setup: Setup,
        access: Access,
        cpus: int,
        stats: KmsStats,
        made: Callable[[int, bytes], None],
    ) -> None:
        self._ray = ray
        # Once for the job, not with every task.
        self._common = ray.put((setup, access))
        # Our own engine repeats what was lost, since it knows what had been published already.
        self._work = ray.remote(num_cpus=1, max_retries=0)(work)
        self._limit = cpus * _HELD
        self._stats = stats
        self._made = made
        self._held: dict[Any, Tasks] = {}

    @property
    def has_room(self) -> bool:
        return len(self._held) < self._limit

    @property
    def busy(self) -> bool:
        return bool(self._held)

    def submit(self, tasks: Tasks) -> None:
        wrapped = [_wrapped(task) for task in tasks if isinstance(task, FileTask)]
        self._held[self._work.remote(self._common, wrapped)] = tasks

    def collect(self) -> list[Outcome | Lost]:
        results: list[Outcome | Lost] = []
        ready, _ = self._ray.wait(list(self._held), num_returns=1)
        for reference in ready:
            tasks = self._held.pop(reference)
            try:
                done, stats = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                results.append(Lost(tasks, f"a worker of the cluster was lost ({reason})"))
                continue
            self._stats.merge(stats)
            for outcome, header in done:
                if header is not None and outcome.error is None:
                    self._made(outcome.number, header)
                results.append(outcome)
        return results

    def close(self, *, cancel: bool = False) -> None:
        if cancel:
            for reference in self._held:
                self._ray.cancel(reference, force=True)
        self._held.clear()


def _wrapped(task: FileTask) -> WrappedTask:
    """The task without its keys."""
    sealing = None
    if task.sealing is not None:
        header, _ = parse_header(task.sealing.header, max_encrypted_data_keys=None)
        sealing = WrappedSealing(
            task.sealing.suite_id,
            dict(header.context),
            header.encrypted_data_keys,
            task.sealing.geometry.frame_length,
            {},
        )
    opening = task.opening
    return WrappedTask(
        task._replace(sealing=None, opening=None),
        opening.header if opening is not None else None,
        opening.geometry if opening is not None else None,
        sealing,
    )


# ---------------------------------------------------------------------------------------------
# On a node


def work(common: tuple[Setup, Access], tasks: Sequence[WrappedTask]) -> tuple[list[Done], KmsStats]:
    """Do the tasks; what goes wrong with one is its outcome.  Also the KMS calls that it took."""
    setup, access = common
    keys = _keys_of(os.getpid(), access)
    worker = Worker(setup)
    done: list[Done] = []
    ready: list[tuple[FileTask, bytes | None]] = []
    try:
        for wrapped in tasks:
            path = setup.source.path(wrapped.task.source)
            try:
                ready.append(_unwrapped(wrapped, keys, access))
            except StreamcryptError as error:
                done.append(Done(Outcome(wrapped.task.number, error=located(error, path)), None))
            except Exception as error:  # noqa: BLE001  (the outermost loop: the error goes home)
                done.append(Done(Outcome(wrapped.task.number, error=unexpected(path, error)), None))
        if ready:
            headers = {task.number: header for task, header in ready}
            outcomes = worker.run([task for task, _ in ready])
            done += [Done(outcome, headers[outcome.number]) for outcome in outcomes]
    finally:
        worker.close()
    return done, keys.stats.take()


def _unwrapped(wrapped: WrappedTask, keys: _Keys, access: Access) -> tuple[FileTask, bytes | None]:
    """The task with its keys, and the header of the message that it will make."""
    opening = sealing = header = None
    if wrapped.header is not None:
        assert keys.reading is not None
        opening = _opening(wrapped.header, wrapped.geometry, keys.reading, access.rules)
    if wrapped.sealing is not None:
        assert keys.writing is not None
        sealing = _sealing(wrapped.sealing, wrapped.task.length, keys.writing, access.authenticated_context)
        header = sealing.header
    return wrapped.task._replace(opening=opening, sealing=sealing), header


def _opening(header: bytes, geometry: Geometry | None, materials: Materials, rules: ReadingRules) -> Opening:
    parsed, _ = parse_header(header, max_encrypted_data_keys=rules.max_encrypted_data_keys)
    key = unlock(parsed, materials, rules).content_key
    return Opening(header, parsed.message_id, key, geometry, parsed.suite.signed)


def _sealing(
    wrapped: WrappedSealing, length: int, materials: Materials, authenticated_context: Mapping[str, str]
) -> Sealing:
    suite = suite_by_id(wrapped.suite_id)
    context = {**wrapped.context, **authenticated_context}
    opened = materials.for_decryption(suite, context, wrapped.encrypted_data_keys)
    own = EncryptionMaterials(suite, opened.context, wrapped.encrypted_data_keys, opened.data_key)
    template = header_template(own, wrapped.frame_length, authenticated_context)
    message = OutgoingMessage.begin(own, template, wrapped.frame_length)
    return Sealing(
        suite.id, message.header, message.message_id, message.content_key, message.geometry(length)
    )


class _Keys(NamedTuple):
    """A process's own way to data keys: one call for each, while it works for one kind of job."""

    reading: Materials | None
    writing: Materials | None
    stats: KmsStats


_keys: dict[tuple[Any, ...], _Keys] = {}


def _keys_of(process: int, access: Access) -> _Keys:
    limit = access.rules.max_encrypted_data_keys
    name = (process, access.reading, access.writing, limit)
    if name not in _keys:
        _keys.clear()  # another job's data keys are not kept
        stats, cache = KmsStats(), DataKeyCache()

        def materials(references: tuple[str, ...] | None) -> Materials:
            keyring = decrypting_keyring(list(references) if references is not None else None, stats=stats)
            return Materials(keyring, cache=cache, max_encrypted_data_keys=limit)

        writing = materials(access.writing) if access.writing is not None else None
        _keys[name] = _Keys(materials(access.reading), writing, stats)
    return _keys[name]
