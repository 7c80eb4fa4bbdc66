"""The store: root keys that are wrong, missing or copied; kills; two processes; fork; backups."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from families.kms import FakeClock
from hypothesis import given
from hypothesis import strategies as st

from streamcrypt.errors import DestinationError, KeyAccessError, SourceError, StreamcryptError
from streamcrypt.keys.reference import branch_key_store
from streamcrypt.kms import KmsError, Service, material, open_service, rootkey
from streamcrypt.kms.backup import restore_backup, write_backup
from streamcrypt.kms.store import Store

PASSPHRASE = b"correct horse battery staple"


def make(home: Path, **options: object) -> Service:
    return Service(Store(home, **options))  # type: ignore[arg-type]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Service]:
    service = make(tmp_path / "home")
    yield service
    service.close()


def test_private_files(kept: Service):
    folder = kept.store.folder
    kept.create_key()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


@pytest.mark.parametrize("name", ["kms", "kms/kms.sqlite", "kms/kms.root"])
def test_files_that_others_may_read_are_refused(tmp_path: Path, name: str):
    make(tmp_path).close()
    (tmp_path / name).chmod(0o755)
    with pytest.raises(KeyAccessError, match="other users may read it"):
        make(tmp_path)


def test_keys_outlive_the_process(tmp_path: Path):
    service = make(tmp_path)
    key = service.create_key()["KeyMetadata"]["KeyId"]
    blob = service.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    service.close()
    again = make(tmp_path)
    assert again.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"
    again.close()


# -- the root key: never a fresh empty store ------------------------------------------------------


def damage_missing(folder: Path) -> None:
    (folder / "kms.root").unlink()


def damage_copied(folder: Path) -> None:
    other = folder.parent.parent / "other"
    make(other).close()
    shutil.copy(other / "kms" / "kms.root", folder / "kms.root")


def damage_changed(folder: Path) -> None:
    path = folder / "kms.root"
    document = json.loads(path.read_text())
    document["key"] = rootkey._text(bytes(32))
    path.write_text(json.dumps(document))


def damage_nonsense(folder: Path) -> None:
    (folder / "kms.root").write_text("nonsense")


def damage_no_database(folder: Path) -> None:
    for path in folder.glob("kms.sqlite*"):
        path.unlink()


def damage_empty_database(folder: Path) -> None:
    damage_no_database(folder)
    descriptor = os.open(folder / "kms.sqlite", os.O_CREAT | os.O_WRONLY, 0o600)
    os.close(descriptor)


DAMAGES = {
    "root key missing": (damage_missing, "the root key of this KMS is missing"),
    "root key of another store": (damage_copied, "belongs to another KMS"),
    "root key changed": (damage_changed, "not the root key of this database"),
    "root key overwritten": (damage_nonsense, "not a root key"),
    "database missing": (damage_no_database, "the database is missing"),
    "database emptied": (damage_empty_database, "the database is empty"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_root_key_is_an_error(tmp_path: Path, damage, words):
    service = make(tmp_path / "home")
    service.create_key()
    service.close()
    damage(tmp_path / "home" / "kms")
    for _ in range(2):  # and stays one: the first failure has repaired nothing
        with pytest.raises(KeyAccessError, match=words):
            make(tmp_path / "home")


def test_a_database_that_is_none(tmp_path: Path):
    make(tmp_path).close()
    (tmp_path / "kms" / "kms.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(StreamcryptError, match=r"kms\.sqlite"):
        make(tmp_path)


def test_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    service = make(tmp_path, root_key="passphrase", passphrase=lambda: PASSPHRASE)
    key = service.create_key()["KeyMetadata"]["KeyId"]
    service.close()
    assert "key" not in json.loads((tmp_path / "kms" / "kms.root").read_text())
    monkeypatch.delenv("STREAMCRYPT_PASSPHRASE_FILE", raising=False)
    with pytest.raises(KeyAccessError, match="STREAMCRYPT_PASSPHRASE_FILE"):
        make(tmp_path)
    with pytest.raises(KeyAccessError, match="the passphrase is wrong"):
        make(tmp_path, passphrase=lambda: b"wrong")
    file = tmp_path / "passphrase"
    file.write_bytes(PASSPHRASE + b"\n")
    monkeypatch.setenv("STREAMCRYPT_PASSPHRASE_FILE", str(file))
    again = make(tmp_path)
    assert again.describe_key(KeyId=key)["KeyMetadata"]["KeyId"] == key
    again.close()


def test_keystore(tmp_path: Path):
    keyring = pytest.importorskip("keyring", reason="keyring IS MISSING: the keystore is not tested")
    from keyring.backend import KeyringBackend

    class InMemory(KeyringBackend):
        priority = 1

        def __init__(self) -> None:
            self.entries: dict[tuple[str, str], str] = {}

        def get_password(self, service, username):
            return self.entries.get((service, username))

        def set_password(self, service, username, password):
            self.entries[service, username] = password

        def delete_password(self, service, username):
            del self.entries[service, username]

    before, backend = keyring.get_keyring(), InMemory()
    keyring.set_keyring(backend)
    try:
        make(tmp_path, root_key="keystore").close()
        make(tmp_path).close()
        backend.entries.clear()
        with pytest.raises(KeyAccessError, match="keystore has no entry"):
            make(tmp_path)
    finally:
        keyring.set_keyring(before)


def test_material_that_was_altered(kept: Service):
    key = kept.create_key()["KeyMetadata"]["KeyId"]
    kept.close()
    database = sqlite3.connect(kept.store.path)
    database.execute("UPDATE materials SET sealed = zeroblob(60)")
    database.commit()
    database.close()
    again = make(kept.store.folder.parent)
    with pytest.raises(KeyAccessError, match="was altered"):
        again.encrypt(KeyId=key, Plaintext=b"x")
    again.close()


def test_material_is_bound_to_its_key(kept: Service):
    """A row of one key under the name of another does not open."""
    one, two = (kept.create_key()["KeyMetadata"]["KeyId"] for _ in range(2))
    kept.close()
    database = sqlite3.connect(kept.store.path)
    database.execute("DELETE FROM materials WHERE key = ?", (two,))
    database.execute("UPDATE materials SET key = ? WHERE key = ?", (two, one))
    database.commit()
    database.close()
    again = make(kept.store.folder.parent)
    with pytest.raises(KeyAccessError, match="was altered"):
        again.encrypt(KeyId=two, Plaintext=b"x")
    again.close()


# -- processes ------------------------------------------------------------------------------------


CREATE_KEYS = """
import sys
from streamcrypt.kms import open_service
service = open_service(sys.argv[1])
print("open", flush=True)
while True:
    key = service.create_key()["KeyMetadata"]["KeyId"]
    blob = service.encrypt(KeyId=key, Plaintext=key.encode())["CiphertextBlob"]
    print(key, blob.hex(), flush=True)
