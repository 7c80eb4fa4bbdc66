"""The engine: the same answer whatever the workers, nothing partial whatever fails, exact key use."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from families import craft
from families.keyrings import CRAFT_KEYRING
from families.processes import child_processes, is_running
from families.trees import (
    assert_nothing_partial,
    assert_nothing_partial_decrypted,
    leftovers,
    make_tree,
    read_tree,
)

import streamcrypt as sc
from streamcrypt.engine import run
from streamcrypt.engine.journal import JOURNAL
from streamcrypt.engine.pool import ProcessPool, ThreadPool
from streamcrypt.engine.spans import MANIFEST, SmallFiles
from streamcrypt.engine.worker import Worker
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import encrypting_keyring
from streamcrypt.kms import open_service
from streamcrypt.message.header import parse_header
from streamcrypt.message.suites import UNSIGNED
from streamcrypt.storage import LocalSource, LocalTree
from streamcrypt.streams import EncryptingFile, OutgoingMessage, header_template

KEYS = CRAFT_KEYRING
F = 1024
SIZES = [0, 1, F - 1, F, F + 1, 2 * F, 5 * F + 3]
FILES = {f"d{i % 3}/{'x' * (i % 4)}file{i}": size for i, size in enumerate(SIZES * 3)}
# So many frames that the engine takes worker processes by itself (run._PROCESSES_PAY).
MANY_FRAMES = {"frame_size": 128}
MANY_FRAMES_FILES = {f"f{i}": 9 * 2**17 for i in range(12)}


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "in"
    contents = make_tree(root, FILES)
    (root / "empty folder").mkdir()
    return root, contents


@pytest.fixture
def heavy(tmp_path):
    """A tree whose encryption takes worker processes, and some seconds."""
    root = tmp_path / "in"
    return root, make_tree(root, MANY_FRAMES_FILES)


# ------------------------------------------------------------------------------ same answer


def test_verify_against_finds_what_has_no_message(tmp_path):
    """Equal to a plaintext tree is only what lacks none of its files."""
    plain, target = tmp_path / "in", tmp_path / "enc"
    contents = make_tree(plain, {"a": 10, "sub/b": 10})
    sc.encrypt(plain, target, keys=KEYS)
    (plain / "sub" / "empty").mkdir()  # nothing that could be missing
    assert sc.verify(target, against=plain, keys=KEYS).files == len(contents)
    make_tree(plain, {"sub/added": 10, "z": 0})
    with pytest.raises(sc.IntegrityError, match=r"sub/added has no message \(2 of 4") as caught:
        sc.verify(target, against=plain, keys=KEYS)
    assert sorted(failure.path for failure in caught.value.report.failed) == ["sub/added", "z"]
    assert sc.verify(target, against=plain, keys=KEYS, exclude=["*added", "z"]).files == len(contents)
    assert sc.verify(target, against=plain, keys=KEYS, files=["a"]).files == 1
    (target / "a").unlink()  # told once, though manifest and plaintext both have it
    with pytest.raises(sc.IntegrityError) as caught:
        sc.verify(target, against=plain, keys=KEYS)
    assert sorted(failure.path for failure in caught.value.report.failed) == ["a", "sub/added", "z"]
    os.mkfifo(plain / "pipe")
    with pytest.raises(sc.SourceError, match="named pipe"):
        sc.verify(target, against=plain, keys=KEYS, exclude=["*added", "a", "z"])


def test_an_empty_folder_comes_back(tmp_path):
    (tmp_path / "in").mkdir()
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS)
    assert sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS).files == 0
    assert (tmp_path / "dec").is_dir()
    assert not list((tmp_path / "dec").iterdir())


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_same_plaintext_and_same_manifest(tree, tmp_path, workers, sign):
    root, contents = tree
    report = sc.encrypt(root, tmp_path / "enc", keys=KEYS, sign=sign, workers=workers, frame_size=F)
    assert report.files == len(contents)
    assert report.failed == []
    encrypted = read_tree(tmp_path / "enc")
    assert set(encrypted) == {*contents, MANIFEST}
    lines = [json.loads(line) for line in sc.decrypt_bytes(encrypted[MANIFEST], keys=KEYS).splitlines()]
    listed = [line for line in lines if line.get("path", line.get("name")) in contents]
    assert len(listed) == len(contents)
    ids = {parse_header(data)[0].message_id for data in encrypted.values()}
    assert len(ids) == len(encrypted)
    assert report.bytes_in == sum(map(len, contents.values()))
    assert sc.verify(tmp_path / "enc", keys=KEYS, workers=workers).files == len(contents)
    assert sc.verify(tmp_path / "enc", against=root, keys=KEYS).files == len(contents)
    decrypted = sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS, workers=workers)
    assert decrypted.files == len(contents)
    assert read_tree(tmp_path / "dec") == contents
    assert (tmp_path / "dec" / "empty folder").is_dir()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
def test_a_file_a_stream_and_bytes_agree(tmp_path, size, sign):
    plaintext = random.Random(size).randbytes(size)
    (tmp_path / "plain").write_bytes(plaintext)
    words = {"keys": KEYS, "sign": sign, "frame_size": F}
    sc.encrypt(tmp_path / "plain", tmp_path / "file.enc", **words)
    with sc.open(tmp_path / "stream.enc", "wb", **words) as file:
        file.write(plaintext)
    (tmp_path / "bytes.enc").write_bytes(sc.encrypt_bytes(plaintext, **words))
    lengths = {(tmp_path / name).stat().st_size for name in ("file.enc", "stream.enc", "bytes.enc")}
    assert len(lengths) == 1
    for name in ("file.enc", "stream.enc", "bytes.enc"):
        sc.decrypt(tmp_path / name, tmp_path / f"{name}.dec", keys=KEYS)
        assert (tmp_path / f"{name}.dec").read_bytes() == plaintext


def test_a_large_file_is_cut_into_spans(tmp_path, monkeypatch):
    """The spans of a large file make the message that one worker would make."""
    monkeypatch.setattr("streamcrypt.engine.spans.SPLIT_LENGTH", 2**20)
    monkeypatch.setattr("streamcrypt.engine.spans.SPAN_LENGTH", 300_000)
    for size in (2**20 + 1, 3 * 2**20, 3 * 2**20 + 17):
        contents = make_tree(tmp_path / f"{size}", {"large": size, "small": 10})
        for workers in (1, 3):
            target = tmp_path / f"{size}.{workers}"
            sc.encrypt(tmp_path / f"{size}", target, keys=KEYS, frame_size=F, workers=workers)
            assert assert_nothing_partial(target, contents, KEYS) == 2
            sc.decrypt(target, tmp_path / f"{size}.{workers}.dec", keys=KEYS, workers=workers)
            assert read_tree(tmp_path / f"{size}.{workers}.dec") == contents
            sc.verify(target, against=tmp_path / f"{size}", keys=KEYS, workers=workers)


def test_plain_files_are_read_to_the_same_place_within_a_page(tmp_path, monkeypatch):
    """Elsewhere the system's copy takes five times as long on some processors."""
    (tmp_path / "in").write_bytes(os.urandom(3 * 2**20))
    read_at, places = LocalSource.read_at, []

    def watched(self, offset, buffer):
        places.append((ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - offset) % mmap.PAGESIZE)
        return read_at(self, offset, buffer)

    monkeypatch.setattr(LocalSource, "read_at", watched)
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, workers=1)
    assert places == [0, 0, 0]


