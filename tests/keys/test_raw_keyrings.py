"""Raw AES and raw RSA keyrings."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from families.keyring import CONTEXT, UNSIGNED, KeyringTests

from streamcrypt.errors import KeyAccessError, WrappedKeyError
from streamcrypt.keys.keyring import RESERVED_PROVIDERS, MultiKeyring
from streamcrypt.keys.raw import RSA_PADDINGS, RawAesKeyring, RawRsaKeyring

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(params=[16, 24, 32], ids=["128 bits", "192 bits", "256 bits"])
def wrapping_key(request) -> bytes:
    return os.urandom(request.param)


class TestRawAes(KeyringTests):
    @pytest.fixture
    def encrypting(self, wrapping_key):
        return RawAesKeyring("namespace", "name", wrapping_key)

    @pytest.fixture
    def decrypting(self, wrapping_key):
        return RawAesKeyring("namespace", "name", wrapping_key)

    def test_one_key_is_one_identity(self, encrypting, decrypting):
        assert encrypting.identity == decrypting.identity

    def test_another_key_of_the_same_name(self, encrypting):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        other = RawAesKeyring("namespace", "name", os.urandom(32))
        with pytest.raises(WrappedKeyError, match="another key of that name"):
            other.unwrap(UNSIGNED, CONTEXT, encrypted)
        assert other.identity != encrypting.identity

    def test_no_key_in_repr(self, encrypting, wrapping_key):
        for shown in (repr(encrypting), repr(encrypting.identity), repr(vars(encrypting))):
            assert repr(wrapping_key)[2:-1] not in shown
            assert wrapping_key.hex() not in shown

    def test_layout(self, encrypting):
        _, (encrypted,) = encrypting.generate(UNSIGNED, CONTEXT)
        assert encrypted.provider_id == "namespace"
        assert encrypted.info[:-12] == b"name" + (128).to_bytes(4, "big") + (12).to_bytes(4, "big")
        assert len(encrypted.ciphertext) == 32 + 16

    def test_info_of_another_shape_is_not_ours(self, encrypting, decrypting):
        _, (encrypted,) = encrypting.generate(UNSIGNED, CONTEXT)
        info = encrypted.info
        shapes = [
            info[:-1],
            info + b"\0",
            b"other" + info[4:],
            info[:4] + (96).to_bytes(4, "big") + info[8:],
            info[:8] + (16).to_bytes(4, "big") + info[12:],
        ]
        for shape in shapes:
            with pytest.raises(KeyAccessError):
                decrypting.unwrap(UNSIGNED, CONTEXT, [encrypted._replace(info=shape)])


@pytest.mark.parametrize("length", [0, 15, 17, 31, 33, 64])
def test_aes_keys_of_other_lengths(length):
    with pytest.raises(ValueError, match="16, 24 or 32"):
        RawAesKeyring("namespace", "name", bytes(length))


@pytest.mark.parametrize("namespace", [*sorted(RESERVED_PROVIDERS), ""])
def test_reserved_namespaces(namespace):
    with pytest.raises(ValueError, match=r"reserved|needs a namespace"):
        RawAesKeyring(namespace, "name", bytes(32))
    with pytest.raises(ValueError, match=r"reserved|needs a namespace"):
        RawRsaKeyring(namespace, "name", private_key=RSA_KEY)


class _RawRsa(KeyringTests):
    padding: str
    binds_context = False

    @pytest.fixture
    def encrypting(self):
        return RawRsaKeyring("namespace", "name", public_key=RSA_KEY.public_key(), padding=self.padding)

    @pytest.fixture
    def decrypting(self):
        return RawRsaKeyring("namespace", "name", private_key=RSA_KEY, padding=self.padding)

    def test_the_public_key_alone_does_not_open(self, encrypting):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        with pytest.raises(KeyAccessError, match="give the private key"):
            encrypting.unwrap(UNSIGNED, CONTEXT, encrypted)

    def test_another_padding(self, encrypting):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        for padding in set(RSA_PADDINGS) - {self.padding, "pkcs1"}:
            other = RawRsaKeyring("namespace", "name", private_key=RSA_KEY, padding=padding)
            with pytest.raises(WrappedKeyError, match="padding"):
                other.unwrap(UNSIGNED, CONTEXT, encrypted)
        assert data_key


class TestRsaOaepSha1(_RawRsa):
    padding = "oaep-sha1"


class TestRsaOaepSha256(_RawRsa):
    padding = "oaep-sha256"


class TestRsaOaepSha384(_RawRsa):
    padding = "oaep-sha384"


class TestRsaOaepSha512(_RawRsa):
    padding = "oaep-sha512"


class TestRsaPkcs1(_RawRsa):
    padding = "pkcs1"
    fails_silently = True

    def test_every_failure_looks_alike(self, encrypting, decrypting):
        """Malformed padding, a data key of a wrong length and a well-formed wrong data key: one outcome."""
        public = RSA_KEY.public_key()
        _, (good,) = encrypting.generate(UNSIGNED, CONTEXT)
        numbers = public.public_numbers()
        size = public.key_size // 8

        def raw(block: bytes) -> bytes:
            return pow(int.from_bytes(block, "big"), numbers.e, numbers.n).to_bytes(size, "big")

        filler = b"\x11" * (size - 3 - 32)
        cases = {
            "no leading zero": raw(b"\x01\x02" + filler + b"\0" + bytes(32)),
            "block type 1": raw(b"\0\x01" + filler + b"\0" + bytes(32)),
            "no separator": raw(b"\0\x02" + b"\x11" * (size - 2)),
            "short padding": raw(b"\0\x02\x11\x11\0" + b"\x22" * (size - 5)),
            "31 bytes": raw(b"\0\x02" + filler + b"\x11\0" + bytes(31)),
            "33 bytes": raw(b"\0\x02" + filler[1:] + b"\0" + bytes(33)),
            "empty": b"",
            "one byte short": good.ciphertext[:-1],
            "zero": bytes(size),
            "beyond the modulus": b"\xff" * size,
        }
        for ciphertext in cases.values():
            wrapped = good._replace(ciphertext=ciphertext)
            answers = {decrypting.unwrap(UNSIGNED, CONTEXT, [wrapped]) for _ in range(2)}
            assert all(len(answer) == 32 for answer in answers)
            # Beside a good wrapped key the outcome is the same: no success that tells them apart.
            _, (beside,) = encrypting.generate(UNSIGNED, CONTEXT)
            assert len(decrypting.unwrap(UNSIGNED, CONTEXT, [wrapped, beside])) == 32
        conforming = good._replace(ciphertext=raw(b"\0\x02" + filler + b"\0" + bytes(32)))
        assert decrypting.unwrap(UNSIGNED, CONTEXT, [conforming]) == bytes(32)
        data_key, (beside,) = encrypting.generate(UNSIGNED, CONTEXT)
        assert decrypting.unwrap(UNSIGNED, CONTEXT, [conforming, beside]) not in (bytes(32), data_key)

    def test_the_same_data_key_wrapped_twice(self, encrypting, decrypting):
        data_key = os.urandom(32)
        twice = [*encrypting.wrap(UNSIGNED, CONTEXT, data_key), *encrypting.wrap(UNSIGNED, CONTEXT, data_key)]
        assert decrypting.unwrap(UNSIGNED, CONTEXT, twice) == data_key

    def test_other_keyrings_are_tried_first(self, encrypting, decrypting):
        aes = RawAesKeyring("aes", "key", bytes(32))
        data_key, (rsa_key, aes_key) = MultiKeyring(encrypting, [aes]).generate(UNSIGNED, CONTEXT)
        bad = rsa_key._replace(ciphertext=bytes(len(rsa_key.ciphertext)))
        opened = MultiKeyring(None, [decrypting, aes]).unwrap(UNSIGNED, CONTEXT, [bad, aes_key])
        assert opened == data_key


def test_small_rsa_keys_are_refused():
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # a key that nobody uses
    with pytest.raises(ValueError, match="at least 2048 bits"):
        RawRsaKeyring("namespace", "name", private_key=small)


def test_unknown_padding():
    with pytest.raises(ValueError, match="oaep-sha512"):
        RawRsaKeyring("namespace", "name", private_key=RSA_KEY, padding="oaep-md5")
