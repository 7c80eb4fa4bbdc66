"""Records of a machine that does not exist: a known law with a little noise, to test what reads records.

Its coefficients are the truth that a fit must find again.
"""

import random

import numpy as np

from streamcrypt.bench.records import Cell, Machine, Record, Records
from streamcrypt.bench.sweep import calibration
from streamcrypt.plan.model import TERMS, Work

LAW = {
    "start": 0.05, "file_serial": 60e-6, "file": 150e-6, "byte_serial": 0.05e-9, "byte": 0.35e-9,
    "frame": 4e-6, "sync_serial": 0.0, "sync": 1e-3, "sync_byte": 0.2e-9, "worker": 0.02,
}  # fmt: skip
SIGNED_BYTE = 1.9e-9
CORES = 2

MACHINE = Machine(
    cpu="Synthetic", cores=CORES, flags=("aes",), memory=1 << 34, kernel="Linux", python="3.11", openssl="OpenSSL",
    versions={"streamcrypt": "0"}, virtual=True,
)  # fmt: skip


def law_seconds(cell: Cell) -> float:
    frames = cell.files * (cell.file_size // cell.frame_size + 1)
    work = Work(
        files=cell.files, bytes=cell.files * cell.file_size, frames=frames, workers=cell.workers, cores=CORES,
        fsync=cell.fsync, splits=not cell.signed,
    )  # fmt: skip
    law = LAW | ({"byte": SIGNED_BYTE} if cell.signed else {})
    return float(np.array([law[name] for name in TERMS]) @ work.features())


def synthetic_run(cell: Cell, round_number: int, rng: random.Random, noise: float = 0.02) -> Record:
    total = cell.files * cell.file_size
    wall = law_seconds(cell) * rng.lognormvariate(0, noise)
    return Record(
        session="synthetic", round=round_number, cell=cell, started="2026-01-02T03:04:05+00:00", wall_s=wall,
        bytes_in=total, files=cell.files, frames=cell.files * (cell.file_size // cell.frame_size + 1),
        kms_calls={"GenerateDataKey": 1}, kms_latency_ms=[0.2], cache_hits=cell.files - 1, cache_misses=1,
        yardstick_s={"copy": 0.7 * law_seconds(cell) * rng.lognormvariate(0, noise)},
    )  # fmt: skip


def synthetic_records(rounds: int = 3, noise: float = 0.02, seed: int = 1) -> Records:
    rng = random.Random(seed)
    cells = calibration(("memory", "disk"), cores=CORES).cells
    return Records(
        MACHINE, tuple(synthetic_run(cell, number, rng, noise) for number in range(rounds) for cell in cells)
    )
