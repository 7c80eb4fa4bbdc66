"""Raw ECDH keyrings: static, ephemeral, discovery.  KMS ECDH is in test_kms_keyrings.py."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from families.keyring import CONTEXT, UNSIGNED, KeyringTests

from streamcrypt.errors import KeyAccessError, WrappedKeyError
from streamcrypt.keys.ecdh import EphemeralEcdhKeyring, RawEcdhKeyring
from streamcrypt.keys.keyring import NoMatchingKeyError

CURVES = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]


@pytest.fixture(params=CURVES, ids=lambda curve: curve.name)
def curve(request):
    return request.param


@pytest.fixture
def sender(curve):
    return ec.generate_private_key(curve)


@pytest.fixture
def recipient(curve):
    return ec.generate_private_key(curve)


class TestStatic(KeyringTests):
    @pytest.fixture
    def encrypting(self, sender, recipient):
        return RawEcdhKeyring(sender, recipient.public_key())

    @pytest.fixture
    def decrypting(self, sender, recipient):
        return RawEcdhKeyring(recipient, sender.public_key())

    def test_both_parties_open_and_strangers_do_not(self, curve, sender, recipient, encrypting):
        data_key, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        for keyring in (encrypting, RawEcdhKeyring(recipient)):
            assert keyring.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
        third = ec.generate_private_key(curve)
        for stranger in (
            RawEcdhKeyring(sender),
            RawEcdhKeyring(third),
            RawEcdhKeyring(third, sender.public_key()),
            RawEcdhKeyring(recipient, third.public_key()),
        ):
            with pytest.raises(NoMatchingKeyError):
                stranger.unwrap(UNSIGNED, CONTEXT, encrypted)

    def test_either_provider_id_is_accepted(self, encrypting, decrypting):
        data_key, (encrypted,) = encrypting.generate(UNSIGNED, CONTEXT)
        assert encrypted.provider_id == "raw-ecdh"
        kms_wrote = encrypted._replace(provider_id="aws-kms-ecdh")
        assert decrypting.unwrap(UNSIGNED, CONTEXT, [kms_wrote]) == data_key

    def test_no_private_key_is_shown(self, sender, encrypting):
        secret = sender.private_numbers().private_value
        for shown in (repr(encrypting), repr(encrypting.identity)):
            assert str(secret) not in shown
            assert f"{secret:x}" not in shown


class TestEphemeral(KeyringTests):
    @pytest.fixture
    def encrypting(self, recipient):
        return EphemeralEcdhKeyring(recipient.public_key())

    @pytest.fixture
    def decrypting(self, recipient):
        return RawEcdhKeyring(recipient)

    def test_it_does_not_open_its_own(self, encrypting):
        _, encrypted = encrypting.generate(UNSIGNED, CONTEXT)
        with pytest.raises(KeyAccessError):
            encrypting.unwrap(UNSIGNED, CONTEXT, encrypted)

    def test_a_new_sender_for_every_data_key(self, encrypting):
        infos = {encrypting.generate(UNSIGNED, CONTEXT)[1][0].info for _ in range(4)}
        assert len(infos) == 4


def test_discovery_does_not_encrypt(recipient):
    with pytest.raises(KeyAccessError, match="recipient's public key"):
        RawEcdhKeyring(recipient).generate(UNSIGNED, CONTEXT)


def test_a_sender_point_off_the_curve_is_refused(curve, sender, recipient):
    """An invalid-curve point must not meet the private key."""
    _, (encrypted,) = RawEcdhKeyring(sender, recipient.public_key()).generate(UNSIGNED, CONTEXT)
    length = 1 + (curve.key_size + 7) // 8
    off = 0
    for x in range(2, 12):
        point = b"\x02" + x.to_bytes(length - 1, "big")
        altered = encrypted._replace(info=encrypted.info[:-length] + point)
        with pytest.raises(WrappedKeyError) as caught:
            RawEcdhKeyring(recipient).unwrap(UNSIGNED, CONTEXT, [altered])
        off += "not on" in str(caught.value)
    assert off > 0


def test_malformed_infos_are_not_ours(sender, recipient):
    data_key, (encrypted,) = RawEcdhKeyring(sender, recipient.public_key()).generate(UNSIGNED, CONTEXT)
    info = encrypted.info
    forms = [b"", b"\x01", b"\x02" + info[1:], info[:-1], info + b"\0", info[:1] + b"\xff" * 4 + info[5:]]
    for form in forms:
        with pytest.raises(NoMatchingKeyError):
            RawEcdhKeyring(recipient).unwrap(UNSIGNED, CONTEXT, [encrypted._replace(info=form)])
    assert data_key


def test_two_curves_do_not_agree():
    with pytest.raises(ValueError, match="secp256r1"):
        RawEcdhKeyring(ec.generate_private_key(CURVES[0]), ec.generate_private_key(CURVES[1]).public_key())


def test_other_curves():
    with pytest.raises(ValueError, match="P-256, P-384 or P-521"):
        RawEcdhKeyring(ec.generate_private_key(ec.SECP256K1()))