def test_processes_give_what_threads_give(heavy, tmp_path):
    root, contents = heavy
    children, others = set(), set(child_processes())  # a server of another test may run
    sc.encrypt(
        root, tmp_path / "enc", keys=KEYS, workers=2, fsync=False, **MANY_FRAMES,
        progress=lambda _: children.update(set(child_processes()) - others),
    )  # fmt: skip
    assert len(children) >= 2, "this job should have taken worker processes"
    assert assert_nothing_partial(tmp_path / "enc", contents, KEYS) == len(contents)
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS, workers=2, fsync=False)
    assert read_tree(tmp_path / "dec") == contents
    assert not any(map(is_running, children))


@pytest.mark.parametrize("limit", [None, 3])
def test_files_of_one_frame_and_of_several_are_handed_over_together(tmp_path, monkeypatch, limit):
    """Small ones go in columns, which those of several frames interrupt: not a hand-over for each turn."""
    make_tree(tmp_path / "in", {f"{number:03}": 5000 if number % 2 else 100 for number in range(200)})
    handed, submit = [], ThreadPool.submit

    def watched(self, tasks):
        handed.append(len(tasks))
        submit(self, tasks)

    monkeypatch.setattr(ThreadPool, "submit", watched)
    cache = sc.DataKeyCache(max_messages=limit) if limit else None
    report = sc.encrypt(
        tmp_path / "in", tmp_path / "enc", keys=KEYS, frame_size=4096, workers=1, fsync=False, cache=cache
    )
    assert sum(handed) == 200  # a column of one between two others
    assert len(handed) == 4  # a quarter of them each: a worker's lists are not the whole job
    assert report.to_json()["data_keys"] == (67 if limit else 1)  # with the manifest
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS)
    assert read_tree(tmp_path / "dec") == read_tree(tmp_path / "in")


def test_threads_side_by_side_only_where_they_do_not_wait_for_the_interpreter(tmp_path):
    """Small files: one, in turns with the caller's; as many as asked for large ones, and where a disk is waited for."""
    make_tree(tmp_path / "small", {f"{number:03}": 1000 for number in range(300)})
    make_tree(tmp_path / "large", {f"{number}": 2**20 for number in range(8)})

    def threads_of(action, *places, **options) -> int:
        names = set()

        def look(_):
            names.update(thread.name for thread in threading.enumerate())

        action(*places, keys=KEYS, workers=4, progress=look, **options)
        return sum(name.startswith("streamcrypt-") for name in names)

    assert threads_of(sc.encrypt, tmp_path / "small", tmp_path / "a", fsync=False) == 1
    assert threads_of(sc.verify, tmp_path / "a") == 1
    assert threads_of(sc.decrypt, tmp_path / "a", tmp_path / "b", fsync=False) == 1
    assert read_tree(tmp_path / "b") == read_tree(tmp_path / "small")
    assert threads_of(sc.decrypt, tmp_path / "a", tmp_path / "c") == 4
    assert threads_of(sc.encrypt, tmp_path / "large", tmp_path / "d", fsync=False) == 4
    assert threads_of(sc.encrypt, tmp_path / "large", tmp_path / "e", fsync=False, frame_size=1000) == 1


def test_rekey(tree, tmp_path, home):
    root, contents = tree
    service = open_service(home)
    service.create_key()
    arn = service.create_key()["KeyMetadata"]["Arn"]
    sc.encrypt(root, tmp_path / "enc", keys=KEYS, frame_size=F, context={"a": "b"})
    for sign in (False, True):
        target = tmp_path / f"rekeyed {sign}"
        sc.rekey(
            tmp_path / "enc", target, keys=arn, from_keys=KEYS, context={"a": "b"}, sign=sign, frame_size=777
        )
        old, new = read_tree(tmp_path / "enc"), read_tree(target)
        assert set(old) == set(new)
        for name in contents:
            before, after = parse_header(old[name])[0], parse_header(new[name])[0]
            assert before.message_id != after.message_id
            assert after.suite.signed == sign
            assert after.frame_length == 777
            assert after.encrypted_data_keys[0].info == arn.encode()
        sc.decrypt(target, tmp_path / f"plain {sign}", context={"a": "b"})
        assert read_tree(tmp_path / f"plain {sign}") == contents


# ------------------------------------------------------------------------------ keys


