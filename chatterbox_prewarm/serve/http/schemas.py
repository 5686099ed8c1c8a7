"""What the API's routes answer in JSON, as models: the source of the schemas in `openapi`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str = Field(description="For people, with what to do next.")
    type: Literal["invalid_request_error", "server_error"]
    code: str | None = Field(description="For programs.")
    param: str | None = Field(description="The field of the request that it is about.")


class Error(BaseModel):
    """An error in the shape of OpenAI's API."""

    error: ErrorFields


class Phase(BaseModel):
    """A phase of a worker's start; times are seconds since exec."""

    name: str
    start: float
    seconds: float


class Worker(BaseModel):
    """One process that holds the model, on one device."""

    device: str
    phase: str
    attached: bool
    ready: bool
    restarts: int
    reason: str | None = Field(default=None, description="Why its last start failed; null once one did not.")
    busy: bool
    rss_bytes: int = Field(description="Memory of its process, as of its last answer; so are the others.")
    vram_bytes: int = Field(description="Memory of its device that its allocator holds.")
    vram_peak_bytes: int
    hooks: int = Field(description="Hooks on the model's modules; constant unless something leaks.")
    voices: int = Field(description="Added voices that it holds.")
    voice_bytes: int


class Status(BaseModel):
    """How far the start is and what it found. Before a worker has reported, its figures are missing."""

    phase: str = Field(description="`ready`, or what is being done, for people.")
    attached: bool = Field(description="Model and warm state are in place.")
    ready: bool = Field(description="A real synthesis passed.")
    voices: list[str]
    restarts: int = Field(description="How many workers died and were replaced.")
    phases: list[Phase] = []
    marks: dict[str, float] = Field(default={}, description="Seconds since exec at which a moment was reached.")
    loaded: dict[str, int] = Field(default={}, description="Baked artifacts in place for use on demand, by family.")
    hits: dict[str, int] = Field(default={}, description="Baked artifacts that were used, by family.")
    misses: dict[str, int] = Field(default={}, description="Artifacts rebuilt or left out, by family.")
    reasons: list[str] = Field(default=[], description="Of the misses.")
    profile: str | None = None
    state: str | None = Field(default=None, description="The key of the warm state.")
    timers: dict[str, float] = {}
    workers: list[Worker] = []


class Model(BaseModel):
    """A model as OpenAI's API lists it."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time.")
    owned_by: str


class Models(BaseModel):
    """The models there are: one."""

    object: Literal["list"]
    data: list[Model]


class Voice(BaseModel):
    """A voice."""

    id: str = Field(description="Its name.")
    object: Literal["voice"]
    baked: bool = Field(description="Part of the image, and read-only.")
    bytes: int
    created: int | None = Field(description="Unix time; null of a baked one.")
    digest: str | None = Field(default=None, description="SHA-256 of an added one's file.")
    usable: bool = Field(default=True, description="Whether this server can speak with it.")
    reason: str | None = Field(default=None, description="Why not.")


class Voices(BaseModel):
    """All voices."""

    object: Literal["list"]
    data: list[Voice]


class VoiceDeleted(BaseModel):
    """A voice that is no more, as OpenAI's API says it of other objects."""

    id: str
    object: Literal["voice.deleted"]
    deleted: Literal[True]


class SpeechAudioDelta(BaseModel):
    """More of the sound."""

    type: Literal["speech.audio.delta"]
    audio: str = Field(description="Bytes of the file, base64.")


class SpeechUsage(BaseModel):
    """What was read and spoken."""

    input_tokens: int = Field(description="Characters of the text: the model's own tokens are not counted.")
    output_tokens: int = Field(description="Speech tokens, 25 to a second.")
    total_tokens: int


class SpeechAudioDone(BaseModel):
    """The sound is complete."""

    type: Literal["speech.audio.done"]
    usage: SpeechUsage


class SpeechFailed(BaseModel):
    """The sound ends here, incomplete."""

    type: Literal["error"]
    error: ErrorFields


#: One server-sent event of a streamed sound.
SpeechEvent = SpeechAudioDelta | SpeechAudioDone | SpeechFailed
