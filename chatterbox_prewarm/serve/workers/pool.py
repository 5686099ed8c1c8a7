"""All workers, one for each device: who of those that wait is served next, and what happens when a worker dies.

A long text waits in the line part by part, so that a short one behind it is not held up by more than a part.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.serve.workers.backlog import Backlog
from chatterbox_prewarm.serve.workers.messages import PartOrder
from chatterbox_prewarm.serve.workers.sentence_split import split
from chatterbox_prewarm.serve.workers.supervisor import Supervisor, WorkerGoneError
from chatterbox_prewarm.system.limits import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from chatterbox_prewarm.errors import PrewarmError
    from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
    from chatterbox_prewarm.serve.workers.messages import Chunk
    from chatterbox_prewarm.serve.workers.spawn import Spawned
    from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder
    from chatterbox_prewarm.serve.workers.worker import WorkerConfig

logger = logging.getLogger(__name__)

#: How often a part is spoken anew, when its worker died.
_RETRIES = 1
#: Speech tokens to a chunk of a stream, a second of audio.
_CHUNK_TOKENS = 25
#: Weight of the latest part in the mean time that one takes.
_RECENT = 0.2


class BusyError(ModelError):
    """No worker had time for a request before its deadline."""


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How long a part may wait for a worker, and a worker may be silent (seconds)."""

    wait_seconds: float
    hang_seconds: float


