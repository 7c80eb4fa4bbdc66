"""Algorithm suites: which key length, derivation, commitment and signature a message uses.

Source: AWS Encryption SDK specification, framework/algorithm-suites.md.  Every length of the
format that depends on the suite is read from this one table.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes

from streamcrypt.errors import FormatError, IntegrityError
from streamcrypt.tuples import NamedTuple

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

IV_LENGTH: Final = 12
TAG_LENGTH: Final = 16
COMMITMENT_LENGTH: Final = 32

# The format allows 2^32 - 1 frames; 2^31 - 1 bytes is the longest frame that every official reader
# opens (aws-encryption-sdk for Python refuses longer ones), so that is the longest we write.
MAX_FRAMES: Final = 2**32 - 1
MAX_WRITTEN_FRAME_LENGTH: Final = 2**31 - 1
# NIST SP 800-38D, section 5.2.1.1: the longest plaintext of one GCM invocation.
MAX_UNFRAMED_LENGTH: Final = 2**36 - 32


class AlgorithmSuite(NamedTuple):
    """One row of the table.  Lengths are in bytes."""

    id: int
    version: int
    key_length: int
    kdf_hash: hashes.HashAlgorithm | None
    committing: bool = False
    curve_name: str | None = None
    signature_hash: hashes.HashAlgorithm | None = None

    @property
    def curve(self) -> ec.EllipticCurve | None:
        """The curve of the signature; imported here, because most messages are not signed."""
        if self.curve_name is None:
            return None
        from cryptography.hazmat.primitives.asymmetric import ec

        return ec.SECP256R1() if self.curve_name == "secp256r1" else ec.SECP384R1()

    @property
    def id_bytes(self) -> bytes:
        return self.id.to_bytes(2, "big")

    @property
    def message_id_length(self) -> int:
        return 16 if self.version == 1 else 32

    @property
    def signed(self) -> bool:
        return self.curve_name is not None

    @property
    def name(self) -> str:
        return f"0x{self.id:04x}"

    def __repr__(self) -> str:
        return f"<AlgorithmSuite {self.name}>"

    def __reduce__(self) -> tuple[object, ...]:  # hash and curve objects need not travel
        return suite_by_id, (self.id,)


_SHA256, _SHA384, _SHA512 = hashes.SHA256(), hashes.SHA384(), hashes.SHA512()

SUITES: Final[dict[int, AlgorithmSuite]] = {
    suite.id: suite
    for suite in (
        AlgorithmSuite(0x0014, 1, 16, None),
        AlgorithmSuite(0x0046, 1, 24, None),
        AlgorithmSuite(0x0078, 1, 32, None),
        AlgorithmSuite(0x0114, 1, 16, _SHA256),
        AlgorithmSuite(0x0146, 1, 24, _SHA256),
        AlgorithmSuite(0x0178, 1, 32, _SHA256),
        AlgorithmSuite(0x0214, 1, 16, _SHA256, False, "secp256r1", _SHA256),
        AlgorithmSuite(0x0346, 1, 24, _SHA384, False, "secp384r1", _SHA384),
        AlgorithmSuite(0x0378, 1, 32, _SHA384, False, "secp384r1", _SHA384),
        AlgorithmSuite(0x0478, 2, 32, _SHA512, True),
        AlgorithmSuite(0x0578, 2, 32, _SHA512, True, "secp384r1", _SHA384),
    )
}
UNSIGNED: Final = SUITES[0x0478]
SIGNED: Final = SUITES[0x0578]


def suite_by_id(suite_id: int) -> AlgorithmSuite:
    """The suite with this id; FormatError for the reserved 0x0000 and for unknown ones."""
    suite = SUITES.get(suite_id)
    if suite is None:
        raise FormatError(f"unknown algorithm suite 0x{suite_id:04x}")
    return suite


class CommitmentPolicy(enum.Enum):
    """Whether messages must commit to their data key (specification, client-apis/client.md#commitment-policy).

    We never write a suite that does not commit, so there is no policy that would.
    """

    REQUIRE_ENCRYPT_REQUIRE_DECRYPT = "require-encrypt-require-decrypt"
    REQUIRE_ENCRYPT_ALLOW_DECRYPT = "require-encrypt-allow-decrypt"

    def check_reading(self, suite: AlgorithmSuite) -> None:
        """Refuse a suite that this policy does not let us read; before any key is asked for."""
        if self is CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT and not suite.committing:
            raise IntegrityError(
                f"algorithm suite {suite.name} does not commit to its data key and the commitment policy "
                "requires that; if you trust where the message comes from, "
                "allow it with commitment policy require-encrypt-allow-decrypt"
            )
