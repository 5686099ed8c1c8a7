"""Docker's registry on the loopback interface, its token server, and a proxy in front of it that injects faults.

The registry is Debian's `docker-registry`, version 2 of the reference implementation.
"""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


PROGRAM = "docker-registry"
USER, PASSWORD = "alice", "correct horse"
#: bcrypt of PASSWORD, cost 4.
HTPASSWD = "alice:$2y$04$abcdefghijklmnopqrstuujydOTSfIH/d5oUHpsygqV5X9xJLQc6e\n"
SERVICE = "the-registry"


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A running registry: its address "HOST:PORT" and its storage folder."""

    address: str
    storage: Path

    def blob(self, digest: str) -> Path:
        """Return the file of a blob or a manifest."""
        value = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"

    def sessions(self, name: str) -> list[Path]:
        """Return the uploads to a repository that are in progress; cancelled ones leave only empty folders."""
        return sorted(self.storage.glob(f"docker/registry/v2/repositories/{name}/_uploads/*/startedat"))


@contextmanager
def serve(
    root: Path,
    *,
    auth: Mapping[str, Any] | None = None,
    storage: Path | None = None,
    tls: Mapping[str, str] | None = None,
) -> Iterator[Registry]:
    """Run a registry until the end of the block.

    Args:
        root: folder for its configuration, log and storage.
        auth: the "auth" section of its configuration.
        storage: another storage folder.
        tls: its certificate and key. Default: plain HTTP.
    """
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is missing (Debian: apt-get install docker-registry)")
    storage = storage or root / "storage"
    address = f"127.0.0.1:{free_port()}"
    configuration = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": {"addr": address, "secret": "not important", **({"tls": tls} if tls else {})},
        **({"auth": auth} if auth else {}),
    }
    root.mkdir(exist_ok=True)
    (root / "config.yml").write_text(json.dumps(configuration))  # JSON is YAML
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(root / "config.yml")], stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(address, process, root / "log")
            yield Registry(address=address, storage=storage)
        finally:
            process.terminate()
            process.wait(10)


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = address.partition(":")
    for _ in range(200):
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"the registry does not start: {log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def basic_auth(root: Path) -> dict[str, Any]:
    """Return the "auth" section for a login with USER and PASSWORD."""
    root.mkdir(exist_ok=True)
    (root / "htpasswd").write_text(HTPASSWD)
    return {"htpasswd": {"realm": "a, registry", "path": str(root / "htpasswd")}}


@dataclass
class Tokens:
    """A token server, and the requests that it received.

    Attributes:
        requests: the Authorization header and the parameters of each request.
        lifetime: lifetime of the tokens in seconds.
        denied: repositories that no token covers.
        identity: the identity token that it accepts instead of a password.
    """

    key: Path
    certificate: Path
    requests: list[tuple[str, dict[str, list[str]]]] = field(default_factory=list)
    lifetime: int = 300
    denied: set[str] = field(default_factory=set)
    identity: str = "an identity token"
    realm: str = ""

    def auth(self) -> dict[str, Any]:
        """Return the "auth" section of a registry that trusts it."""
        return {
            "token": {
                "realm": self.realm,
                "service": SERVICE,
                "issuer": "tests",
                "rootcertbundle": str(self.certificate),
            }
        }

    def sign(self, scopes: list[str]) -> str:
        """Return a token for these scopes: a JSON Web Token with RS256 and the certificate in its header."""
        der = subprocess.run(
            ["openssl", "x509", "-in", str(self.certificate), "-outform", "DER"], capture_output=True, check=True
        ).stdout
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            if name in self.denied:
                continue
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": "tests",
            "sub": USER,
            "aud": SERVICE,
            "exp": now + self.lifetime,
            "nbf": now - 10,
            "iat": now,
            "jti": str(time.monotonic_ns()),
            "access": access,
        }
        signed = f"{_segment(json.dumps(header).encode())}.{_segment(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.key)],
            input=signed.encode(),
            capture_output=True,
            check=True,
        ).stdout
        return f"{signed}.{_segment(signature)}"


def _segment(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


@contextmanager
def serve_tokens(root: Path) -> Iterator[Tokens]:
    """Run a token server until the end of the block. It accepts USER with PASSWORD, and the identity token."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing (Debian: apt-get install openssl)")
    root.mkdir(exist_ok=True)
    tokens = Tokens(key=root / "key.pem", certificate=root / "certificate.pem")
    make_certificate(tokens.key, tokens.certificate)

    class Handler(_QuietHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            authorization = self.headers.get("Authorization", "")
            tokens.requests.append((authorization, query))
            expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            self.answer(query.get("scope", []), allowed=authorization == f"Basic {expected}")

        def do_POST(self) -> None:
            form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            tokens.requests.append((self.headers.get("Authorization", ""), form))
            allowed = form["grant_type"] == ["refresh_token"] and form["refresh_token"] == [tokens.identity]
            self.answer(form["scope"][0].split(), allowed=allowed)

        def answer(self, scopes: list[str], *, allowed: bool) -> None:
            body = json.dumps({"access_token": tokens.sign(scopes), "expires_in": tokens.lifetime}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(body) if allowed else 0))
            self.end_headers()
            if allowed:
                self.wfile.write(body)

    with _serve(Handler) as address:
        tokens.realm = f"http://{address}/token"
        yield tokens


def make_certificate(key: Path, certificate: Path) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tests"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        check=True,
    )


