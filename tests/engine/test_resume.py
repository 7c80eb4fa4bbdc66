"""A job that was interrupted goes on: nothing is done twice, nothing unproved is taken over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import streamcrypt as sc
from streamcrypt.engine import manifest
from streamcrypt.engine.journal import JOURNAL

# Runs a job that kills its own process when the given number of files is in the journal.
INTERRUPTED = """
import os, signal, sys
import streamcrypt as sc
from streamcrypt.engine.journal import Journal
operation, source, destination, keys, limit, overwrite = sys.argv[1:]
write, lines = Journal.write, 0
def counting(self):
    global lines
    lines += len(self._lines)
    write(self)
    if lines >= int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
Journal.write = counting
getattr(sc, operation)(source, destination, workers=2, keys=keys, overwrite=overwrite == "True")
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


def interrupt(
    operation: str, source: Path, destination: Path, keys: str, after: int = 10, *, overwrite: bool = False
) -> None:
    arguments = operation, source, destination, keys, after, overwrite
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments)]
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


def test_a_decryption_that_had_ended_finds_all_of_it_done(source, tmp_path, keys):
    """Nothing in the folder proves what it is, so it is compared; what is equal was done already."""
    sc.encrypt(source, tmp_path / "enc", keys=keys)
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=keys)
    report = sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=keys, resume=True)
    assert (report.files, report.skipped, report.bytes_out) == (0, FILES, 0)


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


# -- a single file


@pytest.mark.parametrize("operation", ["encrypt", "decrypt", "rekey"])
def test_a_single_file_that_is_done_stays_as_it_is(tmp_path, keys, operation):
    source, destination = single(operation, tmp_path, keys)
    options = {**both(operation, keys), "resume": True}
    assert getattr(sc, operation)(source, destination, **options).files == 1
    made = destination.read_bytes()
    report = getattr(sc, operation)(source, destination, **options)
    assert (report.files, report.skipped, destination.read_bytes()) == (0, 1, made)


@pytest.mark.parametrize("operation", ["encrypt", "decrypt", "rekey"])
@pytest.mark.parametrize("what", ["somebody else's", "cut short", "of another source", "of other settings"])
def test_a_single_file_that_is_not_the_jobs_own_is_not_replaced(tmp_path, keys, operation, what):
    source, destination = single(operation, tmp_path, keys)
    plain = b"plain" * 1000 if what in ("cut short", "of other settings") else b"another"
    if operation == "decrypt":
        theirs = plain if what != "of other settings" else plain[::-1]  # it has none: of the same length
    else:
        context = {"of": "others"} if what == "of other settings" else {}
        theirs = sc.encrypt_bytes(plain, keys=keys, context=context)
    theirs = {"somebody else's": b"theirs", "cut short": theirs[:-1]}.get(what, theirs)
    destination.write_bytes(theirs)
    with pytest.raises(sc.DestinationError, match="exists already"):
        getattr(sc, operation)(source, destination, **both(operation, keys), resume=True)
    assert destination.read_bytes() == theirs
    getattr(sc, operation)(source, destination, **both(operation, keys), resume=True, overwrite=True)
    assert destination.read_bytes() != theirs


def both(operation: str, keys: str) -> dict[str, str]:
    return {"keys": keys, "from_keys": keys} if operation == "rekey" else {"keys": keys}


def single(operation: str, tmp_path: Path, keys: str) -> tuple[Path, Path]:
    source = tmp_path / "source"
    source.write_bytes(
        b"plain" * 1000 if operation == "encrypt" else sc.encrypt_bytes(b"plain" * 1000, keys=keys)
    )
    return source, tmp_path / "made"