"""


def _start(home: Path) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", CREATE_KEYS, str(home)], stdout=subprocess.PIPE, text=True, env=environment
    )


def _kill_after(process: subprocess.Popen[str], keys: int, wait_ms: int) -> list[tuple[str, str]]:
    """What the process had returned when it was killed, a little after its ``keys``-th key."""
    assert process.stdout is not None
    returned = []
    for line in process.stdout:
        if line.strip() == "open":
            if keys == 0:
                break
            continue
        returned.append(line)
        if len(returned) == keys:
            break
    # Not a wait for an event: the moment of the kill is the point.
    threading.Event().wait(wait_ms / 1000)
    process.send_signal(signal.SIGKILL)
    returned += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    whole = [line.split() for line in returned if line.endswith("\n")]
    return [(words[0], words[1]) for words in whole if len(words) == 2]


def _kill_loop(home: Path, rounds: int) -> None:
    returned: list[tuple[str, str]] = []
    for number in range(rounds):
        returned += _kill_after(_start(home), keys=number % 4, wait_ms=(number * 7) % 40)
        service = make(home)
        assert service.store.query("PRAGMA integrity_check")[0][0] == "ok"
        for key, blob in returned:
            assert service.decrypt(CiphertextBlob=bytes.fromhex(blob))["Plaintext"] == key.encode()
        service.close()
    assert returned


def test_a_returned_key_survives_sigkill(tmp_path: Path):
    _kill_loop(tmp_path, 20)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_a_returned_key_survives_a_thousand_sigkills(tmp_path: Path):
    _kill_loop(tmp_path, 1000)


def test_two_processes_on_one_store(tmp_path: Path):
    home = tmp_path / "home"
    workers = [_start(home) for _ in range(2)]
    service = None
    returned: list[tuple[str, str]] = []
    for worker in workers:
        returned += _kill_after(worker, keys=5, wait_ms=0)
    service = make(home)
    assert len({key for key, _ in returned}) == len(returned) >= 10
    for key, blob in returned:
        assert service.decrypt(CiphertextBlob=bytes.fromhex(blob))["Plaintext"] == key.encode()
    service.close()


def test_another_process_sees_a_change_at_once(tmp_path: Path):
    one, two = make(tmp_path), make(tmp_path)
    key = one.create_key()["KeyMetadata"]["KeyId"]
    assert two.encrypt(KeyId=key, Plaintext=b"x")
    one.disable_key(KeyId=key)
    with pytest.raises(KmsError, match="is disabled"):
        two.encrypt(KeyId=key, Plaintext=b"x")
    two.enable_key(KeyId=key)
    assert one.encrypt(KeyId=key, Plaintext=b"x")
    # What was tried on yesterday's knowledge has left no row: one for each call, and each as it was answered.
    rows = one.store.query("SELECT operation, error FROM audit ORDER BY id")
    assert rows == [
        ("CreateKey", None), ("Encrypt", None), ("DisableKey", None), ("Encrypt", "DisabledException"),
        ("EnableKey", None), ("Encrypt", None),
    ]  # fmt: skip
    one.close()
    two.close()


def test_a_neighbour_that_always_changes_keys_delays_nobody(tmp_path: Path):
    one, two = make(tmp_path), make(tmp_path)
    key = one.create_key()["KeyMetadata"]["KeyId"]
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            two.update_key_description(KeyId=key, Description="another")

    neighbour = threading.Thread(target=change)
    neighbour.start()
    try:
        for _ in range(300):
            assert one.encrypt(KeyId=key, Plaintext=b"x")["KeyId"].endswith(key)
    finally:
        ended.set()
        neighbour.join()
    assert one.store.query("SELECT COUNT(*), COUNT(error) FROM audit WHERE operation = 'Encrypt'") == [
        (300, 0)
    ]
    one.close()
    two.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_opens_its_own_connection(kept: Service):
    key = kept.create_key()["KeyMetadata"]["KeyId"]
    before = kept.store._connection
    child = os.fork()
    if child == 0:
        try:
            blob = kept.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
            own = kept.store._connection is not before
            os._exit(0 if own and kept.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept.store._connection is before
    assert kept.encrypt(KeyId=key, Plaintext=b"x")


def test_many_threads(kept: Service):
    key = kept.create_key()["KeyMetadata"]["KeyId"]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(25):
                made = kept.generate_data_key(KeyId=key, KeySpec="AES_256")
                assert kept.decrypt(CiphertextBlob=made["CiphertextBlob"])["Plaintext"] == made["Plaintext"]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert kept.store.query("SELECT COUNT(*) FROM audit WHERE operation = 'GenerateDataKey'") == [(200,)]


def test_open_service_is_one_a_home(tmp_path: Path):
    assert open_service(tmp_path) is open_service(str(tmp_path))
    with pytest.raises(StreamcryptError, match="no embedded KMS here"):
        open_service(tmp_path / "none", create=False)


def test_an_interrupted_creation_is_finished(tmp_path: Path):
    """A crash between the commit and the root key's final name."""
    service = make(tmp_path)
    service.close()
    folder = tmp_path / "kms"
    (folder / "kms.root").rename(folder / "kms.root.new")
    make(tmp_path).close()
    assert (folder / "kms.root").exists()
    assert not (folder / "kms.root.new").exists()


