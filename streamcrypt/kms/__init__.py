"""The embedded KMS, and clients for it and for AWS KMS.

open_service()   the embedded KMS of a home, in this process
kms_client()     a real boto3 KMS client onto the embedded KMS, a running ``kms serve``, or AWS
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamcrypt.kms.errors import KmsError
from streamcrypt.kms.policy import ROOT, Caller
from streamcrypt.kms.service import Service
from streamcrypt.kms.store import Store

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ROOT", "Caller", "KmsError", "Service", "default_home", "kms_client", "open_service"]

_services: dict[str, Service] = {}
_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def home_folder() -> str:
    """$STREAMCRYPT_HOME, or ``streamcrypt`` in the platform's folder for user data."""
    named = os.environ.get("STREAMCRYPT_HOME")
    if named:
        return named
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return os.path.join(base, "streamcrypt")


def default_home() -> Path:
    """``home_folder`` as a path."""
    from pathlib import Path

    return Path(home_folder())


def open_service(
    home: Path | str | None = None,
    *,
    root_key: str | None = None,
    passphrase: Callable[[], bytes] | None = None,
    create: bool = True,
    clock: Callable[[], float] = time.time,
) -> Service:
    """The embedded KMS of ``home`` (default: default_home()): one per home and process.

    A home without a KMS gets one, unless ``create`` is false; ``root_key`` ("file",
    "passphrase", "keystore"; default $STREAMCRYPT_ROOT_KEY or "file") says how the root key
    of a new one is kept.  ``passphrase`` is asked for the passphrase where one is needed
    (default: the file that $STREAMCRYPT_PASSPHRASE_FILE names).  After a fork the child
    opens the database again by itself.  KeyAccessError when the root key is missing or wrong.
    """
    place = os.path.abspath(home if home is not None else home_folder())
    with _lock:
        service = _services.get(place)
        if service is None:
            kind = root_key or os.environ.get("STREAMCRYPT_ROOT_KEY", "file")
            store = Store(place, root_key=kind, passphrase=passphrase, create=create, clock=clock)
            service = _services[place] = Service(store, clock=clock)
        return service


def kms_client(reference: str = "local", **options: Any) -> Any:
    """A boto3 KMS client.

    ``local`` answers from the embedded KMS in this process, ``local@http://HOST:PORT`` from a
    running ``kms serve``, ``aws`` from AWS KMS with boto3's own configuration.  ``options``
    go to ``boto3.client``.
    """
    from streamcrypt.kms.client import make_client

    return make_client(reference, **options)
