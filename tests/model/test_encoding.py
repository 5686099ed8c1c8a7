"""The watermark survives lossy audio formats."""

from __future__ import annotations

import io

import numpy as np
import perth
import pytest
import soundfile

from chatterbox_prewarm.model.synthesis import as_pcm
from chatterbox_prewarm.serve.http.encoding import SAMPLE_RATE, encoder


@pytest.mark.parametrize("audio_format", ["mp3", "opus"])
def test_the_watermark_survives(audio_format: str) -> None:
    draw = np.random.default_rng(3)
    time = np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    pitch = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * time)) / SAMPLE_RATE
    voice = sum(np.sin(k * pitch + draw.uniform(0, 6)) / k**1.1 for k in range(1, 40))
    swell = 0.5 + 0.5 * np.sin(2 * np.pi * 3.1 * time)
    plain = (0.15 * voice * swell + 0.01 * draw.standard_normal(len(time))).astype(np.float32)
    watermarker = perth.PerthImplicitWatermarker()
    marked = np.asarray(watermarker.apply_watermark(plain, sample_rate=SAMPLE_RATE))
    sink = encoder(audio_format, one_shot=False)
    data = sink.encode(as_pcm(marked).tobytes()) + sink.finish()
    heard, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert watermarker.get_watermark(heard, sample_rate=SAMPLE_RATE) == 1.0
    assert watermarker.get_watermark(plain, sample_rate=SAMPLE_RATE) == 0.0
