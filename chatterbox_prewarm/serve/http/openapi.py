"""The OpenAPI 3.1 document: every route, its request, and its responses.

The schemas are derived from `schemas` and `SpeechRequest`, the same types that build responses and check requests.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import is_typeddict

from chatterbox_prewarm.model.clips import MAX_SECONDS, SOURCE
from chatterbox_prewarm.model.text import MAX_CHARACTERS, VOICE_NAME
from chatterbox_prewarm.serve.http import events, schemas
from chatterbox_prewarm.serve.http.conversion_request import ConversionRequest
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES
from chatterbox_prewarm.serve.http.speech_request import SpeechRequest
from chatterbox_prewarm.system.limits import SAMPLING
from chatterbox_prewarm.version import __version__
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.json_schema import JsonSchemaMode

#: The types that routes refer to by name. The schemas of nested types follow from them.
_ROOTS: tuple[Any, ...] = (
    SpeechRequest,
    ConversionRequest,
    schemas.Error,
    schemas.Model,
    schemas.Models,
    schemas.Status,
    schemas.Voice,
    schemas.VoiceDeleted,
    schemas.Voices,
    *get_args(schemas.SpeechEvent),
)
_BINARY = {"type": "string", "format": "binary"}
#: The error responses by status: the name of the component and its description.
_ERRORS = {
    400: ("BadRequest", "The request is invalid. `param` names the field."),
    401: ("Unauthorized", "The server requires a bearer token, and the request has no valid one."),
    403: ("Forbidden", "The voice is baked and cannot be deleted, or a page of another site sent the request."),
    404: ("NotFound", "There is no voice or model with this name."),
    408: ("Timeout", "The request body did not arrive in time."),
    409: ("Conflict", "A voice with this name already exists."),
    413: ("TooLarge", "The request body exceeds the size limit."),
    415: ("UnsupportedEncoding", "The request body is compressed. Send it uncompressed."),
    422: ("NoSpeech", "The model generated no speech for this text."),
    429: ("TooManyRequests", "The queue is full. Retry later."),
    500: ("Failed", "The server has an internal error."),
    503: ("Unavailable", "The server is starting or shutting down, no worker is free, or voices cannot be stored."),
    507: ("NoRoom", "The disk is full, or the maximum number of voices is reached."),
}
_RETRIED = (429, 503)
_MODEL = {"parameters": [{"$ref": "#/components/parameters/model"}]}
_TEXT = {"description": "Plain text.", "content": {"text/plain": {"schema": {"type": "string"}}}}


@functools.cache
def encoded_document(
    max_characters: int,
    ignore_speed: bool,
    models: tuple[str, ...],
    languages: tuple[str, ...],
    settings: tuple[str, ...],
) -> bytes:
    """Return the body of `/openapi.json`. Building it takes about half a second."""
    document = build_document(
        __version__,
        max_characters=max_characters,
        ignore_speed=ignore_speed,
        models=models,
        languages=languages,
        settings=settings,
    )
    return json.dumps(document).encode()


def build_document(
    version: str,
    *,
    max_characters: int = MAX_CHARACTERS,
    ignore_speed: bool = False,
    models: Sequence[str] = (DEFAULT_VARIANT.name,),
    languages: Sequence[str] = tuple(DEFAULT_VARIANT.languages),
    settings: Sequence[str] = tuple(DEFAULT_VARIANT.controls),
) -> dict[str, Any]:
    """Build the OpenAPI document from JSON-compatible values.

    Args:
        version: the version of this program.
        max_characters: the length of the longest text that this server accepts.
        ignore_speed: True if this server accepts any value of the field `speed`, without an effect.
        models: the names of the models of this server.
        languages: the codes of their languages.
        settings: the settings of the sampling that a request may have.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chatterbox-prewarm",
            "version": version,
            "description": "Speech from Chatterbox TTS with OpenAI's API. An unknown path returns 404 and an "
            "unsupported method returns 405, both with an `Error` body.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{}, {"bearer": []}],  # a server without a token accepts all requests
        "paths": {**_probes(), **_pages(), **_speech(), **_voices()},
        "components": {
            "schemas": _schemas(max_characters, models, languages, settings, ignore_speed=ignore_speed),
            "responses": {name: _error(status, text) for status, (name, text) in _ERRORS.items()},
            "parameters": {
                "voice": {
                    "name": "name",
                    "in": "path",
                    "required": True,
                    "description": "The name of a voice.",
                    "schema": {"type": "string", "pattern": f"^{VOICE_NAME}$"},
                },
                "model": {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "description": "The name of a model.",
                    "schema": {"type": "string"},
                },
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(
    max_characters: int,
    models: Sequence[str],
    languages: Sequence[str],
    settings: Sequence[str],
    *,
    ignore_speed: bool,
) -> dict[str, Any]:
    for shape in filter(is_typeddict, vars(schemas).values()):
        with_config(ConfigDict(use_attribute_docstrings=True))(shape)
    mode: JsonSchemaMode = "validation"
    roots = [(root, mode, TypeAdapter(root)) for root in _ROOTS]
    _, derived = TypeAdapter.json_schemas(roots, ref_template="#/components/schemas/{model}")
    components: dict[str, Any] = derived["$defs"]
    fields = components["SpeechRequest"]["properties"]
    fields["input"]["maxLength"] = max_characters
    for name, examples in (("model", models), ("language", languages), ("language_id", languages)):
        fields[name]["examples"] = list(examples)
    for name in SAMPLING.keys() - set(settings):
        del fields[name]
    if ignore_speed:
        fields["speed"] = {"description": "Ignored. The model has only one speed."}
    event = {"oneOf": [_ref(shape.__name__) for shape in get_args(schemas.SpeechEvent)]}
    components["SpeechEvent"] = {
        "description": "A server-sent event. The last event is `speech.audio.done` or an error.",
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "contentMediaType": "application/json", "contentSchema": event}},
    }
    return components


