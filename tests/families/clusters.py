"""A real Ray cluster on this machine: nodes that come and go, and a KMS that they reach over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray
from families.processes import child_processes
from ray.cluster_utils import Cluster

from streamcrypt.kms import Service, open_service, principals
from streamcrypt.kms.server import Server

STORE = 80 * 2**20  # bytes of each node's object store

# What Ray leaves to the interpreter's end, and says about its own future.
WARNINGS = (
    "ignore::ResourceWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@contextlib.contextmanager
def served_kms(home: Path) -> Iterator[tuple[Service, str]]:
    """An embedded KMS of ``home`` over HTTP, and its URL."""
    service = open_service(home)
    server = Server(service, port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    try:
        yield service, server.url
    finally:
        server.stop()
        thread.join(20)


def credentials(service: Service, user: str | None, *actions: str) -> dict[str, str]:
    """The variables of a user who may do these KMS actions; None is the account's root."""
    policies = None
    if user is not None:
        statement = {"Effect": "Allow", "Action": [f"kms:{action}" for action in actions], "Resource": "*"}
        policies = [json.dumps({"Version": "2012-10-17", "Statement": [statement]})] if actions else []
    key = principals.access_key(service.store, principals.principal_arn(user), policies=policies)
    return {"AWS_ACCESS_KEY_ID": key.id, "AWS_SECRET_ACCESS_KEY": key.secret}


@contextlib.contextmanager
def ray_cluster(environment: Mapping[str, str]) -> Iterator[Cluster]:
    """A head without processors, and the driver connected to it; nodes are the caller's to add.

    Its files, and the address at which others would find it, lie in a folder of its own: other tests
    may run a Ray at the same time.
    """
    folder = tempfile.mkdtemp(prefix="ray-")  # a short name: it is that of sockets
    variables = {"RAY_TMPDIR": folder, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **environment}
    with patch.dict(os.environ, variables):
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": STORE,
                "include_dashboard": False,
                # A node that does not answer is given up soon.
                "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
            },
        )
        try:
            ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Cluster, environment: Mapping[str, str] | None = None, *, cpus: int = 1) -> Any:
    """One more node, whose workers have these variables."""
    with patch.dict(os.environ, environment or {}):
        return cluster.add_node(num_cpus=cpus, object_store_memory=STORE, include_dashboard=False)


def kill_node(cluster: Cluster, node: Any) -> None:
    """SIGKILL to a node's own processes; its workers find themselves without it."""
    cluster.remove_node(node, allow_graceful=False)


def workers_of(cluster: Cluster) -> list[int]:
    """The processes of this cluster that do a task of a job just now."""
    found = []
    for node in cluster.list_all_nodes():
        for raylet in node.all_processes.get("raylet", []):
            for pid in child_processes(raylet.process.pid):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::work"):
                        found.append(pid)
    return found


def services_of(cluster: Cluster) -> list[int]:
    """The processes of Ray itself: what keeps the object stores, places tasks, and knows of nodes."""
    found = []
    for node in cluster.list_all_nodes():
        for kind in ("raylet", "gcs_server"):
            found += [info.process.pid for info in node.all_processes.get(kind, [])]
    return found
