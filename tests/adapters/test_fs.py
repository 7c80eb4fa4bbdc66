"""The fsspec filesystem: paths of every form, plaintext sizes, whole files only, no keys in a pickle."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import random
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
from families.datasets import KEY, flip, kms_calls, make_key

import streamcrypt as sc
from streamcrypt.fs import CryptFileSystem, PlaintextOnDiskWarning, crypt_place, process
from streamcrypt.fs.files import TargetFile
from streamcrypt.message.frames import FrameCipher
from streamcrypt.storage import LocalSource

F = 4096
SIZES = [0, 1, F - 1, F, F + 1, 3 * F, 3 * F + 500, 5 * 2**20 + 77]


@pytest.fixture
def fs(home: Path) -> CryptFileSystem:
    make_key()
    return CryptFileSystem(keys=KEY, frame_size=F, fsync=False)


@pytest.fixture
def memory() -> Iterator[None]:
    from fsspec.implementations.memory import MemoryFileSystem

    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def bytes_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# -- reading and writing


@pytest.mark.parametrize("name", ["train", "data", "x.y", "a b"])
def test_a_relative_folder_of_any_name(
    fs: CryptFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import pyarrow as pa

    from streamcrypt import arrow, parquet

    monkeypatch.chdir(tmp_path)
    parquet.write_table(pa.table({"a": [1, 2]}), f"{name}/part.parquet", keys=KEY)
    assert parquet.read_table(name).num_rows == 2
    assert parquet.dataset(name).count_rows() == 2
    monkeypatch.chdir(tmp_path / name)
    arrow.write_file(pa.table({"a": [1, 2]}), name, keys=KEY)
    assert arrow.read_table(name).num_rows == 2


@pytest.mark.parametrize("target", ["local", "memory"])
@pytest.mark.parametrize("size", SIZES)
def test_round_trip(home: Path, memory: None, tmp_path: Path, size: int, target: str) -> None:
    make_key()
    url = f"crypt::file://{tmp_path}/a.bin" if target == "local" else "crypt::memory://tree/a.bin"
    data = bytes_of(size)
    with fsspec.open(url, "wb", keys=KEY, frame_size=F) as file:
        for start in range(0, size, 100_000):
            file.write(data[start : start + 100_000])
    with fsspec.open(url) as file:
        assert file.size == size
        assert file.read() == data
        for whence, offset in ((0, size // 2), (2, -(size // 3)), (0, size + 5)):
            place = file.seek(offset, whence)
            assert file.read(5000) == data[place : place + 5000]
        file.seek(0)
        assert b"".join(iter(lambda: file.read(7001), b"")) == data
        file.seek(0)
        room = bytearray(size + 3)
        assert file.readinto(room) == size
        assert room[:size] == data
    fs, path = fsspec.url_to_fs(url)
    assert fs.cat_file(path) == data
    assert fs.cat_file(path, 10, -10) == data[10:-10]
    assert fs.info(path)["size"] == fs.size(path) == size
    if target == "local":
        assert sc.decrypt_bytes((tmp_path / "a.bin").read_bytes()) == data  # a message like any other


def test_text_lines_and_compression(fs: CryptFileSystem, tmp_path: Path) -> None:
    path = f"{tmp_path}/a.csv.gz"
    with fs.open(path, "wt", compression="gzip") as file:
        file.writelines(f"{i},x\n" for i in range(20_000))
    with fs.open(path, "rt", compression="infer") as file:
        assert sum(1 for _ in file) == 20_000
    assert fs.read_text(path, compression="gzip").splitlines()[-1] == "19999,x"


def test_every_method_takes_every_form_of_a_path(home: Path, tmp_path: Path) -> None:
    make_key()
    path = f"{tmp_path}/tree/a.bin"
    fs, _ = fsspec.url_to_fs(f"crypt::file://{path}", keys=KEY)
    fs.pipe_file(path, b"abcdef")
    forms = [
        path,
        f"file://{path}",
        f"crypt://{path}",
        f"crypt::file://{path}",
        f"streamcrypt::file://{path}",
    ]
    for form in [*forms, f"crypt::{path}", f"crypt::simplecache::file://{path}", Path(path)]:
        folder = str(form).removesuffix("/a.bin")
        assert fs._strip_protocol(form) == path
        assert fs.info(form)["size"] == 6
        assert fs.cat_file(form) == fs.cat(form) == b"abcdef"
        assert fs.cat_ranges([str(form)], [1], [3]) == [b"bc"]
        assert fs.exists(form)
        assert fs.isfile(form)
        assert not fs.isdir(form)
        assert fs.isdir(folder)
        assert fs.ls(folder, detail=False) == fs.find(folder) == fs.glob(f"{folder}/*.bin") == [path]
        assert [files for _, _, files in fs.walk(folder)] == [["a.bin"]]
        assert fs.du(folder) == 6
        assert fs.modified(form) == fs.fs.modified(path)
        with fs.open(form) as file:
            assert file.read() == b"abcdef"
        fs.mv(str(form), f"{folder}/b.bin")
        fs.copy(f"{folder}/b.bin", str(form))
        fs.rm(f"{folder}/b.bin")
        fs.touch(form, truncate=False)
        assert fs.cat_file(form) == b"abcdef"
    with fsspec.open(fs.unstrip_protocol(path)) as file:
        assert file.read() == b"abcdef"


@pytest.mark.usefixtures("memory")
def test_unchained_with_a_target_protocol(home: Path) -> None:
    make_key()
    options = {"target_protocol": "memory", "keys": KEY}
    with fsspec.open("crypt://tree/a.bin", "wb", **options) as file:
        file.write(b"abc")
    assert fsspec.filesystem("memory").cat_file("/tree/a.bin")[:1] == b"\x02"
    with fsspec.open("crypt://tree/a.bin", target_protocol="memory") as file:
        assert file.read() == b"abc"


def test_many_files_by_glob(fs: CryptFileSystem, tmp_path: Path) -> None:
    for i in range(5):
        fs.pipe_file(f"{tmp_path}/p{i}.csv", b"%d" % i)
    files = fsspec.open_files(f"crypt::file://{tmp_path}/p*.csv")
    assert [file.open().read() for file in files] == [b"%d" % i for i in range(5)]


# -- sizes and names


def test_sizes_are_those_of_the_plaintext_and_are_remembered(
    fs: CryptFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, size in enumerate(SIZES):
        fs.pipe_file(f"{tmp_path}/d/{i}", bytes(size))
    signed = CryptFileSystem(keys=KEY, frame_size=F, sign=True)
    signed.pipe_file(f"{tmp_path}/d/signed", bytes(F))
    expected = {f"{tmp_path}/d/{i}": size for i, size in enumerate(SIZES)} | {f"{tmp_path}/d/signed": F}
    opened = []
    real = fs._source
    monkeypatch.setattr(fs, "_source", lambda *args: opened.append(args) or real(*args))
    for _ in range(3):
        assert {info["name"]: info["size"] for info in fs.ls(f"{tmp_path}/d")} == expected
        found = fs.find(f"{tmp_path}/d", detail=True)
        assert {name: info["size"] for name, info in found.items()} == expected
        assert fs.sizes(list(expected)) == list(expected.values())
        assert fs.du(f"{tmp_path}/d") == sum(expected.values())
    assert len(opened) == len(expected)
    fs.pipe_file(f"{tmp_path}/d/0", bytes(9))
    assert fs.info(f"{tmp_path}/d/0")["size"] == 9


def test_what_is_no_message_or_is_damaged(fs: CryptFileSystem, tmp_path: Path) -> None:
    fs.pipe_file(f"{tmp_path}/d/cut", bytes(3 * F))
    cut = tmp_path / "d" / "cut"
    cut.write_bytes(cut.read_bytes()[:-F])
    (tmp_path / "d" / "plain").write_bytes(b"hello")
    sizes = {Path(info["name"]).name: info["size"] for info in fs.ls(f"{tmp_path}/d")}
    assert sizes["plain"] == 5
    with pytest.raises(sc.FormatError):
        fs.cat_file(f"{tmp_path}/d/plain")
    with pytest.raises(sc.IntegrityError):  # whether or not its length fits a number of frames
        fs.cat_file(f"{tmp_path}/d/cut")
    for call in (fs.info, fs.open, fs.cat_file):
        with pytest.raises(FileNotFoundError):
            call(f"{tmp_path}/d/none")
    with pytest.raises(IsADirectoryError):
        fs.open(f"{tmp_path}/d")


def test_our_own_objects_are_not_listed(home: Path, tmp_path: Path) -> None:
    make_key()
    source = tmp_path / "plain"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_bytes(b"a")
    (source / "sub" / "b").write_bytes(b"b")
    sc.encrypt(source, tmp_path / "enc", keys=KEY)
    (tmp_path / "enc" / "sub" / ".streamcrypt-0123456789abcdef.tmp").write_bytes(b"half")
    fs = CryptFileSystem()
    root = str(tmp_path / "enc")
    files = [f"{root}/a", f"{root}/sub/b"]
    assert sorted(fs.find(root)) == files
    assert sorted(fs.glob(f"{root}/**")) == sorted([root, f"{root}/sub", *files])
    assert sorted(fs.ls(root, detail=False)) == [f"{root}/a", f"{root}/sub"]
    for topdown in (True, False):
        assert (
            sorted(
                f"{folder}/{name}" for folder, _, names in fs.walk(root, topdown=topdown) for name in names
            )
            == files
        )
    for folder, folders, _ in fs.walk(root):
        assert folder == root
        folders.clear()  # prunes the walk
    assert fs.isfile(f"{root}/_streamcrypt/manifest")
    fs.rm(root, recursive=True)
    assert not (tmp_path / "enc").exists()


# -- ranges


def test_cat_ranges_opens_each_frame_once(
    fs: CryptFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {f"{tmp_path}/{i}": bytes_of(40 * F + 7, i) for i in range(3)}
    for path, data in contents.items():
        fs.pipe_file(path, data)
    rng = random.Random(5)
    wanted = [(rng.choice(list(contents)), *sorted(rng.sample(range(20 * F), 2))) for _ in range(200)] + [
        (f"{tmp_path}/0", -10, None),
        (f"{tmp_path}/1", None, 3),
        (f"{tmp_path}/1", 5, 5),
    ]
    reads: list[tuple[int, int]] = []
    lock = threading.Lock()
    read_at = LocalSource.read_at

    def watched(self: LocalSource, offset: int, buffer: memoryview) -> int:
        with lock:
            reads.append((id(self), len(buffer)))
        return read_at(self, offset, buffer)

    monkeypatch.setattr(LocalSource, "read_at", watched)
    results = fs.cat_ranges(*(list(column) for column in zip(*wanted, strict=True)))
    assert results == [contents[path][start:end] for path, start, end in wanted]
    covered = sum(
        len(
            {
                f
                for p, s, e in wanted
                if p == path and s is not None and e is not None and s >= 0
                for f in range(s // F, -(-e // F))
            }
        )
        for path in contents
    )
    headers_and_final_frames = 3 * 2
    assert sum(length for _, length in reads) < (covered + 2) * (F + 32) + headers_and_final_frames * F


def test_cat_ranges_gives_errors_in_their_places(fs: CryptFileSystem, tmp_path: Path) -> None:
    path = f"{tmp_path}/a"
    data = bytes_of(10 * F)
    fs.pipe_file(path, data)
    flip(tmp_path / "a", (tmp_path / "a").stat().st_size // 2)
    results = fs.cat_ranges([path, path, f"{tmp_path}/none", path], 0, [10, 9 * F, 5, 20])
    good = fs.cat_ranges([path], 9 * F, 10 * F)
    assert isinstance(results[1], sc.IntegrityError)
    assert isinstance(results[2], FileNotFoundError)
    assert good == [data[9 * F :]]
    with pytest.raises(sc.IntegrityError):
        fs.cat_ranges([path], 0, 9 * F, on_error="raise")


def test_read_buffer_is_filled_in_threads(fs: CryptFileSystem, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    data = bytes_of(9 * 2**20 + 5)
    fs.pipe_file(f"{tmp_path}/a", data)
    with fs.open(f"{tmp_path}/a") as file, ThreadPoolExecutor(8) as pool:
        assert file.read_buffer(100).to_pybytes() == data[:100]
        assert file.read_buffer().to_pybytes() == data[100:]
        assert file.read_buffer(5).size == 0
        places = [(i * 1_100_003 % len(data), 3_000_000) for i in range(40)]
        for (offset, length), buffer in zip(
            places, pool.map(lambda p: file.buffer_at(*p), places), strict=True
        ):
            assert buffer.to_pybytes() == data[offset : offset + length]


@pytest.mark.parametrize("threads", [1, 3])
def test_ranges_that_are_held_are_opened_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    make_key()
    fs = CryptFileSystem(keys=KEY, frame_size=F, fsync=False, threads=threads)
    path, data = f"{tmp_path}/a.bin", bytes_of(900 * F + 5)
    fs.pipe_file(path, data)
    ranges = [(0, 10), (3, F), (10 * F + 7, 600 * F), (700 * F, 1), (len(data) - 3, 3), (800 * F, 0)]
    with fs.open(path) as file:
        opened = frames_opened(monkeypatch)
        file.hold(ranges)
        assert sorted(opened) == [0, 1, *range(10, 611), 700]  # and the last, when the file was opened
        for start, length in ranges:
            assert file.read_at(start, length) == data[start : start + length]
            assert file.buffer_at(start, length).to_pybytes() == data[start : start + length]
        file.seek(11 * F)
        assert file.read(3 * 2**20) == data[11 * F : 11 * F + 3 * 2**20]
        assert file.read_at(650 * F, 5 * F) == data[650 * F : 655 * F]  # what is not held is read as ever
        file.hold([])
        assert file.read_at(5, 5) == data[5:10]
    flip(tmp_path / "a.bin", 300 * F)
    with fs.open(path) as file, pytest.raises(sc.IntegrityError):
        file.hold(ranges)


def frames_opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the regular frames that are opened from now on."""
    opened: list[int] = []
    open_regular = FrameCipher.open_regular

    def watched(self: Any, frames: Any, index: int, frame_length: int, plaintext: Any) -> int:
        found = open_regular(self, frames, index, frame_length, plaintext)
        opened.extend(range(index, index + found // frame_length))
        return found

    monkeypatch.setattr(FrameCipher, "open_regular", watched)
    return opened


def test_threads_that_seek_and_read_share_one_file(fs: CryptFileSystem, tmp_path: Path) -> None:
    """As DuckDB does: each thread reads where it has sought to itself."""
    data = bytes_of(200 * F)
    fs.pipe_file(f"{tmp_path}/a", data)

    def work(seed: int) -> bool:
        rng = random.Random(seed)
        for _ in range(300):
            offset, length = rng.randrange(len(data)), rng.randrange(3 * F)
            file.seek(offset)
            if rng.random() < 0.5:
                got = file.read(length)
            else:
                room = bytearray(length)
                got = bytes(room[: file.readinto(room)])
            if got != data[offset : offset + length]:
                return False
        return True

    with fs.open(f"{tmp_path}/a") as file, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.fixture
def no_scratch() -> Iterator[None]:
    process._scratch.clear()
    yield
    process._scratch.clear()


def test_memory_for_sealed_frames_goes_from_file_to_file(
    fs: CryptFileSystem, tmp_path: Path, no_scratch: None
) -> None:
    data = b"plaintext" * 2**19
    fs.pipe_file(f"{tmp_path}/a", data)
    kept: list[set[int]] = []
    for _ in range(2):
        with fs.open(f"{tmp_path}/a") as file:
            assert file.read() == data
        assert all(b"plaintext" not in bytes(memory) for memory in process._scratch)
        kept.append({id(memory.obj) for memory in process._scratch})
    assert kept[0]
    assert kept[0] & kept[1]
    assert len(process._scratch) <= process._SCRATCH_KEPT


def test_memory_that_a_thread_still_has_goes_to_no_other_file(
    fs: CryptFileSystem, tmp_path: Path, no_scratch: None
) -> None:
    data = bytes_of(300 * F)
    fs.pipe_file(f"{tmp_path}/a", data)
    room = bytearray(len(data))
    with fs.open(f"{tmp_path}/a") as file, file._message.lent_reader() as reader:
        reader.read_into(0, memoryview(room))
        file.close()
        lent = id(reader._frames.obj)
        assert lent not in {id(memory.obj) for memory in process._scratch}
    assert room == data


def test_places_that_are_numpy_integers(fs: CryptFileSystem, tmp_path: Path) -> None:
    path, plaintext = str(tmp_path / "f"), os.urandom(70_000)
    fs.pipe_file(path, plaintext)
    with fs.open(path) as file:
        assert file.seek(np.uint8(100)) == 100
        assert file.read(np.uint8(120)) == plaintext[100:220]
        assert file.read(np.int16(40)) == plaintext[220:260]
        assert file.seek(np.int32(-10), 2) == 69_990
        assert file.read() == plaintext[-10:]
        assert file.read_at(np.uint16(60_000), np.uint16(10_000)) == plaintext[60_000:]
        assert file.readinto(np.empty((3, 0))) == 0


def test_threads_that_open_and_close_their_own_files(fs: CryptFileSystem, tmp_path: Path) -> None:
    contents = [bytes_of(600 * F + number, number) for number in range(4)]
    for number, data in enumerate(contents):
        fs.pipe_file(f"{tmp_path}/{number}", data)

    def work(seed: int) -> bool:
        rng = random.Random(seed)
        for _ in range(40):
            number = rng.randrange(len(contents))
            start = rng.choice([0, 17, 90 * F])
            with fs.open(f"{tmp_path}/{number}") as file:
                file.seek(start)
                if file.read() != contents[number][start:]:
                    return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_position_goes_from_thread_to_thread(fs: CryptFileSystem, tmp_path: Path) -> None:
    """As readers with executors do: one file, read on by whichever thread comes next."""
    data = bytes_of(20 * F)
    fs.pipe_file(f"{tmp_path}/a", data)
    with fs.open(f"{tmp_path}/a") as file, ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        file.seek(7)
        assert one.submit(file.read, 10).result() == data[7:17]
        assert file.read(10) == data[17:27]
        assert two.submit(file.seek, 100).result() == 100
        assert file.tell() == 100
        assert one.submit(file.read, 10).result() == data[100:110]
        assert two.submit(file.read, 10).result() == data[110:120]
        assert file.read(5) == data[120:125]


# -- writing


def break_off(fs: CryptFileSystem, path: str, size: int) -> None:
    """Write some of a file, and then fail."""
    with contextlib.suppress(RuntimeError), fs.open(path, "wb") as file:
        file.write(bytes(size))
        raise RuntimeError


def test_threads_that_write_one_file_begin_one_message(fs: CryptFileSystem, tmp_path: Path) -> None:
    blocks = [bytes([number]) * 2**22 for number in range(1, 5)]
    with fs.open(f"{tmp_path}/m", "wb") as file:
        begin, begun = file._begin, []

        def begin_late(length: int | None) -> Any:
            begun.append(length)
            time.sleep(0.3)  # as a KMS far away may take
            return begin(length)

        file._begin = begin_late
        with ThreadPoolExecutor(len(blocks)) as pool:
            list(pool.map(file.write, blocks))
    assert begun == [None]
    written = fs.cat_file(f"{tmp_path}/m")
    assert sorted(written[start : start + 2**22] for start in range(0, len(written), 2**22)) == blocks


def test_a_forked_child_leaves_a_file_to_its_parent(fs: CryptFileSystem, tmp_path: Path) -> None:
    for name, length in (("held", 10), ("begun", 2**22), ("as it is", 10)):
        path = f"{tmp_path}/{name}"
        with TargetFile(fs, path) if name == "as it is" else fs.open(path, "wb") as file:
            file.write(b"a" * length)
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(BaseException):
                    try:
                        file.write(b"c")
                    except ValueError:
                        file.close()
                        code = int((tmp_path / name).exists())
                os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            file.write(b"b")
        found = Path(path).read_bytes() if name == "as it is" else fs.cat_file(path)
        assert found == b"a" * length + b"b"


def test_a_file_appears_when_it_is_closed(fs: CryptFileSystem, tmp_path: Path) -> None:
    for size in (10, 9 * 2**20):  # held in memory, and written as it comes
        path = tmp_path / f"{size}"
        file = fs.open(str(path), "wb")
        file.write(bytes(size))
        assert not path.exists()
        file.close()
        assert fs.cat_file(str(path)) == bytes(size)
        break_off(fs, str(path) + ".2", size)
        forgotten = fs.open(str(path) + ".3", "wb")
        forgotten.write(bytes(size))
        del forgotten
        gc.collect()
        assert sorted(path.parent.glob(f"{size}*")) == [path]
    assert not list(tmp_path.glob(".streamcrypt*"))


@pytest.mark.usefixtures("memory")
def test_a_file_of_a_store_appears_when_it_is_closed(home: Path) -> None:
    make_key()
    fs = CryptFileSystem(target_protocol="memory", keys=KEY)
    for size in (10, 9 * 2**20):
        file = fs.open("/tree/a", "wb")
        file.write(bytes(size))
        assert fs.find("/tree") == []
        assert not fs.exists("/tree/a")
        file.discard()
        assert fs.fs.find("/tree") == []
        fs.pipe_file("/tree/a", bytes(size))
        assert fs.fs.find("/tree") == ["/tree/a"]
        fs.rm("/tree", recursive=True)


def test_transaction(fs: CryptFileSystem, tmp_path: Path) -> None:
    a, b = f"{tmp_path}/a", f"{tmp_path}/b"
    with fs.transaction:
        fs.pipe_file(a, b"1")
        assert not fs.exists(a)
    assert fs.cat_file(a) == b"1"
    with contextlib.suppress(RuntimeError), fs.transaction:
        fs.pipe_file(b, b"1")
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a"]


def test_writing_needs_a_key_and_a_mode(fs: CryptFileSystem, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keys="):
        CryptFileSystem().open(f"{tmp_path}/a", "wb")
    with pytest.raises(ValueError, match="mode"):
        fs.open(f"{tmp_path}/a", "ab")
    with pytest.raises(TypeError, match="key references"):
        CryptFileSystem(keys=object())
    with pytest.raises(ValueError, match="frame size"):
        CryptFileSystem(keys=KEY, frame_size=0)


def test_an_option_that_is_none(home: Path, tmp_path: Path) -> None:
    """A word that was mistaken, ``require_manifest`` say, is not passed over."""
    for refused in (
        lambda: CryptFileSystem(require_manifst=True),
        lambda: fsspec.open(f"crypt::file://{tmp_path}/f", anon=True),
        lambda: sc.filesystem(str(tmp_path), context_={"a": "b"}),
    ):
        with pytest.raises(TypeError, match=r"crypt has no option '(require_manifst|anon|context_)'"):
            refused()
    CryptFileSystem(use_listings_cache=False, skip_instance_cache=True)
    for place in (f"crypt::file://{tmp_path}/f", f"crypt://{tmp_path}/f", f"{tmp_path}/f"):
        fs, path = crypt_place(place, target_options={"auto_mkdir": True})
        assert (fs.fs.auto_mkdir, path) == (True, f"{tmp_path}/f")


def test_context_is_written_and_required(home: Path, tmp_path: Path) -> None:
    make_key()
    CryptFileSystem(keys=KEY, context={"Project": "Churn"}).pipe_file(f"{tmp_path}/a", b"x")
    assert sc.inspect(tmp_path / "a").encryption_context == {"Project": "Churn"}
    assert CryptFileSystem(context={"Project": "Churn"}).cat_file(f"{tmp_path}/a") == b"x"
    with pytest.raises(sc.ContextMismatchError):
        CryptFileSystem(context={"Project": "Other"}).cat_file(f"{tmp_path}/a")


# -- what was altered


@pytest.mark.parametrize("place", [0, 40, 200, 0.3, 0.6, 0.9, -20, -1])
def test_a_flipped_bit_is_an_integrity_error(fs: CryptFileSystem, tmp_path: Path, place: float) -> None:
    path = tmp_path / "a"
    fs.pipe_file(str(path), bytes_of(20 * F))
    flip(path, int(place * path.stat().st_size) if isinstance(place, float) else place)
    for read in (
        lambda: fs.cat_file(str(path)),
        lambda: fs.cat_ranges([str(path)], 0, None, on_error="raise"),
        lambda: fs.open(str(path)).read(),
        lambda: [*fs.open(str(path))],
        lambda: fs.open(str(path)).readinto(bytearray(20 * F)),
    ):
        with pytest.raises(sc.IntegrityError):
            read()


def encrypted_tree(tmp_path: Path) -> Path:
    source = tmp_path / "plain"
    source.mkdir()
    for name in ("a", "b"):
        (source / name).write_bytes(name.encode() * 5000)
    sc.encrypt(source, tmp_path / "enc", keys=KEY)
    return tmp_path / "enc"


def test_the_manifest_is_held_against_each_file(home: Path, tmp_path: Path) -> None:
    make_key()
    tree = encrypted_tree(tmp_path)
    fs = CryptFileSystem(skip_instance_cache=True)
    assert fs.cat_file(f"{tree}/a") == b"a" * 5000
    (tree / "b").write_bytes((tree / "a").read_bytes())
    with pytest.raises(sc.IntegrityError, match="swapped"):
        fs.cat_file(f"{tree}/b")
    (tree / "c").write_bytes((tree / "a").read_bytes())
    with pytest.raises(sc.IntegrityError, match="not listed"):
        fs.cat_file(f"{tree}/c")
    assert CryptFileSystem(verify_manifest=False).cat_file(f"{tree}/b") == b"a" * 5000
    flip(tree / "_streamcrypt" / "manifest", -1)
    with pytest.raises(sc.IntegrityError, match="manifest"):
        CryptFileSystem(skip_instance_cache=True).cat_file(f"{tree}/a")
    (tree / "_streamcrypt" / "manifest").unlink()
    with pytest.raises(sc.IntegrityError, match="no manifest"):
        CryptFileSystem(require_manifest=True).cat_file(f"{tree}/a")


def test_a_tree_that_is_encrypted_again_is_read_with_its_new_manifest(home: Path, tmp_path: Path) -> None:
    make_key()
    tree = encrypted_tree(tmp_path)
    fs = CryptFileSystem(skip_instance_cache=True)
    assert fs.cat_file(f"{tree}/a") == b"a" * 5000
    sc.encrypt(tmp_path / "plain", tree, keys=KEY, overwrite=True)
    assert fs.cat_file(f"{tree}/a") == b"a" * 5000


# -- plaintext on disk


@pytest.mark.parametrize("cache", ["simplecache", "filecache"])
def test_a_cache_outside_warns_or_is_refused(fs: CryptFileSystem, tmp_path: Path, cache: str) -> None:
    fs.pipe_file(f"{tmp_path}/a", b"secret")
    url = f"{cache}::crypt::file://{tmp_path}/a"
    store = {cache: {"cache_storage": f"{tmp_path}/store"}}
    with pytest.warns(PlaintextOnDiskWarning, match="crypt::simplecache"), fsspec.open(url, **store) as file:
        assert file.read() == b"secret"
    with (
        pytest.raises(sc.DestinationError, match="no_plaintext_on_disk"),
        fsspec.open(url, crypt={"no_plaintext_on_disk": True}, **store) as file,
    ):
        file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = f"crypt::{cache}::file://{tmp_path}/a"
        with fsspec.open(
            inside, no_plaintext_on_disk=True, **{cache: {"cache_storage": f"{tmp_path}/in"}}
        ) as file:
            assert file.read() == b"secret"
    assert all(b"secret" not in kept.read_bytes() for kept in (tmp_path / "in").iterdir())


def test_a_cache_that_is_given_the_filesystem(fs: CryptFileSystem, tmp_path: Path) -> None:
    from fsspec.implementations.cached import SimpleCacheFileSystem

    fs.pipe_file(f"{tmp_path}/a", b"secret")
    strict = CryptFileSystem(no_plaintext_on_disk=True)
    cache = SimpleCacheFileSystem(fs=strict, cache_storage=f"{tmp_path}/store")
    with pytest.raises(sc.DestinationError, match="no_plaintext_on_disk"):
        cache.open(f"{tmp_path}/a").read()
    with pytest.raises(sc.DestinationError):
        strict.get(f"{tmp_path}/a", f"{tmp_path}/plain")
    assert strict.cat_file(f"{tmp_path}/a") == b"secret"


# -- keys and processes


def test_nothing_secret_in_a_pickle(fs: CryptFileSystem, tmp_path: Path) -> None:
    for i in range(3):
        fs.pipe_file(f"{tmp_path}/{i}", b"x" * 100)
    with fs.open(f"{tmp_path}/0") as file:
        file.seek(7)
        data = pickle.dumps((fs, file))
    assert len(data) < 1000
    again, file = pickle.loads(data)
    assert again.cat_file(f"{tmp_path}/1") == b"x" * 100
    assert file.tell() == 7
    assert again == fs
    assert CryptFileSystem.from_json(fs.to_json()) == fs
    with pytest.raises(TypeError):
        pickle.dumps(fs.open(f"{tmp_path}/w", "wb"))


def read_all(fs: Any, paths: list[str]) -> int:
    return sum(len(fs.cat_file(path)) for path in paths)


def read_all_and_report(fs: Any, paths: list[str], results: Any) -> None:
    try:
        results.put(read_all(fs, paths))
    except BaseException as error:  # the parent shows it
        results.put(repr(error))
        raise


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_one_decrypt_per_data_key_and_process(home: Path, tmp_path: Path, method: str) -> None:
    """Two trees, so two data keys; the manifest of each is under the tree's own."""
    make_key()
    paths = []
    for tree in ("one", "two"):
        source = tmp_path / "plain" / tree
        source.mkdir(parents=True)
        for i in range(6):
            (source / f"{i}").write_bytes(bytes(5 * 2**20 if i == 0 else 1000))
            paths.append(str(tmp_path / tree / f"{i}"))
        sc.encrypt(source, tmp_path / tree, keys=KEY)
    fs = CryptFileSystem(cache_max_age=299.0 + len(method))  # a cache that no other test has filled
    total = read_all(fs, paths)
    with ThreadPoolExecutor(4) as pool:  # fsspec makes an instance per thread
        again = [
            pool.submit(lambda: read_all(CryptFileSystem(cache_max_age=299.0 + len(method)), paths))
            for _ in range(4)
        ]
        assert [one.result() for one in again] == [total] * 4
    assert kms_calls(home)["Decrypt"] == 2
    context = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [context.Process(target=read_all_and_report, args=(fs, paths, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        assert [results.get(timeout=240) for _ in workers] == [total] * 2
    finally:
        for worker in workers:
            worker.join(30)
    assert kms_calls(home)["Decrypt"] == 2 + 2 * 2


def test_files_that_are_written_share_a_data_key_when_their_length_is_known(
    home: Path, tmp_path: Path
) -> None:
    make_key()
    fs = CryptFileSystem(keys=KEY, cache_max_age=298.0)
    for i in range(10):
        fs.pipe_file(f"{tmp_path}/{i}", bytes(1000))
    assert kms_calls(home)["GenerateDataKey"] == 1
    fs.pipe_file(f"{tmp_path}/large", bytes(9 * 2**20))
    assert kms_calls(home)["GenerateDataKey"] == 2


def test_another_home_is_another_filesystem(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_key()
    CryptFileSystem(keys=KEY).pipe_file(f"{tmp_path}/a", b"one")
    assert CryptFileSystem(keys=KEY).cat_file(f"{tmp_path}/a") == b"one"
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "other"))
    make_key()
    with pytest.raises(sc.KeyAccessError):
        CryptFileSystem(keys=KEY).cat_file(f"{tmp_path}/a")


def test_a_key_that_is_disabled_is_a_key_access_error(
    fs: CryptFileSystem, home: Path, tmp_path: Path
) -> None:
    from streamcrypt.kms import open_service

    fs.pipe_file(f"{tmp_path}/a", b"x")
    service = open_service()
    service.disable_key(KeyId=service.describe_key(KeyId="alias/ml")["KeyMetadata"]["KeyId"])
    with pytest.raises(sc.KeyAccessError) as caught:
        CryptFileSystem(cache_max_age=297.0).cat_file(f"{tmp_path}/a")
    assert caught.value.code == "DisabledException"


# -- an object store


def test_s3(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="S3FS IS MISSING: the filesystem was not tested on an object store")
    moto = pytest.importorskip("moto.server")
    make_key()
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    try:
        s3 = {"endpoint_url": f"http://{host}:{port}"}
        plain = fsspec.filesystem("s3", **s3)
        boto3.client("s3", region_name="us-east-1", **s3).create_bucket(Bucket="bucket")
        fs = CryptFileSystem(target_protocol="s3", target_options=s3, keys=KEY, frame_size=F)
        contents = {f"bucket/t/{i}": bytes_of(size, i) for i, size in enumerate([0, 10, 3 * F, 9 * 2**20])}
        for path, data in contents.items():
            fs.pipe_file(path, data)
        assert {path: info["size"] for path, info in fs.find("bucket/t", detail=True).items()} == {
            path: len(data) for path, data in contents.items()
        }
        for path, data in contents.items():
            assert fs.cat_file(path) == data
            with fsspec.open(f"crypt::s3://{path}", s3=s3) as file:
                assert file.read() == data
                file.seek(-5, io.SEEK_END) if data else None
                assert file.read() == data[-5:]
        break_off(fs, "bucket/t/none", 12 * 2**20)
        plain.invalidate_cache()
        assert not plain.exists("bucket/t/none")
    finally:
        server.stop()


def test_a_file_that_was_written_has_a_durable_name(home: Path, tmp_path: Path, flushed: list[str]):
    """Its folder is flushed after it got its name, at the end of a transaction too; not with fsync=False."""
    make_key()
    for durable in (True, False):
        fs = CryptFileSystem(keys=KEY, fsync=durable, skip_instance_cache=True)
        flushed.clear()
        fs.pipe_file(str(tmp_path / f"at once {durable}"), b"plaintext")
        assert (flushed[-1:] == [str(tmp_path)]) is durable
        flushed.clear()
        with fs.transaction, fs.open(str(tmp_path / f"later {durable}"), "wb") as file:
            file.write(b"plaintext")
        assert (flushed[-1:] == [str(tmp_path)]) is durable
