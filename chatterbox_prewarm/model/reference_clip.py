"""A generated reference clip, so that no audio file has to be shipped."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

CLIP_SAMPLE_RATE = 24_000
#: Longer than each variant needs.
CLIP_SECONDS = 6.0


def reference_audio(seconds: float = CLIP_SECONDS, sample_rate: int = CLIP_SAMPLE_RATE) -> NDArray[np.float32]:
    """Generate a speech-like tone: a 120 Hz voice with harmonics, changing pitch, and syllables. It is deterministic.

    Returns:
        float32 (seconds * sample_rate,) within [-0.5, 0.5].
    """
    import numpy as np

    time = np.arange(int(seconds * sample_rate)) / sample_rate
    pitch = 120.0 + 20.0 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    voice = np.sum([np.sin(k * phase) / k for k in range(1, 20)], axis=0)
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 4.0 * time)
    noise = np.random.default_rng(0).normal(0.0, 0.02, time.shape)
    audio = envelope * voice + noise
    scaled: NDArray[np.float64] = 0.5 * audio / np.abs(audio).max()
    return scaled.astype(np.float32)


@contextlib.contextmanager
def reference_clip(seconds: float = CLIP_SECONDS) -> Iterator[Path]:
    """Write the generated audio to a WAV file in a private temporary folder, and remove it when the block ends."""
    import soundfile

    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-") as folder:
        path = Path(folder) / "reference.wav"
        soundfile.write(path, reference_audio(seconds), CLIP_SAMPLE_RATE)
        yield path
