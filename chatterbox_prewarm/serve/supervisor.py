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
from chatterbox_prewarm.serve.log_lines import REQUEST_ID
from chatterbox_prewarm.serve.messages import Chunk, Usage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from chatterbox_prewarm.serve.messages import PartOrder
    from chatterbox_prewarm.serve.worker import WorkerConfig

    Message = tuple[dict[str, Any], bytes]
    Spawned = tuple[subprocess.Popen[bytes], socket.socket]

logger = logging.getLogger(__name__)

#: A worker that dies before it was ready is started once more; after that the fault is not a passing one.
_ATTEMPTS = 2
_STOP_SECONDS = 5.0


class WorkerGoneError(ModelError):
    """The worker ended while a request was with it or before it could take one."""


def spawn(config: WorkerConfig) -> Spawned:
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


def spawn_all(configs: Sequence[WorkerConfig]) -> list[tuple[WorkerConfig, Spawned]]:
    """Start a worker for each configuration, side by side.

    Raises:
        OSError: one could not be started; the others were ended.
    """
    started: list[tuple[WorkerConfig, Spawned]] = []
    try:
        for config in configs:
            started.append((config, spawn(config)))  # noqa: PERF401 - what was started is needed when one fails
    except OSError:
        for _, (process, _) in started:
            process.terminate()
        raise
    return started


