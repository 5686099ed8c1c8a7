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
from chatterbox_prewarm.serve.workers.worker_config import CONVERSION

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.audio_response import AudioResponder
    from chatterbox_prewarm.serve.http.speech_rules import SpeechRules

logger = logging.getLogger(__name__)

#: Conversions that the server receives, keeps in the queue or computes. Each holds up to 29 MB of speech in memory.
_MAX_CONVERSIONS = 8


class ConversionRoute:
    """The ASGI application of the route.

    Args:
        admission: decides whether the server accepts a request.
        responder: sends the audio.
        rules: what the server accepts in a request.
        limits: on the uploaded speech.
    """

    def __init__(
        self, admission: Admission, responder: AudioResponder, rules: SpeechRules, limits: UploadLimits | None = None
    ) -> None:
        self._admission = admission
        self._responder = responder
        self._rules = rules
        self._limits = limits or UploadLimits()
        self._conversions = 0
        self._decoding = asyncio.Semaphore(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request with a form as its body, see `conversion_request`."""
        stream = ResponseStream(scope, receive, send)
        model = CONVERSION if self._rules.converts else ""
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
        if (refusal := self._admission.refusal(CONVERSION)) is not None:
            await stream.send(refusal)
            return
        if self._conversions > _MAX_CONVERSIONS:
            message = f"{_MAX_CONVERSIONS} conversions are in progress already"
            await stream.send(error_response(429, message, "queue_full"))
            return
        # Here, because the import of pydantic would delay the probes.
        parser: Any = await asyncio.to_thread(
            importlib.import_module, "chatterbox_prewarm.serve.http.conversion_request"
        )
        limits = self._limits
        fields, clip = await read_form(
            request, parser.FORM, clip_bytes=limits.clip_bytes, seconds=limits.receive_seconds
        )
        parsed = parser.parse_conversion(fields, self._rules)
        async with self._decoding:
            source = await decode(clip, limits, kind="source")
        await self._responder.respond(parser.conversion_options(parsed, source), stream)
