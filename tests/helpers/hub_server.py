"""Serve a small model hub on the loopback interface. It can interrupt transfers and send wrong content."""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Larger files have their SHA-256 as ETag, as with Git LFS. Smaller ones have the SHA-1 of their Git blob.
LARGE = 1 << 20


@dataclass
class Hub:
    """The files of a hub, its faults, and the requests that it received.

    Attributes:
        repository, revision, files: the only repository of the hub.
        sent: the content that the hub sends for a file if it differs from the announced content.
        cut: for each file, the number of bytes after which the hub closes the next transfer, once.
        hold: for each file, the number of bytes after which a transfer stops until the server ends.
        requests: method, file and `Range` header of each request, in order.
        authorizations: file and `Authorization` header of each request, in order.
        holding: set when a transfer has stopped because of `hold`.
        released: set when the server ends.
    """

    repository: str
    revision: str
    files: dict[str, bytes]
    sent: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    hold: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    authorizations: list[tuple[str, str | None]] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""

    def ranges(self, method: str, name: str) -> list[str | None]:
        """Return the `Range` header of each request with this method for a file."""
        return [ranged for how, file, ranged in self.requests if (how, file) == (method, name)]


def etag(content: bytes) -> str:
    """Return the digest that the hub announces for a file."""
    if len(content) > LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.hub
        prefix = f"/{hub.repository}/resolve/{hub.revision}/"
        name = self.path.removeprefix(prefix)
        ranged = self.headers.get("Range")
        hub.requests.append((self.command, name, ranged))
        hub.authorizations.append((name, self.headers.get("Authorization")))
        if not self.path.startswith(prefix) or name not in hub.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        announced = hub.files[name]
        content = hub.sent.get(name, announced)
        start = int(ranged.removeprefix("bytes=").partition("-")[0]) if ranged else 0
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("X-Repo-Commit", hub.revision)
        self.send_header("ETag", f'"{etag(announced)}"')
        if len(announced) > LARGE:
            self.send_header("X-Linked-Etag", f'"{etag(announced)}"')
            self.send_header("X-Linked-Size", str(len(announced)))
        self.end_headers()
        if self.command == "GET":
            self.send_body(name, content, start)

    def send_body(self, name: str, content: bytes, start: int) -> None:
        hub = self.hub
        if name in hub.hold:
            self.wfile.write(content[start : hub.hold[name]])
            hub.holding.set()
            hub.released.wait()
            self.close_connection = True
        elif name in hub.cut:
            self.wfile.write(content[start : hub.cut.pop(name)])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing, because `requests` records every request."""

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.endpoint` until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub})) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            hub.released.set()
            server.shutdown()
            thread.join()
