"""The front's side of a worker: start it, follow its phases, hand it requests, start it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, PrewarmError, from_os_error
from chatterbox_prewarm.serve.workers import frames
from chatterbox_prewarm.serve.workers.log_lines import REQUEST_ID
from chatterbox_prewarm.serve.workers.messages import Chunk, Usage
from chatterbox_prewarm.serve.workers.spawn import spawn
from chatterbox_prewarm.system.json_subprocess import rebuild

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable

    from chatterbox_prewarm.serve.workers.messages import PartOrder
    from chatterbox_prewarm.serve.workers.spawn import Spawned
    from chatterbox_prewarm.serve.workers.worker import WorkerConfig

    Message = tuple[dict[str, Any], bytes]

logger = logging.getLogger(__name__)

#: A worker that dies before it was ready is started once more; after that the fault is not a passing one.
_ATTEMPTS = 2
#: Seconds before that: what a process held that was killed, a GPU's memory above all, is not free at once.
_PAUSE_SECONDS = 5.0
#: Into so many the time is divided after which a silent worker is ended.
_INTERVALS = 10
_STOP_SECONDS = 5.0


class WorkerGoneError(ModelError):
    """The worker ended while a request was with it or before it could take one."""


class Supervisor:
    """One worker as the front sees it. It has one request at a time.

    Args:
        config: of the worker.
        first: its first process, as `spawn` returned it.
        hang_seconds: a worker from which nothing is heard for so long is ended, be it at work, idle or in its start.
        on_change: called whenever `free`, `ready`, `ended` or `failure` may have changed.
        start: starts the processes after the first.
        pause_seconds: before another process is started after one that never was ready.

    Attributes:
        phase: what the worker is doing, for people; "ready" once a real synthesis has passed.
        attached, ready: as the design defines them.
        voices: those that it has from its start, and the bytes that each takes on its device.
        log: its event log and counters as last reported.
        usage: what it held then.
        restarts: how often a worker that had died was replaced.
        reason: why the last process did not become ready; None once one is.
        failure: why there will be no worker any more.
        ended: whether there is none and none will come, be it for a failure or since it was closed.
    """

    def __init__(
        self,
        config: WorkerConfig,
        first: Spawned,
        *,
        hang_seconds: float,
        on_change: Callable[[], None],
        start: Callable[[WorkerConfig], Spawned] = spawn,
        pause_seconds: float = _PAUSE_SECONDS,
    ) -> None:
        self.config = config
        self.phase = "starting"
        self.attached = False
        self.ready = False
        self.voices: dict[str, int] = {}
        self.log: dict[str, Any] = {}
        self.usage = Usage()
        self.restarts = 0
        self.reason: str | None = None
        self.failure: PrewarmError | None = None
        self.ended = False
        self._start = start
        self._pause_seconds = pause_seconds
        self._hang_seconds = hang_seconds
        self._on_change = on_change
        self._next = first
        self._process = first[0]
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[Message | PrewarmError]] = {}
        self._taken = False
        self._writer: asyncio.StreamWriter | None = None
        self._closing = asyncio.Event()
        self._heard = False
        self._reported: tuple[PrewarmError, bool] | None = None
        self._warming: str | None = None
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
        try:
            await self._keep_alive()
        except OSError as error:
            self._fail(from_os_error(error, "starting a worker"))
        finally:
            self.ended = True
            self._on_change()

    async def _keep_alive(self) -> None:
        attempts, ever_ready = 0, False
        while True:
            self._process, connection = self._next
            was_ready = await self._follow(connection)
            status = await self._exit_status()
            if self._closing.is_set():
                return
            ever_ready = ever_ready or was_ready
            attempts = 0 if was_ready else attempts + 1
            if attempts and (failure := self._final(attempts, status, ever_ready=ever_ready)):
                self._fail(failure)
                return
            if self._warming is not None:
                logger.error("the worker on %s died of the warm-up of %s", self.config.device, self._warming)
                self.config = replace(self.config, skipped=(*self.config.skipped, self._warming))
            logger.error("the worker on %s ended with status %s; starting another", self.config.device, status)
            if attempts:
                with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), self._pause_seconds)
                    return
            self.restarts += 1
            self._next = self._start(replace(self.config, origin=None))

    def _final(self, attempts: int, status: int, *, ever_ready: bool) -> PrewarmError | None:
        """Why no other process is started after one that did not become ready; None if one is.

        What the first start of all says of its input, of the weights or a state that does not fit, is final. A later
        one had the same input, so that what it says may pass, and so may a want of memory at any time.
        """
        error, passing = self._reported or (None, True)
        self.reason = f"it ended with status {status}" if error is None else error.message
        if error is not None and not (passing or ever_ready):
            return error
        if attempts < _ATTEMPTS:
            return None
        return error or ModelError(
            f"the worker ended {attempts} times before it was ready, last with status {status}",
            next_step="see its output above; if it was killed, give the container more memory",
        )

    def _fail(self, failure: PrewarmError) -> None:
        logger.error("there will be no worker on %s: %s", self.config.device, failure.message)
        self.phase, self.reason, self.failure = "failed", failure.message, failure

    async def _exit_status(self) -> int:
        """The status of a worker whose connection is closed; one that does not come to its end is killed."""
        try:
            return await asyncio.to_thread(self._process.wait, _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)

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
        self._closing.set()

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
                self._end_hung()
                return WorkerGoneError("the worker hung", next_step="try again in a few seconds")
            if isinstance(answer, PrewarmError) or answer[0]["type"] != "progress":
                return answer

    async def _watch(self) -> None:
        """End the worker when nothing at all comes from it: it was stopped, or something holds the whole process up.

        Time is counted in intervals: when it was this process that stood still, but one of them has passed.
        """
        silent = 0
        while silent < _INTERVALS:
            self._heard = False
            await asyncio.sleep(self._hang_seconds / _INTERVALS)
            silent = 0 if self._heard else silent + 1
        self._end_hung()

    def _end_hung(self) -> None:
        if self.phase == "hung":
            return
        logger.error("the worker on %s hangs (%s); ending it", self.config.device, self.phase)
        self.phase, self.ready = "hung", False  # at once, or the next request would be given to it
        self._process.kill()

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
        self.log, self._reported, self._warming = {}, None, None
        reader, self._writer = await asyncio.open_connection(sock=connection)
        watch = asyncio.create_task(self._watch())
        was_ready = False
        try:
            while True:
                self._take_in(*await frames.read(reader))
                was_ready = was_ready or self.ready
        except (asyncio.IncompleteReadError, ConnectionError):
            return was_ready
        finally:
            watch.cancel()
            self._writer.close()
            self._writer = None
            self.phase, self.attached, self.ready = "worker gone", False, False
            for answers in self._answers.values():
                answers.put_nowait(
                    WorkerGoneError("the worker ended during this request", next_step="send the request again")
                )
            self._on_change()

    def _take_in(self, header: dict[str, Any], payload: bytes) -> None:
        self._heard = True
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
                self.phase, self.ready, self.reason = "ready", True, None
                self._on_change()
            case "failed":
                self._reported = rebuild(header), header["passing"]
            case "warming":
                self._warming = header["step"]
            case "warmed":
                self._warming = None
            case "alive":
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
