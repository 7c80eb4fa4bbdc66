"""Tensors against safetensors and numpy themselves: written here and read there, the other way, and damaged."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import random
import tempfile
import threading

import numpy as np
import pytest

import streamcrypt as sc
from streamcrypt import tensors
from streamcrypt.storage import LocalTree
from streamcrypt.streams import FrameReader

safetensors = pytest.importorskip("safetensors", reason="TENSOR TESTS NEED safetensors: they did not run")

CONTEXT = {"Model": "churn"}
F = 1024


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    return f"raw-aes:tests/tensors@{path}"


def arrays(seed=0):
    """Every type, and shapes around frames: empty, scalar, larger than a frame, of odd lengths."""
    rng = np.random.default_rng(seed)
    found = {}
    for dtype in ("f8", "f4", "f2", "i8", "u8", "i4", "u4", "i2", "u2", "i1", "u1", "?", "c8"):
        for shape in ((), (0,), (3, 0, 5), (1,), (7,), (13, 11), (3, 50, 9)):
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            data = rng.integers(0, 2 if dtype == "?" else 256, count, dtype=np.uint8)
            found[f"{dtype}.{'x'.join(map(str, shape))}"] = data.view(dtype).reshape(shape)
    return found


def same(first, second):
    first, second = np.asarray(first), np.asarray(second)
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


# ------------------------------------------------------------------------------ against safetensors


@pytest.mark.parametrize("frame_size", [1, 7, F, 4096 + 1, 2**20])
def test_what_is_saved_here_is_what_safetensors_saves(tmp_path, keys, frame_size):
    from safetensors.numpy import save

    if frame_size == 1:
        source = {"x": np.arange(5, dtype="f4")}
    else:
        source = arrays()
    path = tmp_path / "a.safetensors"
    tensors.save_file(source, path, {"by": "tests é"}, keys=keys, context=CONTEXT, frame_size=frame_size)
    assert sc.inspect(path)["frame_length"] == frame_size
    assert sc.decrypt_bytes(path.read_bytes(), keys=keys, context=CONTEXT) == save(source, {"by": "tests é"})

    loaded = tensors.load_file(path, framework="np", keys=keys, context=CONTEXT)
    assert list(loaded) == sorted(source)
    assert all(same(loaded[name], source[name]) for name in source)
    assert all(array.flags.writeable and array.flags.aligned for array in loaded.values())


def test_a_file_of_safetensors_that_was_encrypted_is_loaded(tmp_path, keys):
    from safetensors.numpy import save_file

    source = arrays(1)
    save_file(source, tmp_path / "plain", {"a": "1"})
    sc.encrypt(tmp_path / "plain", tmp_path / "message", keys=keys, frame_size=333)
    with (
        tensors.safe_open(tmp_path / "message", "np", keys=keys) as ours,
        safetensors.safe_open(tmp_path / "plain", "np") as theirs,
    ):
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() == theirs.metadata()
        for name in theirs.keys():  # noqa: SIM118  (safetensors' object is no mapping)
            assert same(ours.get_tensor(name), theirs.get_tensor(name))
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()


def test_torch_types_and_files_against_safetensors(tmp_path, keys):
    torch = pytest.importorskip("torch", reason="TORCH IS MISSING: tensors of torch were not tested")
    from safetensors.torch import load_file, save

    generator = torch.Generator().manual_seed(2)
    source = {}
    for dtype in (
        torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.bool,
        torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
        torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ):  # fmt: skip
        for shape in ((), (0, 4), (5,), (33, 17)):
            count = int(np.prod(shape)) * dtype.itemsize
            high = 2 if dtype == torch.bool else 256
            data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
            source[f"{dtype}{shape}"] = data.view(dtype).reshape(shape)
    path = tmp_path / "a"
    tensors.save_file(source, path, keys=keys, frame_size=F)
    plaintext = sc.decrypt_bytes(path.read_bytes(), keys=keys)
    assert plaintext == save(source)

    (tmp_path / "plain").write_bytes(plaintext)
    theirs = load_file(tmp_path / "plain")
    ours = tensors.load_file(path, keys=keys)
    assert list(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert (
            ours[name].contiguous().reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        )
    with tensors.safe_open(path, framework="pt", keys=keys) as file:
        part = file.get_slice("torch.bfloat16(33, 17)")[3:9, ::4]
        assert part.dtype == torch.bfloat16
        assert part.view(torch.int16).equal(
            source["torch.bfloat16(33, 17)"][3:9, ::4].contiguous().view(torch.int16)
        )
    with pytest.raises(TypeError, match="numpy has no type for BF16"):
        tensors.load_file(path, framework="np", keys=keys)


def test_packed_four_bit_floats(tmp_path, keys):
    torch = pytest.importorskip("torch", reason="TORCH IS MISSING: 4-bit floats were not tested")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no 4-bit floats")
    from safetensors.torch import save

    source = {"x": torch.arange(24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(4, 6)}
    tensors.save_file(source, tmp_path / "a", keys=keys)
    assert sc.decrypt_bytes((tmp_path / "a").read_bytes(), keys=keys) == save(source)
    loaded = tensors.load_file(tmp_path / "a", keys=keys)["x"]
    assert loaded.dtype == source["x"].dtype
    assert loaded.shape == (4, 6)
    assert loaded.view(torch.uint8).equal(source["x"].view(torch.uint8))


def test_what_cannot_be_saved_is_refused_before_a_file_is_touched(tmp_path, keys):
    torch = pytest.importorskip("torch", reason="TORCH IS MISSING: refusals of torch tensors were not tested")
    path = tmp_path / "a"
    x = torch.arange(12.0)
    for bad, error in [
        ({"x": np.arange(6).reshape(2, 3).T}, ValueError),
        ({"x": x.reshape(3, 4).T}, ValueError),
        ({"x": x.to_sparse()}, ValueError),
        ({"x": x, "y": x}, RuntimeError),
        ({"x": x[:8], "y": x[4:]}, RuntimeError),
        ({"x": np.zeros(3, "M8[s]")}, TypeError),
        ({"x": x.to(torch.complex128)}, TypeError),
        ({"x": [1, 2]}, TypeError),
        ({3: x}, TypeError),
        ({"__metadata__": x}, ValueError),  # safetensors saves it, and nobody can load the file
    ]:
        with pytest.raises(error):
            tensors.save_file(bad, path, keys=keys)
    with pytest.raises(TypeError):
        tensors.save_file({"x": x}, path, {"step": 3}, keys=keys)
    with pytest.raises(ValueError):
        tensors.save_file({"x": x}, path, keys="nonsense")
    for folder in (f"{path}/", tmp_path):
        with pytest.raises(sc.DestinationError, match="is a folder"):
            tensors.save_file({"x": x}, folder, keys=keys)
    tensors.save_file({"x": x[:4], "y": x[4:]}, path, keys=keys)  # neighbours do not share memory
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_views_that_are_not_what_their_memory_says(tmp_path, keys):
    torch = pytest.importorskip("torch", reason="TORCH IS MISSING: its lazy views were not tested")
    x = torch.tensor([1 + 2j, 3 - 4j])
    for view in (x.conj(), x.conj().imag.contiguous(), torch._neg_view(torch.tensor([1.0, 2.0]))):
        tensors.save_file({"x": view}, tmp_path / "a", keys=keys)
        assert torch.equal(tensors.load_file(tmp_path / "a", keys=keys)["x"], view)


def test_big_endian_arrays_are_stored_as_the_format_says(tmp_path, keys):
    tensors.save_file({"x": np.arange(5, dtype=">i4")}, tmp_path / "a", keys=keys)
    assert same(tensors.load_file(tmp_path / "a", framework="np", keys=keys)["x"], np.arange(5, dtype="<i4"))


def test_signed_files_and_an_object_of_the_caller(tmp_path, keys):
    source = arrays(3)
    tensors.save_file(source, tmp_path / "a", keys=keys, sign=True, frame_size=F)
    loaded = tensors.load_file(
        tmp_path / "a", framework="np", keys=keys, require_signed=True, verify_signature=True
    )
    assert all(same(loaded[name], source[name]) for name in source)
    with open(tmp_path / "a", "rb") as file:
        assert same(tensors.load_file(file, framework="np", keys=keys)["f4.13x11"], source["f4.13x11"])
        assert not file.closed


def test_urls(tmp_path, keys):
    fsspec = pytest.importorskip("fsspec", reason="FSSPEC IS MISSING: tensors by URL were not tested")
    source = {"x": np.arange(100_000).reshape(100, 1_000)}
    tensors.save_file(source, tmp_path / "a", keys=keys, frame_size=F)
    fsspec.filesystem("memory").pipe_file("/tensors/a", (tmp_path / "a").read_bytes())
    for url in (
        "memory://tensors/a", "crypt::memory://tensors/a", "crypt://::memory://tensors/a", f"file://{tmp_path}/a",
        f"crypt://{tmp_path}/a", f"crypt::{tmp_path}/a", f"streamcrypt::file://{tmp_path}/a",
    ):  # fmt: skip
        assert same(tensors.load_file(url, framework="np", keys=keys)["x"], source["x"])
        with tensors.safe_open(url, "np", keys=keys) as file:
            assert same(file.get_slice("x")[7:9, 3], source["x"][7:9, 3])
    with pytest.raises(ValueError, match="memory://tensors/b: written are"):
        tensors.save_file(source, "memory://tensors/b", keys=keys)


def test_safetensors_word_for_how_a_file_is_read_is_taken(tmp_path, keys):
    source = {"x": np.arange(3)}
    tensors.save_file(source, tmp_path / "a", keys=keys)
    for backend in ("mmap", "pread"):
        assert same(
            tensors.load_file(tmp_path / "a", backend=backend, framework="np", keys=keys)["x"], source["x"]
        )
        with tensors.safe_open(tmp_path / "a", "np", "cpu", backend=backend, keys=keys) as file:
            assert same(file.get_tensor("x"), source["x"])
    with pytest.raises(ValueError, match="backend 'disk'"):
        tensors.safe_open(tmp_path / "a", "np", backend="disk", keys=keys)


def test_options_that_make_no_sense(tmp_path, keys):
    tensors.save_file({"x": np.arange(3)}, tmp_path / "a", keys=keys)
    for options, error in [
        ({"framework": "tf"}, ValueError),
        ({"framework": "np", "device": "cuda"}, ValueError),
        ({"framework": "np", "threads": 0}, ValueError),
        ({"framework": "np", "context": {"Model": "other"}}, sc.ContextMismatchError),
    ]:
        with pytest.raises(error):
            tensors.load_file(tmp_path / "a", keys=keys, **options)
    with (
        tensors.safe_open(tmp_path / "a", "np", keys=keys) as file,
        pytest.raises(KeyError, match="no tensor 'y'"),
    ):
        file.get_tensor("y")
    with pytest.raises(sc.SourceError):
        tensors.load_file(tmp_path / "absent", keys=keys)


# ------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_tensors_in_threads(tmp_path, keys, threads):
    rng = np.random.default_rng(4)
    source = {
        f"t{n}": rng.integers(0, 256, size, dtype=np.uint8)
        for n, size in enumerate((9_000_001, 3, 17_000_000, 5_000_007))
    }
    path = tmp_path / "a"
    tensors.save_file(source, path, keys=keys, threads=threads, frame_size="100KiB")
    from safetensors.numpy import save

    assert sc.decrypt_bytes(path.read_bytes(), keys=keys) == save(source)
    loaded = tensors.load_file(path, framework="np", keys=keys, threads=threads)
    assert all(same(loaded[name], source[name]) for name in source)
    with tensors.safe_open(path, "np", keys=keys, threads=threads) as file:
        assert same(file.get_tensor("t2"), source["t2"])
        assert same(file.get_slice("t2")[11:16_999_999], source["t2"][11:16_999_999])


def test_one_open_file_serves_many_threads(tmp_path, keys):
    source = {f"t{n}": np.full((100, 100), n, "i4") for n in range(20)}
    tensors.save_file(source, tmp_path / "a", keys=keys, frame_size=F)
    wrong = []
    with tensors.safe_open(tmp_path / "a", "np", keys=keys) as file:

        def read(seed):
            chance = random.Random(seed)
            for _ in range(100):
                name = chance.choice(sorted(source))
                row = chance.randrange(100)
                if not same(file.get_slice(name)[row : row + 3], source[name][row : row + 3]):
                    wrong.append(name)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_failure_in_one_thread_gives_no_tensor(tmp_path, keys):
    source = {"x": np.zeros(40_000_000, np.uint8)}
    path = tmp_path / "a"
    tensors.save_file(source, path, keys=keys)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = threading.active_count()
    for threads in (1, 3):
        with pytest.raises(sc.IntegrityError, match="frame 20 did not authenticate"):
            tensors.load_file(path, framework="np", keys=keys, threads=threads)
    assert threading.active_count() == before


# ------------------------------------------------------------------------------ slices

SHAPE = (6, 5, 40, 3)
AXES = [
    [slice(None), 2, -1, slice(1, 4), slice(None, None, 2), slice(5, 1), [0, 4, 5]],
    [slice(None), 0, slice(2, 3), slice(1, 5, 3)],
    [slice(None), 39, slice(3, 30), slice(2, 39, 7)],
    [slice(None), 1, slice(1, 2), slice(0, 3, 2)],
]
ODD = [
    ..., None, (None, 1), (1, None, 2), (..., 1), (0, ..., slice(1, 3)), (slice(None), None, ..., 2), (),
    (1, [3, 0, 1]), (slice(2, 4), 3, [39, 0, 1, 2]), [5, 5, -1], (np.array([1, 2]), 3), [], (5, 4, 39, 2),
    (None, [1, 2], None), np.int64(3),
]  # fmt: skip


@pytest.mark.parametrize("frame_size", [64, 500, 4096, 2**20])
def test_every_slice_is_what_numpy_takes(tmp_path, keys, frame_size):
    rng = np.random.default_rng(5)
    source = {name: rng.integers(0, 200, SHAPE).astype(name) for name in ("i8", "u1", "f4")}
    tensors.save_file(source, tmp_path / "a", keys=keys, frame_size=frame_size)
    with tensors.safe_open(tmp_path / "a", "np", keys=keys) as file:
        for name, array in source.items():
            part = file.get_slice(name)
            for index in [*itertools.product(*AXES), *itertools.product(*AXES[:2]), *ODD]:
                assert same(part[index], array[index]), (name, index)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_mask_takes_what_it_marks(tmp_path, keys, kind):
    array = np.arange(210.0).reshape(6, 5, 7)
    tensors.save_file({"x": array}, tmp_path / "a", keys=keys, frame_size=64)
    tensors.save_npy(tmp_path / "b", array, keys=keys, frame_size=64)
    make = np.array
    if kind == "torch":
        make = pytest.importorskip("torch").tensor
    rows, columns, none = [True, True, False, False, True, False], [False, True] * 2 + [True], [False] * 6
    with (
        tensors.safe_open(tmp_path / "a", "np", keys=keys) as file,
        tensors.open_npy(tmp_path / "b", keys=keys) as npy,
    ):
        for part in (file.get_slice("x"), npy):
            assert same(part[make(rows)], array[np.array(rows)])
            assert same(part[2:, make(columns)], array[2:, np.array(columns)])
            assert same(part[make(none)], array[np.array(none)])
            with pytest.raises(IndexError, match="a mask of 5 for a dimension of 6"):
                part[make(columns)]
            with pytest.raises(TypeError):
                part[make(True)]


def test_slices_that_numpy_refuses_or_that_make_no_sense(tmp_path, keys):
    tensors.save_file({"x": np.zeros((4, 5))}, tmp_path / "a", keys=keys)
    with tensors.safe_open(tmp_path / "a", "np", keys=keys) as file:
        part = file.get_slice("x")
        for index in (4, -5, (0, 5), (0, 0, 0), ([0, 4],), ([0], [1]), (..., 0, ...)):
            with pytest.raises(IndexError):
                part[index]
        for index in ("0", 1.0, True, [True, False]):
            with pytest.raises(TypeError):
                part[index]
        with pytest.raises(ValueError):
            part[::-1]


def frames_read(monkeypatch):
    """The frames that are opened from now on."""
    opened = set()
    original = FrameReader._read

    def read(self, offset, length):
        first = (offset - self.geometry.header_length) // (self.geometry.frame_length + 32)
        opened.update(range(first, first + max(1, length // (self.geometry.frame_length + 32))))
        return original(self, offset, length)

    monkeypatch.setattr(FrameReader, "_read", read)
    return opened


def test_a_slice_opens_only_its_frames(tmp_path, keys, monkeypatch):
    array = np.arange(100 * 2048, dtype="i4").reshape(100, 2048)  # a row is 8 KiB, 8 frames
    tensors.save_file({"x": array}, tmp_path / "a", keys=keys, frame_size=F)
    with tensors.safe_open(tmp_path / "a", "np", keys=keys) as file:
        start = file._file("").layouts["x"].start
        for index, cover in [
            (slice(10, 12), [(10 * 8192, 12 * 8192)]),
            ((slice(None), slice(5, 7)), [(row * 8192 + 20, row * 8192 + 28) for row in range(100)]),
            (
                (slice(None, None, 50), slice(1024, 1025)),
                [(4096, 4100), (50 * 8192 + 4096, 50 * 8192 + 4100)],
            ),
            ((3, 2047), [(4 * 8192 - 4, 4 * 8192)]),
            ([1, 98], [(8192, 2 * 8192), (98 * 8192, 99 * 8192)]),
        ]:
            opened = frames_read(monkeypatch)
            assert same(file.get_slice("x")[index], array[index])
            monkeypatch.undo()
            expected = {
                frame
                for low, high in cover
                for frame in range((start + low) // F, (start + high - 1) // F + 1)
            }
            # The frame that the reader has kept from before need not be opened again.
            assert opened <= expected
            assert len(expected - opened) <= 1


def test_opening_reads_the_header_and_the_final_frame_alone(tmp_path, keys, monkeypatch):
    tensors.save_file({"x": np.zeros(100_000)}, tmp_path / "a", keys=keys, frame_size=F)
    opened = frames_read(monkeypatch)
    tensors.safe_open(tmp_path / "a", "np", keys=keys).close()
    assert opened == {0, sc.inspect(tmp_path / "a").frames - 1}


# ------------------------------------------------------------------------------ damage


def test_a_flipped_bit_anywhere_is_refused(tmp_path, keys):
    source = {"x": np.arange(500, dtype="i2"), "y": np.arange(7, dtype="f8")}
    path = tmp_path / "a"
    tensors.save_file(source, path, keys=keys, context=CONTEXT, frame_size=256)
    message = path.read_bytes()
    chance = random.Random(6)
    for position in range(len(message)):
        damaged = bytearray(message)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(
            (sc.IntegrityError, sc.KeyAccessError, sc.LimitExceededError, sc.StreamcryptError)
        ) as caught:
            tensors.load_file(path, framework="np", keys=keys)
        # A damaged key name asks for a key that is not there; everything else does not authenticate.
        assert isinstance(caught.value, sc.IntegrityError) or position < header_length(message)
    for cut in (1, 16, 300, len(message) - 10):
        path.write_bytes(message[:-cut])
        with pytest.raises(sc.IntegrityError):
            tensors.load_file(path, framework="np", keys=keys)


def header_length(message):
    return sc.inspect(io.BytesIO(message)).header_length


def header_of(entries, data=b"", pad=b""):
    text = json.dumps(entries).encode() + pad
    return len(text).to_bytes(8, "little") + text + data


X = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
MALFORMED = {
    "empty": b"",
    "cut in the length": b"\1\0\0",
    "a header beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "a header beyond the limit": (2**40).to_bytes(8, "little") + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"{,,}",
    "not UTF-8": (4).to_bytes(8, "little") + b'"\xff\xfe"',
    "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a list": header_of([]),
    "a name twice": (lambda t: len(t).to_bytes(8, "little") + t + b"1234")(
        b'{"x":%s,"x":%s}' % ((json.dumps(X).encode(),) * 2)
    ),
    "an unknown type": header_of({"x": {**X, "dtype": "F128"}}, b"1234"),
    "no type": header_of({"x": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "a type that is a list": header_of({"x": {**X, "dtype": []}}, b"1234"),
    "a negative length": header_of({"x": {**X, "shape": [-4]}}, b"1234"),
    "lengths of truth": header_of({"x": {**X, "shape": [True, 4]}}, b"1234"),
    "a shape of text": header_of({"x": {**X, "shape": "4"}}, b"1234"),
    "another size": header_of({"x": {**X, "shape": [5]}}, b"1234"),
    "a huge shape": header_of({"x": {**X, "shape": [2**62, 2**62]}}, b"1234"),
    "three offsets": header_of({"x": {**X, "data_offsets": [0, 4, 4]}}, b"1234"),
    "backwards": header_of({"x": {**X, "shape": [0], "data_offsets": [4, 0]}}, b"1234"),
    "beyond the end": header_of({"x": X}, b"123"),
    "bytes of nobody": header_of({"x": X}, b"12345"),
    "a gap": header_of({"x": {**X, "data_offsets": [1, 5]}}, b"12345"),
    "shared bytes": header_of({"x": X, "y": {**X, "data_offsets": [2, 6]}}, b"123456"),
    "metadata that are numbers": header_of({"__metadata__": {"a": 1}}),
    "metadata that are a list": header_of({"__metadata__": []}),
}


@pytest.mark.parametrize("plaintext", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_safetensors_file_is_refused(tmp_path, keys, plaintext):
    (tmp_path / "a").write_bytes(sc.encrypt_bytes(plaintext, keys=keys))
    with pytest.raises(sc.FormatError, match="authenticated, but not a safetensors file"):
        tensors.load_file(tmp_path / "a", framework="np", keys=keys)


def test_other_layouts_are_read(tmp_path, keys):
    # Padding, tensors in another order, and tensors whose memory is not aligned.
    odd = {
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
        "a": {"dtype": "I64", "shape": [], "data_offsets": [11, 19]},
        "c": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
    }
    data = np.float64(1.5).tobytes() + b"xyz" + np.int64(-7).tobytes()
    (tmp_path / "a").write_bytes(sc.encrypt_bytes(header_of(odd, data, b"   "), keys=keys))
    loaded = tensors.load_file(tmp_path / "a", framework="np", keys=keys)
    assert loaded["a"] == -7
    assert loaded["b"].tobytes() == b"xyz"
    assert loaded["c"] == 1.5
    assert all(array.flags.aligned for array in loaded.values())


def test_a_failed_save_leaves_what_was_there(tmp_path, keys):
    path = tmp_path / "a"
    tensors.save_file({"x": np.arange(3)}, path, keys=keys)
    before = path.read_bytes()
    with pytest.raises(sc.KeyAccessError):
        tensors.save_file({"x": np.arange(4)}, path, keys="local:alias/absent")
    with pytest.raises(ValueError):
        tensors.save_file({"x": np.arange(4)}, path, keys=keys, context={"aws-crypto-public-key": "x"})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_disk_that_is_full_in_the_middle(tmp_path, keys, monkeypatch, threads):
    """No thread waits for another for ever, and nothing of the new file stays."""
    path = tmp_path / "a"
    tensors.save_file({"x": np.arange(3)}, path, keys=keys)
    before, writes, pwrite = path.read_bytes(), itertools.count(), os.pwrite

    def full(*arguments):
        if next(writes) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    running = threading.active_count()
    with pytest.raises(sc.DestinationError, match="No space left"):
        tensors.save_file({"x": np.zeros(30 * 2**20, np.uint8)}, path, keys=keys, threads=threads)
    assert threading.active_count() == running
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_room_in_memory_is_not_filled_before_it_is_written():
    """A tmpfs claims room by filling every page with zeros, so that each would be written twice."""
    try:
        folder = tempfile.TemporaryDirectory(dir="/dev/shm")
    except OSError:
        pytest.skip("NO /dev/shm: claiming room on a memory file system was not tested")
    with folder as name, contextlib.closing(LocalTree(name)) as tree:
        target = tree.create("a", size=2**26)
        status = os.stat(os.path.join(name, target.temporary))
        target.discard()
    assert status.st_size == 2**26
    assert status.st_blocks == 0


# ------------------------------------------------------------------------------ sharded checkpoints


def test_sharded_checkpoints(tmp_path, keys):
    source = {f"layer.{n}": np.full((n + 1, 100), n, "f4") for n in range(10)}
    path = tensors.save_sharded(
        source, tmp_path / "c", {"format": "np"}, keys=keys, context=CONTEXT, max_shard_size=2000
    )
    index = json.loads(sc.open(path, keys=keys).read())
    names = sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 3
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in source.values())
    # One data key for all of them.
    wrapped = {sc.inspect(tmp_path / "c" / name)["encrypted_data_keys"][0]["info"] for name in names}
    assert len(wrapped) == 1

    for where in (path, tmp_path / "c"):
        loaded = tensors.load_file(where, framework="np", keys=keys, context=CONTEXT)
        assert list(loaded) == sorted(source)
        assert all(same(loaded[name], source[name]) for name in source)
        with tensors.safe_open(where, framework="np", keys=keys) as file:
            assert file.keys() == sorted(source)
            assert sorted(file.offset_keys()) == sorted(source)
            assert same(file.get_tensor("layer.9"), source["layer.9"])
            assert same(file.get_slice("layer.7")[2:4, 50], source["layer.7"][2:4, 50])
            assert file.metadata()["total_size"] == index["metadata"]["total_size"]


@pytest.mark.parametrize("name", ["a/b", "../a"])
def test_a_checkpoint_that_could_not_be_loaded_is_not_saved(tmp_path, keys, name):
    """An index that names files elsewhere is refused when it is read."""
    with pytest.raises(ValueError, match="beside its index"):
        tensors.save_sharded(arrays(), tmp_path / "c", keys=keys, name=name)
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_refused_in_shards_too(tmp_path, keys):
    torch = pytest.importorskip("torch")
    tied = torch.rand(50, 50)
    weights = {"embedding": tied, "layer": torch.rand(50, 50), "head": tied}
    with pytest.raises(RuntimeError, match="'embedding' and 'head' share memory"):
        tensors.save_sharded(weights, tmp_path / "c", keys=keys, max_shard_size="10KB")
    assert not (tmp_path / "c").exists()


def test_shards_that_are_swapped_missing_or_of_another_checkpoint_are_refused(tmp_path, keys):
    first, second = ({f"t{n}": np.full(300, n + base) for n in range(4)} for base in (0, 100))
    for name, source in (("a", first), ("b", second)):
        tensors.save_sharded(source, tmp_path / name, keys=keys, max_shard_size=3000)
    shard = "model-00002-of-00004.safetensors"
    original = (tmp_path / "a" / shard).read_bytes()
    (tmp_path / "a" / shard).write_bytes((tmp_path / "b" / shard).read_bytes())
    with pytest.raises(sc.IntegrityError, match="not the shard"):
        tensors.load_file(tmp_path / "a", framework="np", keys=keys)
    with tensors.safe_open(tmp_path / "a", "np", keys=keys) as file:
        assert same(file.get_tensor("t0"), first["t0"])
        with pytest.raises(sc.IntegrityError, match="not the shard"):
            file.get_tensor("t1")
    (tmp_path / "a" / shard).unlink()
    with pytest.raises(sc.SourceError):
        tensors.load_file(tmp_path / "a", framework="np", keys=keys)
    (tmp_path / "a" / shard).write_bytes(original)
    assert len(tensors.load_file(tmp_path / "a", framework="np", keys=keys)) == 4
    (tmp_path / "a" / "other.safetensors.index.json").write_bytes(b"")
    with pytest.raises(ValueError, match="2 files"):
        tensors.load_file(tmp_path / "a", framework="np", keys=keys)


def test_a_checkpoint_of_hugging_face_that_was_encrypted_as_a_folder(tmp_path, keys):
    from safetensors.numpy import save_file

    (tmp_path / "plain").mkdir()
    save_file({"x": np.arange(3)}, tmp_path / "plain" / "model-00001-of-00002.safetensors")
    save_file({"y": np.arange(4)}, tmp_path / "plain" / "model-00002-of-00002.safetensors")
    where = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "plain" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 56}, "weight_map": where})
    )
    sc.encrypt(tmp_path / "plain", tmp_path / "message", keys=keys)
    loaded = tensors.load_file(tmp_path / "message", framework="np", keys=keys)
    assert {name: array.tolist() for name, array in loaded.items()} == {"x": [0, 1, 2], "y": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/x.safetensors", "x", 3, "a\0.safetensors", "a\\b.safetensors"]
)
def test_an_index_names_files_beside_it(tmp_path, keys, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(sc.encrypt_bytes(json.dumps({"weight_map": {"x": shard}}).encode(), keys=keys))
    with pytest.raises(sc.FormatError, match="not the index"):
        tensors.load_file(path, framework="np", keys=keys)


def test_one_kms_call_for_a_checkpoint(tmp_path, home):
    client = sc.kms_client("local")
    key = client.create_key()["KeyMetadata"]["KeyId"]
    client.create_alias(AliasName="alias/ml", TargetKeyId=key)
    tensors.save_sharded(
        {f"t{n}": np.zeros(100) for n in range(5)}, tmp_path / "c", keys="local:alias/ml", max_shard_size=800
    )
    cache = sc.DataKeyCache()
    assert len(tensors.load_file(tmp_path / "c", framework="np", cache=cache)) == 5
    assert cache.stats()["misses"] == 1


# ------------------------------------------------------------------------------ numpy's files


@pytest.mark.parametrize(
    "array",
    [
        np.arange(100_000, dtype="f4").reshape(100, 1000),
        np.asfortranarray(np.arange(60).reshape(3, 4, 5)),
        np.arange(60).reshape(3, 4, 5)[:, ::2],
        np.array(3.5),
        np.zeros((0, 4), "u2"),
        np.array(["a", "bc"]),
        np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", ">f8")]),
        np.arange(5, dtype=">i4"),
        np.array(["2026-01-01"], dtype="M8[D]"),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_npy_files_are_numpys(tmp_path, keys, array):
    tensors.save_npy(tmp_path / "a.npy", array, keys=keys, frame_size=F)
    plain = sc.decrypt_bytes((tmp_path / "a.npy").read_bytes(), keys=keys)
    assert same(np.load(io.BytesIO(plain)), array)
    assert same(tensors.load_npy(tmp_path / "a.npy", keys=keys), array)
    buffer = io.BytesIO()
    np.save(buffer, array)
    (tmp_path / "b.npy").write_bytes(sc.encrypt_bytes(buffer.getvalue(), keys=keys))
    assert same(tensors.load_npy(tmp_path / "b.npy", keys=keys), array)


def test_an_npy_file_is_read_where_it_is_indexed(tmp_path, keys, monkeypatch):
    array = np.arange(100_000, dtype="f4").reshape(100, 1000)
    tensors.save_npy(tmp_path / "a.npy", array, keys=keys, frame_size=F)
    with tensors.open_npy(tmp_path / "a.npy", keys=keys) as file:
        assert (len(file), file.shape, file.dtype) == (100, (100, 1000), np.dtype("f4"))
        opened = frames_read(monkeypatch)
        assert same(file[10:12, 3], array[10:12, 3])
        assert len(opened) <= 2
        assert same(file[[3, 90]], array[[3, 90]])


def test_npz_files_are_numpys(tmp_path, keys):
    source = {
        "a": np.arange(100_000),
        "b": np.asfortranarray(np.ones((3, 4))),
        "c.d": np.array("x"),
        "e": np.zeros(0),
    }
    for compressed in (False, True):
        path = tmp_path / f"{compressed}.npz"
        tensors.save_npz(path, source, keys=keys, compressed=compressed, frame_size=F)
        theirs = np.load(io.BytesIO(sc.decrypt_bytes(path.read_bytes(), keys=keys)))
        loaded = tensors.load_npz(path, keys=keys)
        assert list(loaded) == list(source)
        assert all(same(loaded[name], source[name]) and same(theirs[name], source[name]) for name in source)
        buffer = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(buffer, **source)
        path.write_bytes(sc.encrypt_bytes(buffer.getvalue(), keys=keys))
        loaded = tensors.load_npz(path, keys=keys)
        assert all(same(loaded[name], source[name]) for name in source)


def test_numpy_files_never_run_code(tmp_path, keys):
    objects = np.array([{"a": 1}], dtype=object)
    with pytest.raises(ValueError):
        tensors.save_npy(tmp_path / "a", objects, keys=keys)
    with pytest.raises(ValueError):
        tensors.save_npz(tmp_path / "a", {"x": objects}, keys=keys)
    assert not (tmp_path / "a").exists()
    for save, load in ((np.save, tensors.load_npy), (lambda f, a: np.savez(f, x=a), tensors.load_npz)):
        buffer = io.BytesIO()
        save(buffer, objects)
        (tmp_path / "a").write_bytes(sc.encrypt_bytes(buffer.getvalue(), keys=keys))
        with pytest.raises((sc.FormatError, ValueError)):
            load(tmp_path / "a", keys=keys)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_flipped_bit_in_numpys_files(tmp_path, keys, kind):
    path = tmp_path / "a"
    if kind == "npy":
        tensors.save_npy(path, np.arange(900.0), keys=keys, frame_size=F)
    else:
        tensors.save_npz(path, {"x": np.arange(900.0)}, keys=keys, frame_size=F)
    whole = path.read_bytes()
    for place in range(header_length(whole), len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(sc.IntegrityError):
            tensors.load_npy(path, keys=keys) if kind == "npy" else tensors.load_npz(path, keys=keys)[
                "x"
            ].sum()


@pytest.mark.parametrize("load", [tensors.load_npy, tensors.load_npz], ids=["npy", "npz"])
@pytest.mark.parametrize("plaintext", [b"", b"PK", b"\x93NUMPY\1\0\x10\0{'descr': '<f8'}", os.urandom(500)])
def test_what_is_no_numpy_file_is_refused(tmp_path, keys, load, plaintext):
    (tmp_path / "a").write_bytes(sc.encrypt_bytes(plaintext, keys=keys))
    with pytest.raises(sc.FormatError, match="authenticated, but not"):
        load(tmp_path / "a", keys=keys)


def test_an_array_that_claims_more_than_there_is(tmp_path, keys):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1000))
    (tmp_path / "a").write_bytes(sc.encrypt_bytes(buffer.getvalue()[:-1], keys=keys))
    with pytest.raises(sc.FormatError, match="cut short"):
        tensors.load_npy(tmp_path / "a", keys=keys)


def test_nothing_here_pickles_a_key(tmp_path, keys):
    import pickle

    tensors.save_file({"x": np.arange(3)}, tmp_path / "a", keys=keys)
    with tensors.safe_open(tmp_path / "a", "np", keys=keys) as file:
        for held in (file, file.get_slice("x")):
            with pytest.raises(TypeError):
                pickle.dumps(held)
