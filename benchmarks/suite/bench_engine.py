"""Whole jobs against their yardsticks: ratios, which stay comparable from day to day."""

from __future__ import annotations

import statistics
import time

import streamcrypt as sc

from .common import (
    MiB,
    cipher_loop,
    copy_loop,
    key_reference,
    make_files,
    read_loop,
    remove,
    workspace,
)


class Job:
    """Encrypt, decrypt and verify 16 files of 16 MiB: their time in units of the ceiling's, of the same round.

    asv takes more for worse.
    """

    timeout = 300
    rounds = 3

    def setup(self):
        self.context = workspace()
        self.folder = self.context.__enter__()
        self.keys = key_reference(self.folder)
        self.source = make_files(self.folder / "source", 16, 16 * MiB)
        self.encrypted = self.folder / "encrypted"
        sc.encrypt(self.source, self.encrypted, keys=self.keys, fsync=False)

    def teardown(self):
        self.context.__exit__(None, None, None)

    def track_time_of_encrypt(self):
        return self._ratio(
            lambda out: sc.encrypt(self.source, out, keys=self.keys, workers=2, fsync=False), copy=True
        )

    def track_time_of_decrypt(self):
        return self._ratio(
            lambda out: sc.decrypt(self.encrypted, out, keys=self.keys, workers=2, fsync=False), copy=True
        )

    def track_time_of_verify(self):
        return self._ratio(lambda out: sc.verify(self.encrypted, keys=self.keys, workers=2), copy=False)

    for _tracked in (track_time_of_encrypt, track_time_of_decrypt, track_time_of_verify):
        _tracked.unit = "x the ceiling's time"

    def _ratio(self, work, *, copy):
        ratios = []
        for _ in range(self.rounds):
            move = self._seconds(lambda out: copy_loop(self.source, out) if copy else read_loop(self.source))
            cipher = self._seconds(lambda out: cipher_loop(self.source))
            ratios.append(self._seconds(work) / (move + cipher))
        return statistics.median(ratios)

    def _seconds(self, work):
        out = self.folder / "out"
        remove(out)
        started = time.perf_counter()
        work(out)
        return time.perf_counter() - started


class Memory:
    """Peak memory must not grow with the size of a file."""

    params = ([64 * MiB, 512 * MiB],)
    param_names = ("length",)

    def setup(self, length):
        self.context = workspace()
        self.folder = self.context.__enter__()
        self.keys = key_reference(self.folder)
        self.source = make_files(self.folder / "source", 1, length)

    def teardown(self, length):
        self.context.__exit__(None, None, None)

    def peakmem_encrypt(self, length):
        remove(self.folder / "out")
        sc.encrypt(self.source, self.folder / "out", keys=self.keys, workers=2, fsync=False)


class Overhead:
    """Bytes that a message adds to its plaintext, and key-service calls of 1,000 messages."""

    def track_bytes_of_1_mib(self):
        with workspace() as folder:
            return len(sc.encrypt_bytes(bytes(MiB), keys=key_reference(folder))) - MiB

    track_bytes_of_1_mib.unit = "bytes"
