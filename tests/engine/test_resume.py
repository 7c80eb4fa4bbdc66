"""A job that was interrupted goes on: nothing is done twice, nothing unproved is taken over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import streamcrypt as sc
from streamcrypt.engine.journal import JOURNAL

# Runs a job that kills its own process when the given number of files is in the journal.
INTERRUPTED = """
import os, signal, sys
import streamcrypt as sc
from streamcrypt.engine.journal import Journal
operation, source, destination, keys, limit = sys.argv[1:]
write, lines = Journal.write, 0
def counting(self):
    global lines
    lines += len(self._lines)
    write(self)
    if lines >= int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
Journal.write = counting
getattr(sc, operation)(source, destination, workers=2, keys=keys)
"""

FILES = 40


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    return f"raw-aes:tests/resume@{path}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for number in range(FILES):
        (folder / "sub" / f"{number:03}").write_bytes(os.urandom(1000 * number))
    return folder


def interrupt(operation: str, source: Path, destination: Path, keys: str, after: int = 10) -> None:
    command = [sys.executable, "-c", INTERRUPTED, operation, str(source), str(destination), keys, str(after)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (destination / JOURNAL).exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_encryption_goes_on(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys)
    with pytest.raises(sc.DestinationError, match="resume"):
        sc.encrypt(source, destination, keys=keys)
    report = sc.encrypt(source, destination, keys=keys, resume=True)
    assert report.skipped >= 10
    assert report.skipped + report.files == FILES
    sc.verify(destination, keys=keys, against=source)
    assert not (destination / JOURNAL).exists()


def test_an_interrupted_decryption_goes_on(source, tmp_path, keys):
    encrypted, destination = tmp_path / "encrypted", tmp_path / "decrypted"
    sc.encrypt(source, encrypted, keys=keys)
    interrupt("decrypt", encrypted, destination, keys)
    report = sc.decrypt(encrypted, destination, keys=keys, resume=True)
    assert report.skipped >= 10
    assert contents(destination) == contents(source)


def test_a_source_that_changed_is_encrypted_again(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys)
    changed = source / "sub" / "003"
    changed.write_bytes(os.urandom(3000))  # the same length
    sc.encrypt(source, destination, keys=keys, resume=True)
    sc.verify(destination, keys=keys, against=source)


def test_a_message_that_was_tampered_with_meanwhile_is_made_again(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys, after=FILES)
    message = bytearray((destination / "sub" / "004").read_bytes())
    message[-1] ^= 1
    (destination / "sub" / "004").write_bytes(message)
    report = sc.encrypt(source, destination, keys=keys, resume=True)
    assert report.files >= 1
    sc.verify(destination, keys=keys, against=source)


def test_a_file_of_somebody_else_is_not_replaced(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys)
    for path in destination.glob("sub/*"):
        path.unlink()
    (destination / JOURNAL).unlink()
    (destination / "sub" / "005").write_bytes(b"mine")
    with pytest.raises(sc.DestinationError, match="did not make it"):
        sc.encrypt(source, destination, keys=keys, resume=True)
    assert (destination / "sub" / "005").read_bytes() == b"mine"


def test_a_decrypted_file_that_was_altered_meanwhile_is_made_again(source, tmp_path, keys):
    encrypted, destination = tmp_path / "encrypted", tmp_path / "decrypted"
    sc.encrypt(source, encrypted, keys=keys)
    interrupt("decrypt", encrypted, destination, keys, after=FILES)
    (destination / "sub" / "006").write_bytes(b"altered")
    sc.decrypt(encrypted, destination, keys=keys, resume=True)
    assert contents(destination) == contents(source)


def test_a_torn_line_is_ignored_and_overwritten(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys)
    with (destination / JOURNAL).open("ab") as file:
        file.write(b'0badc0de {"operation":"encr')
    assert sc.encrypt(source, destination, keys=keys, resume=True).skipped >= 10
    sc.verify(destination, keys=keys, against=source)


def test_with_other_settings_everything_is_made_again(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys, after=FILES)
    report = sc.encrypt(source, destination, keys=keys, resume=True, context={"Stage": "other"})
    assert (report.files, report.skipped) == (FILES, 0)
    sc.verify(destination, keys=keys, context={"Stage": "other"})


def test_the_result_equals_that_of_an_uninterrupted_run(source, tmp_path, keys):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    sc.encrypt(source, whole, keys=keys)
    interrupt("encrypt", source, resumed, keys)
    sc.encrypt(source, resumed, keys=keys, resume=True)
    lengths = [{name: len(data) for name, data in contents(folder).items()} for folder in (whole, resumed)]
    assert lengths[0] == lengths[1]
