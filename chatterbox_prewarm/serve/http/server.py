"""The server process: probes, metrics and the speech API. It never imports torch and never waits for the model.

The workers have started before this module is imported, so that the imports of all processes run in parallel.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http import limited_server
from chatterbox_prewarm.serve.http.connections import Connections, Limits
from chatterbox_prewarm.serve.http.cross_origin import Sites
from chatterbox_prewarm.serve.http.limited_server import BACKLOG
from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import get_variant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.serve.http.access import Token
    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.workers.pools import Pools
    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

#: After the drain, clients have this time to read the rest of complete responses.
_LAST_READ_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of the server process.

    Attributes:
        host, port: the address to listen on.
        rules: what the server accepts in a request; `serve` fills in the models that speak texts.
        checkpoints: the directory of each model's checkpoint by its variant. Added voices must belong to them.
        voices_dir, max_voices: the directory of added voices, and their maximum number.
        voice_aliases: additional names of voices.
        queue_limit: the maximum number of requests in flight.
        queue_seconds: the time that a request may wait for a worker.
        hang_seconds: the time that a worker may be silent before it is replaced.
        drain_seconds: the time that requests have to finish after a signal.
        token: required by all requests except probes.
        sites: whose pages may use the server from a browser.
        limits: limits on connections.
        log_text: True to log the text of speech requests.
    """

    host: str
    port: int
    checkpoints: Mapping[str, Path]
    voices_dir: Path
    max_voices: int
    queue_limit: int
    queue_seconds: float
    hang_seconds: float
    drain_seconds: float
    rules: SpeechRules = field(default_factory=SpeechRules)
    voice_aliases: Mapping[str, str] = field(default_factory=dict)
    token: Token | None = None
    sites: Sites = field(default_factory=Sites)
    limits: Limits = field(default_factory=Limits)
    log_text: bool = False


def serve(config: ServeConfig, workers: Sequence[tuple[WorkerConfig, WorkerProcess]]) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        config: the settings of the server.
        workers: configuration and process of each worker.

    Raises:
        BadInputError: the server cannot listen on the address.
        WeightsError: a checkpoint is missing.
        PrewarmError: all workers of a model failed. The type tells the cause.
    """
    # Until the event loop handles signals there are no requests to drain. The handler is necessary because the first
    # process of a container ignores SIGTERM by default.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = listen(config.host, config.port)
    rules = config.rules.for_variants([get_variant(name) for name in config.checkpoints], config.checkpoints)
    digests = {name: read_record(path).set_digest for name, path in config.checkpoints.items()}
    voices = VoiceStore(config.voices_dir, digests, max_voices=config.max_voices, aliases=config.voice_aliases)
    asyncio.run(_run(replace(config, rules=rules), workers, voices, listener))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address.

    Args:
        host: a name or an address; an IPv6 address may have brackets as in a URL. `::` listens on IPv4, too.
        port: the port.

    Raises:
        BadInputError: the address is in use, or does not belong to this machine.
    """
    address = host.removeprefix("[").removesuffix("]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if address == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(BACKLOG)  # early probes wait for the routes instead of being refused
    except OSError as error:
        listener.close()
        raise BadInputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            next_step="stop the program that listens there, or choose another port with --port",
        ) from error
    listener.set_inheritable(False)
    return listener


async def _run(
    config: ServeConfig,
    workers: Sequence[tuple[WorkerConfig, WorkerProcess]],
    voices: VoiceStore,
    listener: socket.socket,
) -> None:
    """Serve on `listener` until a signal arrives or the last worker of a model fails, then drain.

    Raises:
        PrewarmError: the reason why no worker of the model is left.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    pools = _make_pools(config, workers, voices)
    supervision = loop.create_task(pools.run())

    from chatterbox_prewarm.serve.http.access import check_access
    from chatterbox_prewarm.serve.http.admission import Admission, close_while_draining
    from chatterbox_prewarm.serve.http.app import App
    from chatterbox_prewarm.serve.http.cross_origin import allow_origins
    from chatterbox_prewarm.serve.http.request_log import log_requests

    admission = Admission(pools, limit=config.queue_limit)
    application = App(pools, admission, voices, config.rules).asgi()
    checked = check_access(application, config.token, config.sites)
    app = close_while_draining(allow_origins(checked, config.sites.origins), admission)
    connections = Connections(limited_server.reduce_to(limited_server.raise_open_files(), config.limits))
    server = limited_server.server(
        log_requests(app, application.routes, log_text=config.log_text),
        listener,
        connections,
        headers=[("X-Content-Type-Options", "nosniff")],
        server_header=False,
        proxy_headers=False,  # the application uses neither the client's address nor the scheme
        timeout_graceful_shutdown=5,
    )
    serving = loop.create_task(server.serve(sockets=[listener]))
    stopping = loop.create_task(stop.wait())
    await asyncio.wait([serving, supervision, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    await _drain(pools, admission, config.drain_seconds)
    await connections.finish(_LAST_READ_SECONDS)
    server.should_exit = True
    await serving
    await supervision
    if pools.failure is not None:
        raise pools.failure


def _make_pools(
    config: ServeConfig, workers: Sequence[tuple[WorkerConfig, WorkerProcess]], voices: VoiceStore
) -> Pools:
    """Make a pool for each model from the workers of all."""
    from chatterbox_prewarm.serve.workers.audio_buffer import Backlog
    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.pools import Pools
    from chatterbox_prewarm.weights.variants import CONVERSION_MODEL

    backlog = Backlog()
    return Pools(
        [
            Pool(
                [worker for worker in workers if worker[0].pool == model],
                model=model,
                wait_seconds=config.queue_seconds,
                hang_seconds=config.hang_seconds,
                voices=voices,
                backlog=backlog,
            )
            for model in (*config.checkpoints, *([CONVERSION_MODEL] if config.rules.converts else []))
        ]
    )


async def _drain(pools: Pools, admission: Admission, seconds: float) -> None:
    admission.draining = True
    pools.close()
    logger.info("draining: %d response(s) are not complete", admission.responding)
    if not await admission.drained(seconds):
        logger.error("%d response(s) were not complete within %.0f s", admission.responding, seconds)
    await pools.stop()
