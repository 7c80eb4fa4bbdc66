"""An independent writer of messages, for tests only.

Written from the format's description, without ``streamcrypt.message``: any suite, framed or unframed,
signed or not, and any field overridden, so that a reader can be shown what no honest writer makes.
``assemble`` returns the message in parts; a test rearranges the parts and joins them again.

Also here, and for the same reason: a second implementation of HKDF (RFC 5869) and of GHASH
(NIST SP 800-38D), slow and plain.  Wycheproof proves them in test_wycheproof.py; then they judge ours.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import struct
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

# id: message version, key length, hash of the derivation, commitment, curve and hash of the signature
SUITES = {
    0x0014: (1, 16, None, False, None, None),
    0x0046: (1, 24, None, False, None, None),
    0x0078: (1, 32, None, False, None, None),
    0x0114: (1, 16, "sha256", False, None, None),
    0x0146: (1, 24, "sha256", False, None, None),
    0x0178: (1, 32, "sha256", False, None, None),
    0x0214: (1, 16, "sha256", False, ec.SECP256R1(), hashes.SHA256()),
    0x0346: (1, 24, "sha384", False, ec.SECP384R1(), hashes.SHA384()),
    0x0378: (1, 32, "sha384", False, ec.SECP384R1(), hashes.SHA384()),
    0x0478: (2, 32, "sha512", True, None, None),
    0x0578: (2, 32, "sha512", True, ec.SECP384R1(), hashes.SHA384()),
}
SIGNED = frozenset({0x0214, 0x0346, 0x0378, 0x0578})
FRAME, FINAL, SINGLE = (
    b"AWSKMSEncryptionClient Frame",
    b"AWSKMSEncryptionClient Final Frame",
    b"AWSKMSEncryptionClient Single Block",
)
NAMESPACE, NAME, WRAPPING_KEY = "tests", "aes-256", bytes(range(32))
"""Namespace, name and bytes of the raw AES wrapping key under which crafted messages are wrapped."""


def u16(number: int) -> bytes:
    return struct.pack(">H", number)


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


def counted(data: bytes) -> bytes:
    return u16(len(data)) + data


def context_bytes(pairs: dict[str, str] | list[tuple[str, str]]) -> bytes:
    """Sorted when it is a dict; as it stands when it is a list of pairs."""
    if isinstance(pairs, dict):
        encoded = sorted((name.encode(), value.encode()) for name, value in pairs.items())
    else:
        encoded = [(name.encode(), value.encode()) for name, value in pairs]
    if not encoded:
        return b""
    return u16(len(encoded)) + b"".join(counted(name) + counted(value) for name, value in encoded)


def hkdf(name: str, salt: bytes, key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 by its two formulas."""
    pseudorandom_key = hmac.digest(salt or bytes(hashlib.new(name).digest_size), key, name)
    output, block, counter = b"", b"", 1
    while len(output) < length:
        block = hmac.digest(pseudorandom_key, block + info + bytes((counter,)), name)
        output, counter = output + block, counter + 1
    return output[:length]


def derive(suite_id: int, data_key: bytes, message_id: bytes) -> tuple[bytes, bytes]:
    """Content key and commitment."""
    _, length, name, committing, _, _ = SUITES[suite_id]
    if name is None:
        return data_key, b""
    if not committing:
        return hkdf(name, b"", data_key, u16(suite_id) + message_id, length), b""
    return (
        hkdf(name, message_id, data_key, u16(suite_id) + b"DERIVEKEY", length),
        hkdf(name, message_id, data_key, b"COMMITKEY", 32),
    )


def wrap_raw_aes(
    data_key: bytes,
    context: dict[str, str],
    *,
    namespace: str = NAMESPACE,
    name: str = NAME,
    wrapping_key: bytes = WRAPPING_KEY,
) -> tuple[str, bytes, bytes]:
    """Provider id, info and ciphertext of an encrypted data key of the raw AES keyring."""
    iv = os.urandom(12)
    info = name.encode() + u32(128) + u32(12) + iv
    return namespace, info, AESGCM(wrapping_key).encrypt(iv, data_key, context_bytes(context))


