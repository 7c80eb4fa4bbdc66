"""Object stores: every command there and back, and what must hold when a request or a process fails.

The store is moto's S3 server over HTTP, behind a proxy of ours that counts requests and makes some
of them fail.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from families.s3 import Bucket, MiB, listed, once, outage, set_store_environment

import streamcrypt as sc
from streamcrypt import stores
from streamcrypt.engine import worker
from streamcrypt.storage import sort_key

BIG = 17 * MiB + 5  # three parts


def a_tree(folder: Path) -> Path:
    contents = {
        "a-b": 10,
        "a/deep/x": 70_000,
        "a/deep/y z.bin": 1,
        "a.b": 3,
        "empty": 0,
        "one part": 8 * MiB,
        "big": BIG,
    }
    for name, size in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
    (folder / "nothing in it").mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def run(command: list[str], data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *command], input=data, capture_output=True, timeout=240)


# -- there and back


def test_a_tree_goes_to_a_store_within_it_and_back(bucket: Bucket, key: str, tmp_path: Path) -> None:
    source = a_tree(tmp_path / "source")
    report = sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    assert (report.files, report["kms"]["calls"]) == (7, {"GenerateDataKey": 1})
    assert "enc/_streamcrypt/manifest" in bucket.names()
    assert bucket.uploads() == []
    assert sc.verify(f"{bucket.url}/enc", against=source).files == 7
    assert sc.rekey(f"{bucket.url}/enc/", f"{bucket.url}/again", keys=key).files == 7
    assert sc.decrypt(f"{bucket.url}/again", tmp_path / "out").files == 7
    assert contents(tmp_path / "out") == contents(source)
    # A store has no empty folders: what is decrypted into it loses them.
    assert sc.decrypt(f"{bucket.url}/enc", f"{bucket.url}/plain").files == 7
    assert bucket.get("plain/big") == (source / "big").read_bytes()
    assert sc.encrypt(f"{bucket.url}/plain", tmp_path / "enc", keys=key).files == 7
    assert not [name for name in bucket.names() if "uploads" in name]


def test_a_tree_in_a_store_is_held_against_its_manifest(bucket: Bucket, key: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / name).write_text(name)
    sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    a, b = bucket.get("enc/a"), bucket.get("enc/b")
    bucket.put("enc/a", b)
    with pytest.raises(sc.IntegrityError, match="swapped"):
        sc.verify(f"{bucket.url}/enc")
    bucket.put("enc/a", a)
    bucket.put("enc/a0", a)
    with pytest.raises(sc.IntegrityError, match="added"):
        sc.verify(f"{bucket.url}/enc")
    bucket.client.delete_object(Bucket=bucket.name, Key="enc/a0")
    bucket.client.delete_object(Bucket=bucket.name, Key="enc/c")
    with pytest.raises(sc.IntegrityError, match="missing"):
        sc.verify(f"{bucket.url}/enc")


@pytest.mark.parametrize("size", [0, 1, stores.FIRST_READ, 3 * MiB, BIG])
@pytest.mark.parametrize("sign", [False, True])
def test_one_message(bucket: Bucket, key: str, size: int, sign: bool) -> None:
    data = random.Random(size).randbytes(size)
    with sc.open(f"{bucket.url}/m", "wb", keys=key, sign=sign) as file:
        file.write(data)
        assert "m" not in bucket.names()
    with sc.open(f"{bucket.url}/m", require_signed=sign) as read:
        assert read.read() == data
        assert read.read_at(size // 2, 10) == data[size // 2 : size // 2 + 10]
    assert sc.inspect(f"{bucket.url}/m").plaintext_size == size
    assert sc.decrypt_bytes(bucket.get("m")) == data


def test_streams(bucket: Bucket, key: str) -> None:
    data = random.Random(1).randbytes(BIG)
    made = run(["-m", "streamcrypt", "encrypt", "-", f"{bucket.url}/m", "--key", key], data)
    assert (made.returncode, made.stdout) == (0, b"")
    assert run(["-m", "streamcrypt", "decrypt", f"{bucket.url}/m", "-"]).stdout == data
    assert bucket.uploads() == []


def test_file_that_is_discarded_leaves_nothing(bucket: Bucket, key: str) -> None:
    file = sc.open(f"{bucket.url}/m", "wb", keys=key)
    file.write(bytes(BIG))
    assert bucket.uploads() == ["m"]
    file.discard()
    assert (bucket.names(), bucket.uploads()) == ([], [])


# -- nothing is overwritten by accident


@pytest.mark.parametrize("size", [10, BIG])
def test_what_is_there_stays(bucket: Bucket, key: str, tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(bytes(size))
    bucket.put("m")
    with pytest.raises(sc.StreamcryptError, match="exists already"):
        sc.encrypt(tmp_path / "f", f"{bucket.url}/m", keys=key)
    assert (bucket.get("m"), bucket.uploads()) == (b"somebody else's", [])
    sc.encrypt(tmp_path / "f", f"{bucket.url}/m", keys=key, overwrite=True)
    assert len(sc.decrypt_bytes(bucket.get("m"))) == size


def test_small_files_of_which_some_fail(bucket: Bucket, key: str, tmp_path: Path) -> None:
    """They go several at a time: one that is there stays, one that cannot be read fails, and no other does."""
    source = tmp_path / "in"
    source.mkdir()
    data = {f"{number:02}": random.Random(number).randbytes(1000 * number) for number in range(40)}
    for name, content in data.items():
        (source / name).write_bytes(content)
    (source / "21").unlink()
    (source / "21").symlink_to("20")

    def appears(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("enc/07") and "enc/07" not in bucket.names():
            bucket.put("enc/07")

    bucket.proxy.fault = appears
    with pytest.raises(sc.StreamcryptError, match="2 of 40 files failed") as failed:
        sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    report = failed.value.report  # type: ignore[attr-defined]
    assert {failure.path for failure in report.failed} == {"07", "21"}
    assert bucket.get("enc/07") == b"somebody else's"
    for name in data.keys() - {"07", "21"}:
        assert sc.decrypt_bytes(bucket.get(f"enc/{name}")) == data[name]


@pytest.mark.parametrize("size", [10, BIG])
def test_what_appears_meanwhile_stays(bucket: Bucket, size: int) -> None:
    target = stores.StoreTree(bucket.url).create("m", size=size)
    target.write_at(0, bytes(size))
    bucket.put("m")
    with pytest.raises(sc.StreamcryptError, match="exists already"):
        target.publish(overwrite=False)
    target.discard()
    assert (bucket.get("m"), bucket.uploads(), bucket.names()) == (b"somebody else's", [], ["m"])


# -- requests that fail


FAULTS = {
    "start of the upload": ("POST", "uploads"),
    "a part": ("PUT", "partNumber=2"),
    "completion": ("POST", "uploadId="),
    "record": ("PUT", "_streamcrypt/uploads/"),
    "read": ("GET", "/plain"),
}


@pytest.mark.parametrize("fault", [503, "lost"])
@pytest.mark.parametrize("request_", FAULTS.values(), ids=FAULTS)
def test_a_request_that_fails_once_is_made_again(
    bucket: Bucket, key: str, request_: tuple[str, str], fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(stores.RETRY_VARIABLE, "60")  # a busy machine takes seconds to come to the failure
    data = random.Random(2).randbytes(BIG)
    bucket.put("plain", data)
    bucket.proxy.fault = once(*request_, fault)
    sc.encrypt(f"{bucket.url}/plain", f"{bucket.url}/m", keys=key)
    assert sc.decrypt_bytes(bucket.get("m")) == data
    if request_ != FAULTS["start of the upload"]:  # whose answer was lost: nobody knows its id
        assert bucket.uploads() == []
    assert bucket.names() == ["m", "plain"]


def test_a_put_whose_answer_is_lost_is_recognised(
    bucket: Bucket, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(stores.RETRY_VARIABLE, "60")
    bucket.proxy.fault = once("PUT", "/m", "lost")
    with sc.open(f"{bucket.url}/m", "xb", keys=key) as file:
        file.write(b"small")
    assert sc.decrypt_bytes(bucket.get("m")) == b"small"


def test_metadata_have_names_that_every_store_takes(bucket: Bucket, key: str) -> None:
    """Azure's must be C# identifiers; a name with a hyphen failed every write (live: test_live_stores.py)."""
    for size in (10, BIG):
        with sc.open(f"{bucket.url}/m", "wb", keys=key) as file:
            file.write(bytes(size))
        (name,) = bucket.client.head_object(Bucket=bucket.name, Key="m")["Metadata"]
        assert name.isidentifier()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("request_", [FAULTS["a part"], FAULTS["completion"]], ids=["part", "completion"])
