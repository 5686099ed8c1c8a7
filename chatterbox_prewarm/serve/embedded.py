"""The server without HTTP, for use inside other Python servers: it is warm as soon as its constructor returns.

The models run in worker processes, as in `chatterbox-prewarm serve`. The process that uses this module imports no
torch, may call the server from any thread, and survives the death of a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, ModelError, WeightsError
from chatterbox_prewarm.model.marks import MARKED
from chatterbox_prewarm.model.text import check_text, check_voice_name
from chatterbox_prewarm.serve.audio import Audio
from chatterbox_prewarm.serve.http.decode_clip import decode
from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
from chatterbox_prewarm.serve.voices.prompt_voices import PromptVoices, read_prompt
from chatterbox_prewarm.serve.workers.pool import Pool
from chatterbox_prewarm.serve.workers.pools import Pools
from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig, for_devices, parse_devices, spawn_all
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.system.devices import ALL_GPUS, check_device
from chatterbox_prewarm.system.limits import MAX_SEED
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS, as_path
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant, get_variant

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType
    from typing import TypeVar

    from chatterbox_prewarm.serve.workers.messages import Chunk

    T = TypeVar("T")

_POLL_SECONDS = 0.05


class ClosedError(ModelError):
    """The server was closed before or during a call."""


class ChatterboxServer:
    """A server with one worker per device. The constructor returns when all workers are ready.

    Use it as a context manager, or call `close`. Any thread may call its methods.

    Example:
        >>> with ChatterboxServer(device="cuda") as server:
        ...     audio = server.generate("Hello.", audio_prompt_path="voice.wav")

    Args:
        device: torch devices as a list, or separated by commas; "cuda:all" means every GPU.
        enable_warmup: whether idle workers continue the warm-up for `requests_per_minute`.
        warm, weights, cache, policy, profile, plain_text: see `StartOptions`.
        trust: a key or a digest that the warm state must match.
        voices, threads, max_new_tokens, requests_per_minute: see `WorkerConfig`.
        wait_seconds: how long a part of a text may wait for a worker.
        hang_seconds: a worker that sends no message for this long is replaced. Workers send one every second.
        start_seconds: how long the start may take.

    Raises:
        PrewarmError: a worker could not start; the class depends on the cause.
    """

    def __init__(  # noqa: PLR0913 - the public API: keywords are easier to use than several options objects
        self,
        device: str | Sequence[str] = "cpu",
        enable_warmup: bool = True,
        *,
        warm: str | Path = WARM,
        weights: str | Path = WEIGHTS,
        cache: str | Path = CACHE,
        policy: str = "fallback",
        profile: str | None = None,
        trust: Trust | None = None,
        plain_text: Sequence[str] = (),
        voices: Mapping[str, str | Path] | None = None,
        threads: int | None = None,
        max_new_tokens: int = 1000,
        requests_per_minute: float = 0.0,
        wait_seconds: float = 120.0,
        hang_seconds: float = 120.0,
        start_seconds: float = 1800.0,
    ) -> None:
        several = isinstance(device, Iterable) and not isinstance(device, str)
        names = parse_devices(",".join(map(str, device)) if several else str(device))
        devices = [check_device(name) for name in names]
        start = StartOptions(
            warm=as_path(warm, "the warm state"),
            weights=as_path(weights, "the checkpoint"),
            cache=as_path(cache, "the cache directory"),
            policy=policy,
            profile=profile,
            trust=trust or Trust(),
            plain_text=MARKED,  # complete texts are checked here
        )
        rules, variant = SpeechRules(plain_text=tuple(plain_text)), _variant_of(start.weights)
        self._rules = rules.for_variants([variant], {variant.name: start.weights})
        clips = {name: as_path(clip, f"the clip of the voice {name}") for name, clip in (voices or {}).items()}
        self._prompts = PromptVoices()  # a temporary folder, so only after the checks of the arguments
        worker = WorkerConfig(
            model=self._rules.variants[0].name,
            start=start,
            voices=clips,
            threads=threads,
            max_new_tokens=max_new_tokens,
            requests_per_minute=requests_per_minute if enable_warmup else 0.0,
            voice_directory=self._prompts.directory,
        )
        workers = for_devices(devices, worker)
        self._closed = False
        self._calls: set[Future[Any]] = set()
        self._lock = threading.Lock()  # protects `_closed` and `_calls`
        self._loop = asyncio.new_event_loop()
        # Linux ends a worker when the thread that started it ends, so the workers are started in this thread, which
        # lives as long as the server.
        self._thread = threading.Thread(target=self._loop.run_forever, name="chatterbox-server", daemon=True)
        self._thread.start()
        try:
            self._pools: Pools = self._wait(self._start(workers, wait_seconds, hang_seconds))
            self._pool = self._pools.first
            self._supervision = asyncio.run_coroutine_threadsafe(self._pools.run(), self._loop)
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
        """For each worker its device, its restarts, and the log of its start as in `StartMetrics.to_dict`."""
        return [
            {"device": worker.config.device, "restarts": worker.restarts, **worker.log} for worker in self._pool.workers
        ]

    def generate(self, text: str, *, audio_prompt_path: str | Path | None = None, **options: Any) -> Audio:
        """Speak a text and return all its audio. A long text is split at sentences.

        A call waits while all workers are busy.

        Args:
            text: what to say.
            audio_prompt_path: a reference clip to speak like. Its voice is computed at the first call with it.
            **options: voice, language, seed, max_new_tokens, look_ahead, and the settings of the sampling; see
                `SpeechOptions`.

        Raises:
            BadInputError: the text, the clip, the voice or an option is invalid.
            ModelError: no worker was free in time, or two workers died while they spoke this text.
            ClosedError: the server is closed, or was closed during the call.
        """
        checked = self._with_prompt(_speech_options(text, options, self._rules), audio_prompt_path)
        return self._wait(self._speak(replace(checked, chunk_tokens=None)))

    def generate_stream(
        self, text: str, *, audio_prompt_path: str | Path | None = None, **options: Any
    ) -> Generator[Audio]:
        """Speak a text and yield its audio in chunks of one second. Closing the generator stops the work.

        Arguments and errors are those of `generate`. With `look_ahead` the first chunk comes earlier, but the audio is
        not the same as from `generate`. If the last part of the text was left out, the last chunk has no samples.
        """
        return self._chunks(self._with_prompt(_speech_options(text, options, self._rules), audio_prompt_path))

    def _with_prompt(self, options: SpeechOptions, audio_prompt_path: str | Path | None) -> SpeechOptions:
        """Use the voice of a reference clip, if there is one."""
        if audio_prompt_path is None:
            return options
        clip = read_prompt(audio_prompt_path)
        if (voice := self._prompts.find(clip)) is None:
            voice = self._prompts.add(clip, self._wait(self._prepare_voice(clip)))
        return replace(options, voice=voice.name, voice_digest=voice.digest)

    async def _prepare_voice(self, clip: bytes) -> bytes:
        return await self._pools.prepare_voice(await decode(clip))

    def check(self) -> None:
        """Raise an error if the server cannot speak any more; for a health check.

        Raises:
            PrewarmError: why there is no worker left.
            ClosedError: the server is closed.
        """
        if self._closed:
            raise _closed_error()
        if self._pool.failure is not None:
            raise self._pool.failure

    def close(self) -> None:
        """End the workers. Calls in other threads raise `ClosedError`."""
        with self._lock:
            first, self._closed = not self._closed, True
            calls = list(self._calls)
        if not first:
            self._thread.join()  # another thread is closing the server
            return
        for call in calls:
            call.cancel()
        asyncio.run_coroutine_threadsafe(self._pools.stop(), self._loop).result()
        self._supervision.result()
        self._end_loop()

    def __enter__(self) -> ChatterboxServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chunks(self, options: SpeechOptions) -> Generator[Audio]:
        chunks = self._pool.speak(options)

        async def next_chunk() -> Chunk | None:
            return await anext(chunks, None)

        try:
            while (chunk := self._wait(next_chunk())) is not None:
                if chunk.pcm or chunk.skipped:
                    yield Audio(data=chunk.pcm, is_truncated=chunk.truncated, skipped_parts=chunk.skipped)
        finally:
            with contextlib.suppress(ClosedError):  # `close` has cancelled the work already
                self._wait(chunks.aclose())

    async def _speak(self, options: SpeechOptions) -> Audio:
        chunks = [chunk async for chunk in self._pool.speak(options)]
        return Audio(
            data=b"".join(chunk.pcm for chunk in chunks),
            is_truncated=any(chunk.truncated for chunk in chunks),
            skipped_parts=sum(chunk.skipped for chunk in chunks),
        )

    async def _start(self, workers: list[WorkerConfig], wait_seconds: float, hang_seconds: float) -> Pools:
        model = workers[0].model
        return Pools([Pool(spawn_all(workers), model=model, wait_seconds=wait_seconds, hang_seconds=hang_seconds)])

    async def _until_ready(self, timeout: float) -> None:
        deadline = self._loop.time() + timeout
        workers = self._pool.workers
        while not all(worker.ready for worker in workers):
            for worker in workers:
                if worker.failure is not None:
                    raise worker.failure
            if self._loop.time() > deadline:
                raise ModelError(
                    f"not ready within {timeout:.0f} s: {', '.join(worker.phase for worker in workers)}",
                    next_step="give a longer start_seconds, or a warm state that fits this machine",
                )
            await asyncio.sleep(_POLL_SECONDS)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop and wait for its result. An interrupt cancels it.

        Raises:
            ClosedError: the server is closed, or was closed during the call.
        """
        with self._lock:  # so that no coroutine is given to a loop that is about to end
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

    async def _cancel_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _end_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._prompts.close()


