"""A piece of work in a process of its own, every system call of which ``strace`` may count, fail or kill."""

from __future__ import annotations

import collections
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from streamcrypt.errors import StreamcryptError

_LINE = re.compile(r"(?:\d+\s+)?(\w+)\(")

FAULTS = {"KILL": "signal=KILL"} | {name: f"error={name}" for name in ("EIO", "ENOSPC", "EDQUOT", "EINTR")}


class Traced:
    """``work`` in a forked child, traced from just before it starts until it ends.

    Exit status: 0 done, 10 refused with one of our errors (or ``refusals``), 11 any other exception.
    """

    def __init__(
        self, work: Callable[[], None], *strace: str, refusals: tuple[type[BaseException], ...] = ()
    ) -> None:
        ready, go = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 11
            try:
                # No other call before the work: strace may be there already.  This one is never tampered with.
                select.select([ready], [], [])
                try:
                    work()
                    status = 0
                except (StreamcryptError, *refusals):
                    status = 10
            finally:
                os._exit(status)
        os.close(ready)
        self._strace = subprocess.Popen(
            ["strace", "-qq", "-p", str(self.pid), *strace],
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        while "TracerPid:\t0" in (status := Path(f"/proc/{self.pid}/status").read_text()):
            assert "State:\tZ" not in status, "the child ended before it was traced"
            time.sleep(0.001)
        os.write(go, b"x")
        os.close(go)

    def wait(self, seconds: float = 30.0) -> int | None:
        """The exit status, negative for a signal; None when it did not end in time."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._strace.wait()
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self._strace.wait()
                return None
            time.sleep(0.001)


def calls_of(
    work: Callable[[], None], calls: tuple[str, ...], log: Path
) -> tuple[collections.Counter[str], list[str]]:
    """How often work that goes well makes each of ``calls``, and the log itself."""
    trace = "trace=" + ",".join(f"?{call}" for call in calls)
    assert Traced(work, "-y", "-o", str(log), "-e", trace).wait() == 0
    lines = log.read_text().splitlines()
    return collections.Counter(match[1] for match in map(_LINE.match, lines) if match), lines


def injection(fault: str, call: str, number: int) -> tuple[str, ...]:
    """strace's options for a fault at the ``number``-th ``call``."""
    return ("-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{FAULTS[fault]}:when={number}")
