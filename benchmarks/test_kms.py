"""The embedded KMS by its yardsticks: microseconds in process, boto3's own cost, moto's server.

    pytest benchmarks/test_kms.py --benchmark-only

The figures that are compared are measured here side by side, on whatever machine this is.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.config import Config
from botocore.credentials import Credentials

from streamcrypt.kms import Service, kms_client, principals
from streamcrypt.kms.store import Store

CONTEXT = {"Project": "CustomerChurn", "Stage": "train"}
CONNECTIONS = 16
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(Store(tmp_path / "home"))
    yield made
    made.close()


@pytest.fixture
def key(service: Service) -> str:
    arn: str = service.create_key()["KeyMetadata"]["Arn"]
    return arn


def test_generate_data_key(benchmark: Any, service: Service, key: str) -> None:
    """Within 100 us, its audit row included."""
    benchmark(service.generate_data_key, KeyId=key, NumberOfBytes=32, EncryptionContext=CONTEXT)


def test_decrypt(benchmark: Any, service: Service, key: str) -> None:
    blob = service.generate_data_key(KeyId=key, NumberOfBytes=32, EncryptionContext=CONTEXT)["CiphertextBlob"]
    benchmark(service.decrypt, KeyId=key, CiphertextBlob=blob, EncryptionContext=CONTEXT)


def test_create_key(benchmark: Any, service: Service) -> None:
    """Bounded by the disk: a key is on it when it is returned."""
    benchmark(service.create_key)


def test_boto3_in_process(benchmark: Any, service: Service, key: str) -> None:
    """Within twice test_boto3_constant."""
    kms = kms_client("local", service=service)
    benchmark(kms.generate_data_key, KeyId=key, NumberOfBytes=32, EncryptionContext=CONTEXT)


class _Constant:
    def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
        yield b'{"CiphertextBlob": "AAAA", "Plaintext": "AAAA", "KeyId": "arn", "KeyMaterialId": "x"}'


def test_boto3_constant(benchmark: Any, service: Service, key: str) -> None:
    """The yardstick: a boto3 call answered by a constant."""
    kms = boto3.client(
        "kms",
        region_name="local",
        endpoint_url="http://kms.invalid",
        config=Config(signature_version=UNSIGNED),
    )

    def answer(request: Any, **_: Any) -> AWSResponse:
        return AWSResponse(request.url, 200, {}, _Constant())

    kms.meta.events.register("before-send.kms", answer)
    benchmark(kms.generate_data_key, KeyId=key, NumberOfBytes=32, EncryptionContext=CONTEXT)


# -- requests a second with 16 connections ------------------------------------------------------------


def _drive(address: tuple[str, int], request: bytes, seconds: float) -> int:
    """Requests answered over 16 connections in ``seconds``; a lean client, so that the server is the limit."""
    selector = selectors.DefaultSelector()

    def connect() -> None:
        connection = socket.create_connection(address)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ, bytearray())

    for _ in range(CONNECTIONS):
        connect()
    answered = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for ready, _ in selector.select(0.1):
            connection, buffer = ready.fileobj, ready.data
            chunk = connection.recv(65536)
            buffer += chunk
            head, separator, body = bytes(buffer).partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head) if separator else None
            if length is not None and len(body) >= int(length[1]):
                assert b" 200 OK" in head.splitlines()[0], head
                answered += 1
                buffer.clear()
                if b"connection: close" not in head.lower():
                    connection.sendall(request)
                    continue
                chunk = b""
            if not chunk:
                selector.unregister(connection)
                connection.close()
                connect()
    for ready in list(selector.get_map().values()):
        ready.fileobj.close()
    selector.close()
    return answered


def requests_a_second(
    url: str, key_id: str, credentials: tuple[str, str], region: str, seconds: float = 3.0
) -> float:
    """GenerateDataKey over 16 connections."""
    body = f'{{"KeyId": "{key_id}", "NumberOfBytes": 32}}'.encode()
    request = AWSRequest(
        "POST",
        f"{url}/",
        headers={
            "X-Amz-Target": "TrentService.GenerateDataKey",
            "Content-Type": "application/x-amz-json-1.1",
        },
        data=body,
    )
    SigV4Auth(Credentials(*credentials), "kms", region).add_auth(request)
    host, _, port = url.removeprefix("http://").partition(":")
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    lines += [f"Host: {host}:{port}", f"Content-Length: {len(body)}"]
    raw = ("POST / HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode() + body
    return _drive((host, int(port)), raw, seconds) / seconds


def _listening(
    command: list[str], ready: Callable[[str], str | None], **options: Any
) -> tuple[Any, threading.Thread, str]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert process.stdout is not None
    for line in process.stdout:
        url = ready(line)
        if url is not None:
            # moto logs every request: read on, or the pipe fills.
            reader = threading.Thread(target=process.stdout.read)
            reader.start()
            return process, reader, url
    raise AssertionError("the server ended")


def _end(process: Any, reader: threading.Thread) -> None:
    process.terminate()
    process.wait()
    reader.join()
    process.stdout.close()


def test_serve_against_moto(tmp_path: Path, record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """At least five times the requests a second of moto's server, with 16 connections."""
    home = tmp_path / "home"
    service = Service(Store(home))
    arn = service.create_key()["KeyMetadata"]["Arn"]
    access = principals.access_key(service.store, principals.principal_arn(None))
    service.close()
    serve = (
        "import sys; from pathlib import Path; from streamcrypt.kms import open_service; "
        "from streamcrypt.kms.server import Server; "
        "Server(open_service(Path(sys.argv[1])), port=0).run(ready=lambda url: print(url, flush=True), signals=True)"
    )
    ours, our_reader, url = _listening(
        [sys.executable, "-c", serve, str(home)],
        lambda line: line.strip() if line.startswith("http") else None,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    moto, moto_reader, moto_url = _listening(
        [sys.executable, "-m", "moto.server", "-p", "0"],
        lambda line: line.split("Running on ")[1].strip() if "Running on http" in line else None,
    )
    try:
        client = boto3.client(
            "kms",
            endpoint_url=moto_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        moto_key = client.create_key()["KeyMetadata"]["KeyId"]
        client.close()
        served = by_moto = 0.0
        # In turns, the best of each: the machine may have other things to do.
        for _ in range(4):
            credentials = (access.id, access.secret)
            served = max(served, requests_a_second(url, arn, credentials, "local", seconds=1.5))
            test = ("test", "test")
            by_moto = max(by_moto, requests_a_second(moto_url, moto_key, test, "us-east-1", seconds=1.5))
    finally:
        _end(ours, our_reader)
        _end(moto, moto_reader)
    with capsys.disabled():
        print(f"\nkms serve {served:.0f}/s, moto {by_moto:.0f}/s: {served / by_moto:.1f} times")
    record_property("kms serve, requests a second", served)
    record_property("moto, requests a second", by_moto)
    assert served >= 5 * by_moto
