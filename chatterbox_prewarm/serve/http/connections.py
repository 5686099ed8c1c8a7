"""Limits on connections: their number, and the time that each may take.

uvicorn closes a connection that stays idle after a response. It has no limit for a request head that arrives slowly,
for a client that connects and sends nothing, for a client that does not read its response, or for the number of
connections. `limited_server` adds these limits to uvicorn's h11 protocol.
"""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.http.access import is_probe

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 1.0
#: Connections beyond the limit that are open until their request head shows whether they are a probe's. So a busy
#: server still answers probes.
PROBE_CONNECTIONS = 8


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
    """All connections of a server.

    When there are too many, one is closed: of those in the earliest stage, one of the peer that has the most
    connections. So a client that opens many connections closes its own. Behind a proxy all connections have the same
    peer, and the one with the oldest request head is closed.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        #: By peer. Those of a peer are in the order of their last complete request head, oldest first.
        self._peers: dict[str, dict[Any, _Connection]] = {}
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed_for_room = 0

    def add(self, protocol: Any) -> None:
        """Register a new connection. If there are too many, close one that is not in use, or else this one."""
        loop = asyncio.get_running_loop()
        self._peers.setdefault(_peer_of(protocol), {})[protocol] = _Connection(protocol, loop.time())
        self._count += 1
        if self._count > self.limits.connections + PROBE_CONNECTIONS:
            self._close_least_useful(protocol, (Stage.IDLE, Stage.BODY, Stage.SENDING))
        if self._timer is None:
            self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep)

    def remove(self, protocol: Any) -> None:
        """Forget a closed connection."""
        peer = _peer_of(protocol)
        if self._peers.get(peer, {}).pop(protocol, None) is not None:
            self._count -= 1
            if not self._peers[peer]:
                del self._peers[peer]

    def renew(self, protocol: Any) -> None:
        """Record that a request head is complete. This makes the connection the peer's last candidate for closing.

        A request other than a probe must have room within the limit.
        """
        connections = self._peers.get(_peer_of(protocol), {})
        if (connection := connections.pop(protocol, None)) is not None:
            # A request with a fast response may fall between two sweeps, so its stage might never be seen.
            connection.stage_began = asyncio.get_running_loop().time()
            connections[protocol] = connection
            if self._count > self.limits.connections and not is_probe(protocol.scope["path"]):
                self._make_room_for_request(protocol)

    def abort(self, protocol: Any) -> None:
        """Close a connection without sending the remaining data, which could take forever if the client reads none."""
        self.remove(protocol)
        protocol.transport.abort()

    async def finish(self, seconds: float) -> None:
        """Close the connections that wait for the application, and after `seconds` those whose client still reads.

        uvicorn would cancel their tasks at the end, and log that as an exception of the application.
        """
        self._abort_all(Stage.BODY, Stage.RESPONDING)
        deadline = asyncio.get_running_loop().time() + seconds
        while self._in_stage(Stage.SENDING) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        self._abort_all(Stage.BODY, Stage.SENDING, Stage.RESPONDING)

    def _abort_all(self, *stages: Stage) -> None:
        for protocol in self._in_stage(*stages):
            self.abort(protocol)

    def _in_stage(self, *stages: Stage) -> list[Any]:
        everything = [item for connections in self._peers.values() for item in connections.items()]
        return [protocol for protocol, connection in everything if connection.current_stage() in stages]

    def _make_room_for_request(self, newest: Any) -> None:
        """Close a connection if all within the limit have a request. Idle ones stay, because a probe may follow."""
        if len(self._in_stage(Stage.BODY, Stage.SENDING, Stage.RESPONDING)) > self.limits.connections:
            self._close_least_useful(newest, (Stage.BODY, Stage.SENDING))

    def _close_least_useful(self, newest: Any, stages: Sequence[Stage]) -> None:
        """Close a connection in one of the stages, or `newest` if there is no other."""
        self._closed_for_room += 1
        largest_first = sorted(self._peers.values(), key=len, reverse=True)
        for stage in stages:
            for connections in largest_first:
                for protocol, connection in connections.items():
                    if protocol is not newest and connection.current_stage() == stage:
                        self.abort(protocol)
                        return
        self.abort(newest)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        everything = [item for connections in self._peers.values() for item in connections.items()]
        for protocol, connection in everything:
            if connection.is_overdue(self.limits, now):
                self.abort(protocol)
        if self._closed_for_room:
            logger.warning("closed %d connection(s): the limit is %d", self._closed_for_room, self.limits.connections)
            self._closed_for_room = 0
        self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep) if self._peers else None


def _peer_of(protocol: Any) -> str:
    """Return what identifies a client: its IPv4 address, or the first 64 bits of its IPv6 address."""
    host = protocol.client[0] if protocol.client else ""
    if ":" not in host:
        return str(host)
    address = ipaddress.IPv6Address(host.partition("%")[0])
    return str(address.ipv4_mapped or int(address) >> 64)
