"""Files of added voices made by hand, without a model, and clips to make voices of."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from safetensors.numpy import save

if TYPE_CHECKING:
    from numpy.typing import NDArray

VARIANT, WEIGHTS = "english", "sha256:" + "2" * 64


def tensors(seed: int = 0) -> dict[str, NDArray[Any]]:
    """What a voice of a three-second clip holds."""
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
    seed: int = 0, *, without: str = "", instead: dict[str, NDArray[Any]] | None = None, **metadata: str
) -> bytes:
    """The file of a voice; `metadata` replaces what it would say."""
    held = {name: value for name, value in (tensors(seed) | (instead or {})).items() if name != without}
    said = {"schema": "1", "variant": VARIANT, "weights": WEIGHTS, "created": "1700000000", "clip_sha256": "a" * 64}
    return bytes(save(held, said | metadata))


def tone(seconds: float = 2.0, rate: int = 24_000, channels: int = 1) -> NDArray[np.float32]:
    """A sound that can be heard, of shape (n,) or (n, channels)."""
    one = (0.3 * np.sin(np.arange(int(seconds * rate)) * (2 * np.pi * 200 / rate))).astype(np.float32)
    return one if channels == 1 else np.repeat(one[:, None], channels, axis=1)


def sound_file(samples: Any, rate: int = 24_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """Samples as a file of some format."""
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    return data.getvalue()


def children() -> set[int]:
    """Processes that this one has started and not waited for; other tests may have left some of torch's."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(number) for task in tasks for number in task.read_text().split()}
