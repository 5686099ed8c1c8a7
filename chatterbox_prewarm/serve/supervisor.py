"""The front's side of a worker: start it, follow its phases, hand it requests, start it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.child import rebuild
from chatterbox_prewarm.errors import ModelError, PrewarmError, from_os_error
from chatterbox_prewarm.process import PARENT
from chatterbox_prewarm.serve import frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from chatterbox_prewarm.serve.worker import WorkerConfig

logger = logging.getLogger(__name__)

#: A worker that dies before it was ready is started once more; after that the fault is not a passing one.
_ATTEMPTS = 2
#: A request may take this long, and so much more for each speech token, before its worker counts as hung. A busy CPU
#: needs half a second a token and some ten for the rest.
_TURN_SECONDS, _TOKEN_SECONDS = 120.0, 3.0
_STOP_SECONDS = 5.0


class WorkerGoneError(ModelError):
    """The worker ended while a request was with it or before it could take one."""


def spawn(config: WorkerConfig) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a worker process; returns it and our end of the socket pair."""
    ours, theirs = socket.socketpair()
    with theirs:
        config = replace(config, fd=theirs.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_prewarm.serve.worker", config.to_argument()],
            pass_fds=[theirs.fileno()],
            env={**os.environ, PARENT: str(os.getpid())},
            start_new_session=True,  # an interrupt from the terminal is for the front, which drains
        )
    return process, ours


class Supervisor:
    """One worker as the front sees it.

    Attributes:
        phase: what the worker is doing, for people; "ready" once a real synthesis has passed.
        attached, ready: as the design defines them.
        log: the worker's event log and counters as last reported.
        restarts: how often a worker that had died was replaced.
        failure: why there will be no worker any more.
    """

    def __init__(self, config: WorkerConfig, first: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
        self.phase = "starting"
        self.attached = False
        self.ready = False
        self.voices: list[str] = []
        self.log: dict[str, Any] = {}
        self.restarts = 0
        self.failure: PrewarmError | None = None
        self._config = config
        self._next = first
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._turn = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._closing = False
        self._process = first[0]

    async def run(self, on_failure: Callable[[], None]) -> None:
        """Keep a worker alive until `stop`; calls `on_failure` when that cannot be done."""
        attempts = 0
        while True:
            attempts += 1
            self._process, connection = self._next
            was_ready = await self._follow(connection)
            status = await asyncio.to_thread(self._process.wait)
            if self._closing:
                return
            if was_ready:
                attempts = 0
            if self.failure is None and attempts >= _ATTEMPTS:
                self.failure = ModelError(
                    f"the worker ended {attempts} times before it was ready, last with status {status}",
                    next_step="see its output above; if it was killed, give the container more memory",
                )
            if self.failure is None:
                logger.error("the worker ended with status %s; starting another", status)
                self.restarts += 1
                try:
                    self._next = spawn(replace(self._config, origin=None))
                except OSError as error:
                    self.failure = from_os_error(error, "starting a worker")
            if self.failure is not None:
                on_failure()
                return

    async def speak(self, request: dict[str, Any], *, gone: Callable[[], Awaitable[bool]]) -> bytes | None:
        """Have one request spoken, in turn; returns a WAV file, or None when its client had gone before.

        Args:
            request: for the worker.
            gone: asked when the request's turn comes.

        Raises:
            WorkerGoneError: there is no worker, or it ended meanwhile, or it hung and was ended.
            PrewarmError: what the worker said of this request.
        """
        async with self._turn:
            if await gone():
                return None
            if not self.ready or self._writer is None:
                raise WorkerGoneError(f"no worker is ready ({self.phase})", next_step="try again in a few seconds")
            number = next(self._ids)
            future = self._waiting[number] = asyncio.get_running_loop().create_future()
            tokens = min(request.get("max_new_tokens", self._config.max_new_tokens), self._config.max_new_tokens)
            try:
                self._writer.write(frames.encode({"type": "speak", "id": number, "request": request}))
                await self._writer.drain()
                return await asyncio.wait_for(future, _TURN_SECONDS + _TOKEN_SECONDS * tokens)
            except (asyncio.TimeoutError, TimeoutError) as error:
                logger.exception("the worker did not answer request %d; ending it", number)
                self._process.kill()
                raise WorkerGoneError("the worker hung", next_step="try again in a few seconds") from error
            except ConnectionError as error:
                raise WorkerGoneError("the worker ended", next_step="try again in a few seconds") from error
            finally:
                self._waiting.pop(number, None)

    def close(self) -> None:
        """From here on, a worker that ends is not replaced."""
        self._closing = True

    async def stop(self) -> None:
        """End the worker: one that is ready is told to and has a few seconds, any other is ended at once."""
        self.close()
        process = self._process
        if self.ready and self._writer is not None:
            with contextlib.suppress(ConnectionError):
                self._writer.write(frames.encode({"type": "stop"}))
                await self._writer.drain()
        else:
            process.terminate()
        try:
            await asyncio.to_thread(process.wait, _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("the worker did not end in %.0f s; killing it", _STOP_SECONDS)  # noqa: TRY400 - no fault of ours
            process.kill()

    async def _follow(self, connection: socket.socket) -> bool:
        """Take in a worker's messages until it is gone; returns whether it had become ready."""
        self.log = {}
        reader, self._writer = await asyncio.open_connection(sock=connection)
        was_ready = False
        try:
            while True:
                header, payload = await frames.read(reader)
                self._take(header, payload)
                was_ready = was_ready or self.ready
        except (asyncio.IncompleteReadError, ConnectionError):
            return was_ready
        finally:
            self._writer.close()
            self._writer = None
            self.phase, self.attached, self.ready = "worker gone", False, False
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(
                        WorkerGoneError("the worker ended during this request", next_step="send the request again")
                    )

    def _take(self, header: dict[str, Any], payload: bytes) -> None:
        self.log = header.get("metrics", self.log)
        match header["type"]:
            case "phase":
                self.phase = header["name"]
            case "attached":
                self.phase, self.attached, self.voices = "attached", True, header["voices"]
            case "ready":
                self.phase, self.ready = "ready", True
            case "failed":
                self.failure = rebuild(header)
            case "speech":
                self._resolve(header["id"], lambda future: future.set_result(payload))
            case "error":
                error = rebuild(header)
                self._resolve(header["id"], lambda future: future.set_exception(error))
            case other:
                raise AssertionError(f"a worker sent a message of the unknown type {other!r}")

    def _resolve(self, number: int, settle: Callable[[asyncio.Future[bytes]], None]) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            settle(future)
