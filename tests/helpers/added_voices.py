"""Files of added voices that need no model, and clips for making voices."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from safetensors.numpy import save

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

VARIANT, WEIGHTS = "english", "sha256:" + "2" * 64


def tensors(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return the tensors of a voice that was made from a three-second clip."""
    random = np.random.default_rng(seed)

    def floats(*shape: int) -> NDArray[np.float32]:
        return random.normal(size=shape).astype(np.float32)

    return {
        "t3.speaker_emb": floats(1, 256),
        "t3.cond_prompt_speech_tokens": random.integers(0, 6561, (1, 150)),
        "t3.emotion_adv": np.full((1, 1, 1), 0.5, np.float32),
        "gen.prompt_token": random.integers(0, 6561, (1, 75)),
        "gen.prompt_token_len": np.array([75]),
        "gen.prompt_feat": floats(1, 150, 80),
        "gen.embedding": floats(1, 192),
    }


def voice(
    seed: int = 0,
    *,
    models: Mapping[str, str] | None = None,
    without: str = "",
    instead: dict[str, NDArray[Any]] | None = None,
    **metadata: str,
) -> bytes:
    """Return the file of a voice.

    Args:
        seed: of the tensors.
        models: set digest of the checkpoint by the variant of each model.
        without: name of a tensor to leave out.
        instead: tensors to add or replace.
        **metadata: metadata to replace.
    """
    models = {VARIANT: WEIGHTS} if models is None else models
    contents = {name: value for name, value in (tensors(seed) | (instead or {})).items() if name != without}
    defaults = {f"weights:{model}": weights for model, weights in models.items()}
    defaults |= {"schema": "2", "created": "1700000000", "clip_sha256": "a" * 64}
    named = {f"{model}/{name}": value for model in models for name, value in contents.items()}
    return bytes(save(named, defaults | metadata))


def voice_of_schema_1(variant: str = VARIANT, weights: str = WEIGHTS) -> bytes:
    """Return the file of a voice as versions wrote it that served one model."""
    metadata = {"schema": "1", "variant": variant, "weights": weights}
    return bytes(save(tensors(), metadata | {"created": "1700000000", "clip_sha256": "a" * 64}))


def tone(seconds: float = 2.0, rate: int = 24_000, channels: int = 1) -> NDArray[np.float32]:
    """Return an audible tone of 200 Hz, float32 of shape (n,) or (n, channels)."""
    mono = (0.3 * np.sin(np.arange(int(seconds * rate)) * (2 * np.pi * 200 / rate))).astype(np.float32)
    return mono if channels == 1 else np.repeat(mono[:, None], channels, axis=1)


def sound_file(samples: Any, rate: int = 24_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """Encode samples as an audio file."""
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    return data.getvalue()


def children() -> set[int]:
    """Return the ids of child processes, including zombies. Other tests may have left some that torch started."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended
            found.update(int(number) for number in (task / "children").read_text().split())
    return found