def test_the_parent_asks_for_exactly_the_keys_that_the_limits_say(tree, tmp_path, home):
    root, contents = tree
    arn = open_service(home).create_key()["KeyMetadata"]["Arn"]
    for limit in (1, 2, 5, 100):
        cache = sc.DataKeyCache(max_messages=limit)
        target = tmp_path / f"enc{limit}"
        report = sc.encrypt(root, target, keys=arn, cache=cache, workers=3)
        messages = [data for name, data in read_tree(target).items()]
        uses = Counter(parse_header(data)[0].encrypted_data_keys for data in messages)
        # The manifest's length is not known before it is written, so it may have a key of its own.
        ours = Counter(
            parse_header(data)[0].encrypted_data_keys
            for name, data in read_tree(target).items()
            if name != MANIFEST
        )
        assert max(uses.values()) <= limit
        assert len(ours) == -(-len(contents) // limit)
        calls = report["kms"]["calls"]["GenerateDataKey"]
        assert calls == report.data_keys == len(uses)


def test_no_two_messages_share_a_content_key(tmp_path):
    """Message ids, and with them content keys and (key, IV) pairs, are all different."""
    make_tree(tmp_path / "in", {f"{i}": 10 for i in range(2_000)})
    for workers in (1, 4):
        sc.encrypt(tmp_path / "in", tmp_path / f"enc{workers}", keys=KEYS, workers=workers, fsync=False)
    ids = [
        parse_header(data)[0].message_id
        for workers in (1, 4)
        for data in read_tree(tmp_path / f"enc{workers}").values()
    ]
    assert len(set(ids)) == len(ids) == 2 * 2_001


# ------------------------------------------------------------------------------ failures


def test_one_file_that_fails_does_not_stop_the_others(tree, tmp_path):
    root, contents = tree
    os.mkfifo(root / "pipe")
    os.symlink("/etc/hostname", root / "link")
    os.symlink("d0", root / "folder link")
    with pytest.raises(sc.SourceError) as caught:
        sc.encrypt(root, tmp_path / "enc", keys=KEYS)
    report = caught.value.report
    assert {failure.path for failure in report.failed} == {"pipe", "link", "folder link"}
    assert report.files == len(contents)
    assert assert_nothing_partial(tmp_path / "enc", contents, KEYS) == len(contents)
    with pytest.raises(sc.StreamcryptError):  # the tree is not complete, and says so
        sc.verify(tmp_path / "enc", keys=KEYS)


DAMAGE = {
    "first bit": lambda data: bytes((data[0] ^ 1,)) + data[1:],
    "frame": lambda data: data[:-30] + bytes((data[-30] ^ 1,)) + data[-29:],
    "last byte gone": lambda data: data[:-1],
    "byte more": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "text": lambda data: b"hello, world\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
def test_a_damaged_message_leaves_no_file(tree, tmp_path, damage, sign):
    root, contents = tree
    sc.encrypt(root, tmp_path / "enc", keys=KEYS, sign=sign, frame_size=F)
    victim = sorted(contents)[3]
    path = tmp_path / "enc" / victim
    path.write_bytes(damage(path.read_bytes()))
    for act in (
        lambda: sc.verify(tmp_path / "enc", keys=KEYS),
        lambda: sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS),
    ):
        with pytest.raises(sc.IntegrityError) as caught:
            act()
        assert [failure.path for failure in caught.value.report.failed] == [victim]
        assert str(path) in str(caught.value)
    del contents[victim]
    assert read_tree(tmp_path / "dec") == contents


def swap(a, b):
    def change(root):
        first, second = (root / a).read_bytes(), (root / b).read_bytes()
        (root / a).write_bytes(second)
        (root / b).write_bytes(first)

    return change


TREE_TAMPERINGS = {
    "removed": (lambda root: (root / "a").unlink(), {"a"}),
    "added": (lambda root: (root / "z").write_bytes((root / "a").read_bytes()), {"z"}),
    "swapped": (swap("a", "b"), {"a", "b"}),
    "renamed": (lambda root: (root / "a").rename(root / "q"), {"a", "q"}),
    "rolled back": (lambda root: (root / "a").write_bytes((root.parent / "old" / "a").read_bytes()), {"a"}),
    "copied over": (lambda root: (root / "a").write_bytes((root / "b").read_bytes()), {"a"}),
    "moved into a folder": (lambda root: ((root / "n").mkdir(), (root / "a").rename(root / "n" / "a")), {"a", "n/a"}),
    "made a link": (lambda root: ((root / "a").rename(root / "q"), (root / "a").symlink_to("q")), {"a", "q"}),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "named"), TREE_TAMPERINGS.values(), ids=TREE_TAMPERINGS)
def test_a_tree_that_was_changed_as_a_whole(tmp_path, tamper, named):
    make_tree(tmp_path / "in", {"a": 100, "b": 100, "c/d": 5})
    for target in ("old", "enc"):
        sc.encrypt(tmp_path / "in", tmp_path / target, keys=KEYS)
    tamper(tmp_path / "enc")
    for act in (
        lambda: sc.verify(tmp_path / "enc", keys=KEYS),
        lambda: sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS),
    ):
        with pytest.raises(sc.StreamcryptError) as caught:
            act()
        assert {failure.path for failure in caught.value.report.failed} == named
    assert not named & set(read_tree(tmp_path / "dec"))


def test_a_message_in_the_manifests_place_is_named(tmp_path):
    make_tree(tmp_path / "in", {"a": 100})
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS)
    (tmp_path / "enc" / MANIFEST).write_bytes((tmp_path / "enc" / "a").read_bytes())
    with pytest.raises(sc.IntegrityError, match=rf"enc/{MANIFEST}: is not a whole manifest"):
        sc.verify(tmp_path / "enc", keys=KEYS)


def test_the_manifest(tmp_path):
    make_tree(tmp_path / "in", {"a": 100, "b": 100})
    report = sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS)
    assert report.manifest_digest == sc.verify(tmp_path / "enc", keys=KEYS).manifest_digest
    manifest = tmp_path / "enc" / MANIFEST
    data = manifest.read_bytes()
    for position in range(0, len(data), 7):
        manifest.write_bytes(data[:position] + bytes((data[position] ^ 4,)) + data[position + 1 :])
        with pytest.raises(sc.StreamcryptError):
            sc.verify(tmp_path / "enc", keys=KEYS)
    manifest.unlink()
    with pytest.raises(sc.IntegrityError, match="no manifest"):
        sc.verify(tmp_path / "enc", keys=KEYS)
    with pytest.raises(sc.IntegrityError, match="no manifest"):
        sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS, require_manifest=True)
    assert sc.verify(tmp_path / "enc", keys=KEYS, require_manifest=False).files == 2


