"""Other ways to do a cell's work, each a cell of the same sweep: the axis ``engine``.

    sdk         the official AWS Encryption SDK by the loop of its documentation: every message asks the KMS,
                and is read in the SDK's own pieces.  The frame length is the cell's; the SDK's own default is
                4 KiB
    sdk-tuned   the same with pieces of 1 MiB and a caching materials manager with the cell's limits
    cp          the program, without reflinks
    copy        the loop that our engine has, without a cipher

The SDK is given what we are: the same files, the same number of workers (forked processes, each a part of
the files; one worker is the process itself), and real boto3 clients of the same embedded KMS with the
cell's latency, errors and its share of the quota.  ``cp`` and ``copy`` move the plain files, whatever the
operation says, and ask no KMS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from streamcrypt.bench.records import Cell
from streamcrypt.bench.shaped import ShapedKms, simulation
from streamcrypt.system import page_aligned

ENGINES: Final = ("sdk", "sdk-tuned", "cp", "copy")
CONTEXT: Final = {"purpose": "benchmark"}
_PIECE: Final = 1 << 20
_NO_LIMIT: Final = 1e9  # seconds; the SDK's cache wants an age


@dataclass(slots=True)
class Prepared:
    """A cell before the clock starts."""

    call: Callable[[], Any]  # what is timed; its report, or the fields of one
    asked: Callable[[], dict[str, Any]]  # afterwards: what was asked of the KMS, as fields of a Record
    seals: bool = True
    plain: Callable[[], Any] | None = None  # the same in plain, where the usual yardsticks do not fit


def refusal(cell: Cell) -> str | None:
    """Why another engine cannot do this cell, in one line; None where it can."""
    if cell.engine not in ENGINES:
        return f"{cell.engine!r} is not an engine; choose streamcrypt, {', '.join(ENGINES)}"
    if cell.operation not in ("encrypt", "decrypt"):
        return f"the engine {cell.engine} cannot {cell.operation}; it is measured with encrypt and decrypt"
    if cell.storage == "store":
        return f"the engine {cell.engine} is measured on files: storage memory or disk"
    if cell.engine.startswith("sdk") and find_spec("aws_encryption_sdk") is None:
        return f"the engine {cell.engine} needs aws-encryption-sdk: pip install aws-encryption-sdk"
    if cell.engine == "cp" and shutil.which("cp") is None:
        return "the engine cp needs the program cp"
    return None


def asked_of(kms: ShapedKms) -> dict[str, Any]:
    """What was asked of the KMS, as fields of a Record."""
    names = {"generate_data_key": "GenerateDataKey", "encrypt": "Encrypt", "decrypt": "Decrypt"}
    return {
        "kms_calls": {names.get(name, name): count for name, count in kms.calls.items()},
        "kms_latency_ms": [round(sample * 1000, 4) for sample in kms.samples],
        "kms_wait_s": kms.waited,
        "throttled": kms.throttled,
        "kms_failed": kms.failed,
    }


def prepare(cell: Cell, source: Path, folder: Path) -> Prepared:
    """The work of a cell's engine, everything but the one call done."""
    paths, target = sorted(source.iterdir()), folder / "target"
    target.mkdir()
    if cell.engine in ("cp", "copy"):
        move = _cp if cell.engine == "cp" else _copy
        return Prepared(lambda: move(cell, paths, target), dict, seals=False)
    from streamcrypt.kms import open_service

    arn = open_service(folder / "home").create_key(Description="benchmark")["KeyMetadata"]["Arn"]
    if cell.operation == "decrypt":
        encrypted = folder / "encrypted"
        encrypted.mkdir()
        sealing = replace(cell, operation="encrypt", kms_latency=0.0, kms_quota=None, kms_errors=0.0)
        _Sdk(sealing, folder, arn).do(paths, encrypted)
        paths = sorted(encrypted.iterdir())
    parts = [part for number in range(cell.workers) if (part := paths[number :: cell.workers])]
    share = replace(cell, kms_quota=cell.kms_quota / len(parts)) if cell.kms_quota else cell
    sdk = _Sdk(share, folder, arn)
    asked: list[dict[str, Any]] = []

    def run() -> dict[str, Any]:
        if len(parts) == 1:
            asked.append(sdk.do(parts[0], target))
        else:
            # What is made is inherited: nothing but the fork and the work is timed.
            with ProcessPoolExecutor(len(parts), get_context("fork"), _inherit, (sdk, target)) as pool:
                asked.extend(pool.map(_do, parts))
        return {"bytes_out": sum(path.stat().st_size for path in target.iterdir())}

    return Prepared(run, lambda: _together(asked))


_inherited: tuple[_Sdk, Path]


def _inherit(sdk: _Sdk, target: Path) -> None:
    global _inherited
    _inherited = sdk, target


def _do(part: list[Path]) -> dict[str, Any]:
    sdk, target = _inherited
    return sdk.do(part, target)


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    calls: dict[str, int] = {}
    for part in parts:
        for name, count in part["kms_calls"].items():
            calls[name] = calls.get(name, 0) + count
    samples = [sample for part in parts for sample in part["kms_latency_ms"]]
    sums = {name: sum(part[name] for part in parts) for name in ("kms_wait_s", "throttled", "kms_failed")}
    return {"kms_calls": calls, "kms_latency_ms": samples, **sums}


