"""`POST /v1/audio/conversions`: speak recorded speech with another voice.

Like `SpeechRoute`, it is an ASGI application.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request

from chatterbox_prewarm.errors import PrewarmError
from chatterbox_prewarm.serve.http.decode_clip import UploadLimits, decode
from chatterbox_prewarm.serve.http.error_responses import error_response, response_for
from chatterbox_prewarm.serve.http.response_stream import ResponseStream
from chatterbox_prewarm.serve.http.upload import read_form
from chatterbox_prewarm.weights.variants import CONVERSION_MODEL

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.audio_response import AudioResponder
    from chatterbox_prewarm.serve.http.speech_rules import SpeechRules

logger = logging.getLogger(__name__)

#: A conversion counts until its client has read the audio, because its speech, up to 29 MB, stays in memory until then.
LIMITS = UploadLimits(concurrent=8)


class ConversionRoute:
    """The ASGI application of the route.

    Args:
        admission: decides whether the server accepts a request.
        responder: sends the audio.
        rules: what the server accepts in a request.
        decoding: held while a clip is decoded.
        limits: on the uploaded speech.
    """

    def __init__(
        self,
        admission: Admission,
        responder: AudioResponder,
        rules: SpeechRules,
        *,
        decoding: asyncio.Semaphore,
        limits: UploadLimits = LIMITS,
    ) -> None:
        self._admission = admission
        self._responder = responder
        self._rules = rules
        self._limits = limits
        self._conversions = 0
        self._decoding = decoding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request with a form as its body, see `conversion_request`."""
        stream = ResponseStream(scope, receive, send)
        model = CONVERSION_MODEL if self._rules.converts else ""
        self._conversions += 1
        try:
            await self._respond(Request(scope, receive), stream)
        except PrewarmError as error:
            await stream.send(response_for(error))
        except ClientDisconnect:
            logger.info("the client disconnected before its request was complete")
        finally:
            self._conversions -= 1
            self._responder.count(stream, model)

    async def _respond(self, request: Request, stream: ResponseStream) -> None:
        """Read the form, decode its speech, and send the audio.

        Raises:
            PrewarmError: the request is refused.
        """
        if not self._rules.converts:
            message = "this server does not convert speech; start it with --convert"
            await stream.send(error_response(404, message, "model_not_found"))
            return
        if (refusal := self._admission.refusal(CONVERSION_MODEL)) is not None:
            await stream.send(refusal)
            return
        limits = self._limits
        if self._conversions > limits.concurrent:
            message = f"{limits.concurrent} conversions are in progress already"
            retry_after = self._responder.retry_after(CONVERSION_MODEL)
            await stream.send(error_response(429, message, "queue_full", retry_after=retry_after))
            return
        # Here, because the import of pydantic would delay the probes.
        parser: Any = await asyncio.to_thread(
            importlib.import_module, "chatterbox_prewarm.serve.http.conversion_request"
        )
        fields, clip = await read_form(
            request, parser.FORM, clip_bytes=limits.clip_bytes, seconds=limits.receive_seconds
        )
        parsed = parser.parse_conversion(fields, self._rules)
        async with self._decoding:
            source = await decode(clip, limits, kind="source")
        del clip  # up to 20 MB, and the response may take minutes
        await self._responder.respond(parser.conversion_options(parsed, source), stream)
