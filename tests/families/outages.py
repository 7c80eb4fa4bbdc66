"""A KMS over HTTP behind a proxy that fails in the ways in which networks and services do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from streamcrypt.kms import open_service
from streamcrypt.kms.server import Server

FAULTS = ("refuse", "reset", "hang", "error 500", "half an answer", "drip")

_HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: 400\r\n\r\n{"
_ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Passes connections on to a server; ``break_down(fault)`` and ``recover()`` may be called at any time.

    refuse           nobody listens any more
    reset            connections are cut as soon as something was sent
    hang             what is sent is read, and never answered, not even after the recovery
    error 500        every request is answered so
    half an answer   the answer begins and breaks off
    drip             the answer comes, a byte every half second
    """

    def __init__(self, behind: tuple[str, int]) -> None:
        self._behind = behind
        self.dripped = 0  # answers that dripped to their end
        self._fault: str | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    def break_down(self, fault: str) -> None:
        self._fault = fault
        if fault == "refuse":
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        if fault in ("refuse", "reset"):
            with self._lock:
                for connection in self._open:
                    _cut(connection)

    def recover(self) -> None:
        broken, self._fault = self._fault, None
        if broken == "refuse":
            self._listener = self._listen(self.port)

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                _cut(connection)
        for thread in self._threads:
            thread.join(20)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self._start(self._accept, listener)
        return listener

    def _start(self, work, *words) -> None:
        thread = threading.Thread(target=work, args=words, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        """Requests of one connection, one after the other, each as the fault of that moment wants it."""
        server: socket.socket | None = None
        try:
            while True:
                request = _whole(connection)
                if not request:
                    return
                fault = self._fault
                if fault == "hang":
                    self._ended.wait()
                    return
                if fault in ("refuse", "reset"):
                    _cut(connection)
                    return
                if fault == "error 500":
                    connection.sendall(_ERROR)
                    return
                if fault == "half an answer":
                    connection.sendall(_HALF)
                    return
                if server is None:
                    server = socket.create_connection(self._behind)
                server.sendall(request)
                answer = _whole(server)
                if fault == "drip":
                    for byte in answer:
                        connection.sendall(bytes((byte,)))
                        if self._ended.wait(0.5):
                            return
                    self.dripped += 1
                else:
                    connection.sendall(answer)
        except OSError:
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
            if server is not None:
                server.close()


def _whole(connection: socket.socket) -> bytes:
    """One request or answer with its body; b"" at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    while len(body) < length:
        part = connection.recv(65536)
        if not part:
            return b""
        data, body = data + part, body + part
    return data


def _cut(connection: socket.socket) -> None:
    """End a connection without a word: the other side sees a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def served_through_a_proxy(home: Path) -> Iterator[tuple[str, Proxy]]:
    """The reference of a new key of a KMS behind a proxy, and the proxy."""
    service = open_service(home)
    service.create_alias(AliasName="alias/far", TargetKeyId=service.create_key()["KeyMetadata"]["KeyId"])
    server = Server(service, port=0)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, kwargs={"ready": lambda url: ready.set()})
    thread.start()
    assert ready.wait(20)
    proxy = Proxy(("127.0.0.1", server.port))
    try:
        yield f"local:alias/far@http://127.0.0.1:{proxy.port}", proxy
    finally:
        proxy.close()
        server.stop()
        thread.join(20)
