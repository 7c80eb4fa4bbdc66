"""The footer of a signed message: ECDSA over every byte before it.

    length u16 | DER ECDSA-Sig-Value

The hash runs over header and body in order, so it is the serial part of a signed message; the
digest is signed once.  Source: AWS Encryption SDK specification, data-format/message-footer.md;
the public key travels in the encryption context as Base64 of the compressed SEC 1 point
(framework/default-cmm.md, SEC 1 v2 section 2.3.3).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes

from streamcrypt.errors import FormatError, IntegrityError
from streamcrypt.message.header import Buffer
from streamcrypt.message.suites import AlgorithmSuite

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

# A P-384 signature takes 102 to 104 bytes; writers sign again until it takes 103, so that the size
# of a signed message is known before it is written.  Readers take any length.
SIGNATURE_LENGTH: Final = 103
FOOTER_LENGTH: Final = 2 + SIGNATURE_LENGTH
MAX_FOOTER_LENGTH: Final = 2 + 104

_U16 = struct.Struct(">H")


class Signer:
    """Hashes a message as it is written, then makes its footer."""

    def __init__(self, suite: AlgorithmSuite, signing_key: ec.EllipticCurvePrivateKey) -> None:
        assert suite.signature_hash is not None
        self._algorithm = suite.signature_hash
        self._hash = hashes.Hash(suite.signature_hash)
        self._key = signing_key

    def update(self, data: Buffer) -> None:
        self._hash.update(data)

    def footer(self) -> bytes:
        digest = self._hash.finalize()
        scheme = _ecdsa(self._algorithm)
        while True:
            signature = self._key.sign(digest, scheme)
            if len(signature) == SIGNATURE_LENGTH:
                return _U16.pack(SIGNATURE_LENGTH) + signature


class Verifier:
    """Hashes a message as it is read, then checks its footer."""

    def __init__(self, suite: AlgorithmSuite, verification_key: ec.EllipticCurvePublicKey) -> None:
        assert suite.signature_hash is not None
        self._algorithm = suite.signature_hash
        self._hash = hashes.Hash(suite.signature_hash)
        self._key = verification_key

    def update(self, data: Buffer) -> None:
        self._hash.update(data)

    def verify(self, footer: Buffer) -> None:
        """IntegrityError unless ``footer`` is whole and its signature holds for all that was hashed."""
        signature, length = parse_footer(footer)
        if length != len(footer):
            raise FormatError("bytes follow the message's footer")
        try:
            self._key.verify(signature, self._hash.finalize(), _ecdsa(self._algorithm))
        except InvalidSignature:
            raise IntegrityError("the signature of the message does not hold") from None


def _ecdsa(algorithm: hashes.HashAlgorithm) -> ec.ECDSA:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

    return ec.ECDSA(Prehashed(algorithm))


def parse_footer(buffer: Buffer) -> tuple[bytes, int]:
    """The signature at the start of ``buffer``, and how many bytes the footer takes."""
    if len(buffer) < 2:
        raise FormatError("the footer is missing: the message is truncated")
    (length,) = _U16.unpack_from(buffer, 0)
    if len(buffer) < 2 + length:
        raise FormatError("the footer is cut short: the message is truncated")
    return bytes(buffer[2 : 2 + length]), 2 + length
