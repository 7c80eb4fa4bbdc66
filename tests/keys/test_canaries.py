"""Key material in no place but memory (RELIABILITY 24).

Whole jobs run with every log at DEBUG, against a KMS over HTTP.  Afterwards the data keys and content keys
of all messages that they made are unwrapped, and looked for, in every encoding that comes to mind, in
whatever the jobs wrote and showed.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key
from families.processes import child_processes
from families.trees import make_tree

import streamcrypt as sc
from streamcrypt.keys.ecdh import KmsEcdhKeyring, RawEcdhKeyring
from streamcrypt.keys.keyring import Keyring
from streamcrypt.keys.kms import KmsKeyring, KmsRsaKeyring
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.raw import RawAesKeyring
from streamcrypt.keys.reference import decrypting_keyring, encrypting_keyring
from streamcrypt.kms import open_service
from streamcrypt.kms.service import Service
from streamcrypt.message.derive import derive_keys
from streamcrypt.message.header import parse_header
from streamcrypt.message.suites import UNSIGNED

REPOSITORY = str(Path(sc.__file__).parents[1])

# Every logger at DEBUG, and worker processes for a job of any size.
MAIN = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from streamcrypt.engine import run
run.processes_pay = lambda files, frames: True
from streamcrypt.cli import main
sys.exit(main())
"""


def forms(secret: bytes) -> Iterator[bytes]:
    """How a secret may look where somebody wrote it down."""
    secret = bytes(secret)  # a data key of ours does not show itself
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield secret.hex(":").encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.b85encode, base64.b32encode):
        yield encode(secret).rstrip(b"=")
    yield repr(secret)[2:-1].encode()
    yield ", ".join(map(str, secret)).encode()
    yield secret.decode("latin-1").encode()
    yield json.dumps(secret.decode("latin-1"))[1:-1].encode()


def found_in(text: bytes, secrets: dict[str, bytes]) -> list[str]:
    return [name for name, secret in secrets.items() if any(form in text for form in forms(secret))]


def test_the_search_finds() -> None:
    secrets = {"one": os.urandom(32), "two": os.urandom(32)}
    for written in (
        str(secrets["one"]),
        secrets["one"].hex(),
        json.dumps(list(secrets["one"])),
        pickle.dumps(secrets["one"]),
    ):
        text = written if isinstance(written, bytes) else written.encode()
        assert found_in(b"before " + text + b" after", secrets) == ["one"]
    assert found_in(base64.b64encode(secrets["two"]), secrets) == ["two"]


def keys_of(message: bytes, materials: Materials) -> dict[bytes, str]:
    """The secrets under which a message was made."""
    header, _ = parse_header(message, max_encrypted_data_keys=None)
    opened = materials.for_decryption(header.suite, header.context, header.encrypted_data_keys)
    content_key = derive_keys(header.suite, opened.data_key, header.message_id).content_key
    return {opened.data_key: "a data key", content_key: "a content key"}


def secrets_of(home: Path, trees: list[Path]) -> dict[str, bytes]:
    """Every secret that the jobs used: of messages, and of the KMS."""
    materials, found = Materials(decrypting_keyring("local:alias/canary")), {}
    for tree in trees:
        for path in filter(Path.is_file, tree.rglob("*")):
            found.update(keys_of(path.read_bytes(), materials))
    store = open_service(home).store
    for key in store.all_keys():
        for material in key.materials:
            found[store.open_material(key, material)] = "key material"
    found[store._root] = "the root key"
    return {f"{what} {number}": secret for number, (secret, what) in enumerate(found.items())}


def watch(process: subprocess.Popen[bytes], temporary: Path, seen: bytearray) -> None:
    """Arguments and environments of a process and its children, and temporary files, while it runs."""
    places: set[bytes] = set()
    while process.poll() is None:
        for pid in (process.pid, *child_processes(process.pid)):
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    places.add(Path(f"/proc/{pid}/{name}").read_bytes())
        for path in temporary.rglob("*"):
            with contextlib.suppress(OSError):
                places.add(path.read_bytes())
        time.sleep(0.01)
    seen += b"\n".join(places)


