"""Key hygiene: no core dump, no swap for keys; a process that is not ours is left alone (RELIABILITY 25)."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from families.processes import child_processes

import streamcrypt as sc
from streamcrypt.engine.pool import ProcessPool
from streamcrypt.engine.worker import Setup
from streamcrypt.storage import LocalTree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is looked at here is Linux's")

REPOSITORY = str(Path(sc.__file__).parents[1])


@pytest.fixture
def cores_allowed() -> Iterator[int]:
    """Children may dump core as far as this user may; the value is that limit."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
        yield before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def python(*words: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        **options,  # type: ignore[call-overload]
    )


def status(pid: int, name: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    return text.partition(f"\n{name}:")[2].partition("\n")[0].strip()


def core_limit(pid: int) -> str:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max core file size"):
            return line.split()[4]
    return "?"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def dumps_core(pid: int) -> bool:
    """Abort a child that runs; whether the kernel dumped it."""
    os.kill(pid, signal.SIGABRT)
    _, found = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(found)
    return os.WCOREDUMP(found)


@pytest.fixture
def key(tmp_path: Path) -> str:
    (tmp_path / "key").write_bytes(os.urandom(32))
    (tmp_path / "key").chmod(0o600)
    return f"raw-aes:test/key@{tmp_path / 'key'}"


def processes(tmp_path: Path, key: str) -> dict[str, subprocess.Popen[bytes]]:
    """The command line that waits for its input, and ``kms serve``."""
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path}
    words = ("-m", "streamcrypt", "encrypt", "-", str(tmp_path / "out"), "--key", key, "--quiet")
    return {
        "encrypt": python(*words, **pipe),
        "kms serve": python("-m", "streamcrypt", "kms", "serve", "--port", "0", **pipe),
    }


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def test_the_command_line_leaves_no_core(tmp_path: Path, home: Path, key: str, cores_allowed: int) -> None:
    hard = cores_allowed
    control = python("-c", "input()", stdin=subprocess.PIPE, cwd=tmp_path)
    assert wait_until(lambda: b"input()" in Path(f"/proc/{control.pid}/cmdline").read_bytes())
    usual = dumps_core(control.pid)
    end(control)
    for path in tmp_path.glob("core*"):
        path.unlink()
    started = processes(tmp_path, key)
    try:
        for name, process in started.items():
            assert wait_until(lambda process=process: core_limit(process.pid) == "0"), name
            if os.geteuid() == 0:  # even where somebody lifts the limit again
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (hard, hard))
                assert core_limit(process.pid) != "0"
            assert not dumps_core(process.pid), name
    finally:
        for process in started.values():
            end(process)
    assert not list(tmp_path.glob("core*"))
    if not usual:
        pytest.skip("THIS SYSTEM DUMPS NO CORE ANYWAY: only the limits were tested")


def test_workers_leave_no_core(tmp_path: Path, cores_allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hard = cores_allowed
    pool = ProcessPool(Setup(LocalTree(str(tmp_path)), None), 2)
    try:
        pids = pool.pids
        for pid in pids:
            assert wait_until(lambda pid=pid: core_limit(pid) == "0")
            if os.geteuid() == 0:
                resource.prlimit(pid, resource.RLIMIT_CORE, (hard, hard))
            os.kill(pid, signal.SIGABRT)
    finally:
        pool.close()
    assert not list(tmp_path.glob("core*"))
    assert not set(pids) & set(child_processes())  # a server of another test may run


PROBE = """
import ctypes, os, resource, sys
PR_GET_DUMPABLE = 3
def state():
    status = open("/proc/self/status").read()
    locked = int(status.partition("VmLck:")[2].split()[0])
    return locked, ctypes.CDLL(None).prctl(PR_GET_DUMPABLE), resource.getrlimit(resource.RLIMIT_CORE)
"""


def probe(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE + code],
        env={**os.environ, "PYTHONPATH": REPOSITORY},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_that_is_not_ours_stays_as_it_is(key: str) -> None:
    """Neither an import nor a call of the library nor the command called as a function changes it."""
    folder = Path(key.partition("@")[2]).parent
    (folder / "plain").write_bytes(b"x")
    code = f"""
before = state()
import streamcrypt as sc
from streamcrypt.cli import main
from streamcrypt.hygiene import lock
key = {key!r}
sc.decrypt_bytes(sc.encrypt_bytes(b"x", keys=key), keys=key)
lock(os.urandom(32))
assert main(["encrypt", "{folder}/plain", "{folder}/out", "--key", key]) == 0
assert state() == before, (before, state())
"""
    probe(code)


def test_a_locked_key_lies_on_locked_pages() -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == 0 and os.geteuid() != 0:
        pytest.skip("THIS USER MAY LOCK NO MEMORY")
    code = """
from streamcrypt.hygiene import lock, protect_process
protect_process()
secret, large = os.urandom(32), os.urandom(3 * 4096)
assert state()[0] == 0
lock(secret)
one = state()[0]
lock(secret)
assert state()[0] == one and 4 <= one <= 8, one
lock(large)
assert 12 <= state()[0] - one <= 16, state()
assert state()[1] == 0 and state()[2][0] == 0, state()
"""
    probe(code)


def test_what_the_system_refuses_is_left_out() -> None:
    """A limit that is used up, or a limit of nothing, is no error."""
    code = """
import _ctypes
from streamcrypt.hygiene import lock, lock_process, protect_process
if os.geteuid() == 0:
    os.setuid(65534)
for limit in (resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], 0):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, 2**23))
    assert lock_process() is False
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (limit, 2**23)
protect_process()
lock(os.urandom(32))
assert state()[0] == 0
"""
    probe(code)


def test_a_server_locks_itself_whole_where_it_may(home: Path, tmp_path: Path, key: str) -> None:
    may = "from streamcrypt.hygiene import lock_process\nprint(lock_process())"
    if probe(may) == "False":
        pytest.skip("THIS USER MAY NOT LOCK A WHOLE PROCESS")
    for name, process in processes(tmp_path, key).items():
        try:
            if name != "kms serve":
                continue
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"http://")
            locked, resident = (int(status(process.pid, of).split()[0]) for of in ("VmLck", "VmRSS"))
            assert locked > resident / 2
        finally:
            end(process)


def test_a_job_locks_its_data_key(tmp_path: Path, home: Path, key: str) -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == 0 and os.geteuid() != 0:
        pytest.skip("THIS USER MAY LOCK NO MEMORY")
    made = processes(tmp_path, key)
    try:
        process = made["encrypt"]
        assert process.stdin is not None
        process.stdin.write(bytes(4 * 2**20))
        process.stdin.flush()
        assert wait_until(lambda: status(process.pid, "VmLck") not in ("", "0 kB"))
        process.communicate(timeout=20)
        assert process.returncode == 0
    finally:
        for process in made.values():
            end(process)
