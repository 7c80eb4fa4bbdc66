"""A KMS over HTTP that throttles as AWS does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from streamcrypt.kms import open_service
from streamcrypt.kms.server import Server
from streamcrypt.kms.service import Service
from streamcrypt.kms.simulation import Simulation, constant


@contextlib.contextmanager
def served_with_quota(home: Path, rate: float, latency: float = 0.01) -> Iterator[str]:
    """The reference of a new key of a KMS that takes ``rate`` requests a second."""
    service = open_service(home)
    service.create_alias(AliasName="alias/limited", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    limited = Service(service.store, simulation=Simulation(latency=constant(latency), rate=rate, burst=5))
    server = Server(limited, port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    try:
        yield f"local:alias/limited@{server.url}"
    finally:
        server.stop()
        thread.join(20)
