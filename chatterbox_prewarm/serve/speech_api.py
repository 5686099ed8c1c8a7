"""The speech API's wire format: what the body of a request may hold, and the shape of an answer that is an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, PrewarmError
from chatterbox_prewarm.serve.supervisor import WorkerGoneError
from chatterbox_prewarm.text import MAX_SEED, check_text, decode_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_BODY_LIMIT = 1 << 20
_NUMBERS = ("temperature", "cfg_weight", "exaggeration")


class BodyTooLargeError(BadInputError):
    """A request's body is larger than any request needs."""


async def read_body(request: Request) -> bytes:
    """Read a body, giving up as soon as it is too large.

    Raises:
        BodyTooLargeError: it is.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_LIMIT:
            raise BodyTooLargeError(f"the body is larger than {_BODY_LIMIT} bytes", next_step="send a shorter text")
    return bytes(body)


def parse_speech(body: bytes, *, limit: int) -> dict[str, Any]:
    """Check the body of `POST /v1/audio/speech` and return the worker's request.

    Fields as in OpenAI's API: `input`, `voice`, `response_format` ("wav"); besides them `seed`, `max_new_tokens`,
    `temperature`, `cfg_weight`, `exaggeration`.

    Raises:
        BadInputError: naming the field.
    """
    try:
        fields = json.loads(decode_text(body))
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, brackets without end
        raise BadInputError(f"the body is not JSON: {error}", next_step='send {"input": "Hello."}') from error
    if not isinstance(fields, dict) or "input" not in fields:
        raise BadInputError("the body has no field 'input'", next_step='send {"input": "Hello."}')
    audio_format = fields.get("response_format", "wav")
    if audio_format != "wav":
        raise BadInputError(f"the format {audio_format!r} is not offered", next_step="ask for wav")
    if fields.get("speed", 1.0) != 1.0:
        raise BadInputError("the speed cannot be changed", next_step="leave 'speed' out")
    voice = fields.get("voice") or "default"
    if not isinstance(voice, str):
        raise BadInputError("'voice' is not a string", next_step="name a voice, or leave it out")
    order: dict[str, Any] = {"text": check_text(fields["input"], limit=limit), "voice": voice}
    for name, low, high in (("seed", 0, MAX_SEED), ("max_new_tokens", 3, 4096)):
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadInputError(f"{name!r} is {value!r}", next_step=f"give a whole number from {low} to {high}")
        order[name] = value
    order |= {name: fields[name] for name in _NUMBERS if fields.get(name) is not None}
    return order


def failure_of(error: PrewarmError) -> Response:
    """The answer that an error of this project's own gives."""
    if isinstance(error, BodyTooLargeError):
        return failure(413, error.message, "too_large")
    if isinstance(error, BadInputError):
        return failure(400, str(error), "invalid_request")
    if isinstance(error, WorkerGoneError):
        return failure(503, error.message, "worker_gone")
    return failure(500, error.message, "synthesis_failed")


def failure(status: int, message: str, code: str) -> Response:
    """An error in the shape of OpenAI's API."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"Retry-After": "5"} if status in {429, 503} else {}
    return JSONResponse(
        {"error": {"message": message, "type": kind, "code": code, "param": None}}, status_code=status, headers=headers
    )
