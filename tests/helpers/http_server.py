"""A real uvicorn on loopback, in a thread, or as a process of its own for tests with many connections."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.http.connections import AT_ONCE, WAITING, Limits, http_protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send


def _server(app: ASGIApp, limits: Limits) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listener in sockets or []:
                listener.listen(WAITING)

    return Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            http=http_protocol(limits),
            ws="none",
            timeout_keep_alive=60,
            timeout_graceful_shutdown=2,
            backlog=AT_ONCE,
        )
    )


@contextlib.contextmanager
def serving(app: ASGIApp, limits: Limits | None = None) -> Iterator[int]:
    """Serve `app` in a thread; yields the port."""
    with listening() as listener:
        server = _server(app, limits or Limits())
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not end"


def listening() -> socket.socket:
    """A listener on a free port of loopback."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(WAITING)
    return listener


def ask(
    port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | str | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def connect(port: int, data: bytes = b"") -> socket.socket:
    """A connection that has sent `data`."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    if data:
        connection.sendall(data)
    return connection


async def answer(send: Send, body: bytes = b"ok", status: int = 200) -> None:
    """A whole answer."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def _quick(scope: Scope, _: Receive, send: Send) -> None:
    assert scope["type"] == "http"
    await answer(send)


if __name__ == "__main__":
    with listening() as own:
        print(own.getsockname()[1], flush=True)
        asyncio.run(_server(_quick, Limits(**json.loads(sys.argv[1]))).serve(sockets=[own]))
