"""The front process: probes, metrics and the speech API. It never imports torch and never waits for the model.

The worker is started before the HTTP packages are imported, so that both imports run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, PrewarmError
from chatterbox_prewarm.serve.speech_api import failure, failure_of, parse_speech, read_body
from chatterbox_prewarm.serve.supervisor import Supervisor, spawn
from chatterbox_prewarm.warmup.metrics import exec_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from chatterbox_prewarm.serve.worker import WorkerConfig

logger = logging.getLogger(__name__)

_BODY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where to listen, what to accept, and how long a drain may take (seconds)."""

    host: str
    port: int
    max_characters: int
    queue_limit: int
    drain_seconds: float


def serve(config: ServeConfig, worker: WorkerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Raises:
        BadInputError: the address cannot be listened on.
        PrewarmError: the worker could not start; of its kind.
    """
    # Until the loop handles it: with nothing in flight there is nothing to drain. Unhandled, it would not end the first
    # process of a container at all.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = listen(config.host, config.port)
    worker = replace(worker, origin=exec_time())
    first = spawn(worker)
    try:
        asyncio.run(Front(config, worker, first).run(listener))
    finally:
        if first[0].poll() is None:
            first[0].terminate()


def listen(host: str, port: int) -> socket.socket:
    """Bind the address before anything slow is begun.

    Raises:
        BadInputError: it is in use, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # early probes wait for the routes instead of being refused
    except OSError as error:
        listener.close()
        raise BadInputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            next_step="stop what is listening there, or choose another with --port",
        ) from error
    listener.set_inheritable(False)
    return listener


class Front:
    """The HTTP side: routes, what is in flight, and the drain."""

    def __init__(self, config: ServeConfig, worker: WorkerConfig, first: tuple[Any, socket.socket]) -> None:
        self._config = config
        self._supervisor = Supervisor(worker, first)
        self._in_flight = 0
        self._draining = False

    async def run(self, listener: socket.socket) -> None:
        """Serve on `listener` until a signal or a failed worker ends it."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        supervision = loop.create_task(self._supervisor.run(stop.set))

        import uvicorn

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Any:
                yield  # signals drain, and are handled above

        server = Server(
            uvicorn.Config(
                self.app(),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,  # after our own drain: for clients that do not read their answers
            )
        )
        serving = loop.create_task(server.serve(sockets=[listener]))
        stopping = loop.create_task(stop.wait())
        await asyncio.wait([serving, supervision, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await self._drain()
        server.should_exit = True
        await serving
        if self._supervisor.failure is not None:
            raise self._supervisor.failure
        await supervision

    async def _drain(self) -> None:
        """Refuse new requests, wait for those in flight, then let the worker end."""
        self._draining = True
        self._supervisor.close()
        logger.info("draining: %d request(s) in flight", self._in_flight)
        deadline = asyncio.get_running_loop().time() + self._config.drain_seconds
        while self._in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        if self._in_flight:
            logger.error("%d request(s) did not finish within %.0f s", self._in_flight, self._config.drain_seconds)
        await self._supervisor.stop()

    def app(self) -> Starlette:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        from chatterbox_prewarm.serve.exposition import Exposition

        self._exposition = Exposition(self._supervisor, lambda: self._in_flight)
        return Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/startupz", self._startupz),
                Route("/readyz", self._readyz),
                Route("/metrics", self._metrics),
                Route("/v1/audio/speech", self._speech, methods=["POST"]),
            ]
        )

    async def _livez(self, _: Request) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse("ok\n")

    async def _startupz(self, _: Request) -> Response:
        return self._status(ok=self._supervisor.attached)

    async def _readyz(self, _: Request) -> Response:
        return self._status(ok=self._supervisor.ready and not self._draining)

    def _status(self, *, ok: bool) -> Response:
        from starlette.responses import JSONResponse

        supervisor = self._supervisor
        body = {
            "phase": "draining" if self._draining else supervisor.phase,
            "attached": supervisor.attached,
            "ready": supervisor.ready,
            "voices": supervisor.voices,
            "restarts": supervisor.restarts,
            **supervisor.log,
        }
        return JSONResponse(body, status_code=200 if ok else 503)

    async def _metrics(self, _: Request) -> Response:
        from starlette.responses import Response

        return Response(self._exposition.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _speech(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response

        if (refusal := self._refusal()) is not None:
            return refusal
        wav = None
        try:
            # A body that trickles in is not in flight yet: it holds no place in the queue and no drain back.
            body = await asyncio.wait_for(read_body(request), _BODY_SECONDS)
            order = parse_speech(body, limit=self._config.max_characters)
            if (refusal := self._refusal()) is not None:  # much may have changed while the body arrived
                return refusal
            async with self._counted():
                wav = await self._supervisor.speak(order, gone=request.is_disconnected)
        except PrewarmError as error:
            return failure_of(error)
        except (asyncio.TimeoutError, TimeoutError):
            return failure(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s", "timeout")
        except ClientDisconnect:
            logger.info("a client went away before its request was complete")
        if wav is None:
            return Response(status_code=499)  # nobody reads it
        return Response(wav, media_type="audio/wav")

    def _refusal(self) -> Response | None:
        """Why a request cannot be taken on now."""
        if self._draining:
            return failure(503, "the server is shutting down", "draining")
        if not self._supervisor.ready:
            return failure(503, f"the server is not ready: {self._supervisor.phase}", "not_ready")
        if self._in_flight >= self._config.queue_limit:
            return failure(429, f"{self._in_flight} requests are waiting already", "queue_full")
        return None

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
