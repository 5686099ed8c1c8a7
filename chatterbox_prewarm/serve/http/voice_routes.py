"""The voices over HTTP: list, add from a clip, look at, delete, hear."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import PrewarmError
from chatterbox_prewarm.serve.http.decode_clip import DecodeLimits, decode
from chatterbox_prewarm.serve.http.speech_api import failure, failure_of
from chatterbox_prewarm.serve.voices.voice_errors import VoiceError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.upload import Upload
    from chatterbox_prewarm.serve.voices.voice_store import VoiceEntry, VoiceStore
    from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder

PATH = "/v1/audio/voices"
PREVIEW_TEXT = "Hello, this is how I sound."
#: The same sound at every call, so that two voices differ by themselves alone. 25 tokens are a second.
_PREVIEW_SEED, _PREVIEW_TOKENS = 0, 150


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """What clips sent by clients may take.

    Attributes:
        at_once: uploads that are received, decoded or computed; each holds its clip in memory. More are told to wait.
        seconds: until a form must have arrived.
        decode: limits of one clip; clips are decoded one after the other.
    """

    at_once: int = 4
    seconds: float = 60.0
    decode: DecodeLimits = field(default_factory=DecodeLimits)


class VoiceRoutes:
    """The handlers of `/v1/audio/voices`.

    Args:
        store: of all voices.
        admission: says whether an upload is taken on.
        prepare: makes a voice's file of a WAV file, in a worker; raises `PrewarmError`.
        speak: answers an order with its sound, or with the error; the request is the one to answer.
        limits: of uploads.
    """

    def __init__(
        self,
        store: VoiceStore,
        admission: Admission,
        *,
        prepare: Callable[[bytes], Awaitable[bytes]],
        speak: Callable[[SpeechOrder, Request], Awaitable[Response]],
        limits: UploadLimits | None = None,
    ) -> None:
        self._store = store
        self._admission = admission
        self._prepare = prepare
        self._speak = speak
        self._limits = limits or UploadLimits()
        self._uploads = 0
        self._decoding = asyncio.Semaphore(1)

    def routes(self) -> list[Route]:
        """The routes of an application."""
        from starlette.routing import Route

        return [
            # One for each path, so that a method which is not there is told of all that are.
            Route(PATH, self._all, methods=["GET", "POST"]),
            Route(PATH + "/{name}", self._one, methods=["GET", "DELETE"]),
            Route(PATH + "/{name}/preview", self._preview, methods=["GET"]),
        ]

    async def _all(self, request: Request) -> Response:
        return await (self._add(request) if request.method == "POST" else self._list(request))

    async def _one(self, request: Request) -> Response:
        return await (self._delete(request) if request.method == "DELETE" else self._show(request))

    async def _list(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        entries = await asyncio.to_thread(self._store.entries)
        return JSONResponse({"object": "list", "data": [entry.to_dict() for entry in entries]})

    async def _show(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        try:
            entry = await asyncio.to_thread(self._store.get, request.path_params["name"])
        except PrewarmError as error:
            return refusal(error)
        return JSONResponse(entry.to_dict())

    async def _delete(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        name = request.path_params["name"]
        try:
            await asyncio.to_thread(self._store.delete, name)
        except PrewarmError as error:
            return refusal(error)
        return JSONResponse({"id": name, "object": "voice.deleted", "deleted": True})

    async def _preview(self, request: Request) -> Response:
        from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder

        name = request.path_params["name"]
        try:
            await asyncio.to_thread(self._store.digest, name)
        except PrewarmError as error:
            return refusal(error)
        order = SpeechOrder(
            text=PREVIEW_TEXT, voice=name, format="wav", seed=_PREVIEW_SEED, max_new_tokens=_PREVIEW_TOKENS
        )
        return await self._speak(order, request)

    async def _add(self, request: Request) -> Response:
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse, Response

        from chatterbox_prewarm.serve.http.upload import read_upload

        limits = self._limits
        if (refused := self._admission.refusal()) is not None:
            return refused
        if self._uploads >= limits.at_once:
            return failure(429, f"{self._uploads} voices are being added already", "too_many_uploads")
        try:
            with self._counted():
                upload = await read_upload(request, clip_bytes=limits.decode.clip_bytes, seconds=limits.seconds)
                # As with speech: what trickles in is not in flight yet, and much may have changed meanwhile.
                if (refused := self._admission.refusal()) is not None:
                    return refused
                with self._admission.taken_on():
                    entry = await self._make(upload)
        except PrewarmError as error:
            return refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(entry.to_dict(), status_code=201)

    async def _make(self, upload: Upload) -> VoiceEntry:
        """Make a voice of an upload and keep it; of the clip as it came nothing is kept.

        Raises:
            PrewarmError: the clip or the name cannot be used, or no worker could make it.
        """
        # Again when it is added; now, since decoding and computing take seconds.
        await asyncio.to_thread(self._store.check_free, upload.name)
        async with self._decoding:
            wav = await decode(upload.clip, self._limits.decode)
        data = await self._prepare(wav)
        return await asyncio.to_thread(self._store.add, upload.name, data)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1


def refusal(error: PrewarmError) -> Response:
    """The answer that an error gives, with the status that says what kind it is."""
    if isinstance(error, VoiceError):
        return failure(error.status, str(error), error.code)
    return failure_of(error)