def warm_up_multi_gpu(device: str | Sequence[str] = ALL_GPUS, **arguments: Any) -> ChatterboxServer:
    """Start one worker on each GPU. They warm up at the same time, and the function returns when all are ready.

    Example:
        >>> server = warm_up_multi_gpu(["cuda:0", "cuda:1"])

    Args:
        device: which GPUs, as a list or separated by commas; all by default.
        **arguments: the other arguments of `ChatterboxServer`.

    Raises:
        BadInputError: the machine has no GPU.
        PrewarmError: as for `ChatterboxServer`.
    """
    return ChatterboxServer(device, **arguments)


def _variant_of(weights: Path) -> Variant:
    """Return the variant of a checkpoint. Without a checkpoint, the workers report what is wrong."""
    try:
        return get_variant(read_record(weights).variant)
    except WeightsError:
        return DEFAULT_VARIANT


def _closed_error() -> ClosedError:
    return ClosedError("the server is closed", next_step="create another ChatterboxServer")


def _speech_options(text: str, options: dict[str, Any], rules: SpeechRules) -> SpeechOptions:
    """Check text, language, voice name and seed. The worker checks the sampling options where it uses them."""
    variant = rules.variants[0]
    language = variant.check_language(options.pop("language", None))
    text = rules.check_text(check_text(text, limit=None), variant, language)
    checked = SpeechOptions(text=text, language=language, **options)
    for name in checked.sampling():
        variant.check_control(name)
    check_voice_name(checked.voice)
    if checked.seed is not None and not 0 <= checked.seed <= MAX_SEED:
        raise BadInputError(f"the seed is {checked.seed}", next_step=f"give a whole number from 0 to {MAX_SEED}")
    return checked
