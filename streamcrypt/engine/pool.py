"""Tasks to workers: threads of this process, or processes of their own.

    submit(tasks)     hand a list of tasks to the least busy worker; ``has_room`` first
    collect()         wait, and return what has become of some lists

Threads serve few or large files: `cryptography` and the kernel work without the interpreter's lock.  Where the
interpreter's part is the larger one, a single thread works in turns with the one that collects.
Processes serve many small files, whose cost is the interpreter's own; they start in 0.2 s, so a job
must be worth that (benchmarks/README.md, "threads or processes").

A worker process is started anew (never forked), gets its tasks through its own socket, and dies with
this process.  One that dies takes at most the lists that it held: they come back as lost, and
another worker takes its place.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias

from streamcrypt.engine.spans import Tasks
from streamcrypt.engine.worker import Cancelled, Outcome, Setup, SmallOutcome, Worker
from streamcrypt.errors import StreamcryptError
from streamcrypt.system import c_call
from streamcrypt.tuples import NamedTuple

# What only processes need is imported where they are made: a small job runs in threads, and must not
# wait for it (benchmarks/README.md, "start-up").

# Lists that a worker holds: the one that it works on, and one more so that it need not wait for it.
_HELD: Final = 2
_PACKAGE_ROOT: Final = os.path.realpath(f"{__file__}/../../..")


class Lost(NamedTuple):
    """Tasks that were with a worker when it died."""

    tasks: Tasks
    reason: str


Taken: TypeAlias = Outcome | SmallOutcome | Lost


class Pool(Protocol):
    """What the engine needs of workers."""

    @property
    def has_room(self) -> bool: ...

    @property
    def busy(self) -> bool: ...

    def submit(self, tasks: Tasks) -> None: ...

    def collect(self) -> list[Taken]: ...

    def close(self, *, cancel: bool = False) -> None:
        """Stop the workers; with ``cancel`` in the middle of what they do."""


class ThreadPool:
    """Workers as threads of this process.

    ``in_turns``: one list at a time, so that who collects and who works never want the interpreter's lock both.
    """

    def __init__(self, setup: Setup, workers: int, *, in_turns: bool = False) -> None:
        self._tasks: queue.SimpleQueue[Tasks | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Taken]] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._limit = 1 if in_turns else workers * _HELD
        self._in_flight = 0
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(Worker(setup, self._cancelled),),
                name=f"streamcrypt-{n}",
                daemon=True,  # an interrupt while they start leaves nobody to stop them
            )
            for n in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_room(self) -> bool:
        return self._in_flight < self._limit

    @property
    def busy(self) -> bool:
        return self._in_flight > 0

    def submit(self, tasks: Tasks) -> None:
        self._in_flight += 1
        self._tasks.put(tasks)

    def collect(self) -> list[Taken]:
        results = self._results.get()
        self._in_flight -= 1
        return results

    def close(self, *, cancel: bool = False) -> None:
        if cancel:
            self._cancelled.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, worker: Worker) -> None:
        try:
            while (tasks := self._tasks.get()) is not None:
                if self._cancelled.is_set():
                    continue
                try:
                    self._results.put(list[Taken](worker.take(tasks)))
                except Cancelled:
                    return
                except BaseException as error:  # noqa: BLE001  (a thread that dies must not leave the job waiting)
                    self._results.put([Lost(tasks, f"{type(error).__name__}: {error}")])
        finally:
            worker.close()


class _Channel:
    """Objects through a socket, each pickled, after its length.

    What multiprocessing's Connection does too, whose import takes a worker as long as all the others
    together (benchmarks/README.md, "small files").

    Where the descriptor does not block, what the other end has sent is taken while it takes nothing: with two
    ends that both wait for the other to read, neither would ever do.
    """

    _LENGTH: Final = 8

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def send(self, value: object, meanwhile: Callable[[], None] | None = None) -> None:
        """Send an object; ``meanwhile`` receives one."""
        import pickle

        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        rest = memoryview(len(data).to_bytes(self._LENGTH, "big") + data)
        while rest:
            try:
                rest = rest[os.write(self.descriptor, rest) :]
            except BlockingIOError:
                if self._may_read(or_write=True) and meanwhile is not None:
                    meanwhile()

    def receive(self) -> Any:
        """The next object; EOFError when the other end is closed."""
        import pickle

        length = int.from_bytes(self._read(self._LENGTH), "big")
        return pickle.loads(self._read(length))  # noqa: S301  (from the process that we started, or were started by)

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                part = os.read(self.descriptor, length - len(data))
            except BlockingIOError:
                self._may_read()
                continue
            if not part:
                raise EOFError
            data += part
        return data

    def _may_read(self, *, or_write: bool = False) -> bool:
        """Wait until the descriptor can be read, or written to; whether it can be read."""
        import select

        ready = select.poll()
        ready.register(self.descriptor, select.POLLIN | (select.POLLOUT if or_write else 0))
        return bool(ready.poll()[0][1] & select.POLLIN)

    def close(self) -> None:
        os.close(self.descriptor)


class _Process:
    """One worker process and the lists that it holds."""

    def __init__(self, setup: Setup) -> None:
        import socket
        import subprocess

        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path.insert(0, {_PACKAGE_ROOT!r}); from streamcrypt.engine.pool import serve; serve()"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the parent, which tells its workers to stop
            )
        ours.setblocking(False)
        self.channel = _Channel(ours.detach())
        self.held: deque[Tasks] = deque()
        self.delivered = False
        with contextlib.suppress(OSError):  # one that has died already is noticed in collect
            self.channel.send(setup)

    def stop(self, *, kill: bool) -> None:
        with contextlib.suppress(OSError):
            self.channel.close()  # the worker reads the end of its input and leaves
        if kill:
            self.process.kill()
        self.process.wait()


class ProcessPool:
    """Workers as processes."""

    # More deaths than this of workers that never gave a result: they cannot start at all.
    _DEATHS: Final = 5

    def __init__(self, setup: Setup, workers: int) -> None:
        self._setup = setup
        self._deaths = 0
        self._arrived: list[Taken] = []  # while something was sent
        self._processes = [_Process(setup) for _ in range(workers)]

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._processes]

    @property
    def has_room(self) -> bool:
        return any(len(worker.held) < _HELD for worker in self._processes)

    @property
    def busy(self) -> bool:
        return bool(self._arrived) or any(worker.held for worker in self._processes)

    def submit(self, tasks: Tasks) -> None:
        worker = min(self._processes, key=lambda worker: len(worker.held))
        worker.held.append(tasks)
        # A worker that has died is noticed in collect, where its lists come back.
        with contextlib.suppress(EOFError, OSError):
            worker.channel.send(tasks, lambda: self._arrived.extend(self._receive(worker)))

    def collect(self) -> list[Taken]:
        import select

        results, self._arrived = self._arrived, []
        if results:
            return results
        by_descriptor = {worker.channel.descriptor: worker for worker in self._processes if worker.held}
        ready = select.poll()
        for descriptor in by_descriptor:
            ready.register(descriptor, select.POLLIN)
        for descriptor, _ in ready.poll():
            worker = by_descriptor[descriptor]
            try:
                results += self._receive(worker)
            except (EOFError, OSError):
                results += self._replace(worker)
        return results

    def _receive(self, worker: _Process) -> list[Taken]:
        outcomes: list[Taken] = worker.channel.receive()
        worker.held.popleft()
        worker.delivered = True
        self._deaths = 0
        return outcomes

    def close(self, *, cancel: bool = False) -> None:
        for worker in self._processes:
            worker.stop(kill=cancel)

    def _replace(self, worker: _Process) -> list[Lost]:
        worker.stop(kill=True)
        code = worker.process.returncode
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._deaths += not worker.delivered
        if self._deaths > self._DEATHS:
            raise StreamcryptError(f"worker processes die one after the other ({reason}); nothing was lost")
        self._processes[self._processes.index(worker)] = _Process(self._setup)
        return [Lost(tasks, f"a worker process died ({reason})") for tasks in worker.held]


def serve() -> None:
    """The main function of a worker process; its argument is the descriptor of its socket."""
    import gc

    from streamcrypt.hygiene import protect_process

    protect_process()
    _die_with_parent()
    gc.freeze()  # the collector need not look through what was imported, again and again
    channel = _Channel(int(sys.argv[1]))
    try:
        worker = Worker(channel.receive())
        while True:
            channel.send(worker.take(channel.receive()))
    except (EOFError, ConnectionError):
        pass  # the parent has closed its end: done, or gone


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        parent = os.getppid()
        c_call("prctl", pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
