"""Calls to a KMS: pacing under a quota, outages, statistics, logs."""

from __future__ import annotations

import datetime
import heapq
import io
import ipaddress
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from families.clock import Clock
from families.keyring import CONTEXT, UNSIGNED

from streamcrypt.errors import KeyAccessError, KeyUnavailableError
from streamcrypt.keys.calls import DEADLINE, KmsCalls, KmsStats, Pace, pace_of
from streamcrypt.keys.kms import KmsKeyring
from streamcrypt.keys.reference import aws_calls, encrypting_keyring
from streamcrypt.kms import KmsError, open_service
from streamcrypt.kms.server import Server
from streamcrypt.kms.service import Service
from streamcrypt.kms.simulation import Simulation, constant

ARN = "arn:aws:kms:local:000000000000:key/11111111-2222-3333-4444-555555555555"


# A quota, simulated: events in time order, no threads, no waiting


class Quota:
    """A token bucket, as a service keeps it."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.tokens, self.filled = rate, burst, burst, None

    def admit(self, now: float) -> bool:
        if self.filled is not None:
            self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


def simulate(
    *, rate: float, burst: float, threads: int, seconds: float, latency: float, change: float | None = None
):
    """Threads that call without a pause; attempts, successes, and the time each success took."""
    clock = Clock(0.0)
    pace, quota = Pace(clock), Quota(rate, burst)
    serial = itertools.count()
    attempts, successes, waits = 0, [], []
    events: list = [(0.0, next(serial), "ask", thread, 0.0) for thread in range(threads)]
    heapq.heapify(events)
    due = None  # when the next turn is looked at
    queue: deque = deque()  # threads that wait for a turn, in order
    while events:
        now, _, kind, thread, asked = heapq.heappop(events)
        if now > seconds:
            break
        clock.now = now
        if change is not None and now > seconds / 2:
            quota.rate = change
        if kind == "ask":
            queue.append((thread, asked))
        elif kind == "turn":
            due = None
        if kind in ("ask", "turn"):
            while queue and pace.slot() <= now:
                pace.take()
                thread, asked = queue.popleft()
                attempts += 1
                kind = "answer" if quota.admit(now) else "throttle"
                heapq.heappush(events, (now + latency, next(serial), kind, thread, asked))
            if queue and due != pace.slot():
                due = pace.slot()
                heapq.heappush(events, (max(now, due), next(serial), "turn", -1, 0.0))
        elif kind == "throttle":
            pace.throttled(now - latency)
            heapq.heappush(events, (now + 0.05, next(serial), "ask", thread, asked))
        else:
            pace.succeeded(now - latency)
            successes.append(now)
            waits.append(now - asked)
            heapq.heappush(events, (now, next(serial), "ask", thread, now))
    return attempts, successes, sorted(waits)


@pytest.mark.parametrize("burst", [1, 5, 50, 200])
@pytest.mark.parametrize(("rate", "latency"), [(50, 0.02), (50, 0.2), (500, 0.005)])
def test_a_quota_is_used_and_seldom_exceeded(rate, latency, burst):
    """At least 95 % of the quota, at most 1.1 attempts for a success, p99 under 2 s, with 32 threads."""
    seconds = 60.0
    attempts, successes, waits = simulate(
        rate=rate, burst=burst, threads=32, seconds=seconds, latency=latency
    )
    possible = min(rate, 32 / latency) * seconds
    slow = latency > 0.1  # what is learnt is learnt late
    assert len(successes) >= (0.9 if slow else 0.95) * possible
    assert attempts <= (1.15 if slow else 1.1) * len(successes)
    assert waits[int(0.99 * len(waits))] < max(2.0, 2 * 32 / rate)


def test_a_quota_that_falls_and_one_that_rises():
    for first, second in ((200, 50), (50, 200)):
        attempts, successes, _ = simulate(
            rate=first, burst=10, threads=32, seconds=60, latency=0.02, change=second
        )
        late = [moment for moment in successes if moment > 45]
        assert len(late) >= 0.85 * second * 15
        assert attempts <= 1.1 * len(successes)


def test_without_a_quota_nothing_waits():
    clock = Clock()
    pace = Pace(clock)
    for _ in range(1000):
        assert pace.slot() <= clock.now
        pace.take()
        pace.succeeded(clock.now)


# The real thing: threads, the embedded KMS with a quota


@pytest.mark.parametrize(
    "seconds", [4, pytest.param(30, marks=pytest.mark.campaign)], ids=["short", "campaign"]
)
def test_threads_at_a_quota_of_50(home, seconds):
    """32 threads at a quota of 50 calls a second: nothing fails, the quota is used."""
    service = open_service(home)
    arn = service.create_key()["KeyMetadata"]["Arn"]
    throttling = Service(service.store, simulation=Simulation(latency=constant(0.01), rate=50, burst=5))
    stats = KmsStats()
    keyring = KmsKeyring(throttling, arn, stats=stats)
    end = time.monotonic() + seconds

    def work(_) -> int:
        done = 0
        while time.monotonic() < end:
            keyring.generate(UNSIGNED, {})
            done += 1
        return done

    started = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        done = sum(pool.map(work, range(32)))
    rate = done / (time.monotonic() - started)
    allowed = 1.35 if seconds < 10 else 1.1  # the first second finds the quota out
    assert rate >= (0.8 if seconds < 10 else 0.95) * 50
    assert stats.calls["GenerateDataKey"] <= allowed * done
    assert stats.throttled == stats.calls["GenerateDataKey"] - done


# Outages, with time as a parameter


class Timeline(Clock):
    """A clock whose sleep moves it, and whose pace waits by it."""

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FlakyKms:
    """Fails as it is told, then works."""

    def __init__(self, failures) -> None:
        self.failures = list(failures)
        self.calls = 0

    def decrypt(self, **request):
        raise AssertionError

    def generate_data_key(self, *, KeyId, NumberOfBytes, **request):
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return {"KeyId": KeyId, "Plaintext": bytes(NumberOfBytes), "CiphertextBlob": b"blob"}


class TimedPace(Pace):
    """A pace that waits on a Timeline."""

    def __init__(self, clock: Timeline) -> None:
        super().__init__(clock)
        timeline = clock

        class Condition(threading.Condition().__class__):
            def wait(self, timeout=None):
                timeline.now += timeout
                return False

        self._condition = Condition(threading.Lock())


def calls_to(kms, timeline: Timeline) -> KmsCalls:
    calls = KmsCalls(kms, clock=timeline, sleep=timeline.sleep)
    _ = calls.client
    calls._pace = TimedPace(timeline)
    return calls


FAULTS = [
    "ThrottlingException",
    "KMSInternalException",
    "DependencyTimeoutException",
    "KeyUnavailableException",
]


@pytest.mark.parametrize("code", FAULTS)
def test_passing_faults_are_retried(code):
    kms = FlakyKms([KmsError(code)] * 4)
    calls = calls_to(kms, Timeline())
    data_key, _ = KmsKeyring(calls, ARN).generate(UNSIGNED, {})
    assert data_key == bytes(32)
    assert kms.calls == 5
    assert calls.stats.retries == 4
    assert calls.stats.throttled == (4 if code == "ThrottlingException" else 0)


@pytest.mark.parametrize("code", FAULTS)
def test_a_deadline_ends_the_retries(code):
    timeline = Timeline()
    kms = FlakyKms([KmsError(code)] * 100_000)
    started = timeline.now
    with pytest.raises(KeyUnavailableError) as caught:
        KmsKeyring(calls_to(kms, timeline), ARN).generate(UNSIGNED, {})
    assert timeline.now - started <= DEADLINE + 1
    assert (caught.value.code, caught.value.operation) == (code, "GenerateDataKey")
    assert kms.calls < 300


@pytest.mark.parametrize(
    "code",
    ["AccessDeniedException", "DisabledException", "NotFoundException", "KMSInvalidStateException",
     "InvalidKeyUsageException", "ValidationException", "LimitExceededException", "SomethingNewException"],
)  # fmt: skip
def test_refusals_are_not_retried(code):
    kms = FlakyKms([KmsError(code, "text")])
    with pytest.raises(KeyAccessError) as caught:
        KmsKeyring(calls_to(kms, Timeline()), ARN).generate(UNSIGNED, {})
    assert not isinstance(caught.value, KeyUnavailableError)
    assert caught.value.code == code
    assert kms.calls == 1


def test_after_a_long_outage_calls_fail_at_once_until_a_probe_succeeds():
    timeline = Timeline()
    kms = FlakyKms([KmsError("KMSInternalException")] * 100_000)
    calls = calls_to(kms, timeline)
    keyring = KmsKeyring(calls, ARN)
    with pytest.raises(KeyUnavailableError):
        keyring.generate(UNSIGNED, {})
    timeline.now += 5
    before, calls_before = timeline.now, kms.calls
    for _ in range(50):
        with pytest.raises(KeyUnavailableError):
            keyring.generate(UNSIGNED, {})
    assert timeline.now - before < 60
    assert kms.calls - calls_before < 100
    kms.failures.clear()
    timeline.now += 1
    keyring.generate(UNSIGNED, {})
    for _ in range(50):
        moment = timeline.now
        keyring.generate(UNSIGNED, {})
        assert timeline.now == moment


def test_waiting_threads_go_on_when_the_service_is_back():
    pace = Pace()
    for _ in range(3):
        pace.unreachable()
    threads = [threading.Thread(target=pace.wait, args=(time.monotonic() + 60,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    pace.succeeded(time.monotonic())
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    calls = aws_calls("local", endpoint=f"http://127.0.0.1:{free_port()}")
    calls._deadline = 0.3
    with pytest.raises(KeyUnavailableError, match="could not be reached"):
        KmsKeyring(calls, "alias/one").generate(UNSIGNED, {})


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 500 X\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
def test_half_answers(monkeypatch, answer):
    """A server that breaks off: an outage, not a crash and not a data key."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        calls = aws_calls("local", endpoint=f"http://127.0.0.1:{port}")
        calls._deadline = 0.3
        with pytest.raises(KeyUnavailableError):
            KmsKeyring(calls, "alias/one").generate(UNSIGNED, {})
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


