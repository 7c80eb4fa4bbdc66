"""Every block of code on the pages runs, or says to the reader why it does not."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from families.datasets import make_key
from families.measured import synthetic_records
from families.pages import blocks as blocks_of
from families.pages import run_page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {page.stem: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PAGES["benchmarks"] = ROOT / "benchmarks" / "README.md"

# Pages that other modules run.
ELSEWHERE = {
    "README": {"console", "python"},  # tests/cli/test_docs.py
    "tutorial": {"console", "python"},
    "loaders": {"python"},  # tests/adapters/test_loaders_page.py
    "readers": {"python"},  # tests/adapters/test_readers_page.py
    "performance": {"python"},  # tests/test_telemetry.py
    "clusters": {"sh", "python", "console"},  # tests/adapters/test_ray_cluster.py
}
# What installs packages: .ci/run does, and tests/cli/test_docs.py holds its words.
INSTALLS = re.compile(r"python3 -m venv \.venv && ")


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_run_or_says_why_not(name: str) -> None:
    for block in blocks_of(PAGES[name]):
        assert block.language, f"{name}:{block.line}: a block without its language"
        if block.language not in ("sh", "console", "python") or block.reason or INSTALLS.match(block.code):
            continue
        assert name in RUN or block.language in ELSEWHERE.get(name, ()), f"{name}:{block.line}"


def write_numbers(folder: Path) -> None:
    """A dataset like that of the README, without pandas."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"carrier": ["AA", "UA"] * 500, "dep_delay": list(range(1000))})
    for month in (1, 2):
        (folder / f"month={month}").mkdir(parents=True)
        pq.write_table(table, folder / f"month={month}" / "part-0.parquet")


def before_command_line(folder: Path, request: pytest.FixtureRequest) -> None:
    from streamcrypt import api
    from streamcrypt.bench.records import SCHEMA, append_line

    write_numbers(folder / "train")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_bytes(bytes(1000))
    for alias in ("alias/ml", "alias/ml-2027"):
        make_key(alias)
    (folder / "text").write_text("a line\n" * 100)
    for name in ("report.enc", "notes.enc"):
        api.encrypt(
            folder / "text", folder / name, keys="local:alias/ml", context={"Project": "CustomerChurn"}
        )
    (folder / "results").mkdir()
    records = synthetic_records()
    head = {"schema": SCHEMA, "machine": records.machine.to_json()}
    (folder / "results" / "machine.json").write_text(json.dumps(head))
    for record in records.runs:
        append_line(folder / "results" / "runs.jsonl", record)


def before_object_stores(folder: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("obstore", reason="OBSTORE IS MISSING: docs/object-stores.md was not run")
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    request.addfinalizer(server.stop)
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "eu-central-1", "AWS_REGION": "eu-central-1", "AWS_CONFIG_FILE": "no-such-file",
        "AWS_SHARED_CREDENTIALS_FILE": "no-such-file",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    import boto3

    session = boto3.session.Session()
    for bucket in ("bucket", "other"):
        where = {"LocationConstraint": "eu-central-1"}
        session.client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration=where)
    kms = session.client("kms")
    key = kms.create_key()["KeyMetadata"]["KeyId"]
    kms.create_alias(AliasName="alias/ml", TargetKeyId=key)
    put_object_of_the_s3_encryption_client(session.client("s3"), kms, key)
    write_numbers(folder / "train")
    (folder / "train" / "part-0.parquet").write_bytes(bytes(10_000))
    make_key()


def put_object_of_the_s3_encryption_client(s3: Any, kms: Any, key: str) -> None:
    """``s3://bucket/object`` in its format V3 (tests/engine/test_s3client.py holds it to the specification)."""
    context = {"aws:x-amz-cek-alg": "115"}
    made = kms.generate_data_key(KeyId=key, KeySpec="AES_256", EncryptionContext=context)
    message_id = os.urandom(28)

    def derive(purpose: bytes, length: int) -> bytes:
        return HKDF(SHA512(), length, message_id, b"\x00\x73" + purpose).derive(made["Plaintext"])

    body = AESGCM(derive(b"DERIVEKEY", 32)).encrypt(b"\x01" * 12, bytes(10_000), b"\x00\x73")
    blobs = {"x-amz-3": made["CiphertextBlob"], "x-amz-d": derive(b"COMMITKEY", 28), "x-amz-i": message_id}
    metadata = {name: base64.b64encode(blob).decode() for name, blob in blobs.items()}
    metadata |= {"x-amz-w": "12", "x-amz-t": json.dumps(context), "x-amz-c": "115"}
    s3.put_object(Bucket="bucket", Key="object", Body=body, Metadata=metadata)


def before_planning(folder: Path, request: pytest.FixtureRequest) -> None:
    write_numbers(folder / "train")


