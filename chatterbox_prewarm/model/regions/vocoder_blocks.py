"""The regions of the vocoder (HiFT, arXiv:2309.09493): the pitch predictor, and the trunk between two transforms.

Both run once for an utterance. Upstream recomputes the weight norm of 82 convolutions in every forward; here the
weights come in as they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Of upstream's S3Gen: three upsamplings, and beside each a residual block for the source and three for the signal.
_STRIDES = (8, 5, 3)
_SOURCE_STRIDES = (15, 3, 1)
_KERNELS = (3, 7, 11)
_SOURCE_KERNELS = (7, 7, 11)
_DILATIONS = (1, 3, 5)
_SLOPE = 0.1
_DEFAULT_SLOPE = 0.01  # upstream leaves the last one at PyTorch's default
_NO_DIVISION_BY_ZERO = 1e-9
_PITCH_LAYERS = 5
#: Of the short-time Fourier transforms around the trunk.
FFT_SIZE = 16
BINS = FFT_SIZE // 2 + 1


def pitch(*arguments: Tensor) -> tuple[Tensor]:
    """Predict the fundamental frequency of each mel frame.

    Args:
        *arguments: a weight and a bias for each of five convolutions and for the classifier, then the mel
            spectrogram, (1, 80, frames).

    Returns:
        (1, frames), in Hz.
    """
    *weights, x = arguments
    take = iter(weights)
    for _ in range(_PITCH_LAYERS):
        x = functional.elu(functional.conv1d(x, next(take), next(take), padding=1))
    return (functional.linear(x.transpose(1, 2), next(take), next(take)).squeeze(-1).abs(),)


def trunk(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a mel spectrogram and the spectrum of its source signal into the spectrum of the speech.

    Args:
        *arguments: the weights in the order of `trunk_weights`, then the mel spectrogram, (1, 80, frames), and the
            source's spectrum, real parts over imaginary ones, (1, 18, 120 frames + 1).

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
    """Snake (arXiv:2006.08195): x + sin(alpha x)^2 / alpha."""
    alpha = alpha[None, :, None]
    return x + torch.sin(x * alpha).square() / (alpha + _NO_DIVISION_BY_ZERO)


def pitch_weights(predictor: Any) -> list[Tensor]:
    """What `pitch` takes, from upstream's `ConvRNNF0Predictor`."""
    layers = [*list(predictor.condnet)[::2], predictor.classifier]
    return [tensor for layer in layers for tensor in _pair(layer)]


def trunk_weights(hift: Any) -> list[Tensor]:
    """What `trunk` takes, from upstream's `HiFTGenerator`, weight norms resolved."""
    found = _pair(hift.conv_pre)
    kernels = len(_KERNELS)
    for stage in range(len(_STRIDES)):
        found += [*_pair(hift.ups[stage]), *_pair(hift.source_downs[stage])]
        blocks = hift.resblocks[stage * kernels : (stage + 1) * kernels]
        for block in (hift.source_resblocks[stage], *blocks):
            layers = zip(block.activations1, block.convs1, block.activations2, block.convs2, strict=True)
            for first, convolution, second, other in layers:
                found += [first.alpha.detach(), *_pair(convolution), second.alpha.detach(), *_pair(other)]
    return [*found, *_pair(hift.conv_post)]


def _pair(layer: Any) -> list[Tensor]:
    """Weight and bias; reading a parametrized weight computes it."""
    return [layer.weight.detach().contiguous(), layer.bias.detach()]
