"""Key services for the tests of the keyrings: every door of the embedded KMS, and moto's server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families.aws import aws_client

from streamcrypt.kms import kms_client, open_service
from streamcrypt.kms.server import Server


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """moto's server, real HTTP, threads."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(moto_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment of a user whose AWS is moto's server."""
    for name, value in {
        "AWS_ENDPOINT_URL": moto_url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_CONFIG_FILE": "no-such-file",
        "AWS_SHARED_CREDENTIALS_FILE": "no-such-file",
    }.items():
        monkeypatch.setenv(name, value)
    return moto_url


@pytest.fixture
def served(home: Path) -> Iterator[str]:
    """``kms serve`` on the KMS of this test's home."""
    server = Server(open_service(home), port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    yield server.url
    server.stop()
    thread.join(20)


@pytest.fixture
def door() -> str:
    """Which KMS ``kms`` is; a test class or a parameter says otherwise."""
    return "service"


@pytest.fixture
def kms(door: str, request: pytest.FixtureRequest, home: Path) -> Any:
    """A client of a KMS without keys, through one of four doors."""
    if door == "service":
        return open_service(home)
    if door == "boto3 in process":
        return kms_client("local", home=home)
    if door == "kms serve":
        return kms_client(f"local@{request.getfixturevalue('served')}", home=home)
    assert door == "moto"
    request.getfixturevalue("aws")
    return aws_client("kms")