@dataclass
class Draft:
    """What a message is made of.  Everything may be overridden; None means what an honest writer writes."""

    suite_id: int = 0x0478
    plaintext: bytes = b""
    frame_length: int = 32  # 0: unframed
    context: dict[str, str] = field(default_factory=lambda: {"k": "v"})
    full_final: bool = False
    """An exact multiple of the frame length ends in a full final frame, not in an empty one."""
    data_key: bytes | None = None
    message_id: bytes | None = None
    signing_key: ec.EllipticCurvePrivateKey | None = None
    edks: list[tuple[str, bytes, bytes]] | None = None
    commitment: bytes | None = None
    stored_context: bytes | None = None
    header_iv: bytes = bytes(12)
    version: int | None = None
    type: int = 0x80
    content_type: int | None = None
    reserved: int = 0
    iv_length: int = 12
    header_id: int | None = None
    """The suite id that the header states, when it is not the one by which the message is made."""
    unstored: dict[str, str] = field(default_factory=dict)
    first_sequence: int = 1
    random_ivs: bool = False


@dataclass
class Parts:
    """A message, taken apart."""

    header: bytes
    authentication: bytes
    frames: list[bytes]
    """All frames in order, the final one last; or the one unframed body."""
    footer: bytes
    data_key: bytes
    content_key: bytes
    message_id: bytes
    suite_id: int
    signing_key: ec.EllipticCurvePrivateKey | None

    def join(self) -> bytes:
        return self.header + self.authentication + b"".join(self.frames) + self.footer

    def resigned(self) -> Parts:
        """With a footer that holds for the parts as they are now: tampering by who has the signing key."""
        assert self.signing_key is not None
        signed = self.header + self.authentication + b"".join(self.frames)
        return replace(self, footer=footer(self.signing_key, self.suite_id, signed))


def footer(signing_key: ec.EllipticCurvePrivateKey, suite_id: int, signed: bytes) -> bytes:
    hash_algorithm = SUITES[suite_id][5]
    assert hash_algorithm is not None
    return counted(signing_key.sign(signed, ec.ECDSA(hash_algorithm)))


def public_key_text(key: ec.EllipticCurvePublicKey) -> str:
    return base64.b64encode(key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)).decode()


def frame_aad(message_id: bytes, label: bytes, sequence: int, length: int) -> bytes:
    return message_id + label + u32(sequence) + struct.pack(">Q", length)


def assemble(draft: Draft) -> Parts:
    """The message of this draft."""
    version, key_length, _, committing, curve, _ = SUITES[draft.suite_id]
    data_key = draft.data_key if draft.data_key is not None else os.urandom(key_length)
    message_id = draft.message_id or os.urandom(16 if version == 1 else 32)
    context, signing_key = dict(draft.context), draft.signing_key
    if curve is not None:
        signing_key = signing_key or ec.generate_private_key(curve)
        context.setdefault("aws-crypto-public-key", public_key_text(signing_key.public_key()))
    content_key, commitment = derive(draft.suite_id, data_key, message_id)
    edks = draft.edks
    if edks is None:
        edks = [wrap_raw_aes(data_key, {**context, **draft.unstored})]
    stored = draft.stored_context if draft.stored_context is not None else context_bytes(context)
    content_type = draft.content_type or (2 if draft.frame_length else 1)
    header = bytes((draft.version or version,)) + (bytes((draft.type,)) if version == 1 else b"")
    header += u16(draft.header_id if draft.header_id is not None else draft.suite_id) + message_id
    header += counted(stored) + u16(len(edks))
    header += b"".join(counted(edk[0].encode()) + counted(edk[1]) + counted(edk[2]) for edk in edks)
    header += bytes((content_type,))
    if version == 1:
        header += u32(draft.reserved) + bytes((draft.iv_length,))
    header += u32(draft.frame_length)
    if committing:
        header += draft.commitment if draft.commitment is not None else commitment
    aead = AESGCM(content_key)
    tag = aead.encrypt(draft.header_iv, b"", header + context_bytes(draft.unstored))
    frames = seal_body(draft, aead, message_id)
    parts = Parts(
        header,
        (draft.header_iv if version == 1 else b"") + tag,
        frames,
        b"",
        data_key,
        content_key,
        message_id,
        draft.suite_id,
        signing_key,
    )
    return parts.resigned() if curve is not None else parts


