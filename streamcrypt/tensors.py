"""Tensors: safetensors, .npy and .npz files inside messages, for numpy and torch.

    save_file load_file safe_open               one safetensors file; safetensors' own signatures
    save_sharded, and load_file or safe_open    a checkpoint of several files with its index
    save_npy load_npy open_npy                  one array
    save_npz load_npz                           several arrays

The plaintext is byte for byte what safetensors or numpy writes, so `streamcrypt decrypt` gives a
file that they read, and a message made by `streamcrypt encrypt` from their file is read here.

Reading: the header of the file comes from frames that have been authenticated, and is bounded
before it is parsed.  Frames are then opened in threads, straight into the tensors' memory, which
nobody else sees until all of them have been authenticated.  A slice opens only the frames that hold it.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import json
import math
import mmap
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.lib import format as npy_format

from streamcrypt import api
from streamcrypt.engine.job import default_workers
from streamcrypt.errors import DestinationError, FormatError, IntegrityError
from streamcrypt.keys.cache import DataKeyCache
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import References, encrypting_keyring
from streamcrypt.message.suites import UNSIGNED
from streamcrypt.storage import STORE_SCHEMES, LocalTree, Target
from streamcrypt.streams import (
    BATCH_LENGTH,
    DEFAULT_FRAME_LENGTH,
    DecryptingFile,
    OutgoingMessage,
    header_template,
    seal_frames,
)
from streamcrypt.system import missing_folders, sync_name
from streamcrypt.units import parse_size

if TYPE_CHECKING:
    from streamcrypt.message.frames import Geometry

Path: TypeAlias = str | os.PathLike[str]
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Tensor: TypeAlias = Any  # a torch.Tensor or an Array: torch is imported only when it is used

# The limit of the safetensors format; it also bounds what is allocated for a header.
MAX_HEADER_LENGTH: Final = 100_000_000
MAX_INDEX_LENGTH: Final = 100_000_000
INDEX_SUFFIX: Final = ".safetensors.index.json"
_METADATA: Final = "__metadata__"

# Bytes that one thread takes at a time; less than this in all is not worth a thread.
_SPAN: Final = 8 * 2**20
_HUGE_PAGE: Final = 2 * 2**20


# ---------------------------------------------------------------------------------------------
# Element types: safetensors' name, bytes, numpy's and torch's name.  In the order in which
# safetensors lays tensors out: the widest first, so that each begins at a multiple of its size.


@dataclass(frozen=True, slots=True)
class _Type:
    code: str
    size: int
    numpy: str | None
    torch: str | None
    packed: int = 1  # elements in one unit of ``size`` bytes


_TYPES: Final = {
    entry.code: entry
    for entry in (
        _Type("U64", 8, "uint64", "uint64"),
        _Type("I64", 8, "int64", "int64"),
        _Type("F64", 8, "float64", "float64"),
        _Type("C64", 8, "complex64", "complex64"),
        _Type("F32", 4, "float32", "float32"),
        _Type("U32", 4, "uint32", "uint32"),
        _Type("I32", 4, "int32", "int32"),
        _Type("BF16", 2, None, "bfloat16"),
        _Type("F16", 2, "float16", "float16"),
        _Type("U16", 2, "uint16", "uint16"),
        _Type("I16", 2, "int16", "int16"),
        _Type("F8_E5M2FNUZ", 1, None, "float8_e5m2fnuz"),
        _Type("F8_E4M3FNUZ", 1, None, "float8_e4m3fnuz"),
        _Type("F8_E8M0", 1, None, "float8_e8m0fnu"),
        _Type("F8_E4M3", 1, None, "float8_e4m3fn"),
        _Type("F8_E5M2", 1, None, "float8_e5m2"),
        _Type("I8", 1, "int8", "int8"),
        _Type("U8", 1, "uint8", "uint8"),
        _Type("F4", 1, None, "float4_e2m1fn_x2", packed=2),
        _Type("BOOL", 1, "bool", "bool"),
    )
}
_RANK: Final = {code: rank for rank, code in enumerate(_TYPES)}
_BY_NUMPY: Final = {entry.numpy: entry for entry in _TYPES.values() if entry.numpy}
_BY_TORCH: Final = {entry.torch: entry for entry in _TYPES.values() if entry.torch}
# What the bytes of an element are moved as: the type itself may be one that numpy does not know.
_UNITS: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """One tensor of a file: its type, its shape, and its bytes within the file."""

    type: _Type
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in units of memory: two 4-bit elements share a byte."""
        if self.type.packed == 1 or not self.shape:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // self.type.packed)


# ---------------------------------------------------------------------------------------------
# The safetensors header


