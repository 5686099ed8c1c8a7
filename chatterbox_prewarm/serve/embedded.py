"""The server without HTTP, for other people's servers: warm when it is constructed, and then it speaks.

The models are in worker processes, as behind `chatterbox-prewarm serve`: the process that uses this imports no torch,
may call it from any thread, and survives a worker that dies. An event loop in a thread of its own keeps them alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import wave
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.text import check_text, check_voice_name
from chatterbox_prewarm.serve.workers.devices import ALL_GPUS, for_devices, parse_devices
from chatterbox_prewarm.serve.workers.pool import Pool, PoolConfig
from chatterbox_prewarm.serve.workers.spawn import spawn_all
from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder
from chatterbox_prewarm.serve.workers.worker import WorkerConfig
from chatterbox_prewarm.system.limits import MAX_SEED
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Mapping
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType
    from typing import TypeVar

    import numpy as np
    from numpy.typing import NDArray

    from chatterbox_prewarm.serve.workers.messages import Chunk

    T = TypeVar("T")

_POLL_SECONDS = 0.05


class ClosedError(ModelError):
    """The server was closed, before a call or during it."""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Watermarked mono speech, whole or a chunk of it.

    Attributes:
        data: 16-bit little-endian samples.
        sample_rate: in Hz.
    """

    data: bytes
    sample_rate: int = 24_000

    @property
    def pcm(self) -> NDArray[np.int16]:
        """The samples, int16 of shape (n,)."""
        import numpy as np

        return np.frombuffer(self.data, dtype="<i2")

    @property
    def wav(self) -> bytes:
        """The same as a WAV file."""
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.sample_rate)
            file.writeframes(self.data)
        return buffer.getvalue()

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.data) / 2 / self.sample_rate


