"""The front's connection to a worker: send it requests, receive the answers, and notice when it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, PrewarmError
from chatterbox_prewarm.serve.workers import messages
from chatterbox_prewarm.serve.workers.log_lines import REQUEST_ID
from chatterbox_prewarm.serve.workers.messages import Chunk, Usage
from chatterbox_prewarm.system.json_subprocess import rebuild

if TYPE_CHECKING:
    import socket
    import subprocess
    from collections.abc import AsyncGenerator, Callable

    from chatterbox_prewarm.serve.workers.messages import Message
    from chatterbox_prewarm.serve.workers.speech_options import ConversionOptions, SpeechOptions
    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig

    Answers = asyncio.Queue[Message | PrewarmError]

logger = logging.getLogger(__name__)

#: The watchdog divides its timeout into this many intervals.
_INTERVALS = 10
_RETRY = "try again in a few seconds"


class WorkerGoneError(ModelError):
    """The worker ended before or during a request."""


class WorkerClient:
    """The connection to a worker, which has at most one request at a time.

    Args:
        config: configuration of the worker.
        process: the process that `follow` will connect to.
        hang_seconds: a worker that sends no message for this long is killed, during its start, a request or idle time.
        on_change: called whenever `free` or `ready` may have changed.

    Attributes:
        phase: current activity of the worker, for people; "ready" after the check.
        attached, ready: whether the model and the warm state are loaded; whether every stage of a synthesis has run.
        voices: names of the voices in the worker since its start, and the bytes of each on its device.
        log: event log and counters that the worker sent last, as `StartMetrics.to_dict` returns them.
        usage: resource usage that the worker sent last.
        busy: whether the worker is reserved for a request.
        reason: why the last process did not become ready; None once a process is ready.
    """

    def __init__(
        self,
        config: WorkerConfig,
        process: subprocess.Popen[bytes],
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
        self.busy = False
        self.reason: str | None = None
        self._process = process
        self._hang_seconds = hang_seconds
        self._on_change = on_change
        self._ids = itertools.count(1)
        self._answers: dict[int, Answers] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._heard = False
        #: The error that the worker reported during its start, and whether another start may succeed.
        self._start_error: tuple[PrewarmError, bool] | None = None
        self._warmup_step: str | None = None
        self._cancellations: set[asyncio.Task[None]] = set()

    @property
    def free(self) -> bool:
        """True if the worker can receive a request now."""
        return self.ready and not self.busy

    @property
    def pid(self) -> int:
        """Process id of the current worker process, or of the last one."""
        return self._process.pid

    def reserve(self) -> None:
        """Reserve the worker for one call of `speak`, or until `release`."""
        self.busy = True

    def release(self) -> None:
        """End the reservation."""
        self.busy = False
        self._on_change()

    async def speak(self, options: SpeechOptions) -> AsyncGenerator[Chunk]:
        """Have the reserved worker speak a text. The reservation ends when the worker can take the next request.

        Closing the generator cancels the request. The worker notices that after one chunk at the latest.

        Raises:
            WorkerGoneError: the worker ended, reported a fatal error, or hung and was killed.
            PrewarmError: the error that the worker reported for this request.
        """
        async with contextlib.aclosing(self._audio({"type": "speak", "options": asdict(options)})) as chunks:
            async for chunk in chunks:
                yield chunk

    async def convert(self, options: ConversionOptions) -> AsyncGenerator[Chunk]:
        """Have the reserved worker convert speech. The rest is as in `speak`."""
        fields = asdict(options)
        source = fields.pop("source")
        async with contextlib.aclosing(self._audio({"type": "convert", "options": fields}, source)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _audio(self, request: dict[str, Any], payload: bytes = b"") -> AsyncGenerator[Chunk]:
        """Send a request and yield the audio of its answers."""
        async with contextlib.aclosing(self._request(request, payload)) as answers:
            async for header, payload in answers:
                yield Chunk(
                    pcm=payload,
                    tokens=header["tokens"],
                    seconds=header.get("seconds"),
                    truncated=header["truncated"],
                )

    async def _request(self, header: dict[str, Any], payload: bytes = b"") -> AsyncGenerator[Message]:
        """Send a request and yield its answers up to the last one."""
        request_id = next(self._ids)
        answers = self._answers[request_id] = asyncio.Queue()
        finished = False
        try:
            if not self.ready or self._writer is None:
                finished = True
                raise WorkerGoneError(f"no worker is ready ({self.phase})", next_step=_RETRY)
            await self._send({**header, "id": request_id, "request": REQUEST_ID.get()}, payload)
            while not finished:
                answer = await self._next_answer(answers)
                if isinstance(answer, PrewarmError):
                    finished = True
                    raise answer
                finished = answer[0]["last"]
                if finished:
                    self._finish(request_id)
                yield answer
        except ConnectionError as error:
            finished = True
            raise WorkerGoneError("the worker ended", next_step=_RETRY) from error
        finally:
            if finished:
                self._finish(request_id)
            else:
                # The client is gone. The worker stays reserved until it has noticed, and the caller does not wait.
                task = asyncio.get_running_loop().create_task(self._cancel(request_id, answers))
                self._cancellations.add(task)
                task.add_done_callback(self._cancellations.discard)

    async def _send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        if self._writer is not None:
            self._writer.write(messages.encode(header, payload))
            await self._writer.drain()

    async def _next_answer(self, answers: Answers) -> Message | PrewarmError:
        """Return the next answer that is not a progress report. Kill the worker when it sends nothing in time."""
        while True:
            try:
                answer = await asyncio.wait_for(answers.get(), self._hang_seconds)
            except (asyncio.TimeoutError, TimeoutError):
                self._kill_hung()
                return WorkerGoneError("the worker hung", next_step=_RETRY)
            if isinstance(answer, PrewarmError) or answer[0]["type"] != "progress":
                return answer

    async def _cancel(self, request_id: int, answers: Answers) -> None:
        """Tell the worker to stop a request, and wait until it has stopped."""
        with contextlib.suppress(ConnectionError):
            await self._send({"type": "cancel", "id": request_id})
        while True:
            answer = await self._next_answer(answers)
            if isinstance(answer, PrewarmError) or answer[0]["last"]:
                break
        self._finish(request_id)

    def _finish(self, request_id: int) -> None:
        """Forget a request that the worker has answered, and release the worker."""
        if self._answers.pop(request_id, None) is not None:
            self.release()

    async def _watch(self) -> None:
        """Kill the worker when it sends no message at all, because it was stopped or something blocks its process.

        The timeout is counted in intervals: if this process itself was stopped, only one interval has passed.
        """
        silent = 0
        while silent < _INTERVALS:
            self._heard = False
            await asyncio.sleep(self._hang_seconds / _INTERVALS)
            silent = 0 if self._heard else silent + 1
        self._kill_hung()

    def _kill_hung(self) -> None:
        if self.phase == "hung":
            return
        logger.error("the %s hangs (%s); killing it", self.config.name, self.phase)
        self.phase, self.ready = "hung", False  # immediately, or the worker would receive the next request
        self._process.kill()

    async def _follow(self, connection: socket.socket) -> bool:
        """Handle the worker's messages until its process ends. Return whether it became ready."""
        self.log, self._start_error, self._warmup_step = {}, None, None
        reader, self._writer = await asyncio.open_connection(sock=connection)
        watch = asyncio.create_task(self._watch())
        was_ready = False
        try:
            while True:
                self._handle(*await messages.read(reader))
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

    def _handle(self, header: dict[str, Any], payload: bytes) -> None:
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
                self._start_error = rebuild(header), header["transient"]
            case "warming":
                self._warmup_step = header["step"]
            case "warmed":
                self._warmup_step = None
            case "alive":
                pass
            case "error" | "cancelled" | "audio" | "progress":
                self._deliver(header, payload)
            case other:
                raise AssertionError(f"a worker sent a message of the unknown type {other!r}")

    def _deliver(self, header: dict[str, Any], payload: bytes) -> None:
        """Pass an answer to the request that waits for it."""
        answer: Message | PrewarmError = (header, payload)
        match header["type"]:
            case "error" if header["fatal"]:
                answer = WorkerGoneError(header["error"], next_step=header["next_step"])
                self.phase, self.ready = "ending", False
            case "error":
                answer = rebuild(header)
            case "cancelled":
                answer = ({**header, "last": True}, payload)
        if header["id"] in self._answers:
            self._answers[header["id"]].put_nowait(answer)
