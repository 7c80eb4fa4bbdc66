"""The family over the three doors of the embedded KMS, and its basics over moto's server."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from families.kms import FakeClock, KmsBasics, KmsTests

from streamcrypt.kms import ROOT, Caller, Service, kms_client, principals
from streamcrypt.kms.server import Server
from streamcrypt.kms.store import Store


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def service(clock: FakeClock) -> Iterator[Service]:
    # In memory where there is such a folder: test_store.py is about the disk, and waiting for it
    # would be most of the time here.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        made = Service(Store(Path(folder) / "home", clock=clock), clock=clock)
        yield made
        made.close()


class _Direct:
    """The in-process door, as a caller of another name or Region sees it."""

    def __init__(self, service: Service, caller: Caller = ROOT, region: str = "local") -> None:
        self._service, self._caller, self._region = service, caller, region

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = "".join(word.capitalize() for word in name.split("_"))
        return lambda **request: self._service.call(
            operation, request, caller=self._caller, region=self._region
        )


class TestService(KmsTests):
    @pytest.fixture
    def kms(self, service: Service) -> Service:
        return service

    @pytest.fixture
    def as_user(self, service: Service) -> Callable[[str], Any]:
        return lambda name: _Direct(service, Caller(principals.principal_arn(name)))

    @pytest.fixture
    def region_of(self, service: Service) -> Callable[[str], Any]:
        return lambda region: _Direct(service, region=region)


class TestBoto3InProcess(KmsTests):
    @pytest.fixture
    def kms(self, service: Service) -> Any:
        return kms_client("local", service=service)

    @pytest.fixture
    def as_user(self, service: Service) -> Callable[[str], Any]:
        return lambda name: kms_client(
            "local", service=service, caller=Caller(principals.principal_arn(name))
        )

    @pytest.fixture
    def region_of(self, service: Service) -> Callable[[str], Any]:
        return lambda region: kms_client("local", service=service, region_name=region)


class TestHttp(KmsTests):
    @pytest.fixture
    def url(self, service: Service) -> Iterator[str]:
        # The service's clock is the test's, the server's is real: botocore signs with the real time.
        server = Server(service, port=0)
        ready = threading.Event()
        thread = threading.Thread(target=server.run, kwargs={"ready": lambda _: ready.set()})
        thread.start()
        assert ready.wait(10)
        yield server.url
        server.stop()
        thread.join()

    def client(self, service: Service, url: str, name: str | None = None, region: str = "local") -> Any:
        key = principals.access_key(service.store, principals.principal_arn(name))
        return kms_client(
            f"local@{url}",
            region_name=region,
            aws_access_key_id=key.id,
            aws_secret_access_key=key.secret,
        )

    @pytest.fixture
    def kms(self, service: Service, url: str) -> Any:
        return self.client(service, url)

    @pytest.fixture
    def as_user(self, service: Service, url: str) -> Callable[[str], Any]:
        return lambda name: self.client(service, url, name)

    @pytest.fixture
    def region_of(self, service: Service, url: str) -> Callable[[str], Any]:
        return lambda region: self.client(service, url, region=region)


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="moto[server] IS MISSING: no second witness")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


class TestMoto(KmsBasics):
    """A second witness: what moto gets right, ours answers alike."""

    @pytest.fixture
    def kms(self, moto_url: str) -> Any:
        return boto3.client(
            "kms",
            endpoint_url=moto_url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
