"""What all routes of the API share: reading a body in a bounded way, and the shape of an answer that is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, ModelError, PrewarmError
from chatterbox_prewarm.serve.workers.pool import BusyError
from chatterbox_prewarm.serve.workers.supervisor import WorkerGoneError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_BODY_LIMIT = 1 << 20
_RETRY_SECONDS = 5


class BodyTooLargeError(BadInputError):
    """A request's body is larger than any request needs."""


class BadFieldError(BadInputError):
    """A field of a request cannot be used.

    Args:
        message: what is wrong, with the expected and the found value.
        param: the field.
        next_step: what to do about it.
    """

    def __init__(self, message: str, *, param: str, next_step: str) -> None:
        super().__init__(message, next_step=next_step)
        self.param = param


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


def failure_of(error: PrewarmError, *, retry_after: int = _RETRY_SECONDS) -> Response:
    """The answer that an error of this project's own gives; `retry_after` as for `failure`."""
    status, fields = _described(error)
    return _response(status, fields, retry_after)


def error_fields(error: PrewarmError) -> dict[str, Any]:
    """What the same answer holds under `error`, for an event in a stream that has begun: message, type, code, param."""
    return _described(error)[1]


def failure(
    status: int, message: str, code: str, *, param: str | None = None, retry_after: int = _RETRY_SECONDS
) -> Response:
    """An error in the shape of OpenAI's API.

    Args:
        status: of HTTP.
        message: what is wrong, for people.
        code: the same for programs.
        param: the field of the request that it is about, if it is about one.
        retry_after: in how many seconds it is worth asking again, of a status that says that it is.
    """
    return _response(status, _fields(status, message, code, param), retry_after)


def _described(error: PrewarmError) -> tuple[int, dict[str, Any]]:
    if isinstance(error, BodyTooLargeError):
        return 413, _fields(413, error.message, "too_large")
    if isinstance(error, BadInputError):
        return 400, _fields(400, str(error), "invalid_request", getattr(error, "param", None))
    if isinstance(error, BusyError):
        return 503, _fields(503, error.message, "busy")
    if isinstance(error, WorkerGoneError):
        return 503, _fields(503, error.message, "worker_gone")
    if isinstance(error, ModelError):  # of too few tokens, say; the text was fine by itself
        return 422, _fields(422, error.message, "no_speech")
    return 500, _fields(500, error.message, "synthesis_failed")


def _fields(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "code": code, "param": param}


def _response(status: int, fields: dict[str, Any], retry_after: int) -> Response:
    from starlette.responses import JSONResponse

    headers = {"Retry-After": str(retry_after)} if status in {429, 503} else {}
    return JSONResponse({"error": fields}, status_code=status, headers=headers)
