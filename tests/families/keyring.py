"""KeyringTests: what every keyring promises.  A test class inherits it and gives two keyrings."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Sequence

import pytest

import streamcrypt.errors as errors
from streamcrypt.keys.keyring import Keyring, MultiKeyring, NoMatchingKeyError
from streamcrypt.keys.raw import RawAesKeyring
from streamcrypt.message.header import EncryptedDataKey
from streamcrypt.message.suites import SIGNED, SUITES, UNSIGNED, AlgorithmSuite

CONTEXT = {
    "Project": "CustomerChurn",
    "naïve": "värde",
    "": "empty name",
    "𝄞": "outside the BMP",
    "ﬀ": "ligature",
}
FOREIGN = [
    EncryptedDataKey("someone-else", b"name", b"x" * 48),
    EncryptedDataKey("someone-else", b"", b""),
    EncryptedDataKey("\x1b[31mred", b"\xff\x00\n", b"?"),
    EncryptedDataKey("aws-kms-hierarchy", b"another-branch", b"x" * 92),
    EncryptedDataKey("raw-ecdh", b"\x01\0\0\0\x21short", b"x" * 96),
]


class KeyringTests:
    """Inherit, and give the fixtures ``encrypting`` and ``decrypting``: keyrings of one key."""

    #: The suites that the keyring serves; KMS RSA refuses signed ones.
    suites: Sequence[AlgorithmSuite] = tuple(SUITES.values())
    binds_context = True
    #: Wrong wrapped keys yield a random data key instead of an error (PKCS#1 v1.5).
    fails_silently = False

    @pytest.fixture
    def encrypting(self) -> Keyring:
        raise NotImplementedError

    @pytest.fixture
    def decrypting(self, encrypting) -> Keyring:
        return encrypting

    def check_refused(self, keyring, suite, context, encrypted, data_key) -> None:
        if self.fails_silently:
            assert keyring.unwrap(suite, context, encrypted) != data_key
            return
        with pytest.raises((errors.WrappedKeyError, errors.KeyAccessError, errors.IntegrityError)):
            keyring.unwrap(suite, context, encrypted)

    def test_generated_keys_open(self, encrypting, decrypting):
        for suite in self.suites:
            data_key, encrypted = encrypting.generate(suite, CONTEXT)
            assert len(data_key) == suite.key_length
            opened = decrypting.unwrap(suite, CONTEXT, encrypted)
            assert opened == data_key
            assert {repr(data_key), repr(opened)} == {
                "<data key>"
            }  # they outlive the call, as variables of frames

    def test_wrapped_keys_open(self, encrypting, decrypting):
        for suite in self.suites:
            data_key = os.urandom(suite.key_length)
            encrypted = encrypting.wrap(suite, CONTEXT, data_key)
            assert len(encrypted) == 1
            assert decrypting.unwrap(suite, CONTEXT, encrypted) == data_key

    def test_data_keys_and_wrapped_keys_are_new_every_time(self, encrypting):
        made = [encrypting.generate(UNSIGNED, {}) for _ in range(5)]
        assert len({data_key for data_key, _ in made}) == 5
        assert len({encrypted for _, (encrypted,) in made}) == 5

    @pytest.mark.parametrize("other", [{}, {**CONTEXT, "Project": "customerchurn"}, {**CONTEXT, "more": ""}])
    def test_another_context_is_refused(self, encrypting, decrypting, other):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        if self.binds_context:
            self.check_refused(decrypting, UNSIGNED, other, encrypted, data_key)
        else:  # then only the header's tag binds it
            assert decrypting.unwrap(UNSIGNED, other, encrypted) == data_key

    def test_the_order_of_the_context_does_not_matter(self, encrypting, decrypting):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        backwards = dict(reversed(CONTEXT.items()))
        assert decrypting.unwrap(UNSIGNED, backwards, encrypted) == data_key

    def test_an_altered_ciphertext_is_refused(self, encrypting, decrypting):
        data_key, (encrypted,) = encrypting.generate(UNSIGNED, CONTEXT)
        blob = encrypted.ciphertext
        step = max(1, len(blob) // 40)
        altered = [blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :] for i in range(0, len(blob), step)]
        altered += [b"", blob[:-1], blob[: len(blob) // 2], blob + b"\0"]
        for ciphertext in altered:
            self.check_refused(
                decrypting, UNSIGNED, CONTEXT, [encrypted._replace(ciphertext=ciphertext)], data_key
            )

    def test_wrapped_keys_of_others_are_skipped(self, encrypting, decrypting):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        assert decrypting.unwrap(UNSIGNED, CONTEXT, [*FOREIGN, *encrypted, *FOREIGN]) == data_key

    def test_only_wrapped_keys_of_others(self, decrypting):
        with pytest.raises(NoMatchingKeyError, match="none of its 5 encrypted data keys") as caught:
            decrypting.unwrap(UNSIGNED, CONTEXT, FOREIGN)
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_damaged_wrapped_key_before_a_good_one(self, encrypting, decrypting):
        data_key, (good,) = encrypting.generate(UNSIGNED, CONTEXT)
        bad = good._replace(ciphertext=good.ciphertext[:-1] + bytes([good.ciphertext[-1] ^ 1]))
        if self.fails_silently:  # all must agree: success would say which of them was well-formed
            assert decrypting.unwrap(UNSIGNED, CONTEXT, [bad, good]) != data_key
        else:
            assert decrypting.unwrap(UNSIGNED, CONTEXT, [bad, good]) == data_key

    def test_a_data_key_of_another_length_is_refused(self, encrypting, decrypting):
        data_key = os.urandom(16)
        encrypted = encrypting.wrap(SUITES[0x0114], CONTEXT, data_key)
        self.check_refused(decrypting, UNSIGNED, CONTEXT, encrypted, data_key)

    def test_beside_another_keyring(self, encrypting, decrypting):
        other = RawAesKeyring("other", "key", os.urandom(32))
        both = MultiKeyring(encrypting, [other])
        data_key, encrypted = both.generate(UNSIGNED, CONTEXT)
        assert len(encrypted) == 2
        for keyring in (decrypting, other, MultiKeyring(None, [other, decrypting])):
            assert keyring.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        bad = encrypted[0]._replace(ciphertext=bytes(len(encrypted[0].ciphertext)))
        either = MultiKeyring(None, [decrypting, other])
        assert either.unwrap(UNSIGNED, CONTEXT, [bad, encrypted[1]]) == data_key

    def test_neither_pickled_nor_copied(self, encrypting, decrypting):
        for keyring in (encrypting, decrypting):
            for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="holds keys"):
                    duplicate(keyring)

    def test_identity_is_hashable_and_its_own(self, encrypting, decrypting):
        stranger = RawAesKeyring("other", "key", os.urandom(32))
        assert hash(encrypting.identity) == hash(encrypting.identity)
        assert encrypting.identity != stranger.identity
        assert decrypting.identity != stranger.identity


__all__ = ["CONTEXT", "FOREIGN", "SIGNED", "UNSIGNED", "KeyringTests"]
