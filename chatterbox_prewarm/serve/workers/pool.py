"""Distribute the requests for one model to its workers, and repeat a request when its worker dies.

A long text is queued part by part, so that a short text behind it waits for one part at most.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import math
import operator
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.serve.workers.audio_buffer import AudioBuffer, Backlog
from chatterbox_prewarm.serve.workers.messages import Chunk
from chatterbox_prewarm.serve.workers.sentence_split import split
from chatterbox_prewarm.serve.workers.speech_options import ConversionOptions
from chatterbox_prewarm.serve.workers.supervisor import Supervisor
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError
from chatterbox_prewarm.system.limits import MAX_SEED
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from chatterbox_prewarm.errors import PrewarmError
    from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
    from chatterbox_prewarm.serve.workers.speech_options import AudioOptions, SpeechOptions
    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

#: How often a part is sent to another worker after its worker died.
_RETRIES = 1
#: Weight of the latest part in the moving average of the time per part.
_AVERAGE_WEIGHT = 0.2
_BYTES_PER_SECOND = 48_000  # 16-bit samples at 24 kHz


class BusyError(ModelError):
    """No worker was free before the deadline of a request."""


class Pool:
    """The workers of a model and the queue of parts that wait for one.

    Args:
        workers: configuration and first process of each worker, as `spawn_all` returned them.
        model: the name of the model in requests.
        wait_seconds: how long a part may wait for a worker.
        hang_seconds: how long a worker may send no message before it is replaced.
        voices: the store of added voices, if there is one. The pool tells it which voices are baked.
        backlog: the amount of audio that waits for clients, if all models of a server share it.

    Attributes:
        converts: True if the workers convert speech instead of speaking texts.
        was_ready: True once a worker could speak.
        on_part: called after each part with the worker's seconds and the seconds of audio.
        on_skipped: called for each part that cannot be spoken.
    """

    def __init__(
        self,
        workers: Sequence[tuple[WorkerConfig, WorkerProcess]],
        *,
        model: str = DEFAULT_VARIANT.name,
        wait_seconds: float,
        hang_seconds: float,
        voices: VoiceStore | None = None,
        backlog: Backlog | None = None,
    ) -> None:
        self.model = model
        self.workers = [
            Supervisor(config, first, hang_seconds=hang_seconds, on_change=self._worker_changed)
            for config, first in workers
        ]
        self._variant, self.converts = workers[0][0].model, workers[0][0].start.converts
        self.backlog = backlog or Backlog()
        self.was_ready = False
        self.on_part: Callable[[float, float], None] = lambda *_: None
        self.on_skipped: Callable[[], None] = lambda: None
        self._wait_seconds = wait_seconds
        self._voices = voices
        self._queue: collections.deque[asyncio.Future[Supervisor]] = collections.deque()
        self._part_seconds = 1.0

    @property
    def attached(self) -> bool:
        """True if a worker has loaded the model and the warm state."""
        return any(worker.attached for worker in self.workers)

    @property
    def ready(self) -> bool:
        """True if a worker can speak."""
        return any(worker.ready for worker in self.workers)

    @property
    def leading(self) -> Supervisor:
        """The worker whose start has progressed most. Its phases are shown as the phases of the start."""
        return max(self.workers, key=lambda worker: (worker.ready, worker.attached, not worker.failure))

    @property
    def failure(self) -> PrewarmError | None:
        """Why all workers failed permanently; None while one of them has not."""
        failures = [worker.failure for worker in self.workers]
        return failures[0] if all(failures) else None

    @property
    def waiting(self) -> int:
        """Number of parts that wait for a worker."""
        return len(self._queue)

    @property
    def retry_after(self) -> int:
        """Seconds after which a refused request should be sent again."""
        ready = sum(worker.ready for worker in self.workers) or 1
        return min(120, max(1, math.ceil(self._part_seconds * (1 + len(self._queue) / ready))))

    async def run(self) -> None:
        """Keep the workers alive until `close`. Returns early, with `failure` set, when all have failed."""
        runs = [asyncio.create_task(worker.run()) for worker in self.workers]
        try:
            await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()

    def close(self) -> None:
        """Stop replacing workers that end."""
        for worker in self.workers:
            worker.close()

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    def speak(
        self, options: SpeechOptions | ConversionOptions, *, on_complete: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Chunk]:
        """Speak a text or recorded speech, and yield the audio in order.

        The workers do not wait for the caller: the audio waits in a buffer. Closing the generator stops the work.
        Without a seed, a random one is used. One worker converts all of a recording, because only the worker can find
        the quiet places where long speech is cut.

        Args:
            options: the text or the recording, and the settings.
            on_complete: called when no worker is needed any more, even if the caller has not taken all audio.

        Raises:
            BusyError: no worker was free before the deadline.
            WorkerGoneError: the worker of a part ended, and so did the worker of its retry.
            PrewarmError: the error that a worker reported for this request.
        """
        if isinstance(options, ConversionOptions):
            return self._buffered(functools.partial(self._convert, options), on_complete)
        return self._buffered(functools.partial(self._speak_all, options), on_complete)

    async def _buffered(
        self, produce: Callable[[AudioBuffer], Awaitable[None]], on_complete: Callable[[], None]
    ) -> AsyncGenerator[Chunk]:
        """Yield what `produce` puts into a buffer."""
        buffer = AudioBuffer(self.backlog)
        producer = asyncio.ensure_future(produce(buffer))
        producer.add_done_callback(lambda _: on_complete())
        producer.add_done_callback(lambda _: buffer.end())
        try:
            while (chunk := await buffer.get()) is not None:
                yield chunk
            await producer
        finally:
            producer.cancel()
            await asyncio.gather(producer, return_exceptions=True)
            buffer.close()

    async def _convert(self, options: ConversionOptions, buffer: AudioBuffer) -> None:
        """Convert speech into a buffer."""
        voice, digest = await self._resolved(options)
        resolved = replace(options, voice=voice, voice_digest=digest, seed=_seed(options))
        await self._run(operator.methodcaller("convert", resolved), buffer.put)

    async def _resolved(self, options: AudioOptions) -> tuple[str, str | None]:
        """Return the name of the voice in the workers, and the digest of its file."""
        if not self._voices:
            return options.voice, options.voice_digest
        # In a thread, because the store reads a volume.
        return await asyncio.to_thread(self._voices.resolve, options.voice, self._variant)

    async def _speak_all(self, options: SpeechOptions, buffer: AudioBuffer) -> None:
        """Speak all parts of a text into a buffer."""
        seed = _seed(options)
        # In a thread, because the first split imports the splitter.
        texts = await asyncio.to_thread(split, options.text, options.language)
        voice, digest = await self._resolved(options)
        spoken, skipped, skipped_error = False, 0, None

        def put(chunk: Chunk) -> None:
            nonlocal spoken, skipped
            spoken = True
            buffer.put(replace(chunk, skipped=skipped))
            skipped = 0

        for number, text in enumerate(texts):
            await buffer.room()
            # Each part has another seed, or all of them would begin with the same breath.
            part_seed = (seed + number) % (MAX_SEED + 1)
            part = replace(options, text=text, voice=voice, voice_digest=digest, seed=part_seed)
            try:
                await self._run(operator.methodcaller("speak", part), put)
            except (BusyError, WorkerGoneError):
                raise
            except (BadInputError, ModelError) as error:
                # For example a row of dots, or another script. The other parts of the text can still be spoken.
                self.on_skipped()
                logger.warning("part %d of %d is left out: %s", number + 1, len(texts), error.message)
                skipped, skipped_error = skipped + 1, error
        if skipped_error is not None and not spoken:
            raise skipped_error
        if skipped:
            buffer.put(Chunk(pcm=b"", tokens=0, skipped=skipped))

    async def _run(self, start: Callable[[Supervisor], AsyncGenerator[Chunk]], put: Callable[[Chunk], None]) -> None:
        """Have a worker make audio, and `put` its chunks. A retry leaves out what the dead worker had sent."""
        sent = 0

        async def run(worker: Supervisor) -> None:
            nonlocal sent
            position = 0
            async with contextlib.aclosing(start(worker)) as chunks:
                async for chunk in chunks:
                    new = chunk.pcm[max(0, sent - position) :]
                    position += len(chunk.pcm)
                    if new:
                        put(replace(chunk, pcm=new))
                    sent = max(sent, position)
                    if chunk.seconds is not None:
                        self._part_seconds += _AVERAGE_WEIGHT * (chunk.seconds - self._part_seconds)
                        self.on_part(chunk.seconds, position / _BYTES_PER_SECOND)

        await self._with_retry(run)

    async def _with_retry(self, call: Callable[[Supervisor], Awaitable[Any]]) -> Any:
        """Call the next free worker. If it dies during the call, retry with another worker."""
        for attempt in range(1 + _RETRIES):
            worker = await self._free_worker()
            try:
                return await call(worker)
            except WorkerGoneError as error:
                if attempt == _RETRIES:
                    raise
                logger.warning("%s; retrying with the next worker", error.message)
        raise AssertionError("the loop returns or raises")

    async def _free_worker(self) -> Supervisor:
        """Wait in the queue for a worker, and return it reserved.

        Raises:
            BusyError: no worker was free in time.
            WorkerGoneError: no worker is left.
        """
        waiter: asyncio.Future[Supervisor] = asyncio.get_running_loop().create_future()
        self._queue.append(waiter)
        self._assign()
        try:
            await asyncio.wait([waiter], timeout=self._wait_seconds)
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._queue.remove(waiter)
            elif waiter.exception() is None:
                waiter.result().release()
            raise
        if not waiter.done():
            self._queue.remove(waiter)
            raise BusyError(
                f"no worker was free within {self._wait_seconds:.0f} s",
                next_step="try again later, or give the server more devices",
            )
        return waiter.result()

    def _worker_changed(self) -> None:
        self.was_ready = self.was_ready or self.ready
        if self._voices is not None and self.leading.voices:
            self._voices.baked[self._variant] = self.leading.voices
        self._assign()

    def _assign(self) -> None:
        """Give free workers to the parts at the head of the queue."""
        for worker in self.workers:
            if worker.free and self._queue:
                worker.reserve()
                self._queue.popleft().set_result(worker)
        if all(worker.ended for worker in self.workers):
            message = "no worker is left" if self.failure else "the server is shutting down, and its worker ended"
            while self._queue:
                self._queue.popleft().set_exception(WorkerGoneError(message, next_step="use another server"))


def _seed(options: AudioOptions) -> int:
    """Return the seed of a request, or a random one."""
    return options.seed if options.seed is not None else random.SystemRandom().getrandbits(31)
