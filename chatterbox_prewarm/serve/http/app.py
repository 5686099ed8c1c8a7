"""The HTTP side: which route is answered by what. Of the model, it knows the pool."""

from __future__ import annotations

import asyncio
import functools
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.http.http_metrics import Measures
from chatterbox_prewarm.serve.http.speech_api import failure
from chatterbox_prewarm.serve.http.speech_route import SpeechRoute
from chatterbox_prewarm.serve.http.voice_routes import VoiceRoutes

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
    from chatterbox_prewarm.serve.workers.pool import Pool

#: What `/v1/models` calls the model.
MODEL = "chatterbox"


class App:
    """The routes."""

    def __init__(self, pool: Pool, admission: Admission, voices: VoiceStore, *, max_characters: int) -> None:
        from chatterbox_prewarm.serve.http.exposition import Exposition

        self._pool = pool
        self._admission = admission
        self._max_characters = max_characters
        measures = Measures()
        pool.on_part = measures.part
        self._exposition = Exposition(pool, admission, measures)
        self._speech = SpeechRoute(pool, admission, measures, max_characters=max_characters)
        self._voices = VoiceRoutes(voices, admission, prepare=pool.prepare_voice, speak=self._speech.spoken)

    def asgi(self) -> ASGIApp:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        from chatterbox_prewarm.serve.http import page

        return Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/startupz", self._startupz),
                Route("/readyz", self._readyz),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/audio/speech", self._speech, methods=["POST"]),
                *self._voices.routes(),
                Route("/openapi.json", self._openapi),
                *page.routes(),
            ],
            exception_handlers={HTTPException: _refused, Exception: _faulted},
        )

    async def _livez(self, _: Request) -> Response:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse("ok\n")

    async def _startupz(self, request: Request) -> Response:
        return self._status(request, ok=self._pool.attached)

    async def _readyz(self, request: Request) -> Response:
        return self._status(request, ok=self._pool.ready and not self._admission.draining)

    def _status(self, request: Request, *, ok: bool) -> Response:
        from starlette.responses import JSONResponse

        from chatterbox_prewarm.serve.http.access import status_for

        pool, leading = self._pool, self._pool.leading
        body: dict[str, Any] = {
            "phase": "draining" if self._admission.draining else leading.phase,
            "attached": pool.attached,
            "ready": pool.ready,
            "voices": sorted(leading.voices),
            "restarts": sum(worker.restarts for worker in pool.workers),
            **leading.log,
            "workers": [
                {
                    "device": worker.config.device,
                    "phase": worker.phase,
                    "attached": worker.attached,
                    "ready": worker.ready,
                    "restarts": worker.restarts,
                    "reason": worker.reason,
                    "busy": worker.busy,
                    **asdict(worker.usage),
                }
                for worker in pool.workers
            ],
        }
        return JSONResponse(status_for(request.scope, body), status_code=200 if ok else 503)

    async def _metrics(self, _: Request) -> Response:
        from starlette.responses import Response

        return Response(self._exposition.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "resemble-ai"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _openapi(self, _: Request) -> Response:
        from starlette.responses import Response

        # In a thread: the first call imports pydantic and builds all schemas, which takes half a second.
        described = await asyncio.to_thread(description, self._max_characters)
        return Response(described, media_type="application/json")


@functools.cache
def description(max_characters: int) -> bytes:
    """The body of `/openapi.json`."""
    from chatterbox_prewarm.serve.http.openapi import document
    from chatterbox_prewarm.version import __version__

    return json.dumps(document(__version__, max_characters=max_characters)).encode()


async def _refused(_: Request, error: Exception) -> Response:
    """What no route takes, in OpenAI's shape."""
    from starlette.exceptions import HTTPException

    if not isinstance(error, HTTPException):
        raise TypeError(error)
    response = failure(error.status_code, f"{error.detail}: see /openapi.json for what there is", "no_such_route")
    response.headers.update(error.headers or {})
    return response


async def _faulted(_: Request, error: Exception) -> Response:
    """A fault of this program, in the same; the server logs it besides."""
    return failure(500, f"a fault of this server: {type(error).__name__}", "fault")