def test_context_is_checked_before_any_key_is_used(tmp_path, home):
    arn = open_service(home).create_key()["KeyMetadata"]["Arn"]
    (tmp_path / "in").write_bytes(b"x")
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=arn, context={"a": "1", "é": "2"})
    for wrong in (
        {"a": "2"},
        {"b": ""},
        {"A": "1"},
        {"a": "1", "e\u0301": "2"},
        {"a": "1 "},
        {"aws-crypto-x": ""},
    ):
        with pytest.raises(sc.ContextMismatchError) as caught:
            sc.decrypt(tmp_path / "enc", tmp_path / "dec", context=wrong)
        assert caught.value.report["kms"]["calls"] == {}
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", context={"é": "2"})


def test_folders_that_are_made_above_have_durable_names(tree, tmp_path, flushed):
    """Also the root's, and those above it that were missing: a power loss must not take the whole tree."""
    root, _ = tree
    (tmp_path / "one").write_bytes(b"plaintext")
    jobs = {
        "folder": lambda place: sc.encrypt(root, place / "a/b", keys=KEYS),
        "file": lambda place: sc.encrypt(tmp_path / "one", place / "a/b/c", keys=KEYS),
        "open": lambda place: sc.open(place / "a/b/c", "wb", keys=KEYS).close(),
    }
    for name, work in jobs.items():
        flushed.clear()
        work(tmp_path / name)
        wanted = {str(tmp_path), *(str(tmp_path / name / part) for part in ("", "a", "a/b"))}
        assert wanted <= set(flushed), name
        flushed.clear()
        work(tmp_path / name / "more")
        assert str(tmp_path) not in flushed, name
    flushed.clear()
    sc.encrypt(root, tmp_path / "fast/a", keys=KEYS, fsync=False)
    assert not [path for path in flushed if path.startswith(str(tmp_path)) and "/_streamcrypt" not in path]


# ------------------------------------------------------------------------------ sources that change


def test_a_source_that_changes_while_it_is_read(tmp_path):
    """Appended to, truncated, replaced, touched: noticed, and no message is published."""
    size = 24 * 2**20

    def append(path):
        with path.open("ab") as file:
            file.write(b"more")

    def replace(path):
        (path.parent / "other").write_bytes(path.read_bytes())
        (path.parent / "other").rename(path)

    def overwrite(path):
        with path.open("r+b") as file:
            file.write(b"x" * 100)

    changes = {
        "append": append,
        "truncate": lambda path: os.truncate(path, size // 2),
        "replace": replace,
        "overwrite": overwrite,
        "remove": lambda path: path.unlink(),
    }
    noticed = 0
    for name, change in changes.items():
        path = tmp_path / name
        path.write_bytes(bytes(size))
        target = tmp_path / f"{name}.enc"
        begun = threading.Event()

        def act(path=path, change=change, begun=begun):
            begun.wait(20)
            change(path)

        thread = threading.Thread(target=act)
        thread.start()
        watching = threading.Thread(target=watch_for_temporary, args=(tmp_path, begun))
        watching.start()
        try:
            sc.encrypt(path, target, keys=KEYS, frame_size=256, fsync=False)
        except sc.SourceError:
            noticed += 1
            assert not target.exists()
        else:  # it changed only after it had been read: then what was read is what it was
            assert sc.decrypt_bytes(target.read_bytes(), keys=KEYS) == bytes(size)
        finally:
            begun.set()
            thread.join()
            watching.join()
    assert noticed == len(changes)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("nameless", [True, False])
def test_a_small_file_has_no_name_until_it_is_whole(tmp_path, monkeypatch, nameless):
    """A job that is killed leaves nothing of it, where the file system has files without names."""
    if not nameless:
        monkeypatch.setattr("streamcrypt.storage._NAMELESS_FLAGS", 0)
    elif not has_nameless_files(tmp_path):
        pytest.skip("this file system has no files without a name")
    tree = LocalTree(str(tmp_path))
    for name, overwrite in (("sub/a", False), ("sub/b", False), ("sub/a", True), ("sub/b", False)):
        before = read_tree(tmp_path)
        target = tree.create(name, size=5, overwrite=overwrite)
        target.write_at(0, b"whole")
        assert len(leftovers(tmp_path)) == (0 if nameless and not overwrite else 1)
        state = target.state()
        if name in before and not overwrite:
            with pytest.raises(sc.DestinationError, match="exists already"):
                target.publish(overwrite=False)
            target.discard()
            assert read_tree(tmp_path) == before
        else:
            target.publish(overwrite=overwrite)
            assert tree.state(name) == state
            assert read_tree(tmp_path) == {**before, name: b"whole"}
        target = tree.create("sub/c", size=5)
        target.write_at(0, b"half")
        target.discard()
        assert not leftovers(tmp_path)
    tree.close()


def has_nameless_files(folder):
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except (AttributeError, OSError):
        return False
    return True


def test_a_source_is_held_against_its_name(tmp_path):
    """What is under the name when all is read must be what was opened, as it was then."""
    tree = LocalTree(str(tmp_path))
    for change in ("none", "append", "touch", "replace", "remove", "link"):
        path = tmp_path / change
        path.write_bytes(b"content")
        source = tree.open(change)
        assert source.read_at(0, memoryview(bytearray(7))) == 7
        if change == "append":
            path.write_bytes(b"content and more")
        elif change == "touch":
            os.utime(path, (1, 1))
        elif change in ("replace", "link"):
            other = tmp_path / "other"
            other.write_bytes(b"content")
            shutil.copystat(path, other)
            path.unlink()
            other.rename(path) if change == "replace" else path.symlink_to(other)
        elif change == "remove":
            path.unlink()
        with contextlib.nullcontext() if change == "none" else pytest.raises(sc.SourceError, match="changed"):
            source.check_unchanged()
        source.close()
    tree.close()


@pytest.mark.parametrize("moment", ["before it is read", "after it was read"])
@pytest.mark.parametrize("change", ["append", "truncate", "rewrite", "remove"])
def test_a_small_source_that_changes_while_it_is_read(tmp_path, monkeypatch, moment, change):
    contents = make_tree(tmp_path / "in", {"a": 100, "changes": 100, "z": 100})
    path = tmp_path / "in" / "changes"
    changes = {
        "append": lambda: path.write_bytes(contents["changes"] + b"more"),
        "truncate": lambda: os.truncate(path, 50),
        "rewrite": lambda: path.write_bytes(bytes(100)),
        "remove": path.unlink,
    }
    read_at = LocalSource.read_at

    def changed(source, offset, buffer):
        ours = source.state[2] == inode
        if ours and moment == "before it is read":
            changes[change]()
        done = read_at(source, offset, buffer)
        if ours and moment == "after it was read":
            changes[change]()
        return done

    inode = path.stat().st_ino
    os.utime(path, (1, 1))  # so that a rewrite shows, however coarse the clock
    monkeypatch.setattr(LocalSource, "read_at", changed)
    with pytest.raises(sc.SourceError, match="changed while it was read"):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, workers=1, fsync=False)
    assert set(read_tree(tmp_path / "enc")) == {"a", "z", MANIFEST, JOURNAL}
    assert not leftovers(tmp_path)


