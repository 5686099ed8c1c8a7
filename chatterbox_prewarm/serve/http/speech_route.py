"""`POST /v1/audio/speech`: from the request body to the speech as one file, as a stream, or as server-sent events.

`SpeechRoute` is an ASGI application, not a handler that returns a response, for two reasons: a drain waits until a
response is complete, and a disconnected client frees its worker even before the first byte of the response.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect, Request

from chatterbox_prewarm.errors import PrewarmError
from chatterbox_prewarm.serve.http.error_responses import response_for
from chatterbox_prewarm.serve.http.request_body import BodyReader
from chatterbox_prewarm.serve.http.response_stream import ResponseStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.audio_response import AudioResponder
    from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
    from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions

logger = logging.getLogger(__name__)


class SpeechRoute:
    """The ASGI application of the route.

    Args:
        admission: decides whether the server accepts a request.
        responder: sends the audio.
        rules: what the server accepts in a request.
    """

    def __init__(self, admission: Admission, responder: AudioResponder, rules: SpeechRules) -> None:
        self._admission = admission
        self._responder = responder
        self._rules = rules
        self._bodies = BodyReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request with `SpeechRequest` as its body."""
        stream, model = ResponseStream(scope, receive, send), ""
        try:
            if (refusal := self._admission.refusal()) is not None:
                await stream.send(refusal)
                return
            # The request is not in flight yet, so a slow body does not occupy the queue or delay a drain.
            body = await self._bodies.read(Request(scope, receive))
            parse_speech_options = await asyncio.to_thread(_import_parser)
            options = parse_speech_options(body, self._rules)
            model = self._responder.model(options)
            await self._responder.respond(options, stream)
        except PrewarmError as error:
            await stream.send(response_for(error))
        except ClientDisconnect:
            logger.info("the client disconnected before its request was complete")
        finally:
            self._responder.count(stream, model)

    def respond(self, options: SpeechOptions) -> ASGIApp:
        """Return a response with the speech for `options`, for other routes."""

        async def response(scope: Scope, receive: Receive, send: Send) -> None:
            stream = ResponseStream(scope, receive, send)
            try:
                await self._responder.respond(options, stream)
            finally:
                self._responder.count(stream, self._responder.model(options))

        return response


def _import_parser() -> Callable[..., SpeechOptions]:
    """Import the parser of request bodies. The first request does this, so that pydantic does not delay the probes."""
    from chatterbox_prewarm.serve.http.speech_request import parse_speech_options

    return parse_speech_options
