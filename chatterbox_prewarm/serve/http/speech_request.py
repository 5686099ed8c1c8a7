"""The body of `POST /v1/audio/speech`: OpenAI's fields and ours, from bytes to a checked order.

Where a choice had to be made, the clients decided it. The default format is OpenAI's, mp3, since they store what comes
under that name. `model` and `instructions` have no effect, as OpenAI's own models that take no instructions ignore
them; nor have unknown fields, which clients of other servers send. A known field that is wrong is refused.
"""

from __future__ import annotations

import contextlib
import logging
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from pydantic_core import from_json

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.text import MAX_CHARACTERS, VOICE_NAME, check_text, check_voice_name, decode_text
from chatterbox_prewarm.serve.http.speech_api import BadFieldError
from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder
from chatterbox_prewarm.system.limits import LEAST_LOOK_AHEAD, LEAST_TOKENS, MAX_SEED, MOST_TOKENS, SAMPLING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_EXAMPLE = 'send {"input": "Hello."}'
_MOST_NAMED = 8

# Checked after the types, by the functions that check them everywhere; the schema is to tell it all the same.
_Text = Annotated[StrictStr, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_CHARACTERS})]
_VoiceName = Annotated[StrictStr, Field(json_schema_extra={"pattern": f"^{VOICE_NAME}$"})]


def _whole(low: int, high: int) -> Any:
    return Field(strict=True, ge=low, le=high)


def _number(name: str) -> Any:
    low, high = SAMPLING[name]
    return Field(strict=True, ge=low, le=high, allow_inf_nan=False)


class VoiceReference(BaseModel):
    """A voice as OpenAI's API refers to one that a user made."""

    id: _VoiceName = Field(description="Its name.")


class SpeechRequest(BaseModel):
    """What to say and how. A field that is null counts as left out; one that is not known is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input: _Text = Field(description="The text. A long one is spoken in parts, sentence by sentence.")
    model: StrictStr | None = Field(default=None, description="Any; the server has one model.")
    voice: _VoiceName | VoiceReference | None = Field(
        default=None, description=f"The name of a voice, alone or as `id` of an object; `{DEFAULT_VOICE}` if left out."
    )
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] | None = Field(
        default=None,
        description="mp3 if left out. All are mono at 24 kHz; pcm is signed 16-bit little-endian without a header.",
    )
    stream_format: Literal["audio", "sse"] | None = Field(
        default=None,
        description="audio: the bytes of the sound as they are made. sse: the same in server-sent events. "
        "Left out: mp3, opus and pcm as they are made, too; wav and flac when they are complete, since their headers "
        "hold the length.",
    )
    speed: Annotated[float, Field(strict=True, ge=1, le=1)] | None = Field(
        default=None, description="1; the model has no other."
    )
    instructions: StrictStr | None = Field(default=None, description="Ignored: the model takes none.")
    seed: Annotated[int, _whole(0, MAX_SEED)] | None = Field(
        default=None, description="Makes the sound repeatable on the same machine."
    )
    max_new_tokens: Annotated[int, _whole(LEAST_TOKENS, MOST_TOKENS)] | None = Field(
        default=None, description="Most speech tokens of each part, 25 to a second; at most what the server allows."
    )
    temperature: Annotated[float, _number("temperature")] | None = Field(
        default=None, description="How freely speech is drawn; 0.8 if left out."
    )
    cfg_weight: Annotated[float, _number("cfg_weight")] | None = Field(
        default=None, description="How closely speech keeps to the text; 0.5 if left out."
    )
    exaggeration: Annotated[float, _number("exaggeration")] | None = Field(
        default=None, description="How expressive speech is; the voice's own if left out."
    )
    look_ahead: Annotated[int, _whole(LEAST_LOOK_AHEAD, MOST_TOKENS)] | None = Field(
        default=None,
        description="How many tokens after a chunk its sound waits for: sound comes earlier, in another rendition. "
        "Left out, it waits for all.",
    )


def parse_order(body: bytes, *, limit: int = MAX_CHARACTERS) -> SpeechOrder:
    """Check a body and return what it asks for.

    Args:
        body: JSON in UTF-8.
        limit: most characters of the text.

    Raises:
        BadFieldError: naming the field.
        BadInputError: the body is no JSON object.
    """
    fields = _fields(body)
    try:
        request = SpeechRequest.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, limit) from None
    unknown = fields.keys() - SpeechRequest.model_fields.keys()
    if unknown:
        logger.info("ignored %d unknown field(s): %s", len(unknown), reprlib.repr(sorted(unknown)[:_MOST_NAMED]))
    voice = request.voice.id if isinstance(request.voice, VoiceReference) else request.voice
    with _about("input"):
        text = check_text(request.input, limit=limit)
    with _about("voice"):
        voice = DEFAULT_VOICE if voice is None else check_voice_name(voice)
    return SpeechOrder(
        text=text,
        voice=voice,
        format=request.response_format or "mp3",
        stream_format=request.stream_format,
        seed=request.seed,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        cfg_weight=request.cfg_weight,
        exaggeration=request.exaggeration,
        look_ahead=request.look_ahead,
    )


def _fields(body: bytes) -> dict[str, Any]:
    text = decode_text(body)
    try:
        # Nesting is bounded, and so are the digits of a number.
        fields = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise BadInputError(f"the body is not JSON: {error}", next_step=_EXAMPLE) from None
    if not isinstance(fields, dict):
        raise BadInputError("the body is not a JSON object with a field 'input'", next_step=_EXAMPLE)
    return fields


def _refusal(error: ValidationError, limit: int) -> BadInputError:
    """The first of pydantic's complaints in this project's words."""
    first = error.errors(include_url=False, include_context=False)[0]
    param, value = str(first["loc"][0]), first["input"]
    if param == "input":
        if first["type"] == "missing":
            return BadFieldError("the body has no field 'input'", param=param, next_step=_EXAMPLE)
        try:
            with _about(param):
                check_text(value, limit=limit)
        except BadInputError as found:
            return found
    return BadFieldError(f"{param!r} is {reprlib.repr(value)}", param=param, next_step=_STEPS[param])


@contextlib.contextmanager
def _about(param: str) -> Iterator[None]:
    """Add to a refusal which field it is about."""
    try:
        yield
    except BadInputError as error:
        raise BadFieldError(f"{param!r}: {error.message}", param=param, next_step=error.next_step) from None


def _from_to(kind: str, bounds: tuple[float, float]) -> str:
    return f"give {kind} from {bounds[0]} to {bounds[1]}, or leave it out"


_STEPS = {
    "input": "send a string",
    "model": "give a string, or leave it out",
    "voice": 'name a voice, as a string or as {"id": NAME}, or leave it out',
    "response_format": "ask for mp3, opus, flac, wav or pcm",
    "stream_format": "ask for audio or sse, or leave it out",
    "speed": "leave it out; the speed cannot be changed",
    "instructions": "give a string, or leave it out; it has no effect",
    "seed": _from_to("a whole number", (0, MAX_SEED)),
    "max_new_tokens": _from_to("a whole number", (LEAST_TOKENS, MOST_TOKENS)),
    "look_ahead": _from_to("a whole number", (LEAST_LOOK_AHEAD, MOST_TOKENS)),
    **{name: _from_to("a number", SAMPLING[name]) for name in ("temperature", "cfg_weight", "exaggeration")},
}
