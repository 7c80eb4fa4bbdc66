"""Jobs on a Ray cluster of several nodes: same answer as locally, whoever dies, whatever a node may not do."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest
from families.datasets import flip
from families.pages import blocks, run_page
from families.trees import leftovers, make_tree, read_tree

import streamcrypt as sc
from streamcrypt.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"

ray = pytest.importorskip("ray", reason="RAY IS MISSING: its clusters were not tested")

from families.clusters import (  # noqa: E402
    WARNINGS,
    add_node,
    credentials,
    kill_node,
    ray_cluster,
    served_kms,
    services_of,
    workers_of,
)

from streamcrypt.engine import remote, spans  # noqa: E402
from streamcrypt.engine.manifest import read_manifest  # noqa: E402
from streamcrypt.engine.remote import HELD, RayPool  # noqa: E402
from streamcrypt.engine.spans import FileTask  # noqa: E402
from streamcrypt.engine.worker import Setup  # noqa: E402
from streamcrypt.keys.calls import KmsStats  # noqa: E402
from streamcrypt.keys.materials import Materials  # noqa: E402
from streamcrypt.keys.reference import decrypting_keyring  # noqa: E402
from streamcrypt.storage import LocalTree  # noqa: E402
from streamcrypt.streams import ReadingRules, source_header, unlock  # noqa: E402

pytestmark = [
    pytest.mark.timeout(300),
    *(pytest.mark.filterwarnings(warning) for warning in WARNINGS),
]


class Setting:
    """Two nodes of one CPU each, and a KMS whose key their workers may use."""

    def __init__(self, cluster, service, url):
        self.cluster, self.service, self.url = cluster, service, url
        self.key = f"local:alias/ml@{url}"
        self.worker = credentials(service, "worker", "Decrypt", "DescribeKey")
        self.nodes = [add_node(cluster, self.worker) for _ in range(2)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    home = tmp_path_factory.mktemp("kms")
    empty = str(tmp_path_factory.mktemp("empty"))
    with served_kms(home) as (service, url):
        for name in ("ml", "private"):
            key = service.create_key()["KeyMetadata"]["KeyId"]
            service.create_alias(AliasName=f"alias/{name}", TargetKeyId=key)
        account = "arn:aws:iam::000000000000"
        statements = [
            {"Effect": "Allow", "Principal": {"AWS": f"{account}:root"}, "Action": "kms:*", "Resource": "*"},
            {
                "Effect": "Deny",
                "Principal": {"AWS": f"{account}:user/worker"},
                "Action": "*",
                "Resource": "*",
            },
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": statements})
        service.put_key_policy(KeyId=key, PolicyName="default", Policy=policy)
        # No other way to a key than over HTTP: the home of the processes is an empty one.
        with (
            object_store() as store,
            ray_cluster({"STREAMCRYPT_HOME": empty, **store, **credentials(service, None)}) as cluster,
        ):
            yield Setting(cluster, service, url)


@contextlib.contextmanager
def object_store():
    """The variables of an S3 of this machine, with a bucket of its own name; none where moto is missing.

    moto keeps one state for all servers of a process.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield {}
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                 aws_access_key_id="test", aws_secret_access_key="test").create_bucket(Bucket="clustered")  # fmt: skip
    yield {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_REGION": "us-east-1"}
    server.stop()


@pytest.fixture
def nodes(setting):
    """The two nodes; what a test has killed is replaced, what it has added is removed."""
    yield setting
    for node in list(setting.cluster.worker_nodes - set(setting.nodes)):
        kill_node(setting.cluster, node)
    for node in setting.nodes:
        if node not in setting.cluster.worker_nodes:
            setting.nodes[setting.nodes.index(node)] = add_node(setting.cluster, setting.worker)


def sizes(files, size, seed=1):
    """Files of about this size, in folders, an empty one among them."""
    rng = random.Random(seed)
    return {f"d{n % 3}/f{n:03}": round(size * rng.uniform(0.5, 1.5)) if n else 0 for n in range(files)}


def listing(root, key):
    """The manifest, without what is drawn at random."""
    with sc.open(root / "_streamcrypt" / "manifest", keys=key) as file:
        return [(line.name, line.folder, line.size, line.message_length) for line in read_manifest(file)]


def cut_small(patch):
    """Files of more than 1 MiB are cut into spans, which go to all nodes."""
    patch.setattr(spans, "SPLIT_LENGTH", 2**20)
    patch.setattr(spans, "SPAN_LENGTH", 2**18)
    for module in (spans, remote):
        patch.setattr(module, "BATCH_BYTES", 2**19)


def once(report, audit, root, names):
    """Every name is there, was reported once, and nothing else is."""
    assert report["files"] == len(names)
    assert sorted(line["path"] for line in audit) == sorted(names)
    assert set(read_tree(root)) == {*names, "_streamcrypt/manifest"}
    assert not leftovers(root)


# -- same answer, bounds


def test_same_result_and_manifest_as_locally(nodes, tmp_path, monkeypatch):
    contents = make_tree(tmp_path / "in", sizes(60, 40_000) | {"big": 3_000_000, "bigger": 5_000_001})
    (tmp_path / "in" / "empty").mkdir()
    cut_small(monkeypatch)
    lists, most = [], 0

    def submit(pool, tasks, original=RayPool.submit):
        nonlocal most
        original(pool, tasks)
        lists.append(tasks)
        most = max(most, len(pool._held))

    monkeypatch.setattr(RayPool, "submit", submit)
    options = {"keys": nodes.key, "fsync": True, "frame_size": "64KiB"}
    ours = sc.encrypt(tmp_path / "in", tmp_path / "ray", engine="ray", **options)
    assert ours["workers"] == 2
    assert most <= 2 * HELD
    assert sum(isinstance(tasks[0], spans.SpanTask) for tasks in lists) >= 2 * remote.LISTS - 1
    assert max(sum(remote._length(task) for task in tasks) for tasks in lists) <= ours["bytes_in"] // (
        2 * remote.LISTS
    )

    local = sc.encrypt(tmp_path / "in", tmp_path / "local", **options)
    for name in ("files", "bytes_in", "bytes_out", "data_keys", "failed", "skipped", "operation"):
        assert ours[name] == local[name], name
    assert listing(tmp_path / "ray", nodes.key) == listing(tmp_path / "local", nodes.key)
    assert ours["kms"]["calls"]["GenerateDataKey"] == 1  # the driver's; each worker unwraps it once
    assert 1 <= ours["kms"]["calls"]["Decrypt"] <= 2

    assert sc.verify(tmp_path / "ray", against=tmp_path / "in", keys=nodes.key)["files"] == 62
    for call in ({"engine": "ray"}, {}):
        done = sc.verify(tmp_path / "ray", against=tmp_path / "in", keys=nodes.key, **call)
        assert done["bytes_in"] == local["bytes_out"]
    sc.decrypt(tmp_path / "local", tmp_path / "back", keys=nodes.key, engine="ray")
    assert read_tree(tmp_path / "back") == contents
    assert (tmp_path / "back" / "empty").is_dir()
    sc.rekey(tmp_path / "ray", tmp_path / "new", from_keys=nodes.key, engine="ray", **options)
    assert listing(tmp_path / "new", nodes.key) == listing(tmp_path / "local", nodes.key)
    assert sc.verify(tmp_path / "new", against=tmp_path / "in", keys=nodes.key)["files"] == 62
    ids = {sc.inspect(path).message_id for path in (tmp_path / "ray").rglob("*") if path.is_file()}
    assert len(ids) == 63