def watch_for_temporary(folder, event):
    """Set the event as soon as a job has begun to write there."""
    while not event.is_set():
        if leftovers(folder):
            event.set()


# ------------------------------------------------------------------------------ death


def run_cli(*words, **options):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, words)], **options)


PATHS = [str(Path(sc.__file__).parents[1]), str(Path(craft.__file__).parents[1])]
PROGRAM = f"""
import sys
sys.path[:0] = {PATHS!r}
import streamcrypt as sc
from families.keyrings import CRAFT_KEYRING
operation, source, target, *options = sys.argv[1:]
words = dict(keys=CRAFT_KEYRING, workers=2, overwrite="overwrite" in options)
if operation == "encrypt":
    words["frame_size"] = 128
print("started", flush=True)
getattr(sc, operation)(source, target, **words)
print("done", flush=True)
"""


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_twenty_kills_of_the_parent(heavy, tmp_path):
    """RELIABILITY 12: SIGKILL at random times leaves no partial name, no process, and what is left over
    is recognised and removed by the next run."""
    root, contents = heavy
    rng = random.Random(12)
    target, plain = tmp_path / "enc", tmp_path / "dec"
    complete = tmp_path / "complete"
    sc.encrypt(root, complete, keys=KEYS, fsync=False, **MANY_FRAMES)
    killed = 0
    # As long as the job takes here, so that most kills hit it while it runs.
    process = run_cli("encrypt", root, target, "overwrite", stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    started = time.monotonic()
    assert process.stdout.readline() == "done\n"
    duration = time.monotonic() - started
    process.communicate()
    for trial in range(20):
        operation, source, destination = (
            ("encrypt", root, target) if trial % 2 else ("decrypt", complete, plain)
        )
        process = run_cli(operation, source, destination, "overwrite", stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "started\n"
        time.sleep(rng.uniform(0.0, duration))
        children = child_processes(process.pid)
        process.kill()
        process.wait()
        killed += "done" not in process.stdout.read()
        process.stdout.close()
        assert wait_until(lambda children=children: not any(map(is_running, children)), 5.0), "orphans"
        if operation == "encrypt":
            assert_nothing_partial(target, contents, KEYS)
        else:
            assert_nothing_partial_decrypted(plain, contents)
    assert killed >= 10
    sc.encrypt(root, target, keys=KEYS, overwrite=True, **MANY_FRAMES)
    sc.decrypt(target, plain, keys=KEYS, overwrite=True)
    assert not leftovers(tmp_path)
    assert read_tree(plain) == contents


def test_twenty_kills_of_workers(heavy, tmp_path):
    """A worker that dies takes nothing with it: its messages start again under new ids, the job ends well."""
    root, contents = heavy
    rng = random.Random(13)
    killed, others = 0, set(child_processes())  # a server of another test may run
    for trial in range(30):
        if killed >= 20:
            break
        target = tmp_path / f"enc{trial}"
        stop = threading.Event()

        def kill(stop=stop):
            nonlocal killed
            deadline = time.monotonic() + 8
            kills = 0  # two: a third that meets the same file makes it fail, as it should
            while not stop.is_set() and time.monotonic() < deadline and kills < 2:
                children = [child for child in child_processes() if child not in others]
                if not children:
                    stop.wait(0.002)
                    continue
                stop.wait(rng.uniform(0, 0.35))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(children), signal.SIGKILL)
                    kills += 1
                    killed += 1

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            report = sc.encrypt(root, target, keys=KEYS, workers=2, fsync=False, **MANY_FRAMES)
        finally:
            stop.set()
            thread.join()
        assert report.failed == []
        assert assert_nothing_partial(target, contents, KEYS) == len(contents)
        assert not leftovers(target)
        sc.verify(target, against=root, keys=KEYS)
    assert killed >= 10, "too few kills met a running worker"
    assert set(child_processes()) <= others


WAYS_TO_DIE = {
    "SIGKILL": signal.SIGKILL,
    "SIGSEGV": signal.SIGSEGV,
    "SIGABRT": signal.SIGABRT,
    "SIGTERM": signal.SIGTERM,
    "SIGBUS": signal.SIGBUS,
}


@pytest.mark.parametrize("moment", ["at once", "half way", "done"])
def test_small_files_of_a_worker_that_died(tmp_path, monkeypatch, moment):
    """Whole messages that are there already are kept and listed, the others begin again under new ids."""
    contents = make_tree(tmp_path / "in", {f"d{i % 3}/{i}": i * 10 for i in range(200)})
    kept = []

    class Dying(Worker):
        def take(self, tasks):
            assert isinstance(tasks[0], SmallFiles) or moment != "at once" or kept
            if not kept:
                (files,) = tasks
                rows = {"at once": 0, "half way": len(files.names) // 2, "done": len(files.names)}[moment]
                if rows:
                    part = files._replace(names=files.names[:rows], lengths=files.lengths[:rows])
                    assert not super().take([part])[0].errors
                kept.extend(files.message_ids[:rows] or files.message_ids[:1])
                sys.exit("died")
            return super().take(tasks)

    monkeypatch.setattr("streamcrypt.engine.pool.Worker", Dying)
    report = sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, workers=1, fsync=False)
    assert (report.files, report.failed) == (200, [])
    encrypted = read_tree(tmp_path / "enc")
    ids = {parse_header(data)[0].message_id for data in encrypted.values()}
    assert len(ids) == 201
    if moment == "at once":
        assert not ids & set(kept), "these keys may have been used"
    else:
        assert set(kept) <= ids
    assert sc.verify(tmp_path / "enc", keys=KEYS, against=tmp_path / "in").files == 200
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS, fsync=False)
    assert read_tree(tmp_path / "dec") == contents


