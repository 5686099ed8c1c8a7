"""Compare the audio of two systems."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def compare_audio(first: Path, second: Path) -> dict[str, float | None]:
    """Compare two files that `quality_process` wrote (.npz).

    Returns:
        tokens_equal: share of the speech tokens that are equal at the same position; None if upstream is compared,
            whose tokens are not recorded.
        mel_distance: mean absolute difference of the logarithmic mel spectrograms over their common frames.
        decibels: ratio of the energy of the first audio to the energy of the difference, over the common samples; None
            if both are equal in every bit.
    """
    import numpy as np

    with np.load(first) as one, np.load(second) as other:
        tokens = (one["tokens"], other["tokens"])
        samples, mels = (one["samples"], other["samples"]), (one["mel"], other["mel"])
    length = min(len(tokens[0]), len(tokens[1]))
    agreement = None
    if length:
        agreement = float(np.sum(tokens[0][:length] == tokens[1][:length])) / max(len(tokens[0]), len(tokens[1]))
    frames = min(mels[0].shape[1], mels[1].shape[1])
    common = min(len(samples[0]), len(samples[1]))
    signal = np.square(samples[0][:common], dtype=np.float64).sum()
    error = np.square(samples[0][:common].astype(np.float64) - samples[1][:common]).sum()
    return {
        "tokens_equal": agreement,
        "mel_distance": float(np.abs(mels[0][:, :frames] - mels[1][:, :frames]).mean()),
        "decibels": 10 * math.log10(signal / error) if error and signal else None,
    }