# Credentials and configuration


def test_no_credentials(home, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "no-such-file")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "no-such-file")
    keyring = encrypting_keyring("arn:aws:kms:eu-central-1:111122223333:key/x")
    with pytest.raises(KeyAccessError, match="no AWS credentials"):
        keyring.generate(UNSIGNED, {})
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.delenv("AWS_REGION", raising=False)
    with pytest.raises(KeyAccessError, match="no AWS region"):
        encrypting_keyring("aws:alias/x").generate(UNSIGNED, {})


def test_a_wrong_secret(served, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(KeyAccessError, match="credentials") as caught:
        encrypting_keyring(f"local:alias/one@{served}").generate(UNSIGNED, {})
    assert caught.value.code == "UnrecognizedClientException"


def certificate(folder):
    """A certificate for 127.0.0.1 that signs itself, and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "streamcrypt test")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(signed.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "certificate.pem", folder / "key.pem"


def test_a_certificate_that_nobody_vouches_for(home, tmp_path, monkeypatch):
    service = open_service(home)
    service.create_alias(AliasName="alias/one", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    chain, key = certificate(tmp_path)
    server = Server(service, port=0, certificate=chain, private_key=key)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    try:
        with pytest.raises(KeyAccessError, match="certificate") as caught:
            encrypting_keyring(f"local:alias/one@{server.url}").generate(UNSIGNED, {})
        assert not isinstance(caught.value, KeyUnavailableError)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(chain))
        encrypting_keyring(f"local:alias/one@{server.url}").generate(UNSIGNED, {})
    finally:
        server.stop()
        thread.join(20)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_its_own_client(home):
    made = []

    def connect():
        made.append(os.getpid())
        return open_service(home)

    arn = open_service(home).create_key()["KeyMetadata"]["Arn"]
    keyring = KmsKeyring(KmsCalls(connect), arn)
    data_key, encrypted = keyring.generate(UNSIGNED, {})

    def child(queue) -> None:
        queue.put((keyring.unwrap(UNSIGNED, {}, encrypted) == data_key, made[-1] == os.getpid()))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=240) == (True, True)
    process.join(60)
    assert made == [os.getpid()]


def test_nothing_secret_in_a_debug_log(served, home):
    service = open_service(home)
    service.create_alias(AliasName="alias/one", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        keyring = encrypting_keyring(f"local:alias/one@{served}")
        data_key, _ = keyring.generate(UNSIGNED, CONTEXT)
        encrypted = keyring.wrap(UNSIGNED, CONTEXT, data_key)
        assert keyring.unwrap(UNSIGNED, CONTEXT, encrypted) == data_key
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
    import base64

    text = log.getvalue()
    assert "withheld by streamcrypt" in text
    assert "botocore" in text or "GenerateDataKey" in text
    for form in (base64.b64encode(data_key).decode(), data_key.hex(), repr(data_key)[2:-1]):
        assert form not in text


# Statistics


def test_statistics():
    stats = KmsStats()
    for i in range(1, 101):
        stats.count("Decrypt", float(i), throttled=False, retry=False)
    stats.count("GenerateDataKey", None, throttled=False, retry=True)
    stats.count("GenerateDataKey", 500.0, throttled=True, retry=False)
    assert json.loads(json.dumps(stats.to_json())) == {
        "calls": {"Decrypt": 100, "GenerateDataKey": 2},
        "latency_ms": {"p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 500.0},
        "throttled": 1,
        "retries": 1,
    }


def test_statistics_of_nothing():
    assert KmsStats().to_json()["latency_ms"] == {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}


def test_statistics_add_up_and_travel():
    first, second = KmsStats(), KmsStats()
    first.count("Decrypt", 1.0, throttled=False, retry=False)
    second.count("Decrypt", 3.0, throttled=True, retry=True)
    first.merge(pickle.loads(pickle.dumps(second)))
    found = first.to_json()
    assert found["calls"] == {"Decrypt": 2}
    assert (found["throttled"], found["retries"], found["latency_ms"]["max"]) == (1, 1, 3.0)


def test_samples_are_bounded():
    stats = KmsStats()
    stats.MAX_SAMPLES = 100
    for i in range(10_000):
        stats.count("Decrypt", float(i), throttled=False, retry=False)
    assert len(stats._samples) == 100
    assert stats.to_json()["latency_ms"]["max"] == 9999.0
    assert 2000 < stats.to_json()["latency_ms"]["p50"] < 8000


def test_clients_of_one_endpoint_share_a_pace(home):
    class Client:
        class meta:
            endpoint_url = "https://kms.example.com"

    assert pace_of(Client()) is pace_of(Client())
    service = open_service(home)
    assert pace_of(service) is pace_of(service)
