"""A small S3 server, as slow as it is asked to be: what a cell with the storage ``store`` runs against.

    python -m streamcrypt.bench.s3server [--latency 20ms] [--bandwidth 80MB] [--load FOLDER]
                                        prints its port, runs until standard input ends

What streamcrypt's own requests need, path style, without authentication: objects, ranges, conditions, multipart
uploads, listings; the conditions and metadata of Google's dialect of the same protocol too.  Objects are kept
in memory.  ``latency`` passes before each answer, ``bandwidth`` is what one request's body moves in a second: as S3
does, it limits a request and not the store.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

from streamcrypt.units import parse_duration, parse_size

_PAGE: Final = 1000
_STEP: Final = 64 << 10  # bytes of a body between two looks at the clock


class S3Server(ThreadingHTTPServer):
    """One bucket, whatever its name.  ``names`` adds empty objects that only listings know."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, names: list[str] | None = None, *, latency: float = 0.0, bandwidth: float | None = None
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes | bytearray, str, dict[str, str]]] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], dict[int, tuple[bytearray, str]]]] = {}
        self.names = sorted(names or ())
        self._listed: list[str] | None = None  # sorted once for all pages, until a name comes or goes
        self.latency = latency
        self.bandwidth = bandwidth
        self.lock = threading.Lock()
        self.requests = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away

    def load(self, folder: Path, prefix: str) -> None:
        """The files of a folder as objects."""
        for path in sorted(folder.iterdir()):
            self.keep(f"{prefix}/{path.name}", path.read_bytes(), f'"{secrets.token_hex(16)}"', {})

    def keep(self, key: str, body: bytes | bytearray, etag: str, metadata: dict[str, str]) -> None:
        """Keep an object; for who holds the lock."""
        if key not in self.objects:
            self._listed = None
        self.objects[key] = body, etag, metadata

    def drop(self, *keys: str) -> None:
        with self.lock:
            for key in keys:
                if self.objects.pop(key, None) is not None:
                    self._listed = None

    def listing(self) -> list[str]:
        with self.lock:
            if self._listed is None:
                self._listed = sorted([*self.names, *self.objects])
            return self._listed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes | bytearray | memoryview = b"", **headers: str) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            for part in self._paced(memoryview(body)):
                self.wfile.write(part)
        self.wfile.flush()

    def _paced(self, body: memoryview) -> Iterator[memoryview]:
        """The body at the pace of this request; all of it at once where there is none."""
        bandwidth = self.server.bandwidth
        if bandwidth is None:
            yield body
            return
        started = time.monotonic()
        for start in range(0, len(body), _STEP):
            part = body[start : start + _STEP]
            ahead = (start + len(part)) / bandwidth - (time.monotonic() - started)
            if ahead > 0:
                time.sleep(ahead)
            yield part

    def _xml(self, text: str, status: int = 200) -> None:
        self._answer(
            status, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(), Content_Type="application/xml"
        )

    def _refuse(self, status: int, code: str) -> None:
        self._xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status)

    def _request(self) -> tuple[str, dict[str, list[str]], bytearray]:
        length = int(self.headers.get("Content-Length") or 0)
        body = bytearray(length)
        for part in self._paced(memoryview(body)):
            done = 0
            while done < len(part) and (count := self.rfile.readinto(part[done:])):
                done += count
        if self.headers.get("Content-Encoding", "").startswith("aws-chunked"):
            body = _unchunked(body)
        self.server.requests += 1
        if self.server.latency:
            time.sleep(self.server.latency)
        url = urlsplit(self.path)
        _, _, key = unquote(url.path).lstrip("/").partition("/")
        return key, parse_qs(url.query, keep_blank_values=True), body

    def _metadata(self) -> dict[str, str]:
        prefixes = ("x-amz-meta-", "x-goog-meta-")
        return {name: value for name, value in self.headers.items() if name.lower().startswith(prefixes)}

    def _must_be_new(self) -> bool:
        return (
            self.headers.get("If-None-Match") == "*" or self.headers.get("x-goog-if-generation-match") == "0"
        )

    def do_PUT(self) -> None:
        key, query, body = self._request()
        etag = f'"{secrets.token_hex(16)}"'  # not a digest: that would be what a benchmark measures
        if "uploadId" in query:
            upload = self.server.uploads.get(query["uploadId"][0])
            if upload is None:
                return self._refuse(404, "NoSuchUpload")
            upload[2][int(query["partNumber"][0])] = body, etag
        else:
            with self.server.lock:
                if self._must_be_new() and key in self.server.objects:
                    return self._refuse(412, "PreconditionFailed")
                self.server.keep(key, body, etag, self._metadata())
        return self._answer(200, ETag=etag)

    def do_POST(self) -> None:
        key, query, body = self._request()
        if "uploads" in query:
            upload_id = secrets.token_hex(16)
            self.server.uploads[upload_id] = key, self._metadata(), {}
            return self._xml(
                f"<InitiateMultipartUploadResult><Key>{escape(key)}</Key><UploadId>{upload_id}</UploadId>"
                "</InitiateMultipartUploadResult>"
            )
        if "delete" in query:
            names = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            self.server.drop(*map(unescape, names))
            deleted = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            return self._xml(f"<DeleteResult>{deleted}</DeleteResult>")
        upload = self.server.uploads.pop(query["uploadId"][0], None)
        if upload is None:
            return self._refuse(404, "NoSuchUpload")
        parts = [part for _, (part, _) in sorted(upload[2].items())]
        etag = f'"{secrets.token_hex(16)}-{len(parts)}"'
        with self.server.lock:
            if self._must_be_new() and key in self.server.objects:
                return self._refuse(412, "PreconditionFailed")
            self.server.keep(key, bytearray().join(parts), etag, upload[1])
        return self._xml(
            f"<CompleteMultipartUploadResult><Key>{escape(key)}</Key><ETag>{escape(etag)}</ETag>"
            "</CompleteMultipartUploadResult>"
        )

    def do_DELETE(self) -> None:
        key, query, _ = self._request()
        if "uploadId" in query:
            if self.server.uploads.pop(query["uploadId"][0], None) is None:
                return self._refuse(404, "NoSuchUpload")
        else:
            self.server.drop(key)
        return self._answer(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key, query, _ = self._request()
        if not key:
            return self._list(query)
        if "uploadId" in query:
            return self._refuse(404, "NoSuchUpload")
        found = self.server.objects.get(key)
        if found is None:
            return self._refuse(404, "NoSuchKey")
        body, etag, metadata = found
        if self.headers.get("If-Match", etag) != etag:
            return self._refuse(412, "PreconditionFailed")
        start, stop, status = 0, len(body), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**metadata, "ETag": etag, "Last_Modified": formatdate(0, usegmt=True)}
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
            if start >= len(body):
                return self._refuse(416, "InvalidRange")
            status, headers["Content_Range"] = 206, f"bytes {start}-{stop - 1}/{len(body)}"
        headers["Content_Length"] = str(stop - start)
        return self._answer(status, memoryview(body)[start:stop], **headers)

    def _list(self, query: dict[str, list[str]]) -> None:
        names = self.server.listing()
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        size = int(query.get("max-keys", [str(_PAGE)])[0])
        start = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after) if after else 0)
        found = []
        for name in names[start : start + size]:
            if not name.startswith(prefix):
                break
            body, etag, _ = self.server.objects.get(name, (b"x", '"00000000000000000000000000000000"', {}))
            found.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>1970-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(etag)}</ETag><Size>{len(body)}</Size></Contents>"
            )
        last = names[start + len(found) - 1] if found else ""
        more = len(found) == size and start + size < len(names) and names[start + size].startswith(prefix)
        self._xml(
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>"
            + (f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else "")
            + "".join(found)
            + "</ListBucketResult>"
        )


def _unchunked(body: bytearray) -> bytearray:
    """The content of an aws-chunked body: lengths in hexadecimal, and a trailer."""
    content, position = bytearray(), 0
    while True:
        end = body.index(b"\r\n", position)
        length = int(bytes(body[position:end]).partition(b";")[0], 16)
        if not length:
            return content
        content += body[end + 2 : end + 2 + length]
        position = end + 2 + length + 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=parse_duration, default=0.0, help="what passes before each answer")
    parser.add_argument("--bandwidth", type=parse_size, help="bytes a second of one request")
    parser.add_argument("--load", type=Path, help="a folder whose files are there as plain/NAME")
    asked = parser.parse_args()
    server = S3Server(latency=asked.latency, bandwidth=asked.bandwidth)
    if asked.load is not None:
        server.load(asked.load, "plain")
    print(json.dumps({"port": server.server_address[1]}), flush=True)  # noqa: T201 - who started it reads the port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main()
