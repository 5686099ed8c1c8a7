"""The body of `POST /v1/audio/speech`: parse JSON with OpenAI's fields and our own into checked `SpeechOptions`.

The behaviour of existing clients decided the open questions. The default format is mp3 as in OpenAI's API, because
clients save the response with that file name. `model` names a model of the server; the names of OpenAI's models mean
the first one. `instructions` has no effect, as in OpenAI's models without instructions. Unknown fields have no effect
either, because clients of other servers send them. A known field with an invalid value is an error. A setting of the
sampling that the model does not have is an error too, unless upstream's `generate` accepts it without an effect:
clients of other servers always send the settings of the English model.
"""

from __future__ import annotations

import functools
import logging
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from pydantic_core import from_json

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.text import MAX_CHARACTERS, check_text, decode_text
from chatterbox_prewarm.serve.http.error_responses import RequestError
from chatterbox_prewarm.serve.http.speech_rules import SpeechRules, UnknownModelError
from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions
from chatterbox_prewarm.system.limits import MAX_SEED, MAX_TOKENS, MIN_LOOK_AHEAD, MIN_TOKENS, SAMPLING
from chatterbox_prewarm.weights.variants import CONVERSION_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.weights.variants import Variant

logger = logging.getLogger(__name__)

_DEFAULT_RULES = SpeechRules()
_EXAMPLE = 'send {"input": "Hello."}'
#: The fields that have the same name and meaning in `SpeechOptions`.
_SAME_IN_OPTIONS = {"stream_format", "seed", "max_new_tokens", "look_ahead"}

# `parse_speech_options` checks these limits with the functions that all callers use. Here they are only documentation.
_Text = Annotated[StrictStr, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_CHARACTERS})]


def _integer(low: int, high: int) -> Any:
    return Field(strict=True, ge=low, le=high)


def _number(name: str) -> Any:
    low, high = SAMPLING[name]
    return Field(strict=True, ge=low, le=high, allow_inf_nan=False)


class VoiceReference(BaseModel):
    """A reference to a custom voice, in the format of OpenAI's API."""

    id: StrictStr = Field(description="The name of the voice.")