def test_no_more_lists_than_the_processors_can_hold_are_with_the_cluster(nodes, tmp_path):
    make_tree(tmp_path, {f"f{n}": 10 for n in range(20)})
    setup = Setup(LocalTree(str(tmp_path)), None)
    pool = RayPool(ray, setup, remote.Access(None, None), KmsStats(), lambda *_: None)
    done = []
    for number in range(20):
        while not pool.has_room:
            done += pool.collect()
        pool.submit([FileTask(number, f"f{number}", None, 10)])
        assert len(pool._held) <= 2 * HELD
    while pool.busy:
        done += pool.collect()
    assert sorted(outcome.number for outcome in done) == list(range(20))
    pool.close()


def test_no_key_is_in_the_object_stores(nodes, tmp_path):
    # Headers of 4 KB: lists are then too long for Ray's messages and travel through its object stores.
    context = {"Project": "x" * 4_000}
    make_tree(tmp_path / "in", {f"f{n:03}": 100 for n in range(600)})
    sc.encrypt(tmp_path / "in", tmp_path / "out", keys=nodes.key, context=context, engine="ray", fsync=False)
    materials = Materials(decrypting_keyring(nodes.key))
    secrets, wrapped = [], b""
    for name in ("f000", "f300", "f599", "_streamcrypt/manifest"):
        with contextlib.closing(LocalTree(str(tmp_path / "out")).open(name)) as source:
            header = source_header(source, max_encrypted_data_keys=None)
        secrets.append(unlock(header, materials, ReadingRules()).content_key)
        wrapped = header.encrypted_data_keys[0].ciphertext
    opened = materials.for_decryption(header.suite, header.context, header.encrypted_data_keys)
    secrets.append(opened.data_key)

    found = [0] * len(secrets)
    lists = 0
    for memory in map(memory_of, services_of(nodes.cluster)):
        for part in memory:
            lists += part.count(wrapped)
            for number, secret in enumerate(secrets):
                found[number] += part.count(secret)
    assert lists > 100  # what was looked through is what travelled
    assert found == [0] * len(secrets)
    for path in Path(os.environ["RAY_TMPDIR"]).rglob("*"):
        if path.is_file():
            assert not any(secret in path.read_bytes() for secret in secrets), path


