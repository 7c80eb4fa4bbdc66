"""moto's S3 server over HTTP behind a proxy of ours that counts requests and makes some of them fail.

from families.s3 import bucket, client, impatient, key, server      in a conftest.py: the fixtures
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import streamcrypt as sc
from streamcrypt.bench.s3server import S3Server

MiB = 2**20
Fault = Callable[[str, str], int | str | None]


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server.  ``fault`` may answer one with a status, "lose" its answer or "drop" it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = behind
        self.requests: list[tuple[str, str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.fault: Fault = lambda method, path: None

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        return thread

    def stop(self, thread: threading.Thread) -> None:
        self.shutdown()
        self.server_close()
        thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        # BaseHTTPRequestHandler has answered "Expect: 100-continue".
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers.get("Range", "")))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = self.server.fault(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        path = re.sub(r"^http://[^/]+", "", self.path)  # a whole URL is what a client asks a proxy for
        left_out = ("transfer-encoding", "host" if path != self.path else "")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        try:
            connection.request(self.command, path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on


class Bucket:
    """A bucket of one test, looked at with boto3."""

    def __init__(self, client: Any, proxy: Proxy, name: str) -> None:
        self.client, self.proxy, self.name = client, proxy, name
        self.url = f"s3://{name}"
        client.create_bucket(Bucket=name)

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        return [item["Key"] for item in found]

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads") or []
        return [item["Key"] for item in found]

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def put(self, key: str, data: bytes = b"somebody else's", **options: Any) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data, **options)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


def once(method: str, part_of_path: str, fault: int | str) -> Fault:
    """A fault of the first such request."""
    left = [fault]

    def decide(had_method: str, path: str) -> int | str | None:
        return left.pop() if left and had_method == method and part_of_path in path else None

    return decide


def outage(kind: int | str, seconds: float, *, after: int) -> Fault:
    """A fault of every request for some time, which begins when so many have come through."""
    left, ends = after, 0.0

    def decide(method: str, path: str) -> int | str | None:
        nonlocal left, ends
        left -= 1
        if left == 0:
            ends = time.monotonic() + seconds
        return kind if left <= 0 and time.monotonic() < ends else None

    return decide


_LISTING = """
import json, re
from streamcrypt.storage import sort_key
from streamcrypt.stores import StoreTree
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
count, before, in_order, last = 0, 0.0, True, ""
for entry in StoreTree("s3://bucket/data").walk():
    count += 1
    if count == 2000:
        before = peak()
    this = sort_key(entry.name)
    in_order, last = in_order and last < this, this
print(json.dumps({"count": count, "grown_mib": peak() - before, "in_order": in_order}))
"""


def listed(count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A process lists a tree of so many keys: how many it found, and how much its memory grew after 2,000."""
    names = [
        f"data/{number // 5000:04}{'-b' * (number % 3 == 0)}/part-{number:07}" for number in range(count)
    ]
    server = S3Server(names)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        set_store_environment(monkeypatch, server.server_address[1])
        done = subprocess.run([sys.executable, "-c", _LISTING], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    pytest.importorskip("obstore", reason="OBJECT STORES ARE NOT TESTED: obstore is missing (extra: stores)")
    moto_server = pytest.importorskip("moto.server", reason="OBJECT STORES ARE NOT TESTED: moto is missing")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    thread = proxy.start()
    yield proxy
    proxy.stop(thread)
    moto.stop()


@pytest.fixture(scope="module")
def client(server: Proxy) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{server.behind}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


_names = iter(range(10**6))


def set_store_environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The only AWS settings of this process, and of those that it starts: a store on this machine."""
    from streamcrypt import stores

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    monkeypatch.setenv(stores.RETRY_VARIABLE, "60")  # a loaded machine fails a request more than once


@pytest.fixture
def bucket(server: Proxy, client: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    set_store_environment(monkeypatch, server.port)
    server.fault = lambda method, path: None
    server.requests.clear()
    server.headers.clear()
    return Bucket(client, server, f"bucket-{next(_names)}")


@pytest.fixture
def key(home: Path) -> str:
    kms = sc.kms_client("local")
    return "local:" + str(kms.create_key()["KeyMetadata"]["KeyId"])


@pytest.fixture
def impatient(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a store that never answers well: given up after a second."""
    from streamcrypt import stores

    monkeypatch.setenv(stores.RETRY_VARIABLE, "1")
