"""The API's description for programs, OpenAPI 3.1: every route, what it takes, and all that it may answer.

The schemas are those of the models that check the requests, so that the two cannot differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pydantic.json_schema import models_json_schema

from chatterbox_prewarm.model.text import MAX_CHARACTERS, VOICE_NAME
from chatterbox_prewarm.serve.http import events
from chatterbox_prewarm.serve.http import schemas as answers
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES
from chatterbox_prewarm.serve.http.speech_request import SpeechRequest

if TYPE_CHECKING:
    from pydantic import BaseModel

_MODELS: tuple[type[BaseModel], ...] = (
    SpeechRequest,
    answers.Error,
    answers.Models,
    answers.Status,
    answers.Voice,
    answers.VoiceDeleted,
    answers.Voices,
    *get_args(answers.SpeechEvent),
)
_REF = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}
#: The answers that are errors in OpenAI's shape, by status.
_ERRORS = {
    400: ("BadRequest", "Something in the request cannot be used; `param` names the field."),
    401: ("Unauthorized", "The server wants a bearer token, and there was none or a wrong one."),
    403: ("Forbidden", "The voice is a baked one, or a page of another site asks."),
    404: ("NotFound", "There is nothing of that name."),
    408: ("Timeout", "The body did not arrive in time."),
    409: ("Conflict", "The name is taken."),
    413: ("TooLarge", "The body is larger than any request needs."),
    422: ("NoSpeech", "The model made no sound of this text."),
    429: ("TooManyRequests", "As many requests as the server takes are waiting already."),
    500: ("Failed", "The server has a fault."),
    503: ("Unavailable", "The server is starting or shutting down, has no worker with time, or no place for voices."),
    507: ("NoRoom", "The disk is full, or there are as many voices as may be."),
}
_RETRIED = (429, 503)


def document(version: str, *, max_characters: int = MAX_CHARACTERS) -> dict[str, Any]:
    """The description as JSON-ready values.

    Args:
        version: of this program.
        max_characters: the longest text that this server accepts.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chatterbox-prewarm",
            "version": version,
            "description": "Speech from Chatterbox TTS, by OpenAI's API. Any other path gives 404 and any other method "
            "405, both in the shape of `Error`.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{}, {"bearer": []}],  # none, unless the server was started with a token
        "paths": {**_probes(), **_pages(), **_speech(), **_voices()},
        "components": {
            "schemas": _schemas(max_characters),
            "responses": {name: _error(status, text) for status, (name, text) in _ERRORS.items()},
            "parameters": {
                "voice": {
                    "name": "name",
                    "in": "path",
                    "required": True,
                    "description": "The name of a voice.",
                    "schema": {"type": "string", "pattern": f"^{VOICE_NAME}$"},
                }
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(max_characters: int) -> dict[str, Any]:
    _, found = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
    schemas: dict[str, Any] = found["$defs"]
    schemas["SpeechRequest"]["properties"]["input"]["maxLength"] = max_characters
    said = {"oneOf": [_ref(model.__name__) for model in get_args(answers.SpeechEvent)]}
    schemas["SpeechEvent"] = {
        "description": "One server-sent event. The last is `speech.audio.done` or an error.",
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "contentMediaType": "application/json", "contentSchema": said}},
    }
    return schemas


def _probes() -> dict[str, Any]:
    status = _content("How far the start is.", "Status")
    waiting = _content("Not yet, or no more.", "Status")
    return {
        "/livez": _get("live", "Whether the server runs; it never waits for the model.", 200, _text(), probe=True),
        "/startupz": _get(
            "started", "Whether model and warm state are in place.", 200, status, {503: waiting}, probe=True
        ),
        "/readyz": _get("ready", "Whether a real synthesis passed.", 200, status, {503: waiting}, probe=True),
    }