# -- a folder that is finished


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.parametrize("operation", ["encrypt", "rekey"])
def test_a_finished_folder_is_found_done(source, tmp_path, keys, operation):
    if operation == "rekey":
        sc.encrypt(source, tmp_path / "first", keys=keys)
        source = tmp_path / "first"
    (source / "empty").mkdir()
    destination = tmp_path / "made"
    first = getattr(sc, operation)(source, destination, **both(operation, keys))
    before = inodes(destination)
    report = getattr(sc, operation)(source, destination, **both(operation, keys), resume=True)
    assert (report.files, report.skipped) == (0, FILES)
    assert report.manifest_digest == first.manifest_digest
    assert inodes(destination) == before
    # A copy is new to the system: everything in it is looked into, and found done all the same.
    shutil.copytree(destination, tmp_path / "copy")
    report = getattr(sc, operation)(source, tmp_path / "copy", **both(operation, keys), resume=True)
    assert (report.files, report.skipped) == (0, FILES)


@pytest.mark.parametrize("what", ["changed", "gone", "new", "settings", "keys", "another"])
def test_a_finished_folder_of_other_sources_or_settings_is_refused(source, tmp_path, keys, what):
    destination = tmp_path / "encrypted"
    sc.encrypt(source, destination, keys=keys)
    before, options = inodes(destination), {"keys": keys}
    if what == "changed":
        (source / "sub" / "003").write_bytes(os.urandom(3000))
    elif what == "gone":
        (source / "sub" / "003").unlink()
    elif what == "new":
        (source / "new").write_bytes(b"new")
    elif what == "settings":
        options["context"] = {"Stage": "other"}
    elif what == "keys":
        (tmp_path / "other").write_bytes(os.urandom(32))
        (tmp_path / "other").chmod(0o600)
        options["keys"] = [keys, f"raw-aes:tests/other@{tmp_path / 'other'}"]
    else:
        source = tmp_path / "another"
        source.mkdir()
        (source / "a").write_bytes(b"a")
    with pytest.raises(sc.DestinationError, match="holds a finished job") as caught:
        sc.encrypt(source, destination, resume=True, **options)
    assert "\n" not in str(caught.value)
    assert inodes(destination) == before
    sc.encrypt(source, destination, resume=True, overwrite=True, **options)


@pytest.mark.parametrize("block", [2, 256])  # lines of the manifest that are held against the folder at once
@pytest.mark.parametrize("what", ["swapped", "end flipped", "removed", "added", "truncated"])
def test_a_finished_folder_that_was_altered_is_not_found_done(
    source, tmp_path, keys, monkeypatch, what, block
):
    monkeypatch.setattr(manifest, "_BLOCK_LINES", block)
    destination = tmp_path / "encrypted"
    for number in (4, 5):
        (source / "sub" / f"{number:03}").write_bytes(os.urandom(4000))
    sc.encrypt(source, destination, keys=keys)
    four, five = destination / "sub" / "004", destination / "sub" / "005"
    if what == "swapped":
        four.rename(destination / "x")
        five.rename(four)
        (destination / "x").rename(five)
    elif what == "end flipped":
        status, message = four.stat(), bytearray(four.read_bytes())
        message[-1] ^= 1
        four.write_bytes(message)
        os.utime(four, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif what == "removed":
        four.unlink()
    elif what == "added":
        (destination / "added").write_bytes(four.read_bytes())
    else:
        os.truncate(four, 100)
    with pytest.raises(sc.IntegrityError, match=r"sub/00[45]|added") as caught:
        sc.encrypt(source, destination, keys=keys, resume=True)
    altered = {"swapped": {"sub/004", "sub/005"}, "added": {"added"}, "end flipped": {"sub/004"}}
    assert {failure.path for failure in caught.value.report.failed} == altered.get(what, {"sub/004"})


def test_a_manifest_that_does_not_say_what_it_was_made_of_still_serves(source, tmp_path, keys, monkeypatch):
    """As earlier versions wrote them, and as one is of a job in which files failed."""
    destination = tmp_path / "encrypted"
    with monkeypatch.context() as patch:
        patch.setattr(manifest.ManifestWriter, "publish", without_sources)
        sc.encrypt(source, destination, keys=keys)
    sc.verify(destination, keys=keys, against=source)
    sc.decrypt(destination, tmp_path / "out", keys=keys)
    with pytest.raises(sc.DestinationError, match="holds a finished job"):
        sc.encrypt(source, destination, keys=keys, resume=True)


def without_sources(self, sources=None, *, publish=manifest.ManifestWriter.publish):
    publish(self, None)


def test_an_overwriting_job_that_was_interrupted_is_not_taken_for_finished(source, tmp_path, keys):
    """The manifest of before is there, but not what it lists."""
    destination = tmp_path / "encrypted"
    sc.encrypt(source, destination, keys=keys)
    interrupt("encrypt", source, destination, keys, after=1, overwrite=True)
    with (destination / JOURNAL).open("rb+") as file:
        file.truncate(len(file.readline()))  # its first batch of lines did not get there
    report = sc.encrypt(source, destination, keys=keys, resume=True)
    assert report.files > 0
    sc.verify(destination, keys=keys, against=source)


# -- what a journal is worth


def test_files_without_their_line_in_the_journal_are_looked_into(source, tmp_path, keys):
    """Killed between the name and the line: they are made again, and one that is somebody else's stays."""
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys, after=FILES)
    lines = (destination / JOURNAL).read_bytes().splitlines(keepends=True)
    (destination / JOURNAL).write_bytes(b"".join(lines[:-1]))
    report = sc.encrypt(source, destination, keys=keys, resume=True)
    assert report.files > 0
    assert report.skipped > 0
    sc.verify(destination, keys=keys, against=source)


