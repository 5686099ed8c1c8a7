"""The regions of the vocoder (HiFT, arXiv:2309.09493): the pitch predictor, and the trunk between two transforms.

Upstream recomputes the weight norm of 82 convolutions in every forward pass. Here the weights are computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

#: Upstream's sizes: three up-sampling stages, each with one residual block for the source and three for the signal.
_STRIDES = (8, 5, 3)
_SOURCE_STRIDES = (15, 3, 1)
_KERNELS = (3, 7, 11)
_SOURCE_KERNELS = (7, 7, 11)
_DILATIONS = (1, 3, 5)
_SLOPE = 0.1
_DEFAULT_SLOPE = 0.01  # PyTorch's default, which upstream uses in the last activation
_EPSILON = 1e-9
_PITCH_LAYERS = 5
#: Size of the short-time Fourier transforms before and after the trunk.
FFT_SIZE = 16
BINS = FFT_SIZE // 2 + 1


def pitch(*arguments: Tensor) -> tuple[Tensor]:
    """Predict the fundamental frequency of each mel frame.

    Args:
        *arguments: a weight and a bias for each of the five convolutions and for the classifier, then the mel
            spectrogram (1, 80, frames).

    Returns:
        (1, frames), in Hz.
    """
    *weights, x = arguments
    take = iter(weights)
    for _ in range(_PITCH_LAYERS):
        x = functional.elu(functional.conv1d(x, next(take), next(take), padding=1))
    return (functional.linear(x.transpose(1, 2), next(take), next(take)).squeeze(-1).abs(),)


def trunk(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the spectrum of the speech from the mel spectrogram and the spectrum of the source signal.

    Args:
        *arguments: the weights in the order of `trunk_weights`, then the mel spectrogram (1, 80, frames), then the
            source's spectrum (1, 18, 120 frames + 1), with the real parts first.

    Returns:
        magnitude and phase of the speech, (1, 9, 120 frames + 1) each.
    """
    *weights, x, source = arguments
    take = iter(weights)
    x = functional.conv1d(x, next(take), next(take), padding=3)
    for stage, stride in enumerate(_STRIDES):
        x = functional.leaky_relu(x, _SLOPE)
        weight, bias = next(take), next(take)
        x = functional.conv_transpose1d(x, weight, bias, stride=stride, padding=(weight.size(2) - stride) // 2)
        if stage == len(_STRIDES) - 1:
            x = functional.pad(x, (1, 0), mode="reflect")
        step = _SOURCE_STRIDES[stage]
        side = functional.conv1d(source, next(take), next(take), stride=step, padding=step // 2)
        x = x + _residual(side, _SOURCE_KERNELS[stage], take)
        branches = [_residual(x, kernel, take) for kernel in _KERNELS]
        x = (branches[0] + branches[1] + branches[2]) / len(_KERNELS)
    x = functional.conv1d(functional.leaky_relu(x, _DEFAULT_SLOPE), next(take), next(take), padding=3)
    return torch.exp(x[:, :BINS]), torch.sin(x[:, BINS:])


def _residual(x: Tensor, kernel: int, take: Iterator[Tensor]) -> Tensor:
    for dilation in _DILATIONS:
        y = _snake(x, next(take))
        y = functional.conv1d(y, next(take), next(take), padding=dilation * (kernel - 1) // 2, dilation=dilation)
        y = _snake(y, next(take))
        x = x + functional.conv1d(y, next(take), next(take), padding=(kernel - 1) // 2)
    return x


def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    """Apply the Snake activation (arXiv:2006.08195): x + sin(alpha x)^2 / alpha."""
    alpha = alpha[None, :, None]
    return x + torch.sin(x * alpha).square() / (alpha + _EPSILON)


def pitch_weights(predictor: NamedTensors) -> list[Tensor]:
    """Return the weight arguments of `pitch` for upstream's `ConvRNNF0Predictor`."""
    return predictor.pairs(*(f"condnet.{2 * layer}" for layer in range(_PITCH_LAYERS)), "classifier")


def trunk_weights(hift: NamedTensors) -> list[Tensor]:
    """Return the weight arguments of `trunk` for upstream's `HiFTGenerator`, with weight norms applied."""
    weights = hift.pairs("conv_pre")
    kernels = len(_KERNELS)
    for stage in range(len(_STRIDES)):
        weights += hift.pairs(f"ups.{stage}", f"source_downs.{stage}")
        names = [f"resblocks.{number}" for number in range(stage * kernels, (stage + 1) * kernels)]
        for name in (f"source_resblocks.{stage}", *names):
            block = hift.below(name)
            for layer in range(len(_DILATIONS)):
                weights += [block[f"activations1.{layer}.alpha"], *block.pair(f"convs1.{layer}")]
                weights += [block[f"activations2.{layer}.alpha"], *block.pair(f"convs2.{layer}")]
    return weights + hift.pairs("conv_post")
