"""Resample audio with soxr, which librosa uses too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import soxr

if TYPE_CHECKING:
    from numpy.typing import NDArray


def resampled(samples: NDArray[np.float32], source: int, target: int) -> NDArray[np.float32]:
    """Resample mono audio as `librosa.resample` does.

    Args:
        samples: float32 (n,).
        source: sample rate of the samples in Hz.
        target: sample rate of the result in Hz.

    Returns:
        float32 (ceil(n * target / source),).
    """
    if source == target:
        return samples
    count = math.ceil(samples.size * (target / source))
    converted = soxr.resample(samples, source, target)[:count]
    return np.asarray(np.pad(converted, (0, count - converted.size)), dtype=np.float32)
