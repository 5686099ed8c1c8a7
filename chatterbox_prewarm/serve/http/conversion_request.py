"""The form of `POST /v1/audio/conversions`: parse its fields into checked `ConversionOptions`."""

from __future__ import annotations

import reprlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chatterbox_prewarm.model.clips import DEFAULT_VOICE, SOURCE
from chatterbox_prewarm.serve.http.error_responses import RequestError
from chatterbox_prewarm.serve.http.speech_request import NEXT_STEPS
from chatterbox_prewarm.serve.http.speech_rules import SpeechRules, UnknownModelError
from chatterbox_prewarm.serve.http.upload import FormKind
from chatterbox_prewarm.serve.workers.speech_options import ConversionOptions
from chatterbox_prewarm.system.limits import MAX_SEED, MAX_TOKENS, MIN_LOOK_AHEAD
from chatterbox_prewarm.weights.variants import CONVERSION_MODEL


class ConversionRequest(BaseModel):
    """The settings of a conversion. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str = Field(default=CONVERSION_MODEL, description=f"Must be {CONVERSION_MODEL}, or be left out.")
    voice: str = Field(default=DEFAULT_VOICE, description="The voice to speak with: its name or an alias.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Makes the audio repeatable on the same machine. Default: random."
    )
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = Field(
        default="mp3", description="All formats are mono at 24 kHz, as for a text."
    )
    stream_format: Literal["audio", "sse"] | None = Field(
        default=None,
        description="audio: stream the bytes of the file. sse: stream the same bytes in server-sent events. Default: "
        "stream mp3, opus and pcm, and send wav and flac as complete files.",
    )
    look_ahead: Annotated[int, Field(ge=MIN_LOOK_AHEAD, le=MAX_TOKENS)] | None = Field(
        default=None,
        description="Number of tokens of 40 ms after a chunk that its audio depends on. A small number gives earlier "
        "audio that differs from the default, which waits for all tokens.",
    )


#: The form of the route.
FORM = FormKind(
    fields=tuple(ConversionRequest.model_fields),
    example="send a form with the speech as file: curl -F file=@SPEECH -F voice=NAME URL",
    length_step=SOURCE.length_step,
)


def parse_conversion(fields: dict[str, str], rules: SpeechRules) -> ConversionRequest:
    """Check the fields of a form, before its speech is decoded.

    Raises:
        RequestError: a field is invalid. The error names it.
    """
    try:
        request = ConversionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = str(first["loc"][0])
        raise RequestError(
            f"{param!r} is {reprlib.repr(first['input'])}", param=param, next_step=NEXT_STEPS[param]
        ) from None
    _check_model(request.model, rules)
    return request


def conversion_options(request: ConversionRequest, source: bytes) -> ConversionOptions:
    """Return the options of a checked request. `source` is a WAV file from `decode_clip.decode`."""
    return ConversionOptions(
        source=source,
        model=CONVERSION_MODEL,
        voice=request.voice,
        seed=request.seed,
        look_ahead=request.look_ahead,
        format=request.response_format,
        stream_format=request.stream_format,
    )


def _check_model(name: str, rules: SpeechRules) -> None:
    """Refuse a model that does not convert speech.

    Raises:
        RequestError: see above. The status is 404 if the server does not have the model.
    """
    if name == CONVERSION_MODEL:
        return
    try:
        variant = rules.model(name)
    except UnknownModelError as error:
        raise RequestError(
            error.message, next_step=error.next_step, status=404, code="model_not_found", param="model"
        ) from None
    raise RequestError(
        f"the model {variant.name} speaks texts; {CONVERSION_MODEL} converts speech",
        next_step=f"leave the field out, or send a text to /v1/audio/speech for {variant.name}",
        param="model",
    )
