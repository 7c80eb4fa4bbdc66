"""A Ray cluster: two one-core nodes against one, and what the cluster costs against the local engine.

    python -m pytest benchmarks/test_ray.py -s -p no:xdist

Nodes are real ones, on this machine, each kept to one core; the driver is connected and the workers
are warm, except in the row that says otherwise.  Variants in a shuffled order within each round,
median of the ratios (benchmarks/ratios.py).  Every timed run writes to a new folder, and begins when
the disk has taken what the one before left (``Targets``).  ``STREAMCRYPT_RAY_MB`` (2048),
``STREAMCRYPT_RAY_ROUNDS`` (5), ``STREAMCRYPT_BENCH_DIR``; ``STREAMCRYPT_RAY_RECORDS``: what `bench
calibrate` measured, to hold the plan's prediction against.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ratios import rounds_of, show
from suite.common import MiB, key_reference, make_files, remove, wait_for_rest, workspace

import streamcrypt as sc
from streamcrypt.bench import records as measured_records
from streamcrypt.engine import remote
from streamcrypt.plan import REFERENCE, predict

ray = pytest.importorskip("ray")
clusters = pytest.importorskip("families.clusters")

MEGABYTES = int(os.environ.get("STREAMCRYPT_RAY_MB", "2048"))
ROUNDS = int(os.environ.get("STREAMCRYPT_RAY_ROUNDS", "5"))
FILE = 4 * MiB

pytestmark = [
    pytest.mark.timeout(0),
    *(pytest.mark.filterwarnings(warning) for warning in clusters.WARNINGS),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two nodes of one core each, and a head that does no work."""
    cores = sorted(os.sched_getaffinity(0))
    with workspace() as home, clusters.ray_cluster({"STREAMCRYPT_HOME": str(home)}) as made:
        made.cores = cores[:2]
        for core in made.cores:
            os.sched_setaffinity(0, {core})
            clusters.add_node(made)
        os.sched_setaffinity(0, set(cores))
        yield made


