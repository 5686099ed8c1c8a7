"""Options of one request for audio, as the server passes them from the request body to the worker. Imports no torch."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.system.limits import SAMPLING

#: Speech tokens in each chunk of a stream: one second of audio.
_CHUNK_TOKENS = 25


@dataclass(frozen=True, kw_only=True)
class AudioOptions:
    """What speaking a text and converting speech have in common. None lets the server or the model choose.

    Attributes:
        model: the name of a model; "" for the first model of the server.
        voice: the name of a voice. The voice store and the worker check whether it exists.
        seed: makes the audio repeatable on the same machine.
        look_ahead: number of tokens after a chunk that must exist before its audio is computed. None waits for all
            tokens and gives the same audio as a one-shot synthesis.
        format: "wav", "pcm", "flac", "opus" or "mp3".
        stream_format: "audio" or "sse" streams the audio. None streams mp3, opus and pcm, and sends wav and flac
            when they are complete.
        voice_digest: SHA-256 of an added voice's file in hexadecimal; None for a baked voice.
        chunk_tokens: speech tokens in each chunk of audio; None uses long chunks, for a caller that needs all audio
            at once.
    """

    model: str = ""
    voice: str = DEFAULT_VOICE
    seed: int | None = None
    look_ahead: int | None = None
    format: str = "pcm"
    stream_format: str | None = None
    voice_digest: str | None = None
    chunk_tokens: int | None = _CHUNK_TOKENS


@dataclass(frozen=True, kw_only=True)
class SpeechOptions(AudioOptions):
    """The text and the settings of a request to speak. None lets the server or the model choose.

    The front receives one object for each request and splits its text. Each worker receives a copy with one part of the
    text and with `seed` and `voice_digest` filled in.

    Attributes:
        text: the text of the request, or one part of it.
        language: a code of the variant's languages; None chooses the first one.
        max_new_tokens: upper bound on the speech tokens of each part; 25 tokens are one second of audio.
        temperature, cfg_weight, exaggeration, repetition_penalty, min_p, top_p, top_k: see `model.sampling.Sampling`.
    """

    text: str
    language: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    cfg_weight: float | None = None
    exaggeration: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    top_p: float | None = None
    top_k: float | None = None

    def sampling(self) -> dict[str, float]:
        """Return the sampling settings that the request sets, as arguments for `model.sampling.Sampling`."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(AudioOptions):
    """The speech and the settings of a request to convert speech.

    Attributes:
        source: a WAV file, as `decode_clip.decode` returns it.
    """

    source: bytes

    @property
    def source_seconds(self) -> float:
        """The length of the speech."""
        with wave.open(io.BytesIO(self.source)) as file:
            seconds: float = file.getnframes() / file.getframerate()
        return seconds