@pytest.mark.parametrize("how", WAYS_TO_DIE.values(), ids=WAYS_TO_DIE)
def test_a_job_whose_workers_always_die_ends_with_an_error(heavy, tmp_path, how):
    """However they die: an error within seconds, never a hang, and nothing partial."""
    root, contents = heavy
    stop, others = threading.Event(), set(child_processes())

    def kill():
        while not stop.is_set():
            for child in set(child_processes()) - others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, how)
            stop.wait(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(sc.StreamcryptError, match="worker process"):
            sc.encrypt(root, tmp_path / "enc", keys=KEYS, workers=2, **MANY_FRAMES)
    finally:
        stop.set()
        thread.join()
    assert time.monotonic() - started < 15
    assert_nothing_partial(tmp_path / "enc", contents, KEYS)
    assert not leftovers(tmp_path)
    assert set(child_processes()) <= others


def test_ctrl_c_leaves_nothing_partial(heavy, tmp_path):
    root, contents = heavy
    for delay in (0.05, 0.6, 1.2):
        target = tmp_path / f"enc{delay}"
        process = run_cli("encrypt", root, target, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "started\n"
        time.sleep(delay)
        children = child_processes(process.pid)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode != 0 or read_tree(target)
        assert wait_until(lambda children=children: not any(map(is_running, children)), 5.0)
        assert_nothing_partial(target, contents, KEYS)
        assert not leftovers(target)


# ------------------------------------------------------------------------------ resources


@contextlib.contextmanager
def limit(what, soft):
    old = resource.getrlimit(what)
    resource.setrlimit(what, (soft, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, old)


def test_threads_that_write_one_file_seal_no_frame_twice(tmp_path):
    """Two plaintexts under one IV would give away both, and the key of the tags."""
    blocks = [bytes([number]) * 2**18 for number in range(1, 41)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with sc.open(tmp_path / "m", "wb", keys=KEYS, frame_size=1024) as file:
            threads = [
                threading.Thread(target=lambda part=part: [file.write(block) for block in part])
                for part in (blocks[n::4] for n in range(4))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    plaintext = sc.open(tmp_path / "m", keys=KEYS).read()
    found = Counter(plaintext[start : start + 2**18] for start in range(0, len(plaintext), 2**18))
    assert found == Counter(blocks)


class _Reentrant:
    """A target within whose write something writes again, as a signal handler may."""

    def __init__(self):
        self.again = None
        self.discarded = False

    def write_at(self, offset, data):
        if self.again is not None:
            self.again()

    def discard(self):
        self.discarded = True


@pytest.mark.parametrize("again", ["write", "close"])
def test_a_write_within_a_write_is_refused(again):
    materials = Materials(encrypting_keyring(KEYS)).for_encryption(UNSIGNED, {}, None)
    target = _Reentrant()
    message = OutgoingMessage.begin(materials, header_template(materials, F), F)
    file = EncryptingFile(target, message, overwrite=False, durable=False)
    target.again = (lambda: file.write(b"x" * 2**21)) if again == "write" else file.close
    with pytest.raises(RuntimeError, match="within another"):
        file.write(b"y" * 2**21)
    assert target.discarded
    assert file.closed


def test_a_forked_child_leaves_a_message_to_its_parent(tmp_path):
    with sc.open(tmp_path / "m", "wb", keys=KEYS, frame_size=1024) as file:
        file.write(b"before " * 2**18)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    file.write(b"child " * 2**18)
                except ValueError as error:
                    file.close()  # must neither publish nor remove what the parent writes
                    file.discard()
                    code = 0 if "fork" in str(error) and not (tmp_path / "m").exists() else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        file.write(b"after")
    assert sc.open(tmp_path / "m", keys=KEYS).read() == b"before " * 2**18 + b"after"


def write_message(path, plaintext):
    with sc.open(path, "wb", keys=KEYS) as file:
        file.write(plaintext)


def test_a_file_system_that_is_full(tmp_path):
    """A file-size limit stands in for it: every failure is clean, what was there before stays."""
    contents = make_tree(tmp_path / "in", {"a": 1000, "big": 3 * 2**20, "c": 1000})
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sc.encrypt(tmp_path / "in" / "a", tmp_path / "kept", keys=KEYS)
    kept = (tmp_path / "kept").read_bytes()
    try:
        for most in (0, 500, 4096, 2**20, 3 * 2**20):
            target = tmp_path / f"enc{most}"
            with limit(resource.RLIMIT_FSIZE, most), pytest.raises(sc.StreamcryptError) as caught:
                sc.encrypt(tmp_path / "in", target, keys=KEYS)
            assert isinstance(caught.value, sc.DestinationError)
            assert_nothing_partial(target, contents, KEYS)
            assert not leftovers(target)
            with limit(resource.RLIMIT_FSIZE, most), pytest.raises(sc.DestinationError):
                sc.encrypt(tmp_path / "in" / "big", tmp_path / "kept", keys=KEYS, overwrite=True)
            assert (tmp_path / "kept").read_bytes() == kept
            with limit(resource.RLIMIT_FSIZE, most), pytest.raises(sc.DestinationError):
                write_message(tmp_path / "kept", bytes(4 * 2**20))
            assert (tmp_path / "kept").read_bytes() == kept
        assert not leftovers(tmp_path)
    finally:
        signal.signal(signal.SIGXFSZ, old)


def test_too_few_file_descriptors_is_an_error_and_not_a_hang(tree, tmp_path):
    root, contents = tree
    used = len(os.listdir("/proc/self/fd"))
    for room in (1, 3, 6, 12):
        target = tmp_path / f"enc{room}"
        with limit(resource.RLIMIT_NOFILE, used + room), contextlib.suppress(sc.StreamcryptError):
            sc.encrypt(root, target, keys=KEYS, workers=2)
        assert_nothing_partial(target, contents, KEYS)
        assert not leftovers(target)
    assert len(os.listdir("/proc/self/fd")) <= used + 2


def test_descriptors_do_not_grow_with_the_tree(tmp_path):
    make_tree(tmp_path / "in", {f"{i % 50}/{i}": 10 for i in range(500)})
    used = len(os.listdir("/proc/self/fd"))
    with limit(resource.RLIMIT_NOFILE, used + 150):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, workers=2, fsync=False)
        sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS, workers=2, fsync=False)
    assert len(os.listdir("/proc/self/fd")) <= used + 2


MEMORY_PROGRAM = PROGRAM.replace(
    'print("started", flush=True)\n',
    'print("started", flush=True)\nwords.pop("frame_size", None)\n'
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n",
)


@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
def test_memory_does_not_grow_with_the_file(tmp_path, sign):
    """A file of 1.1 GiB (sparse) under an address space of 1 GiB."""
    size = 2**30 + 2**27
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    program = MEMORY_PROGRAM.replace("overwrite=", f"sign={sign}, fsync=False, overwrite=", 1)
    for operation, source, target in (("encrypt", "large", "enc"), ("verify", "enc", None)):
        code = program if operation == "encrypt" else VERIFY_PROGRAM
        words = [operation, tmp_path / source, tmp_path / (target or "-")]
        run = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=100
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.endswith("done\n")
    assert (tmp_path / "enc").stat().st_size > size


VERIFY_PROGRAM = MEMORY_PROGRAM.replace(
    "getattr(sc, operation)(source, target, **words)", "sc.verify(source, keys=CRAFT_KEYRING)"
)


def test_modes_of_what_is_written(tree, tmp_path):
    """0600 and 0700 whatever the umask, also where a wider file stood before (RELIABILITY 26)."""
    root, _ = tree
    for umask in (0o000, 0o077):
        old = os.umask(umask)
        try:
            target, plain = tmp_path / f"enc{umask}", tmp_path / f"dec{umask}"
            sc.encrypt(root, target, keys=KEYS)
            sc.decrypt(target, plain, keys=KEYS)
            (tmp_path / "wide").write_bytes(b"old")
            (tmp_path / "wide").chmod(0o644)
            sc.decrypt(target / "d0/file0", tmp_path / "wide", keys=KEYS, overwrite=True)
            assert stat.S_IMODE((tmp_path / "wide").stat().st_mode) == 0o600
            with sc.open(tmp_path / f"written{umask}", "wb", keys=KEYS) as file:
                file.write(b"x")
            assert stat.S_IMODE((tmp_path / f"written{umask}").stat().st_mode) == 0o600
        finally:
            os.umask(old)
        for folder in (target, plain):
            for path in (folder, *folder.rglob("*")):
                mode = stat.S_IMODE(path.stat().st_mode)
                assert mode == (0o700 if path.is_dir() else 0o600), path


# ------------------------------------------------------------------------------ names and links


ODD_NAMES = ["with space", "new\nline", "-dash", "ünï", "a" * 200, "quote'\"", "\\back", "*", "~", "b\x7f"]


def test_odd_names_come_back(tmp_path):
    contents = make_tree(tmp_path / "in", {f"{name}/{name}": 10 for name in ODD_NAMES})
    raw = os.fsencode(tmp_path / "in") + b"/\xff\xfe not UTF-8"
    with open(raw, "wb") as file:
        file.write(b"bytes")
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS)
    sc.verify(tmp_path / "enc", keys=KEYS, against=tmp_path / "in")
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS)
    found = read_tree(tmp_path / "dec")
    assert found.pop(os.fsdecode(b"\xff\xfe not UTF-8")) == b"bytes"
    assert found == contents


def test_names_of_255_bytes(tmp_path):
    """The longest names there are; our temporary name is not made from them."""
    contents = make_tree(tmp_path / "in", {"n" * 255: 10, "m" * 250 + "/" + "o" * 255: 10})
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS)
    sc.decrypt(tmp_path / "enc", tmp_path / "dec", keys=KEYS)
    assert read_tree(tmp_path / "dec") == contents