def seal_body(draft: Draft, aead: AESGCM, message_id: bytes) -> list[bytes]:
    plaintext, size = draft.plaintext, draft.frame_length
    if not size:
        iv = struct.pack(">QI", 0, 1)
        sealed = aead.encrypt(iv, plaintext, frame_aad(message_id, SINGLE, 1, len(plaintext)))
        return [iv + struct.pack(">Q", len(plaintext)) + sealed]
    pieces = [plaintext[start : start + size] for start in range(0, len(plaintext), size)]
    if not draft.full_final and len(plaintext) % size == 0:
        pieces.append(b"")
    frames = []
    for sequence, piece in enumerate(pieces, draft.first_sequence):
        iv = os.urandom(12) if draft.random_ivs else struct.pack(">QI", 0, sequence)
        if sequence - draft.first_sequence == len(pieces) - 1:
            sealed = aead.encrypt(iv, piece, frame_aad(message_id, FINAL, sequence, len(piece)))
            frames.append(b"\xff\xff\xff\xff" + u32(sequence) + iv + u32(len(piece)) + sealed)
        else:
            sealed = aead.encrypt(iv, piece, frame_aad(message_id, FRAME, sequence, len(piece)))
            frames.append(u32(sequence) + iv + sealed)
    return frames


# ---------------------------------------------------------------- GF(2^128), as GCM orders its bits

_R = 0xE1 << 120


def gf_multiply(x: int, y: int) -> int:
    """SP 800-38D, algorithm 1: bit 0 is the most significant bit of the block."""
    product, v = 0, y
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            product ^= v
        v = (v >> 1) ^ (_R if v & 1 else 0)
    return product


def gf_power(x: int, exponent: int) -> int:
    result, base = 1 << 127, x  # the field's one
    while exponent:
        if exponent & 1:
            result = gf_multiply(result, base)
        base = gf_multiply(base, base)
        exponent >>= 1
    return result


def gf_inverse(x: int) -> int:
    assert x
    return gf_power(x, 2**128 - 2)


def _encrypt_block(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def _blocks(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 16].ljust(16, b"\0"), "big") for i in range(0, len(data), 16)]


def hash_key(key: bytes) -> int:
    return int.from_bytes(_encrypt_block(key, bytes(16)), "big")


def ghash(h: int, aad: bytes, ciphertext: bytes) -> int:
    blocks = [*_blocks(aad), *_blocks(ciphertext), len(aad) * 8 << 64 | len(ciphertext) * 8]
    y = 0
    for block in blocks:
        y = gf_multiply(y ^ block, h)
    return y


def gcm_tag(key: bytes, iv: bytes, aad: bytes, ciphertext: bytes) -> bytes:
    """The 16-byte tag under a 12-byte IV."""
    mask = int.from_bytes(_encrypt_block(key, iv + u32(1)), "big")
    return (ghash(hash_key(key), aad, ciphertext) ^ mask).to_bytes(16, "big")


def gcm_keystream(key: bytes, iv: bytes, length: int) -> bytes:
    return Cipher(algorithms.AES(key), modes.CTR(iv + u32(2))).encryptor().update(bytes(length))


def collide(
    keys: tuple[bytes, bytes], iv: bytes, aad: bytes, ciphertext: bytes, *, free: int, in_aad: bool
) -> tuple[bytes, bytes, bytes]:
    """Change the 16-byte block at offset ``free`` so that one tag holds under both keys.

    Returns AAD, ciphertext and the common tag.  GHASH is linear in every block, so one block solves
    the one equation  tag under the first key = tag under the second.
    """
    assert free % 16 == 0
    data = bytearray(aad if in_aad else ciphertext)
    assert free + 16 <= len(data)
    data[free : free + 16] = bytes(16)
    aad, ciphertext = (bytes(data), ciphertext) if in_aad else (aad, bytes(data))
    tags = [int.from_bytes(gcm_tag(key, iv, aad, ciphertext), "big") for key in keys]
    # The block is multiplied by H once for itself and for every block after it, lengths included.
    position = free // 16 + (0 if in_aad else len(_blocks(aad)))
    exponent = len(_blocks(aad)) + len(_blocks(ciphertext)) + 1 - position
    first, second = (gf_power(hash_key(key), exponent) for key in keys)
    block = gf_multiply(tags[0] ^ tags[1], gf_inverse(first ^ second))
    data[free : free + 16] = block.to_bytes(16, "big")
    aad, ciphertext = (bytes(data), ciphertext) if in_aad else (aad, bytes(data))
    tag = gcm_tag(keys[0], iv, aad, ciphertext)
    assert tag == gcm_tag(keys[1], iv, aad, ciphertext)
    return aad, ciphertext, tag
