"""Arrow IPC files and streams: the same batches as plain, opened in place, nothing given out that was altered."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from families.datasets import KEY, flip, make_key, make_table

import streamcrypt as sc
from streamcrypt import arrow
from streamcrypt.fs import CryptFile

F = 4096

TABLES = {
    "plain types": make_table(1000),
    "no rows": make_table(1000).slice(0, 0),
    "one row": make_table(1000).slice(7, 1),
    "a batch larger than many frames": make_table(50_000),
    "dictionary": pa.table({"d": pa.array(["a", "b", None] * 500).dictionary_encode()}),
    "struct": pa.table({"s": [{"a": i, "b": [str(i)] * (i % 3)} for i in range(999)]}),
    "no columns": pa.table({}),
}


@pytest.fixture
def key(home: Path) -> str:
    make_key()
    return KEY


@pytest.mark.parametrize("frame_size", [1000, F, 2**20])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_file_round_trip(key: str, tmp_path: Path, table: pa.Table, frame_size: int) -> None:
    path = tmp_path / "t.arrow"
    arrow.write_file(table, path, keys=key, frame_size=frame_size, max_chunksize=300)
    with arrow.open_file(path) as reader:
        assert reader.read_all().equals(table)
        batches = [reader.get_batch(i) for i in reversed(range(reader.num_record_batches))][::-1]
    assert pa.Table.from_batches(batches, table.schema).equals(table)
    assert arrow.read_table(path).equals(table)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_batches(key: str, tmp_path: Path, compression: str) -> None:
    table = make_table(5000)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    arrow.write_file(table, tmp_path / "t.arrow", keys=key, frame_size=F, ipc_options=options)
    assert arrow.read_table(tmp_path / "t.arrow").equals(table)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_stream_round_trip(key: str, tmp_path: Path, table: pa.Table, sign: bool) -> None:
    path = tmp_path / "t.arrows"
    arrow.write_stream(table, path, keys=key, frame_size=F, sign=sign)
    with arrow.open_stream(path) as reader:
        assert reader.read_all().equals(table)
    with through_pipe(path.read_bytes()) as pipe, arrow.open_stream(pipe) as reader:
        assert reader.read_all().equals(table)


def test_an_iterable_of_batches_and_a_file_object(key: str, tmp_path: Path) -> None:
    table = make_table(3000)
    with pytest.raises(ValueError, match="schema"):
        arrow.write_file(iter(table.to_batches()), tmp_path / "t.arrow", keys=key)
    arrow.write_file(iter(table.to_batches(500)), tmp_path / "t.arrow", keys=key, schema=table.schema)
    with (tmp_path / "t.arrow").open("rb") as file, arrow.open_file(file) as reader:
        assert reader.num_record_batches == 6
        assert reader.read_all().equals(table)


def test_arrays_lie_in_the_memory_that_was_decrypted_into(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(20_000).select(["id", "value"])
    arrow.write_file(table, tmp_path / "t.arrow", keys=key, max_chunksize=5000)
    given: list[tuple[int, int]] = []
    buffer_at = CryptFile.buffer_at

    def watched(self: CryptFile, offset: int, length: int) -> Any:
        buffer = buffer_at(self, offset, length)
        given.append((buffer.address, buffer.address + buffer.size))
        return buffer

    monkeypatch.setattr(CryptFile, "buffer_at", watched)
    with arrow.open_file(tmp_path / "t.arrow") as reader:
        batch = reader.get_batch(2)
    assert batch.equals(table.to_batches(5000)[2])
    for column in batch.columns:
        for buffer in column.buffers():
            assert buffer is None or any(
                begin <= buffer.address and buffer.address + buffer.size <= end for begin, end in given
            )


def test_a_batch_reads_only_its_frames(key: str, tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    table = make_table(100_000)
    arrow.write_file(table, path, keys=key, frame_size=F, max_chunksize=2000)
    middle = path.stat().st_size // 2
    flip(path, middle)
    with arrow.open_file(path) as reader:
        outcomes = []
        for index in range(reader.num_record_batches):
            try:
                outcomes.append(reader.get_batch(index).equals(table.to_batches(2000)[index]))
            except sc.IntegrityError:
                outcomes.append(None)
    assert outcomes.count(None) in (1, 2)  # a frame may hold the end of one and the start of the next
    assert all(outcome for outcome in outcomes if outcome is not None)
    with pytest.raises(sc.IntegrityError):
        arrow.read_table(path)


@pytest.mark.parametrize("place", [0.05, 0.3, 0.6, 0.95, -1])
def test_a_flipped_bit_is_an_integrity_error(key: str, tmp_path: Path, place: float) -> None:
    for name, write in (("t.arrow", arrow.write_file), ("t.arrows", arrow.write_stream)):
        path = tmp_path / name
        write(make_table(5000), path, keys=key, frame_size=F)
        flip(path, int(place * path.stat().st_size) if place > 0 else -1)
    with pytest.raises(sc.IntegrityError):
        arrow.open_file(tmp_path / "t.arrow").read_all()
    with pytest.raises(sc.IntegrityError):
        arrow.open_stream(tmp_path / "t.arrows").read_all()
    with through_pipe((tmp_path / "t.arrows").read_bytes()) as pipe, pytest.raises(sc.IntegrityError):
        arrow.open_stream(pipe).read_all()


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("cut", [1, 20, 40, 5000])
def test_a_cut_stream_is_not_taken_for_a_whole_one(key: str, tmp_path: Path, cut: int, sign: bool) -> None:
    """Also where the data are complete and only the end of the message is missing."""
    path = tmp_path / "t.arrows"
    table = make_table(3000)
    arrow.write_stream(table, path, keys=key, frame_size=F, sign=sign)
    with through_pipe(path.read_bytes()[:-cut]) as pipe, pytest.raises(sc.IntegrityError):
        arrow.open_stream(pipe).read_all()


def test_nothing_appears_when_a_batch_fails(key: str, tmp_path: Path) -> None:
    table = make_table(100)

    def batches() -> Any:
        yield from table.to_batches()
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="broke"):
        arrow.write_file(batches(), tmp_path / "t.arrow", keys=key, schema=table.schema)
    assert list(tmp_path.glob("t.arrow*")) == []
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []


class through_pipe:
    """The reading end of a pipe that ``data`` is written into."""

    def __init__(self, data: bytes) -> None:
        read, write = os.pipe()
        self._file = os.fdopen(read, "rb")
        self._writer = threading.Thread(target=self._write, args=(write, data))

    @staticmethod
    def _write(descriptor: int, data: bytes) -> None:
        # The reader may stop at what was altered.
        with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
            file.write(data)

    def __enter__(self) -> Any:
        self._writer.start()
        return self._file

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._writer.join()
