"""The engine on a Ray cluster that runs here: same result and manifest as locally, workers killed, keys refused."""

from __future__ import annotations

import contextlib
import filecmp
import os
import pickle
import random
import signal
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from families.datasets import flip

import streamcrypt as sc
from streamcrypt.engine import remote
from streamcrypt.engine.pool import Lost
from streamcrypt.engine.remote import RayPool
from streamcrypt.engine.spans import FileTask, Opening, Sealing
from streamcrypt.keys.materials import Materials
from streamcrypt.keys.reference import encrypting_keyring
from streamcrypt.kms import kms_client, open_service, principals
from streamcrypt.kms.server import Server
from streamcrypt.message.suites import UNSIGNED
from streamcrypt.streams import OutgoingMessage, header_template

ray = pytest.importorskip("ray", reason="RAY IS MISSING: its engine was not tested")

pytestmark = [
    pytest.mark.timeout(300),
    # Ray leaves sockets and files to the interpreter's end, and warns of its own future.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A key of a KMS over HTTP, and a cluster of two CPUs whose workers have no other way to it."""
    home = tmp_path_factory.mktemp("kms")
    service = open_service(home)
    service.create_alias(AliasName="alias/ml", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    server = Server(service, port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    credentials = principals.access_key(service.store, principals.principal_arn(None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCRYPT_HOME", str(tmp_path_factory.mktemp("empty")))
        patch.setenv("AWS_ACCESS_KEY_ID", credentials.id)
        patch.setenv("AWS_SECRET_ACCESS_KEY", credentials.secret)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
            configure_logging=False,
        )  # fmt: skip
        yield f"local:alias/ml@{server.url}"
        ray.shutdown()
    server.stop()
    thread.join(20)


@pytest.fixture
def tree(tmp_path):
    """Files around frames and batches, an empty one and an empty folder among them."""
    chance = random.Random(1)
    for number, size in enumerate([0, 1, 4095, 4096, 4097, 100_000, 3_000_000, *[20_000] * 30]):
        path = tmp_path / "plain" / f"d{number % 3}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(size))
    (tmp_path / "plain" / "empty").mkdir()
    return tmp_path


def same(first, second):
    compared = filecmp.dircmp(first, second)
    found = []

    def walk(one):
        found.extend(one.left_only + one.right_only + one.diff_files + one.funny_files)
        for below in one.subdirs.values():
            walk(below)

    walk(compared)
    return not found


def test_the_four_commands_do_what_they_do_locally(tree, keys):
    options = {"context": {"Project": "a"}, "frame_size": "4KiB", "fsync": False}
    report = sc.encrypt(tree / "plain", tree / "ray", keys=keys, engine="ray", **options)
    local = sc.encrypt(tree / "plain", tree / "local", keys=keys, **options)
    for name in ("files", "bytes_in", "bytes_out", "data_keys", "failed", "skipped"):
        assert report[name] == local[name], name
    # The driver makes the data key; each worker that was used unwraps it once.
    assert report["kms"]["calls"]["GenerateDataKey"] == 1
    assert 1 <= report["kms"]["calls"]["Decrypt"] <= 2

    # The manifest lists the messages that the workers made: locally verified, against the plaintext.
    assert sc.verify(tree / "ray", against=tree / "plain", keys=keys)["files"] == report["files"]
    sc.decrypt(tree / "ray", tree / "back", keys=keys, fsync=False)
    assert same(tree / "plain", tree / "back")

    assert sc.verify(tree / "local", keys=keys, engine="ray")["files"] == report["files"]
    sc.decrypt(tree / "local", tree / "back-by-ray", keys=keys, engine="ray", fsync=False)
    assert same(tree / "plain", tree / "back-by-ray")

    sc.rekey(tree / "local", tree / "new", keys=keys, from_keys=keys, engine="ray", fsync=False)
    assert sc.verify(tree / "new", against=tree / "plain", keys=keys)["files"] == report["files"]
    old = sc.inspect(tree / "local" / "d0" / "f6").encrypted_data_keys
    assert sc.inspect(tree / "new" / "d0" / "f6").encrypted_data_keys[0]["info"] == old[0]["info"]
    ids = {sc.inspect(path).message_id for path in (tree / "new").rglob("f*")}
    assert len(ids) == 37


def test_a_context_that_is_not_stored(tree, keys):
    options = {"authenticated_context": {"Tenant": "7"}, "fsync": False}
    sc.encrypt(tree / "plain" / "d0", tree / "ray", keys=keys, engine="ray", **options)
    assert "Tenant" not in sc.inspect(tree / "ray" / "f6").encryption_context
    sc.decrypt(tree / "ray", tree / "back", keys=keys, engine="ray", **options)
    assert same(tree / "plain" / "d0", tree / "back")
    with pytest.raises(sc.KeyAccessError):
        sc.decrypt(tree / "ray", tree / "no", keys=keys, engine="ray", fsync=False)


def test_one_file(tree, keys):
    sc.encrypt(tree / "plain" / "d0" / "f6", tree / "f6.enc", keys=keys, engine="ray")
    sc.decrypt(tree / "f6.enc", tree / "f6", keys=keys, engine="ray")
    assert filecmp.cmp(tree / "plain" / "d0" / "f6", tree / "f6", shallow=False)


def test_one_damaged_file_fails_and_the_others_do_not(tree, keys):
    sc.encrypt(tree / "plain", tree / "ray", keys=keys, fsync=False)
    path = tree / "ray" / "d0" / "f6"
    flip(path, path.stat().st_size // 2)
    with pytest.raises(sc.IntegrityError, match="f6: frame 2 did not authenticate") as caught:
        sc.decrypt(tree / "ray", tree / "back", keys=keys, engine="ray", fsync=False)
    assert caught.value.report["files"] == 36
    assert not (tree / "back" / "d0" / "f6").exists()


def test_keys_that_other_machines_do_not_reach(tree, keys):
    for reference in ("local:alias/ml", "arn:aws:kms:local:000000000000:key/1", [keys, "local:alias/ml"]):
        with pytest.raises(ValueError, match="kms serve"):
            sc.encrypt(tree / "plain", tree / "out", keys=reference, engine="ray")
    with pytest.raises(ValueError, match="branch keys of this machine"):
        sc.decrypt(tree / "plain", tree / "out", keys=[keys, "hierarchy:a@local"], engine="ray")
    with pytest.raises(ValueError, match="kms serve"):
        remote._travelling("kms-rsa:local:alias/rsa@public.pem")  # what follows the @ is no address
    with pytest.raises(ValueError, match="does not travel"):
        sc.encrypt(tree / "plain", tree / "out", keys=encrypting_keyring(keys), engine="ray")
    with pytest.raises(ValueError, match="signed"):
        sc.encrypt(tree / "plain", tree / "out", keys=keys, engine="ray", sign=True)
    with pytest.raises(ValueError, match="engine"):
        sc.encrypt(tree / "plain", tree / "out", keys=keys, engine="spark")
    with pytest.raises(ValueError, match="address"):
        sc.encrypt(tree / "plain", tree / "out", keys=keys, address="auto")
    assert not (tree / "out").exists()


def test_a_key_that_only_wraps_is_taken_beside_one_that_unwraps(tree, keys):
    """A worker is given wrapped data keys: one of the references must open them."""
    private = rsa.generate_private_key(65537, 2048)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tree / "public.pem").write_bytes(public)
    only_wraps = f"raw-rsa:team/key@{tree / 'public.pem'}"
    with pytest.raises(ValueError, match="a public key cannot decrypt"):
        sc.encrypt(tree / "plain", tree / "out", keys=only_wraps, engine="ray")
    assert not (tree / "out").exists()
    both = [keys, only_wraps]
    assert (
        sc.encrypt(tree / "plain" / "d0", tree / "out", keys=both, engine="ray", fsync=False)["files"] == 13
    )
    path = tree / "private.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    # The file with the key lies on every node.
    sc.verify(tree / "out", against=tree / "plain" / "d0", keys=f"raw-rsa:team/key@{path}", engine="ray")


def test_data_keys_are_kept_no_longer_than_the_caller_says(tree, keys):
    """Without a cache each worker opens every message's own data key."""
    report = sc.encrypt(
        tree / "plain" / "d0", tree / "out", keys=keys, engine="ray", cache=False, fsync=False
    )
    assert report["kms"]["calls"]["GenerateDataKey"] == 14  # 13 files and the manifest
    assert report["kms"]["calls"]["Decrypt"] == 13
    sc.verify(tree / "out", against=tree / "plain" / "d0", keys=keys)


def workers():
    """The processes of this test's Ray, known by their home, that do tasks."""
    ours = f"STREAMCRYPT_HOME={os.environ['STREAMCRYPT_HOME']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_worker = (folder / "cmdline").read_bytes().startswith(b"ray::work")
            if is_worker and ours in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def test_killed_workers_lose_nothing(tree, keys):
    chance = random.Random(2)
    for number in range(60):
        (tree / "plain" / f"big{number}").write_bytes(chance.randbytes(2_000_000))
    killed = []

    def kill_some(progress):
        if len(killed) < 2 and progress.files > 5 * len(killed):
            for pid in workers()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    report = sc.encrypt(
        tree / "plain", tree / "ray", keys=keys, engine="ray", fsync=False, progress=kill_some
    )
    assert killed
    assert report["files"] == 97
    assert sc.verify(tree / "ray", against=tree / "plain", keys=keys)["files"] == 97
    assert not list((tree / "ray").rglob(".streamcrypt-*"))


@pytest.fixture
def answers_lost(monkeypatch):
    """Workers do their lists, and each first answer is lost on its way; ``clear`` it before another job."""
    seen = set()

    def collect(pool, original=RayPool.collect):
        held = [tasks for tasks, _ in pool._held.values()]
        results = original(pool)
        left = [tasks for tasks, _ in pool._held.values()]
        kept = []
        for tasks in (tasks for tasks in held if not any(tasks is other for other in left)):
            numbers = {task.number for task in tasks}
            answers = [outcome for outcome in results if outcome.number in numbers]
            kept += answers if numbers & seen else [Lost(tasks, "the answer was lost")]
            seen.update(numbers)
        return kept

    monkeypatch.setattr(RayPool, "collect", collect)
    return seen


def test_what_a_lost_worker_had_published_stands(tree, keys, answers_lost):
    options = {"keys": keys, "engine": "ray", "fsync": False}
    audit = []
    report = sc.encrypt(tree / "plain", tree / "enc", audit=audit.append, **options)
    assert (report["files"], report["bytes_in"], len(audit)) == (37, 3_712_289, 37)
    assert sc.verify(tree / "enc", against=tree / "plain", keys=keys)["bytes_in"] == report["bytes_out"]
    answers_lost.clear()
    read = sc.decrypt(tree / "enc", tree / "dec", **options)
    assert read["bytes_in"] == report["bytes_out"]
    assert same(tree / "plain", tree / "dec")


def test_a_worker_that_was_only_slow_publishes_while_its_files_are_made_again(
    tree, keys, answers_lost, monkeypatch
):
    looked = set()

    def published(run, task, original=remote._ClusterRun._published):
        if task.number not in looked:  # it is not there yet
            looked.add(task.number)
            return None
        return original(run, task)

    monkeypatch.setattr(remote._ClusterRun, "_published", published)
    options = {"keys": keys, "engine": "ray", "fsync": False}
    assert sc.encrypt(tree / "plain", tree / "enc", **options)["files"] == 37
    assert sc.verify(tree / "enc", against=tree / "plain", keys=keys)["files"] == 37
    looked.clear()
    answers_lost.clear()

    # Where names are replaced, the slow one could be the last: that is seen before the manifest is written.
    stale = (tree / "enc" / "d0" / "f6").read_bytes()

    def replace(progress):
        if progress.files == 37:
            (tree / "enc" / "d0" / "f6").write_bytes(stale)

    with pytest.raises(sc.DestinationError, match="f6: a worker that had been lost replaced it"):
        sc.encrypt(tree / "plain", tree / "enc", overwrite=True, progress=replace, **options)
    sc.encrypt(tree / "plain", tree / "enc", resume=True, keys=keys)
    assert sc.verify(tree / "enc", against=tree / "plain", keys=keys)["files"] == 37


def test_no_key_is_in_what_travels(tree, keys):
    materials = Materials(encrypting_keyring(keys)).for_encryption(UNSIGNED, {"a": "b"}, 100)
    message = OutgoingMessage.begin(materials, header_template(materials, 4096), 4096)
    geometry = message.geometry(100)
    sealing = Sealing(UNSIGNED.id, message.header, message.message_id, message.content_key, geometry)
    opening = Opening(message.header, message.message_id, message.content_key, geometry)
    for task in (
        FileTask(1, "a", "b", 100, sealing=sealing),
        FileTask(1, "a", "b", 100, opening, sealing),
    ):
        assert message.content_key in pickle.dumps(task)
        travelling = pickle.dumps(remote._wrapped(task))
        assert message.content_key not in travelling
        assert materials.data_key not in travelling
        assert len(travelling) < 3_000


def test_a_signed_manifest_and_keys_by_partition(keys, tree):
    """Each node hashes what it writes, and unwraps the data keys of every partition."""
    url = keys.partition("@")[2]
    kms = kms_client(f"local@{url}")
    signer = kms.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"]
    other = f"local:{kms.create_key()['KeyMetadata']['KeyId']}@{url}"
    (tree / "public.der").write_bytes(kms.get_public_key(KeyId=signer)["PublicKey"])
    report = sc.encrypt(
        tree / "plain", tree / "enc", keys=keys, key_map={"d1/*": other}, sign_manifest=f"local:{signer}@{url}",
        engine="ray",
    )  # fmt: skip
    assert [used["files"] for used in report["keys"]] == [25, 12]
    assert sc.verify(tree / "enc", signed_by=tree / "public.der").files == 37
    sc.decrypt(tree / "enc", tree / "dec", keys=[keys, other], signed_by=tree / "public.der", engine="ray")
    assert same(tree / "plain", tree / "dec")


def test_a_stream_is_not_for_a_cluster(tmp_path):
    """It goes through one process: said before anything is read or a cluster is looked for."""
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    with pytest.raises(ValueError, match="one process"):
        sc.encrypt("-", tmp_path / "out", keys=f"raw-aes:a/b@{key}", engine="ray")
    assert not (tmp_path / "out").exists()
