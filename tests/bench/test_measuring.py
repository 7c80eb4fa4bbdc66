"""Real runs of small cells, in real child processes; and the shaped KMS."""

import dataclasses
import json
import sys
import threading

import pytest

from streamcrypt.bench import data, latency, sweep
from streamcrypt.bench.measure import Bench, MeasureError
from streamcrypt.bench.records import Cell, RecordsError, read, this_machine
from streamcrypt.bench.s3server import S3Server
from streamcrypt.bench.shaped import ShapedKms
from streamcrypt.kms import open_service
from streamcrypt.kms.errors import KmsError

SMALL = Cell(files=6, file_size=50_000, frame_size=16384, storage="disk")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with Bench(tmp_path_factory.mktemp("bench"), timeout=60) as made:
        yield made


OPERATIONS = {
    "encrypt": (SMALL, {"GenerateDataKey": 1}),
    "decrypt": (dataclasses.replace(SMALL, operation="decrypt", workers=2), {"Decrypt": 1}),
    "verify, two messages a key": (
        dataclasses.replace(SMALL, operation="verify", cache_max_messages=2), {"Decrypt": 4},
    ),
    "rekey": (dataclasses.replace(SMALL, operation="rekey"), {"Decrypt": 1, "GenerateDataKey": 1}),
    "read": (dataclasses.replace(SMALL, operation="read"), {"Decrypt": 1}),
    # Six files and the manifest.
    "encrypt, no cache": (dataclasses.replace(SMALL, cache=False, signed=True), {"GenerateDataKey": 7}),
    "encrypt, two messages a key": (dataclasses.replace(SMALL, cache_max_messages=2), {"GenerateDataKey": 4}),
}  # fmt: skip


def test_a_run_says_what_the_kernel_took(bench):
    record = bench.run(dataclasses.replace(SMALL, files=32, file_size=1 << 20, workers=2))
    assert 0 < record.kernel_cpu_s < record.cpu_s
    assert record.faults > 0
    assert record.waits > 0
    assert record.preemptions >= 0


@pytest.mark.parametrize(("cell", "calls"), OPERATIONS.values(), ids=OPERATIONS)
def test_a_run_counts_what_it_did(bench, cell, calls):
    record = bench.run(cell, session="test", round_number=2)
    assert record.error is None
    assert record.kms_calls == calls
    assert record.wall_s > 0
    assert record.cell == cell
    assert (record.session, record.round) == ("test", 2)
    assert len(record.kms_latency_ms) == sum(calls.values())
    assert record.peak_rss > 10_000_000
    assert 0 < record.parent_cpu_s <= record.cpu_s
    assert 0 <= record.kernel_cpu_s <= record.cpu_s
    assert 0 <= record.major_faults <= record.faults
    assert set(record.yardstick_s) == {"copy", "read", "cipher"}
    assert all(seconds > 0 for seconds in record.yardstick_s.values())
    if cell.operation != "read":
        assert record.bytes_in == cell.files * cell.file_size
        assert record.files == cell.files


def test_the_latency_that_was_asked_for_is_met(bench):
    cell = dataclasses.replace(SMALL, cache_max_messages=1, kms_latency=0.03)
    record = bench.run(cell)
    assert record.error is None
    assert record.wall_s > 7 * 0.03 * 0.6
    assert 0.02 < record.kms_wait_s / record.calls < 0.06


