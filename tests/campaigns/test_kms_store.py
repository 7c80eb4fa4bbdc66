"""The embedded KMS's database: every system call of its life failed (RELIABILITY 31).

Kills and power loss: test_kms_durability.py.

A key that was returned to a caller is never lost: its wrapped data keys open whatever happened after.
"""

from __future__ import annotations

import collections
import os
import shutil
from pathlib import Path

import pytest
from families.traced import Traced, calls_of, injection

from streamcrypt.kms import KmsError
from streamcrypt.kms.service import Service
from streamcrypt.kms.store import Store

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(0),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]

CALLS = (
    "openat", "close", "fstat", "newfstatat", "statx", "fcntl", "ftruncate", "fallocate", "pread64", "pwrite64",
    "read", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir", "mmap", "munmap", "lseek", "fchmod",
)  # fmt: skip
KEYS = 3


def use_a_store(home: Path, returned: int):
    """Make a store with a few keys; write down each one, with something it wrapped, once it was returned.

    Written with a call that is not tampered with.
    """

    def work():
        service = Service(Store(home))
        for _ in range(KEYS):
            key = service.create_key()["KeyMetadata"]["KeyId"]
            blob = service.encrypt(KeyId=key, Plaintext=key.encode())["CiphertextBlob"]
            os.writev(returned, (f"{key} {blob.hex()}\n".encode(),))
        service.create_alias(AliasName="alias/one", TargetKeyId=key)
        service.close()

    return work


def violated(home: Path, returned: Path) -> str | None:
    """What does not hold of a store after a fault, or None."""
    keys = [line.split() for line in returned.read_text().splitlines()]
    try:
        service = Service(Store(home))
    except BaseException as error:
        return f"{len(keys)} keys were returned, and the store does not open: {type(error).__name__}: {error}"
    try:
        if service.store.query("PRAGMA integrity_check")[0][0] != "ok":
            return "SQLite finds the database damaged"
        for key, blob in keys:
            if service.decrypt(CiphertextBlob=bytes.fromhex(blob))["Plaintext"] != key.encode():
                return f"{key} opens to something else"
        service.encrypt(KeyId=service.create_key()["KeyMetadata"]["KeyId"], Plaintext=b"x")
    except BaseException as error:
        return f"a key is lost: {type(error).__name__}: {error}"
    finally:
        service.close()
    return None


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC"])
def test_every_system_call_of_a_store(campaign, tmp_path, fault):
    run = campaign("31")
    with open(os.devnull, "wb") as nowhere:
        use_a_store(tmp_path / "warm", nowhere.fileno())()  # modules that are loaded when they are needed
        work = use_a_store(tmp_path / "counted", nowhere.fileno())
        counts, _ = calls_of(work, CALLS, tmp_path / "log")
    sites = [(call, number) for call, count in sorted(counts.items()) for number in range(1, count + 1)]
    step = max(1, len(sites) // run.number(len(sites)))
    statuses = collections.Counter()
    for at, (call, number) in enumerate(sites[::step]):
        home, returned = tmp_path / f"home{at}", tmp_path / f"returned{at}"
        with returned.open("ab") as file:
            work = use_a_store(home, file.fileno())
            status = Traced(work, *injection(fault, call, number), refusals=(KmsError,)).wait()
        statuses[str(status)] += 1
        failure = violated(home, returned)
        whole = len(returned.read_text().splitlines()) == KEYS
        if status is None:
            failure = failure or "hangs"
        elif status == 0 and not whole:
            failure = failure or "success was reported of work that was not done"
        elif status == 11:
            failure = failure or "an exception that is none of ours"
        run.trial(
            f"{fault} at {call} {number}: {failure}" if failure else None,
            call=call, number=number, fault=fault, status=status,
        )  # fmt: skip
        shutil.rmtree(home, ignore_errors=True)
        returned.unlink()
    run.notes = {"fault": fault, "statuses": dict(statuses), "calls": dict(counts)}
    run.finish()
