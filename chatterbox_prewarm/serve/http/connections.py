"""The connections of the front: how long one may take, and how many there may be.

uvicorn closes a connection that was silent for some seconds after an answer. It has no limit for a request's head that
trickles in, none for a client that opens a connection and sends nothing, none for one that does not read its answer,
and none on their number. Here are these limits, as a subclass of its protocol on h11, which itself bounds a head.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import resource
import socket
from dataclasses import dataclass, replace
from typing import Protocol, cast

logger = logging.getLogger(__name__)

#: How many connections may wait to be accepted, and how many of them are accepted before the event loop turns to those
#: that it has. For uvicorn both are `backlog`, so `listen` is to be called with the larger one again after its start.
WAITING, AT_ONCE = 2048, 32

_SWEEP_SECONDS = 1.0
#: What h11 allows the head of a request.
_HEAD_BYTES = 16 * 1024
#: What the kernel may hold of an answer beyond what it has sent and waits to see acknowledged.
_UNSENT_BYTES = 64 * 1024
#: Descriptors for what is no connection: the workers' sockets, files being read, and a turn's worth of accepted
#: connections that are not counted yet.
_RESERVE = 256
_MOST_FILES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on connections; times in seconds, kept to within about one.

    Attributes:
        connections: how many there may be. When more come, the one that has been idle for the longest is closed.
        head_seconds: how long a connection may be without a request, since it was opened or since its last answer. The
            head of a request must be complete by then.
        body_seconds: how long the body of a request may take that is not answered yet.
        send_seconds: how long a client may read nothing of what is being sent to it.
    """

    connections: int = 1000
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    send_seconds: float = 30.0


class Stage(enum.IntEnum):
    """What a connection is at, in the order in which connections are given up for others."""

    IDLE = 0  # no request, or not all of its head; or a body that goes on after its answer
    BODY = 1  # a request's head is complete, its body is not
    SENDING = 2  # the answer is complete, and the client has not read it all
    ANSWER = 3  # a request is being answered: never given up


class Connection(Protocol):
    """What `Connections` needs to know of one."""

    transport: asyncio.Transport

    @property
    def stage(self) -> Stage:
        """What it is at."""


@dataclass
class _Watched:
    """When a connection came to its stage, and when it last sent something that was waiting to be sent."""

    stage: Stage
    since: float
    pending: int
    moved: float


class Connections:
    """All connections of a server, those first that have gone without a complete request for the longest."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all: dict[Connection, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._given_up = 0

    def __len__(self) -> int:
        """How many there are."""
        return len(self._all)

    def add(self, connection: Connection) -> None:
        """A connection was opened; closes another, or this one, if that is one too many."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._all[connection] = _Watched(Stage.IDLE, now, 0, now)
        if len(self._all) > self._limits.connections:
            self._give_up_one(connection)
        if self._timer is None:
            self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep)

    def remove(self, connection: Connection) -> None:
        """A connection is closed."""
        self._all.pop(connection, None)

    def renew(self, connection: Connection) -> None:
        """The head of a request is complete: the connection is useful, and the last to be given up."""
        if (watched := self._all.pop(connection, None)) is not None:
            watched.since = asyncio.get_running_loop().time()  # no sweep may see one that is answered at once
            self._all[connection] = watched

    def _give_up_one(self, newcomer: Connection) -> None:
        self._given_up += 1
        for stage in (Stage.IDLE, Stage.BODY, Stage.SENDING):
            for connection in self._all:
                if connection is not newcomer and connection.stage == stage:
                    self.abort(connection)
                    return
        self.abort(newcomer)

    def abort(self, connection: Connection) -> None:
        """Close without sending what is left; a client that does not read would never let that end."""
        self.remove(connection)
        connection.transport.abort()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection, watched in list(self._all.items()):
            self._update(connection, watched, now)
            if self._is_overdue(watched, now):
                self.abort(connection)
        if self._given_up:
            logger.warning(
                "%d connection(s) were closed: there may be no more than %d", self._given_up, self._limits.connections
            )
            self._given_up = 0
        self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep) if self._all else None

    def _update(self, connection: Connection, watched: _Watched, now: float) -> None:
        stage = connection.stage
        if stage != watched.stage:
            watched.stage, watched.since = stage, now
        # What waits grows while the application sends, which is soon held up. So what stays the same is stuck.
        pending = connection.transport.get_write_buffer_size()
        if not pending or pending != watched.pending:
            watched.pending, watched.moved = pending, now

    def _is_overdue(self, watched: _Watched, now: float) -> bool:
        if watched.pending and now - watched.moved > self._limits.send_seconds:
            return True
        allowed = {Stage.IDLE: self._limits.head_seconds, Stage.BODY: self._limits.body_seconds}.get(watched.stage)
        return allowed is not None and now - watched.since > allowed


def http_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """What uvicorn is to take as `http` to keep to `limits`, fitted to what this process may have open."""
    from h11 import LocalProtocolError
    from uvicorn.protocols.http.h11_impl import H11Protocol

    connections = Connections(_fitted(limits, raise_open_files()))

    class BoundedProtocol(H11Protocol):
        """uvicorn's protocol, watched.

        Besides what `asyncio.Protocol` has it relies on `transport` and `cycle`: the request in hand or the last one,
        with `more_body` while its body is not complete, and `response_complete`.
        """

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            _hold_little(transport)
            connections.add(self)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            # h11 measures a head that is not complete; one that came whole in a single large read would pass.
            for start in range(0, len(data), _HEAD_BYTES):
                try:
                    super().data_received(data[start : start + _HEAD_BYTES])
                except LocalProtocolError:  # a request's body went wrong when its answer had begun: too late for a 400
                    connections.abort(self)
                if self.transport.is_closing():
                    return
            if self.cycle is not before:
                connections.renew(self)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.remove(self)
            super().connection_lost(exc)

        @property
        def stage(self) -> Stage:
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                return Stage.BODY if cycle.more_body else Stage.ANSWER
            return Stage.SENDING if self.transport.get_write_buffer_size() else Stage.IDLE

    return cast("type[asyncio.Protocol]", BoundedProtocol)


def _hold_little(transport: asyncio.Transport) -> None:
    """Have the kernel take only what it can send soon.

    It would take up to 4 MB for a client that does not read, and after that nothing until a third of it was read, which
    at the speed of speech takes half a minute: a slow client could not be told from one that is stuck.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in {socket.AF_INET, socket.AF_INET6}:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def raise_open_files() -> int:
    """Allow this process as many open files as it may allow itself; returns how many that are, a million at most."""
    soft, hard = (_MOST_FILES if limit == resource.RLIM_INFINITY else limit for limit in _open_files())
    wanted = min(hard, _MOST_FILES)  # programs that a process starts may go through all numbers up to the limit
    if soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, _open_files()[1]))
    except (OSError, ValueError):  # as in some sandboxes
        return soft
    return wanted


def _open_files() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def _fitted(limits: Limits, open_files: int) -> Limits:
    possible = max(1, open_files - _RESERVE)
    if limits.connections <= possible:
        return limits
    logger.warning(
        "%d connections are more than %d open files leave room for; there may be %d",
        limits.connections,
        open_files,
        possible,
    )
    return replace(limits, connections=possible)
