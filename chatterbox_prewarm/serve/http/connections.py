"""Limits on connections: their number, and the time that each may take.

uvicorn closes a connection that stays idle after a response. It has no limit for a request head that arrives slowly,
for a client that connects and sends nothing, for a client that does not read its response, or for the number of
connections. This module adds these limits in a subclass of uvicorn's h11 protocol. h11 itself limits the size of a
request head.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import resource
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

#: The number of connections that the kernel queues until they are accepted.
BACKLOG = 2048
#: The number of connections accepted before the event loop serves the open ones again. uvicorn passes the same number
#: to `listen`, so `server` calls `listen` again with `BACKLOG`.
_ACCEPT_BATCH = 32
_SWEEP_SECONDS = 1.0
#: The limit on the head of a request, which h11 checks.
_HEAD_BYTES = 16 * 1024
#: The unsent response data that the kernel may buffer per connection.
_UNSENT_BYTES = 64 * 1024
#: File descriptors for other uses: worker sockets, open files, and one batch of accepted connections.
_RESERVE = 256
_MAX_FILES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on connections. Times are in seconds and exact to about one second.

    Attributes:
        connections: the maximum number of connections. A further one closes the connection that is idle the longest.
        head_seconds: time for the head of a request, from the connection's start or from the previous response.
        body_seconds: time for the body of a request that has no complete response yet.
        send_seconds, send_bytes: while a response waits for its client, the client must read this many bytes in this
            time: 4 kB/s, less than the slowest audio format needs (Opus, 6 kB/s).
    """

    connections: int = 1000
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    send_seconds: float = 30.0
    send_bytes: int = 128 * 1024


class Stage(enum.IntEnum):
    """The stage of a connection, in the order in which connections are closed to make room for new ones."""

    IDLE = 0  # no complete request head, or a request body that continues after the response
    BODY = 1  # the head of a request is complete, its body is not
    SENDING = 2  # the response is complete, but the client has not read all of it
    RESPONDING = 3  # the application works on the response: never closed to make room


class _Connection:
    """The progress of one connection.

    Args:
        protocol: a `LimitedProtocol`. This class uses its attributes `conn`, `transport` and `cycle`. The cycle is the
            current or the last request. Its `more_body` is True until the request body is complete. Its
            `response_complete` is True once the application has sent the complete response.
        now: the time of the event loop.
    """

    def __init__(self, protocol: Any, now: float) -> None:
        self._protocol = protocol
        self.stage = Stage.IDLE
        self.stage_began = now
        #: When the client began to be slow, or a later moment, and how many bytes it had read then.
        self._slow_since: tuple[float, int] | None = None

    def current_stage(self) -> Stage:
        cycle = self._protocol.cycle
        if cycle is not None and not cycle.response_complete:
            return Stage.BODY if cycle.more_body else Stage.RESPONDING
        return Stage.SENDING if self._protocol.transport.get_write_buffer_size() else Stage.IDLE

    def is_overdue(self, limits: Limits, now: float) -> bool:
        """Return whether the connection takes too long. Must be called regularly."""
        stage = self.current_stage()
        if stage != self.stage:
            self.stage, self.stage_began = stage, now
        if self._reads_too_slowly(limits, now):
            return True
        allowed = {Stage.IDLE: limits.head_seconds, Stage.BODY: limits.body_seconds}.get(self.stage)
        return allowed is not None and now - self.stage_began > allowed

    def _reads_too_slowly(self, limits: Limits, now: float) -> bool:
        pending = self._protocol.transport.get_write_buffer_size()
        if not pending:
            self._slow_since = None
            return False
        read = self._protocol.conn.sent_bytes - pending
        began, read_before = self._slow_since = self._slow_since or (now, read)
        if now - began <= limits.send_seconds:
            return False
        self._slow_since = now, read
        return bool(read - read_before < limits.send_bytes)


class Connections:
    """All connections of a server, ordered by the time of their last complete request head, oldest first."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all: dict[Any, _Connection] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed_for_room = 0

    def add(self, protocol: Any) -> None:
        """Register a new connection. If there are too many, close one that is not in use, or else the new one."""
        loop = asyncio.get_running_loop()
        self._all[protocol] = _Connection(protocol, loop.time())
        if len(self._all) > self._limits.connections:
            self._make_room(protocol)
        if self._timer is None:
            self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep)

    def remove(self, protocol: Any) -> None:
        """Forget a closed connection."""
        self._all.pop(protocol, None)

    def renew(self, protocol: Any) -> None:
        """Record that a request head is complete. This makes the connection the last candidate for closing."""
        if (connection := self._all.pop(protocol, None)) is not None:
            # A request with a fast response may fall between two sweeps, so `update` might never see its stage.
            connection.stage_began = asyncio.get_running_loop().time()
            self._all[protocol] = connection

    def abort(self, protocol: Any) -> None:
        """Close a connection without sending the remaining data, which could take forever if the client reads none."""
        self.remove(protocol)
        protocol.transport.abort()

    def _make_room(self, newest: Any) -> None:
        self._closed_for_room += 1
        for stage in (Stage.IDLE, Stage.BODY, Stage.SENDING):
            for protocol, connection in self._all.items():
                if protocol is not newest and connection.current_stage() == stage:
                    self.abort(protocol)
                    return
        self.abort(newest)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for protocol, connection in list(self._all.items()):
            if connection.is_overdue(self._limits, now):
                self.abort(protocol)
        if self._closed_for_room:
            logger.warning("closed %d connection(s): the limit is %d", self._closed_for_room, self._limits.connections)
            self._closed_for_room = 0
        self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep) if self._all else None


def server(app: ASGIApp, listener: socket.socket, limits: Limits, **options: Any) -> uvicorn.Server:
    """Create a uvicorn server for `app` that enforces `limits` and leaves signals to its caller.

    Args:
        app: the application.
        listener: the socket that `serve` will receive.
        limits: on connections.
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
            http=_http_protocol(limits),
            ws="none",
            backlog=_ACCEPT_BATCH,
            log_config=None,
            access_log=False,
            **options,
        )
    )


def _http_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Return a protocol class for uvicorn's option `http`. The limit on open files may reduce `limits.connections`."""
    from h11 import LocalProtocolError
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from chatterbox_prewarm.serve.http.strict_http import StrictConnection

    connections = Connections(_reduce_to(raise_open_files(), limits))

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


def _reduce_to(open_files: int, limits: Limits) -> Limits:
    possible = max(1, open_files - _RESERVE)
    if limits.connections <= possible:
        return limits
    logger.warning(
        "the limit of %d open files allows only %d connections, not %d", open_files, possible, limits.connections
    )
    return replace(limits, connections=possible)
