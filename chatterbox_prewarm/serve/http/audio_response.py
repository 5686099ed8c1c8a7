"""Respond with audio, to requests for speech and for conversions: as one file, a stream, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import PrewarmError
from chatterbox_prewarm.model.text import is_voice_name
from chatterbox_prewarm.serve.http import events
from chatterbox_prewarm.serve.http.encoding import encoder
from chatterbox_prewarm.serve.http.error_responses import error_fields, response_for
from chatterbox_prewarm.serve.http.request_log import add_log_fields
from chatterbox_prewarm.serve.workers.speech_options import ConversionOptions, SpeechOptions

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from typing import TypeVar

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.http_metrics import HttpMetrics
    from chatterbox_prewarm.serve.http.response_stream import ResponseStream
    from chatterbox_prewarm.serve.workers.messages import Chunk
    from chatterbox_prewarm.serve.workers.pools import Pools

    T = TypeVar("T")
    Options = SpeechOptions | ConversionOptions

logger = logging.getLogger(__name__)


class AudioResponder:
    """Sends the audio for the options of a request.

    Args:
        pools: the models.
        admission: decides whether the server accepts a request.
        http_metrics: counts requests, and measures the time to the first chunk.
    """

    def __init__(self, pools: Pools, admission: Admission, http_metrics: HttpMetrics) -> None:
        self._pools = pools
        self._admission = admission
        self._http_metrics = http_metrics

    def count(self, stream: ResponseStream, model: str) -> None:
        """Count a response that has ended, by its status."""
        if stream.status:
            self._http_metrics.responses.labels(model, str(stream.status)).inc()

    def model(self, options: Options) -> str:
        """Return the name of the model of a request."""
        return self._pools[options.model].model

    def retry_after(self, model: str) -> int:
        """Return the seconds after which a client should repeat a request that this model has no place for."""
        return self._pools[model].retry_after

    async def respond(self, options: Options, stream: ResponseStream) -> None:
        """Send the audio for `options`, or an error."""
        # A client can send any text as a voice. Only a possible name of a voice is safe to log.
        voice = options.voice if is_voice_name(options.voice) else None
        model = self.model(options)
        add_log_fields(stream.scope, model=model, voice=voice, format=options.format, **_described(options))
        # Checked again, because the server may have started to drain while the body arrived.
        if (refusal := self._admission.refusal(options.model)) is not None:
            await stream.send(refusal)
            return
        try:
            with self._admission.accepted() as release:
                await self._speak_while_connected(options, stream, release)
        except PrewarmError as error:
            if not stream.status:
                await stream.send(response_for(error, retry_after=self._pools[options.model].retry_after))
            else:
                # Too late for an error status. uvicorn closes the connection of the incomplete response, so the client
                # notices the failure.
                logger.error("a stream ended early: %s", error.message)  # noqa: TRY400 - not a bug of this program

    async def _speak_while_connected(
        self, options: Options, stream: ResponseStream, release: Callable[[], None]
    ) -> None:
        speech = asyncio.create_task(self._speak(options, stream, release))
        disconnect = asyncio.create_task(stream.disconnected())
        try:
            await asyncio.wait([speech, disconnect], return_when=asyncio.FIRST_COMPLETED)
            if not speech.done():
                logger.info("the client disconnected before its speech was complete")
                self._http_metrics.abandoned.labels(self.model(options)).inc()
        finally:
            speech.cancel()
            disconnect.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await speech

    async def _speak(self, options: Options, stream: ResponseStream, release: Callable[[], None]) -> None:
        started = time.monotonic()
        # The headers of WAV and FLAC contain the length, so these formats are streamed only on request.
        one_shot = options.stream_format is None and options.format in {"wav", "flac"}
        if one_shot:
            options = replace(options, chunk_tokens=None)
        audio = self._pools[options.model].speak(options, on_complete=release)
        async with contextlib.aclosing(audio) as generated:
            chunks = self._measured(generated, started, stream, self.model(options))
            if options.stream_format == "sse":
                await self._send_events(options, chunks, stream)
            elif one_shot:
                await self._send_file(options, chunks, stream)
            else:
                await self._send_stream(options, chunks, stream)

    async def _measured(
        self, chunks: AsyncGenerator[Chunk], started: float, stream: ResponseStream, model: str
    ) -> AsyncIterator[Chunk]:
        """Pass on the chunks. Record the time to the first one, and the parts that are cut at the limit or left out."""
        first, truncated_parts = True, 0
        async for chunk in chunks:
            if first:
                self._http_metrics.first_chunk.labels(model).observe(time.monotonic() - started)
                first = False
            if chunk.truncated:
                stream.finish_reason = "length"
                if chunk.seconds is not None:
                    truncated_parts += 1
                    self._http_metrics.truncated.labels(model).inc()
                    add_log_fields(stream.scope, truncated=truncated_parts)
            if chunk.skipped:
                stream.skipped_parts += chunk.skipped
                add_log_fields(stream.scope, skipped=stream.skipped_parts)
            yield chunk

    async def _send_file(self, options: Options, chunks: AsyncIterator[Chunk], stream: ResponseStream) -> None:
        media_type, parts = await encoded(options.format, chunks, one_shot=True)
        audio = b"".join([data async for data in parts])
        with self._pools.backlog.holding(len(audio)):
            await stream.send_file(media_type, audio)

    async def _send_stream(self, options: Options, chunks: AsyncIterator[Chunk], stream: ResponseStream) -> None:
        media_type, parts = await encoded(options.format, chunks)
        async for data in parts:
            # Started only with the first audio, so that an earlier failure gets an error status.
            await stream.start(media_type)
            await stream.write(data)
        await stream.end()

    async def _send_events(self, options: Options, chunks: AsyncIterator[Chunk], stream: ResponseStream) -> None:
        tokens = 0

        async def counted() -> AsyncIterator[Chunk]:
            nonlocal tokens
            async for chunk in chunks:
                tokens += chunk.tokens
                yield chunk

        try:
            _, parts = await encoded(options.format, counted())
            async for data in parts:
                await stream.start(events.MEDIA_TYPE)
                await stream.write(events.delta(data))
            await stream.write(
                events.done(
                    input_tokens=len(options.text) if isinstance(options, SpeechOptions) else 0,
                    output_tokens=tokens,
                    finish_reason=stream.finish_reason,
                    skipped_parts=stream.skipped_parts,
                )
            )
        except PrewarmError as error:
            if not stream.status:
                raise
            logger.error("a stream of events ended early: %s", error.message)  # noqa: TRY400 - not a bug
            await stream.write(events.failed(error_fields(error)))
        await stream.end()


def _described(options: Options) -> dict[str, Any]:
    """Return the log fields that describe what a request sent."""
    if isinstance(options, ConversionOptions):
        return {"source_seconds": round(options.source_seconds, 2)}
    return {"text": options.text, "characters": len(options.text)}


async def encoded(
    audio_format: str, chunks: AsyncIterator[Chunk], *, one_shot: bool = False
) -> tuple[str, AsyncIterator[bytes]]:
    """Encode chunks of speech. libsndfile runs in a thread, so that it does not block the event loop.

    Args:
        audio_format: a key of `encoding.MEDIA_TYPES`.
        chunks: the speech.
        one_shot: see `encoding.encoder`.

    Returns:
        the media type, and an iterator over the parts of the audio file.
    """

    async def run(function: Callable[..., T], *arguments: object) -> T:
        if audio_format in {"pcm", "wav"}:
            return function(*arguments)
        return await asyncio.to_thread(function, *arguments)

    encoding = await run(functools.partial(encoder, audio_format, one_shot=one_shot))

    async def parts() -> AsyncIterator[bytes]:
        async for chunk in chunks:
            if data := await run(encoding.encode, chunk.pcm):
                yield data
        if rest := await run(encoding.finish):
            yield rest

    return encoding.media_type, parts()