def test_an_upload_that_keeps_failing_is_aborted(
    bucket: Bucket, key: str, tmp_path: Path, request_: tuple[str, str]
) -> None:
    method, part_of_path = request_
    (tmp_path / "f").write_bytes(bytes(BIG))
    bucket.proxy.fault = lambda had, path: 503 if had == method and part_of_path in path else None
    with pytest.raises(sc.StreamcryptError, match="try again") as caught:
        sc.encrypt(tmp_path / "f", f"{bucket.url}/m", keys=key)
    assert type(caught.value).__name__ == "TemporaryError"
    assert (bucket.names(), bucket.uploads()) == ([], [])


@pytest.mark.parametrize("kind", [503, "drop"])
def test_an_outage_is_waited_out(bucket: Bucket, key: str, tmp_path: Path, kind: int | str) -> None:
    """Three seconds here, a minute in campaigns/test_stores.py."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(10):
        (source / str(number)).write_bytes(bytes(number))
    (source / "big").write_bytes(bytes(BIG))
    bucket.proxy.fault = outage(kind, 3.0, after=10)
    sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    assert sc.verify(f"{bucket.url}/enc", against=source).files == 11


def test_an_abort_that_fails_is_made_good_by_the_next_job(
    bucket: Bucket, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = stores.StoreTree(bucket.url).create("m", size=BIG)
    target.write_at(0, bytes(9 * MiB))
    bucket.proxy.fault = lambda method, path: 403 if method == "DELETE" else None
    target.discard()
    assert len(bucket.uploads()) == 1
    (record,) = bucket.names()
    bucket.put(
        record, bucket.get(record).replace(str(os.getpid()).encode(), b"4194999")
    )  # of another process
    bucket.proxy.fault = lambda method, path: None
    with sc.open(f"{bucket.url}/n", "wb", keys=key) as file:
        file.write(b"x")
    (tmp_path / "f").write_bytes(b"x")
    sc.encrypt(tmp_path / "f", f"{bucket.url}/o", keys=key)
    assert (bucket.uploads(), bucket.names()) == ([], ["n", "o"])


KILLED = """
import os, signal, sys
import streamcrypt as sc
file = sc.open(sys.argv[1], "wb", keys=sys.argv[2])
file.write(bytes(17 * 2**20))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_uploads_of_a_killed_process_are_aborted_by_the_next_job(
    bucket: Bucket, key: str, tmp_path: Path
) -> None:
    assert run(["-c", KILLED, f"{bucket.url}/m", key]).returncode == -signal.SIGKILL
    assert bucket.uploads() == ["m"]
    bucket.client.create_multipart_upload(Bucket=bucket.name, Key="not ours")
    (tmp_path / "f").write_bytes(b"x")
    with sc.open(f"{bucket.url}/running", "wb", keys=key) as running:
        running.write(bytes(BIG))
        sc.encrypt(tmp_path / "f", f"{bucket.url}/m", keys=key)
        assert sorted(bucket.uploads()) == ["not ours", "running"]
    assert bucket.uploads() == ["not ours"]
    assert bucket.names() == ["m", "running"]


