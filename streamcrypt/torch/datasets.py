"""ParquetDataset: encrypted Parquet files as batches, in every worker of every rank.

    files -> row groups, in the epoch's order -> one row range for each rank -> one for each worker -> batches

The order of an epoch is a list of row groups, permuted by seed and epoch when shuffled.  A rank, and
within it a worker, takes a range of the rows of that order: so each row comes once, whatever the
number of ranks and workers, and all counts are exact before anything is read.

    rows of a rank    rows / ranks, which differ by one at most between ranks
    drop_last         rows // ranks each, and of these only full batches: what is left over is not seen
    pad               ceil(rows / ranks) each; the last rank begins again with the epoch's first rows

Workers split a rank at whole batches, so a rank has one short batch at most.

KMS calls: one for each distinct data key and process (parent and every worker), within
``cache_max_age`` seconds.  The dataset pickles without keys, clients and open files; a worker,
forked or spawned, asks for its data keys itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed
import torch.utils.data

from streamcrypt.errors import SourceError, StreamcryptError
from streamcrypt.fs import crypt_place

Output: TypeAlias = Literal["torch", "numpy", "arrow"]

_SUFFIXES: Final = (".parquet", ".pq", ".parq")
_STATE_VERSION: Final = 1
_PLANNING_THREADS: Final = 16


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of a dataset: its path, the id of its message, and the rows of its row groups."""

    path: str
    message_id: str
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Range:
    """What one worker yields: a range of the epoch's rows, which wraps around where it is padded."""

    start: int
    rows: int