@pytest.mark.parametrize(
    "name", ["../x", "./../x", "./", "/x", "a/../../x", "a//b", ".", "..", "a/.", "x\0y"]
)
def test_names_that_leave_the_root_are_refused(tmp_path, name):
    make_tree(tmp_path / "in", {"a": 1})
    with pytest.raises(sc.StreamcryptError):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, files=[name])
    assert not (tmp_path / "x").exists()


def test_a_destination_folder_that_is_a_link_is_not_followed(tmp_path):
    make_tree(tmp_path / "in", {"d/a": 1})
    (tmp_path / "enc").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "enc" / "d").symlink_to(tmp_path / "outside")
    with pytest.raises(sc.StreamcryptError):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, overwrite=True)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_folder_deeper_than_the_stack_fails_alone(tmp_path):
    make_tree(tmp_path / "in", {"a": 1})
    descriptor = os.open(tmp_path / "in", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    with pytest.raises(sc.SourceError, match="lies in more than 800 folders"):
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS)
    assert (tmp_path / "enc" / "a").exists()
    subprocess.run(["rm", "-rf", tmp_path / "in"], check=True)  # deeper than pytest's own removal goes


def test_a_fifo_as_source_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for act in (
        lambda: sc.encrypt(tmp_path / "pipe", tmp_path / "out", keys=KEYS),
        lambda: sc.decrypt(tmp_path / "pipe", tmp_path / "out", keys=KEYS),
        lambda: sc.inspect(tmp_path / "pipe"),
        lambda: sc.open(tmp_path / "pipe", keys=KEYS),
    ):
        with pytest.raises(sc.SourceError, match="named pipe"):
            act()


def test_no_plaintext_in_any_other_file(tmp_path):
    """RELIABILITY 27 in small: while a tree is encrypted, no file but the source ever holds its bytes."""
    canary = b"CANARY-7c1e" * 100
    make_tree(tmp_path / "in", {f"{i}": 1 for i in range(30)})
    for i in range(30):
        (tmp_path / "in" / f"{i}").write_bytes(canary)
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            for path in tmp_path.rglob("*"):
                if tmp_path / "in" in path.parents or not path.is_file():
                    continue
                with contextlib.suppress(OSError):
                    if b"CANARY-7c1e" in path.read_bytes():
                        seen.append(path)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for i in range(5):
            sc.encrypt(tmp_path / "in", tmp_path / f"enc{i}", keys=KEYS, sign=bool(i % 2))
            sc.rekey(tmp_path / f"enc{i}", tmp_path / f"rekeyed{i}", keys=KEYS, from_keys=KEYS)
            sc.verify(tmp_path / f"enc{i}", keys=KEYS)
    finally:
        stop.set()
        thread.join()
    assert not seen