def test_jobs_show_no_key(home: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "in", {f"d{i % 2}/{i:02}": 3000 for i in range(24)})
    shown = tmp_path / "shown"
    for folder in (tmp_path / "tmp", shown):
        folder.mkdir()
    service = open_service(home)
    service.create_alias(AliasName="alias/canary", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    environment = os.environ | {
        "PYTHONPATH": REPOSITORY,
        "TMPDIR": str(tmp_path / "tmp"),
        "STREAMCRYPT_DEBUG": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    seen = bytearray()

    def start(name: str, *words: object, stdout: Any = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", MAIN, *map(str, words)]
        with (shown / name).open("wb") as file:
            return subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=stdout or file, stderr=file
            )

    server = start("serve", "kms", "serve", "--port", "0", stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        key = f"local:alias/canary@{server.stdout.readline().decode().strip()}"
        many = ("--cache-max-messages", "5", "--workers", "2", "--json")
        jobs: dict[str, tuple[int, tuple[str, ...]]] = {
            "encrypt": (0, ("encrypt", "in", "enc", "--key", key, "--audit", "audit", *many)),
            "rekey": (0, ("rekey", "enc", "again", "--key", key, "--from-key", key, *many)),
            "tampered": (3, ("decrypt", "tampered", "out", "--key", key)),
            "audit": (0, ("kms", "audit", "--json")),
        }
        for name, (code, words) in jobs.items():
            if name == "tampered":
                damaged = bytearray((tmp_path / "enc" / "d0" / "00").read_bytes())
                damaged[-300] ^= 1
                (tmp_path / "tampered").write_bytes(damaged)
            process = start(name, *words)
            watch(process, tmp_path / "tmp", seen)
            assert process.returncode == code, (shown / name).read_text()[-2000:]
    finally:
        server.terminate()
        server.wait(20)
        server.stdout.close()
    for path in shown.iterdir():
        seen += path.read_bytes()
    assert b"DEBUG:botocore" in seen  # the logs were on
    assert b"engine.pool import serve" in seen  # there were worker processes
    assert b"withheld by streamcrypt" in seen
    assert b"Traceback" in seen
    secrets = secrets_of(home, [tmp_path / "enc", tmp_path / "again"])
    assert len(secrets) > 2 * 25 + 2 * 5
    assert not found_in(bytes(seen), secrets)
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        known = found_in(path.read_bytes(), secrets)
        # The root key lies there by intent, with mode 0600; everything else is sealed under it.
        expected = ["the root key"] if path.name == "kms.root" else []
        assert [name.rsplit(" ", 1)[0] for name in known] == expected, path


# ------------------------------------------------------------------------------ what holds a key


def holders(tmp_path: Path, reference: str) -> dict[str, Any]:
    """Everything that a caller of the library may hold and that has a key in it."""
    from streamcrypt.message.frames import FrameCipher
    from streamcrypt.message.suites import SIGNED
    from streamcrypt.streams import OutgoingMessage, ReadingRules, header_template, unlock

    cache = sc.DataKeyCache()
    keyring = encrypting_keyring(reference)
    materials = Materials(keyring, cache=cache)
    writing = materials.for_encryption(SIGNED, {"k": "v"}, 100)
    message = OutgoingMessage.begin(writing, header_template(writing, 4096), 4096)
    (tmp_path / "plain").write_bytes(b"x" * 10_000)
    sc.encrypt(tmp_path / "plain", tmp_path / "message", keys=keyring, cache=cache)
    data = (tmp_path / "message").read_bytes()
    header, _ = parse_header(data, max_encrypted_data_keys=None)
    reading = materials.for_decryption(header.suite, header.context, header.encrypted_data_keys)
    keys = derive_keys(header.suite, reading.data_key, header.message_id)
    return {
        "cache": cache,
        "keyring": keyring,
        "materials": materials,
        "encryption materials": writing,
        "decryption materials": reading,
        "outgoing message": message,
        "unlocked message": unlock(header, materials, ReadingRules()),
        "derived keys": keys,
        "cipher": FrameCipher(keys.content_key, header.message_id),
        "file": sc.open(tmp_path / "message", keys=keyring),
        "file that is written": sc.open(tmp_path / "written", "wb", keys=keyring),
        "store": open_service().store,
        "service": open_service(),
    }


def secrets_held(made: dict[str, Any]) -> dict[str, bytes]:
    return {
        "data key written": made["encryption materials"].data_key,
        "data key read": made["decryption materials"].data_key,
        "content key written": made["outgoing message"].content_key,
        "content key read": made["derived keys"].content_key,
        "root key": made["store"]._root,
    }


# Tuples by which keys go to a worker through its own pipe: they may be pickled, and are never shown.
SENT = {"outgoing message", "unlocked message", "derived keys"}


def test_nothing_shows_its_key_and_what_is_public_is_not_pickled(home: Path, tmp_path: Path) -> None:
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    made = holders(tmp_path, f"local:{arn.rpartition('/')[2]}")
    secrets = secrets_held(made)
    try:
        for name, thing in made.items():
            shown = "\n".join((repr(thing), str(thing), f"{thing}", f"{[thing]!r}", ascii({"a": thing})))
            assert not found_in(shown.encode(), secrets), name
            if name in SENT:
                continue
            for duplicate in (pickle.dumps, copy.deepcopy):
                with pytest.raises(TypeError):
                    duplicate(thing)
    finally:
        made["file"].close()
        made["file that is written"].close()


def shown_with_locals(error: BaseException) -> bytes:
    """A traceback as error trackers make it: with the variables of every frame, causes and contexts too.

    Without the frames of this test, which does know the keys.
    """
    step = error.__traceback__
    while step is not None and step.tb_frame.f_code.co_filename == __file__:
        step = step.tb_next
    error.__traceback__ = step
    text = io.StringIO()
    traceback.TracebackException.from_exception(error, capture_locals=True).print(file=text)
    return text.getvalue().encode()


class Recorder:
    """A KMS that remembers the data keys which it gave out."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.given: list[bytes] = []

    def generate_data_key(self, **request: Any) -> dict[str, Any]:
        response: dict[str, Any] = self._service.generate_data_key(**request)
        self.given.append(response["Plaintext"])
        return response

    def encrypt(self, **request: Any) -> dict[str, Any]:
        response: dict[str, Any] = self._service.encrypt(**request)
        return response

    def decrypt(self, **request: Any) -> dict[str, Any]:
        response: dict[str, Any] = self._service.decrypt(**request)
        self.given.append(response["Plaintext"])
        return response


class Failing(NamedTuple):
    """What a failure is made with."""

    message: bytes
    keyring: Keyring
    recorder: Recorder
    url: str
    folder: Path


def fail_on_a_frame(given: Failing) -> None:
    sc.decrypt_bytes(given.message[:-20] + bytes(20), keys=given.keyring)


def fail_on_the_header(given: Failing) -> None:
    header, _ = parse_header(given.message, max_encrypted_data_keys=None)
    damaged = bytearray(given.message)
    damaged[header.length - 1] ^= 1
    sc.decrypt_bytes(bytes(damaged), keys=given.keyring)


def fail_on_the_commitment(given: Failing) -> None:
    header, _ = parse_header(given.message, max_encrypted_data_keys=None)
    damaged = bytearray(given.message)
    damaged[header.length - 20] ^= 1
    sc.decrypt_bytes(bytes(damaged), keys=given.keyring)


def fail_in_a_job(given: Failing) -> None:
    (given.folder / "damaged").write_bytes(given.message[:-20] + bytes(20))
    sc.decrypt(given.folder / "damaged", given.folder / "out", keys=given.keyring)


def fail_in_a_file(given: Failing) -> None:
    (given.folder / "damaged").write_bytes(given.message[:-30] + bytes(30))
    with sc.open(given.folder / "damaged", keys=given.keyring) as file:
        file.read()


def fail_to_write(given: Failing) -> None:
    (given.folder / "in").mkdir()
    (given.folder / "in" / "a").write_bytes(b"x")
    (given.folder / "enc").mkdir()
    (given.folder / "enc" / "a").write_bytes(b"somebody else's")
    sc.encrypt(given.folder / "in", given.folder / "enc", keys=given.keyring, resume=True)


def fail_by_the_limit_of_wrapped_keys(given: Failing) -> None:
    sc.encrypt_bytes(b"x", keys=[given.keyring, given.keyring], max_encrypted_data_keys=1)


def fail_in_another_key(given: Failing) -> None:
    absent = KmsKeyring(given.recorder, "alias/absent")
    sc.encrypt_bytes(b"x", keys=[given.keyring, absent])


def fail_in_a_key_far_away(given: Failing) -> None:
    """botocore's frames hold the body of the request, and in it the data key that was to be wrapped."""
    sc.encrypt_bytes(b"x", keys=[given.keyring, encrypting_keyring(f"local:alias/absent@{given.url}")])


FAILURES: dict[str, Callable[[Failing], None]] = {
    "a frame": fail_on_a_frame,
    "the header": fail_on_the_header,
    "the commitment": fail_on_the_commitment,
    "a job": fail_in_a_job,
    "a file": fail_in_a_file,
    "writing": fail_to_write,
    "too many wrapped keys": fail_by_the_limit_of_wrapped_keys,
    "another key": fail_in_another_key,
    "a key far away": fail_in_a_key_far_away,
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_no_key_among_the_variables_of_a_traceback(
    home: Path, served: str, tmp_path: Path, fail: Callable[[Failing], None]
) -> None:
    service = open_service(home)
    recorder = Recorder(service)
    keyring = KmsKeyring(recorder, service.create_key()["KeyMetadata"]["Arn"])
    message = sc.encrypt_bytes(b"x" * 5000, keys=keyring, frame_size=1000)
    with pytest.raises(sc.StreamcryptError) as caught:
        fail(Failing(message, keyring, recorder, served, tmp_path))
    secrets = dict(keys_of(message, Materials(keyring)))
    secrets |= dict.fromkeys(recorder.given, "a data key") | {service.store._root: "the root key"}
    named = {f"{what} {number}": secret for number, (secret, what) in enumerate(secrets.items())}
    assert not found_in(shown_with_locals(caught.value), named)


class Liar:
    """A KMS that answers for another key than the one it was asked for."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Callable[..., dict[str, Any]]:
        ask = getattr(self._recorder, name)
        return lambda **request: ask(**request) | {"KeyId": "arn:aws:kms:local:000000000000:key/other"}


def agreed(service: Service) -> tuple[list[Keyring], dict[bytes, str]]:
    """ECDH keyrings, with a private key at hand and with one in the KMS, and the secrets that they agree on."""
    own, peer = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    made = service.create_key(KeySpec="ECC_NIST_P384", KeyUsage="KEY_AGREEMENT")["KeyMetadata"]["Arn"]
    public = load_der_public_key(service.get_public_key(KeyId=made)["PublicKey"])
    assert isinstance(public, ec.EllipticCurvePublicKey)
    secrets = {
        own.exchange(ec.ECDH(), peer.public_key()): "a shared secret",
        own.exchange(ec.ECDH(), public): "a shared secret of KMS",
    }
    keyrings = [RawEcdhKeyring(own, peer.public_key()), KmsEcdhKeyring(service, made, own.public_key())]
    return keyrings, secrets


@pytest.mark.parametrize(
    "kind", ["ecdh", "kms-ecdh", "kms-rsa", "raw-aes", "refused answer", "refused data key"]
)
def test_no_key_of_a_keyring_among_the_variables_of_a_traceback(home: Path, kind: str) -> None:
    service = open_service(home)
    recorder = Recorder(service)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    secrets: dict[bytes, str] = {}
    opening: Keyring | None = None
    if "ecdh" in kind:
        (raw, far), agreements = agreed(service)
        keyring, secrets = (raw if kind == "ecdh" else far), agreements
    elif kind == "kms-rsa":
        rsa = service.create_key(KeySpec="RSA_2048", KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["Arn"]
        keyring = KmsRsaKeyring(rsa, client=service)
    elif kind == "raw-aes":
        keyring = RawAesKeyring("space", "name", os.urandom(32))
    elif kind == "refused answer":
        keyring, opening = KmsKeyring(recorder, arn), KmsKeyring(Liar(recorder), arn)
    else:
        keyring = KmsKeyring(Liar(recorder), arn)
    data_key, context = os.urandom(32), {"k": "v"}
    if kind == "refused data key":
        with pytest.raises(sc.StreamcryptError) as caught:
            Materials(keyring).for_encryption(UNSIGNED, context, 1)
    else:
        wrapped = keyring.wrap(UNSIGNED, context, data_key)
        asked = context if opening is not None else {"k": "another"}
        with pytest.raises(sc.StreamcryptError) as caught:
            Materials(opening or keyring).for_decryption(UNSIGNED, asked, wrapped)
    secrets |= dict.fromkeys([data_key, *recorder.given], "a data key")
    named = {f"{what} {number}": secret for number, (secret, what) in enumerate(secrets.items())}
    assert not found_in(shown_with_locals(caught.value), named)
