"""A life of a KMS, as a process that may be killed or lose its power at any moment, and what must be left.

``work`` does it and tells, one line at a time, what it was answered.  ``lost`` opens what is left and
says which of the told things are not there.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from streamcrypt.keys.hierarchy import SqliteBranchKeyTable
from streamcrypt.kms import KmsError, Service
from streamcrypt.kms.store import BRANCH_KEYS_NAME, Store

Tell = Callable[..., object]


def work(home: Path, tell: Tell) -> None:
    """Make keys and change them; the store is opened twice, and its log is moved into the database."""
    service = Service(Store(home))
    first = service.create_key()["KeyMetadata"]["KeyId"]
    seal(service, tell, first)
    service.create_alias(AliasName="alias/ml", TargetKeyId=first)
    tell("alias", "alias/ml", first)
    service.rotate_key_on_demand(KeyId=first)
    seal(service, tell, first)
    service.store.query("PRAGMA wal_checkpoint(RESTART)")
    second = service.create_key(Description="x" * 6000, MultiRegion=True)["KeyMetadata"]["KeyId"]
    seal(service, tell, second)
    service.replicate_key(KeyId=second, ReplicaRegion="eu-west-1")
    tell("replica", second, "eu-west-1")
    service.close()
    service = Service(Store(home))
    branch_keys(home, tell)
    third = service.create_key()["KeyMetadata"]["KeyId"]
    seal(service, tell, third)
    service.disable_key(KeyId=third)
    tell("disabled", third)
    service.close()


def seal(service: Service, tell: Tell, key: str) -> None:
    """Tell of a key what shows that it is there: something that it encrypted."""
    blob = service.encrypt(KeyId=key, Plaintext=key.encode())["CiphertextBlob"]
    tell("key", key, blob.hex())


def branch_keys(home: Path, tell: Tell) -> None:
    table = SqliteBranchKeyTable(home / "kms" / BRANCH_KEYS_NAME)
    rows = [
        {"branch-key-id": "tenant", "type": kind, "enc": b"1"} for kind in ("branch:ACTIVE", "beacon:ACTIVE")
    ]
    table.write(new=rows, replaced=[])
    tell("branch key", "tenant", b"1".hex())
    table.write(new=[], replaced=[rows[0] | {"note": "another"}])
    tell("branch key note", "tenant", "another")


def lost(home: Path, told: Iterable[list[str]]) -> list[Any]:
    """What was told and is not there."""
    service = Service(Store(home))
    missing: list[Any] = []
    (found,) = service.store.query("PRAGMA integrity_check")
    if found != ("ok",):
        missing.append(found)
    for line in sorted(told, key=lambda line: line[0] == "key"):  # which may enable a key to use it
        try:
            if not _is_there(service, home, *line):
                missing.append(line)
        except KmsError as error:
            missing.append((line, str(error)))
    service.close()
    return missing


def _is_there(service: Service, home: Path, kind: str, name: str, value: str = "") -> bool:
    if kind == "key":
        if service.describe_key(KeyId=name)["KeyMetadata"]["KeyState"] == "Disabled":
            service.enable_key(KeyId=name)
        return service.decrypt(CiphertextBlob=bytes.fromhex(value))["Plaintext"] == name.encode()
    if kind == "alias":
        return service.describe_key(KeyId=name)["KeyMetadata"]["KeyId"] == value
    if kind == "replica":
        return value in service.store.key_regions("000000000000", name)
    if kind == "disabled":
        return service.describe_key(KeyId=name)["KeyMetadata"]["KeyState"] == "Disabled"
    row = SqliteBranchKeyTable(home / "kms" / BRANCH_KEYS_NAME).get(name, "branch:ACTIVE")
    if row is None:
        return False
    return row["enc"].hex() == value if kind == "branch key" else row.get("note") == value


def killed_at_statement(number: int, home: Path) -> tuple[bool, list[list[str]]]:
    """Whether the work ended before its ``number``-th statement, at which it is killed; what it told."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            _kill_at_statement(number)
            with os.fdopen(writing, "w") as pipe:
                work(home, lambda *line: print(*line, sep="\t", file=pipe, flush=True))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = [line.rstrip("\n").split("\t") for line in pipe if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0, told


def _kill_at_statement(number: int) -> None:
    connect, left = sqlite3.connect, number

    def count(statement: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(*words: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*words, **options)
        connection.set_trace_callback(count)
        return connection

    sqlite3.connect = counting  # type: ignore[assignment]  # in this process, which ends here


def main() -> None:
    """``python keywork.py HOME``: tells on standard output."""
    work(Path(sys.argv[1]), lambda *line: os.write(1, f"{json.dumps(line)}\n".encode()))


if __name__ == "__main__":
    main()