def test_an_object_that_changes_while_it_is_read(bucket: Bucket) -> None:
    bucket.put("f", bytes(3 * MiB))
    source = stores.StoreTree(bucket.url).open("f")
    bucket.put("f", bytes(3 * MiB - 1) + b"x")
    with pytest.raises(sc.StreamcryptError, match="changed while it was read"):
        source.read_at(2 * MiB, memoryview(bytearray(10)))
    source.close()


# -- small messages, which are decrypted several at a time


def many(folder: Path, lengths: dict[str, int]) -> Path:
    for name, length in lengths.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(length))
    return folder


def a_local_copy(bucket: Bucket, prefix: str, folder: Path) -> Path:
    for name in bucket.names():
        if name.startswith(f"{prefix}/"):
            path = folder / name[len(prefix) + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bucket.get(name))
    return folder


def failures(job: Any, place: Path | str, *arguments: Any, **options: Any) -> dict[str, tuple[str, str]]:
    """Names, and what is said of each without the place."""
    with pytest.raises(sc.StreamcryptError) as failed:
        job(place, *arguments, **options)
    report = failed.value.report  # type: ignore[attr-defined]
    told = {failure.path: (type(failure.error).__name__, str(failure.error)) for failure in report.failed}
    assert report.files + len(told) == SMALL
    return {
        name: (kind, text.replace(str(place), "").partition(" (")[0]) for name, (kind, text) in told.items()
    }


SMALL = 60


def flipped(message: bytes, place: int) -> bytes:
    return message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :]


