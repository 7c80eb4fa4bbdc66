"""A job onto an object store that was interrupted goes on: nothing is done twice, nothing unproved is taken over."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from families.s3 import Bucket, MiB

import streamcrypt as sc
from streamcrypt.cli import diagnosis, main
from streamcrypt.engine.journal import JOURNAL
from streamcrypt.engine.run import _Run

FILES = 24

# Runs a job that kills its own process when the given number of files is in the journal.
INTERRUPTED = """
import os, signal, sys
import streamcrypt as sc
from streamcrypt.engine import journal
operation, source, destination, keys, limit = sys.argv[1:]
journal._FLUSH_INTERVAL = journal._FLUSH_SHARE = 0.0
journal._BLOCK = 3  # rows of a line
write, lines = journal.StoreJournal.write, 0
def counting(self, **options):
    global lines
    lines += len(self._lines)
    write(self, **options)
    if lines >= int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
journal.StoreJournal.write = counting
getattr(sc, operation)(source, destination, workers=2, keys=keys)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    for number in range(FILES):
        (folder / "sub" / f"{number:03}").write_bytes(random.Random(number).randbytes(1000 * number))
    (folder / "sub-").write_bytes(b"listed by a store before what is in sub")
    return folder


def interrupt(operation: str, source: Path | str, destination: str, keys: str, after: int = 8) -> None:
    command = [sys.executable, "-c", INTERRUPTED, operation, str(source), destination, keys, str(after)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr


def parts(bucket: Bucket) -> list[str]:
    return [name for name in bucket.names() if f"/{JOURNAL}/" in name]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_encryption_goes_on(bucket: Bucket, key: str, source: Path) -> None:
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key)
    assert parts(bucket)
    with pytest.raises(sc.DestinationError, match="resume goes on with it"):
        sc.encrypt(source, url, keys=key)
    report = sc.encrypt(source, url, keys=key, resume=True)
    assert report.skipped >= 8
    assert report.skipped + report.files == FILES + 1
    assert not parts(bucket)
    assert sc.verify(url, against=source).files == FILES + 1
    sc.encrypt(source, f"{bucket.url}/whole", keys=key)
    lengths = [
        {name[len(folder) :]: len(bucket.get(name)) for name in bucket.names() if name.startswith(folder)}
        for folder in ("enc/", "whole/")
    ]
    assert lengths[0] == lengths[1]


def test_what_is_taken_over_stands_in_the_manifest_as_if_nothing_had_been_interrupted(
    bucket: Bucket, key: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamcrypt.stores._PAGE", 4)
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key, after=FILES + 1)
    (source / "nothing in it").mkdir()
    (source / "sub" / "0005").write_bytes(b"new")
    (source / "sub" / "009").write_bytes(b"another")
    bucket.delete("enc/sub/017")
    report = sc.encrypt(source, url, keys=key, resume=True)
    assert (report.files, report.skipped) == (3, FILES + 1 - 2)
    sc.encrypt(source, f"{bucket.url}/whole", keys=key)
    manifests = [
        [
            json.loads(line)
            for line in sc.decrypt_bytes(bucket.get(f"{name}/_streamcrypt/manifest")).splitlines()
        ]
        for name in ("enc", "whole")
    ]
    for lines in manifests:
        for line in lines:
            for drawn in ("message_id", "header_tag", "time"):
                line.pop(drawn, None)
    assert manifests[0] == manifests[1]
    assert sc.verify(url, against=source).files == FILES + 2
    assert sc.encrypt(source, url, keys=key, resume=True).skipped == FILES + 2  # by the digest of its sources