def _pages() -> dict[str, Any]:
    page = {"description": "A page for people.", "content": {"text/html": {"schema": {"type": "string"}}}}
    own = {"description": "This document.", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {
        "/": _get("page", "The start, the caches, the voices, and a box to type into.", 200, page),
        "/metrics": _get("metrics", "Prometheus metrics.", 200, _text()),
        "/openapi.json": _get("describe", "What is here.", 200, own),
        "/v1/models": _get("list_models", "The model.", 200, _content("One model.", "Models")),
    }


def _speech() -> dict[str, Any]:
    media = {name: {"schema": _BINARY} for name in MEDIA_TYPES.values()}
    sound = {
        "description": "The sound in the format asked for, 24 kHz mono; in events if `stream_format` is sse.",
        "content": {**media, events.MEDIA_TYPE: {"schema": _ref("SpeechEvent")}},
    }
    body = {"required": True, "content": {"application/json": {"schema": _ref("SpeechRequest")}}}
    answered = {200: sound, **_refusals(400, 403, 408, 413, 422, 429, 500, 503)}
    return {"/v1/audio/speech": {"post": _operation("speak", "Speak a text.", answered, requestBody=body)}}


def _voices() -> dict[str, Any]:
    name = {"type": "string", "pattern": f"^{VOICE_NAME}$", "description": "What to call it."}
    clip = {**_BINARY, "description": "5 to 10 s of clean speech: WAV, FLAC, Ogg or MP3, 16 kHz or more."}
    form = {"type": "object", "required": ["name", "file"], "properties": {"name": name, "file": clip}}
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    made = {201: _content("The voice.", "Voice"), **_refusals(400, 403, 408, 409, 413, 429, 500, 503, 507)}
    gone = {200: _content("It is no more.", "VoiceDeleted"), **_refusals(400, 403, 404, 503)}
    heard = {"description": "A sentence in that voice.", "content": {MEDIA_TYPES["wav"]: {"schema": _BINARY}}}
    voice = {"parameters": [{"$ref": "#/components/parameters/voice"}]}
    return {
        "/v1/audio/voices": {
            **_get("list_voices", "All voices.", 200, _content("All voices.", "Voices")),
            "post": _operation("add_voice", "Make a voice of a clip.", made, requestBody=body),
        },
        "/v1/audio/voices/{name}": {
            **voice,
            **_get("get_voice", "A voice.", 200, _content("The voice.", "Voice"), _refusals(400, 404)),
            "delete": _operation("delete_voice", "Delete a voice that was added.", gone),
        },
        "/v1/audio/voices/{name}/preview": {
            **voice,
            **_get("preview_voice", "Hear a voice.", 200, heard, _refusals(400, 404, 422, 429, 500, 503)),
        },
    }


def _get(
    name: str,
    summary: str,
    status: int,
    answer: dict[str, Any],
    others: dict[int, dict[str, Any]] | None = None,
    *,
    probe: bool = False,
) -> dict[str, Any]:
    """A route's GET. A probe asks for no token."""
    return {"get": _operation(name, summary, {status: answer, **(others or {})}, probe=probe)}


def _operation(
    name: str, summary: str, answered: dict[int, dict[str, Any]], *, probe: bool = False, **more: Any
) -> dict[str, Any]:
    if not probe:
        answered = {**answered, **_refusals(401)}
    responses = {str(status): answered[status] for status in sorted(answered)}
    security: dict[str, Any] = {"security": []} if probe else {}
    return {"operationId": name, "summary": summary, **security, **more, "responses": responses}


def _refusals(*statuses: int) -> dict[int, dict[str, Any]]:
    return {status: {"$ref": f"#/components/responses/{_ERRORS[status][0]}"} for status in statuses}


def _error(status: int, description: str) -> dict[str, Any]:
    retry = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return {**_content(description, "Error"), **({"headers": retry} if status in _RETRIED else {})}


def _content(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _text() -> dict[str, Any]:
    return {"description": "Text.", "content": {"text/plain": {"schema": {"type": "string"}}}}


def _ref(schema: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=schema)}