def test_a_journal_that_somebody_else_altered_is_not_believed(source, tmp_path, keys):
    """Messages that were swapped together with their lines: each authenticates, and is listed."""
    for number in (6, 7):
        (source / "sub" / f"{number:03}").write_bytes(os.urandom(4000))
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys, after=FILES)
    six, seven, journal = destination / "sub" / "006", destination / "sub" / "007", destination / JOURNAL
    six.rename(destination / "x")
    seven.rename(six)
    (destination / "x").rename(seven)
    altered = [forged(line, source, destination) for line in journal.read_bytes().splitlines(keepends=True)]
    assert b"".join(altered) != journal.read_bytes(), "both stand in one line"
    journal.write_bytes(b"".join(altered))
    sc.encrypt(source, destination, keys=keys, resume=True)
    sc.verify(destination, keys=keys, against=source)


def forged(line: bytes, source: Path, destination: Path) -> bytes:
    """The line as it would be, had 006 been made of 007 and 007 of 006, with a checksum that anybody can make."""
    if b"header" in line[:200]:
        return line
    tag, _, text = line.partition(b" ")
    when, rows = json.loads(text)
    by_name = {row[0]: row for row in rows}
    for name, other in (("sub/006", "sub/007"), ("sub/007", "sub/006")):
        if name in by_name and other in by_name:
            status = (source / name).stat()
            row = [name, [status.st_size, status.st_mtime_ns, status.st_ino], *by_name[other][2:]]
            rows = [row if old[0] == name else old for old in rows]
    return b"%s %s\n" % (tag, json.dumps([when, rows]).encode())


def test_a_finished_file_that_changed_and_looks_as_before_is_looked_into(source, tmp_path, keys):
    """Length, time and inode are as they were; the time of the last change is not anybody's to set."""
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys, after=FILES)
    path = destination / "sub" / "004"
    status, message = path.stat(), bytearray(path.read_bytes())
    message[-1] ^= 1
    path.write_bytes(message)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sc.encrypt(source, destination, keys=keys, resume=True).files >= 1
    sc.verify(destination, keys=keys, against=source)


def test_a_finished_file_whose_source_is_gone_is_told(source, tmp_path, keys):
    destination = tmp_path / "encrypted"
    interrupt("encrypt", source, destination, keys, after=FILES)
    (source / "sub" / "004").unlink()
    with pytest.raises(sc.SourceError, match=r"sub/004.*interrupted job") as caught:
        sc.encrypt(source, destination, keys=keys, resume=True)
    assert len(caught.value.report.failed) == 1
    assert (destination / "sub" / "004").exists(), "nothing is lost"
    (destination / "sub" / "004").unlink()
    sc.encrypt(source, destination, keys=keys, resume=True)
    sc.verify(destination, keys=keys, against=source)
    assert not (destination / JOURNAL).exists()
