"""Which requests are taken on, and which of them are not answered yet."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.http.speech_api import failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from chatterbox_prewarm.serve.workers.pool import Pool


class Admission:
    """The bound on requests at a time, and the end of taking any.

    Args:
        pool: speaks them.
        limit: most requests at a time, those being spoken too.

    Attributes:
        in_flight: how many there are.
        draining: whether no more are taken on.
    """

    def __init__(self, pool: Pool, *, limit: int) -> None:
        self._pool = pool
        self.limit = limit
        self.in_flight = 0
        self.draining = False

    def refusal(self) -> Response | None:
        """Why a request cannot be taken on now."""
        if self.draining:
            return failure(503, "the server is shutting down", "draining")
        if not self._pool.ready:
            return failure(503, f"the server is not ready: {self._pool.leading.phase}", "not_ready")
        if self.in_flight >= self.limit:
            return failure(
                429,
                f"{self.in_flight} requests are waiting already",
                "queue_full",
                retry_after=self._pool.retry_after,
            )
        return None

    @contextlib.contextmanager
    def taken_on(self) -> Iterator[None]:
        """Count a request until the block is left."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def drained(self, seconds: float) -> bool:
        """Wait until all that was taken on is answered; False when that took too long."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return not self.in_flight


class CloseWhileDraining:
    """ASGI middleware: has each answer of a draining server end its connection.

    A client that keeps its connection would come back on it with the request that was refused, to a server that takes
    none any more; on a new one it comes to another.

    Args:
        app: the application.
        admission: knows whether the server drains.
    """

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, adding a header to what it sends."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._admission.draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, closing)
