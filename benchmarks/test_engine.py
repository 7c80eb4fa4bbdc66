"""The cases of benchmarks/suite under pytest-benchmark: is this change faster?

pytest benchmarks/test_engine.py --benchmark-only --benchmark-autosave
pytest-benchmark compare
"""

from __future__ import annotations

import pytest
from suite.bench_frames import Header, SealFrames
from suite.bench_read import Bytes, RandomReads
from suite.common import MiB, copy_loop, key_reference, make_files, remove, workspace

import streamcrypt as sc


@pytest.mark.parametrize("frame", SealFrames.params[0])
@pytest.mark.parametrize("operation", ["seal", "open"])
def test_frames(benchmark, operation, frame):
    case = SealFrames()
    case.setup(frame)
    benchmark(getattr(case, f"time_{operation}"), frame)


@pytest.mark.parametrize("operation", ["seal", "parse", "derive"])
def test_header(benchmark, operation):
    case = Header()
    case.setup()
    benchmark(getattr(case, f"time_{operation}"))


@pytest.mark.parametrize("operation", ["encrypt", "encrypt_cached", "decrypt"])
def test_bytes(benchmark, operation):
    case = Bytes()
    case.setup()
    benchmark(getattr(case, f"time_{operation}"))
    case.teardown()


def test_random_reads(benchmark):
    case = RandomReads()
    case.setup()
    benchmark(case.time_read)
    case.teardown()


@pytest.mark.parametrize("operation", ["copy", "encrypt", "decrypt", "verify"])
def test_job(benchmark, operation):
    with workspace() as folder:
        keys = key_reference(folder)
        source = make_files(folder / "source", 16, 16 * MiB)
        sc.encrypt(source, folder / "encrypted", keys=keys, fsync=False)
        work = {
            "copy": lambda: copy_loop(source, folder / "out"),
            "encrypt": lambda: sc.encrypt(source, folder / "out", keys=keys, workers=2, fsync=False),
            "decrypt": lambda: sc.decrypt(
                folder / "encrypted", folder / "out", keys=keys, workers=2, fsync=False
            ),
            "verify": lambda: sc.verify(folder / "encrypted", keys=keys, workers=2),
        }[operation]
        benchmark.pedantic(work, setup=lambda: remove(folder / "out"), rounds=5)