def test_a_store_that_fails_is_a_fault_of_the_service(kept: Service):
    key = kept.create_key()["KeyMetadata"]["KeyId"]
    kept.store.query("ALTER TABLE audit RENAME TO elsewhere")
    for call in (lambda: kept.encrypt(KeyId=key, Plaintext=b"x"), kept.create_key):
        with pytest.raises(KmsError, match="The key store failed") as caught:
            call()
        assert (caught.value.code, caught.value.status) == ("KMSInternalException", 500)


def test_a_failed_change_leaves_nothing(kept: Service):
    before = kept.list_keys()["Keys"]
    with pytest.raises(KmsError):
        kept.create_key(Policy="{}")
    assert kept.list_keys()["Keys"] == before


# -- backup -----------------------------------------------------------------------------------------


def test_backup_and_restore(kept: Service, tmp_path: Path):
    key = kept.create_key()["KeyMetadata"]["KeyId"]
    blob = kept.encrypt(KeyId=key, Plaintext=b"x")["CiphertextBlob"]
    assert not kept.store.backed_up
    file = tmp_path / "backup"
    write_backup(kept.store, file, passphrase=lambda: PASSPHRASE)
    assert kept.store.backed_up
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(KeyAccessError, match="the passphrase is wrong"):
        restore_backup(file, tmp_path / "new", passphrase=lambda: b"wrong")
    assert not (tmp_path / "new" / "kms").exists()
    restore_backup(file, tmp_path / "new", passphrase=lambda: PASSPHRASE)
    restored = make(tmp_path / "new")
    assert restored.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"
    restored.close()
    with pytest.raises(DestinationError):
        restore_backup(file, tmp_path / "new", passphrase=lambda: PASSPHRASE)
    with pytest.raises(DestinationError):
        write_backup(kept.store, file, passphrase=lambda: PASSPHRASE)