def test_the_newest_of_what_the_journal_tells_of_a_file_counts(
    bucket: Bucket, key: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job is broken off too, after it has made some files of the first anew."""
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key, after=FILES + 1)
    for name in ("003", "004", "020"):
        (source / "sub" / name).write_bytes(b"new " + name.encode())

    def broken_off(run: _Run, destination: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_finish", broken_off)
        with pytest.raises(KeyboardInterrupt):
            sc.encrypt(source, url, keys=key, resume=True)
    (source / "sub" / "004").write_bytes(b"newer")
    report = sc.encrypt(source, url, keys=key, resume=True)
    assert (report.files, report.skipped) == (1, FILES)
    assert sc.verify(url, against=source).files == FILES + 1


def test_what_the_interrupted_job_made_of_a_file_that_is_gone_is_told(
    bucket: Bucket, key: str, source: Path
) -> None:
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key, after=FILES + 1)
    for name in ("000", "010"):  # the first of a line of the journal, and one within
        (source / "sub" / name).unlink()
    with pytest.raises(sc.SourceError, match="not among the files any more") as caught:
        sc.encrypt(source, url, keys=key, resume=True)
    assert sorted(failure.path for failure in caught.value.report.failed) == ["sub/000", "sub/010"]  # type: ignore[attr-defined]


def test_finding_what_is_done_takes_no_request_for_each_file(bucket: Bucket, key: str, source: Path) -> None:
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key, after=FILES + 1)
    bucket.proxy.requests.clear()
    report = sc.encrypt(source, url, keys=key, resume=True)
    assert (report.files, report.skipped) == (0, FILES + 1)
    of_files = [path for _, path, _ in bucket.proxy.requests if "/sub" in path]
    assert of_files == []


def test_an_interrupted_decryption_and_a_rekeying_go_on(
    bucket: Bucket, key: str, source: Path, tmp_path: Path
) -> None:
    sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    interrupt("decrypt", f"{bucket.url}/enc", f"{bucket.url}/plain", key)
    bucket.put("plain/sub/000", b"altered meanwhile")
    start, _, _ = bucket.get(parts(bucket)[0]).partition(b" ")[2].partition(b"\n")
    columns = [["sub/000"], [0], [0], [0], [0], [0], [""]]
    forged = (
        [*columns, -50, 0],  # the next block would begin before this one
        [*columns, 0, 0],  # without a line
        [*columns[:-1], [], 0, 0],
        [*columns[1:], columns[0], 3, 3],
    )
    texts = [start + b"\n" + json.dumps(block).encode() + b"\n[]\n[]\n" for block in forged]
    texts = [b"%08x %s" % (zlib.crc32(text), text) for text in texts]
    for number, part in enumerate([b"", b"\n", b"[1]\n", os.urandom(50), *texts]):
        bucket.put(f"plain/{JOURNAL}/{number}", part)  # what others put there is passed over
    report = sc.decrypt(f"{bucket.url}/enc", f"{bucket.url}/plain", resume=True)
    assert report.skipped >= 7
    for name, data in contents(source).items():
        assert bucket.get(f"plain/{name}") == data
    interrupt("rekey", f"{bucket.url}/enc", f"{bucket.url}/again", key)
    assert sc.rekey(f"{bucket.url}/enc", f"{bucket.url}/again", keys=key, resume=True).skipped >= 8
    assert sc.verify(f"{bucket.url}/again", against=source).files == FILES + 1
    assert not parts(bucket)


@pytest.mark.parametrize("in_a_store", [False, True])
def test_a_source_that_changed_is_encrypted_again(
    bucket: Bucket, key: str, source: Path, in_a_store: bool
) -> None:
    place: Path | str = source
    if in_a_store:
        place = f"{bucket.url}/source"
        for name, data in contents(source).items():
            bucket.put(f"source/{name}", data)
    interrupt("encrypt", place, f"{bucket.url}/enc", key, after=FILES + 1)
    (source / "sub" / "003").write_bytes(os.urandom(3000))  # the same length
    if in_a_store:
        bucket.put("source/sub/003", (source / "sub" / "003").read_bytes())
    report = sc.encrypt(place, f"{bucket.url}/enc", keys=key, resume=True)
    assert (report.files, report.skipped) == (1, FILES)
    sc.verify(f"{bucket.url}/enc", against=source)


def test_what_was_altered_or_swapped_or_lost_meanwhile_is_made_again(
    bucket: Bucket, key: str, source: Path
) -> None:
    interrupt("encrypt", source, f"{bucket.url}/enc", key, after=FILES + 1)
    message = bytearray(bucket.get("enc/sub/004"))
    message[-1] ^= 1
    bucket.put("enc/sub/004", bytes(message))
    bucket.put("enc/sub/006", bucket.get("enc/sub/005"))
    bucket.delete("enc/sub/007")
    report = sc.encrypt(source, f"{bucket.url}/enc", keys=key, resume=True)
    assert (report.files, report.skipped) == (3, FILES + 1 - 3)
    sc.verify(f"{bucket.url}/enc", against=source)


def test_a_journal_that_somebody_else_wrote_is_not_believed(
    bucket: Bucket, key: str, source: Path, tmp_path: Path
) -> None:
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key, after=FILES + 1)
    real = parts(bucket)
    contents = [sc.decrypt_bytes(bucket.get(name)) for name in real]
    blocks = [json.loads(line) for text in contents for line in text.splitlines() if line.startswith(b"[[")]
    assert sorted(name for names, *_ in blocks for name in names) == sorted(
        ["sub-", *(f"sub/{number:03}" for number in range(FILES))]
    )
    for name in real:
        bucket.delete(name)
    bucket.put(f"enc/{JOURNAL}/", b"")
    bucket.put(f"enc/{JOURNAL}/-", os.urandom(100))
    # In clear, and as files that somebody got encrypted under the same key.
    for number, lines in enumerate(contents):
        bucket.put(f"enc/{JOURNAL}/clear-{number}", lines)
        bucket.put(f"enc/{JOURNAL}/message-{number}", sc.encrypt_bytes(lines, keys=key))
    report = sc.encrypt(source, url, keys=key, resume=True)
    assert (report.files, report.skipped) == (FILES + 1, 0)
    sc.verify(url, against=source)


def test_an_object_of_somebody_else_is_not_replaced(bucket: Bucket, key: str, source: Path) -> None:
    interrupt("encrypt", source, f"{bucket.url}/enc", key)
    for name in parts(bucket):
        bucket.delete(name)
    bucket.put("enc/sub/005", b"mine")
    with pytest.raises(sc.DestinationError, match="did not make it"):
        sc.encrypt(source, f"{bucket.url}/enc", keys=key, resume=True)
    assert bucket.get("enc/sub/005") == b"mine"


def test_with_other_settings_everything_is_made_again(bucket: Bucket, key: str, source: Path) -> None:
    url = f"{bucket.url}/enc"
    interrupt("encrypt", source, url, key, after=FILES + 1)
    context = {"Stage": "other"}
    report = sc.encrypt(source, url, keys=key, resume=True, context=context)
    assert (report.files, report.skipped) == (FILES + 1, 0)
    sc.verify(url, against=source, context=context)


def test_open_uploads_of_the_resumed_job_are_aborted_from_another_machine(
    bucket: Bucket,
    key: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source / "large").write_bytes(bytes(17 * MiB))
    url = f"{bucket.url}/enc"
    begun = threading.Event()

    def never_completed(method: str, path: str) -> int | None:
        """The upload stays open while the other files are done, after which the job is killed."""
        if method == "POST" and "enc/large?uploadId=" in path:
            begun.set()
            return 503
        if method == "PUT" and "/enc/sub" in path:
            begun.wait(30)
        return None

    bucket.proxy.fault = never_completed
    interrupt("encrypt", source, url, key, after=FILES + 1)
    bucket.proxy.fault = lambda method, path: None
    assert bucket.uploads() == ["enc/large"]
    record = next(name for name in bucket.names() if "/uploads/" in name)
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key="enc/not ours")
    other = json.loads(bucket.get(record)) | {
        "key": "enc/running",
        "upload_id": bucket.client.create_multipart_upload(Bucket=bucket.name, Key="enc/running")["UploadId"],
        "process": "1 of another machine",
    }
    # Seen from another machine none of these processes is known to have ended.
    monkeypatch.setattr("streamcrypt.stores._host", lambda: "another machine")
    bucket.put("enc/_streamcrypt/uploads/other", json.dumps(other).encode())
    check = diagnosis.check_uploads(url)
    assert check.status == "warning"
    assert "3 open multipart uploads, 2 of streamcrypt" in check.found
    assert "abort-multipart-upload" in check.mend
    assert main(["doctor", "--source", url]) == 0
    assert "enc/not ours of somebody else" in capsys.readouterr().out
    sc.encrypt(source, url, keys=key, resume=True)
    assert bucket.uploads() == ["enc/not ours", "enc/running"]
    assert sc.verify(url, against=source).files == FILES + 2
    for _ in range(2):  # what doctor says to do, word for word
        words = shlex.split(diagnosis.check_uploads(url).mend.rpartition("one by one, ")[2])
        assert words[:4] == ["aws", "s3api", "abort-multipart-upload", "--bucket"]
        bucket.client.abort_multipart_upload(Bucket=words[4], Key=words[6], UploadId=words[8])
    assert diagnosis.check_uploads(url).status == "ok"


def test_a_job_that_overwrites_forgets_the_journal(bucket: Bucket, key: str, source: Path) -> None:
    interrupt("encrypt", source, f"{bucket.url}/enc", key)
    sc.encrypt(source, f"{bucket.url}/enc", keys=key, overwrite=True)
    assert not parts(bucket)
    assert diagnosis.check_uploads(f"{bucket.url}/enc").status == "ok"