@dataclass
class Fault:
    """A fault of the next matching requests.

    Attributes:
        method: HTTP method of the requests.
        path: substring of their path.
        larger_than: they have more bytes in the body.
        skip: number of matching requests that pass first.
        times: number of requests with the fault.
        status: status that the proxy answers instead of the registry, unless it is 0.
        headers: headers of that response.
        body: body of that response.
        cut: close the connection after this many bytes of the request body, or for GET of the response body.
        deliver: with `cut`, the part of the request that reaches the registry: "nothing", "part" (as a broken
            connection) or "piece" (the part as a complete request, as if the registry keeps partial pieces).
        lose_response: do not return the registry's response.
        delay: seconds to wait before the request is forwarded.
    """

    method: str
    path: str = "/"
    larger_than: int = -1
    skip: int = 0
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int = 0
    deliver: str = "nothing"
    lose_response: bool = False
    delay: float = 0.0


@dataclass
class Proxy:
    """A proxy in front of a registry.

    Attributes:
        target: address of the registry.
        address: address of the proxy.
        faults: faults to inject.
        requests: method, path without the query, and headers of each request, in order.
        received: bytes of the request bodies, by method.
        redirects: upload URL that the client has -> URL at which the registry continues that upload.
    """

    target: str
    address: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)

    def headers_of(self, method: str) -> list[Mapping[str, str]]:
        """Return the headers of all requests with a method."""
        return [headers for one, _, headers in self.requests if one == method]


class _QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing; the servers record their requests."""

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client disconnected


class _ForwardHandler(_QuietHandler):
    proxy: Proxy

    def _forward(self) -> None:
        proxy = self.proxy
        proxy.requests.append((self.command, self.path.partition("?")[0], dict(self.headers)))
        length = int(self.headers.get("Content-Length", "0"))
        fault = self._take_fault(length)
        time.sleep(fault.delay if fault else 0)
        if fault and fault.status:
            self._answer(fault)
            return
        if fault and fault.cut and self.command != "GET":
            self._cut_request(fault)
            return
        with self._send(self._read_body(length), length) as response:
            if fault and fault.lose_response:
                response.read()
                self._disconnect()
            else:
                self._return_response(response, fault.cut if fault else 0)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _forward  # noqa: N815 - names of the base class

    def _take_fault(self, length: int) -> Fault | None:
        for fault in self.proxy.faults:
            if fault.method == self.command and fault.path in self.path and length > fault.larger_than and fault.times:
                if not fault.skip:
                    fault.times -= 1
                    return fault
                fault.skip -= 1
        return None

    def _answer(self, fault: Fault) -> None:
        for _ in self._read_body(int(self.headers.get("Content-Length", "0"))):
            pass
        self.send_response(fault.status)
        for key, value in fault.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(fault.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(fault.body)

    def _cut_request(self, fault: Fault) -> None:
        part = b"".join(self._read_body(fault.cut))
        if fault.deliver == "part":
            host, _, port = self.proxy.target.partition(":")
            with socket.create_connection((host, int(port))) as upstream:
                head = "".join(f"{key}: {value}\r\n" for key, value in self.headers.items())
                upstream.sendall(f"{self.command} {self.path} HTTP/1.1\r\n{head}\r\n".encode() + part)
        elif fault.deliver == "piece":
            with self._send(iter([part]), len(part)) as response:
                response.read()
                self.proxy.redirects[self.path] = _path(str(response.getheader("Location")))
        self._disconnect()

    @contextmanager
    def _send(self, body: Iterator[bytes], length: int) -> Iterator[http.client.HTTPResponse]:
        """Send a request to the registry, and yield its response."""
        with closing(http.client.HTTPConnection(self.proxy.target, timeout=60)) as connection:
            path = self.proxy.redirects.get(self.path, self.path)
            connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                if key.lower() not in {"content-length", "content-range"}:
                    connection.putheader(key, value)
            connection.putheader("Content-Length", str(length))
            connection.endheaders()
            for block in body:
                connection.send(block)
            with connection.getresponse() as response:
                yield response

    def _return_response(self, response: http.client.HTTPResponse, cut: int) -> None:
        self.send_response(response.status)
        for key, value in response.getheaders():
            if key.lower() not in {"date", "connection"}:
                self.send_header(key, value)
        self.end_headers()
        if cut:
            self.wfile.write(response.read(cut))
            self._disconnect()
            return
        while block := response.read(1 << 16):
            self.wfile.write(block)

    def _read_body(self, length: int) -> Iterator[bytes]:
        while length:
            block = self.rfile.read(min(length, 1 << 16))
            if not block:
                return
            self.proxy.received[self.command] = self.proxy.received.get(self.command, 0) + len(block)
            length -= len(block)
            yield block

    def _disconnect(self) -> None:
        """Close the connection before the message is complete."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def faulty_proxy(registry: Registry, *faults: Fault) -> Iterator[Proxy]:
    """Run a proxy in front of a registry until the end of the block."""
    proxy = Proxy(target=registry.address, faults=[*faults])
    with _serve(type("Forward", (_ForwardHandler,), {"proxy": proxy})) as address:
        proxy.address = address
        yield proxy


@contextmanager
def serve_blob(content: bytes) -> Iterator[tuple[str, list[Mapping[str, str]]]]:
    """Run a server that a registry redirects to; yield a URL of the blob, and the headers of each request."""
    requests: list[Mapping[str, str]] = []

    class Handler(_QuietHandler):
        def do_GET(self) -> None:
            requests.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with _serve(Handler) as address:
        yield f"http://{address}/store?signature=secret", requests


@contextmanager
def _serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _path(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.path}?{parts.query}"
