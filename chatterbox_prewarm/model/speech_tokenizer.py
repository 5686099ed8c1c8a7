"""S3's speech tokenizer: turns speech at 16 kHz into the tokens that S3Gen speaks, 25 per second.

Computes the same tokens as upstream's `S3Tokenizer` (the package `s3tokenizer`, S3TokenizerV2), without importing it.
It is not one of the regions: it runs once per utterance, without the ten steps of the flow, so compiling it would save
little; and the states that were baked for the regions stay valid.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

#: Sample rate of the speech in Hz, and the number of samples that a token represents.
TOKENIZER_RATE = 16_000
SAMPLES_PER_TOKEN = 640
#: Settings of the spectrogram: 100 frames per second.
_FFT_SIZE, _HOP, _BANDS = 400, 160, 128
_MIN_POWER = 1e-10
#: The spectrogram contains the loudest 80 dB, in bels.
_RANGE = 8.0
#: The mel scale of Slaney's Auditory Toolbox: linear up to 1 kHz, then logarithmic.
_LINEAR_HZ, _BREAK_HZ = 200 / 3, 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_HZ
_MEL_STEP = math.log(6.4) / 27
_HEADS, _HEAD_SIZE = 20, 64
_MAX_PERIOD = 10_000
_EPSILON = 1e-5
#: Levels of each of the eight dimensions of a token, and the factor that keeps the values inside the outer levels.
_LEVELS, _DIMENSIONS = 3, 8
_SHRINK = 0.9990000128746033
#: The windows of longer speech in frames: 30 s, and 4 s of overlap with the next window.
_WINDOW, _OVERLAP = 3000, 400
_FRAMES_PER_TOKEN = SAMPLES_PER_TOKEN // _HOP


class SpeechTokenizer:
    """Computes the tokens of an utterance.

    Speech of more than 30 s is processed in windows that overlap by 4 s, and the middle of each overlap is the seam.
    Upstream processes all windows as one batch. Here they are processed one after the other, so memory is bounded.

    If the speech has 52 to 56 s, 78 to 82 s, and so on, upstream adds a window although the previous window reaches the
    end. It then loses up to 2 s of the speech. Here the window that reaches the end is the last one.

    Args:
        weights: of upstream's module; they are used in place.
        mel_filters: float32 (128, 201), if the checkpoint has them. They are computed otherwise.
        window: float32 (400,), of the Fourier transform, if the checkpoint has it. It is a Hann window otherwise.
    """

    def __init__(
        self, weights: NamedTensors, *, mel_filters: torch.Tensor | None = None, window: torch.Tensor | None = None
    ) -> None:
        self._encoder = weights.below("encoder")
        self._layers = self._encoder.layers("blocks")
        self._levels = weights.pair("quantizer._codebook.project_down")
        device = self._levels[0].device
        self._filters = torch.from_numpy(slaney_filters()).to(device) if mel_filters is None else mel_filters
        self._window = torch.hann_window(_FFT_SIZE).to(device) if window is None else window

    @torch.inference_mode()
    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """Compute the tokens of speech.

        Args:
            samples: float32 (n,), 16 kHz, more than 200 samples.

        Returns:
            int64 (t,), each below 6561; a token for each 640 samples, and for a remainder of at least 160.
        """
        return torch.cat(list(self.windows(samples)))

    @torch.inference_mode()
    def windows(self, samples: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the tokens of a call, those of about 30 s at a time."""
        yield from self._windows(self.log_mel(samples.to(self._filters.device)))

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """Compute the logarithmic mel spectrogram of 16 kHz samples (n,): float32 (128, n // 160)."""
        spectrum = torch.stft(samples[None], _FFT_SIZE, _HOP, window=self._window, return_complex=True)
        power = self._filters @ spectrum[0, :, :-1].abs().square()
        log = power.clamp(min=_MIN_POWER).log10()
        return (torch.maximum(log, log.max() - _RANGE) + 4.0) / 4.0

    def _windows(self, mel: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the tokens of each window of a spectrogram. Half of each overlap belongs to each neighbour."""
        half = _OVERLAP // 2 // _FRAMES_PER_TOKEN
        for begin in itertools.count(0, _WINDOW - _OVERLAP):
            last = begin + _WINDOW >= mel.size(1)
            tokens = self._quantize(self._encode(mel[None, :, begin : begin + _WINDOW]))
            yield tokens[half if begin else 0 : None if last else -half]
            if last:
                return

    def _encode(self, mel: torch.Tensor) -> torch.Tensor:
        """Encode a spectrogram (1, 128, frames) as (1, tokens, 1280)."""
        encoder = self._encoder
        x = functional.gelu(functional.conv1d(mel, *encoder.pair("conv1"), stride=2, padding=1))
        x = functional.gelu(functional.conv1d(x, *encoder.pair("conv2"), stride=2, padding=1))
        x = x.transpose(1, 2)
        cosines, sines = rotary_tables(x.size(1), x.device)
        for layer in self._layers:
            y = functional.layer_norm(x, [x.size(2)], *layer.pair("attn_ln"), _EPSILON)
            x = x + attention(layer.below("attn"), y, cosines, sines)
            y = functional.layer_norm(x, [x.size(2)], *layer.pair("mlp_ln"), _EPSILON)
            y = functional.gelu(functional.linear(y, *layer.pair("mlp.0")))
            x = x + functional.linear(y, *layer.pair("mlp.2"))
        return x

    def _quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Round the eight dimensions of (1, tokens, 1280) to three levels each (arXiv:2309.15505): int64 (tokens,)."""
        levels = (functional.linear(x[0], *self._levels).tanh() * _SHRINK).round().long() + 1
        powers = torch.tensor([_LEVELS**dimension for dimension in range(_DIMENSIONS)], device=x.device)
        return (levels * powers).sum(dim=1)


def attention(layer: NamedTensors, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Attend, and add the memory block of FSMN (arXiv:1512.08301): a convolution of the values of each channel.

    Args:
        layer: upstream's `FSMNMultiHeadAttention`.
        x: (1, tokens, 1280).
        cosines: of `rotary_tables`.
        sines: of `rotary_tables`.

    Returns:
        a tensor with the shape of `x`.
    """
    shape = (1, x.size(1), _HEADS, _HEAD_SIZE)
    query = rotated(functional.linear(x, *layer.pair("query")).view(shape), cosines, sines)
    key = rotated(functional.linear(x, layer["key.weight"]).view(shape), cosines, sines)
    value = functional.linear(x, *layer.pair("value"))
    scale = _HEAD_SIZE**-0.25  # of both factors, as in upstream, so that the rounding is the same
    weights = (query.transpose(1, 2) * scale) @ (key.permute(0, 2, 3, 1) * scale)
    attended = torch.softmax(weights, dim=-1) @ value.view(shape).transpose(1, 2)
    kernel = layer["fsmn_block.weight"]
    memory = functional.conv1d(value.transpose(1, 2), kernel, padding=kernel.size(2) // 2, groups=kernel.size(0))
    output = functional.linear(attended.transpose(1, 2).flatten(2), *layer.pair("out"))
    return output + (memory.transpose(1, 2) + value)


def rotary_tables(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cosines and sines of the rotary position embedding (arXiv:2104.09864): (tokens, 1, 64) each."""
    columns = torch.arange(0, _HEAD_SIZE, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (_MAX_PERIOD ** (columns / _HEAD_SIZE))
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32, device=device), frequencies).repeat(1, 2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Apply the rotary position embedding to (1, tokens, heads, 64)."""
    first, second = x.chunk(2, dim=3)
    return x * cosines + torch.cat([-second, first], dim=3) * sines


def slaney_filters() -> NDArray[np.float32]:
    """Compute the triangular filters that `librosa.filters.mel` gives for this spectrogram: (128, 201)."""
    top = _BREAK_MEL + math.log(TOKENIZER_RATE / 2 / _BREAK_HZ) / _MEL_STEP
    mels = np.linspace(0.0, top, _BANDS + 2)
    edges = np.where(mels < _BREAK_MEL, mels * _LINEAR_HZ, _BREAK_HZ * np.exp(_MEL_STEP * (mels - _BREAK_MEL)))
    bins = np.linspace(0.0, TOKENIZER_RATE / 2, _FFT_SIZE // 2 + 1)
    widths, slopes = np.diff(edges), edges[:, None] - bins
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)  # librosa rounds here, too
    filters: NDArray[np.float64] = triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return filters.astype(np.float32)
