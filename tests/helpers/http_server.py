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
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.http import limited_server
from chatterbox_prewarm.serve.http.connections import Connections, Limits
from chatterbox_prewarm.serve.http.limited_server import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send


async def _serve(app: ASGIApp, listener: socket.socket, limits: Limits, stop: asyncio.Event) -> None:
    connections = Connections(limited_server.reduce_to(limited_server.raise_open_files(), limits))
    server = limited_server.server(app, listener, connections, timeout_keep_alive=60, timeout_graceful_shutdown=20)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await stop.wait()
    await connections.finish(2.0)
    server.should_exit = True
    await serving


@contextlib.contextmanager
def serving(app: ASGIApp, limits: Limits | None = None) -> Iterator[int]:
    """Serve `app` in a thread. Yields the port."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    with contextlib.closing(loop), listen() as listener:
        work = _serve(app, listener, limits or Limits(), stop)
        thread = threading.Thread(target=lambda: loop.run_until_complete(work))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(stop.set)
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
        asyncio.run(_serve(_respond, own_listener, Limits(**json.loads(sys.argv[1])), asyncio.Event()))


def basic(secret: str, user: str = "user") -> dict[str, str]:
    """Return the header that a browser sends for a user and a password."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()}
