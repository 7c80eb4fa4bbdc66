"""Messages in memory and random reads."""

from __future__ import annotations

import random

import streamcrypt as sc

from .common import KiB, MiB, incompressible, key_reference, workspace


class Bytes:
    """Messages of 4 KiB: the cost of one message."""

    def setup(self):
        self.context = workspace()
        folder = self.context.__enter__()
        self.keys = key_reference(folder)
        self.plaintext = incompressible(4 * KiB)
        self.message = sc.encrypt_bytes(self.plaintext, keys=self.keys)
        self.cache = sc.DataKeyCache()

    def teardown(self):
        self.context.__exit__(None, None, None)

    def time_encrypt(self):
        sc.encrypt_bytes(self.plaintext, keys=self.keys)

    def time_encrypt_cached(self):
        sc.encrypt_bytes(self.plaintext, keys=self.keys, cache=self.cache)

    def time_decrypt(self):
        sc.decrypt_bytes(self.message, keys=self.keys)


class RandomReads:
    """64 KiB at random places of 256 frames of 1 MiB."""

    def setup(self):
        self.context = workspace()
        folder = self.context.__enter__()
        self.path = folder / "message"
        keys = key_reference(folder)
        with sc.open(self.path, "wb", keys=keys, fsync=False) as file:
            for number in range(256):
                file.write(incompressible(MiB, seed=number))
        self.file = sc.open(self.path, keys=keys)
        self.random = random.Random(0)

    def teardown(self):
        self.file.close()
        self.context.__exit__(None, None, None)

    def time_read(self):
        self.file.seek(self.random.randrange(255) * MiB + 12345)
        self.file.read(64 * KiB)
