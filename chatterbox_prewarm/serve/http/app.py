"""The routes of the server. They read the state of the model from the worker pool."""

from __future__ import annotations

import asyncio
import reprlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route

from chatterbox_prewarm.serve.http import page
from chatterbox_prewarm.serve.http.access import visible_status
from chatterbox_prewarm.serve.http.audio_response import AudioResponder
from chatterbox_prewarm.serve.http.conversion_route import ConversionRoute
from chatterbox_prewarm.serve.http.error_responses import error_response
from chatterbox_prewarm.serve.http.http_metrics import HttpMetrics
from chatterbox_prewarm.serve.http.speech_route import SpeechRoute
from chatterbox_prewarm.serve.http.speech_rules import UnknownModelError
from chatterbox_prewarm.serve.http.voice_routes import VoiceRoutes
from chatterbox_prewarm.serve.workers.pools import slowest
from chatterbox_prewarm.weights.variants import CONVERSION_MODEL

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.requests import Request

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.schemas import Model, Models, Status
    from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
    from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.pools import Pools
    from chatterbox_prewarm.weights.variants import Variant


class App:
    """The handlers of all routes.

    Args:
        pools: the models.
        admission: decides whether the server accepts a request.
        voices: the baked and the added voices.
        rules: what the server accepts in a speech request.
    """

    def __init__(self, pools: Pools, admission: Admission, voices: VoiceStore, rules: SpeechRules) -> None:
        self._pools = pools
        self._admission = admission
        self._rules = rules
        self._http_metrics = HttpMetrics(pools, admission)
        responder = AudioResponder(pools, admission, self._http_metrics)
        self._speech = SpeechRoute(admission, responder, rules)
        decoding = asyncio.Semaphore(1)  # one clip at a time, for both routes with uploads
        self._conversions = ConversionRoute(admission, responder, rules, decoding=decoding)
        self._voices = VoiceRoutes(
            voices, admission, decoding=decoding, prepare=pools.prepare_voice, speak=self._speech.respond
        )

    def asgi(self) -> Starlette:
        """Return the ASGI application."""
        application = Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/startupz", self._startupz),
                Route("/readyz", self._readyz),
                Route("/readyz/{model}", self._model_readyz),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),  # names of models often contain a slash
                Route("/v1/audio/speech", self._speech, methods=["POST"]),
                Route("/v1/audio/conversions", self._conversions, methods=["POST"]),
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
        return self._status(request, list(self._pools), ready=self._pools.ready, ok=self._pools.attached)

    async def _readyz(self, request: Request) -> Response:
        ready = self._pools.ready
        return self._status(request, list(self._pools), ready=ready, ok=ready and not self._admission.draining)

    async def _model_readyz(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self._pools:
            return error_response(404, f"this server has no model {reprlib.repr(name)}", "model_not_found")
        pool = self._pools[name]
        return self._status(request, [pool], ready=pool.ready, ok=pool.ready and not self._admission.draining)

    def _status(self, request: Request, pools: Collection[Pool], *, ready: bool, ok: bool) -> Response:
        shown = slowest(pools)
        leading = shown.leading
        status: Status = {
            "model": shown.model,
            "models": {pool.model: pool.ready for pool in pools},
            "phase": "draining" if self._admission.draining else leading.phase,
            "attached": all(pool.attached for pool in pools),
            "ready": ready,
            "voices": sorted({name for pool in pools for name in pool.leading.voices}),
            "restarts": sum(worker.restarts for pool in pools for worker in pool.workers),
            "workers": [
                {
                    "model": pool.model,
                    "device": worker.config.device,
                    "phase": worker.phase,
                    "attached": worker.attached,
                    "ready": worker.ready,
                    "restarts": worker.restarts,
                    "reason": worker.reason,
                    "busy": worker.busy,
                    **asdict(worker.usage),  # type: ignore[typeddict-item]  # a test validates these fields
                }
                for pool in pools
                for worker in pool.workers
            ],
        }
        body = visible_status(request.scope, {**status, **leading.log})
        return JSONResponse(body, status_code=200 if ok else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self._http_metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        entries = [_model_entry(self._rules, one) for one in self._rules.variants]
        models: Models = {"object": "list", "data": entries + [_CONVERTING] * self._rules.converts}
        return JSONResponse(models)

    async def _model(self, request: Request) -> Response:
        if self._rules.converts and request.path_params["model"] == CONVERSION_MODEL:
            return JSONResponse(_CONVERTING)
        try:
            return JSONResponse(_model_entry(self._rules, self._rules.model(request.path_params["model"])))
        except UnknownModelError as error:
            return error_response(404, error.message, "model_not_found", param="model")

    async def _openapi(self, _: Request) -> Response:
        # The import of pydantic and the derivation of the schemas take half a second, so they run in a thread.
        return Response(await asyncio.to_thread(_openapi_body, self._rules), media_type="application/json")


def _openapi_body(rules: SpeechRules) -> bytes:
    from chatterbox_prewarm.serve.http.openapi import encoded_document

    languages = dict.fromkeys(code for variant in rules.variants for code in variant.languages)
    models = tuple(variant.name for variant in rules.variants)
    return encoded_document(rules.max_characters, rules.ignore_speed, models, tuple(languages), rules.settings)


def _model_entry(rules: SpeechRules, variant: Variant) -> Model:
    return {
        "id": variant.name,
        "object": "model",
        "created": 0,
        "owned_by": "resemble-ai",
        "task": "speech",
        "languages": dict(variant.languages),
        "language": rules.language_of(variant),
        "controls": {
            name: {"default": control.default, "minimum": control.low, "maximum": control.high}
            for name, control in variant.controls.items()
        },
        "tags": list(rules.tags.get(variant.name, ())),
    }


#: The entry of the model that converts speech.
_CONVERTING: Model = {
    "id": CONVERSION_MODEL,
    "object": "model",
    "created": 0,
    "owned_by": "resemble-ai",
    "task": "conversion",
    "languages": {},
    "language": "",
    "controls": {},
    "tags": [],
}


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