def test_a_backup_holds_the_branch_keys(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    branch_keys = branch_key_store("local", kms_key_arn=arn)
    branch_keys.create("tenant-a", {"tenant": "a"})
    branch_keys.rotate("tenant-a")
    active = branch_keys.active("tenant-a")
    file = tmp_path / "backup"
    write_backup(service.store, file, passphrase=lambda: PASSPHRASE)
    assert active.key not in file.read_bytes()
    restore_backup(file, tmp_path / "new", passphrase=lambda: PASSPHRASE)
    restored = tmp_path / "new" / "kms" / "branch-keys.sqlite3"
    assert stat.S_IMODE(restored.stat().st_mode) == 0o600
    monkeypatch.setenv("STREAMCRYPT_HOME", str(tmp_path / "new"))
    again = branch_key_store("local")
    assert again.active("tenant-a").key == active.key
    assert [facts.context for facts in again.facts("tenant-a")] == [{"tenant": "a"}] * 2
    database = sqlite3.connect(tmp_path / "new" / "kms" / "kms.sqlite")
    names = {name for (name,) in database.execute("SELECT name FROM meta")}
    database.close()
    assert not {"root", "branch_keys"} & names


def test_what_is_no_backup(kept: Service, tmp_path: Path):
    (tmp_path / "text").write_text("nonsense " * 1000)
    with pytest.raises(SourceError, match="not a backup"):
        restore_backup(tmp_path / "text", tmp_path / "new", passphrase=lambda: PASSPHRASE)
    kept.close()
    with pytest.raises(SourceError, match="not a backup"):
        restore_backup(kept.store.path, tmp_path / "new", passphrase=lambda: PASSPHRASE)


# -- hygiene ------------------------------------------------------------------------------------------


def test_no_key_material_in_the_files(tmp_path: Path):
    service = make(tmp_path, root_key="passphrase", passphrase=lambda: PASSPHRASE)
    key = service.create_key()["KeyMetadata"]["KeyId"]
    made = service.generate_data_key(KeyId=key, KeySpec="AES_256")
    service.encrypt(KeyId=key, Plaintext=b"a canary in the mine")
    record = service.store.key("000000000000", "local", key)
    assert record is not None
    secret = service.store.open_material(record, record.materials[0])
    held = b"".join(path.read_bytes() for path in (tmp_path / "kms").iterdir())
    for needle in (secret, made["Plaintext"], b"a canary in the mine", PASSPHRASE):
        assert needle not in held
    service.close()


def test_nothing_that_holds_a_key_is_pickled_or_shown(kept: Service):
    key = kept.create_key()["KeyMetadata"]["KeyId"]
    record = kept.store.key("000000000000", "local", key)
    assert record is not None
    secret = kept.store.open_material(record, record.materials[0])
    for thing in (kept, kept.store):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    shown = repr(kept) + repr(kept.store) + repr(record)
    assert repr(secret) not in shown
    assert repr(record.materials[0].sealed) not in shown


# -- ciphertext blobs --------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4))
def test_one_encoding_for_one_context(context: dict[str, str]):
    context = {k: v for k, v in context.items() if _encodable(k) and _encodable(v)}
    assert material.encode_context(context) == material.encode_context(dict(reversed(context.items())))


@given(*[st.dictionaries(st.text("ab", max_size=3), st.text("ab", max_size=3), max_size=3)] * 2)
def test_other_contexts_have_other_encodings(one: dict[str, str], two: dict[str, str]):
    assert (material.encode_context(one) == material.encode_context(two)) == (one == two)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def test_blob_key_is_hkdf_expand():
    """The one HMAC in BlobKey is RFC 5869's HKDF-Expand."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    key, salt = bytes(range(32)), b"s" * 16
    expanded = HKDFExpand(hashes.SHA256(), 32, b"streamcrypt kms blob 1|" + salt).derive(key)
    nonce = b"n" * 12
    blob_key = material.BlobKey("12345678-1234-4234-8234-123456789012", "00" * 32, key)
    assert AESGCM(expanded).encrypt(nonce, b"x", b"") == blob_key._cipher(salt).encrypt(nonce, b"x", b"")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_blob_or_refused(data: bytes):
    refused = None
    try:
        header = material.parse_blob(data)
    except KmsError as error:
        refused = error.code
    if refused is None:
        assert material.key_prefix(header.key_id) == data[:18]
    else:
        assert refused == "InvalidCiphertextException"


def test_the_clock_decides(tmp_path: Path):
    clock = FakeClock()
    service = Service(Store(tmp_path, clock=clock), clock=clock)
    key = service.create_key()["KeyMetadata"]["KeyId"]
    service.schedule_key_deletion(KeyId=key, PendingWindowInDays=7)
    clock.pass_days(8)
    assert service.list_keys()["Keys"] == []
    events = service.store.query("SELECT operation FROM audit WHERE operation = 'DeleteKey'")
    assert events == [("DeleteKey",)]
    service.close()