def _probes() -> dict[str, Any]:
    live = "Check that the server process runs. Never waits for the model."
    states = {200: _json("The condition holds.", "Status"), 503: _json("The condition does not hold.", "Status")}
    return {
        "/livez": {"get": _operation("live", live, {200: _TEXT})},
        "/startupz": {"get": _operation("started", "Check that the models and warm states are loaded.", states)},
        "/readyz": {"get": _operation("ready", "Check that all models have spoken, and one can speak now.", states)},
        "/readyz/{model}": {
            **_MODEL,
            "get": _operation("model_ready", "Check that a model can speak now.", {**states, **_errors(404)}),
        },
    }


def _pages() -> dict[str, Any]:
    html = {"description": "An HTML page.", "content": {"text/html": {"schema": {"type": "string"}}}}
    openapi = {"description": "This document.", "content": {"application/json": {"schema": {"type": "object"}}}}
    page = "Show the start, the caches and the voices, and a form to speak a text."
    return {
        "/": {"get": _operation("page", page, {200: html})},
        "/metrics": {"get": _operation("metrics", "Get the Prometheus metrics.", {200: _TEXT})},
        "/openapi.json": {"get": _operation("describe", "Get this document.", {200: openapi})},
        **_models(),
    }


def _models() -> dict[str, Any]:
    model = {200: _json("The model.", "Model"), **_errors(404)}
    return {
        "/v1/models": {"get": _operation("list_models", "List the models.", {200: _json("The models.", "Models")})},
        "/v1/models/{model}": {**_MODEL, "get": _operation("get_model", "Get a model.", model)},
    }


