"""The routes of the server. They read the state of the model from the worker pool."""

from __future__ import annotations

import asyncio
import functools
import reprlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route

from chatterbox_prewarm.serve.http import page
from chatterbox_prewarm.serve.http.access import visible_status
from chatterbox_prewarm.serve.http.error_responses import error_response
from chatterbox_prewarm.serve.http.http_metrics import HttpMetrics
from chatterbox_prewarm.serve.http.speech_route import SpeechRoute
from chatterbox_prewarm.serve.http.voice_routes import VoiceRoutes

if TYPE_CHECKING:
    from starlette.requests import Request

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.schemas import Model, Models, Status
    from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
    from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
    from chatterbox_prewarm.serve.workers.pool import Pool

#: The id of the model in `/v1/models`.
MODEL = "chatterbox"


class App:
    """The handlers of all routes.

    Args:
        pool: the workers.
        admission: decides whether the server accepts a request.
        voices: the baked and the added voices.
        rules: what the server accepts in a speech request.
    """

    def __init__(self, pool: Pool, admission: Admission, voices: VoiceStore, rules: SpeechRules) -> None:
        self._pool = pool
        self._admission = admission
        self._document = functools.partial(_openapi_body, rules)
        self._model_entry: Model = {
            "id": MODEL,
            "object": "model",
            "created": 0,
            "owned_by": "resemble-ai",
            "variant": rules.variant.name,
            "languages": dict(rules.variant.languages),
            "language": rules.variant.check_language(rules.language),
        }
        self._http_metrics = HttpMetrics(pool, admission)
        pool.on_part = self._http_metrics.count_part
        pool.on_skipped = self._http_metrics.skipped.inc
        self._speech = SpeechRoute(pool, admission, self._http_metrics, rules)
        self._voices = VoiceRoutes(voices, admission, prepare=pool.prepare_voice, speak=self._speech.respond)

    def asgi(self) -> Starlette:
        """Return the ASGI application."""
        application = Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/startupz", self._startupz),
                Route("/readyz", self._readyz),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),  # names of models often contain a slash
                Route("/v1/audio/speech", self._speech, methods=["POST"]),
                *self._voices.routes(),
                Route("/openapi.json", self._openapi),
                *page.routes(),
            ],
            exception_handlers={HTTPException: _route_not_found, Exception: _internal_error},
        )
        # Starlette redirects to a URL with the host of the request, which a client or a proxy may have changed.
        application.router.redirect_slashes = False
        return application

    async def _livez(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _startupz(self, request: Request) -> Response:
        return self._status(request, ok=self._pool.attached)

    async def _readyz(self, request: Request) -> Response:
        return self._status(request, ok=self._pool.ready and not self._admission.draining)

    def _status(self, request: Request, *, ok: bool) -> Response:
        pool, leading = self._pool, self._pool.leading
        status: Status = {
            "phase": "draining" if self._admission.draining else leading.phase,
            "attached": pool.attached,
            "ready": pool.ready,
            "voices": sorted(leading.voices),
            "restarts": sum(worker.restarts for worker in pool.workers),
            "workers": [
                {
                    "device": worker.config.device,
                    "phase": worker.phase,
                    "attached": worker.attached,
                    "ready": worker.ready,
                    "restarts": worker.restarts,
                    "reason": worker.reason,
                    "busy": worker.busy,
                    **asdict(worker.usage),  # type: ignore[typeddict-item]  # a test validates these fields
                }
                for worker in pool.workers
            ],
        }
        body = visible_status(request.scope, {**status, **leading.log})
        return JSONResponse(body, status_code=200 if ok else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._http_metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        models: Models = {"object": "list", "data": [self._model_entry]}
        return JSONResponse(models)

    async def _model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name == MODEL:
            return JSONResponse(self._model_entry)
        message = f"there is no model {reprlib.repr(name)}: this server has only {MODEL!r}"
        return error_response(404, message, "model_not_found", param="model")

    async def _openapi(self, _: Request) -> Response:
        # The import of pydantic and the derivation of the schemas take half a second, so they run in a thread.
        return Response(await asyncio.to_thread(self._document), media_type="application/json")


def _openapi_body(rules: SpeechRules) -> bytes:
    from chatterbox_prewarm.serve.http.openapi import encoded_document

    return encoded_document(rules.max_characters, rules.ignore_speed, tuple(rules.variant.languages))


def _without_slash(request: Request) -> str | None:
    """Return the relative URL of the same path without its last slash, if there is such a route."""
    scope = {**request.scope, "path": request.scope["path"][:-1]}
    if not request.scope["path"].endswith("/") or not any(
        route.matches(scope)[0] is not Match.NONE for route in request.app.routes
    ):
        return None
    name = request.scope["raw_path"][:-1].rpartition(b"/")[2].decode("ascii")
    return f"../{name}" + (f"?{request.url.query}" if request.url.query else "")


async def _route_not_found(request: Request, error: Exception) -> Response:
    """Respond to an unknown path or an unsupported method."""
    if not isinstance(error, HTTPException):
        raise TypeError(error)
    if error.status_code == 404 and (location := _without_slash(request)):
        return Response(status_code=307, headers={"Location": location})
    response = error_response(error.status_code, f"{error.detail}: /openapi.json lists all routes", "no_such_route")
    response.headers.update(error.headers or {})
    return response


async def _internal_error(_: Request, error: Exception) -> Response:
    """Respond to an exception that no handler caught. uvicorn logs its traceback."""
    return error_response(500, f"internal error of this server: {type(error).__name__}", "fault")