class Pool:
    """Workers and the line before them.

    Args:
        config: limits.
        workers: configuration and first process of each, as `spawn` returned it.
        voices: those that were added, if any can be; it is told which are baked.
    """

    def __init__(
        self,
        config: PoolConfig,
        workers: Sequence[tuple[WorkerConfig, Spawned]],
        *,
        voices: VoiceStore | None = None,
    ) -> None:
        self.workers = [
            Supervisor(worker, first, hang_seconds=config.hang_seconds, on_change=self._changed)
            for worker, first in workers
        ]
        self._config = config
        self._voices = voices
        #: Called with a worker's seconds and those of the audio, for each part that was spoken.
        self.on_part: Callable[[float, float], None] = lambda *_: None
        self._line: collections.deque[asyncio.Future[Supervisor]] = collections.deque()
        self._part_seconds = 1.0

    @property
    def attached(self) -> bool:
        """Whether a worker has model and warm state in place."""
        return any(worker.attached for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Whether a worker can speak."""
        return any(worker.ready for worker in self.workers)

    @property
    def leading(self) -> Supervisor:
        """The worker that is furthest: whose phases are those of the start."""
        return max(self.workers, key=lambda worker: (worker.ready, worker.attached, not worker.failure))

    @property
    def failure(self) -> PrewarmError | None:
        """Why there will be no worker any more."""
        failures = [worker.failure for worker in self.workers]
        return failures[0] if all(failures) else None

    @property
    def waiting(self) -> int:
        """How many parts wait for a worker."""
        return len(self._line)

    @property
    def retry_after(self) -> int:
        """In how many seconds the line is likely to have moved by one for each worker."""
        able = sum(worker.ready for worker in self.workers) or 1
        return min(120, max(1, math.ceil(self._part_seconds * (1 + len(self._line) / able))))

    async def run(self) -> None:
        """Keep the workers alive until `close`; returns early when none is left, with `failure` set."""
        runs = [asyncio.create_task(worker.run()) for worker in self.workers]
        try:
            await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()

    def close(self) -> None:
        """From here on, a worker that ends is not replaced."""
        for worker in self.workers:
            worker.close()

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    async def speak(self, order: SpeechOrder, *, whole: bool = False) -> AsyncGenerator[Chunk]:
        """Speak a text, part by part in order.

        It is made ahead of whoever takes the chunks, by some parts at most. Closing the generator ends the work.

        Args:
            order: what to say, and how; without a seed, one is drawn.
            whole: make one chunk of each part.

        Raises:
            BusyError: no worker had time before the deadline.
            WorkerGoneError: a part's worker ended, and so did the next.
            PrewarmError: what the worker said of this request.
        """
        backlog = Backlog()
        maker = asyncio.create_task(self._make(order, backlog, whole=whole))
        try:
            async for chunk in backlog.chunks():
                yield chunk
        finally:
            maker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await maker

    async def prepare_voice(self, clip: bytes) -> bytes:
        """Make a voice of a reference clip, a WAV file; returns a safetensors file. Errors as `speak`."""
        voice: bytes = await self._retried(lambda worker: worker.prepare_voice(clip))
        return voice

    async def _make(self, order: SpeechOrder, backlog: Backlog, *, whole: bool) -> None:
        seed = order.seed if order.seed is not None else random.SystemRandom().getrandbits(31)
        most = self.workers[0].config.max_new_tokens
        try:
            # In a thread: the splitter is imported at its first use, and voices are on a volume.
            parts = await asyncio.to_thread(split, order.text)
            voice, digest = order.voice, None
            if self._voices:
                voice, digest = await asyncio.to_thread(self._voices.resolve, voice)
            silent: ModelError | None = None
            for number, text in enumerate(parts):
                await backlog.room()
                part = PartOrder(
                    text=text,
                    voice=voice,
                    voice_digest=digest,
                    # Of its own, or every part would begin with the same breath.
                    seed=(seed + number) % (MAX_SEED + 1),
                    max_new_tokens=min(order.max_new_tokens or most, most),
                    temperature=order.temperature,
                    cfg_weight=order.cfg_weight,
                    exaggeration=order.exaggeration,
                    look_ahead=order.look_ahead,
                    chunk_tokens=None if whole else _CHUNK_TOKENS,
                )
                try:
                    await self._speak_part(part, backlog)
                except (BusyError, WorkerGoneError):
                    raise
                except ModelError as error:
                    # A row of dots, say. The rest of a text is not to suffer for it.
                    logger.warning("part %d of %d is left out: %s", number + 1, len(parts), error.message)
                    silent = error
            if silent is not None and not backlog.given:
                raise silent  # noqa: TRY301 - there was nothing else
            backlog.end()
        except Exception as error:  # noqa: BLE001 - whatever it is, who takes the chunks is to hear it
            backlog.fail(error)

    async def _speak_part(self, part: PartOrder, backlog: Backlog) -> None:
        """Have one part spoken; what a worker that died has given of it is not given again."""
        given = 0

        async def take(worker: Supervisor) -> None:
            nonlocal given
            position = 0
            async with contextlib.aclosing(worker.speak(part)) as chunks:
                async for chunk in chunks:
                    fresh = chunk.pcm[max(0, given - position) :]
                    position += len(chunk.pcm)
                    if fresh:
                        backlog.put(replace(chunk, pcm=fresh))
                    given = max(given, position)
                    if chunk.seconds is not None:
                        self._part_seconds += _RECENT * (chunk.seconds - self._part_seconds)
                        self.on_part(chunk.seconds, position / 48_000)  # 16-bit samples at 24 kHz

        await self._retried(take)

    async def _retried(self, call: Callable[[Supervisor], Awaitable[Any]]) -> Any:
        """Make a call to the next free worker, and once more to another when that one dies of it."""
        for attempt in range(1 + _RETRIES):
            worker = await self._free_worker()
            try:
                return await call(worker)
            except WorkerGoneError as error:
                if attempt == _RETRIES:
                    raise
                logger.warning("%s; once more with the next worker", error.message)
        raise AssertionError("the loop returns or raises")

    async def _free_worker(self) -> Supervisor:
        """Wait in line for a worker, which is then taken.

        Raises:
            BusyError: none was free in time, or none will be.
        """
        place: asyncio.Future[Supervisor] = asyncio.get_running_loop().create_future()
        self._line.append(place)
        self._assign()
        try:
            await asyncio.wait([place], timeout=self._config.wait_seconds)
        except asyncio.CancelledError:
            if place in self._line:
                self._line.remove(place)
            elif place.exception() is None:
                place.result().release()
            raise
        if not place.done():
            self._line.remove(place)
            raise BusyError(
                f"no worker was free within {self._config.wait_seconds:.0f} s",
                next_step="try again later, or give the server more devices",
            )
        return place.result()

    def _changed(self) -> None:
        """A worker became free or ready, or is gone."""
        if self._voices is not None and self.leading.voices:
            self._voices.baked = self.leading.voices
        self._assign()

    def _assign(self) -> None:
        """Give free workers to those at the head of the line."""
        for worker in self.workers:
            if worker.free and self._line:
                worker.take()
                self._line.popleft().set_result(worker)
        if all(worker.ended for worker in self.workers):
            what = "no worker is left" if self.failure else "the server is shutting down, and its worker ended"
            while self._line:
                self._line.popleft().set_exception(WorkerGoneError(what, next_step="ask another server"))