class SpeechRequest(BaseModel):
    """The text to speak and the settings. A null field is treated as missing, and unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    input: _Text = Field(description="The text. A long text is spoken in parts, sentence by sentence.")
    model: StrictStr | None = Field(
        default=None,
        description="A model that `/v1/models` lists. Default, and for the names of OpenAI's models: the first one.",
    )
    voice: StrictStr | VoiceReference | None = Field(
        default=None,
        description="The name of a voice or of an alias, or an object with the name as `id`. "
        f"Default: {DEFAULT_VOICE}.",
    )
    language: StrictStr | None = Field(
        default=None, description="The code of the text's language, such as fr. Default: the server's."
    )
    language_id: StrictStr | None = Field(default=None, description="Another name of `language`, as in upstream's API.")
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] | None = Field(
        default=None,
        description="Default: mp3. All formats are mono at 24 kHz. pcm is signed 16-bit little-endian, without a "
        "header.",
    )
    stream_format: Literal["audio", "sse"] | None = Field(
        default=None,
        description="audio: stream the bytes of the file. sse: stream the same bytes in server-sent events. Default: "
        "stream mp3, opus and pcm, and send wav and flac as complete files, with the length in the header.",
    )
    speed: Annotated[float, Field(strict=True, ge=1, le=1)] | None = Field(
        default=None, description="Must be 1. The model has no other speed."
    )
    instructions: StrictStr | None = Field(default=None, description="Ignored. The model takes no instructions.")
    seed: Annotated[int, _integer(0, MAX_SEED)] | None = Field(
        default=None, description="Makes the speech repeatable on the same machine. Default: random."
    )
    max_new_tokens: Annotated[int, _integer(MIN_TOKENS, MAX_TOKENS)] | None = Field(
        default=None,
        description="Limit on the speech tokens of each part, 25 per second. Default and maximum: the server's limit.",
    )
    temperature: Annotated[float, _number("temperature")] | None = Field(
        default=None, description="Randomness of the speech. Default: 0.8."
    )
    cfg_weight: Annotated[float, _number("cfg_weight")] | None = Field(
        default=None, description="Strength of the guidance by the text. Default: 0.5."
    )
    exaggeration: Annotated[float, _number("exaggeration")] | None = Field(
        default=None, description="Expressiveness of the speech. Default: stored with the voice."
    )
    repetition_penalty: Annotated[float, _number("repetition_penalty")] | None = Field(
        default=None, description="Lowers the probability of tokens that were drawn before. Default: the model's."
    )
    min_p: Annotated[float, _number("min_p")] | None = Field(
        default=None,
        description="Leaves out tokens less probable than this share of the most probable one. Default: 0.05.",
    )
    top_p: Annotated[float, _number("top_p")] | None = Field(
        default=None,
        description="Keeps the most probable tokens that have this probability together. Default: the model's.",
    )
    top_k: Annotated[int, _integer(*SAMPLING["top_k"])] | None = Field(
        default=None, description="Keeps so many of the most probable tokens; 0 keeps all. Default: 1000."
    )
    look_ahead: Annotated[int, _integer(MIN_LOOK_AHEAD, MAX_TOKENS)] | None = Field(
        default=None,
        description="Number of tokens after a chunk that must exist before its audio is computed. A small number gives "
        "earlier audio that differs from the default, which waits for all tokens.",
    )


def parse_speech_options(body: bytes, rules: SpeechRules = _DEFAULT_RULES) -> SpeechOptions:
    """Parse and check a request body.

    Args:
        body: JSON in UTF-8.
        rules: what the server accepts.

    Raises:
        RequestError: a field is invalid. The error names it.
        BadInputError: the body is not a JSON object.
    """
    fields = _parse_object(body)
    if rules.ignore_speed:
        fields.pop("speed", None)
    check_input = functools.partial(check_text, limit=rules.max_characters)
    try:
        request = SpeechRequest.model_validate(fields)
    except ValidationError as error:
        _raise_for(error, check_input)
    unknown = fields.keys() - SpeechRequest.model_fields.keys()
    if unknown:
        logger.info("ignored %d unknown field(s)", len(unknown))  # their names can be any text of the user
    voice = request.voice.id if isinstance(request.voice, VoiceReference) else request.voice
    variant = _model_of(request, rules)
    text = _check_field("input", request.input, check_input)
    voice = DEFAULT_VOICE if voice is None else voice  # the voice store resolves all names
    language = _language_of(request, variant) or rules.language_of(variant)
    _check_field("input", text, functools.partial(rules.check_text, variant=variant, language=language))
    return SpeechOptions(
        text=text,
        model=variant.name,
        voice=voice,
        language=language,
        format=request.response_format or "mp3",
        **request.model_dump(include=_SAME_IN_OPTIONS),
        **_sampling_of(request, variant),
    )


def _model_of(request: SpeechRequest, rules: SpeechRules) -> Variant:
    """Return the model of a request.

    Raises:
        RequestError: it converts speech, or the server does not have it. Then the status is 404, as in OpenAI's API.
    """
    if request.model == CONVERSION_MODEL and rules.converts:
        raise RequestError(
            f"the model {CONVERSION_MODEL} converts speech, and speaks no texts",
            next_step="leave the field out, or send a recording to /v1/audio/conversions",
            param="model",
        )
    try:
        return rules.model(request.model)
    except UnknownModelError as error:
        raise RequestError(
            error.message, next_step=error.next_step, status=404, code="model_not_found", param="model"
        ) from None


def _sampling_of(request: SpeechRequest, variant: Variant) -> dict[str, Any]:
    """Return the settings of the sampling that a request has, without those that have no effect in the model.

    Raises:
        RequestError: the model does not have a setting, and upstream refuses it too.
    """
    given = {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    for name in given:
        _check_field(name, name, variant.check_control)
    if ignored := [name for name in given if name in variant.ignored_controls]:
        logger.info("ignored %s: the model %s does not have them", ", ".join(ignored), variant.name)
    return {name: value for name, value in given.items() if name not in ignored}


def _language_of(request: SpeechRequest, variant: Variant) -> str | None:
    """Return the language that a request names.

    Raises:
        RequestError: the model does not speak it, or the two fields differ.
    """
    found = {
        name: _check_field(name, code, variant.check_language)
        for name in ("language", "language_id")
        if (code := getattr(request, name)) is not None
    }
    if len(set(found.values())) > 1:
        raise RequestError(
            "'language' and 'language_id' differ", param="language_id", next_step="send one of these fields"
        )
    return next(iter(found.values()), None)


def _parse_object(body: bytes) -> dict[str, Any]:
    text = decode_text(body).removeprefix("\ufeff")  # a byte order mark, which some programs write before JSON
    try:
        # This parser limits the depth of nesting and the number of digits.
        fields = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise BadInputError(f"the body is not JSON: {error}", next_step=_EXAMPLE) from None
    if not isinstance(fields, dict):
        raise BadInputError("the body is not a JSON object with a field 'input'", next_step=_EXAMPLE)
    return fields


def _raise_for(error: ValidationError, check_input: Callable[[Any], str]) -> NoReturn:
    """Raise a `RequestError` for the first problem that pydantic found."""
    first = error.errors(include_url=False, include_context=False)[0]
    param, value = str(first["loc"][0]), first["input"]
    if param == "input":
        if first["type"] == "missing":
            raise RequestError("the body has no field 'input'", param=param, next_step=_EXAMPLE) from None
        _check_field(param, value, check_input)
    raise RequestError(f"{param!r} is {reprlib.repr(value)}", param=param, next_step=NEXT_STEPS[param]) from None


def _check_field(param: str, value: Any, check: Callable[[Any], str]) -> str:
    """Return `check(value)`, with the name of the field added to its error."""
    try:
        return check(value)
    except BadInputError as error:
        raise RequestError(f"{param!r}: {error.message}", param=param, next_step=error.next_step) from None


def _range(kind: str, bounds: tuple[float, float]) -> str:
    return f"send {kind} from {bounds[0]} to {bounds[1]}, or leave the field out"


#: What to do about an invalid field.
NEXT_STEPS = {
    "input": "send a string",
    "model": "send a string, or leave the field out",
    "voice": 'send the name of a voice, as a string or as {"id": NAME}, or leave the field out',
    **dict.fromkeys(("language", "language_id"), "send the code of a language, such as en, or leave the field out"),
    "response_format": "send mp3, opus, flac, wav or pcm",
    "stream_format": "send audio or sse, or leave the field out",
    "speed": "leave the field out, or start the server with --ignore-speed; the speed cannot be changed",
    "instructions": "send a string, or leave the field out; it has no effect",
    "seed": _range("an integer", (0, MAX_SEED)),
    "max_new_tokens": _range("an integer", (MIN_TOKENS, MAX_TOKENS)),
    "look_ahead": _range("an integer", (MIN_LOOK_AHEAD, MAX_TOKENS)),
    **{name: _range("a number", bounds) for name, bounds in SAMPLING.items()},
    "top_k": _range("an integer", SAMPLING["top_k"]),
}