class Supervisor:
    """One worker as the front sees it. It has one request at a time.

    Args:
        config: of the worker.
        first: its first process, as `spawn` returned it.
        hang_seconds: a worker that is at work and silent for so long is ended.
        on_change: called whenever `free`, `ready` or `failure` may have changed.

    Attributes:
        phase: what the worker is doing, for people; "ready" once a real synthesis has passed.
        attached, ready: as the design defines them.
        voices: those that it has from its start, and the bytes that each takes on its device.
        log: its event log and counters as last reported.
        usage: what it held then.
        restarts: how often a worker that had died was replaced.
        failure: why there will be no worker any more.
    """

    def __init__(
        self,
        config: WorkerConfig,
        first: Spawned,
        *,
        hang_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        self.config = config
        self.phase = "starting"
        self.attached = False
        self.ready = False
        self.voices: dict[str, int] = {}
        self.log: dict[str, Any] = {}
        self.usage = Usage()
        self.restarts = 0
        self.failure: PrewarmError | None = None
        self._hang_seconds = hang_seconds
        self._on_change = on_change
        self._next = first
        self._process = first[0]
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[Message | PrewarmError]] = {}
        self._taken = False
        self._writer: asyncio.StreamWriter | None = None
        self._closing = False
        self._settling: set[asyncio.Task[None]] = set()

    @property
    def free(self) -> bool:
        """Whether it can take a request now."""
        return self.ready and not self._taken

    @property
    def busy(self) -> bool:
        """Whether a request is with it."""
        return self._taken

    @property
    def pid(self) -> int:
        """Of the process that runs now, or ran last."""
        return self._process.pid

    def take(self) -> None:
        """Reserve it for one call of `speak` or `prepare_voice`, or of `release`."""
        self._taken = True

    def release(self) -> None:
        """Give it back."""
        self._taken = False
        self._on_change()

    async def run(self) -> None:
        """Keep a worker alive until `close`; ends with `failure` set when that cannot be done."""
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
                logger.error("the worker on %s ended with status %s; starting another", self.config.device, status)
                self.restarts += 1
                try:
                    self._next = spawn(replace(self.config, origin=None))
                except OSError as error:
                    self.failure = from_os_error(error, "starting a worker")
            if self.failure is not None:
                self.phase = "failed"
                self._on_change()
                return

    async def speak(self, part: PartOrder) -> AsyncGenerator[Chunk]:
        """Have a text spoken by the worker, which was taken before and is released when it can do something else.

        Closing the generator ends the worker's work on it, which takes at most a chunk.

        Raises:
            WorkerGoneError: the worker ended, or could not go on, or hung and was ended.
            PrewarmError: what the worker said of this request.
        """
        exchange = self._exchange({"type": "speak", "part": part.to_message()})
        async with contextlib.aclosing(exchange):
            async for header, payload in exchange:
                yield Chunk(pcm=payload, tokens=header["tokens"], seconds=header.get("seconds"))

    async def prepare_voice(self, clip: bytes) -> bytes:
        """Have the worker make a voice; taking, releasing and errors as with `speak`.

        Args:
            clip: a WAV file.

        Returns:
            a safetensors file.
        """
        exchange = self._exchange({"type": "voice"}, clip)
        async with contextlib.aclosing(exchange):
            async for _, payload in exchange:
                return payload
        raise AssertionError("an exchange ends with an answer or an error")

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

    async def _exchange(self, header: dict[str, Any], payload: bytes = b"") -> AsyncGenerator[Message]:
        """Send a request and give its answers up to the last."""
        number = next(self._ids)
        answers = self._answers[number] = asyncio.Queue()
        ended = False
        try:
            if not self.ready or self._writer is None:
                ended = True
                raise WorkerGoneError(f"no worker is ready ({self.phase})", next_step="try again in a few seconds")
            self._writer.write(frames.encode({**header, "id": number, "request": REQUEST_ID.get()}, payload))
            await self._writer.drain()
            while not ended:
                answer = await self._next_answer(answers)
                if isinstance(answer, PrewarmError):
                    ended = True
                    raise answer
                ended = answer[0]["last"]
                if ended:
                    self._settled(number)
                yield answer
        except ConnectionError as error:
            ended = True
            raise WorkerGoneError("the worker ended", next_step="try again in a few seconds") from error
        finally:
            if ended:
                self._settled(number)
            else:
                # Whoever asked is gone. The worker is not free before it has noticed, which nobody is to wait for here.
                task = asyncio.get_running_loop().create_task(self._call_off(number, answers))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)

    async def _next_answer(self, answers: asyncio.Queue[Message | PrewarmError]) -> Message | PrewarmError:
        """The next answer but reports of progress; a worker from which nothing comes is ended."""
        while True:
            try:
                answer = await asyncio.wait_for(answers.get(), self._hang_seconds)
            except (asyncio.TimeoutError, TimeoutError):
                logger.error("the worker on %s hangs; ending it", self.config.device)  # noqa: TRY400 - not ours
                self.phase, self.ready = "hung", False  # at once, or the next request would be given to it
                self._process.kill()
                return WorkerGoneError("the worker hung", next_step="try again in a few seconds")
            if isinstance(answer, PrewarmError) or answer[0]["type"] != "progress":
                return answer

    async def _call_off(self, number: int, answers: asyncio.Queue[Message | PrewarmError]) -> None:
        """Tell the worker that a request is not wanted any more, and wait until it has left it."""
        with contextlib.suppress(ConnectionError):
            if self._writer is not None:
                self._writer.write(frames.encode({"type": "cancel", "id": number}))
                await self._writer.drain()
        while True:
            answer = await self._next_answer(answers)
            if isinstance(answer, PrewarmError) or answer[0]["last"]:
                break
        self._settled(number)

    def _settled(self, number: int) -> None:
        """A request is with the worker no longer."""
        if self._answers.pop(number, None) is not None:
            self.release()

    async def _follow(self, connection: socket.socket) -> bool:
        """Take in a worker's messages until it is gone; returns whether it had become ready."""
        self.log = {}
        reader, self._writer = await asyncio.open_connection(sock=connection)
        was_ready = False
        try:
            while True:
                self._take_in(*await frames.read(reader))
                was_ready = was_ready or self.ready
        except (asyncio.IncompleteReadError, ConnectionError):
            return was_ready
        finally:
            self._writer.close()
            self._writer = None
            self.phase, self.attached, self.ready = "worker gone", False, False
            for answers in self._answers.values():
                answers.put_nowait(
                    WorkerGoneError("the worker ended during this request", next_step="send the request again")
                )
            self._on_change()

    def _take_in(self, header: dict[str, Any], payload: bytes) -> None:
        self.log = header.get("metrics", self.log)
        if "usage" in header:
            self.usage = Usage(**header["usage"])
        match header["type"]:
            case "phase":
                self.phase = header["name"]
            case "attached":
                self.phase, self.attached, self.voices = "attached", True, header["voices"]
                self._on_change()
            case "ready":
                self.phase, self.ready = "ready", True
                self._on_change()
            case "failed":
                self.failure = rebuild(header)
            case "warmed":
                pass
            case "error" | "cancelled" | "voice" | "audio" | "progress":
                self._hand_on(header, payload)
            case other:
                raise AssertionError(f"a worker sent a message of the unknown type {other!r}")

    def _hand_on(self, header: dict[str, Any], payload: bytes) -> None:
        """Give an answer to whoever waits for it."""
        answer: Message | PrewarmError = (header, payload)
        match header["type"]:
            case "error" if header["broken"]:
                answer = WorkerGoneError(header["error"], next_step=header["next_step"])
                self.phase, self.ready = "ending", False
            case "error":
                answer = rebuild(header)
            case "cancelled" | "voice":
                answer = ({**header, "last": True}, payload)
        if header["id"] in self._answers:
            self._answers[header["id"]].put_nowait(answer)
