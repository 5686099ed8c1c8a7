"""Error responses in the format of OpenAI's API, shared by all routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, ModelError, PrewarmError
from chatterbox_prewarm.serve.voices.voice_errors import UnknownVoiceError, VoiceError
from chatterbox_prewarm.serve.workers.pool import BusyError
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError

if TYPE_CHECKING:
    from starlette.responses import Response

    from chatterbox_prewarm.serve.http.schemas import ErrorFields

_RETRY_SECONDS = 5


class RequestError(BadInputError):
    """A request that the server refuses.

    Args:
        message: the problem, with the expected and the actual value.
        next_step: how the client can correct the request.
        status: the HTTP status of the response.
        code: the problem as a code for programs.
        param: the request field that caused the error.
    """

    def __init__(
        self,
        message: str,
        *,
        next_step: str,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.status = status
        self.code = code
        self.param = param


def response_for(error: PrewarmError, *, retry_after: int = _RETRY_SECONDS) -> Response:
    """Return the response for an exception. `retry_after` is explained at `error_response`."""
    status, fields = _describe(error)
    return _response(status, fields, retry_after)


def error_fields(error: PrewarmError) -> ErrorFields:
    """Return the `error` object for an exception. A stream that has begun sends it as an event."""
    return _describe(error)[1]


def error_response(
    status: int, message: str, code: str, *, param: str | None = None, retry_after: int = _RETRY_SECONDS
) -> Response:
    """Return an error response in the format of OpenAI's API.

    Args:
        status: the HTTP status.
        message: the problem in words.
        code: the problem as a code for programs.
        param: the request field that caused the error.
        retry_after: seconds until the client should retry, sent with status 429 and 503.
    """
    return _response(status, _fields(status, message, code, param), retry_after)


def _describe(error: PrewarmError) -> tuple[int, ErrorFields]:
    match error:
        case RequestError():
            return error.status, _fields(error.status, str(error), error.code, error.param)
        case UnknownVoiceError():
            return error.status, _fields(error.status, str(error), error.code, "voice")
        case VoiceError():  # the voice store refused the field `voice` of a speech request
            return 400, _fields(400, str(error), "invalid_request", "voice")
        case BadInputError():
            return 400, _fields(400, str(error), "invalid_request")
        case BusyError():
            return 503, _fields(503, error.message, "busy")
        case WorkerGoneError():
            return 503, _fields(503, error.message, "worker_gone")
        case ModelError():  # for example, the model ended the speech after too few tokens
            return 422, _fields(422, error.message, "no_speech")
        case _:
            return 500, _fields(500, error.message, "synthesis_failed")


def _fields(status: int, message: str, code: str, param: str | None = None) -> ErrorFields:
    return {
        "message": message,
        "type": "invalid_request_error" if status < 500 else "server_error",
        "code": code,
        "param": param,
    }


def _response(status: int, fields: ErrorFields, retry_after: int) -> Response:
    from starlette.responses import JSONResponse

    headers = {"Retry-After": str(retry_after)} if status in {429, 503} else {}
    return JSONResponse({"error": fields}, status_code=status, headers=headers)
