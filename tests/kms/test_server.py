"""``kms serve``: who is let in, what is listened on, HTTP at its edges, quota and latency on request."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from families.kms import FakeClock, refusal

from streamcrypt.kms import Service, audit, principals
from streamcrypt.kms.errors import KmsError
from streamcrypt.kms.server import Server, authenticate, is_loopback
from streamcrypt.kms.simulation import Simulation, constant, lognormal, observed, parse_latency
from streamcrypt.kms.store import AccessKey, Store

ROOT = principals.principal_arn(None)
NO_RETRIES = Config(retries={"total_max_attempts": 1})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(Store(tmp_path / "home"))
    yield made
    made.close()


def running(service: Service, **options: Any) -> Iterator[Server]:
    server = Server(service, port=0, **options)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda _: ready.set()})
    thread.start()
    assert ready.wait(10)
    yield server
    server.stop()
    thread.join()


@pytest.fixture
def server(service: Service) -> Iterator[Server]:
    yield from running(service)


def client(url: str, key: AccessKey, **options: Any) -> Any:
    return boto3.client(
        "kms",
        endpoint_url=url,
        region_name="local",
        config=NO_RETRIES,
        aws_access_key_id=options.pop("id", key.id),
        aws_secret_access_key=options.pop("secret", key.secret),
        **options,
    )


# -- SigV4 ------------------------------------------------------------------------------------------


def test_a_known_access_key_is_let_in(service: Service, server: Server):
    kms = client(server.url, principals.access_key(service.store, ROOT))
    assert kms.list_keys()["Keys"] == []


def test_the_access_key_is_the_principal(service: Service, server: Server):
    arn = principals.principal_arn("alice")
    policy = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "kms:CreateKey", "Resource": "*"}],
    }
    alice = client(server.url, principals.access_key(service.store, arn, policies=[json.dumps(policy)]))
    key = alice.create_key()["KeyMetadata"]
    assert refusal(alice.describe_key, KeyId=key["KeyId"]) == (
        "AccessDeniedException",
        400,
        f"User: {arn} is not authorized to perform: kms:DescribeKey on resource: {key['Arn']} because no "
        "identity-based policy allows the kms:DescribeKey action",
    )
    assert principals.access_key(service.store, arn).id == principals.access_key(service.store, arn).id


def test_strangers_are_refused(service: Service, server: Server):
    key = principals.access_key(service.store, ROOT)
    unknown = client(server.url, key, id="AKIA" + "A" * 16)
    assert refusal(unknown.list_keys) == (
        "UnrecognizedClientException",
        400,
        "The security token included in the request is invalid.",
    )
    wrong = client(server.url, key, secret="wrong")
    assert refusal(wrong.list_keys) == (
        "InvalidSignatureException",
        400,
        "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
        "Access Key and signing method. Consult the service documentation for details.",
    )


def test_session_credentials(service: Service):
    arn = "arn:aws:sts::000000000000:assumed-role/Trainer/run-1"
    now = datetime.now(UTC).timestamp()
    key = principals.session_key(service.store, arn, expires=now + 60)
    headers, body = signed(key, token=key.session_token)
    assert authenticate(service.store, "POST", "/", headers, body, now)[0].caller.arn == arn
    for changed, when, code in (
        ({"x-amz-security-token": "other"}, now, "UnrecognizedClientException"),
        ({}, now + 61, "ExpiredTokenException"),
    ):
        refused = refusal(authenticate, **arguments(service, headers | changed, body, when))
        assert refused[0] == code


def signed(
    key: AccessKey, *, token: str | None = None, operation: str = "ListKeys"
) -> tuple[dict[str, str], bytes]:
    """The headers and the body of a request, as botocore signs it."""
    body = b"{}"
    request = AWSRequest(
        "POST",
        "http://127.0.0.1:8400/",
        headers={"X-Amz-Target": f"TrentService.{operation}", "Content-Type": "application/x-amz-json-1.1"},
        data=body,
    )
    SigV4Auth(Credentials(key.id, key.secret, token), "kms", "local").add_auth(request)
    headers = {name.lower(): value for name, value in request.headers.items()}
    return headers | {"host": "127.0.0.1:8400"}, body


def arguments(service: Service, headers: dict[str, str], body: bytes, now: float) -> dict[str, Any]:
    return {
        "store": service.store,
        "method": "POST",
        "path": "/",
        "headers": headers,
        "body": body,
        "now": now,
    }


@pytest.mark.parametrize(
    "change", ["body", "target", "host", "date", "region", "unsigned target", "signature"]
)
def test_every_signed_part_counts(service: Service, change: str):
    key = principals.access_key(service.store, ROOT)
    headers, body = signed(key)
    now = datetime.now(UTC).timestamp()
    assert authenticate(**arguments(service, headers, body, now))[1] == "local"
    authorization = headers["authorization"]
    if change == "body":
        body = b'{"Limit": 1}'
    elif change == "target":
        headers["x-amz-target"] = "TrentService.CreateKey"
    elif change == "host":
        headers["host"] = "evil:8400"
    elif change == "date":
        later = datetime.fromtimestamp(now, UTC) + timedelta(seconds=1)
        headers["x-amz-date"] = later.strftime("%Y%m%dT%H%M%SZ")
    elif change == "region":
        headers["authorization"] = authorization.replace("/local/", "/eu-west-1/")
    elif change == "unsigned target":
        headers["authorization"] = authorization.replace(";x-amz-target", "")
    else:
        flipped = "0" if authorization[-1] != "0" else "1"
        headers["authorization"] = authorization[:-1] + flipped
    assert refusal(authenticate, **arguments(service, headers, body, now))[0] == "InvalidSignatureException"


def test_clock_skew_and_malformed_headers(service: Service):
    key = principals.access_key(service.store, ROOT)
    headers, body = signed(key)
    now = datetime.now(UTC).timestamp()
    code, _, text = refusal(authenticate, **arguments(service, headers, body, now + 400))
    assert code == "InvalidSignatureException"
    assert text.startswith("Signature expired: ")
    without = {name: value for name, value in headers.items() if name != "authorization"}
    assert refusal(authenticate, **arguments(service, without, body, now)) == (
        "MissingAuthenticationTokenException",
        400,
        "Missing Authentication Token",
    )
    broken = headers | {"authorization": "AWS4-HMAC-SHA256 Credential=x"}
    code, _, text = refusal(authenticate, **arguments(service, broken, body, now))
    assert code == "IncompleteSignatureException"
    assert "'Signature'" in text


# -- what is listened on -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid"])
def test_no_other_address_without_tls(service: Service, host: str):
    with pytest.raises(ValueError, match="not a loopback address"):
        Server(service, host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback(host: str):
    assert is_loopback(host)


def test_tls(service: Service, tmp_path: Path):
    certificate, private_key = _certificate(tmp_path)
    servers = running(service, host="127.0.0.1", certificate=certificate, private_key=private_key)
    server = next(servers)
    try:
        assert server.url.startswith("https://")
        key = principals.access_key(service.store, ROOT)
        trusting = client(server.url, key, verify=str(certificate))
        assert trusting.list_keys()["Keys"] == []
        (row,) = service.store.query(*audit.Filter(operation="ListKeys").select())
        assert audit.event(row)["tlsDetails"]["tlsVersion"].startswith("TLSv1.")
        context = ssl.create_default_context()
        with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", server.port)) as plain:
            context.wrap_socket(plain, server_hostname="127.0.0.1")
    finally:
        next(servers, None)


def _certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kms")])
    import ipaddress

    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate_file, key_file


# -- HTTP at its edges ------------------------------------------------------------------------------------


def _raw(server: Server, *pieces: bytes) -> bytes:
    """What comes back for bytes that are sent in these pieces, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"POST /other HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/2.0\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nBad Header\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n" + b"X: " + b"x" * 40000, 431),
    ],
)
def test_bad_requests(server: Server, request_bytes: bytes, status: int):
    assert _raw(server, request_bytes).startswith(f"HTTP/1.1 {status} ".encode())


