"""From a data key to the content key of one message, and the value that commits to it.

    0014 0046 0078   the data key itself
    01xx 0214 03xx   HKDF, no salt, info = suite id ‖ message id
    0478 0578        HKDF-SHA-512, salt = message id:
                     content key = expand(suite id ‖ "DERIVEKEY"), commitment = expand("COMMITKEY")

Source: RFC 5869; AWS Encryption SDK specification, framework/algorithm-suites.md and
framework/commitment (structures.md#commit-key).  The message id is random, so every message has a
content key of its own: that is what makes frame numbers safe as IVs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from streamcrypt.errors import IntegrityError
from streamcrypt.message.header import Header
from streamcrypt.message.suites import COMMITMENT_LENGTH, AlgorithmSuite
from streamcrypt.tuples import NamedTuple

_CONTENT_LABEL: Final = b"DERIVEKEY"
_COMMITMENT_LABEL: Final = b"COMMITKEY"


class DerivedKeys(NamedTuple):
    """The content key, and for committing suites the commitment (empty for the others)."""

    content_key: bytes
    commitment: bytes

    def __repr__(self) -> str:
        return "<DerivedKeys>"


def derive_keys(suite: AlgorithmSuite, data_key: bytes, message_id: bytes) -> DerivedKeys:
    """The keys of the message with this id; IntegrityError when the data key has a wrong length."""
    if len(data_key) != suite.key_length:
        raise IntegrityError(
            f"the data key has {len(data_key)} bytes; suite {suite.name} takes {suite.key_length}"
        )
    if suite.kdf_hash is None:
        return DerivedKeys(bytes(data_key), b"")  # a plain copy: it goes to workers
    if not suite.committing:
        info = suite.id_bytes + message_id
        return DerivedKeys(HKDF(suite.kdf_hash, suite.key_length, None, info).derive(data_key), b"")
    # Both keys are shorter than the hash, so each is the first block of an expansion: HMAC(PRK, info ‖ 01)
    # (RFC 5869, section 2.3).  From one HMAC object, since setting up two costs a third of the derivation,
    # which every small file pays for (benchmarks/README.md, "the budget of a small file").
    content = HMAC(HKDF.extract(suite.kdf_hash, message_id, data_key), suite.kdf_hash)
    commitment = content.copy()
    content.update(suite.id_bytes + _CONTENT_LABEL + b"\x01")
    commitment.update(_COMMITMENT_LABEL + b"\x01")
    return DerivedKeys(content.finalize()[: suite.key_length], commitment.finalize()[:COMMITMENT_LENGTH])


def derive_for_reading(header: Header, data_key: bytes) -> bytes:
    """The content key of a message that is read.

    The commitment is compared before anything is decrypted with the key: a message that was made
    to open under two data keys ends here.  IntegrityError when it does not hold.
    """
    keys = derive_keys(header.suite, data_key, header.message_id)
    if header.suite.committing and not _bytes_eq()(keys.commitment, header.commitment):
        raise IntegrityError("the message does not commit to this data key")
    return keys.content_key


@cache
def _bytes_eq() -> Callable[[bytes, bytes], bool]:
    # Here, because it imports hashlib and with it a second OpenSSL, which writing has no use for.
    from cryptography.hazmat.primitives.constant_time import bytes_eq

    return bytes_eq
