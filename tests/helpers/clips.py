"""MP3 files with and without a length."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from tests.helpers.added_voices import tone

#: Of the files.
SECONDS = 6.0
#: The codec's delay, which only a tag in the first frame says how to remove.
DELAY = 0.1


def mp3(rate: int = 24_000, channels: int = 1, *, loud_first: bool = False, mode: str = "VARIABLE") -> bytes:
    """Return an MP3 file whose bit rate changes in the middle."""
    samples = tone(SECONDS, rate, channels) * 0.3
    half = slice(0, len(samples) // 2) if loud_first else slice(len(samples) // 2, None)
    samples[half] += np.random.default_rng(0).uniform(-0.5, 0.5, samples[half].shape).astype(np.float32)
    data = io.BytesIO()
    settings = {"subtype": "MPEG_LAYER_III", "format": "MP3", "bitrate_mode": mode}
    with soundfile.SoundFile(data, "w", rate, channels, **settings) as file:
        file.write(samples)
    return data.getvalue()


def without_tag(file: bytes) -> bytes:
    """Remove the first frame, which contains the tag with the length."""
    return file[file.index(file[:2], file.index(b"Xing")) :]
