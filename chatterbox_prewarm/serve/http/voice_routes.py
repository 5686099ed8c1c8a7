"""The routes of voices: list, add from a clip, show, delete and preview."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatterbox_prewarm.errors import ModelError, PrewarmError
from chatterbox_prewarm.serve.http.decode_clip import UploadLimits, decode
from chatterbox_prewarm.serve.http.error_responses import error_response, response_for
from chatterbox_prewarm.serve.http.upload import read_upload
from chatterbox_prewarm.serve.voices.voice_errors import VoiceError
from chatterbox_prewarm.serve.workers.pool import BusyError
from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError
from chatterbox_prewarm.system.fingerprint import upstream_installed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.schemas import Voice, VoiceDeleted, Voices
    from chatterbox_prewarm.serve.voices.voice_store import VoiceEntry, VoiceStore

PATH = "/v1/audio/voices"
PREVIEW_TEXT = "Hello, this is how I sound."
#: A fixed seed, so that two previews differ only in the voice. 25 tokens are a second.
_PREVIEW_SEED, _PREVIEW_TOKENS = 0, 150


class VoiceRoutes:
    """The handlers of `/v1/audio/voices`.

    Args:
        store: the baked and the added voices.
        admission: decides whether the server accepts an upload.
        decoding: held while a clip is decoded.
        prepare: makes the file of a voice from a WAV file. Raises `PrewarmError`.
        speak: returns the response with the speech for some options, or with an error.
        limits: limits on uploads.
    """

    def __init__(
        self,
        store: VoiceStore,
        admission: Admission,
        *,
        decoding: asyncio.Semaphore,
        prepare: Callable[[bytes], Awaitable[bytes]],
        speak: Callable[[SpeechOptions], ASGIApp],
        limits: UploadLimits | None = None,
    ) -> None:
        self._store = store
        self._admission = admission
        self._prepare = prepare
        self._speak = speak
        self._limits = limits or UploadLimits()
        self._uploads = 0
        self._decoding = decoding

    def routes(self) -> list[Route]:
        """Return the routes for a Starlette application."""
        return [
            # One route per path, so that the response to an unsupported method lists all methods of the path.
            Route(PATH, self._list_or_add, methods=["GET", "POST"]),
            Route(PATH + "/{name}", self._show_or_delete, methods=["GET", "DELETE"]),
            Route(PATH + "/{name}/preview", self._preview, methods=["GET"]),
        ]

    async def _list_or_add(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._add(request)
        entries = await asyncio.to_thread(self._store.entries)
        voices: Voices = {
            "object": "list",
            "data": [voice_body(entry) for entry in entries],
            "voices": [{"id": entry.name, "name": entry.name} for entry in entries if entry.models],
        }
        return JSONResponse(voices)

    async def _show_or_delete(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            if request.method != "DELETE":
                return JSONResponse(voice_body(await asyncio.to_thread(self._store.get, name)))
            await asyncio.to_thread(self._store.delete, name)
        except PrewarmError as error:
            return _response_for(error)
        deleted: VoiceDeleted = {"id": name, "object": "voice.deleted", "deleted": True}
        return JSONResponse(deleted)

    async def _preview(self, request: Request) -> ASGIApp:
        name = request.path_params["name"]
        try:
            entry = await asyncio.to_thread(self._store.get, name)
            model = entry.models[0] if entry.models else ""
            await asyncio.to_thread(self._store.digest, name, model)
        except PrewarmError as error:
            return _response_for(error)
        return self._speak(
            SpeechOptions(
                text=PREVIEW_TEXT,
                model=model,
                voice=name,
                format="wav",
                seed=_PREVIEW_SEED,
                max_new_tokens=_PREVIEW_TOKENS,
            )
        )

    async def _add(self, request: Request) -> Response:
        limits = self._limits
        if not upstream_installed():
            error = VoiceError(
                "this server cannot make voices from clips, because upstream's model is not installed",
                next_step="bake the voice, or use an image that was built with `--build-arg PACKAGES=full`",
                code="uploads_unsupported",
            )
            return _response_for(error)
        if (refusal := self._admission.refusal()) is not None:
            return refusal
        if self._uploads >= limits.concurrent:
            return error_response(429, f"the server is adding {self._uploads} voices already", "too_many_uploads")
        self._uploads += 1
        try:
            name, clip = await read_upload(request, clip_bytes=limits.clip_bytes, seconds=limits.receive_seconds)
            # The upload was not in flight until now, and the server may have started to drain since the first check.
            if (refusal := self._admission.refusal()) is not None:
                return refusal
            with self._admission.accepted():
                entry = await self._add_voice(name, clip)
        except PrewarmError as error:
            return _response_for(error)
        except ClientDisconnect:
            return Response(status_code=499)  # only for the log: the client is gone
        finally:
            self._uploads -= 1
        return JSONResponse(voice_body(entry), status_code=201)

    async def _add_voice(self, name: str, clip: bytes) -> VoiceEntry:
        """Make a voice from a clip and store it. The clip itself is not stored.

        Raises:
            PrewarmError: the clip or the name is invalid, or no worker could make the voice.
        """
        # `add` checks the name again. This early check saves the seconds of decoding and computing.
        await asyncio.to_thread(self._store.check_free, name)
        async with self._decoding:
            wav = await decode(clip, self._limits)
        voice_file = await self._prepare(wav)
        return await asyncio.to_thread(self._store.add, name, voice_file)


def voice_body(entry: VoiceEntry) -> Voice:
    """Return the JSON object for a voice."""
    return {
        "id": entry.name,
        "name": entry.name,
        "object": "voice",
        "baked": entry.baked,
        "bytes": entry.size,
        "created": entry.created,
        "digest": entry.digest,
        "models": list(entry.models),
        "usable": bool(entry.models),
        "reason": entry.problem,
    }


def _response_for(error: PrewarmError) -> Response:
    """Return the response for an exception. Each problem with a voice has its own status."""
    if isinstance(error, VoiceError):
        return error_response(error.status, str(error), error.code)
    if isinstance(error, ModelError) and not isinstance(error, (BusyError, WorkerGoneError)):
        return error_response(503, error.message, "voice_failed")
    return response_for(error)
