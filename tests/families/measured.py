"""Records of a machine that does not exist: a known law with a little noise, to test what reads records.

Its coefficients are the truth that a fit must find again.
"""

import random

import numpy as np

from streamcrypt.bench.records import Cell, Machine, Record, Records
from streamcrypt.bench.sweep import calibration
from streamcrypt.plan.model import TERMS, Work, alone_from

LAW = {
    "start": 0.02, "starting": 0.1, "process": 0.03, "file_lock": 180e-6, "file_contended": 40e-6, "file_serial": 48e-6,
    "file": 192e-6, "single": 60e-6, "frame": 4e-6, "byte_serial": 0.05e-9, "byte": 0.35e-9,
    "sync_serial": 0.0, "sync": 1e-3, "sync_byte": 0.2e-9, "signature_serial": 0.0, "signature": 1.5e-3,
    "hash": 1.5e-9, "key": 0.3e-3,
}  # fmt: skip
PARENTS_SHARE = LAW["file_serial"] / (LAW["file_serial"] + LAW["file"])
CORES = 2

MACHINE = Machine(
    cpu="Synthetic", cores=CORES, flags=("aes",), memory=1 << 34, kernel="Linux", python="3.11", openssl="OpenSSL",
    versions={"streamcrypt": "0"}, virtual=True,
)  # fmt: skip


def work_of_cell(cell: Cell) -> Work:
    keys = -(-(cell.files + 1) // (cell.cache_max_messages or cell.files + 1))
    return Work(
        files=cell.files, bytes=cell.files * cell.file_size, workers=cell.workers, cores=CORES, keys=keys,
        frames=cell.files * (cell.file_size // cell.frame_size + 1), fsync=cell.fsync, signed=cell.signed,
        singles=cell.files * (cell.operation == "encrypt" and cell.file_size >= alone_from(cell.frame_size)),
    )  # fmt: skip


def law_seconds(cell: Cell) -> float:
    return float(np.array([LAW[name] for name in TERMS]) @ work_of_cell(cell).features())


def synthetic_run(cell: Cell, round_number: int, rng: random.Random, noise: float = 0.02) -> Record:
    total, keys = cell.files * cell.file_size, round(work_of_cell(cell).keys)
    wall = law_seconds(cell) * rng.lognormvariate(0, noise)
    return Record(
        session="synthetic", round=round_number, cell=cell, started="2026-01-02T03:04:05+00:00", wall_s=wall,
        bytes_in=total, files=cell.files, frames=cell.files * (cell.file_size // cell.frame_size + 1),
        cpu_s=0.9 * wall * work_of_cell(cell).parallel,
        parent_cpu_s=PARENTS_SHARE * 0.9 * wall * work_of_cell(cell).parallel,
        kms_calls={"GenerateDataKey": keys}, kms_latency_ms=[0.2] * keys, cache_hits=cell.files + 1 - keys,
        cache_misses=keys,
        yardstick_s={"copy": 0.7 * law_seconds(cell) * rng.lognormvariate(0, noise)},
    )  # fmt: skip


def synthetic_records(rounds: int = 3, noise: float = 0.02, seed: int = 1) -> Records:
    rng = random.Random(seed)
    cells = calibration(("memory", "disk"), cores=CORES).cells
    return Records(
        MACHINE, tuple(synthetic_run(cell, number, rng, noise) for number in range(rounds) for cell in cells)
    )
