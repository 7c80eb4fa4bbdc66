"""One message read with ``streamcrypt.message`` alone: no keyring, no stream, no file.

The checks of a reader in their order.  ``streams`` and ``engine`` do the same with bounded memory; here
a whole message lies in memory, so that a hundred thousand of them can be tried in seconds.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives.asymmetric import ec

from streamcrypt.errors import FormatError, IntegrityError
from streamcrypt.message.derive import derive_for_reading
from streamcrypt.message.footer import Verifier
from streamcrypt.message.frames import UNFRAMED_OVERHEAD, FrameCipher, Geometry, unframed_length
from streamcrypt.message.header import Header, authenticate_header, parse_header
from streamcrypt.message.suites import CommitmentPolicy

ANY_SUITE = CommitmentPolicy.REQUIRE_ENCRYPT_ALLOW_DECRYPT


def read_message(
    message: bytes,
    data_key: bytes | Callable[[Header], bytes],
    *,
    policy: CommitmentPolicy = ANY_SUITE,
    max_encrypted_data_keys: int | None = None,
    unstored: Mapping[str, str] | None = None,
) -> bytes:
    """The plaintext of ``message``, every part of which has been checked."""
    header, end = parse_header(message, max_encrypted_data_keys=max_encrypted_data_keys)
    policy.check_reading(header.suite)
    content_key = derive_for_reading(header, data_key if isinstance(data_key, bytes) else data_key(header))
    cipher = FrameCipher(content_key, header.message_id)
    authenticate_header(header, cipher.aead, unstored)
    plaintext, body_end = _read_body(message, header, cipher, end)
    if not header.suite.signed:
        if body_end != len(message):
            raise FormatError("bytes follow the message")
        return plaintext
    verifier = Verifier(header.suite, _verification_key(header))
    verifier.update(message[:body_end])
    verifier.verify(message[body_end:])
    return plaintext


def _read_body(message: bytes, header: Header, cipher: FrameCipher, start: int) -> tuple[bytes, int]:
    if header.framed:
        geometry = Geometry.of_message(
            header, len(message), lambda offset, length: message[offset : offset + length]
        )
        plaintext = memoryview(bytearray(geometry.plaintext_length))
        regular_end = geometry.frame_offset(geometry.regular_frames)
        # The final frame first: it proves the length that the geometry was computed from.
        cipher.open_final(
            message[regular_end : geometry.body_end],
            geometry.regular_frames,
            geometry.frame_length,
            plaintext[geometry.regular_frames * geometry.frame_length :],
        )
        cipher.open_regular(message[start:regular_end], 0, geometry.frame_length, plaintext)
        return bytes(plaintext), geometry.body_end
    body = message[start:]
    if not header.suite.signed:
        return cipher.open_unframed(body), len(message)
    body = body[: UNFRAMED_OVERHEAD + unframed_length(body)]
    return cipher.open_unframed(body), start + len(body)


def _verification_key(header: Header) -> ec.EllipticCurvePublicKey:
    # The materials' part, done here: the context is authenticated by now, so only a writer that
    # holds the data key can get here with a key that is missing or lies on another curve.
    assert header.suite.curve is not None
    try:
        point = base64.b64decode(header.context["aws-crypto-public-key"])
        return ec.EllipticCurvePublicKey.from_encoded_point(header.suite.curve, point)
    except (KeyError, ValueError) as error:
        raise IntegrityError("no usable verification key") from error