def test_small_messages_answer_as_from_a_disk(bucket: Bucket, key: str, tmp_path: Path) -> None:
    """Whatever was done to one of them: the same error as for a local tree, no file of it, and every other file."""
    source = many(tmp_path / "in", {f"{number % 3}/{number:02}": 40 * number for number in range(SMALL)})
    url = f"{bucket.url}/enc"
    # Frames of 1,000 bytes, so some messages have several.
    sc.encrypt(source, url, keys=key, frame_size=1000, context={"a": "b"}, authenticated_context={"c": "d"})
    names = sorted(name for name in bucket.names() if "/_streamcrypt/" not in name)
    messages = {name: bucket.get(name) for name in names}
    other = sc.encrypt_bytes(b"x" * 40, keys=key, context={"a": "b"}, authenticated_context={"c": "d"})
    body = len(sc.encrypt_bytes(b"", keys=key, context={"a": "b"}, authenticated_context={"c": "d"})) - 40
    long = max(names, key=lambda name: len(messages[name]))
    altered = {
        names[5]: flipped(messages[names[5]], 0),  # version
        names[6]: flipped(messages[names[6]], 10),  # message id
        names[7]: flipped(messages[names[7]], 60),  # context
        names[8]: flipped(messages[names[8]], body - 20),  # commitment
        names[9]: flipped(messages[names[9]], body - 1),  # tag of the header
        names[10]: flipped(messages[names[10]], body + 2),  # mark of the frame
        names[11]: flipped(messages[names[11]], body + 7),  # its number
        names[12]: flipped(messages[names[12]], -1),  # its tag
        names[13]: flipped(messages[names[13]], body + 30),  # its ciphertext
        names[14]: messages[names[14]][:-1],
        names[15]: messages[names[15]] + b"x",
        names[16]: messages[names[17]],
        names[18]: other,
        names[19]: b"",
        names[20]: os.urandom(len(messages[names[20]])),
        long: flipped(messages[long], body + 100),  # a frame that is not the last
    }
    for name, message in altered.items():
        bucket.put(name, message)
    bucket.delete(names[21])
    copy = a_local_copy(bucket, "enc", tmp_path / "enc")
    options = {"keys": key, "authenticated_context": {"c": "d"}}
    expected = failures(sc.decrypt, copy, tmp_path / "from disk", **options)
    assert expected.keys() == {name.removeprefix("enc/") for name in (*altered, names[21])}
    assert failures(sc.decrypt, url, tmp_path / "from store", **options) == expected
    assert failures(sc.verify, url, **options) == expected
    assert failures(sc.decrypt, url, f"{bucket.url}/plain", **options) == expected
    whole = {name: data for name, data in contents(source).items() if name not in expected}
    assert contents(tmp_path / "from store") == whole
    assert {name: bucket.get(f"plain/{name}") for name, data in whole.items() if data is not None} == {
        name: data for name, data in whole.items() if data is not None
    }


def test_small_messages_take_a_request_each(bucket: Bucket, key: str, tmp_path: Path) -> None:
    lengths = {f"{number:02}": 100 * number for number in range(38)} | {"full": MiB, "long": MiB + 1}
    source = many(tmp_path / "in", lengths)
    sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    bucket.proxy.requests.clear()
    cache = sc.DataKeyCache()
    report = sc.decrypt(f"{bucket.url}/enc", tmp_path / "out", keys=key, cache=cache)
    assert contents(tmp_path / "out") == contents(source)
    assert (report.files, report.bytes_out) == (40, sum(lengths.values()))
    assert report.bytes_in == sum(len(bucket.get(f"enc/{name}")) for name in lengths)
    assert cache.stats()["hits"] == 40  # 41 messages with the manifest
    asked = [path.rpartition("/")[2] for _, path, _ in bucket.proxy.requests if "/enc/" in path]
    assert all(asked.count(name) == 1 for name in lengths if name != "00"), asked


@pytest.mark.parametrize("limit", [1, 7])
def test_small_messages_under_several_data_keys(bucket: Bucket, key: str, tmp_path: Path, limit: int) -> None:
    source = many(tmp_path / "in", {f"{number:02}": 100 * number for number in range(SMALL)})
    made = sc.encrypt(source, f"{bucket.url}/enc", keys=key, cache=sc.DataKeyCache(max_messages=limit))
    assert made.data_keys >= SMALL // limit
    for options in ({}, {"cache": False}):
        out = tmp_path / f"out {len(options)}"
        assert sc.decrypt(f"{bucket.url}/enc", out, keys=key, **options).files == SMALL
        assert contents(out) == contents(source)


def test_small_messages_replace_nothing(bucket: Bucket, key: str, tmp_path: Path) -> None:
    source = many(tmp_path / "in", {f"{number:02}": 100 * number for number in range(SMALL)})
    sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    out = tmp_path / "out"

    def appears(method: str, path: str) -> None:
        if method == "GET" and path.endswith("enc/41"):
            (out / "41").write_bytes(b"somebody else's")

    bucket.proxy.fault = appears
    with pytest.raises(sc.DestinationError, match="exists already") as failed:
        sc.decrypt(f"{bucket.url}/enc", out, keys=key)
    assert [failure.path for failure in failed.value.report.failed] == ["41"]  # type: ignore[attr-defined]
    assert {name: contents(out)[name] for name in contents(source)} == contents(source) | {
        "41": b"somebody else's"
    }
    bucket.proxy.fault = lambda method, path: None
    sc.decrypt(f"{bucket.url}/enc", out, keys=key, overwrite=True)
    assert contents(out) == contents(source)


def test_small_messages_of_a_thread_that_ends_are_decrypted_by_themselves(
    bucket: Bucket, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "in", {f"{number:02}": 100 * number for number in range(SMALL)})
    sc.encrypt(source, f"{bucket.url}/enc", keys=key)
    make, left = worker.Worker._make, [1]

    def ends(self: worker.Worker, *arguments: Any) -> None:
        make(self, *arguments)
        if left:  # after its files have their names, before it says so
            left.pop()
            raise SystemExit

    monkeypatch.setattr(worker.Worker, "_make", ends)
    report = sc.decrypt(f"{bucket.url}/enc", tmp_path / "out", keys=key)
    assert not left
    assert report.files == SMALL
    assert contents(tmp_path / "out") == contents(source)