# -- the official SDK


class _Sdk:
    """Its client, key provider and cache, for a cell."""

    def __init__(self, cell: Cell, folder: Path, arn: str) -> None:
        import aws_encryption_sdk as sdk
        from aws_encryption_sdk.identifiers import AlgorithmSuite, CommitmentPolicy

        from streamcrypt.kms import Service, open_service
        from streamcrypt.kms.client import make_client

        service = Service(open_service(folder / "home").store)
        service.simulation = self._simulation = simulation(
            cell.kms_latency, cell.kms_quota, cell.kms_errors, seed=cell.seed
        )
        client = make_client("local", service=service)
        self._kms = ShapedKms(
            SimpleNamespace(generate_data_key=client.generate_data_key, decrypt=client.decrypt)
        )
        client.generate_data_key, client.decrypt = self._kms.generate_data_key, self._kms.decrypt

        class Provider(sdk.StrictAwsKmsMasterKeyProvider):  # type: ignore[misc]
            def add_regional_client(self, region_name: str) -> None:
                self._regional_clients[region_name] = client  # instead of one of AWS

        provider = Provider(key_ids=[arn])
        self._cell, self._tuned = cell, cell.engine == "sdk-tuned"
        self._client = sdk.EncryptionSDKClient(
            commitment_policy=CommitmentPolicy.REQUIRE_ENCRYPT_REQUIRE_DECRYPT
        )
        self._options: dict[str, Any] = {"mode": "d", "key_provider": provider}
        if self._tuned:
            self._options["line_length"] = _PIECE
        if self._tuned and cell.cache:
            limits = {
                "max_age": cell.cache_max_age or _NO_LIMIT,
                "max_messages_encrypted": cell.cache_max_messages,
                "max_bytes_encrypted": cell.cache_max_bytes,
            }
            del self._options["key_provider"]
            self._options["materials_manager"] = sdk.CachingCryptoMaterialsManager(
                master_key_provider=provider,
                cache=sdk.LocalCryptoMaterialsCache(1000),
                **{name: value for name, value in limits.items() if value is not None},
            )
        if cell.operation == "encrypt":
            self._options |= {
                "mode": "e",
                "frame_length": cell.frame_size,
                "algorithm": AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY_ECDSA_P384
                if cell.signed
                else AlgorithmSuite.AES_256_GCM_HKDF_SHA512_COMMIT_KEY,
                "encryption_context": CONTEXT,
            }

    def do(self, paths: list[Path], target: Path) -> dict[str, Any]:
        """These files, one after the other; what was asked of the KMS."""
        options = dict(self._options)
        for path in paths:
            if self._tuned and self._cell.operation == "encrypt":
                options["source_length"] = path.stat().st_size  # without it, its cache stands aside
            with path.open("rb") as reading, (target / path.name).open("wb") as writing:
                with self._client.stream(source=reading, **options) as stream:
                    if self._tuned:
                        while piece := stream.read(_PIECE):
                            writing.write(piece)
                    else:
                        for piece in stream:
                            writing.write(piece)
                if self._cell.fsync:
                    writing.flush()
                    os.fsync(writing.fileno())
        # boto3 asks again by itself: what was refused, only the KMS has seen.
        refused = {"throttled": self._simulation.throttled, "kms_failed": self._simulation.failed}
        return asked_of(self._kms) | refused


# -- copies


def _cp(cell: Cell, paths: list[Path], target: Path) -> dict[str, Any]:
    each = -(-len(paths) // cell.workers)
    command = [
        "xargs",
        "-0",
        "-n",
        str(each),
        "-P",
        str(cell.workers),
        "cp",
        "--reflink=never",
        "-t",
        str(target),
    ]
    subprocess.run(command, input=b"\0".join(os.fsencode(path) for path in paths), check=True)
    if cell.fsync:
        for path in target.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return {"bytes_out": sum(path.stat().st_size for path in paths)}


def _copy(cell: Cell, paths: list[Path], target: Path) -> dict[str, Any]:
    with ThreadPoolExecutor(cell.workers) as threads:
        for _ in threads.map(lambda path: copy_file(path, target / path.name, fsync=cell.fsync), paths):
            pass
    return {"bytes_out": sum(path.stat().st_size for path in paths)}


_local = threading.local()


def buffer() -> memoryview:
    """1 MiB for this thread, the same each time."""
    if not hasattr(_local, "buffer"):
        _local.buffer = page_aligned(_PIECE)
    found: memoryview = _local.buffer
    return found


def copy_file(source: Path, target: Path, *, fsync: bool) -> None:
    """A temporary name, pieces of 1 MiB, a rename: what our engine does with a file, without the cipher."""
    pieces = buffer()
    temporary = target.with_name(f".{target.name}.tmp")
    with source.open("rb", buffering=0) as reading, temporary.open("wb", buffering=0) as writing:
        while count := reading.readinto(pieces):
            writing.write(pieces[:count])
        if fsync:
            os.fsync(writing.fileno())
    temporary.rename(target)