def memory_of(pid):
    """What a process has in memory, the shared memory of an object store included."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights, *_ = line.split()
            start, stop = (int(text, 16) for text in span.split("-"))
            if rights.startswith("rw") and stop - start <= 2**28:
                try:
                    memory.seek(start)
                    yield memory.read(stop - start)
                except OSError:
                    continue


def test_object_stores(nodes, tmp_path, monkeypatch):
    pytest.importorskip("obstore", reason="OBSTORE IS MISSING: object stores on a cluster were not tested")
    pytest.importorskip("moto", reason="MOTO IS MISSING: object stores on a cluster were not tested")
    contents = make_tree(tmp_path / "in", sizes(30, 20_000) | {"big": 3_000_000})
    cut_small(monkeypatch)
    options = {"keys": nodes.key, "engine": "ray"}
    # A store takes a message from its start to its end: one node makes each.
    report = sc.encrypt(tmp_path / "in", "s3://clustered/enc", frame_size="64KiB", **options)
    assert report["files"] == 31
    assert sc.verify("s3://clustered/enc", against=tmp_path / "in", keys=nodes.key)["files"] == 31
    assert sc.verify("s3://clustered/enc", against=tmp_path / "in", **options)["files"] == 31
    sc.rekey("s3://clustered/enc", "s3://clustered/new", from_keys=nodes.key, **options)
    sc.decrypt("s3://clustered/new", tmp_path / "back", **options)
    assert read_tree(tmp_path / "back") == contents


# -- whoever dies


def test_a_node_is_killed_in_mid_job(nodes, tmp_path):
    contents = make_tree(tmp_path / "in", sizes(120, 600_000))
    audit, killed = [], []

    def kill(progress):
        if progress.files and not killed:
            killed.append(nodes.nodes[0])
            kill_node(nodes.cluster, nodes.nodes[0])

    report = sc.encrypt(
        tmp_path / "in", tmp_path / "out", keys=nodes.key, engine="ray", progress=kill, audit=audit.append
    )
    assert killed
    once(report, audit, tmp_path / "out", contents)
    assert sc.verify(tmp_path / "out", against=tmp_path / "in", keys=nodes.key)["files"] == 120


def kill_a_worker(nodes, killed):
    for pid in workers_of(nodes.cluster)[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)


def test_a_worker_is_killed_in_mid_file(nodes, tmp_path, monkeypatch):
    """Spans of one file are with both nodes: all of it is made again, under another message id."""
    cut_small(monkeypatch)
    contents = make_tree(tmp_path / "in", {f"f{n}": 9_000_000 + n for n in range(6)})
    audit, killed = [], []

    def kill(progress):
        if not killed and 0 < progress.files < 5:
            kill_a_worker(nodes, killed)

    report = sc.encrypt(
        tmp_path / "in", tmp_path / "out", keys=nodes.key, engine="ray", frame_size="64KiB", progress=kill,
        audit=audit.append,
    )  # fmt: skip
    assert killed
    once(report, audit, tmp_path / "out", contents)
    assert sc.verify(tmp_path / "out", against=tmp_path / "in", keys=nodes.key)["files"] == 6


def test_a_worker_is_killed_in_mid_job_while_it_decrypts(nodes, tmp_path):
    contents = make_tree(tmp_path / "in", sizes(80, 600_000))
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=nodes.key, fsync=False)
    audit, killed = [], []

    def kill(progress):
        if len(killed) < 2 and progress.files > 20 * len(killed):
            kill_a_worker(nodes, killed)

    report = sc.decrypt(
        tmp_path / "enc", tmp_path / "back", keys=nodes.key, engine="ray", fsync=False, progress=kill,
        audit=audit.append,
    )  # fmt: skip
    assert killed
    assert report["files"] == 80
    assert len(audit) == 80
    assert read_tree(tmp_path / "back") == contents


def driver(nodes, *words, address=None):
    """A job in a process of its own."""
    command = [sys.executable, "-m", "streamcrypt", *map(str, words), "--engine", "ray"]
    return subprocess.Popen(
        [*command, "--address", address or nodes.cluster.address, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_journal(process, root, seconds=120):
    """Wait until the job has noted its first files: a line after the one that the journal begins with."""
    deadline = time.monotonic() + seconds
    journal = root / "_streamcrypt" / "journal"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        assert time.monotonic() < deadline, "the job does not begin"
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_the_driver_is_killed_and_the_job_resumed(nodes, tmp_path):
    contents = make_tree(tmp_path / "in", sizes(300, 400_000))
    words = ("encrypt", tmp_path / "in", tmp_path / "out", "--key", nodes.key)
    with driver(nodes, *words) as process:
        wait_for_journal(process, tmp_path / "out")
        process.kill()
        process.communicate()
    there = {name for name in contents if (tmp_path / "out" / name).exists()}
    assert 0 < len(there) < 300
    assert not (tmp_path / "out" / "_streamcrypt" / "manifest").exists()

    with pytest.raises(sc.DestinationError, match="holds an interrupted job; resume goes on with it"):
        sc.encrypt(tmp_path / "in", tmp_path / "out", keys=nodes.key, engine="ray")
    with driver(nodes, *words, "--resume") as process:
        killed = ""
        while process.poll() is None and not killed:
            for pid in workers_of(nodes.cluster)[:1]:
                with contextlib.suppress(OSError):
                    limits = Path(f"/proc/{pid}/limits").read_text()
                    os.kill(pid, signal.SIGKILL)
                    killed = limits
        assert re.search(r"Max core file size +0 ", killed)  # what holds keys leaves no core dump
        out, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    report = json.loads(out)
    assert report["files"] + report["skipped"] == 300
    assert report["skipped"] > 0
    assert set(read_tree(tmp_path / "out")) == {*contents, "_streamcrypt/manifest"}
    assert not leftovers(tmp_path / "out")
    assert sc.verify(tmp_path / "out", against=tmp_path / "in", keys=nodes.key)["files"] == 300


def test_an_interrupt_leaves_nothing_partial_and_no_task(nodes, tmp_path):
    contents = make_tree(tmp_path / "in", sizes(300, 400_000))
    with driver(nodes, "encrypt", tmp_path / "in", tmp_path / "out", "--key", nodes.key) as process:
        wait_for_journal(process, tmp_path / "out")
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert json.loads(out)["exit_code"] == 130
    assert not leftovers(tmp_path / "out")
    for name in contents:
        path = tmp_path / "out" / name
        if path.exists():
            assert sc.decrypt_bytes(path.read_bytes(), keys=nodes.key) == contents[name]


# -- no cluster


@contextlib.contextmanager
def stranger(answer):
    """The address of a server that is no head: it takes connections, and answers so, or never."""
    host = ray.util.get_node_ip_address()  # what Ray makes of this machine's other names
    with socket.create_server((host, 0)) as listening:

        def serve():
            kept = []
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    kept.append(connection)
                    if answer:
                        connection.recv(100)
                        connection.sendall(answer)
            for connection in kept:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"{host}:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_what_is_no_head_is_a_temporary_error_and_not_minutes_of_waiting(nodes, tmp_path, monkeypatch):
    remote._find_head(nodes.cluster.address)
    monkeypatch.setattr(remote, "_CONNECT", 0.3)
    with stranger(b"") as address, pytest.raises(sc.TemporaryError, match="is reached there: no answer"):
        remote._find_head(address)
    with pytest.raises(sc.TemporaryError, match=r"is reached there: .*refused"):
        remote._find_head(address)

    make_tree(tmp_path / "in", {"f": 10})
    with stranger(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as address:
        words = ("encrypt", tmp_path / "in", tmp_path / "out", "--key", nodes.key)
        with driver(nodes, *words, address=address) as process:
            out, said = process.communicate(timeout=120)
    assert process.returncode == 5, said
    assert json.loads(out)["error"].endswith("no Ray cluster is reached there: what answers is no Ray head")
    assert not (tmp_path / "out").exists()


# -- what a node may not do


def test_the_work_of_a_node_without_access_goes_to_the_others(nodes, tmp_path, caplog):
    contents = make_tree(tmp_path / "in", sizes(80, 100_000))
    add_node(nodes.cluster, credentials(nodes.service, "nobody"), cpus=2)
    with caplog.at_level(logging.WARNING, logger="streamcrypt.engine"):
        report = sc.encrypt(tmp_path / "in", tmp_path / "out", keys=nodes.key, engine="ray", fsync=False)
    assert report["files"] == len(contents)
    assert not report["failed"]
    (left_out,) = {record.getMessage() for record in caplog.records}
    assert re.match(r"node [0-9.]+ \([0-9a-f]{8}\) is left out: .*AccessDenied", left_out)
    assert sc.verify(tmp_path / "out", against=tmp_path / "in", keys=nodes.key)["files"] == 80
    assert not leftovers(tmp_path / "out")


class Missing:
    """What a node cannot unpickle, because a package is not installed there."""

    def __reduce__(self):
        return importlib.import_module, ("a_package_that_is_not_installed",)


def test_a_node_without_our_packages_ends_the_job(nodes):
    pool = RayPool(ray, Missing(), remote.Access(None, None), KmsStats(), lambda *_: None)
    pool.submit([FileTask(0, "f", None, 10)])
    with pytest.raises(
        sc.StreamcryptError, match=r"cannot do the work: .*not_installed.*every node needs Python"
    ):
        pool.collect()
    pool.close()


def test_a_key_that_no_node_may_use_is_exit_code_4(nodes, tmp_path, capsys):
    make_tree(tmp_path / "in", sizes(20, 1_000))
    private = f"local:alias/private@{nodes.url}"
    words = ["encrypt", tmp_path / "in", tmp_path / "out", "--key", private, "--engine", "ray", "--json"]
    assert main([str(word) for word in words]) == 4
    said = json.loads(capsys.readouterr().out.splitlines()[-1])  # Ray itself, connected here, may print
    assert said["exit_code"] == 4
    assert "no node of the cluster can do the work; node " in said["error"]
    assert "AccessDenied" in said["error"]
    assert not list((tmp_path / "out").rglob("f*"))
    assert not leftovers(tmp_path / "out")
    with pytest.raises(sc.KeyAccessError):
        sc.encrypt(tmp_path / "in", tmp_path / "out", keys=private, engine="ray", overwrite=True)


def test_the_printed_policy_is_the_least_for_a_cluster(nodes, tmp_path, monkeypatch, capsys):
    """Of the driver and the nodes, which are one user here."""
    make_tree(tmp_path / "in", sizes(8, 1_000))
    for name, value in nodes.worker.items():
        monkeypatch.setenv(name, value)
    arn = nodes.service.describe_key(KeyId="alias/ml")["KeyMetadata"]["Arn"]
    capsys.readouterr()
    assert main(["iam-policy", "--key", arn, "--for", "encrypt,ray", "--quiet"]) == 0
    (statement,) = json.loads(capsys.readouterr().out)["Statement"]
    needed = statement["Action"]
    assert set(needed) == {"kms:GenerateDataKey", "kms:Decrypt"}

    def encrypt(actions):
        credentials(nodes.service, "worker", *(action.removeprefix("kms:") for action in actions))
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        return main(
            [
                "encrypt",
                str(tmp_path / "in"),
                str(out),
                "--key",
                f"local:{arn}@{nodes.url}",
                "--engine",
                "ray",
                "--quiet",
            ]
        )

    try:
        assert encrypt(needed) == 0
        for action in needed:
            assert encrypt([other for other in needed if other != action]) == 4
            assert action in capsys.readouterr().err
    finally:
        credentials(nodes.service, "worker", "Decrypt", "DescribeKey")


def test_a_kms_that_is_away_for_a_moment_costs_no_node(nodes, tmp_path):
    setup = Setup(LocalTree(str(tmp_path)), None)
    pool = RayPool(ray, setup, remote.Access(None, None), KmsStats(), lambda *_: None)
    first, second = pool._nodes
    pool._delivered.add(first)
    for _ in range(3 * pool.cpus):
        pool._refused(first, sc.KeyUnavailableError("away"))
    assert pool.cpus == 2
    with pytest.raises(sc.KeyUnavailableError):
        pool._refused(first, sc.KeyUnavailableError("away"))
    # Who never got a key is left out, with an error that is worth a retry.
    pool._refused(second, sc.KeyUnavailableError("out of reach"))
    assert pool.cpus == 1
    pool._left_out[first] = sc.KeyUnavailableError("out of reach")
    with pytest.raises(
        sc.TemporaryError, match=r"no node of the cluster can do the work; node .*: out of reach"
    ):
        pool.submit([FileTask(0, "f", None, 10)])
    pool.close()


def test_a_node_that_sees_another_folder_is_refused(tmp_path):
    setup = Setup(LocalTree(str(tmp_path / "in")), LocalTree(str(tmp_path / "out")))
    with pytest.raises(sc.SourceError, match="every node must see it"):
        remote._check_node(setup, remote.Access(None, None))
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(sc.DestinationError, match="another folder"):
        remote._check_node(setup, remote.Access(None, None, marker=".streamcrypt-1.tmp"))
    with pytest.raises(sc.StreamcryptError, match="is installed there"):
        remote._check_node(setup, remote.Access(None, None, version="0.0"))


def test_exit_codes_are_those_of_the_local_engine(nodes, tmp_path, capsys):
    make_tree(tmp_path / "in", sizes(20, 10_000))
    sc.encrypt(tmp_path / "in", tmp_path / "enc", keys=nodes.key, fsync=False)
    flip(tmp_path / "enc" / "d1" / "f004", 5_000)
    (tmp_path / "enc" / "d2" / "f005").unlink()

    def run(engine):
        target = str(tmp_path / engine)
        words = ["decrypt", str(tmp_path / "enc"), target, "--key", nodes.key, "--engine", engine, "--json"]
        code = main(words)
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        return code, said["exit_code"], sorted(failure["path"] for failure in said["failed"]), said["files"]

    assert run("ray") == run("local") == (3, 3, ["d1/f004", "d2/f005"], 18)
    assert read_tree(tmp_path / "ray") == read_tree(tmp_path / "local")


# -- the page


def test_the_page(nodes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    contents = make_tree(tmp_path / "train", sizes(20, 10_000))
    instead = {
        "aws:alias/ml": nodes.key,
        "verify train.enc": f"verify train.enc --key {nodes.key}",
        "keys=key": f"keys={nodes.key!r}",
        "--address auto": f"--address {nodes.cluster.address}",
    }
    run_page(PAGE, tmp_path, instead=instead)
    assert read_tree(tmp_path / "train.back") == contents

    (shown,) = [block.code for block in blocks(PAGE) if block.language == "console"]
    command, _, output = shown.removeprefix("$ streamcrypt ").partition("\n")
    assert main(command.split()) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("\x1b")]
    assert [line[:14] for line in said if "  note  " not in line] == [
        line[:14] for line in output.splitlines() if "  note  " not in line
    ]