# ------------------------------------------------------------------------------ the pools themselves


def test_pools_end_their_workers(tmp_path):
    from streamcrypt.engine.worker import Setup

    setup = Setup(LocalTree(str(tmp_path)), None)
    for cancel in (False, True):
        processes = ProcessPool(setup, 2)
        pids = processes.pids
        assert all(map(is_running, pids))
        processes.close(cancel=cancel)
        assert not any(map(is_running, pids))
        threads = threading.active_count()
        pool = ThreadPool(setup, 2)
        assert threading.active_count() == threads + 2
        pool.close(cancel=cancel)
        assert threading.active_count() == threads


def test_lists_and_outcomes_that_fill_both_directions_at_once(tmp_path, monkeypatch):
    """64 long names, and as many errors that name them, are more than a socket holds: who sent them waited for ever."""
    monkeypatch.setattr(run, "processes_pay", lambda files, frames: True)
    (tmp_path / "in").mkdir()
    folders = [os.open(tmp_path / "in", os.O_RDONLY)]
    for _ in range(14):
        os.mkdir("d" * 250, dir_fd=folders[-1])
        folders.append(os.open("d" * 250, os.O_RDONLY, dir_fd=folders[-1]))
    for number in range(1000):
        os.close(os.open(f"{number:0200}", os.O_WRONLY | os.O_CREAT, dir_fd=folders[-1]))
    for folder in folders:
        os.close(folder)
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, workers=2)
    parent = os.open(tmp_path / "enc", os.O_RDONLY)
    for _ in range(14):
        parent, before = os.open("d" * 250, os.O_RDONLY, dir_fd=parent), parent
        os.close(before)
    for name in os.listdir(parent):
        message = os.open(name, os.O_RDWR, dir_fd=parent)
        length = os.fstat(message).st_size
        os.pwrite(message, bytes([os.pread(message, 1, length - 1)[0] ^ 1]), length - 1)
        os.close(message)
    os.close(parent)
    with pytest.raises(sc.IntegrityError) as caught:
        sc.verify(tmp_path / "enc", keys=KEYS, workers=2)
    assert len(caught.value.report.failed) == 1000


def test_a_word_is_one_pattern_and_not_its_letters(tmp_path):
    """``*`` is one of the letters: ``include="sub/*"`` would take everything, ``exclude="secret*"`` too."""
    make_tree(tmp_path / "in", {"a": 1, "sub/b": 1, "secret": 1})
    for number, (words, names) in enumerate(
        (
            ({"include": "sub/*"}, {"sub/b"}),
            ({"exclude": "secret*"}, {"a", "sub/b"}),
            ({"files": "sub/b"}, {"sub/b"}),
            ({"include": ("a", "secret")}, {"a", "secret"}),
        )
    ):
        sc.encrypt(tmp_path / "in", tmp_path / str(number), keys=KEYS, **words)
        assert set(read_tree(tmp_path / str(number))) - {MANIFEST} == names, words


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ({"include": "**/*.bin"}, {"a.bin", "sub/b.bin", "sub/deep/c.bin"}),
        ({"exclude": "**/*.bin"}, {"d"}),
        ({"include": "sub/**/*.bin"}, {"sub/b.bin", "sub/deep/c.bin"}),
        ({"include": "sub/**"}, {"sub/b.bin", "sub/deep/c.bin"}),
        ({"include": "**/deep/*"}, {"sub/deep/c.bin"}),
        ({"include": "**/sub/**/c.bin"}, {"sub/deep/c.bin"}),
        ({"files": ["./a.bin", "./sub/b.bin"]}, {"a.bin", "sub/b.bin"}),
    ],
)
def test_names_as_other_tools_write_them(tmp_path, words, names):
    """``**/`` is any folder or none, as for shells, git and pathlib; ``find .`` puts ``./`` before a name."""
    make_tree(tmp_path / "in", {"a.bin": 1, "sub/b.bin": 1, "sub/deep/c.bin": 1, "d": 1})
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=KEYS, **words)
    assert set(read_tree(tmp_path / "enc")) - {MANIFEST} == names


def test_a_pair_is_stored_or_authenticated_only(tmp_path):
    """Of a name that was given both ways, the value that was to be stored got lost without a word."""
    (tmp_path / "a").write_bytes(b"plaintext")
    both = {"context": {"Tenant": "1", "Stage": "train"}, "authenticated_context": {"Tenant": "2"}}
    with pytest.raises(ValueError, match="Tenant"):
        sc.encrypt(tmp_path / "a", tmp_path / "a.enc", keys=KEYS, **both)
    with pytest.raises(ValueError, match="Tenant"):
        sc.encrypt_bytes(b"plaintext", keys=KEYS, **both)
    with pytest.raises(ValueError, match="Tenant"):
        sc.open(tmp_path / "a.enc", "wb", keys=KEYS, **both)
    assert not (tmp_path / "a.enc").exists()


def test_a_failure_before_the_first_file_has_a_report_too(home, tmp_path):
    """Of what KMS was asked, in Python and in the JSON: its refusal is a call."""
    kms = sc.kms_client("local")
    arn = kms.create_key()["KeyMetadata"]["Arn"]
    make_tree(tmp_path / "in", {"a": 1})
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=arn)
    kms.disable_key(KeyId=arn)
    with pytest.raises(sc.KeyAccessError) as caught:
        sc.verify(tmp_path / "enc")
    assert caught.value.report["kms"]["calls"] == {"Decrypt": 1}
    assert [failure.error for failure in caught.value.report.failed] == [caught.value]
    with pytest.raises(sc.DestinationError) as caught:
        sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=arn)
    assert caught.value.report["failed"][0]["error"] == str(caught.value)