def _request(key: AccessKey, *, close: bool, operation: str = "ListKeys") -> bytes:
    headers, body = signed(key, operation=operation)
    lines = [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}", *(["Connection: close"] if close else [])]
    return ("POST / HTTP/1.1\r\n" + "\r\n".join(lines) + "\r\n\r\n").encode() + body


def test_pipelined_and_dribbled_requests(service: Service, server: Server):
    key = principals.access_key(service.store, ROOT)
    both = _request(key, close=False) + _request(key, close=True)
    assert _raw(server, both).count(b"HTTP/1.1 200 OK") == 2
    dribbled = (both[n : n + 1] for n in range(len(both)))
    assert _raw(server, *dribbled).count(b"HTTP/1.1 200 OK") == 2


def test_slow_and_idle_connections_are_closed(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Server, "request_timeout", 0.2)
    key = principals.access_key(service.store, ROOT)
    whole = _request(key, close=False)
    servers = running(service)
    server = next(servers)
    try:
        assert _raw(server, whole[:-1]).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert _raw(server) == b""
        monkeypatch.setattr(Server, "idle_timeout", 0.6)
        answer = _raw(server, whole)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.count(b"HTTP/1.1") == 1
    finally:
        next(servers, None)


def test_who_does_not_read_is_not_read_from(service: Service, monkeypatch: pytest.MonkeyPatch):
    """A flood of requests whose answers nobody reads takes no more memory than a buffer, and ends."""
    monkeypatch.setattr(Server, "request_timeout", 0.5)
    key = principals.access_key(service.store, ROOT)
    requests = _request(key, close=False, operation="ListAliases") * 100
    servers = running(service)
    server = next(servers)
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(requests)
            assert connection.recv(1)
            (served,) = server.connections  # whose answers the kernel would hold by the megabyte
            served._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            ended = None
            while ended is None:
                try:
                    connection.sendall(requests)
                except OSError as error:
                    ended = error
            assert isinstance(ended, ConnectionError)
        assert len(service.store.query("SELECT id FROM audit")) < 50_000
    finally:
        next(servers, None)


