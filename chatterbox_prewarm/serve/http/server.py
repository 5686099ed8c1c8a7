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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.connections import AT_ONCE, WAITING, Limits, http_protocol
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.serve.workers.spawn import spawn_all
from chatterbox_prewarm.system.metrics import exec_time
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.serve.http.access import Token
    from chatterbox_prewarm.serve.workers.spawn import Spawned
    from chatterbox_prewarm.serve.workers.worker import WorkerConfig


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where to listen, what to accept, and how long things may take.

    Attributes:
        host, port: the address.
        max_characters: longest text that is taken.
        weights: the checkpoint, which an added voice must be of.
        voices_dir, max_voices: where added voices are, and how many there may be.
        voice_aliases: other names of voices.
        queue_limit: most requests at a time, those being spoken too.
        queue_seconds: how long one may wait for a worker.
        hang_seconds: how long a worker may be silent before it is replaced.
        drain_seconds: how long requests may finish after a signal.
        token: demanded of everybody but probes.
        limits: on connections.
        log_text: whether what is spoken is logged.
    """

    host: str
    port: int
    max_characters: int
    weights: Path
    voices_dir: Path
    max_voices: int
    queue_limit: int
    queue_seconds: float
    hang_seconds: float
    drain_seconds: float
    voice_aliases: Mapping[str, str] = field(default_factory=dict)
    token: Token | None = None
    limits: Limits = field(default_factory=Limits)
    log_text: bool = False


def serve(config: ServeConfig, workers: Sequence[WorkerConfig]) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        config: of the server.
        workers: one for each device; all are started at once.

    Raises:
        BadInputError: the address cannot be listened on.
        WeightsError: there is no checkpoint.
        PrewarmError: the worker could not start; of its kind.
    """
    # Until the loop handles it: with nothing in flight there is nothing to drain. Unhandled, it would not end the first
    # process of a container at all.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = listen(config.host, config.port)
    record = read_record(config.weights)
    voices = VoiceStore(
        config.voices_dir,
        baked={},
        variant=record.variant,
        weights=record.set_digest,
        max_voices=config.max_voices,
        aliases=config.voice_aliases,
    )
    origin = exec_time()
    started = spawn_all([replace(worker, origin=origin) for worker in workers])
    try:
        asyncio.run(Front(config, started, voices).run(listener))
    finally:
        for _, (process, _) in started:
            if process.poll() is None:
                process.terminate()


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
        listener.listen(WAITING)  # early probes wait for the routes instead of being refused
    except OSError as error:
        listener.close()
        raise BadInputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            next_step="stop what is listening there, or choose another with --port",
        ) from error
    listener.set_inheritable(False)
    return listener


class Front:
    """The server's life: it listens, it serves until a signal or for want of workers, it drains."""

    def __init__(
        self, config: ServeConfig, workers: Sequence[tuple[WorkerConfig, Spawned]], voices: VoiceStore
    ) -> None:
        self._config = config
        self._workers = workers
        self._voices = voices

    async def run(self, listener: socket.socket) -> None:
        """Serve on `listener` until a signal or the last worker's failure ends it.

        Raises:
            PrewarmError: why there is no worker any more.
        """
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        from chatterbox_prewarm.serve.workers.pool import Pool, PoolConfig

        config = self._config
        pool = Pool(
            PoolConfig(wait_seconds=config.queue_seconds, hang_seconds=config.hang_seconds),
            self._workers,
            voices=self._voices,
        )
        supervision = loop.create_task(pool.run())

        import uvicorn

        from chatterbox_prewarm.serve.http.access import Access
        from chatterbox_prewarm.serve.http.admission import Admission, CloseWhileDraining
        from chatterbox_prewarm.serve.http.app import App
        from chatterbox_prewarm.serve.http.request_log import RequestLog

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Any:
                yield  # signals drain, and are handled above

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                listener.listen(WAITING)

        admission = Admission(pool, limit=config.queue_limit)
        routes = App(pool, admission, self._voices, max_characters=config.max_characters).asgi()
        app = CloseWhileDraining(Access(routes, config.token), admission)
        server = Server(
            uvicorn.Config(
                RequestLog(app, log_text=config.log_text),
                lifespan="off",
                http=http_protocol(config.limits),
                ws="none",
                backlog=AT_ONCE,
                headers=[("X-Content-Type-Options", "nosniff")],
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
        admission.draining = True
        pool.close()
        logger.info("draining: %d request(s) in flight", admission.in_flight)
        if not await admission.drained(config.drain_seconds):
            logger.error("%d request(s) did not finish within %.0f s", admission.in_flight, config.drain_seconds)
        await pool.stop()
        server.should_exit = True
        await serving
        await supervision
        if pool.failure is not None:
            raise pool.failure
