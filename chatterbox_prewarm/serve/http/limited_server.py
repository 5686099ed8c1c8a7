"""A uvicorn server that enforces limits on its connections."""

from __future__ import annotations

import contextlib
import logging
import resource
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import asyncio

    import uvicorn
    from starlette.types import ASGIApp

    from chatterbox_prewarm.serve.http.connections import Connections, Limits

logger = logging.getLogger(__name__)

#: The number of connections that the kernel queues until they are accepted.
BACKLOG = 2048
#: The number of connections accepted before the event loop serves the open ones again. uvicorn passes the same number
#: to `listen`, so `server` calls `listen` again with `BACKLOG`.
_ACCEPT_BATCH = 32
#: The limit on the head of a request, which `StrictConnection` checks.
_HEAD_BYTES = 16 * 1024
#: The unsent response data that the kernel may buffer per connection.
_UNSENT_BYTES = 64 * 1024
#: File descriptors for other uses: worker sockets, open files, connections of probes, and one batch of accepted
#: connections. If the system allows few files, three quarters of them.
_RESERVE = 256
_MAX_FILES = 1 << 20


def server(app: ASGIApp, listener: socket.socket, connections: Connections, **options: Any) -> uvicorn.Server:
    """Create a uvicorn server for `app` that limits its connections and leaves signals to its caller.

    Args:
        app: the application.
        listener: the socket that `serve` will receive.
        connections: the connections, with their limits.
        **options: further options of `uvicorn.Config`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listener.listen(BACKLOG)

    return Server(
        uvicorn.Config(
            app,
            lifespan="off",
            http=_http_protocol(connections),
            ws="none",
            backlog=min(_ACCEPT_BATCH, max(1, connections.limits.connections // 4)),
            log_config=None,
            access_log=False,
            **options,
        )
    )


def _http_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Return a protocol class for uvicorn's option `http`."""
    from h11 import LocalProtocolError
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from chatterbox_prewarm.serve.http.strict_http import StrictConnection

    class LimitedProtocol(H11Protocol):
        conn: StrictConnection

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.conn = StrictConnection(_HEAD_BYTES)

        def send_400_response(self, msg: str) -> None:
            super().send_400_response(self.conn.refusal or msg)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            _set_socket_options(transport)
            connections.add(self)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            # h11 checks the size of incomplete heads only. In pieces, a large head is incomplete at first.
            for start in range(0, len(data), _HEAD_BYTES):
                try:
                    super().data_received(data[start : start + _HEAD_BYTES])
                except LocalProtocolError:  # the request body is invalid, and it is too late for a 400 response
                    connections.abort(self)
                if self.transport.is_closing():
                    return
            if self.cycle is not before:
                connections.renew(self)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.remove(self)
            super().connection_lost(exc)

    return cast("type[asyncio.Protocol]", LimitedProtocol)


def _set_socket_options(transport: asyncio.Transport) -> None:
    """Make the kernel send small packets at once, and accept only data that it can send soon.

    TCP_NODELAY: uvicorn writes the head and the body of a response separately. With Nagle's algorithm the second write
    waits for the client's delayed acknowledgement, about 40 ms. asyncio sets the option only on sockets whose protocol
    number is IPPROTO_TCP, and the number of an accepted socket is that of its listener, which is 0 by default.

    TCP_NOTSENT_LOWAT: otherwise the kernel would buffer up to 4 MB for a client that does not read, and accept no more
    until a third of the buffer is free. At the data rate of speech that takes half a minute, so a slow client would
    look like a stuck one.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in {socket.AF_INET, socket.AF_INET6}:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def raise_open_files() -> int:
    """Raise this process's soft limit on open files to the hard limit, up to a million. Returns the new limit."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (_MAX_FILES if limit == resource.RLIM_INFINITY else limit for limit in (soft_limit, hard_limit))
    wanted = min(hard, _MAX_FILES)  # some child processes loop over all file descriptors up to the limit
    if soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard_limit))
    except (OSError, ValueError):  # not permitted in some sandboxes
        return soft
    return wanted


def reduce_to(open_files: int, limits: Limits) -> Limits:
    """Reduce the number of connections, if the limit on open files is too low for them."""
    possible = max(1, open_files - min(_RESERVE, open_files * 3 // 4))
    if limits.connections <= possible:
        return limits
    logger.warning(
        "the limit of %d open files allows only %d connections, not %d", open_files, possible, limits.connections
    )
    return replace(limits, connections=possible)