# Six files; two messages a key where there is a cache; two workers are two processes with a cache each.
ENGINES = {
    "sdk encrypt": (1, {"GenerateDataKey": 6}),
    "sdk-tuned encrypt": (2, {"GenerateDataKey": 4}),
    "sdk-tuned decrypt": (1, {"Decrypt": 3}),
    "cp encrypt": (2, {}),
    "copy decrypt": (1, {}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_another_engine_is_a_cell_of_the_same_sweep(bench, name):
    engine, operation = name.split()
    workers, calls = ENGINES[name]
    if engine.startswith("sdk"):
        pytest.importorskip("aws_encryption_sdk", reason="THE OFFICIAL SDK IS MISSING: no cell of it was run")
    record = bench.run(
        dataclasses.replace(SMALL, engine=engine, operation=operation, workers=workers, cache_max_messages=2)
    )
    assert record.error is None
    assert record.kms_calls == calls
    assert len(record.kms_latency_ms) == sum(calls.values())
    assert (record.bytes_in, record.files) == (300_000, 6)
    sealed = engine.startswith("sdk") and operation == "encrypt"
    assert (300_000 < record.bytes_out < 310_000) if sealed else record.bytes_out == 300_000
    assert record.wall_s > 0
    assert set(record.yardstick_s) == {"copy", "read", "cipher"}


def test_a_kms_that_fails_now_and_then_is_asked_again_and_counted(bench):
    record = bench.run(dataclasses.replace(SMALL, files=4, cache_max_messages=1, kms_errors=0.4))
    assert record.error is None
    assert record.kms_calls == {"GenerateDataKey": 5}
    assert record.throttled >= 1
    assert 0 <= record.throttled - record.kms_failed <= 1


@pytest.mark.parametrize("operation", ["encrypt", "decrypt", "verify"])
def test_a_cell_in_an_object_store(bench, operation):
    pytest.importorskip("obstore", reason="OBSTORE IS MISSING: no cell was run in a store")
    latency = 0.03
    cell = dataclasses.replace(SMALL, storage="store", operation=operation, store_latency=latency)
    record = bench.run(cell)
    assert record.error is None
    assert record.bytes_in == 300_000
    # One worker: what is in flight at once is less than two requests a file.
    assert record.wall_s > 2 * latency
    assert record.yardstick_s["copy"] > 6 * 2 * latency
    assert record.yardstick_s["read"] > 6 * latency


def test_a_stores_bandwidth_is_that_of_a_request():
    import http.client
    import time

    server = S3Server(bandwidth=1_000_000)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        connection = http.client.HTTPConnection(*server.server_address)
        for method, body in (("PUT", bytes(300_000)), ("GET", None)):
            started = time.perf_counter()
            connection.request(method, "/bucket/key", body)
            assert len(connection.getresponse().read()) == (0 if body else 300_000)
            assert time.perf_counter() - started > 0.29
        connection.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_epoch_by_open(bench):
    cell = dataclasses.replace(SMALL, operation="epoch", reader="open", workers=2)
    record = bench.run(cell)
    assert record.error is None
    assert (record.kms_calls, record.bytes_in) == ({"Decrypt": 1}, 300_000)
    assert record.yardstick == record.yardstick_s["plain"] > 0


REFUSED = {
    "an engine that cannot": ({"engine": "cp", "operation": "verify"}, "cp cannot verify"),
    "no engine": ({"engine": "steam"}, "'steam' is not an engine"),
    "an engine in a store": ({"engine": "sdk", "storage": "store"}, "on files"),
    "no operation": ({"operation": "compress"}, "cannot be measured"),
    "no storage": ({"storage": "tape"}, "not a storage"),
    "no reader": ({"operation": "epoch", "reader": "eyes"}, "not a reader"),
    "an epoch in a store": ({"operation": "epoch", "storage": "store"}, "memory or disk"),
    "a loader's own KMS": ({"operation": "epoch", "kms_latency": 0.1}, "not shaped"),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused_by_name(fields, words):
    if fields.get("kms_latency"):
        pytest.importorskip("torch", reason="TORCH IS MISSING")
    cell = dataclasses.replace(SMALL, **fields)
    planned, refused = sweep.possible(sweep.Sweep((SMALL, cell), 2))
    assert planned.cells == (SMALL,)
    assert [found for found, _ in refused] == [cell]
    assert words in refused[0][1]
    with pytest.raises(sweep.SweepError, match=words):
        sweep.possible(sweep.Sweep((cell,), 2))


MISSING = {
    "torch": {"operation": "epoch"}, "obstore": {"storage": "store"}, "aws_encryption_sdk": {"engine": "sdk"},
}  # fmt: skip


@pytest.mark.parametrize("module", MISSING)
def test_what_is_not_installed_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(sweep.SweepError, match=module.replace("_", "-")):
        sweep.possible(sweep.Sweep((dataclasses.replace(SMALL, **MISSING[module]),), 1))


def test_own_sizes_are_those_of_the_files(bench):
    cell = dataclasses.replace(SMALL, files=4, **data.own_sizes("1000+70000"))
    record = bench.run(cell)
    assert record.error is None
    assert (record.bytes_in, record.frames) == (142_000, 2 * 1 + 2 * 5)


def test_a_run_that_takes_too_long_is_a_record_with_an_error(tmp_path):
    with Bench(tmp_path, timeout=0.5) as bench:
        record = bench.run(dataclasses.replace(SMALL, kms_latency=30.0))
    assert record.error == "not done after 0.5 s"
    assert not list(tmp_path.iterdir())


def test_what_fails_in_the_child_is_the_records_error(bench):
    record = bench.run(dataclasses.replace(SMALL, operation="compress"))
    assert record.error is not None
    assert "cannot be measured" in record.error


def test_an_unknown_storage_is_refused(bench):
    with pytest.raises(MeasureError, match="not a storage"):
        bench.run(dataclasses.replace(SMALL, storage="tape"))


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    planned = sweep.Sweep((SMALL, dataclasses.replace(SMALL, frame_size=4096)), 2)
    seen = []

    class Interrupted(Exception):
        pass

    def stop_after_one(done, total, record):
        seen.append(record)
        raise Interrupted

    options = {"work": tmp_path, "yardsticks": False, "attempts": 1}
    with pytest.raises(Interrupted):
        sweep.run(planned, tmp_path / "out", progress=stop_after_one, **options)
    first = (tmp_path / "out" / "runs.jsonl").read_text()
    records = sweep.run(planned, tmp_path / "out", **options)
    assert (tmp_path / "out" / "runs.jsonl").read_text().startswith(first)
    assert len(records.runs) == 4
    assert len({(run.round, run.cell.hash) for run in records.runs}) == 4
    assert read(tmp_path / "out" / "records.parquet") == read(tmp_path / "out")
    again = sweep.run(planned, tmp_path / "out", **options)
    assert again == records


def test_a_line_that_an_interruption_cut_off_is_measured_again(tmp_path):
    planned = sweep.Sweep((SMALL,), 1)
    whole = sweep.run(planned, tmp_path / "out", work=tmp_path, yardsticks=False, attempts=1)
    lines = tmp_path / "out" / "runs.jsonl"
    lines.write_text(lines.read_text()[:-30])
    again = sweep.run(planned, tmp_path / "out", work=tmp_path, yardsticks=False, attempts=1)
    assert len(whole.runs) == len(again.runs) == 1
    assert read(tmp_path / "out") == again


def test_two_versions_are_measured_in_turns(tmp_path):
    """The other version takes 2 s longer to encrypt: more than a loaded machine adds to each of three rounds."""
    import shutil
    from pathlib import Path

    import streamcrypt

    other = tmp_path / "other" / "streamcrypt"
    shutil.copytree(Path(streamcrypt.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "engine" / "run.py").open("a") as file:
        file.write(
            "\n_encrypt = encrypt\n\n\ndef encrypt(job):\n    time.sleep(2)\n    return _encrypt(job)\n"
        )
    planned = sweep.Sweep((SMALL,), 3)
    options = {"work": tmp_path, "attempts": 1}
    old, new = sweep.run_against(planned, other.parent, tmp_path / "out", **options)
    assert [run.error for run in (*old.runs, *new.runs)] == [None] * 6
    assert min(run.wall_s for run in old.runs) > min(run.wall_s for run in new.runs) + 1
    assert sweep.run_against(planned, other.parent, tmp_path / "out", **options) == (old, new)


def test_a_baseline_that_is_no_commit_is_refused():
    with pytest.raises(sweep.SweepError, match="no-such-branch"), sweep.checkout("no-such-branch"):
        pass


def test_a_folder_of_another_machine_is_refused(tmp_path):
    other = dataclasses.replace(this_machine(), cpu="Another")
    (tmp_path / "machine.json").write_text(json.dumps({"schema": 1, "machine": other.to_json()}))
    with pytest.raises(RecordsError, match="Another"):
        sweep.run(sweep.Sweep((SMALL,), 1), tmp_path)


def test_a_budget_of_nothing_measures_nothing(tmp_path):
    ticks = iter(range(100))
    records = sweep.run(sweep.Sweep((SMALL,), 3), tmp_path, budget=0.5, clock=lambda: float(next(ticks)))
    assert records.runs == ()


class Hands:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = 0.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def service(home):
    return open_service(home)


def test_a_shaped_kms_has_its_mean_latency(service):
    hands = Hands()
    key = service.create_key()["KeyMetadata"]["KeyId"]
    kms = ShapedKms(service, latency=0.02, seed=4, clock=hands.clock, sleep=hands.sleep)
    for _ in range(300):
        kms.generate_data_key(KeyId=key, KeySpec="AES_256")
    assert sum(kms.samples) / 300 == pytest.approx(0.02, rel=0.05)
    assert kms.waited == pytest.approx(sum(kms.samples))
    assert kms.calls == {"generate_data_key": 300}


def test_a_shaped_kms_keeps_its_quota(service):
    hands = Hands()
    key = service.create_key()["KeyMetadata"]["KeyId"]
    kms = ShapedKms(service, quota=10, clock=hands.clock, sleep=hands.sleep)
    answered = 0
    codes = set()
    for _ in range(100):  # ten seconds at ten questions a second more than the bucket holds
        for _ in range(2):
            try:
                kms.generate_data_key(KeyId=key, KeySpec="AES_256")
                answered += 1
            except KmsError as error:
                codes.add(error.code)
        hands.sleep(0.1)
    assert codes == {"ThrottlingException"}
    assert 105 <= answered <= 111
    assert kms.throttled == 200 - answered


def test_closed_loop_latency():
    result = latency.measure("local", latency=0.01, threads=2, seconds=30, max_calls=21)
    assert result["loop"] == "closed"
    assert result["calls"] == 20  # and the first, which opens
    assert 5 < result["service_ms"]["p50"] < 1000
    assert result["failed"] == 0


@pytest.mark.parametrize("rate", [None, 100.0])
def test_calls_that_fail_are_a_share_of_all(rate):
    result = latency.measure("local", errors=0.3, rate=rate, seconds=10, max_calls=90, threads=2)
    refused = result["throttled"] + result["failed"]
    assert result["calls"] + refused in (result["started"], result["started"] - 1)  # the first one opens
    assert 0.1 < result["refused_share"] < 0.5
    assert result["refused_share"] == pytest.approx(refused / (refused + result["calls"]))
    assert result["failed"] > 0


def test_an_open_loop_shows_what_a_closed_one_omits():
    """One slow service, asked faster than it answers: service time stays, response time grows."""
    lock = threading.Lock()

    class OneAtATime:
        def generate_data_key(self, **_):
            with lock:
                threading.Event().wait(0.02)

    one = OneAtATime().generate_data_key
    closed = latency.drive(one, threads=1, seconds=0.6)
    opened = latency.drive(one, rate=100, seconds=0.6)
    assert closed["response_ms"]["p50"] < 2 * closed["service_ms"]["p50"]
    # 60 calls that were due within 0.6 s take 1.2 s at least.
    assert opened["calls"] == 60
    assert opened["response_ms"]["max"] > 590
    assert opened["response_ms"]["p99"] > 4 * closed["response_ms"]["p50"]


def test_a_hard_stop_of_calls():
    assert latency.measure("local", seconds=5, max_calls=8)["calls"] == 7  # and the first, which opens


def test_moto_answers():
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    result = latency.measure("moto", threads=1, seconds=30, max_calls=8)
    assert result["calls"] == 7
    assert result["failed"] == 0


def test_a_client_of_aws_is_measured_within_its_calls(monkeypatch):
    """boto3's own client, by the settings that AWS's tools take; moto's server stands for AWS."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL_KMS": f"http://{host}:{port}", "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        client = boto3.client("kms")
        key = client.create_key()["KeyMetadata"]["KeyId"]
        client.close()
        closed = latency.measure("aws", key=key, max_calls=6, threads=1)
        opened = latency.measure("aws", key=key, max_calls=6, rate=50)
    finally:
        server.stop()
    assert (closed["calls"], opened["calls"]) == (5, 5)
    assert (closed["failed"], opened["failed"]) == (0, 0)


def test_kms_serve_answers(home, monkeypatch):
    import subprocess
    import sys

    command = [sys.executable, "-m", "streamcrypt", "kms"]
    said = subprocess.run([*command, "env", "--json"], check=True, capture_output=True, text=True)
    for name, value in json.loads(said.stdout).items():
        if "ACCESS_KEY" in name:
            monkeypatch.setenv(name, value)
    server = subprocess.Popen([*command, "serve", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()
        closed = latency.measure(url, threads=2, seconds=30, max_calls=8)
        opened = latency.measure(url, rate=40, seconds=0.5)
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert closed["calls"] == 7
    assert opened["calls"] + opened["throttled"] == 20
    assert (closed["failed"], opened["failed"]) == (0, 0)


def test_a_kms_that_is_none_is_refused():
    with pytest.raises(latency.NoSuchKmsError, match="not a KMS"):
        latency.measure("nothing")
    with pytest.raises(latency.NoSuchKmsError, match="--key"):
        latency.measure("aws", max_calls=1)


def test_what_ran_on_a_disk_is_emptied_and_removed_at_the_end(tmp_path):
    """Inodes that it frees would make files dearer for the next ones: an ext4 without a journal passes over them."""
    cell = Cell(files=3, file_size=10_000, storage="disk")
    with Bench(tmp_path, yardsticks=False) as bench:
        assert bench.run(cell).error is None
        (place,) = tmp_path.iterdir()
        (aside,) = place.glob("run-*")
        sealed = sorted((aside / "target").glob("*.bin"))
        assert [path.stat().st_size for path in sealed] == [0, 0, 0]
        assert bench.run(cell).error is None
        assert len(list(place.glob("run-*"))) == 2
    assert not list(tmp_path.iterdir())
