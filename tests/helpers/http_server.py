"""A real uvicorn server on the loopback interface, in a thread, or as a process for tests with many connections."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.http import limited_server
from chatterbox_prewarm.serve.http.connections import Limits
from chatterbox_prewarm.serve.http.limited_server import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send


def _server(app: ASGIApp, listener: socket.socket, limits: Limits) -> Any:
    return limited_server.server(app, listener, limits, timeout_keep_alive=60, timeout_graceful_shutdown=2)


@contextlib.contextmanager
def serving(app: ASGIApp, limits: Limits | None = None) -> Iterator[int]:
    """Serve `app` in a thread. Yields the port."""
    with listen() as listener:
        server = _server(app, listener, limits or Limits())
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not end"


def listen() -> socket.socket:
    """Return a socket that listens on a free port of the loopback interface."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(BACKLOG)
    return listener


def request(
    port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | str | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request on a new connection. Returns the response and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def connect(port: int, data: bytes = b"") -> socket.socket:
    """Open a connection and send `data`."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    if data:
        connection.sendall(data)
    return connection


async def respond(send: Send, body: bytes = b"ok", status: int = 200) -> None:
    """Send a complete response."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def _respond(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond at once, but to `/slow` only when the client is gone."""
    assert scope["type"] == "http"
    while scope["path"] == "/slow" and (await receive())["type"] != "http.disconnect":
        pass
    await respond(send)


if __name__ == "__main__":
    with listen() as own_listener:
        print(own_listener.getsockname()[1], flush=True)
        limits = Limits(**json.loads(sys.argv[1]))
        asyncio.run(_server(_respond, own_listener, limits).serve(sockets=[own_listener]))


def basic(secret: str, user: str = "user") -> dict[str, str]:
    """Return the header that a browser sends for a user and a password."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()}