# -- listings


def test_walk_in_our_order_over_many_pages(bucket: Bucket) -> None:
    from moto.s3.models import s3_backends

    rng = random.Random(7)
    parts = ["a", "a-b", "a.b", "a b", "ab", "é", "a!", "x0", "part-1", "part-2.bin", "part", "-", "0"]
    names = {"/".join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(800)}
    folders = {name[:end] for name in names for end in range(len(name)) if name[end] == "/"}
    names -= folders
    names |= {f"data-set/part-{number:05}.parquet" for number in range(800)}
    assert len(names) > 1000  # more than one page of a listing
    backend = s3_backends["123456789012"]["aws"]
    for name in names:
        backend.put_object(bucket.name, f"root/{name}", b"x")
    backend.put_object(bucket.name, "root/marker/", b"")
    backend.put_object(bucket.name, "root/data-set/", b"")
    backend.put_object(bucket.name, "rootless", b"")
    expected = sorted([*names, "marker"], key=sort_key)
    for held in (stores.HELD_ENTRIES, 100, 10):
        tree = stores.StoreTree(f"{bucket.url}/root")
        tree.held_entries = held
        entries = list(tree.walk())
        assert [entry.name for entry in entries] == expected
        assert [entry.name for entry in entries if entry.folder] == ["marker"]


def test_markers_of_folders_beside_what_sorts_before_them(bucket: Bucket) -> None:
    """A listing has "train/" after "train-1", and our library says "train" of it."""
    from moto.s3.models import s3_backends

    backend = s3_backends["123456789012"]["aws"]
    names = ["file", "file-1", "full/x", *(f"train-{number:04}" for number in range(1100)), "train.csv"]
    for name in (*names, "file/", "full/", "full-1", "train/"):
        backend.put_object(bucket.name, f"root/{name}", b"" if name.endswith("/") else b"x")
    expected = sorted([*names, "full-1", "train"], key=sort_key)
    for held in (stores.HELD_ENTRIES, 10):
        tree = stores.StoreTree(f"{bucket.url}/root")
        tree.held_entries = held
        entries = list(tree.walk())
        assert [entry.name for entry in entries] == expected
        assert [entry.name for entry in entries if entry.folder] == ["train"]