class ChatterboxServer:
    """Workers that speak, one for each device. Constructing it returns when all are ready; it may be used as a context.

    Args:
        warm: the warm state, or a folder of several.
        weights: the checkpoint.
        cache: a writable directory for compilers and Numba.
        device: torch devices with commas between them; "cuda:all" is every GPU there is.
        voices: names and reference clips of voices to make at start unless they are baked.
        policy, key, signature, expected_digest: as for `load_warmup_cache`.
        profile: how to execute; the one baked by default.
        threads: of torch, for each worker; those on a CPU divide its cores by default.
        max_new_tokens: most speech tokens of each part of a text, 25 a second.
        requests_per_minute: the load to warm up for while idle, see `AdaptiveWarmup`.
        wait_seconds: how long a part of a text may wait for a worker.
        hang_seconds: how long a worker may be silent before it is replaced; they report every second.
        start_seconds: how long the start may take.

    Raises:
        PrewarmError: a worker could not start; of its kind.
    """

    def __init__(
        self,
        *,
        warm: Path = WARM,
        weights: Path = WEIGHTS,
        cache: Path = CACHE,
        device: str = "cpu",
        voices: Mapping[str, Path] | None = None,
        policy: str = "fallback",
        profile: str | None = None,
        key: Path | None = None,
        signature: Path | None = None,
        expected_digest: str | None = None,
        threads: int | None = None,
        max_new_tokens: int = 1000,
        requests_per_minute: float = 0.0,
        wait_seconds: float = 120.0,
        hang_seconds: float = 120.0,
        start_seconds: float = 1800.0,
    ) -> None:
        workers = for_devices(
            parse_devices(device),
            WorkerConfig(
                warm=str(warm),
                weights=str(weights),
                cache=str(cache),
                policy=policy,
                profile=profile,
                key=str(key) if key else None,
                signature=str(signature) if signature else None,
                expect_digest=expected_digest,
                device=device,
                voices={name: str(clip) for name, clip in (voices or {}).items()},
                threads=threads,
                max_new_tokens=max_new_tokens,
                requests_per_minute=requests_per_minute,
            ),
        )
        self._closed = False
        self._calls: set[Future[Any]] = set()
        self._gate = threading.Lock()  # of the two
        self._loop = asyncio.new_event_loop()
        # A worker ends with the thread that started it, so that it must be this one, which lives as long as we do.
        self._thread = threading.Thread(target=self._loop.run_forever, name="chatterbox-server", daemon=True)
        self._thread.start()
        try:
            limits = PoolConfig(wait_seconds=wait_seconds, hang_seconds=hang_seconds)
            self._pool: Pool = self._wait(self._start(limits, workers))
            self._supervision = asyncio.run_coroutine_threadsafe(self._pool.run(), self._loop)
        except BaseException:
            self._end_loop()
            raise
        try:
            self._wait(self._until_ready(start_seconds))
        except BaseException:
            self.close()
            raise

    @property
    def voices(self) -> list[str]:
        """The names of the voices."""
        return sorted(self._pool.leading.voices)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """For each worker its device, its restarts, and the log of its start as `WarmupMetrics.to_dict` gives it."""
        return [
            {"device": worker.config.device, "restarts": worker.restarts, **worker.log} for worker in self._pool.workers
        ]

    def generate(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        cfg_weight: float | None = None,
        exaggeration: float | None = None,
    ) -> Audio:
        """Speak a text; a long one is split at sentences. From any thread; calls beyond the number of workers wait.

        Raises:
            BadInputError: the text, the voice or a setting cannot be used.
            ModelError: no worker was free in time, or two died of it.
            ClosedError: the server is closed, or was meanwhile.
        """
        order = _order(text, voice, seed, max_new_tokens, temperature, cfg_weight, exaggeration, None)
        return Audio(data=self._wait(self._whole(order)))

    def generate_stream(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        cfg_weight: float | None = None,
        exaggeration: float | None = None,
        look_ahead: int | None = None,
    ) -> Generator[Audio]:
        """The same in chunks of a second, each as it is made. Closing the generator ends the work.

        The arguments are those of `generate`, and `look_ahead`, in tokens, as in the function of this name: it gives an
        earlier first chunk, of another rendition.

        Raises:
            BadInputError, ModelError, ClosedError: as `generate`.
        """
        order = _order(text, voice, seed, max_new_tokens, temperature, cfg_weight, exaggeration, look_ahead)
        return self._chunks(order)

    def check(self) -> None:
        """For a health check of whoever embeds this.

        Raises:
            PrewarmError: no worker is left, and why.
            ClosedError: the server is closed.
        """
        if self._closed:
            raise _closed_error()
        if self._pool.failure is not None:
            raise self._pool.failure

    def close(self) -> None:
        """End the workers. What is being spoken is lost: calls of other threads raise `ClosedError`."""
        with self._gate:
            closing, self._closed = not self._closed, True
            calls = list(self._calls)
        if not closing:
            self._thread.join()  # another thread does it
            return
        for call in calls:
            call.cancel()
        asyncio.run_coroutine_threadsafe(self._pool.stop(), self._loop).result()
        self._supervision.result()
        self._end_loop()

    def __enter__(self) -> ChatterboxServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chunks(self, order: SpeechOrder) -> Generator[Audio]:
        chunks = self._pool.speak(order)

        async def following() -> Chunk | None:
            return await anext(chunks, None)

        try:
            while (chunk := self._wait(following())) is not None:
                if chunk.pcm:
                    yield Audio(data=chunk.pcm)
        finally:
            with contextlib.suppress(ClosedError):  # by which its work is called off as well
                self._wait(chunks.aclose())

    async def _whole(self, order: SpeechOrder) -> bytes:
        return b"".join([chunk.pcm async for chunk in self._pool.speak(order, whole=True)])

    async def _start(self, limits: PoolConfig, workers: list[WorkerConfig]) -> Pool:
        return Pool(limits, spawn_all(workers))

    async def _until_ready(self, seconds: float) -> None:
        deadline = self._loop.time() + seconds
        workers = self._pool.workers
        while not all(worker.ready for worker in workers):
            for worker in workers:
                if worker.failure is not None:
                    raise worker.failure
            if self._loop.time() > deadline:
                raise ModelError(
                    f"not ready within {seconds:.0f} s: {', '.join(worker.phase for worker in workers)}",
                    next_step="give a longer start_seconds, or a warm state that fits",
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the loop do something, and wait for it; an interrupt meanwhile calls it off.

        Raises:
            ClosedError: the server is closed, or was meanwhile.
        """
        with self._gate:  # so that nothing is given to a loop that ends
            if self._closed:
                work.close()
                raise _closed_error()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._calls.add(future)
        try:
            return future.result()
        except CancelledError:
            raise _closed_error() from None
        except BaseException:
            future.cancel()
            raise
        finally:
            self._calls.discard(future)

    async def _call_off(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._call_off(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def warm_up_multi_gpu(device: str = ALL_GPUS, **arguments: Any) -> ChatterboxServer:
    """Warm up a worker on each GPU, side by side; returns when all are ready.

    Args:
        device: which; every GPU there is by default.
        **arguments: of `ChatterboxServer`.

    Raises:
        BadInputError: there is no GPU.
        PrewarmError: as `ChatterboxServer`.
    """
    return ChatterboxServer(device=device, **arguments)


def _closed_error() -> ClosedError:
    return ClosedError("the server is closed", next_step="make another ChatterboxServer")


def _order(
    text: str,
    voice: str,
    seed: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
    cfg_weight: float | None,
    exaggeration: float | None,
    look_ahead: int | None,
) -> SpeechOrder:
    """A checked order; settings of sampling are checked where they are used, by the worker."""
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise BadInputError(f"the seed is {seed}", next_step=f"give a whole number from 0 to {MAX_SEED}")
    return SpeechOrder(
        text=check_text(text, limit=None),
        voice=check_voice_name(voice),
        format="pcm",
        seed=seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        cfg_weight=cfg_weight,
        exaggeration=exaggeration,
        look_ahead=look_ahead,
    )
