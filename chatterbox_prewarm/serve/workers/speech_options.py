"""What a request asks for, checked: the words that front and worker use for it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SpeechOrder:
    """A request for speech. None leaves a choice to the server or the model.

    Attributes:
        text: what to say, of the whole request or of one part of it.
        voice: the name of a voice; whether there is one, its worker knows.
        format: "wav", "pcm", "flac", "opus" or "mp3".
        stream_format: "audio" or "sse" for a sound that is sent as it is made. With None so are mp3, opus and pcm; wav
            and flac are sent when complete.
        seed: makes the sound repeatable on the same machine.
        max_new_tokens: bound on the speech tokens, 25 to a second of audio.
        temperature, cfg_weight, exaggeration: how tokens are drawn, see `synthesis.Sampling`.
        look_ahead: how many tokens after a chunk its sound waits for; None for all, which gives the one-shot sound.
    """

    text: str
    voice: str
    format: str
    stream_format: str | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    cfg_weight: float | None = None
    exaggeration: float | None = None
    look_ahead: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, fit for JSON; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SpeechOrder:
        """The order that `to_dict` was called on."""
        return cls(**fields)
