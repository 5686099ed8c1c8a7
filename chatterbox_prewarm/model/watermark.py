"""Perth's implicit watermark: an encoder adds it to the magnitudes of a spectrogram.

Computes the same samples as upstream's `PerthImplicitWatermarker.apply_watermark`, without importing Perth, librosa or
torchaudio. The resampler is soxr, which librosa uses. The weights come from the installed package `resemble-perth`.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from chatterbox_prewarm.errors import ModelError, first_line
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.resampling import resampled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHECKPOINT = "perth_net/pretrained/implicit/perth_net_250000.pth.tar"
#: The settings in `hparams.yaml` next to the checkpoint.
_SAMPLE_RATE = 32_000
_FFT_SIZE, _HOP = 2048, 320
_MAX_FREQUENCY = 2000
_MIN_MAGNITUDE = 1e-9
#: The decibels of the smallest magnitude, and of the headroom above a magnitude of 1.
_MIN_DECIBELS, _HEADROOM_DECIBELS = 20 * math.log10(_MIN_MAGNITUDE), 15
#: The lowest frequencies, which carry the watermark.
_BANDS = round((_FFT_SIZE // 2 + 1) * _MAX_FREQUENCY / (_SAMPLE_RATE / 2))
#: The watermark is added where the sum over all frequencies exceeds this share of its maximum.
_THRESHOLD = 0.05
_LAYERS = 7
#: A larger exponent of a magnitude would overflow.
_MAX_EXPONENT = 10


class Watermark:
    """Adds the watermark to mono audio. It runs on the CPU, as in upstream.

    Args:
        checkpoint: the weights; by default those of the installed package.

    Raises:
        ModelError: the package is not installed, or its weights cannot be read.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        path = checkpoint or _installed_checkpoint()
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
        except (OSError, RuntimeError, pickle.UnpicklingError, LookupError) as error:
            raise ModelError(
                f"the watermark's weights {path} cannot be read: {first_line(error)}",
                next_step="install resemble-perth again; speech without a watermark is not allowed",
            ) from error
        weights = NamedTensors(tensors, "encoder.")
        self._layers = [weights.pair(f"layers.{layer}.conv") for layer in range(_LAYERS)]
        self._window = torch.hann_window(_FFT_SIZE)

    @torch.inference_mode()
    def apply(self, samples: NDArray[np.float32], *, sample_rate: int) -> NDArray[np.float32]:
        """Add the watermark.

        Args:
            samples: float32 (n,), mono.
            sample_rate: in Hz.

        Returns:
            float32 (n,), or a few samples less where n is not a multiple of 10 ms.
        """
        signal = torch.from_numpy(resampled(samples, sample_rate, _SAMPLE_RATE))
        spectrum = torch.stft(signal, _FFT_SIZE, _HOP, window=self._window, return_complex=True)
        scale = _HEADROOM_DECIBELS - _MIN_DECIBELS
        magnitudes = (20 * torch.log10(spectrum.abs().clip(_MIN_MAGNITUDE)) - _MIN_DECIBELS) / scale
        loudness = magnitudes.sum(dim=0)
        loud = (loudness > loudness.max() * _THRESHOLD).float()
        magnitudes[:_BANDS] += self._encode(magnitudes[:_BANDS]) * loud
        decibels = magnitudes * scale + _MIN_DECIBELS
        marked = 10.0 ** (decibels / 20).clip(max=_MAX_EXPONENT) * torch.exp(1j * torch.angle(spectrum))
        wave = torch.istft(marked, _FFT_SIZE, _HOP, window=self._window)
        return resampled(wave.numpy(), _SAMPLE_RATE, sample_rate)

    def _encode(self, magnitudes: torch.Tensor) -> torch.Tensor:
        """Compute what the watermark adds to normalized magnitudes, (128, steps)."""
        x = magnitudes[None]
        for number, (weight, bias) in enumerate(self._layers, start=1):
            x = functional.conv1d(x, weight, bias, padding=weight.size(2) // 2)
            if number < _LAYERS:
                x = functional.leaky_relu(x)
        return x[0]


def _installed_checkpoint() -> Path:
    spec = importlib.util.find_spec("perth")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the package resemble-perth is missing, and speech without a watermark is not allowed",
            next_step="install the lean extra: pip install 'chatterbox-prewarm[lean]'",
        )
    return Path(spec.origin).parent / _CHECKPOINT