def test_an_unknown_operation_and_bad_json(service: Service, server: Server):
    key = principals.access_key(service.store, ROOT)
    kms = client(server.url, key)

    def set_target(request: Any, **_: Any) -> None:
        request.headers.replace_header("X-Amz-Target", "TrentService.NoSuchThing")

    kms.meta.events.register("before-sign.kms", set_target)
    assert refusal(kms.list_keys)[:2] == ("UnknownOperationException", 400)

    body = b""

    def set_body(request: Any, **_: Any) -> None:
        request.data = body

    kms = client(server.url, key)
    kms.meta.events.register("before-sign.kms", set_body)
    for body in (b"{nonsense", b'{"Limit": 1e999}', b'{"Limit": NaN}', b'{"Limit": 1.5}', b'{"Limit": true}'):
        assert refusal(kms.list_keys)[:2] == ("SerializationException", 400), body


def test_a_lone_surrogate_is_refused(service: Service, server: Server):
    key = principals.access_key(service.store, ROOT)
    kms = client(server.url, key)
    made = kms.create_key()["KeyMetadata"]["KeyId"]
    asked = {"KeyId": made, "Plaintext": b"x", "EncryptionContext": {"a": "\ud800"}}
    assert refusal(kms.encrypt, **asked)[0] == "SerializationException"
    assert kms.list_keys()["Keys"]