def _speech() -> dict[str, Any]:
    media = {name: {"schema": _BINARY} for name in MEDIA_TYPES.values()}
    audio = {
        "description": "Mono audio at 24 kHz in the requested format, or server-sent events if `stream_format` is sse.",
        "content": {**media, events.MEDIA_TYPE: {"schema": _ref("SpeechEvent")}},
        "headers": {
            "X-Finish-Reason": {
                "description": "`length` if a part reached the token limit, otherwise `stop`. A stream has this header "
                "only if that is known before its first byte.",
                "schema": {"type": "string", "enum": list(get_args(schemas.FinishReason))},
            },
            "X-Skipped-Parts": {
                "description": "Number of parts of the text that are missing from the audio, because the model cannot "
                "speak them. A stream has this header only if a part is left out before its first byte, and then later "
                "parts can be missing too. The event `speech.audio.done` always has the final number.",
                "schema": {"type": "integer", "minimum": 0},
            },
        },
    }
    body = {"required": True, "content": {"application/json": {"schema": _ref("SpeechRequest")}}}
    responses = {200: audio, **_errors(400, 403, 404, 408, 413, 415, 422, 429, 500, 503)}
    source = {
        **_BINARY,
        "description": f"{SOURCE.min_seconds:g} to {MAX_SECONDS:.0f} s of speech as WAV, FLAC, Ogg or MP3.",
    }
    form = {
        "allOf": [_ref("ConversionRequest"), {"type": "object", "required": ["file"], "properties": {"file": source}}]
    }
    upload = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    return {
        "/v1/audio/speech": {"post": _operation("speak", "Speak a text.", responses, requestBody=body)},
        "/v1/audio/conversions": {
            "post": _operation("convert", "Speak recorded speech with another voice.", responses, requestBody=upload)
        },
    }


def _voices() -> dict[str, Any]:
    name = {"type": "string", "pattern": f"^{VOICE_NAME}$", "description": "The name of the new voice."}
    clip = {**_BINARY, "description": "5 to 10 s of clean speech as WAV, FLAC, Ogg or MP3, sampled at 16 kHz or more."}
    form = {"type": "object", "required": ["name", "file"], "properties": {"name": name, "file": clip}}
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    added = {201: _json("The new voice.", "Voice"), **_errors(400, 403, 408, 409, 413, 415, 429, 500, 503, 507)}
    deleted = {200: _json("The voice was deleted.", "VoiceDeleted"), **_errors(400, 403, 404, 503)}
    found = {200: _json("The voice.", "Voice"), **_errors(400, 404)}
    audio = {"description": "A sentence in this voice.", "content": {MEDIA_TYPES["wav"]: {"schema": _BINARY}}}
    preview = {200: audio, **_errors(400, 403, 404, 422, 429, 500, 503)}
    voice = {"parameters": [{"$ref": "#/components/parameters/voice"}]}
    return {
        "/v1/audio/voices": {
            "get": _operation("list_voices", "List all voices.", {200: _json("All voices.", "Voices")}),
            "post": _operation("add_voice", "Add a voice from an audio clip.", added, requestBody=body),
        },
        "/v1/audio/voices/{name}": {
            **voice,
            "get": _operation("get_voice", "Get a voice.", found),
            "delete": _operation("delete_voice", "Delete an added voice.", deleted),
        },
        "/v1/audio/voices/{name}/preview": {**voice, "get": _operation("preview_voice", "Preview a voice.", preview)},
    }


def _operation(name: str, summary: str, responses: dict[int, dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """Describe one operation. Probes need no token."""
    if name in {"live", "started", "ready", "model_ready"}:
        fields["security"] = []
    else:
        responses = {**responses, **_errors(401)}
    ordered = {str(status): responses[status] for status in sorted(responses)}
    return {"operationId": name, "summary": summary, **fields, "responses": ordered}


def _errors(*statuses: int) -> dict[int, dict[str, Any]]:
    return {status: {"$ref": f"#/components/responses/{_ERRORS[status][0]}"} for status in statuses}


def _error(status: int, description: str) -> dict[str, Any]:
    retry = {"Retry-After": {"description": "Seconds until a retry.", "schema": {"type": "integer"}}}
    return {**_json(description, "Error"), **({"headers": retry} if status in _RETRIED else {})}


def _json(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}
