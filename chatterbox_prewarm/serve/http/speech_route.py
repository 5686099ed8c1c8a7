"""`POST /v1/audio/speech`: a request's way from its body to the sound, whole, in chunks, or as events.

An ASGI application of its own, not a handler that returns a response: a request counts as long as its sound is being
made, and when its client goes away, be it before the first byte, its worker is freed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import PrewarmError
from chatterbox_prewarm.serve.http.request_log import note
from chatterbox_prewarm.serve.http.speech_api import error_fields, failure, failure_of, read_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.http_metrics import Measures
    from chatterbox_prewarm.serve.workers.messages import Chunk
    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder

logger = logging.getLogger(__name__)

_BODY_SECONDS = 10.0


class SpeechRoute:
    """The endpoint.

    Args:
        pool: speaks.
        admission: says whether it may.
        measures: of what was spoken.
        max_characters: longest text that is taken.
    """

    def __init__(self, pool: Pool, admission: Admission, measures: Measures, *, max_characters: int) -> None:
        self._pool = pool
        self._admission = admission
        self._measures = measures
        self._max_characters = max_characters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose body is an order."""
        from starlette.requests import ClientDisconnect, Request

        answer = _Answer(scope, receive, send)
        try:
            if (refusal := self._admission.refusal()) is not None:
                await answer.send(refusal)
                return
            # A body that trickles in is not in flight yet: it holds no place in the queue and no drain back.
            body = await asyncio.wait_for(read_body(Request(scope, receive)), _BODY_SECONDS)
            parse_order = await asyncio.to_thread(_parser)
            await self._answer(parse_order(body, limit=self._max_characters), answer)
        except PrewarmError as error:
            await answer.send(failure_of(error))
        except (asyncio.TimeoutError, TimeoutError):
            await answer.send(failure(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s", "timeout"))
        except ClientDisconnect:
            logger.info("a client went away before its request was complete")
        finally:
            self._count(answer)

    async def spoken(self, order: SpeechOrder, _: Request) -> Response:
        """An answer that speaks an order, for a route that makes its own."""
        from starlette.responses import Response

        route = self

        class Spoken(Response):
            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                answer = _Answer(scope, receive, send)
                try:
                    await route._answer(order, answer)
                finally:
                    route._count(answer)

        return Spoken()

    async def _answer(self, order: SpeechOrder, answer: _Answer) -> None:
        """Speak an order, or say why not."""
        answer.note(order)
        # Asked again when there was a body to wait for, since much may have changed meanwhile.
        if (refusal := self._admission.refusal()) is not None:
            await answer.send(refusal)
            return
        try:
            with self._admission.taken_on():
                await self._while_connected(order, answer)
        except PrewarmError as error:
            if not answer.status:
                await answer.send(failure_of(error, retry_after=self._pool.retry_after))
            else:
                # The status is out. Leaving the answer unfinished closes the connection, by which a client notices.
                logger.error("a stream ended early: %s", error.message)  # noqa: TRY400 - no fault of this program

    def _count(self, answer: _Answer) -> None:
        if answer.status:
            self._measures.answers.labels(str(answer.status)).inc()

    async def _while_connected(self, order: SpeechOrder, answer: _Answer) -> None:
        """Deliver the sound as long as somebody listens."""
        work = asyncio.create_task(self._deliver(order, answer))
        gone = asyncio.create_task(answer.disconnected())
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                logger.info("a client went away while it was spoken for")
                self._measures.abandoned.inc()
        finally:
            work.cancel()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _deliver(self, order: SpeechOrder, answer: _Answer) -> None:
        started = time.monotonic()
        # Formats whose header holds the length are worth waiting for, unless somebody asks for the bytes as they come.
        whole = order.stream_format is None and order.format in {"wav", "flac"}
        async with contextlib.aclosing(self._pool.speak(order, whole=whole)) as chunks:
            timed = self._timed(chunks, started)
            if order.stream_format == "sse":
                await self._events(order, timed, answer)
            elif whole:
                await self._whole(order, timed, answer)
            else:
                await self._stream(order, timed, answer)

    async def _timed(self, chunks: AsyncGenerator[Chunk], started: float) -> AsyncIterator[Chunk]:
        """The chunks, with the time to the first taken."""
        first = True
        async for chunk in chunks:
            if first:
                self._measures.first_chunk.observe(time.monotonic() - started)
                first = False
            yield chunk

    async def _whole(self, order: SpeechOrder, chunks: AsyncIterator[Chunk], answer: _Answer) -> None:
        from starlette.responses import Response

        media_type, parts = await encoded(order.format, chunks, whole=True)
        sound = b"".join([data async for data in parts])
        await answer.send(Response(sound, media_type=media_type))

    async def _stream(self, order: SpeechOrder, chunks: AsyncIterator[Chunk], answer: _Answer) -> None:
        media_type, parts = await encoded(order.format, chunks)
        async for data in parts:
            await answer.start(media_type)  # not before there is something, so that what fails until then has a status
            await answer.write(data)
        await answer.end()

    async def _events(self, order: SpeechOrder, chunks: AsyncIterator[Chunk], answer: _Answer) -> None:
        from chatterbox_prewarm.serve.http import events

        tokens = 0

        async def counted() -> AsyncIterator[Chunk]:
            nonlocal tokens
            async for chunk in chunks:
                tokens += chunk.tokens
                yield chunk

        try:
            _, parts = await encoded(order.format, counted())
            async for data in parts:
                await answer.start(events.MEDIA_TYPE)
                await answer.write(events.delta(data))
            await answer.write(events.done(input_tokens=len(order.text), output_tokens=tokens))
        except PrewarmError as error:
            if not answer.status:
                raise
            logger.error("a stream of events ended early: %s", error.message)  # noqa: TRY400 - the client is told
            await answer.write(events.failed(error_fields(error)))
        await answer.end()


def _parser() -> Callable[..., SpeechOrder]:
    """The parser of bodies, imported at the first request: to be alive takes no pydantic."""
    from chatterbox_prewarm.serve.http.speech_request import parse_order

    return parse_order


async def encoded(name: str, chunks: AsyncIterator[Chunk], *, whole: bool = False) -> tuple[str, AsyncIterator[bytes]]:
    """The media type of a format, and the sound in it as it comes; encoded in a thread, where that takes time.

    Args:
        name: of the format.
        chunks: of the sound.
        whole: as for `encoder`.
    """
    from chatterbox_prewarm.serve.http.encoding import encoder

    quick = name in {"pcm", "wav"}
    encoding = encoder(name, whole=whole) if quick else await asyncio.to_thread(encoder, name, whole=whole)

    async def parts() -> AsyncIterator[bytes]:
        async for chunk in chunks:
            data = encoding.encode(chunk.pcm) if quick else await asyncio.to_thread(encoding.encode, chunk.pcm)
            if data:
                yield data
        if rest := encoding.finish() if quick else await asyncio.to_thread(encoding.finish):
            yield rest

    return encoding.media_type, parts()


class _Answer:
    """One HTTP answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.status = 0  # none yet

    def note(self, order: SpeechOrder) -> None:
        """Have the log say what was asked for."""
        note(self._scope, text=order.text, characters=len(order.text), voice=order.voice, format=order.format)

    async def send(self, response: Response) -> None:
        """Give a whole answer."""
        self.status = response.status_code
        await response(self._scope, self._receive, self._send)

    async def start(self, media_type: str) -> None:
        """Begin one in chunks, unless it has begun."""
        if self.status:
            return
        self.status = 200
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Add to it; waits when the client is slower than the model."""
        await self._send(self._body(data, more=True))

    async def end(self) -> None:
        """Finish it."""
        await self._send(self._body(b"", more=False))

    async def disconnected(self) -> None:
        """Return when the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @staticmethod
    def _body(data: bytes, *, more: bool) -> Message:
        message: dict[str, Any] = {"type": "http.response.body", "body": data, "more_body": more}
        return message
