"""Docker's registry on the loopback interface, a server of tokens for it, and a proxy before it that makes things fail.

The registry is Debian's `docker-registry`, the reference implementation at version 2.
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
USER, PASSWORD = "somebody", "correct horse"
#: bcrypt of PASSWORD, cost 4.
HTPASSWD = "somebody:$2y$04$abcdefghijklmnopqrstuujydOTSfIH/d5oUHpsygqV5X9xJLQc6e\n"
SERVICE = "the-registry"


@dataclass(frozen=True, kw_only=True)
class Registry:
    """A running registry: "HOST:PORT", and the folder of its storage."""

    address: str
    storage: Path

    def blob(self, digest: str) -> Path:
        """The file of a blob or a manifest."""
        value = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"

    def sessions(self, name: str) -> list[Path]:
        """The uploads to a repository that are under way; of one that was dropped, empty folders stay behind."""
        return sorted(self.storage.glob(f"docker/registry/v2/repositories/{name}/_uploads/*/startedat"))


@contextmanager
def serve(
    root: Path,
    *,
    auth: Mapping[str, Any] | None = None,
    storage: Path | None = None,
    tls: Mapping[str, str] | None = None,
) -> Iterator[Registry]:
    """Run a registry for the length of the block.

    Args:
        root: a folder for its configuration, its log and its storage.
        auth: the section of its configuration.
        storage: where it stores, in another place than `root`.
        tls: its certificate and key; plain HTTP without.
    """
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"there is no {PROGRAM} (Debian: apt-get install docker-registry)")
    storage = storage or root / "storage"
    address = f"127.0.0.1:{free_port()}"
    configuration = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": {"addr": address, "secret": "of no importance", **({"tls": tls} if tls else {})},
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
    raise AssertionError(f"the registry does not answer: {log.read_text()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def basic_auth(root: Path) -> dict[str, Any]:
    """The configuration of a registry that knows USER by PASSWORD."""
    root.mkdir(exist_ok=True)
    (root / "htpasswd").write_text(HTPASSWD)
    return {"htpasswd": {"realm": "a, registry", "path": str(root / "htpasswd")}}


@dataclass
class Tokens:
    """A server of tokens, and what it was asked.

    Attributes:
        asked: the Authorization header and the parameters of each request.
        lifetime: seconds, of the tokens.
        denied: repositories that nobody may have.
        identity: the identity token that it takes in the place of a password.
    """

    key: Path
    certificate: Path
    asked: list[tuple[str, dict[str, list[str]]]] = field(default_factory=list)
    lifetime: int = 300
    denied: set[str] = field(default_factory=set)
    identity: str = "an identity token"
    realm: str = ""

    def auth(self) -> dict[str, Any]:
        """The configuration of a registry that trusts it."""
        return {
            "token": {
                "realm": self.realm,
                "service": SERVICE,
                "issuer": "tests",
                "rootcertbundle": str(self.certificate),
            }
        }

    def sign(self, scopes: list[str]) -> str:
        """A token for these scopes, as JSON Web Token with RS256 and the certificate in its header."""
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
    """Run a server of tokens for the length of the block; it knows USER by PASSWORD, and by an identity token."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to sign tokens with (Debian: apt-get install openssl)")
    root.mkdir(exist_ok=True)
    tokens = Tokens(key=root / "key.pem", certificate=root / "certificate.pem")
    make_certificate(tokens.key, tokens.certificate)

    class Handler(_Quiet):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            sent = self.headers.get("Authorization", "")
            tokens.asked.append((sent, query))
            known = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            self.answer(query.get("scope", []), allowed=sent == f"Basic {known}")

        def do_POST(self) -> None:
            form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            tokens.asked.append((self.headers.get("Authorization", ""), form))
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
    """What happens to the next requests of a kind.

    Attributes:
        method: of HTTP.
        status: answered in the registry's place, if it is not 0.
        headers, body: of that answer.
        cut: bytes of a body after which the connection ends: the request's, or for GET the answer's.
        deliver: with `cut`, what the registry gets of the request: "nothing"; "part", as a broken connection; or
            "piece", the part as a whole request, as a registry keeps it that can be asked where it stands.
        lose: the registry's answer is not handed on.
        above: only a request with a longer body.
        skip: how many such requests go through before.
        times: how often.
        path: a part of it.
        hold: seconds that it takes longer.
    """

    method: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int = 0
    deliver: str = "nothing"
    lose: bool = False
    above: int = -1
    skip: int = 0
    times: int = 1
    path: str = "/"
    hold: float = 0.0