def test_what_the_server_fails_at_is_answered(
    service: Service, server: Server, capfd: pytest.CaptureFixture[str]
):
    """No traceback, and the connection goes on: a header that is signed and absent, a secret that was altered."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    bob, root = (
        principals.access_key(service.store, principals.principal_arn(name)) for name in ("bob", None)
    )

    def ask(key: AccessKey, target: str = "TrentService.ListKeys") -> tuple[int, bytes]:
        request = AWSRequest("POST", server.url, headers={"X-Amz-Target": target}, data=b"{}")
        SigV4Auth(Credentials(key.id, key.secret), "kms", "local").add_auth(request)
        headers = {name: value for name, value in request.headers.items() if value}
        connection.request("POST", "/", b"{}", headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    assert ask(root, target="") == (400, b'{"__type": "UnknownOperationException"}')
    with service.store.transaction() as database:
        database.execute("UPDATE access_keys SET sealed = zeroblob(60) WHERE id = ?", (bob.id,))
        service.store.changed()
    assert ask(bob) == (500, b'{"__type": "KMSInternalException"}')
    assert ask(root)[0] == 200
    connection.close()
    assert capfd.readouterr().err == "kms serve: authentication: KeyAccessError\n"


def test_a_response_is_not_cached(service: Service, server: Server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers, body = signed(principals.access_key(service.store, ROOT))
    connection.request("POST", "/", body, headers)
    response = connection.getresponse()
    assert (response.status, response.getheader("Cache-Control")) == (200, "no-store")
    assert len(response.getheader("x-amzn-RequestId") or "") == 36
    connection.close()


# -- quota and latency on request ------------------------------------------------------------------------


def test_throttling(service: Service, server: Server):
    clock = FakeClock()
    service.simulation = Simulation(rate=5, clock=clock)
    kms = client(server.url, principals.access_key(service.store, ROOT))
    for _ in range(5):
        kms.list_keys()
    with pytest.raises(ClientError) as caught:
        kms.list_keys()
    assert caught.value.response["Error"] == {
        "Code": "ThrottlingException",
        "Message": "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.",
    }
    clock.now += 0.2
    kms.list_keys()
    assert service.simulation.throttled == 1


def test_a_share_of_the_calls_fails():
    simulated = Simulation(errors=0.2, seed=3)
    codes = []
    for _ in range(1000):
        try:
            simulated.admit("Decrypt")
        except KmsError as error:
            codes.append(error.code)
    assert 140 < len(codes) < 260
    assert set(codes[::2]) == {"ThrottlingException"}
    assert set(codes[1::2]) == {"KMSInternalException"}
    assert (simulated.throttled, simulated.failed) == (len(codes[::2]), len(codes[1::2]))
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            Simulation(errors=share)


def test_latency():
    slept: list[float] = []
    Simulation(latency=constant(0.25), sleep=slept.append).wait()
    assert slept == [0.25]
    drawn = Simulation(latency=lognormal(0.008, 0.04), seed=1)
    samples = sorted(drawn.draw() for _ in range(4000))
    assert samples[2000] == pytest.approx(0.008, rel=0.1)
    assert samples[3960] == pytest.approx(0.04, rel=0.25)
    assert Simulation(latency=observed([0.5])).draw() == 0.5
    assert Simulation(latency=parse_latency("8ms")).draw() == 0.008
    with pytest.raises(ValueError):
        parse_latency("40ms,8ms")


def test_grants_take_effect_late_unless_the_token_is_shown(service: Service, tmp_path: Path):
    clock = FakeClock()
    slow = Service(service.store, clock=clock, grant_delay=300)
    from streamcrypt.kms import Caller

    bob = Caller(principals.principal_arn("bob"))
    key = slow.create_key()["KeyMetadata"]["Arn"]
    grant = slow.create_grant(KeyId=key, GranteePrincipal=bob.arn, Operations=["Encrypt"])
    request = {"KeyId": key, "Plaintext": b"x"}
    assert refusal(lambda: slow.call("Encrypt", request, caller=bob))[0] == "AccessDeniedException"
    assert slow.call("Encrypt", {**request, "GrantTokens": [grant["GrantToken"]]}, caller=bob)
    clock.now += 301
    assert slow.call("Encrypt", request, caller=bob)