def test_memory_does_not_grow_with_the_listing(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 keys here, a million in campaigns/test_stores.py."""
    found = listed(20_000, monkeypatch)
    assert found["count"] == 20_000
    assert found["in_order"]
    assert found["grown_mib"] < 16


# -- what it costs


def test_a_range_takes_the_frames_that_it_covers(bucket: Bucket, key: str) -> None:
    data = random.Random(3).randbytes(BIG)
    with sc.open(f"{bucket.url}/m", "wb", keys=key, frame_size="64KiB") as file:
        file.write(data)
    bucket.proxy.requests.clear()
    with sc.open(f"{bucket.url}/m") as read:
        assert read.read_at(9 * MiB + 5, 100) == data[9 * MiB + 5 :][:100]
    lengths = []
    for method, path, asked in bucket.proxy.requests:
        assert (method, urlsplit(path).path) == ("GET", f"/{bucket.name}/m")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        lengths.append(int(last) - int(first) + 1)
    assert lengths[0] == stores.FIRST_READ  # the header, with the object's size and state
    assert len(lengths) == 3  # and the final frame, and the frame that was asked for
    assert lengths[2] == 64 * 2**10 + 32


def test_reading_on_takes_few_requests(bucket: Bucket, tmp_path: Path, key: str) -> None:
    bucket.put("f", bytes(64 * MiB))
    bucket.proxy.requests.clear()
    sc.encrypt(f"{bucket.url}/f", tmp_path / "m", keys=key)
    reads = [request for request in bucket.proxy.requests if request[0] == "GET"]
    assert len(reads) < 16  # of 1 MiB and more: 64 without reading ahead


def test_small_pieces_are_read_ahead_from_the_end_of_the_first_bytes_on(bucket: Bucket) -> None:
    data = random.Random(0).randbytes(3 * MiB)
    bucket.put("f", data)
    bucket.proxy.requests.clear()
    source, piece = stores.StoreTree(bucket.url).open("f"), memoryview(bytearray(16 * 2**10))
    with contextlib.closing(source):
        for offset in range(0, len(data), len(piece)):  # one of them ends where the first bytes do
            assert source.read_at(offset, piece) == len(piece)
            assert piece == data[offset : offset + len(piece)]
    assert len(bucket.proxy.requests) <= 4  # the first bytes, 1 MiB, 2 MiB


def test_bytes_are_shown_where_they_came(bucket: Bucket) -> None:
    data = random.Random(5).randbytes(7 * MiB)
    bucket.put("f", data)
    tree = stores.StoreTree(bucket.url)
    source = tree.copy().open("f")
    buffer = memoryview(bytearray(2 * MiB))
    assert source.view_at(100, buffer[:50]).obj is not buffer.obj
    ways = [(0, 2 * MiB)] + [(start, MiB + 5) for start in range(2 * MiB, 7 * MiB, MiB + 5)]
    for offset, length in [*ways, (5, 10), (6 * MiB, 100), (7 * MiB - 1, 9), (7 * MiB, 1), (8 * MiB, 1)]:
        for read in (source, tree.open("f")):
            shown = read.view_at(offset, buffer[:length])
            assert shown == data[offset : offset + length]
            assert read.read_at(offset, buffer[:length]) == len(shown)
            assert buffer[: len(shown)] == shown
    source.close()


MEMORY = """
import re, sys
import streamcrypt as sc
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
chunk = bytes(2**20)
with sc.open(sys.argv[1] + "-small", "wb", keys=sys.argv[2]) as file:
    for _ in range(9):
        file.write(chunk)
before = peak()
with sc.open(sys.argv[1], "wb", keys=sys.argv[2]) as file:
    for _ in range(96):
        file.write(chunk)
with sc.open(sys.argv[1]) as file:
    while file.read(2**20):
        pass
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_object(bucket: Bucket, key: str) -> None:
    done = run(["-c", MEMORY, f"{bucket.url}/m", key])
    assert done.returncode == 0, done.stderr
    # MiB: four parts in flight, one that fills, two blocks ahead, and copies of the library.
    assert int(done.stdout) < 110


@pytest.mark.parametrize("size", [1, 5 * 2**30, 100 * 2**30, 5 * 2**40, None])
def test_parts_are_long_enough(size: int | None) -> None:
    total = parts = 0
    while total < (size or 5 * 2**40):
        length = stores.part_length(size, parts)
        assert 5 * MiB <= length <= 5 * 2**30
        total += length
        parts += 1
    assert parts <= stores.MAX_PARTS


# -- settings


def test_server_side_encryption_is_asked_for(
    bucket: Bucket, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arn = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555"
    monkeypatch.setenv("AWS_SSE_KMS_KEY_ID", arn)
    monkeypatch.setenv("AWS_SSE_BUCKET_KEY_ENABLED", "true")
    for size in (10, BIG):
        with sc.open(f"{bucket.url}/m", "wb", keys=key) as file:
            file.write(bytes(size))
        head = bucket.client.head_object(Bucket=bucket.name, Key="m")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", arn)
    asked = [headers for headers in bucket.proxy.headers if "x-amz-server-side-encryption" in headers]
    assert len(asked) == 3  # the put, the start of the upload, and its record
    assert all(headers["x-amz-server-side-encryption-bucket-key-enabled"] == "true" for headers in asked)


@pytest.mark.parametrize(
    ("settings", "signed"),
    [
        ({}, False),  # on this machine
        ({"AWS_UNSIGNED_PAYLOAD": "false"}, True),
        ({"AWS_ENDPOINT_URL_S3": "http://store.example", "AWS_ALLOW_HTTP": "true"}, True),
    ],
)
def test_a_body_is_hashed_where_nothing_else_guards_it(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], signed: bool
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{bucket.proxy.port}")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for size in (10, 9 * MiB):
        target = stores.StoreTree(bucket.url).create("m", size=size, overwrite=True)
        target.write_at(0, bytes(size))
        target.publish(overwrite=True)
    sent = [
        headers["x-amz-content-sha256"]
        for (method, path, _), headers in zip(bucket.proxy.requests, bucket.proxy.headers, strict=True)
        if method == "PUT" and f"/{bucket.name}/m" in path
    ]
    assert len(sent) == 2  # the object, and a part
    assert {re.fullmatch("[0-9a-f]{64}", found) is not None for found in sent} == {signed}


def test_a_tree_is_its_url(bucket: Bucket) -> None:
    tree = stores.StoreTree(f"{bucket.url}/a/b/")
    tree.walk()
    pickled = pickle.dumps(tree)
    assert b"secret" not in pickled
    assert len(pickled) < 200
    assert pickle.loads(pickled).root == f"{bucket.url}/a/b"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_plain_http_must_be_asked_for(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(variable, "http://store.example")
    with pytest.raises(sc.StreamcryptError, match="AWS_ALLOW_HTTP"):
        sc.open(f"{bucket.url}/m")


def test_proxies_of_the_environment_are_used(
    bucket: Bucket, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{bucket.proxy.port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{bucket.proxy.port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store.example")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    with sc.open(f"{bucket.url}/m", "wb", keys=key) as file:  # by obstore and by boto3
        file.write(bytes(BIG))
    with sc.open(f"{bucket.url}/m") as read:
        assert read.size == BIG
    assert {path.partition(f"/{bucket.name}")[0] for _, path, _ in bucket.proxy.requests} == {
        "http://store.example"
    }


@pytest.mark.parametrize("where", ["environment", "profile", "services"])
def test_all_requests_go_to_the_endpoint_that_is_set(
    bucket: Bucket, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """By obstore and by boto3: else large objects go elsewhere than small ones."""
    url = os.environ["AWS_ENDPOINT_URL_S3"]
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    if where == "environment":
        monkeypatch.setenv("AWS_ENDPOINT", url)
    profile = f"endpoint_url = {url}" if where == "profile" else "services = here"
    services = f"[services here]\ns3 =\n  endpoint_url = {url}"
    (tmp_path / "config").write_text(f"[default]\n{profile}\n{services}\n" if where != "environment" else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with sc.open(f"{bucket.url}/m", "wb", keys=key) as file:
        file.write(bytes(BIG))
    assert (bucket.names(), bucket.uploads()) == (["m"], [])
    with sc.open(f"{bucket.url}/m") as read:
        assert read.size == BIG


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "s3-fips.eu-west-1.amazonaws.com"),
        ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "s3.dualstack.eu-west-1.amazonaws.com"),
        ({}, None),
    ],
)
def test_the_region_and_its_endpoint_are_those_of_the_environment(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], host: str | None
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    config = dict(stores.StoreTree("s3://bucket")._bucket.store.config)  # type: ignore[call-overload]
    assert config["region"] == "eu-west-1"
    assert config.get("endpoint") == (f"https://{host}" if host else None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (stores.RETRY_VARIABLE, "soon", "STREAMCRYPT_STORE_RETRY_SECONDS: 'soon' is not a duration"),
        ("AWS_ENDPOINT_URL_S3", "https://", "endpoint is not a URL"),
        ("AWS_ENDPOINT_URL_S3", "store.example", "endpoint is not a URL"),
        ("AWS_ENDPOINT_URL_S3", "https://[::1", "endpoint is not a URL"),
        ("AWS_ENDPOINT_URL_S3", "https://store.example:x", "endpoint is not a URL"),
    ],
)
def test_settings_that_are_none(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(sc.StreamcryptError, match=message):
        sc.open(f"{bucket.url}/m")


def test_the_longest_time_for_retries_is_longer_than_any_job(
    bucket: Bucket, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(stores.RETRY_VARIABLE, "999999999999d")
    with sc.open(f"{bucket.url}/m", "wb", keys=key) as file:
        file.write(bytes(BIG))


def test_whoever_asks_pays_for_every_request(
    bucket: Bucket, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_PAYER", "true")
    for size in (10, BIG):
        with sc.open(f"{bucket.url}/{size}", "wb", keys=key) as file:
            file.write(bytes(size))
    assert {headers.get("x-amz-request-payer") for headers in bucket.proxy.headers} == {"requester"}


def test_a_key_that_is_no_name_is_named(bucket: Bucket) -> None:
    for name in ("a//b", "a/../b", 'a\t"'):
        bucket.put(f"{bucket.name}/{name}")
        with pytest.raises(sc.StreamcryptError, match="is not a name: an empty part") as error:
            list(stores.StoreTree(f"{bucket.url}/{bucket.name}").walk())
        assert repr(f"{bucket.name}/{name}") in str(error.value)
        bucket.delete(f"{bucket.name}/{name}")


def test_missing_credentials_are_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(sc.StreamcryptError, match="no AWS credentials"):
        sc.open(f"{bucket.url}/m")


@pytest.mark.usefixtures("impatient")
def test_a_password_in_an_endpoint_is_not_told(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:secret-word@127.0.0.1:9")
    with pytest.raises(sc.StreamcryptError, match=r"http://127\.0\.0\.1:9/") as error:
        sc.open(f"{bucket.url}/m")
    assert "secret-word" not in str(error.value)


def credentials_of_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, minutes: float
) -> datetime.datetime:
    """Credentials come from a program that says until when they hold."""
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    answer = {"Version": 1, "AccessKeyId": "AKIA", "SecretAccessKey": "s", "SessionToken": "t"}
    (tmp_path / "answer").write_text(json.dumps(answer | {"Expiration": expires.isoformat()}))
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/answer\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return expires


def test_credentials_are_asked_for_again_before_they_expire(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """boto3 renews them at fifteen minutes and less; whoever keeps these for longer is denied access."""
    expires = credentials_of_a_process(monkeypatch, tmp_path, 16)
    store: Any = stores.StoreTree(bucket.url)._bucket.store
    assert store.credential_provider()["expires_at"] < expires


def test_credentials_that_cannot_be_renewed_are_no_missing_permission(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    credentials_of_a_process(monkeypatch, tmp_path, -5)
    with pytest.raises(sc.StreamcryptError, match=r"AWS credentials cannot be had: .* still expired"):
        sc.open(f"{bucket.url}/m")


def test_missing_credentials_of_other_stores_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_EMULATOR"))]:
        monkeypatch.delenv(name)
    with pytest.raises(sc.StreamcryptError, match="; set AZURE_STORAGE_ACCOUNT_NAME and a key"):
        sc.open("az://container/m")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none"))
    with pytest.raises(sc.StreamcryptError, match="; set GOOGLE_APPLICATION_CREDENTIALS"):
        sc.open("gs://bucket/m")


@pytest.mark.usefixtures("impatient")
def test_exit_codes(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decrypt(url: str) -> tuple[int, bytes]:
        done = run(["-m", "streamcrypt", "decrypt", url, str(tmp_path / "out")])
        assert done.stderr.count(b"\n") == 1
        return done.returncode, done.stderr

    assert decrypt(f"{bucket.url}/none") == (
        1,
        f"streamcrypt: error: {bucket.url}/none: does not exist\n".encode(),
    )
    bucket.proxy.fault = lambda method, path: 403
    code, text = decrypt(f"{bucket.url}/none")
    assert (code, b"denied access" in text) == (1, True)
    bucket.proxy.fault = lambda method, path: 503
    assert decrypt(f"{bucket.url}/none")[0] == 5
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert decrypt(f"{bucket.url}/none")[0] == 5


# -- uploads by the library alone, as Google's and Azure's stores get them


def streamed(bucket: Bucket) -> Any:
    return stores._StreamedUpload(stores.StoreTree(bucket.url), "m", f"{bucket.url}/m", "mark", BIG)


def test_streamed_upload(bucket: Bucket) -> None:
    data = random.Random(4).randbytes(BIG)
    upload = streamed(bucket)
    upload.add(bytearray(data[: 9 * MiB]))
    upload.complete(bytearray(data[9 * MiB :]), overwrite=False)
    assert (bucket.get("m"), bucket.uploads()) == (data, [])
    again = streamed(bucket)
    again.add(bytearray(9 * MiB))
    with pytest.raises(sc.StreamcryptError, match="exists already"):
        again.complete(bytearray(9 * MiB), overwrite=False)
    assert (bucket.get("m"), bucket.uploads()) == (data, [])


def test_streamed_upload_that_fails(bucket: Bucket) -> None:
    upload = streamed(bucket)
    upload.add(bytearray(9 * MiB))
    upload.abort()
    assert (bucket.names(), bucket.uploads()) == ([], [])
    bucket.proxy.fault = lambda method, path: 403 if "partNumber=" in path else None
    failing = streamed(bucket)
    failing.add(bytearray(9 * MiB))
    with pytest.raises(sc.StreamcryptError, match="denied access"):
        failing.complete(bytearray(9 * MiB), overwrite=True)
    assert (bucket.names(), bucket.uploads()) == ([], [])


# -- a store that accepts and never answers


@pytest.fixture
def silent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A store that takes connections, which is what its system does for it, and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        set_store_environment(monkeypatch, server.getsockname()[1])
        monkeypatch.setenv(stores.RETRY_VARIABLE, "600")
        yield server


COMMAND = str(Path(sys.executable).with_name("streamcrypt"))


def started(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [COMMAND, *words],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: [
            signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)
        ],
    )


def test_a_store_that_never_answers_does_not_hold_up_a_second_signal(
    silent: socket.socket, tmp_path: Path
) -> None:
    with started("decrypt", "s3://bucket/message", str(tmp_path / "out")) as process:
        connection, _ = silent.accept()  # it has asked
        with connection:
            process.send_signal(signal.SIGINT)
            while process.poll() is None:  # whoever waits presses Ctrl-C again, and again
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.read().decode()
        assert process.wait() == 130
    assert told.startswith("streamcrypt: error: interrupted: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_store_that_stops_answering_leaves_nothing_partial_when_interrupted(
    bucket: Bucket, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are being written, as workers wait for what comes next."""
    monkeypatch.setenv(stores.RETRY_VARIABLE, "600")
    for name in "abc":
        bucket.put(f"in/{name}", bytes(3 * MiB))
    asked, over = threading.Semaphore(0), threading.Event()

    def hang(method: str, path: str) -> None:
        if method == "GET" and bucket.proxy.requests[-1][2].startswith("bytes=1"):  # not the first bytes
            asked.release()
            over.wait(120)

    bucket.proxy.fault = hang
    folder = tmp_path / "out"
    try:
        with started("encrypt", f"{bucket.url}/in", str(folder), "--key", key, "--workers", "2") as process:
            for _ in range(2):
                assert asked.acquire(timeout=240)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # at once: it does not stop the cleaning up
            assert process.stderr is not None
            told = process.stderr.read().decode()
            assert process.wait(60) == 130
    finally:
        over.set()
    assert told.count("streamcrypt: error: interrupted: ") == 1
    found = [path.name for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    assert set(found) <= {"journal"}
