"""Ray Data over encrypted Parquet, and jobs on a Ray cluster.

    read_parquet                       an encrypted dataset as a ray.data.Dataset
    write_parquet                      a ray.data.Dataset to encrypted Parquet files
    encrypt decrypt verify rekey       the commands of the same name with ``engine="ray"``

Workers ask for data keys themselves: one KMS call for each distinct data key and worker process.  What
Ray pickles holds key references and no key.  A job's tasks carry no payload (docs/clusters.md); of a
Ray Data dataset the object store holds plaintext, in memory, and on disk where Ray spills: set
``RAY_object_spilling_config`` to an encrypted volume, or give the cluster the memory.

A ``local:`` key is in a file of one machine.  On a cluster of several machines its nodes reach it
through ``kms serve``: ``local:alias/NAME@https://HOST:PORT``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from streamcrypt import api
from streamcrypt.engine.job import Report
from streamcrypt.keys.reference import decrypting_keyring, encrypting_keyring


def read_parquet(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    keys: str | Sequence[str] | None = None,
    context: Mapping[str, str] | None = None,
    crypt_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A ``ray.data.Dataset`` over encrypted Parquet files or folders of them.

        dataset = ray.read_parquet("train.enc/", columns=["x", "y"])

    ``crypt_options`` are those of the ``crypt`` filesystem (``verify_manifest``, ``target_protocol``
    …), other options those of ``ray.data.read_parquet``.  Columns that are not asked for are not read.
    """
    data = _import_ray_data()
    keys = _plain(keys)
    decrypting_keyring(keys)  # a bad reference is an error here, not in a worker
    fs, names = _filesystem(paths, {**(crypt_options or {}), "keys": keys, "context": context})
    return data.read_parquet(names, filesystem=fs, **options)


def write_parquet(
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    keys: str | Sequence[str],
    context: Mapping[str, str] | None = None,
    crypt_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Write a ``ray.data.Dataset`` as encrypted Parquet files, each a message, into the folder ``path``.

    Options as for ``read_parquet``, and those of ``Dataset.write_parquet``.  A file appears when it is
    whole; a task that Ray repeats makes new messages.
    """
    _import_ray_data()
    references = _plain(keys)
    if references is None:
        raise TypeError("writing needs keys")
    encrypting_keyring(references)
    fs, names = _filesystem(path, {**(crypt_options or {}), "keys": references, "context": context})
    dataset.write_parquet(names[0], filesystem=fs, **options)


def encrypt(
    source: api.Path, destination: api.Path, *, keys: Any, address: str | None = None, **options: Any
) -> Report:
    """``sc.encrypt`` on the Ray cluster at ``address`` (None: the one that this process is connected to).

        ray.encrypt("/shared/train", "/shared/train.enc", keys="local:alias/ml@https://10.0.0.1:8400")

    Source and destination are folders that every node sees under that name, or object stores.  Tasks
    carry wrapped keys alone; every node needs the right to use the key (docs/clusters.md).
    """
    return api.encrypt(source, destination, keys=keys, engine="ray", address=address, **options)


def decrypt(source: api.Path, destination: api.Path, *, address: str | None = None, **options: Any) -> Report:
    """``sc.decrypt`` on a Ray cluster; as ``encrypt``."""
    return api.decrypt(source, destination, engine="ray", address=address, **options)


def verify(source: api.Path, *, address: str | None = None, **options: Any) -> Report:
    """``sc.verify`` on a Ray cluster; as ``encrypt``."""
    return api.verify(source, engine="ray", address=address, **options)


def rekey(
    source: api.Path, destination: api.Path, *, keys: Any, address: str | None = None, **options: Any
) -> Report:
    """``sc.rekey`` on a Ray cluster; as ``encrypt``."""
    return api.rekey(source, destination, keys=keys, engine="ray", address=address, **options)


def _filesystem(paths: Any, options: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The pyarrow filesystem for the paths, and their names in it."""
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ValueError("no path is given")
    from streamcrypt.fs import crypt_place, filesystem  # needs fsspec; jobs do not

    below, _ = crypt_place(given[0], **options)
    return filesystem(below), [below._strip_protocol(os.fspath(path)) for path in given]


def _plain(keys: str | Sequence[str] | None) -> str | list[str] | None:
    if keys is None or isinstance(keys, str):
        return keys
    if not all(isinstance(key, str) for key in keys):
        raise TypeError("keys for Ray are key references: a keyring does not travel to other processes")
    return list(keys)


def _import_ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise ImportError("streamcrypt.ray needs ray: pip install 'streamcrypt[ray]'") from error
    return ray.data
