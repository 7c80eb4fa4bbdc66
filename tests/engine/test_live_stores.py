"""Stores other than moto's, each in a process of its own: what a job needs of a store, on each of them.

    localbucket    from PyPI (extra test)
    s3rver         from npm, an S3 that passes over If-None-Match and If-Match
    azurite        from npm, Microsoft's own emulator of Azure Blob Storage
    google         streamcrypt/bench/s3server.py in Google's dialect: no registry holds an emulator that knows it

Those from npm are looked for on PATH (tests/README.md has the command).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple

import pytest
from families.s3 import MiB

import streamcrypt as sc
from streamcrypt import stores

pytest.importorskip("obstore", reason="OBJECT STORES ARE NOT TESTED: obstore is missing (extra: stores)")

DATA = random.Random(1).randbytes(17 * MiB + 5)  # three parts
# Azurite's account and its key are published with it.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# Its own command line does not say which port it took.
LOCALBUCKET = """
import http.server, pathlib, sys, localbucket
localbucket.S3Handler.data_root = pathlib.Path(sys.argv[1])
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), localbucket.S3Handler)
print(f"127.0.0.1:{server.server_address[1]}", flush=True)
server.serve_forever()
"""


class Store(NamedTuple):
    url: str
    conditions: bool = True  # whether it knows If-None-Match and If-Match
    keeps_metadata: bool = True
    aborts: bool = True


class Server(NamedTuple):
    command: list[str]
    store: Store


SERVERS = {
    "localbucket": Server(
        [sys.executable, "-c", LOCALBUCKET, "DATA"], Store("s3://live", keeps_metadata=False)
    ),
    "s3rver": Server(
        ["s3rver", "-d", "DATA", "-a", "127.0.0.1", "-p", "0", "--configure-bucket", "live"],
        Store("s3://live", conditions=False, aborts=False),
    ),
    "azurite": Server(
        ["azurite-blob", "--blobPort", "0", "--location", "DATA", "--disableTelemetry", "--silent"],
        Store("az://live"),
    ),
    "google": Server([sys.executable, "-m", "streamcrypt.bench.s3server"], Store("gs://live")),
}


@pytest.fixture(scope="module", params=SERVERS)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """One server, and its port."""
    name = request.param
    if name == "localbucket":
        pytest.importorskip(
            "localbucket", reason="ANOTHER S3 IS NOT TESTED: localbucket is missing (extra: test)"
        )
    command = SERVERS[name].command
    if shutil.which(command[0]) is None:
        pytest.skip(f"{name.upper()} IS NOT TESTED: it is not on PATH (tests/README.md)")
    data = tmp_path_factory.mktemp(name)
    words = [str(data) if word == "DATA" else word for word in command]
    said = data.with_suffix(".log")  # not a pipe, which would fill
    with said.open("wb") as log:
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not (port := re.search(r'(?:127\.0\.0\.1:|"port": )([1-9]\d*)', said.read_text())):
            assert server.poll() is None, f"{name} ended: {said.read_text()}"
            time.sleep(0.02)
        yield name, int(port[1])
    finally:
        server.terminate()
        server.communicate()


@pytest.fixture
def store(running: tuple[str, int], home: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    name, port = running
    found = SERVERS[name].store
    for variable in [
        variable for variable in os.environ if variable.startswith(("AWS_", "AZURE_", "GOOGLE_"))
    ]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv(stores.RETRY_VARIABLE, "5")
    if found.url.startswith("s3:"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "S3RVER")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S3RVER")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    elif found.url.startswith("az:"):
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", f"http://127.0.0.1:{port}")
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{port}")
    make_bucket(name, port)
    return found._replace(url=f"{found.url}/{next(_folders)}")


_folders = iter(range(10**6))


def make_bucket(name: str, port: int) -> None:
    headers = {"Content-Length": "0"}
    if name == "azurite":
        signed = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
        text = "PUT" + "\n" * 12 + "".join(f"{header}:{value}\n" for header, value in signed.items())
        text += f"/{ACCOUNT}/{ACCOUNT}/live\nrestype:container"
        tag = hmac.digest(base64.b64decode(ACCOUNT_KEY), text.encode(), hashlib.sha256)
        headers |= {**signed, "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(tag).decode()}"}
    if name in ("localbucket", "azurite"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        path = f"/{ACCOUNT}/live?restype=container" if name == "azurite" else "/live"
        connection.request("PUT", path, headers=headers)
        assert connection.getresponse().status in (200, 201, 409)  # there since the test before
        connection.close()


@pytest.fixture
def key(home: Path) -> str:
    return "local:" + str(sc.kms_client("local").create_key()["KeyMetadata"]["KeyId"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "a").mkdir(parents=True)
    for name, data in {"a/x": DATA[:70_000], "a-b": b"", "a/y z": b"y", "big": DATA}.items():
        (folder / name).write_bytes(data)
    return folder


def names(url: str) -> list[str]:
    return [entry.name for page in stores.StoreTree(url)._listing("") for entry in page]


def test_there_within_it_and_back(store: Store, key: str, source: Path, tmp_path: Path) -> None:
    assert sc.encrypt(source, f"{store.url}/enc", keys=key).files == 4
    assert sc.verify(f"{store.url}/enc", against=source).files == 4
    assert sc.rekey(f"{store.url}/enc", f"{store.url}/again", keys=key).files == 4
    assert sc.decrypt(f"{store.url}/again", f"{store.url}/plain").files == 4
    assert sc.encrypt(f"{store.url}/plain", tmp_path / "enc", keys=key).files == 4
    assert sc.verify(tmp_path / "enc", against=source).files == 4
    assert sorted(names(f"{store.url}/plain")) == ["a-b", "a/x", "a/y z", "big"]  # no record of an upload


def test_ranges_and_versions(store: Store, key: str) -> None:
    with sc.open(f"{store.url}/m", "xb", keys=key) as file:
        file.write(DATA)
    with sc.open(f"{store.url}/m") as read:
        assert read.read_at(9 * MiB, 10) == DATA[9 * MiB :][:10]
        assert read.read() == DATA
    source = stores.StoreTree(store.url).open("m")
    with sc.open(f"{store.url}/m", "wb", keys=key) as file:
        file.write(DATA)
    with pytest.raises(sc.StreamcryptError, match="changed while it was read"):
        source.read_at(9 * MiB, memoryview(bytearray(10)))
    source.close()


def test_nothing_is_overwritten_unless_asked(store: Store, key: str, source: Path) -> None:
    for name in ("a/x", "big"):
        sc.encrypt(source / name, f"{store.url}/m", keys=key, overwrite=True)
        before = stores.StoreTree(store.url).state("m")
        with pytest.raises(sc.StreamcryptError, match="exists already"):
            sc.encrypt(source / "a/y z", f"{store.url}/m", keys=key)
        with pytest.raises(sc.StreamcryptError, match="exists already"):
            sc.open(f"{store.url}/m", "xb", keys=key)
        assert stores.StoreTree(store.url).state("m") == before


@pytest.mark.parametrize("size", [10, 17 * MiB])
def test_what_appears_meanwhile_stays(store: Store, size: int) -> None:
    tree = stores.StoreTree(store.url)
    late = tree.create("m", size=size)
    late.write_at(0, bytes(size))
    first = tree.create("m", size=1)
    first.write_at(0, b"1")
    first.publish(overwrite=False)
    if store.conditions:
        with pytest.raises(sc.StreamcryptError, match="exists already"):
            late.publish(overwrite=False)
        late.discard()
        assert tree.entry("m").size == 1
    else:  # nothing can be done about it: docs/object-stores.md says which stores these are
        late.publish(overwrite=False)
        assert tree.entry("m").size == size


def test_what_is_broken_off_leaves_nothing(store: Store, key: str) -> None:
    file = sc.open(f"{store.url}/m", "wb", keys=key)
    file.write(DATA)
    file.discard()
    left = ["_streamcrypt"] if not store.aborts else []  # what knows of the upload, for who can end it
    assert [name.partition("/")[0] for name in names(store.url)] == left
    tree = stores.StoreTree(store.url)
    tree.remove("m")  # which is not there
    with pytest.raises(sc.StreamcryptError, match="does not exist"):
        sc.open(f"{store.url}/m")


def test_our_own_object_is_recognised(store: Store) -> None:
    """After a lost answer: by the mark in its metadata."""
    tree = stores.StoreTree(store.url)
    for size in (10, 17 * MiB):
        target = tree.create("m", size=size, overwrite=True)
        target.write_at(0, bytes(size))
        target.publish(overwrite=True)
        found = tree._bucket.etag_of(tree.key("m"), target._mark)
        assert (found is not None) == store.keeps_metadata
        assert tree._bucket.etag_of(tree.key("m"), "another") is None


def test_an_interrupted_job_goes_on(
    store: Store, key: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamcrypt.engine.run import _Run

    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_finish", break_off)
        with pytest.raises(KeyboardInterrupt):
            sc.encrypt(source, f"{store.url}/enc", keys=key)
    report = sc.encrypt(source, f"{store.url}/enc", keys=key, resume=True)
    assert (report.files, report.skipped) == (0, 4)
    assert sc.verify(f"{store.url}/enc", against=source).files == 4
    assert [name for name in names(f"{store.url}/enc") if name.startswith("_")] == ["_streamcrypt/manifest"]
