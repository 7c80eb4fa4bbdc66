"""``kms serve``: the embedded KMS over HTTP, for boto3, the AWS CLI and any AWS SDK.

    connection bytes -> one request -> SigV4 -> wire.answer -> response, the connection kept

One event loop serves all connections.  Operations that take microseconds run in it; those
that wait for the disk or make RSA keys run in a few threads, one request of a connection at a
time.  Requests that are not signed by a known access key never reach the service, and no
address but loopback is listened on without TLS.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from streamcrypt.kms import wire
from streamcrypt.kms.errors import KmsError, refuse
from streamcrypt.kms.policy import Caller
from streamcrypt.kms.service import Service
from streamcrypt.kms.store import AccessKey, Store

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8400

_MAX_HEAD: Final = 32 * 1024
# Twice the largest request that the model allows (a policy of 131,072 characters).
_MAX_BODY: Final = 512 * 1024
_CLOCK_SKEW: Final = 300.0  # seconds; AWS's own limit
_SWEEPS: Final = 4  # looks for connections that are too slow, in the time that a request may take
_SLOW_THREADS: Final = 4

# What is done in microseconds, and so in the event loop.
_QUICK: Final = frozenset(
    wire.TARGET_PREFIX + name
    for name in (
        "Decrypt", "DescribeKey", "Encrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext",
        "GenerateMac", "GenerateRandom", "GetPublicKey", "ReEncrypt", "VerifyMac",
    )
)  # fmt: skip


# -- SigV4 -----------------------------------------------------------------------------------

_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 +Credential=([^/, ]+)/([0-9]{8})/([^/, ]+)/([^/, ]+)/aws4_request, *"
    r"SignedHeaders=([A-Za-z0-9;_-]+), *Signature=([0-9a-f]{64})",
    re.ASCII,
)
_MUST_BE_SIGNED: Final = frozenset({"host", "x-amz-date", "x-amz-target"})


def authenticate(
    store: Store, method: str, path: str, headers: dict[str, str], body: bytes, now: float
) -> tuple[AccessKey, str]:
    """The access key that signed a request, and the Region it was signed for; KmsError otherwise.

    ``headers`` have lower-case names.  AWS Signature Version 4, "Authorization header" form;
    KMS requests have no query string.
    """
    authorization = headers.get("authorization")
    if authorization is None:
        refuse("MissingAuthenticationTokenException", "Missing Authentication Token")
    match = _AUTHORIZATION.fullmatch(authorization)
    if match is None:
        refuse("IncompleteSignatureException", _what_is_missing(authorization))
    key_id, date, region, service, signed, signature = match.groups()
    if service != "kms":
        refuse("InvalidSignatureException", "Credential should be scoped to correct service: 'kms'.")
    key = store.access_key(key_id)
    if key is None:
        refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
    stamp = headers.get("x-amz-date", "")
    _check_time(stamp, date, now)
    names = signed.split(";")
    if not _MUST_BE_SIGNED.issubset(names) or names != sorted(names):
        refuse("InvalidSignatureException", "'Host', 'X-Amz-Date' and 'X-Amz-Target' must be signed headers.")
    if key.session_token is not None or "x-amz-security-token" in headers:
        _check_session(key, headers.get("x-amz-security-token", ""), now)
    canonical = "\n".join(
        (
            method, path, "",
            *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in names),
            "", signed, hashlib.sha256(body).hexdigest(),
        )
    )  # fmt: skip
    scope = f"{date}/{region}/kms/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    expected = hmac.digest(_signing_key(key.secret, date, region), text.encode(), "sha256").hex()
    if not hmac.compare_digest(expected, signature):
        refuse(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided. Check your AWS "
            "Secret Access Key and signing method. Consult the service documentation for details.",
        )
    return key, region


@lru_cache(maxsize=1024)
def _signing_key(secret: str, date: str, region: str) -> bytes:
    key = ("AWS4" + secret).encode()
    for part in (date, region, "kms", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def _what_is_missing(authorization: str) -> str:
    if not authorization.startswith("AWS4-HMAC-SHA256"):
        return "Unsupported AWS 'algorithm'; Authorization must begin with AWS4-HMAC-SHA256."
    missing = [
        name for name in ("Credential", "SignedHeaders", "Signature") if f"{name}=" not in authorization
    ]
    if missing:
        wanted = " ".join(f"Authorization header requires '{name}' parameter." for name in missing)
        return f"{wanted} Authorization={authorization.split(' ')[0]}"
    return "Credential must have the form KEYID/DATE/REGION/SERVICE/aws4_request."


@lru_cache(maxsize=64)
def _seconds(stamp: str) -> float | None:
    """Unix seconds of ``20261124T081500Z``.  Requests of one second share it, and strptime is slow."""
    try:
        return datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _check_time(stamp: str, date: str, now: float) -> None:
    signed_at = _seconds(stamp)
    if signed_at is None:
        refuse(
            "IncompleteSignatureException",
            f"Date must be in ISO-8601 'basic format'. Got '{stamp}'. See http://en.wikipedia.org/wiki/ISO_8601",
        )
    if not stamp.startswith(date):
        refuse(
            "InvalidSignatureException",
            f"Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: "
            f"'{date}' != '{stamp[:8]}', from '{stamp}'.",
        )
    if abs(now - signed_at) > _CLOCK_SKEW:
        here = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
        limit = now - _CLOCK_SKEW if signed_at < now else now + _CLOCK_SKEW
        edge = datetime.fromtimestamp(limit, UTC).strftime("%Y%m%dT%H%M%SZ")
        if signed_at < now:
            text = f"Signature expired: {stamp} is now earlier than {edge} ({here} - 5 min.)"
        else:
            text = f"Signature not yet current: {stamp} is still later than {edge} ({here} + 5 min.)"
        refuse("InvalidSignatureException", text)


def _check_session(key: AccessKey, token: str, now: float) -> None:
    if key.session_token is None or not hmac.compare_digest(token.encode(), key.session_token.encode()):
        refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
    if key.expires is not None and now >= key.expires:
        refuse("ExpiredTokenException", "The security token included in the request is expired")


# -- HTTP ------------------------------------------------------------------------------------


class _BadRequestError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Connection(asyncio.Protocol):
    """One kept-alive HTTP/1.1 connection: requests one after the other.

    A peer that sends faster than it is answered, or does not read its answers, is not read from.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = bytearray()
        self._busy = False
        self._unread = False  # answers wait for the peer to read them
        self._since = server.loop.time()  # when the request at hand began, or the last one was answered
        self._transport: Any = None
        self._tls: bool | str = False
        self._peer = ""
        self._callers: dict[tuple[str, str], tuple[AccessKey, Caller]] = {}

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        secured = transport.get_extra_info("ssl_object")
        self._tls = secured.version() if secured is not None else False
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if peer else ""
        if len(self._server.connections) >= self._server.max_connections:
            transport.close()
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.forget(self)

    def data_received(self, data: bytes) -> None:
        if not self._buffer:
            self._since = self._server.loop.time()
        self._buffer += data
        if not self._busy:
            self._serve_buffered()
        if len(self._buffer) > _MAX_HEAD + _MAX_BODY:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._unread = True

    def resume_writing(self) -> None:
        self._unread = False
        if not self._busy:
            self._serve_buffered()

    def close_when_late(self, now: float) -> None:
        """Close when a request takes too long to arrive, an answer to be read, or the next request to begin."""
        if self._busy:
            return
        late = now - self._since
        if self._unread and late > self._server.request_timeout:
            self._transport.abort()
        elif self._buffer and late > self._server.request_timeout:
            self._write(408, "", b"", keep=False)
        elif late > (self._server.idle_timeout if self._callers else self._server.request_timeout):
            self._transport.close()

    def close_when_idle(self) -> None:
        if not self._busy:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _serve_buffered(self) -> None:
        """Answer every whole request in the buffer; stop at one that is answered later."""
        try:
            while not (self._busy or self._unread or self._transport.is_closing()):
                request = self._next_request()
                if request is None:
                    return
                self._since = self._server.loop.time()
                self._transport.resume_reading()
                self._serve(*request)
        except _BadRequestError as error:
            self._write(error.status, "", b"", keep=False)

    def _next_request(self) -> tuple[str, str, dict[str, str], bytes] | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise _BadRequestError(431)
            return None
        method, path, headers = _parse_head(bytes(self._buffer[:end]))
        if "transfer-encoding" in headers:
            raise _BadRequestError(411)
        length_text = headers.get("content-length", "0")
        if not length_text.isdecimal() or not length_text.isascii():
            raise _BadRequestError(400)
        length = int(length_text)
        if length > _MAX_BODY:
            raise _BadRequestError(413)
        start = end + 4
        if len(self._buffer) < start + length:
            if headers.get("expect", "").lower() == "100-continue" and len(self._buffer) == start:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        body = bytes(self._buffer[start : start + length])
        del self._buffer[: start + length]
        return method, path, headers, body

    def _serve(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        keep = headers.get("connection", "").lower() != "close" and not self._server.stopping
        if method != "POST" or path != "/":
            self._write(405 if path == "/" else 404, "", b"", keep=keep)
            return
        service = self._server.service
        try:
            key, region = authenticate(service.store, method, path, headers, body, self._server.clock())
        except Exception as error:  # noqa: BLE001 - one request must not end the others, nor its connection
            answer = wire.refusal(error) if isinstance(error, KmsError) else _failure("authentication", error)
            self._write(answer.status, answer.request_id, answer.body, keep=keep)
            return
        caller = self._caller(key, headers.get("user-agent", ""))
        target = headers.get("x-amz-target", "")
        delay = service.delay()

        def run() -> wire.Answer:
            try:
                return wire.answer(
                    service, target, body, caller=caller, region=region, tls=self._tls, wait=False
                )
            except Exception as error:  # noqa: BLE001 - one request must not end the others
                return _failure(target, error)

        if target in _QUICK and not delay:
            answer = run()
            self._write(answer.status, answer.request_id, answer.body, keep=keep)
            return
        self._busy = True
        task = self._server.loop.create_task(self._serve_later(run, delay, keep))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _serve_later(self, run: Callable[[], wire.Answer], delay: float, keep: bool) -> None:
        if delay:
            await asyncio.sleep(delay)
        answer = await self._server.loop.run_in_executor(self._server.executor, run)
        self._busy = False
        self._since = self._server.loop.time()
        self._write(answer.status, answer.request_id, answer.body, keep=keep)
        if keep:
            self._serve_buffered()

    def _caller(self, key: AccessKey, user_agent: str) -> Caller:
        known = self._callers.get((key.id, user_agent))
        if known is None or known[0] is not key:
            if len(self._callers) > 16:
                self._callers.clear()
            caller = key.caller._replace(source_ip=self._peer, user_agent=user_agent)
            known = self._callers[key.id, user_agent] = (key, caller)
        return known[1]

    def _write(self, status: int, request_id: str, body: bytes, *, keep: bool) -> None:
        if self._transport.is_closing():
            return
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {wire.CONTENT_TYPE}\r\n"
            f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n"
        )
        if request_id:
            head += f"x-amzn-RequestId: {request_id}\r\n"
        if not keep:
            head += "Connection: close\r\n"
        self._transport.write(f"{head}\r\n".encode() + body)
        if not keep:
            self._transport.close()