class Targets:
    """Where timed runs write: nothing of the run before is in the way of the next.

    ext4 gives no inode away again within minutes of its deletion, and whoever makes files where others
    were deleted steps over each of them; pages that are not yet written back slow the next writer, up
    to a stop.  So each run gets a folder and names of its own, and begins when the disk is at rest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._top: Path | None = None
        self.out = folder

    def renew(self, _: str = "") -> None:
        if self._top is not None:
            remove(self._top)
        self._number += 1
        self._top = self._folder / f"run-{self._number}"
        self._top.mkdir()
        self.out = self._top / f"out-{self._number}"
        wait_for_rest()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[tuple[Path, str, Targets]]:
    with workspace() as folder:
        make_files(folder / "source", MEGABYTES * MiB // FILE, FILE)
        yield folder, key_reference(folder), Targets(folder)


@contextlib.contextmanager
def held(cluster: object) -> Iterator[None]:
    """One of the two nodes is busy with something else."""

    @ray.remote(num_cpus=1)
    def hold(path: str) -> None:
        open(path, "w").close()
        while os.path.exists(path):
            time.sleep(0.01)

    flag = Path(os.environ["RAY_TMPDIR"]) / "held"
    task = hold.remote(str(flag))
    while not flag.exists():
        time.sleep(0.01)
    try:
        yield
    finally:
        flag.unlink()
        ray.get(task)


def header() -> None:
    print("\n| what | median | least to greatest | to reach | figures |\n| --- | --- | --- | --- | --- |")


def test_two_nodes_against_one(cluster: object, job: tuple[Path, str, Targets]) -> None:
    folder, key, targets = job
    encrypted = folder / "encrypted"
    sc.encrypt(folder / "source", encrypted, keys=key, fsync=False)

    def encrypt() -> object:
        return sc.encrypt(folder / "source", targets.out, keys=key, fsync=False, engine="ray")

    def decrypt() -> object:
        return sc.decrypt(encrypted, targets.out, keys=key, fsync=False, engine="ray")

    def of_one(work: object) -> None:
        with held(cluster):
            started = time.perf_counter()
            work()  # type: ignore[operator]
            alone[work.__name__] = time.perf_counter() - started  # type: ignore[attr-defined]

    alone: dict[str, float] = {}
    header()
    for work in (encrypt, decrypt):
        ones = []

        def one(work: object = work, ones: list[float] = ones) -> None:
            of_one(work)
            ones.append(alone[work.__name__])  # type: ignore[attr-defined]

        measured = rounds_of({"two": work, "one": one}, ROUNDS, targets.renew)
        for seconds, single in zip(measured, ones[1:], strict=True):
            seconds["one"] = single  # without the waiting for the other node to be taken
        note = ", ".join(
            f"{name} {MEGABYTES * MiB / statistics.median(s[name] for s in measured) / 1e9:.2f} GB/s"
            for name in ("one", "two")
        )
        show(
            f"{work.__name__}, two one-core nodes: × one",
            "1.8",
            measured,
            lambda s: s["one"] / s["two"],
            note,
        )


def test_overhead_against_the_local_engine(cluster: object, job: tuple[Path, str, Targets]) -> None:
    folder, key, targets = job
    encrypted = folder / "encrypted"
    sc.encrypt(folder / "source", encrypted, keys=key, fsync=False)
    source = folder / "source"

    def command(*words: str) -> None:
        words = ("encrypt", str(source), str(targets.out), "--key", key, "--no-fsync", "--quiet", *words)
        subprocess.run([sys.executable, "-m", "streamcrypt", *words], check=True, stderr=subprocess.DEVNULL)

    address = cluster.address  # type: ignore[attr-defined]
    rows = {
        "encrypt": (
            lambda: sc.encrypt(source, targets.out, keys=key, fsync=False, workers=2),
            lambda: sc.encrypt(source, targets.out, keys=key, fsync=False, engine="ray"),
        ),
        "decrypt": (
            lambda: sc.decrypt(encrypted, targets.out, keys=key, fsync=False, workers=2),
            lambda: sc.decrypt(encrypted, targets.out, keys=key, fsync=False, engine="ray"),
        ),
        "verify": (
            lambda: sc.verify(encrypted, keys=key, workers=2),
            lambda: sc.verify(encrypted, keys=key, engine="ray"),
        ),
        "the command encrypt, cold": (
            lambda: command("--workers", "2"),
            lambda: command("--engine", "ray", "--address", address),
        ),
    }
    header()
    for name, (local, by_ray) in rows.items():
        variants = {"local": local, "ray": by_ray}
        measured = rounds_of(variants, min(3, ROUNDS) if "cold" in name else ROUNDS, targets.renew)
        note = ", ".join(
            f"{n} {MEGABYTES * MiB / statistics.median(s[n] for s in measured) / 1e9:.2f} GB/s"
            for n in variants
        )
        target = "–" if "cold" in name else "at most 1.10"
        if "cold" in name:
            more = statistics.median(s["ray"] - s["local"] for s in measured)
            note += f"; {more:.1f} s more (START of plan/cluster.py)"
        what = f"{name}, {MEGABYTES} MiB on two one-core nodes: × the local time"
        show(what, target, measured, lambda s: s["ray"] / s["local"], note)


def test_lists_for_each_cpu(cluster: object, job: tuple[Path, str, Targets]) -> None:
    """How long lists should be: LISTS of engine/remote.py."""
    folder, key, targets = job

    def encrypt(lists: int) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remote, "LISTS", lists)
            return sc.encrypt(folder / "source", targets.out, keys=key, fsync=False, engine="ray")

    local = {"local": lambda: sc.encrypt(folder / "source", targets.out, keys=key, fsync=False, workers=2)}
    variants = {str(lists): functools.partial(encrypt, lists) for lists in (4, 8, 16)}
    measured = rounds_of({**local, **variants}, max(1, ROUNDS // 2), targets.renew)
    header()
    for name in variants:
        show(
            f"encrypt, {name} lists for each CPU: × the local time",
            "–",
            measured,
            lambda s, n=name: s[n] / s["local"],
        )


def test_hand_over(cluster: object, tmp_path: Path) -> None:
    """Seconds of the driver for a list of nothing: plan/cluster.py's HAND_OVER."""
    (tmp_path / "f").touch()
    from streamcrypt.engine.spans import FileTask
    from streamcrypt.engine.worker import Setup
    from streamcrypt.keys.calls import KmsStats
    from streamcrypt.storage import LocalTree

    pool = remote.RayPool(
        ray, Setup(LocalTree(str(tmp_path)), None), remote.Access(None, None), KmsStats(), lambda *_: None
    )
    for count in (100, 2_000):  # the first ones warm up
        started = time.perf_counter()
        for number in range(count):
            while not pool.has_room:
                pool.collect()
            pool.submit([FileTask(number, "f", None, 0)])
        while pool.busy:
            pool.collect()
        seconds = time.perf_counter() - started
    pool.close()
    print(f"\na list of nothing: {seconds / 2_000 * 1e3:.2f} ms")


def test_the_plan_of_a_cluster(cluster: object, job: tuple[Path, str, Targets]) -> None:
    folder, key, targets = job
    records = measured_records.read(Path(os.environ.get("STREAMCRYPT_RAY_RECORDS", REFERENCE)))
    total, files = MEGABYTES * MiB, MEGABYTES * MiB // FILE
    in_memory = folder.stat().st_dev == os.stat("/dev/shm").st_dev
    planned = predict.Job(
        bytes=total, files=files, hosts=2, workers=1, cores=1, engine="ray", fsync=False, kms_latency=0.0,
        kms_quota=1e9, storage="memory" if in_memory else "disk",
    )  # fmt: skip
    run = {"ray": lambda: sc.encrypt(folder / "source", targets.out, keys=key, fsync=False, engine="ray")}
    measured = rounds_of(run, ROUNDS, targets.renew)
    found = predict.predict(planned, records)
    seconds = found.estimate.seconds - predict.cluster.START  # the workers are warm
    header()
    show(
        "encrypt on two one-core nodes: predicted × measured",
        "0.8 to 1.2",
        measured,
        lambda s: seconds / s["ray"],
        f"predicted {seconds:.2f} s, interval {found.interval[0]:.2f} to {found.interval[1]:.2f} s with the start, "
        f"rates of {records.machine.name}",
    )