def before_sagemaker(folder: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torch", reason="TORCH IS MISSING: docs/sagemaker.md was not run")
    pytest.importorskip("fsspec", reason="FSSPEC IS MISSING: docs/sagemaker.md was not run")
    assert shutil.which("curl"), "docs/sagemaker.md asks the endpoint with curl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("SAGEMAKER_BIND_TO_PORT", str(port))


def before_benchmarks(folder: Path, request: pytest.FixtureRequest) -> None:
    """The commands are given in a checkout, and leave nothing in it."""
    pytest.importorskip("pytest_benchmark", reason="PYTEST-BENCHMARK IS MISSING: its commands were not run")
    shutil.copytree(ROOT / "benchmarks" / "baselines", folder / "baselines")
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        patch.delenv(name)  # pytest-benchmark measures nothing beside others
    patch.setenv("BASELINES", str(folder / "baselines"))
    patch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    patch.setenv("STREAMCRYPT_BENCH_DIR", str(folder))
    patch.setenv("STREAMCRYPT_PEER_MB", "1")
    patch.setenv("STREAMCRYPT_PEER_ROUNDS", "1")


def before_nothing(folder: Path, request: pytest.FixtureRequest) -> None:
    """Nothing is needed."""


# The page, what must be there before it begins, and what runs in the place of a command.
RUN: dict[str, tuple[Callable[[Path, pytest.FixtureRequest], None], dict[str, str]]] = {
    "command-line": (
        before_command_line,
        {
            # It would listen until it is stopped; and a machine has one port 8400.
            "streamcrypt kms serve --port 8400": "streamcrypt kms serve --port 0 & sleep 1; kill $!; wait $! || true",
            "streamcrypt demo --size 1GiB --keep": "streamcrypt demo --size 2MiB --keep",
            "streamcrypt demo\n": "streamcrypt demo --size 2MiB\n",
        },
    ),
    "object-stores": (before_object_stores, {}),
    "benchmarks": (
        before_benchmarks,
        {
            "ratios.py --rounds 5": "ratios.py --rounds 1 startup",
            "=benchmarks/baselines": "=$BASELINES",
            "test_engine.py": "test_engine.py -k derive --benchmark-max-time=0.01 --benchmark-min-rounds=1",
            "median:15%": "median:100000%",  # another moment, another figure
            "test_peers.py": "test_peers.py -k 'documented or Tink'",
        },
    ),
    "planning": (before_planning, {}),
    "provenance": (before_planning, {}),
    "index": (before_planning, {}),
    "sagemaker": (before_sagemaker, {}),
    "format": (before_nothing, {}),
    "threat-model": (before_nothing, {}),
}
CHANGE_THE_PROCESS = {"threat-model"}


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", RUN)
def test_the_page_runs(
    name: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    before, instead = RUN[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # demo --keep
    before(tmp_path, request)
    run_page(PAGES[name], Path.cwd(), instead=instead, children=name in CHANGE_THE_PROCESS)


@pytest.mark.timeout(300)
def test_figures_of_another_machine_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytest_benchmark", reason="PYTEST-BENCHMARK IS MISSING: its commands were not run")
    (kept,) = (ROOT / "benchmarks" / "baselines").glob("*/*.json")
    stored = json.loads(kept.read_text())
    stored["machine_info"]["cpu"]["brand_raw"] = "another"
    from pytest_benchmark.utils import get_machine_id

    folder = tmp_path / get_machine_id()  # where it looks for those of this system and Python
    folder.mkdir()
    (folder / kept.name).write_text(json.dumps(stored))
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    words = (
        "-k derive --benchmark-only --benchmark-max-time=0.01 --benchmark-min-rounds=1 --benchmark-compare"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "benchmarks/test_engine.py"), "-c", str(ROOT / "pyproject.toml"),
         "--rootdir", str(ROOT), "-p", "no:xdist", "-p", "no:cacheprovider",
         *words.split(), "--benchmark-storage=."],
        cwd=tmp_path, env={**os.environ, "STREAMCRYPT_BENCH_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "machine_info is different" in done.stderr


def test_the_sweep_on_the_performance_page_is_one(tmp_path: Path) -> None:
    from streamcrypt.bench import sweep

    (block,) = [block for block in blocks_of(PAGES["performance"]) if block.language == "toml"]
    (tmp_path / "sweep.toml").write_text(block.code)
    assert sweep.from_toml(tmp_path / "sweep.toml").rounds == 5


def test_the_performance_page_has_every_axis() -> None:
    from dataclasses import fields

    from streamcrypt.bench.records import Cell

    page = (ROOT / "docs" / "performance.md").read_text()
    axes = page[page.index("The axes, each") : page.index("What cannot be measured")]
    assert set(re.findall(r"`(\w+)`", axes)) >= {field.name for field in fields(Cell)}