@dataclass
class Proxy:
    """A proxy before a registry.

    Attributes:
        address: its own.
        target: the registry's.
        faults: to come.
        requests: method, path without the query, and headers of each request, in order.
        received: bytes of the bodies that it read, by method.
    """

    target: str
    address: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    #: Where an upload goes on at the registry, of an address that the client has.
    moved: dict[str, str] = field(default_factory=dict)

    def of(self, method: str) -> list[Mapping[str, str]]:
        """The headers of the requests of a method."""
        return [headers for found, _, headers in self.requests if found == method]


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep quiet; the servers note what they were asked."""

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone


class _Forward(_Quiet):
    proxy: Proxy

    def forward(self) -> None:
        proxy = self.proxy
        proxy.requests.append((self.command, self.path.partition("?")[0], dict(self.headers)))
        length = int(self.headers.get("Content-Length", "0"))
        fault = self.take(length)
        time.sleep(fault.hold if fault else 0)
        if fault and fault.status:
            self.refuse(fault)
            return
        if fault and fault.cut and self.command != "GET":
            self.cut_request(fault)
            return
        with self.ask(self.rest(length), length) as response:
            if fault and fault.lose:
                response.read()
                self.hang_up()
            else:
                self.hand_back(response, fault.cut if fault else 0)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815 - their names

    def take(self, length: int) -> Fault | None:
        for fault in self.proxy.faults:
            if fault.method == self.command and fault.path in self.path and length > fault.above and fault.times:
                if not fault.skip:
                    fault.times -= 1
                    return fault
                fault.skip -= 1
        return None

    def refuse(self, fault: Fault) -> None:
        for _ in self.rest(int(self.headers.get("Content-Length", "0"))):
            pass
        self.send_response(fault.status)
        for key, value in fault.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(fault.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(fault.body)

    def cut_request(self, fault: Fault) -> None:
        part = b"".join(self.rest(fault.cut))
        if fault.deliver == "part":
            host, _, port = self.proxy.target.partition(":")
            with socket.create_connection((host, int(port))) as upstream:
                head = "".join(f"{key}: {value}\r\n" for key, value in self.headers.items())
                upstream.sendall(f"{self.command} {self.path} HTTP/1.1\r\n{head}\r\n".encode() + part)
        elif fault.deliver == "piece":
            with self.ask(iter([part]), len(part)) as response:
                response.read()
                self.proxy.moved[self.path] = _path(str(response.getheader("Location")))
        self.hang_up()

    @contextmanager
    def ask(self, body: Iterator[bytes], length: int) -> Iterator[http.client.HTTPResponse]:
        """The registry's answer."""
        with closing(http.client.HTTPConnection(self.proxy.target, timeout=60)) as connection:
            path = self.proxy.moved.get(self.path, self.path)
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

    def hand_back(self, response: http.client.HTTPResponse, cut: int) -> None:
        self.send_response(response.status)
        for key, value in response.getheaders():
            if key.lower() not in {"date", "connection"}:
                self.send_header(key, value)
        self.end_headers()
        if cut:
            self.wfile.write(response.read(cut))
            self.hang_up()
            return
        while block := response.read(1 << 16):
            self.wfile.write(block)

    def rest(self, length: int) -> Iterator[bytes]:
        while length:
            block = self.rfile.read(min(length, 1 << 16))
            if not block:
                return
            self.proxy.received[self.command] = self.proxy.received.get(self.command, 0) + len(block)
            length -= len(block)
            yield block

    def hang_up(self) -> None:
        """End the connection in the middle."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def before(registry: Registry, *faults: Fault) -> Iterator[Proxy]:
    """Run a proxy before a registry for the length of the block."""
    proxy = Proxy(target=registry.address, faults=[*faults])
    with _serve(type("Forward", (_Forward,), {"proxy": proxy})) as address:
        proxy.address = address
        yield proxy


@contextmanager
def serve_blob(content: bytes) -> Iterator[tuple[str, list[Mapping[str, str]]]]:
    """A storage that a registry redirects to: its address, and the headers of each request that it got."""
    seen: list[Mapping[str, str]] = []

    class Handler(_Quiet):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with _serve(Handler) as address:
        yield f"http://{address}/store?signature=secret", seen


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
