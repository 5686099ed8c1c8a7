"""The limit on requests in flight, and the refusal of new requests during a drain."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.http.error_responses import error_response
from chatterbox_prewarm.serve.workers.pools import slowest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from chatterbox_prewarm.serve.workers.pools import Pools


class Admission:
    """Decides whether the server accepts a request, and counts the requests in flight.

    Args:
        pools: the models.
        limit: the maximum number of requests in flight, both queued and being processed.

    Attributes:
        in_flight: the number of accepted requests that still need a worker.
        responding: the number of accepted requests without a complete response: those in flight, and those whose client
            has not read everything.
        draining: True when the server accepts no more requests.
    """

    def __init__(self, pools: Pools, *, limit: int) -> None:
        self._pools = pools
        self.limit = limit
        self.in_flight = 0
        self.responding = 0
        self.draining = False

    def refusal(self, model: str | None = None) -> Response | None:
        """Return an error response if the server cannot accept a request now.

        Args:
            model: the model of the request; None if the server does not know it yet.
        """
        if self.draining:
            return error_response(503, "the server is shutting down", "draining")
        if not self._pools.ready:
            return error_response(503, f"the server is not ready: {slowest(self._pools).leading.phase}", "not_ready")
        if model is not None and not self._pools[model].ready:
            phase = self._pools[model].leading.phase
            return error_response(503, f"the model {self._pools[model].model} is not ready: {phase}", "not_ready")
        retry_after = self._pools[model or ""].retry_after
        if self.in_flight >= self.limit:
            message = f"the queue is full: {self.in_flight} requests are in flight"
            return error_response(429, message, "queue_full", retry_after=retry_after)
        if self._pools.backlog.is_full:
            message = f"{self._pools.backlog.size >> 20} MiB of audio wait for clients that read slowly"
            return error_response(429, message, "queue_full", retry_after=retry_after)
        return None

    @contextlib.contextmanager
    def accepted(self) -> Iterator[Callable[[], None]]:
        """Count a request as in flight within the `with` block.

        Yields:
            a function that makes room for another request before the end of the block: the workers have finished, and
            only the client has to read. A drain waits for the end of the block.
        """
        self.in_flight += 1
        self.responding += 1
        released = False

        def release() -> None:
            nonlocal released
            self.in_flight -= not released
            released = True

        try:
            yield release
        finally:
            release()
            self.responding -= 1

    async def drained(self, seconds: float) -> bool:
        """Wait up to `seconds` for the responses to accepted requests. Returns False if some are not complete."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.responding and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return not self.responding


def close_while_draining(app: ASGIApp, admission: Admission) -> ASGIApp:
    """Wrap `app` in middleware that adds `Connection: close` to the responses of a draining server.

    A client with a kept-alive connection would retry a refused request on the same connection, and so reach this server
    again. A new connection reaches another replica.
    """

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and admission.draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await app(scope, receive, send_closing)

    return middleware