class ParquetDataset(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Batches of encrypted Parquet files, for a DataLoader or to iterate.

        dataset = ParquetDataset("train.enc/", columns=["x", "y"], batch_size=8192, shuffle=True)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for batch in DataLoader(dataset, batch_size=None, num_workers=2):
                ...                                         # {"x": tensor, "y": tensor}

    ``source``: a file, a folder (its ``*.parquet`` files), a glob, a URL, or a list of them.
    Columns are those that the files hold, alike in all of them; what a folder's name says (``day=1``) is none.
    ``batch_size``: rows of a batch; None yields single rows, for a DataLoader that batches them.
    ``shuffle``: row groups in random order, and rows within windows of ``shuffle_buffer`` rows, by
    ``seed`` and epoch.  ``rank`` and ``world_size``: None for those of torch.distributed where it is
    set up, else 0 and 1.  ``drop_last`` and ``pad`` as the module says.

    ``output``: ``"torch"`` gives a dict of tensors (numbers, booleans; times as int64; fixed-size
    lists of numbers as rows) and lists (everything else), ``"numpy"`` the same with arrays,
    ``"arrow"`` a pyarrow Table.  A null is NaN in a column of floats; in one of integers, booleans or
    times it is a ValueError unless ``fill_nulls`` names a value.  ``transform`` is applied to each batch.

    ``keys``, ``context`` and further options are those of the ``crypt`` filesystem; ``filesystem`` is
    another fsspec filesystem to read through, as it is (plain Parquet files, say).

    IntegrityError where anything does not authenticate: in a worker too, and never a wrong row.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int | None = 8192,
        columns: str | Sequence[str] | None = None,
        shuffle: bool = False,
        shuffle_buffer: int = 100_000,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        pad: bool = False,
        output: Output = "torch",
        fill_nulls: Mapping[str, Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        keys: str | Sequence[str] | None = None,
        context: Mapping[str, str] | None = None,
        cache_max_age: float = 86_400.0,
        filesystem: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError("batch_size is at least 1")
        if shuffle_buffer < 1:
            raise ValueError("shuffle_buffer is at least 1 row")
        if output not in ("torch", "numpy", "arrow"):
            raise ValueError(f"output {output!r}: it is 'torch', 'numpy' or 'arrow'")
        if output == "arrow" and batch_size is None:
            raise ValueError("output 'arrow' gives tables; it needs a batch_size")
        self.rank, self.world_size = _place(rank, world_size)
        sources = [source] if isinstance(source, str | os.PathLike) else list(source)
        self._sources = [os.fspath(one) for one in sources]
        if not self._sources:
            raise ValueError("a dataset needs a source")
        self.batch_size = batch_size
        self.columns = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.pad = pad
        self._buffer = shuffle_buffer
        self._output: Output = output
        self._fill_nulls = dict(fill_nulls or {})
        self._transform = transform
        self._filesystem = filesystem
        self._options = {**options, "keys": keys, "context": dict(context or {})}
        self._options["cache_max_age"] = cache_max_age
        # In shared memory, so that workers that live for several epochs see set_epoch too.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # torch is annotated in parts
        self._plan: tuple[PlannedFile, ...] | None = None
        self._opened: tuple[int, Any] | None = None
        self._resume: dict[str, Any] | None = None
        self._done = 0
        self._at: tuple[int, int] = (0, 1)  # worker, workers

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    # -- what there is

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; with ``shuffle`` each has its own order."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def plan(self) -> tuple[PlannedFile, ...]:
        """The files with their row groups, from their authenticated footers.

        Made once for each process, when it is first needed; made before a DataLoader starts its
        workers, it travels to them, and they read no footers but of the files that they take.
        """
        if self._plan is None:
            paths = self._paths()
            with ThreadPoolExecutor(min(_PLANNING_THREADS, len(paths)), "streamcrypt-plan") as pool:
                planned = list(pool.map(self._planned, paths))
            _check_alike(planned)
            self._plan = tuple(file for file, _ in planned)
        return self._plan

    def __len__(self) -> int:
        """The batches (or single rows) of this rank, over all its workers."""
        rows = self._of_rank(self._rows()).rows
        return rows if self.batch_size is None else self._batches(rows)

    def __repr__(self) -> str:
        return f"<ParquetDataset {', '.join(self._sources)} rank {self.rank} of {self.world_size}>"

    # -- batches

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        at = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        resume, self._resume = self._resume, None
        self._at, self._done = at, 0
        if resume is not None:
            self._check_state(resume, at)
            self._epoch.fill_(resume["epoch"])
            self._done = resume["rows"]
        return self._iterate(at, self._done)

    def _iterate(self, at: tuple[int, int], done: int) -> Iterator[Any]:
        mine = self._of_worker(self._of_rank(self._rows()), *at)
        for table in self._shuffled(mine, done) if self.shuffle else self._in_order(mine, done):
            if self.batch_size is None:
                yield from self._single_rows(table)
                continue
            batch = self._converted(table)
            # Before it is handed out: whoever asks for the state while holding a batch has had it.
            self._done += table.num_rows
            yield batch

    def _single_rows(self, table: pa.Table) -> Iterator[Any]:
        columns = self._columns(table)
        for index in range(table.num_rows):
            row = {name: column[index] for name, column in columns.items()}
            self._done += 1
            yield self._transform(row) if self._transform is not None else row

    def _in_order(self, mine: _Range, done: int) -> Iterator[pa.Table]:
        step = self.batch_size or self._buffer
        held: list[pa.Table] = []
        count = 0
        for table in self._read(mine.start + done, mine.start + mine.rows):
            start = 0
            while count + table.num_rows - start >= step:
                part = table.slice(start, step - count)
                yield pa.concat_tables([*held, part])
                start += step - count
                held, count = [], 0
            if start < table.num_rows:
                held.append(table.slice(start))
                count += table.num_rows - start
        if held:
            yield pa.concat_tables(held)

    def _shuffled(self, mine: _Range, done: int) -> Iterator[pa.Table]:
        """Rows permuted within windows, which lie at fixed places: so one can begin within any."""
        step = self.batch_size or 1
        window = max(step, self._buffer - self._buffer % step)
        for start in range(done - done % window, mine.rows, window):
            rows = min(window, mine.rows - start)
            first = mine.start + start
            order = self._random(1, first).permutation(rows)
            skip = max(0, done - start)
            table = pa.concat_tables(self._read(first, first + rows)).combine_chunks()
            for position in range(skip, rows, self.batch_size or rows):
                yield table.take(_indices(order[position : position + (self.batch_size or rows)]))

    # -- where rows are

    def _rows(self) -> int:
        return sum(sum(file.rows) for file in self.plan())

    def _batches(self, rows: int) -> int:
        assert self.batch_size is not None
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def _of_rank(self, total: int) -> _Range:
        if self.pad:
            share = -(-total // self.world_size)
            return _Range(share * self.rank, share)
        if self.drop_last:
            share = total // self.world_size
            return _Range(share * self.rank, share)
        start = total * self.rank // self.world_size
        return _Range(start, total * (self.rank + 1) // self.world_size - start)

    def _of_worker(self, rank: _Range, worker: int, workers: int) -> _Range:
        step = self.batch_size or 1
        batches = rank.rows // step if self.drop_last else -(-rank.rows // step)
        first, last = batches * worker // workers, batches * (worker + 1) // workers
        start, stop = min(first * step, rank.rows), min(last * step, rank.rows)
        return _Range(rank.start + start, stop - start)

    def _order(self) -> list[tuple[PlannedFile, int]]:
        """The row groups of the epoch."""
        groups = [(file, index) for file in self.plan() for index in range(len(file.rows))]
        if not self.shuffle:
            return groups
        return [groups[position] for position in self._random(0).permutation(len(groups))]

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *purpose])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[PlannedFile, int, int, int]]:
        """File, row group, and the rows within it that the epoch's rows ``start`` to ``stop`` are."""
        order, total = self._order(), self._rows()
        while start < stop:
            begin = start - start % total  # beyond the end the epoch begins again (pad)
            position = begin
            for file, index in order:
                rows = file.rows[index]
                low, high = max(start, position), min(stop, position + rows)
                if low < high:
                    yield file, index, low - position, high - position
                position += rows
                if position >= stop:
                    break
            start = position

    # -- reading

    def _read(self, start: int, stop: int) -> Iterator[pa.Table]:
        opened: tuple[str, pq.ParquetFile] | None = None
        # Threads are for a process that has the cores for itself; workers are one for each core.
        use_threads = torch.utils.data.get_worker_info() is None
        try:
            for file, index, low, high in self._pieces(start, stop):
                if opened is None or opened[0] != file.path:
                    if opened is not None:
                        opened[1].close(force=True)
                    opened = file.path, self._open(file)
                table = opened[1].read_row_group(index, columns=self.columns, use_threads=use_threads)
                if table.num_rows != file.rows[index]:
                    raise SourceError(f"{file.path}: row group {index} changed since the dataset was planned")
                yield table.slice(low, high - low)
        finally:
            if opened is not None:
                opened[1].close(force=True)

    def _open(self, planned: PlannedFile) -> pq.ParquetFile:
        file = self._fs().open(planned.path, "rb")
        if _message_id(file) != planned.message_id:
            file.close()
            raise SourceError(f"{planned.path}: is another message than when the dataset was planned")
        return _parquet(file)

    def _planned(self, path: str) -> tuple[PlannedFile, pa.Schema]:
        """The file, and the types of the columns that are wanted of it."""
        file = self._fs().open(path, "rb")
        message_id = _message_id(file)
        parquet = _parquet(file)
        try:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            missing = set(self.columns or ()) - set(schema.names)
            if missing:
                raise ValueError(f"{path}: has no column {', '.join(sorted(missing))}")
            if self.columns is not None:
                schema = pa.schema([schema.field(name) for name in self.columns])
            rows = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
        finally:
            parquet.close(force=True)
        return PlannedFile(path, message_id, rows), schema

    def _fs(self) -> Any:
        if self._filesystem is not None:
            return self._filesystem
        # A forked child makes its own: data keys are not taken along.
        if self._opened is None or self._opened[0] != os.getpid():
            fs, _ = crypt_place(self._sources[0], **self._options)
            self._opened = os.getpid(), fs
        return self._opened[1]

    def _paths(self) -> list[str]:
        fs = self._fs()
        paths: list[str] = []
        for source in self._sources:
            path = fs._strip_protocol(source)
            # What is there under a name with such signs in it is meant by that name.
            is_glob = any(sign in path for sign in "*?[") and not fs.exists(path)
            for found in sorted(fs.glob(path)) if is_glob else [path]:
                if not (is_glob and found.endswith(_SUFFIXES)) and fs.isdir(found):
                    paths += sorted(name for name in fs.find(found) if name.endswith(_SUFFIXES))
                else:
                    paths.append(found)
        if not paths:
            raise SourceError(f"{', '.join(self._sources)}: no Parquet file there (*.parquet)")
        return paths

    # -- conversion

    def _converted(self, table: pa.Table) -> Any:
        batch = table if self._output == "arrow" else self._columns(table)
        return self._transform(batch) if self._transform is not None else batch

    def _columns(self, table: pa.Table) -> dict[str, Any]:
        columns = {
            name: self._column(name, column)
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        # What does not leave the process is a plain dict.
        return columns if torch.utils.data.get_worker_info() is None else _Batch(columns)

    def _column(self, name: str, column: pa.ChunkedArray) -> Any:
        kind, chunks = column.type, column.chunks
        width = 0
        if pa.types.is_fixed_size_list(kind) and _is_number(kind.value_type):
            if column.null_count:
                raise ValueError(
                    f"column {name!r} has rows that are null; leave them out, or read it as 'arrow'"
                )
            width, kind = kind.list_size, kind.value_type
            chunks = [chunk.flatten() for chunk in chunks]
        if not _is_number(kind) and not _is_time(kind):
            return column.to_pylist()
        array = _values(name, chunks, kind, self._fill_nulls)
        if width:
            array = array.reshape(-1, width)
        return torch.from_numpy(array) if self._output == "torch" else array

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: the epoch, the rows that were given out, and the place of the next one.

        It holds names and numbers alone.  Of one process or worker; StatefulDataLoader of torchdata
        collects those of its workers.
        """
        mine = self._of_worker(self._of_rank(self._rows()), *self._at)
        state: dict[str, Any] = {
            "version": _STATE_VERSION,
            "epoch": self.epoch,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": self._at[0],
            "workers": self._at[1],
            "rows": self._done,
            "next": None,
            "dataset": self._fingerprint(),
        }
        start = self._done
        if self.shuffle and self.batch_size is not None:
            window = max(self.batch_size, self._buffer - self._buffer % self.batch_size)
            start -= start % window  # the rows that are left of a window may lie anywhere in it
        end = mine.rows if self._done < mine.rows else start
        for file, group, row, _ in self._pieces(mine.start + start, mine.start + end):
            state["next"] = {
                "file": file.path,
                "message_id": file.message_id,
                "row_group": group,
                "row": row,
            }
            break
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken: the next iteration gives the rest of that epoch.

        It opens no row group before that place.  ValueError when the state is of another dataset, or
        of other ranks, workers or options that decide the order.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"a state of version {state.get('version')!r}; this is version {_STATE_VERSION}")
        self._resume = dict(state)
        self._epoch.fill_(state["epoch"])
        self._done = state["rows"]
        self._at = state["worker"], state["workers"]

    def _check_state(self, state: Mapping[str, Any], at: tuple[int, int]) -> None:
        place = (self.rank, self.world_size, *at)
        saved = tuple(state[name] for name in ("rank", "world_size", "worker", "workers"))
        if place != saved:
            raise ValueError(
                f"the state is of rank {saved[0]} of {saved[1]}, worker {saved[2]} of {saved[3]}; this is "
                f"rank {place[0]} of {place[1]}, worker {place[2]} of {place[3]}"
            )
        if state["dataset"] != self._fingerprint():
            raise ValueError("the state is of other files, or of other options of order and batches")

    def _fingerprint(self) -> str:
        """All that decides which rows come in which batches, as a digest."""
        decisive = {
            "files": [(file.path, file.message_id, file.rows) for file in self.plan()],
            "batches": (self.batch_size, self.drop_last, self.pad),
            "order": (self.shuffle, self.seed, self._buffer if self.shuffle else 0),
        }
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size are given together")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: ranks are counted from 0")
    return rank, world_size


def _check_alike(planned: Sequence[tuple[PlannedFile, pa.Schema]]) -> None:
    """ValueError unless all files that have rows have the same columns: a batch may be of two files."""
    with_rows = [(file.path, schema) for file, schema in planned if sum(file.rows)]
    for path, schema in with_rows[1:]:
        first_path, first = with_rows[0]
        if schema.equals(first):
            continue
        difference = "its columns are in another order, or null in another way"
        for name in dict.fromkeys((*first.names, *schema.names)):
            here, there = (
                str(one.field(name).type) if name in one.names else "missing" for one in (schema, first)
            )
            if here != there:
                difference = f"its column {name!r} is {here}, not {there}"
                break
        raise ValueError(
            f"{path}: {difference}, as in {first_path}; name columns= that are alike in all files"
        )


def _message_id(file: Any) -> str:
    header = getattr(file, "header", None)
    return header.message_id.hex() if header is not None else ""


def _parquet(file: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=True)
    except pa.ArrowInvalid as error:
        file.close()
        raise SourceError(f"{file.name}: not a Parquet file ({error})") from error
    except StreamcryptError:
        file.close()
        raise


# ---------------------------------------------------------------------------------------------
# Arrow's memory as arrays.  pyarrow's own ways there (to_numpy, pa.array, pa.scalar) import pandas, half
# a second of processor time that every worker would spend before its first batch.


def _values(
    name: str, chunks: Sequence[pa.Array], kind: pa.DataType, fill_nulls: Mapping[str, Any]
) -> np.ndarray[Any, Any]:
    """The numbers of a column, in memory of their own."""
    dtype = _dtype(kind)
    values = np.empty(sum(len(chunk) for chunk in chunks), dtype)
    fill = None
    start = 0
    for chunk in chunks:
        part = values[start : start + len(chunk)]
        start += len(chunk)
        if not len(part):
            continue
        valid, data = chunk.buffers()
        first, last = chunk.offset, chunk.offset + len(chunk)
        part[:] = (
            _bits(data, first, last)
            if dtype.kind == "b"
            else np.frombuffer(data, dtype, len(part), first * dtype.itemsize)
        )
        if chunk.null_count:
            if fill is None:
                fill = _filling(name, kind, dtype, fill_nulls)
            part[~_bits(valid, first, last)] = fill
    return values


def _filling(name: str, kind: pa.DataType, dtype: np.dtype[Any], fill_nulls: Mapping[str, Any]) -> Any:
    """What stands for a null."""
    if name not in fill_nulls:
        if dtype.kind == "f":
            return np.nan
        raise ValueError(
            f"column {name!r} of type {kind} has nulls; give fill_nulls={{{name!r}: VALUE}}, or leave it out"
        )
    value = fill_nulls[name]
    try:
        fill = dtype.type(value)
        fits = dtype.kind == "f" or bool(fill == value)
    except (OverflowError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"fill_nulls: {value!r} does not fit column {name!r} of type {kind}")
    return fill


def _bits(buffer: pa.Buffer, first: int, last: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Bits ``first`` to ``last`` (excluded), which Arrow keeps with the least significant one first."""
    held = np.frombuffer(buffer, np.uint8, -(-last // 8) - first // 8, first // 8)
    return np.unpackbits(held, bitorder="little")[first % 8 :][: last - first].view(np.bool_)


def _dtype(kind: pa.DataType) -> np.dtype[Any]:
    if _is_time(kind):
        return np.dtype(f"i{kind.bit_width // 8}")
    return np.dtype(_FLOATS.get(str(kind), str(kind)))


def _indices(numbers: np.ndarray[Any, np.dtype[np.int64]]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])


_FLOATS: Final = {"halffloat": "f2", "float": "f4", "double": "f8"}


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_temporal(kind)) and kind.bit_width in (32, 64)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


# ---------------------------------------------------------------------------------------------
# From a worker to its parent


class _Batch(dict[str, Any]):
    """A batch of a worker.  It arrives as a plain dict, whose tensors share one piece of memory.

    torch hands over every tensor's memory by a connection of its own, which costs a millisecond, more
    than reading and opening a column of a thousand rows.
    """

    def __copy__(self) -> _Batch:  # torch's default_convert copies; it is not to pack
        return _Batch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        packed: dict[str, tuple[torch.dtype, torch.Size, int, int]] = {}
        pieces: list[torch.Tensor] = []
        end = 0
        for name, value in self.items():
            if _is_plain(value):
                piece = value.contiguous().reshape(-1).view(torch.uint8)
                packed[name] = value.dtype, value.shape, end, end + len(piece)
                pieces.append(piece)
                end += len(piece) + -len(piece) % _ALIGNMENT
        memory = np.zeros(end, np.uint8)
        for piece, (_, _, start, stop) in zip(pieces, packed.values(), strict=True):
            memory[start:stop] = piece.numpy()
        rest = {name: None if name in packed else value for name, value in self.items()}
        return _unpacked, (torch.from_numpy(memory), packed, rest)


_ALIGNMENT: Final = 64


_PLAIN_TYPES: Final = {
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


def _is_plain(value: Any) -> bool:
    """Whether a tensor is its bytes.  An error while packing would be met by a loader that waits for ever."""
    return (
        type(value) is torch.Tensor
        and value.dtype in _PLAIN_TYPES
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.requires_grad or value.is_nested or value.is_neg())
    )


def _unpacked(
    memory: torch.Tensor,
    packed: Mapping[str, tuple[torch.dtype, torch.Size, int, int]],
    batch: dict[str, Any],
) -> dict[str, Any]:
    for name, (dtype, shape, start, stop) in packed.items():
        batch[name] = memory[start:stop].view(dtype).view(shape)
    return batch
