"""Frames, headers and derivation: what one message costs besides its bytes."""

from __future__ import annotations

import os

from streamcrypt.message.derive import derive_keys
from streamcrypt.message.frames import REGULAR_OVERHEAD, FrameCipher
from streamcrypt.message.header import EncryptedDataKey, HeaderTemplate, parse_header
from streamcrypt.message.suites import UNSIGNED

from .common import KiB, MiB, incompressible


class SealFrames:
    params = ([4 * KiB, 64 * KiB, 1 * MiB, 4 * MiB],)
    param_names = ("frame",)

    def setup(self, frame):
        self.cipher = FrameCipher(os.urandom(32), os.urandom(32))
        self.plaintext = memoryview(incompressible(8 * MiB))
        self.sealed = memoryview(bytearray(8 * MiB // frame * (frame + REGULAR_OVERHEAD)))
        self.time_seal(frame)

    def time_seal(self, frame):
        self.cipher.seal_regular(self.plaintext, 0, frame, self.sealed)

    def time_open(self, frame):
        self.cipher.open_regular(self.sealed, 0, frame, memoryview(bytearray(8 * MiB)))


class Header:
    def setup(self):
        self.template = HeaderTemplate(
            UNSIGNED, {"Project": "bench"}, (EncryptedDataKey("aws-kms", b"arn" * 25, bytes(184)),), MiB
        )
        self.cipher = FrameCipher(os.urandom(32), bytes(32))
        self.header = self.template.seal(bytes(32), bytes(32), self.cipher.aead)

    def time_seal(self):
        self.template.seal(bytes(32), bytes(32), self.cipher.aead)

    def time_parse(self):
        parse_header(self.header)

    def time_derive(self):
        derive_keys(UNSIGNED, bytes(32), bytes(32))