def _parse_header(file: DecryptingFile, name: str) -> tuple[dict[str, _Layout], dict[str, str] | None, int]:
    """The tensors of a safetensors file, its metadata, and where its data begin."""
    start = file.read_at(0, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(MAX_HEADER_LENGTH, file.size - 8):
        raise _not_safetensors(name, "its header does not fit it")
    text = file.read_at(8, length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(name, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _not_safetensors(name, "its header is not an object")
    metadata = header.pop(_METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _not_safetensors(name, "its metadata are not text")
    data_start = 8 + length
    tensors = {key: _parse_layout(name, key, entry, data_start) for key, entry in header.items()}
    # As safetensors demands: no byte of the data belongs to two tensors or to none.
    end = data_start
    for layout in sorted(tensors.values(), key=lambda layout: (layout.start, layout.stop)):
        if layout.start != end:
            raise _not_safetensors(name, "its tensors overlap or leave a gap")
        end = layout.stop
    if end != file.size:
        raise _not_safetensors(name, "its tensors do not cover its data")
    return tensors, metadata, data_start


def _parse_layout(name: str, key: str, entry: Any, data_start: int) -> _Layout:
    try:
        kind, shape, (start, stop) = _TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        counts = (*shape, start, stop)
    except (KeyError, TypeError, ValueError) as error:
        raise _not_safetensors(name, f"no type, shape and place that are known for {key!r}") from error
    if not all(type(count) is int and count >= 0 for count in counts):
        raise _not_safetensors(name, f"no valid shape and place for {key!r}")
    elements = math.prod(shape)
    if elements % kind.packed or elements // kind.packed * kind.size != stop - start:
        raise _not_safetensors(name, f"shape and size of {key!r} differ")
    if kind.packed > 1 and (not shape or shape[-1] % kind.packed):
        raise _not_safetensors(name, f"rows of {key!r} end within a byte")
    return _Layout(kind, shape, data_start + start, data_start + stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _not_safetensors(name: str, why: str) -> FormatError:
    return FormatError(f"{name}: authenticated, but not a safetensors file: {why}", recognised=False)


def _make_header(
    layouts: Sequence[tuple[str, _Type, tuple[int, ...], int]], metadata: Mapping[str, str] | None
) -> bytes:
    header: dict[str, Any] = {}
    if metadata is not None:
        header[_METADATA] = dict(metadata)
    position = 0
    for name, kind, shape, length in layouts:
        header[name] = {"dtype": kind.code, "shape": shape, "data_offsets": (position, position + length)}
        position += length
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_LENGTH:
        raise ValueError(f"the header would be {len(text)} bytes; safetensors allows {MAX_HEADER_LENGTH}")
    return len(text).to_bytes(8, "little") + text


# ---------------------------------------------------------------------------------------------
# Frameworks: bytes in memory to tensors, and back


Framework: TypeAlias = Literal["pt", "torch", "np", "numpy"]


class _Numpy:
    def wrap(self, units: Array, kind: _Type) -> Array:
        if kind.numpy is None:
            raise TypeError(f"numpy has no type for {kind.code}; load this tensor with torch")
        return units.view(kind.numpy)

    def check_device(self, device: Any) -> None:
        if str(device) != "cpu":
            raise ValueError(f"device {device!r}: numpy arrays are on the CPU")


class _Torch:
    def __init__(self, device: Any) -> None:
        self._torch = _import_torch()
        self._device = _device(device)

    def wrap(self, units: Array, kind: _Type) -> Tensor:
        torch = self._torch
        dtype = getattr(torch, kind.torch or "", None)
        if dtype is None:
            raise TypeError(f"torch {torch.__version__} has no type for {kind.code}")
        tensor = torch.from_numpy(units).view(dtype)
        return tensor if self._device == "cpu" else tensor.to(self._device)

    def check_device(self, device: Any) -> None:
        self._torch.device(self._device)


def _device(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _framework(framework: str | None, device: Any) -> _Numpy | _Torch:
    if framework is None:
        framework = "torch" if "torch" in sys.modules or find_spec("torch") else "numpy"
    if framework in ("pt", "torch", "pytorch"):
        found: _Numpy | _Torch = _Torch(device)
    elif framework in ("np", "numpy"):
        found = _Numpy()
    else:
        raise ValueError(f"framework {framework!r}: it is 'pt' (torch) or 'np' (numpy)")
    found.check_device(device)
    return found


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "torch tensors need torch: pip install 'streamcrypt[torch]'; for numpy give framework='np'"
        ) from error
    return torch


def _to_bytes(tensors: Mapping[str, Tensor]) -> list[tuple[str, _Type, tuple[int, ...], memoryview]]:
    """The tensors in safetensors' order: name, type, shape, memory.  ValueError for what has no plain memory."""
    entries = []
    torch_tensors: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a tensor is text, not {type(name).__name__}")
        if name == _METADATA:
            raise ValueError(f"{name!r} is no name for a tensor: the file's metadata stand under it")
        if isinstance(tensor, np.ndarray | np.generic):
            entries.append((name, *_numpy_bytes(name, np.asarray(tensor))))
        elif "torch" in sys.modules and isinstance(tensor, sys.modules["torch"].Tensor):
            torch_tensors[name] = tensor
            entries.append((name, *_torch_bytes(name, tensor)))
        else:
            raise TypeError(f"{name!r} is a {type(tensor).__name__}, not a numpy array or torch tensor")
    _refuse_shared(torch_tensors)
    return sorted(entries, key=lambda entry: (_RANK[entry[1].code], entry[0]))


def _numpy_bytes(name: str, array: Array) -> tuple[_Type, tuple[int, ...], memoryview]:
    kind = _BY_NUMPY.get(array.dtype.newbyteorder("=").name)
    if kind is None:
        raise TypeError(f"{name!r}: safetensors has no type for {array.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name!r} is not contiguous; pass numpy.ascontiguousarray(…) of it")
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.byteswap()
    return kind, array.shape, array.reshape(-1).view(np.uint8).data


def _torch_bytes(name: str, tensor: Any) -> tuple[_Type, tuple[int, ...], memoryview]:
    torch = _import_torch()
    if tensor.layout != torch.strided:
        raise ValueError(f"{name!r} is sparse; make it dense (to_dense()) before it is saved")
    kind = _BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if kind is None:
        raise TypeError(f"{name!r}: safetensors has no type for {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name!r} is not contiguous; call .contiguous() on it, or save only the tensor that it is a view of"
        )
    shape = tuple(tensor.shape)
    if kind.packed > 1:
        shape = (*shape[:-1], shape[-1] * kind.packed)
    # A view that is conjugate or negative is not what its memory says.
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    flat = plain.reshape(-1).view(torch.uint8)
    return kind, shape, flat.numpy().data


def _refuse_shared(tensors: Mapping[str, Any]) -> None:
    """RuntimeError, as from safetensors, where torch tensors share memory: loaded, they no longer would."""
    places = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in tensors.items()
        if tensor.device.type == "cpu" and str(tensor.layout) == "torch.strided" and tensor.nbytes
    )
    for (_, stop, first), (start, _, second) in itertools.pairwise(places):
        if start < stop:
            raise RuntimeError(
                f"{first!r} and {second!r} share memory, which would be lost; save one of them, or a .clone()"
            )


# ---------------------------------------------------------------------------------------------
# Reading in threads


class _Plaintext:
    """The plaintext of one message, read by several threads into private memory."""

    def __init__(self, filename: Path | Any, threads: int | None, options: dict[str, Any]) -> None:
        self._threads = _thread_count(threads)
        with contextlib.ExitStack() as stack:
            self.file = stack.enter_context(_open_message(filename, stack, options))
            self._stack = stack.pop_all()
        self.name = str(getattr(filename, "name", filename))
        reader = self.file.frame_reader()
        self.frame_length = reader.geometry.frame_length if reader is not None else 1

    @property
    def size(self) -> int:
        return self.file.size

    def close(self) -> None:
        self._stack.close()

    def fill(self, start: int, view: memoryview) -> None:
        """The plaintext from ``start`` on; ``view`` must be memory that only the caller sees."""
        if len(view) < 2 * _SPAN or self._threads == 1 or self.file.frame_reader() is None:
            self.file.fill(start, view)
            return
        # Spans begin where frames do, so that no frame is opened by two threads.
        step = max(1, _SPAN // self.frame_length) * self.frame_length
        first = min(step - start % step, len(view))
        bounds = [0, *range(first, len(view), step), len(view)]
        _in_threads(
            self._threads,
            list(itertools.pairwise(bounds)),
            lambda: self._filler(start, view),
        )

    def _filler(self, start: int, view: memoryview) -> Callable[[tuple[int, int]], None]:
        reader = self.file.frame_reader()
        assert reader is not None

        def fill(span: tuple[int, int]) -> None:
            reader.read_into(start + span[0], view[span[0] : span[1]])

        return fill

    def read_units(self, start: int, unit: np.dtype[Any], count: int) -> Array:
        """``count`` units of memory from the byte ``start`` on."""
        memory = _memory(unit.itemsize * count)
        self.fill(start, memory.data)
        return memory.view(unit)


def _in_threads(threads: int, spans: Sequence[Any], make: Callable[[], Callable[[Any], None]]) -> None:
    """Every span to one of the threads, each with a function of its own; the first error is raised.

    Returns, or raises, only when no thread touches the memory any more.
    """
    todo = iter(spans)
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        do = make()
        while not failed.is_set():
            with lock:
                span = next(todo, None)
            if span is None:
                return
            try:
                do(span)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(min(threads, len(spans)), "streamcrypt-tensors") as pool:
        for future in [pool.submit(work) for _ in range(min(threads, len(spans)))]:
            future.result()


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return default_workers()
    if threads < 1:
        raise ValueError(f"{threads} threads: it must be at least 1")
    return threads


def _memory(length: int) -> Array:
    """Fresh memory, in huge pages where the system has them: first touching it then costs a fifth.

    Measured by benchmarks/test_tensors.py, "memory": 4 KiB pages halve the speed of loading.
    """
    if length < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(length, np.uint8)
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def _open_message(
    filename: Path | Any, stack: contextlib.ExitStack, options: dict[str, Any]
) -> DecryptingFile:
    if isinstance(filename, str) and _is_url(filename) and not filename.startswith(STORE_SCHEMES):
        try:
            import fsspec
        except ImportError as error:
            raise ImportError("URLs need fsspec: pip install 'streamcrypt[fsspec]'") from error
        # We decrypt ourselves, in threads: the protocol that does it is left out.
        url = re.sub(r"^(crypt|streamcrypt)(::|://(::)?)", "", filename)
        filename = stack.enter_context(fsspec.open(url, "rb"))
    file: DecryptingFile = api.open(filename, "rb", **options)
    return file


def _is_url(filename: str) -> bool:
    return "://" in filename or "::" in filename


# ---------------------------------------------------------------------------------------------
# Slices


@dataclass(frozen=True, slots=True)
class _Axis:
    """Which indices of one dimension are taken: ``count`` of them from ``start`` on, ``step`` apart."""

    start: int
    count: int
    step: int
    size: int

    @property
    def whole(self) -> bool:
        return self.count == self.size

    @property
    def span(self) -> int:
        """How many indices lie from the first to the last that is taken."""
        return (self.count - 1) * self.step + 1


def _read_region(
    plaintext: _Plaintext, start: int, unit: np.dtype[Any], shape: Sequence[int], axes: Sequence[_Axis]
) -> Array:
    """The units of a region of an array that is stored row by row from byte ``start`` on.

    Only frames that hold a part of the region are opened: where what lies between two taken indices
    is longer than a frame, each is read by itself; where it is shorter, rows are read together.
    """
    out_shape = [axis.count for axis in axes]
    if not math.prod(out_shape):
        return np.empty(out_shape, unit)
    if not axes:
        return plaintext.read_units(start, unit, 1).reshape(())
    strides = [unit.itemsize * math.prod(shape[depth + 1 :]) for depth in range(len(shape))]
    # From here inwards everything is taken, so what is taken of this dimension is contiguous.
    inner = max((depth for depth, axis in enumerate(axes) if not axis.whole), default=0)
    # From here inwards rows are closer to each other than a frame is long.
    near = next(
        (d for d in range(len(axes)) if axes[d].step * strides[d] <= plaintext.frame_length), len(axes) - 1
    )
    split = min(near, inner)
    axis, rest = axes[split], axes[split + 1 :]
    contiguous = split == inner and axis.step == 1
    if contiguous and not any(a.count > 1 for a in axes[:split]):
        offset = sum(a.start * strides[d] for d, a in enumerate(axes[: split + 1]))
        return plaintext.read_units(start + offset, unit, math.prod(out_shape)).reshape(out_shape)

    out = _memory(unit.itemsize * math.prod(out_shape)).view(unit).reshape(out_shape)
    row_shape = [a.size for a in rest]
    picks = tuple(slice(a.start, a.start + a.span, a.step) for a in rest)
    # The bytes of a row from the first that is taken to the last.
    low = sum(a.start * s for a, s in zip(rest, strides[split + 1 :], strict=True))
    high = unit.itemsize + sum(
        (a.start + a.span - 1) * s for a, s in zip(rest, strides[split + 1 :], strict=True)
    )
    outer = [[(i, a.start + i * a.step) for i in range(a.count)] for a in axes[:split]]
    rows_at_once = max(1, 4 * _SPAN // (axis.step * strides[split])) if not contiguous else axis.count
    for place in itertools.product(*outer):
        base = start + sum(index * strides[d] for d, (_, index) in enumerate(place))
        target = out[tuple(i for i, _ in place)]
        for first in range(0, axis.count, rows_at_once):
            count = min(rows_at_once, axis.count - first)
            row = base + (axis.start + first * axis.step) * strides[split]
            if contiguous:
                part = target[first : first + count].reshape(-1)
                plaintext.fill(row, part.view(np.uint8).data)
                continue
            span = (count - 1) * axis.step + 1
            scratch = np.empty(span * strides[split], np.uint8)
            plaintext.fill(row + low, scratch.data[low : (span - 1) * strides[split] + high])
            rows = scratch.view(unit).reshape(span, *row_shape)
            target[first : first + count] = rows[(slice(None, None, axis.step), *picks)]
    return out


def _index_region(
    plaintext: _Plaintext, start: int, unit: np.dtype[Any], shape: Sequence[int], index: Any
) -> Array:
    """What numpy's index would take of the array, without reading more frames than hold it."""
    items = list(index) if isinstance(index, tuple) else [index]
    if sum(1 for item in items if item is Ellipsis) > 1:
        raise IndexError("an index has one ellipsis at most")
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    given = sum(1 for item in items if item is not None and item is not Ellipsis)
    if given > len(shape):
        raise IndexError(f"{given} indices for a tensor of {len(shape)} dimensions")
    at = next(position for position, item in enumerate(items) if item is Ellipsis)
    items[at : at + 1] = [slice(None)] * (len(shape) - given)

    lists = [position for position, item in enumerate(items) if _is_list(item)]
    if len(lists) > 1:
        raise IndexError("an index has one list at most")
    if not lists:
        return _index_basic(plaintext, start, unit, shape, items)
    (at,) = lists
    dimension = sum(1 for item in items[:at] if item is not None)
    parts = [
        _index_basic(plaintext, start, unit, shape, [*items[:at], run, *items[at + 1 :]])
        for run in _runs(items[at], shape[dimension])
    ]
    # numbers before the list take their dimension away
    axis = sum(1 for item in items[:at] if item is None or isinstance(item, slice))
    return np.concatenate(parts, axis=axis)


def _index_basic(
    plaintext: _Plaintext, start: int, unit: np.dtype[Any], shape: Sequence[int], items: Sequence[Any]
) -> Array:
    axes: list[_Axis] = []
    result: list[int] = []
    for item in items:
        if item is None:
            result.append(1)
            continue
        size = shape[len(axes)]
        if isinstance(item, slice):
            first, stop, step = item.indices(size)
            if step < 1:
                raise ValueError("the step of a slice must be greater than zero")
            count = len(range(first, stop, step))
            axes.append(_Axis(first, count, step if count > 1 else 1, size))
            result.append(count)
        else:
            axes.append(_Axis(_position(item, size), 1, 1, size))
    return _read_region(plaintext, start, unit, shape, axes).reshape(result)


def _position(item: Any, size: int) -> int:
    if isinstance(item, bool) or "bool" in str(getattr(item, "dtype", "")) or not hasattr(item, "__index__"):
        raise TypeError(
            f"an index is a number, a slice, a list of numbers, a mask, None or ..., not {item!r}"
        )
    position = int(item.__index__())
    if not -size <= position < size:
        raise IndexError(f"index {position} is out of range for a dimension of {size}")
    return position % size


def _is_list(item: Any) -> bool:
    return isinstance(item, list) or getattr(item, "ndim", 0) == 1


def _runs(numbers: Any, size: int) -> list[slice]:
    """A list of indices, or a mask, as slices, one for every run of consecutive ones."""
    runs: list[slice] = []
    if str(getattr(numbers, "dtype", "")) in ("bool", "torch.bool"):
        if len(numbers) != size:
            raise IndexError(f"a mask of {len(numbers)} for a dimension of {size}")
        numbers = np.flatnonzero(np.asarray(numbers))
    for number in numbers:
        position = _position(number, size)
        if runs and runs[-1].stop == position:
            runs[-1] = slice(runs[-1].start, position + 1)
        else:
            runs.append(slice(position, position + 1))
    return runs or [slice(0, 0)]


class TensorSlice:
    """A tensor that is not read until it is indexed; what ``get_slice`` returns."""

    def __init__(self, plaintext: _Plaintext, layout: _Layout, framework: _Numpy | _Torch) -> None:
        self._plaintext = plaintext
        self._layout = layout
        self._framework = framework

    def get_shape(self) -> list[int]:
        return list(self._layout.shape)

    def get_dtype(self) -> str:
        """The element type by safetensors' name, such as ``"BF16"``."""
        return self._layout.type.code

    def __getitem__(self, index: Any) -> Tensor:
        """The part that a number, slice, list of numbers, mask, None or ``...`` takes of each dimension."""
        layout = self._layout
        if layout.type.packed > 1:
            raise TypeError(f"{layout.type.code} packs several elements into a byte; use get_tensor")
        units = _index_region(self._plaintext, layout.start, _UNITS[layout.type.size], layout.shape, index)
        return self._framework.wrap(units, layout.type)


# ---------------------------------------------------------------------------------------------
# safetensors: reading


class _File:
    """One safetensors file that is open."""

    def __init__(
        self, filename: Path | Any, framework: _Numpy | _Torch, threads: int | None, options: dict[str, Any]
    ) -> None:
        self.plaintext = _Plaintext(filename, threads, options)
        self._framework = framework
        try:
            self.layouts, self.metadata, self.data_start = _parse_header(
                self.plaintext.file, self.plaintext.name
            )
        except BaseException:
            self.close()
            raise

    @property
    def message_id(self) -> str:
        return self.plaintext.file.header.message_id.hex()

    def close(self) -> None:
        self.plaintext.close()

    def offset_names(self) -> list[str]:
        return sorted(self.layouts, key=lambda name: (self.layouts[name].start, self.layouts[name].stop))

    def get_tensor(self, name: str) -> Tensor:
        layout = self.layouts[name]
        unit = _UNITS[layout.type.size]
        units = self.plaintext.read_units(layout.start, unit, (layout.stop - layout.start) // unit.itemsize)
        return self._framework.wrap(units.reshape(layout.stored_shape), layout.type)

    def get_slice(self, name: str) -> TensorSlice:
        return TensorSlice(self.plaintext, self.layouts[name], self._framework)

    def load(self) -> dict[str, Tensor]:
        """All tensors, in one piece of memory that they share as safetensors' own share a mapping."""
        # All of the plaintext, its header too: so every frame is opened in place, none in parts.
        memory = _memory(self.plaintext.size)
        self.plaintext.fill(0, memory.data)
        tensors = {}
        for name in sorted(self.layouts):
            layout = self.layouts[name]
            data = memory[layout.start : layout.stop]
            if layout.start % layout.type.size:
                data = data.copy()  # a file that another program laid out; torch wants aligned memory
            units = data.view(_UNITS[layout.type.size]).reshape(layout.stored_shape)
            tensors[name] = self._framework.wrap(units, layout.type)
        return tensors


class safe_open:  # noqa: N801  (safetensors' name)
    """Tensors of an encrypted safetensors file, or of a sharded checkpoint, read one by one.

        with tensors.safe_open("model.safetensors", framework="pt") as f:
            for name in f.keys():
                tensor = f.get_tensor(name)
            rows = f.get_slice("embedding")[1000:2000]

    ``filename`` is a path, a URL, a binary file that seeks, a checkpoint's index
    (``*.safetensors.index.json``) or the folder that holds one.  ``framework`` is ``"pt"`` or
    ``"np"``.  Further options are those of ``sc.open``; ``backend`` is safetensors' own and changes
    nothing: files are read, never mapped.  KeyError for a name that is not there.
    """

    def __init__(
        self,
        filename: Path | Any,
        framework: str | None = None,
        device: Any = "cpu",
        *,
        backend: str = "pread",
        keys: References | None = None,
        context: Mapping[str, str] | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        if backend not in ("mmap", "pread"):
            raise ValueError(f"backend {backend!r}: it is 'mmap' or 'pread'")
        self._framework = _framework(framework, device)
        options.update(keys=keys, context=context)
        self._threads = threads
        self._options = options
        self._name = str(filename)
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        index = _index_of(filename)
        if index is None:
            self._index = None
            self._files[""] = file = _File(filename, self._framework, threads, options)
            self._where = dict.fromkeys(file.layouts, "")
        else:
            # One KMS call for the shards of one data key.
            options.setdefault("cache", DataKeyCache())
            self._index = _read_index(index, options)
            self._where = self._index.where

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._where)

    def offset_keys(self) -> list[str]:
        """The names of the tensors in the order in which they are stored."""
        if self._index is not None:
            shards = dict.fromkeys(self._where.values())
            return [name for shard in shards for name in self._file(shard).offset_names()]
        return self._file("").offset_names()

    def metadata(self) -> dict[str, str] | None:
        """The text that was saved with the tensors; of a sharded checkpoint, that of its index."""
        return self._file("").metadata if self._index is None else dict(self._index.metadata)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, read in threads; it alone is read."""
        return self._holding(name).get_tensor(name)

    def get_tensors(self) -> dict[str, Tensor]:
        """All tensors."""
        if self._index is None:
            return self._file("").load()
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(self._where.values())):
            file = self._file(shard)
            for name, tensor in file.load().items():
                if self._where.get(name) != shard:
                    raise _not_listed(file.plaintext.name, name)
                tensors[name] = tensor
        return {name: tensors[name] for name in sorted(tensors)}

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor to be indexed; what is indexed is read, and no frame beside it."""
        return self._holding(name).get_slice(name)

    def _holding(self, name: str) -> _File:
        if name not in self._where:
            raise KeyError(f"{self._name} holds no tensor {name!r}")
        return self._file(self._where[name])

    def _file(self, shard: str) -> _File:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                if self._index is None:
                    raise ValueError(f"{self._name}: is closed")
                path = os.path.join(self._index.folder, shard)
                file = _File(path, self._framework, self._threads, self._options)
                try:
                    self._index.check(shard, file)
                except BaseException:
                    file.close()
                    raise
                self._files[shard] = file
            return file


def load_file(
    filename: Path | Any,
    device: Any = "cpu",
    *,
    framework: str | None = None,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    threads: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """All tensors of an encrypted safetensors file or sharded checkpoint, by name.

        weights = tensors.load_file("model.safetensors")

    ``framework``: ``"pt"`` or ``"np"``; None: torch where it is installed.  ``threads``: None for one
    per core.  ``filename`` and further options as for ``safe_open``.  The tensors of a file share one
    piece of memory.  IntegrityError when anything does not authenticate: then no tensor is returned.
    """
    with safe_open(
        filename, framework, device, keys=keys, context=context, threads=threads, **options
    ) as file:
        return file.get_tensors()


# ---------------------------------------------------------------------------------------------
# safetensors: writing


def save_file(
    tensors: Mapping[str, Tensor],
    filename: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    cache: DataKeyCache | None = None,
    threads: int | None = None,
    fsync: bool = True,
) -> None:
    """Save tensors, of torch or numpy, to an encrypted safetensors file.

        tensors.save_file(model.state_dict(), "model.safetensors", keys="local:alias/ml")

    Frames are sealed in threads, straight from the tensors' memory.  The file appears, or replaces
    the one that is there, when it is whole; ``fsync=False`` gives up durability across a power loss,
    as safetensors does.  ``sign`` costs the threads: a signature is over all bytes in their order.
    Raises ValueError for a tensor that is not contiguous, RuntimeError for tensors that share memory.
    """
    _save(tensors, filename, metadata, keys, context, sign, frame_size, cache, threads, fsync)


def _save(
    tensors: Mapping[str, Tensor],
    filename: Path,
    metadata: Mapping[str, str] | None,
    keys: References,
    context: Mapping[str, str] | None,
    sign: bool,
    frame_size: int | str,
    cache: DataKeyCache | None,
    threads: int | None,
    fsync: bool,
) -> str:
    """Save one file; returns its message id."""
    if metadata is not None and not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise TypeError("metadata are text by text")
    entries = _to_bytes(tensors)
    header = _make_header([(name, kind, shape, len(data)) for name, kind, shape, data in entries], metadata)
    pieces = [memoryview(header), *(data for _, _, _, data in entries)]
    return _write(filename, pieces, keys, context, sign, frame_size, cache, threads, fsync)


def _write(
    filename: Path,
    pieces: Sequence[memoryview],
    keys: References,
    context: Mapping[str, str] | None,
    sign: bool,
    frame_size: int | str,
    cache: DataKeyCache | None,
    threads: int | None,
    fsync: bool,
) -> str:
    """Write the pieces, one after the other, as the plaintext of a message; returns its id."""
    count = _thread_count(threads)
    is_url = isinstance(filename, str) and _is_url(filename)
    if is_url and not str(filename).startswith(STORE_SCHEMES):
        raise ValueError(f"{filename}: written are paths and {', '.join(STORE_SCHEMES)} URLs")
    if sign or is_url:  # a store takes a file in order too
        with api.open(
            filename,
            "wb",
            keys=keys,
            context=context,
            sign=sign,
            frame_size=frame_size,
            cache=cache,
            fsync=fsync,
        ) as file:
            for piece in pieces:
                file.write(piece)
        return api.inspect(filename).message_id
    plaintext = _Pieces(pieces)
    frame_length = parse_size(frame_size)
    materials = Materials(encrypting_keyring(keys), cache=cache).for_encryption(
        UNSIGNED, dict(context or {}), plaintext.length
    )
    message = OutgoingMessage.begin(materials, header_template(materials, frame_length), frame_length)
    geometry = message.geometry(plaintext.length)
    path = os.fspath(filename)
    if path.endswith("/") or os.path.isdir(path):
        raise DestinationError(f"{path}: is a folder; name the file to be made")
    folder, name = os.path.split(os.path.abspath(path))
    root = os.path.realpath(folder)
    tree = LocalTree(root, missing_folders(root))
    target = tree.create(name, size=geometry.message_length, overwrite=True)
    try:
        target.write_at(0, message.header)
        _seal_all(message, geometry, plaintext, target, count)
        if fsync:
            target.flush()
        target.publish(overwrite=True)
        if fsync:
            tree.sync_folder("")
    finally:
        target.discard()
        tree.close()
    return message.message_id.hex()


def _seal_all(
    message: OutgoingMessage, geometry: Geometry, plaintext: _Pieces, target: Target, threads: int
) -> None:
    batch = max(1, BATCH_LENGTH // geometry.frame_length)
    starts = range(0, geometry.frames, batch)
    cipher = message.cipher

    def sealer() -> Callable[[int], None]:
        sealed = memoryview(bytearray(geometry.frames_end(batch) - geometry.frame_offset(0)))
        held = memoryview(bytearray())

        def seal(start: int) -> None:
            nonlocal held
            stop = min(start + batch, geometry.frames)
            first, last = geometry.plaintext_range(start, stop)
            part = plaintext.view(first, last)
            if part is None:
                if not held:
                    held = memoryview(bytearray(batch * geometry.frame_length))
                part = held[: last - first]
                plaintext.gather(first, part)
            length = seal_frames(cipher, geometry, start, stop, part, sealed)
            target.write_at(geometry.frame_offset(start), sealed[:length])

        return seal

    if len(starts) == 1:
        sealer()(0)
    else:
        _in_threads(threads, starts, sealer)


class _Pieces:
    """Pieces of memory that are read as if they were one."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        self._starts = [0, *itertools.accumulate(len(piece) for piece in self._pieces)]
        self.length = self._starts[-1]

    def view(self, start: int, stop: int) -> memoryview | None:
        """The bytes themselves where they lie in one piece; None where they don't."""
        index = bisect.bisect_right(self._starts, start) - 1
        if index == len(self._pieces):
            return memoryview(b"")
        offset = self._starts[index]
        return (
            self._pieces[index][start - offset : stop - offset] if stop <= self._starts[index + 1] else None
        )

    def gather(self, start: int, into: memoryview) -> None:
        """Copy the bytes from ``start`` on, until ``into`` is full."""
        index = bisect.bisect_right(self._starts, start) - 1
        done = 0
        while done < len(into):
            part = self._pieces[index][start + done - self._starts[index] :][: len(into) - done]
            into[done : done + len(part)] = part
            done += len(part)
            index += 1


# ---------------------------------------------------------------------------------------------
# Sharded checkpoints


_SHARD_NAME: Final = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True, slots=True)
class _Index:
    """The index of a sharded checkpoint: which file holds which tensor."""

    folder: str
    where: dict[str, str]
    metadata: dict[str, Any]
    message_ids: dict[str, str]

    def check(self, shard: str, file: _File) -> None:
        """IntegrityError unless ``file`` is the shard that the index was written for."""
        expected = self.message_ids.get(shard)
        if expected is not None and expected != file.message_id:
            raise IntegrityError(f"{file.plaintext.name}: is not the shard that the index was written with")
        missing = [name for name, place in self.where.items() if place == shard and name not in file.layouts]
        if missing:
            raise IntegrityError(
                f"{file.plaintext.name}: holds no tensor {missing[0]!r}, which the index says"
            )


def _not_listed(file: str, name: str) -> IntegrityError:
    return IntegrityError(f"{file}: holds a tensor {name!r} that the index does not list")


def _index_of(filename: Path | Any) -> str | None:
    """The path of the index where ``filename`` is one, or a folder with one."""
    if not isinstance(filename, str | os.PathLike):
        return None
    path = os.fspath(filename)
    if path.endswith(".index.json"):
        return path
    if not os.path.isdir(path):
        return None
    found = sorted(name for name in os.listdir(path) if name.endswith(INDEX_SUFFIX))
    if len(found) != 1:
        raise ValueError(
            f"{path}: a folder with {len(found)} files *{INDEX_SUFFIX}; name the index or the file"
        )
    return os.path.join(path, found[0])


def _read_index(path: str, options: dict[str, Any]) -> _Index:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_message(path, stack, options))
        if file.size > MAX_INDEX_LENGTH:
            raise FormatError(f"{path}: an index of {file.size} bytes", recognised=False)
        text = file.read()
    try:
        index = json.loads(text, object_pairs_hook=_unique)
        where, metadata = index["weight_map"], index.get("metadata", {})
        message_ids = metadata.get("message_ids", {})
        valid = all(
            isinstance(shard, str) and _SHARD_NAME.fullmatch(shard) for shard in where.values()
        ) and isinstance(message_ids, dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise FormatError(
            f"{path}: authenticated, but not the index of a sharded checkpoint", recognised=False
        )
    return _Index(os.path.dirname(path), where, metadata, message_ids)


def save_sharded(
    tensors: Mapping[str, Tensor],
    folder: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    name: str = "model",
    max_shard_size: int | str = "5GB",
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    cache: DataKeyCache | None = None,
    threads: int | None = None,
    fsync: bool = True,
) -> str:
    """Save tensors as a checkpoint of several files, named as Hugging Face names them; returns the index's path.

    ``model-00001-of-00003.safetensors`` …, each a message, and ``model.safetensors.index.json``, which
    is written last and holds the message id of each: a shard of another checkpoint is refused.  A
    shard is at most ``max_shard_size`` bytes, unless one tensor is larger.  One data key serves all.
    """
    limit = parse_size(max_shard_size)
    if not _SHARD_NAME.fullmatch(f"{name}-.safetensors"):
        raise ValueError(
            f"name {name!r}: a checkpoint's files lie beside its index, so their name is no path"
        )
    _refuse_shared({key: tensor for key, tensor in tensors.items() if not isinstance(tensor, np.ndarray)})
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        size = int(tensor.nbytes)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += size
    cache = cache if cache is not None else DataKeyCache()
    missing = missing_folders(os.path.abspath(folder))
    os.makedirs(folder, exist_ok=True)
    for path in missing if fsync else ():
        sync_name(path)
    where: dict[str, str] = {}
    message_ids: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{name}-{number:05}-of-{len(shards):05}.safetensors"
        message_ids[file] = _save(
            shard,
            os.path.join(folder, file),
            metadata,
            keys,
            context,
            sign,
            frame_size,
            cache,
            threads,
            fsync,
        )
        where.update(dict.fromkeys(shard, file))
    total = sum(int(tensor.nbytes) for tensor in tensors.values())
    index = {"metadata": {"total_size": total, "message_ids": message_ids}, "weight_map": where}
    path = os.path.join(folder, name + INDEX_SUFFIX)
    text = json.dumps(index, ensure_ascii=False, indent=2).encode()
    _write(path, [memoryview(text)], keys, context, sign, frame_size, cache, threads, fsync)
    return path


# ---------------------------------------------------------------------------------------------
# Rows for a loader


class RowDataset:
    """The rows of an encrypted safetensors file as a map-style dataset, for a DataLoader or a sampler.

        dataset = tensors.RowDataset("features.safetensors", ["x", "y"])
        dataset[17]                                 # {"x": tensor, "y": tensor}
        DataLoader(dataset, batch_size=256, shuffle=True, num_workers=2)

    Row ``i`` is index ``i`` of the first dimension of each tensor in ``names`` (None: all), which
    must agree in it.  The rows of a batch are fetched together, in the order in which they are
    stored; only their frames are opened.  Options are those of ``safe_open``.

    It pickles without keys and open files.  Every process opens the file itself: one KMS call each.
    """

    def __init__(
        self,
        filename: Path,
        names: Sequence[str] | None = None,
        *,
        framework: str | None = None,
        keys: References | None = None,
        context: Mapping[str, str] | None = None,
        threads: int | None = 1,
        **options: Any,
    ) -> None:
        self._filename = filename
        self._names = list(names) if names is not None else None
        self._options = {
            **options,
            "framework": framework,
            "keys": keys,
            "context": context,
            "threads": threads,
        }
        self._opened: tuple[int, safe_open, dict[str, TensorSlice]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return next(iter(self._slices().values())).get_shape()[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        size = len(self)
        position = _position(index, size)
        return {name: part[position] for name, part in self._slices().items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Many rows at once; a DataLoader asks for a batch this way."""
        size = len(self)
        positions = [_position(index, size) for index in indices]
        order = sorted(set(positions))
        place = {position: row for row, position in enumerate(order)}
        parts = {name: part[order] for name, part in self._slices().items()}
        return [{name: part[place[position]] for name, part in parts.items()} for position in positions]

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None

    def _slices(self) -> dict[str, TensorSlice]:
        # A forked child opens the file itself: data keys are not taken along.
        if self._opened is None or self._opened[0] != os.getpid():
            file = safe_open(self._filename, **self._options)
            slices = {name: file.get_slice(name) for name in self._names or file.keys()}
            lengths = {tuple(part.get_shape()[:1]) for part in slices.values()}
            if len(lengths) != 1 or () in lengths:
                file.close()
                raise ValueError(f"{self._filename}: its tensors do not agree in their first dimension")
            self._opened = os.getpid(), file, slices
        return self._opened[2]


# ---------------------------------------------------------------------------------------------
# numpy's own files


def save_npy(
    filename: Path,
    array: Array,
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    sign: bool = False,
    frame_size: int | str = DEFAULT_FRAME_LENGTH,
    cache: DataKeyCache | None = None,
    threads: int | None = None,
    fsync: bool = True,
) -> None:
    """Save an array to an encrypted ``.npy`` file, as numpy.save does; arrays of objects are refused."""
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise ValueError("an array of Python objects is not saved: reading it back would run code")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        array = np.ascontiguousarray(array)
    start = io.BytesIO()
    npy_format.write_array_header_2_0(start, npy_format.header_data_from_array_1_0(array))
    flat = (array if array.flags.c_contiguous else array.T).reshape(-1)
    data = flat.view(np.uint8).data if flat.nbytes else memoryview(b"")
    _write(
        filename, [memoryview(start.getvalue()), data], keys, context, sign, frame_size, cache, threads, fsync
    )


def load_npy(
    filename: Path | Any,
    *,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    threads: int | None = None,
    **options: Any,
) -> Array:
    """The array of an encrypted ``.npy`` file, read in threads.  Options as for ``sc.open``."""
    with open_npy(filename, keys=keys, context=context, threads=threads, **options) as file:
        return file.read()


class open_npy:  # noqa: N801  (a name beside safe_open)
    """An encrypted ``.npy`` file that is read where it is indexed; only the frames of that part are opened.

        with tensors.open_npy("features.npy") as array:
            batch = array[1000:1256]

    Attributes: ``shape`` and ``dtype``.
    """

    def __init__(
        self,
        filename: Path | Any,
        *,
        keys: References | None = None,
        context: Mapping[str, str] | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        self._plaintext = _Plaintext(filename, threads, {**options, "keys": keys, "context": context})
        try:
            file = self._plaintext.file
            self.shape, self._fortran, self.dtype = _parse_npy_header(file, self._plaintext.name)
            self._start = file.tell()
            if self._start + self._nbytes > file.size:
                raise FormatError(f"{self._plaintext.name}: the array is cut short", recognised=False)
        except BaseException:
            self.close()
            raise

    @property
    def _nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __enter__(self) -> open_npy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._plaintext.close()

    def __len__(self) -> int:
        return self.shape[0]

    def read(self) -> Array:
        """The whole array."""
        data = _read_array(self._plaintext, self._start, self.dtype, math.prod(self.shape))
        return data.reshape(self.shape, order="F" if self._fortran else "C")

    def __getitem__(self, index: Any) -> Array:
        """What numpy would give for this index: numbers, slices, one list of numbers or mask, None, ``...``."""
        if self._fortran:
            raise TypeError("the array is stored by columns; read() all of it")
        return _index_region(self._plaintext, self._start, self.dtype, self.shape, index)


def _parse_npy_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type from the header at the file's position, which is then where the data begin."""
    try:
        version = npy_format.read_magic(file)
        read = {
            (1, 0): npy_format.read_array_header_1_0,
            (2, 0): npy_format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"version {version}")
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise FormatError(
            f"{name}: authenticated, but not a .npy file that is read here", recognised=False
        ) from error
    if dtype.hasobject:
        raise FormatError(
            f"{name}: an array of Python objects is not loaded: it could run code", recognised=False
        )
    return shape, fortran, dtype


def _read_array(plaintext: _Plaintext, start: int, dtype: np.dtype[Any], count: int) -> Array:
    memory = _memory(count * dtype.itemsize)
    plaintext.fill(start, memory.data)
    return memory.view(dtype) if dtype.itemsize else np.empty(count, dtype)


def save_npz(
    filename: Path,
    arrays: Mapping[str, Array],
    *,
    keys: References,
    context: Mapping[str, str] | None = None,
    compressed: bool = False,
    **options: Any,
) -> None:
    """Save arrays to an encrypted ``.npz`` file, as numpy.savez does.  Options as for ``sc.open(…, "wb")``."""
    with api.open(filename, "wb", keys=keys, context=context, **options) as file:
        method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", method, allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(name + ".npy", "w", force_zip64=True) as member:
                    npy_format.write_array(member, np.asanyarray(array), allow_pickle=False)


def load_npz(
    filename: Path | Any,
    *,
    keys: References | None = None,
    context: Mapping[str, str] | None = None,
    threads: int | None = None,
    **options: Any,
) -> dict[str, Array]:
    """All arrays of an encrypted ``.npz`` file by name; what is not compressed is read in threads."""
    plaintext = _Plaintext(filename, threads, {**options, "keys": keys, "context": context})
    try:
        with zipfile.ZipFile(plaintext.file) as archive:
            return {
                info.filename.removesuffix(".npy"): _load_member(plaintext, archive, info)
                for info in archive.infolist()
            }
    except (zipfile.BadZipFile, ValueError) as error:
        raise FormatError(
            f"{plaintext.name}: authenticated, but not an .npz file that is read here", recognised=False
        ) from error
    finally:
        plaintext.close()


def _load_member(plaintext: _Plaintext, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    file = plaintext.file
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as member:
            return np.asarray(npy_format.read_array(member, allow_pickle=False))
    with archive.open(info):
        pass  # checks that the member is what the directory says
    # PKWARE APPNOTE 4.3.7: 30 bytes, of which the last four are the lengths of name and extra field.
    lengths = file.read_at(info.header_offset + 26, 4)
    start = (
        info.header_offset
        + 30
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )
    file.seek(start)
    shape, fortran, dtype = _parse_npy_header(file, plaintext.name)
    data_start, count = file.tell(), math.prod(shape)
    if data_start + count * dtype.itemsize > start + info.file_size:
        raise FormatError(f"{plaintext.name}: {info.filename} is cut short", recognised=False)
    data = _read_array(plaintext, data_start, dtype, count)
    return data.reshape(shape, order="F" if fortran else "C")
