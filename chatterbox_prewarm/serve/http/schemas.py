"""The shapes of the API's JSON responses.

The handlers build these dictionaries, mypy checks them, and `openapi` derives its schemas from the same types. They are
typed dictionaries, not pydantic models, because the probes must be able to answer before pydantic is imported. The
string below a field becomes its description in the OpenAPI document.
"""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict  # pydantic needs this TypedDict before Python 3.12

#: Why the speech ended, with the words of OpenAI's chat API.
FinishReason = Literal["stop", "length"]


class ErrorFields(TypedDict):
    """Details of an error."""

    message: str
    """A message for people. It ends with what to do next."""
    type: Literal["invalid_request_error", "server_error"]
    code: str | None
    """A code for programs."""
    param: str | None
    """The request field that caused the error."""


class Error(TypedDict):
    """An error in the format of OpenAI's API."""

    error: ErrorFields


class Phase(TypedDict):
    """A phase of a worker's start. Times are in seconds since exec."""

    name: str
    start: float
    seconds: float


class Worker(TypedDict):
    """A process that holds a model on one device. The memory figures date from the worker's last response."""

    model: str
    """The model that it holds."""
    device: str
    phase: str
    attached: bool
    ready: bool
    restarts: int
    reason: str | None
    """The reason why the last start failed; null after a successful start."""
    busy: bool
    rss_bytes: int
    """Resident memory of the process."""
    vram_bytes: int
    """Device memory held by the allocator."""
    vram_peak_bytes: int
    """Peak device memory in use."""
    voices: int
    """Number of added voices in memory."""
    voice_bytes: int
    """Memory used by the added voices."""
    prefixes: int
    """Number of voices whose keys and values are in memory, for Turbo and Nano."""
    prefix_bytes: int
    """Memory used by them."""
    prefix_hits: int
    """How often a text found the keys and values of its voice."""
    prefix_misses: int
    """How often they were computed."""
    prefix_evictions: int
    """How often they were removed for those of another voice."""


class Status(TypedDict):
    """Progress and results of the start. The optional fields are missing until a worker has reported them.

    With several models, `phases` and the fields below it describe the start that has progressed least.
    """

    model: str
    """The model that the phases describe."""
    models: dict[str, bool]
    """Whether each model of the server can speak now."""

    phase: str
    """`ready`, or the current activity in words."""
    attached: bool
    """True when the models and their warm states are loaded."""
    ready: bool
    """True when every stage of a synthesis has run once with every model, and one of them can speak now."""
    voices: list[str]
    restarts: int
    """Number of workers that died and were replaced."""
    workers: list[Worker]
    phases: NotRequired[list[Phase]]
    marks: NotRequired[dict[str, float]]
    """Seconds since exec at which `attached` and `ready` were reached."""
    loaded: NotRequired[dict[str, int]]
    """Number of baked artifacts made available, by cache family."""
    hits: NotRequired[dict[str, int]]
    """Number of baked artifacts used, by cache family."""
    misses: NotRequired[dict[str, int]]
    """Number of artifacts rebuilt or skipped, by cache family."""
    reasons: NotRequired[list[str]]
    """The reasons for the misses."""
    next_steps: NotRequired[dict[str, str]]
    """The command or action that mends a miss, by its reason."""
    profile: NotRequired[str | None]
    state: NotRequired[str | None]
    """The key of the warm state."""
    cross_compiled: NotRequired[bool]
    """True when that state was compiled on a machine without its GPU, so the bake has not proven it."""
    timers: NotRequired[dict[str, float]]
    modules: NotRequired[int]
    """Number of modules that the worker had imported when it was ready."""


class Control(TypedDict):
    """A setting of the sampling."""

    default: float | None
    """Null if it is part of the voice or of the installed model."""
    minimum: float
    maximum: float


class Model(TypedDict):
    """A model in the format of OpenAI's API."""

    id: str
    """The name of its variant, such as english."""
    object: Literal["model"]
    created: int
    """Unix time."""
    owned_by: str
    task: Literal["speech", "conversion"]
    """`speech`: it speaks texts. `conversion`: it speaks recorded speech with another voice."""
    languages: dict[str, str]
    """The names of its languages by their code; empty for a conversion."""
    language: str
    """The language of a request that names none; empty for a conversion."""
    controls: dict[str, Control]
    """The settings of the sampling that a request can have."""
    tags: list[str]
    """Tags in a text that ask for a sound, such as [laugh]."""


class Models(TypedDict):
    """The list of models. Requests that name none are for the first one."""

    object: Literal["list"]
    data: list[Model]


class Voice(TypedDict):
    """A voice."""

    id: str
    """The name of the voice."""
    name: str
    """The same as `id`, for clients that show a name."""
    object: Literal["voice"]
    baked: bool
    """True when the voice is part of the image and cannot be deleted."""
    bytes: int
    created: int | None
    """Unix time; null for a baked voice."""
    digest: str | None
    """SHA-256 of the file of an added voice."""
    models: list[str]
    """The models that can speak with the voice."""
    usable: bool
    """True when a model of this server can."""
    reason: str | None
    """The reason why a model cannot."""


class VoiceName(TypedDict):
    """A voice that this server can speak with."""

    id: str
    name: str
    """The same as `id`."""


class Voices(TypedDict):
    """The list of voices."""

    object: Literal["list"]
    data: list[Voice]
    """All voices, also those that are not usable."""
    voices: list[VoiceName]
    """The usable voices, for clients such as Open WebUI, which read the list under this name."""


class VoiceDeleted(TypedDict):
    """Confirmation of a deleted voice, in the format of OpenAI's API."""

    id: str
    object: Literal["voice.deleted"]
    deleted: Literal[True]


class SpeechAudioDelta(TypedDict):
    """The next part of the audio."""

    type: Literal["speech.audio.delta"]
    audio: str
    """Bytes of the audio file, in base64."""


class SpeechUsage(TypedDict):
    """The amount of text read and speech generated."""

    input_tokens: int
    """Number of characters in the text; 0 for a conversion. The server does not count the model's text tokens."""
    output_tokens: int
    """Number of speech tokens, 25 per second of audio."""
    total_tokens: int


class SpeechAudioDone(TypedDict):
    """The end of the audio."""

    type: Literal["speech.audio.done"]
    usage: SpeechUsage
    finish_reason: FinishReason
    """`length` if the speech of a part reached the token limit, so that its end may be missing; otherwise `stop`."""
    skipped_parts: int
    """Number of parts of the text that are missing from the audio, because the model cannot speak them."""


class SpeechFailed(TypedDict):
    """An error that ends the audio before it is complete."""

    type: Literal["error"]
    error: ErrorFields


#: One server-sent event of streamed audio.
SpeechEvent = SpeechAudioDelta | SpeechAudioDone | SpeechFailed