def _failure(what: str, error: Exception) -> wire.Answer:
    """The answer where this server failed at a request."""
    # The class alone: an exception's text may quote the request.
    print(f"kms serve: {what}: {type(error).__name__}", file=sys.stderr)  # noqa: T201
    return wire.refusal(KmsError("KMSInternalException"))


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    try:
        lines = head.decode("latin-1").split("\r\n")
        method, path, version = lines[0].split(" ")
    except ValueError as error:
        raise _BadRequestError(400) from error
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise _BadRequestError(505)
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        name = name.lower()
        # A second Content-Length or Authorization would be read by others differently.
        if not colon or not name or name in headers or name != name.strip():
            raise _BadRequestError(400)
        headers[name] = value.strip()
    if version == "HTTP/1.0":
        headers["connection"] = "close"
    return method, path, headers


class Server:
    """The listening server; ``run`` serves until it is told to stop."""

    max_connections = 1024
    request_timeout = 20.0
    """Seconds in which a request must have arrived, and an answer must have been read."""
    idle_timeout = 120.0
    """Seconds after which a connection of a known caller is closed that makes no further request."""

    def __init__(
        self,
        service: Service,
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        certificate: Path | None = None,
        private_key: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """ValueError for an address other than loopback without a certificate."""
        if certificate is None and not is_loopback(host):
            raise ValueError(
                f"{host} is not a loopback address: data keys would cross the network in clear; "
                "give --certificate and --private-key, or listen on 127.0.0.1"
            )
        self.service = service
        self.clock = clock
        self.host = host
        self.port = port
        self.connections: set[_Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.stopping = False
        self.interrupted = False
        """Whether it was Ctrl-C (SIGINT), or the terminal's end (SIGHUP), that ended run()."""
        self.executor = ThreadPoolExecutor(_SLOW_THREADS, thread_name_prefix="kms")
        self.loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._drained: asyncio.Event
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context.load_cert_chain(certificate, private_key)

    @property
    def url(self) -> str:
        scheme = "http" if self._context is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"

    def run(self, *, ready: Callable[[str], None] | None = None, signals: bool = False) -> None:
        """Serve until stop(), or with ``signals`` until SIGTERM, SIGINT or SIGHUP; ``ready`` is told the URL.

        OSError when the address cannot be listened on.
        """
        asyncio.run(self._run(ready, signals))

    def stop(self) -> None:
        """Stop listening and return from run() when the requests at hand are answered.  From any thread."""
        self.loop.call_soon_threadsafe(self._stop.set)

    async def _run(self, ready: Callable[[str], None] | None, signals: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop, self._drained = asyncio.Event(), asyncio.Event()
        if signals:
            self.loop.add_signal_handler(signal.SIGTERM, self._stop.set)
            for number in (signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job of a script
                    self.loop.add_signal_handler(number, self._interrupt)
        listener = await self.loop.create_server(
            lambda: _Connection(self),
            self.host,
            self.port,
            ssl=self._context,
            ssl_handshake_timeout=self.request_timeout if self._context is not None else None,
            backlog=512,
        )
        self.port = listener.sockets[0].getsockname()[1]
        self._sweep()
        if ready is not None:
            ready(self.url)
        await self._stop.wait()
        self.stopping = True
        listener.close()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=10)
        for connection in list(self.connections):
            connection.close_when_idle()
        if self.connections:
            try:
                await asyncio.wait_for(self._drained.wait(), 1)
            except TimeoutError:  # a TLS peer that does not answer the closing alert
                for connection in list(self.connections):
                    connection.abort()
                await asyncio.sleep(0)
        self.executor.shutdown(wait=True)

    def _interrupt(self) -> None:
        self.interrupted = True
        self._stop.set()

    def _sweep(self) -> None:
        """Close connections that are too slow, again and again."""
        now = self.loop.time()
        for connection in list(self.connections):
            connection.close_when_late(now)
        self.loop.call_later(min(self.request_timeout, self.idle_timeout) / _SWEEPS, self._sweep)

    def forget(self, connection: _Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        if self.stopping and not self.connections:
            self._drained.set()


def is_loopback(host: str) -> bool:
    """Whether every address of ``host`` is loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
