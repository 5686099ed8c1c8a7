"""The regions of S3Gen's flow: the layer of the conformer encoder, and the blocks of the estimator.

Upstream pads and masks batches of utterances with different lengths. One utterance needs no mask. The estimator has two
rows, which implement classifier-free guidance, or one row for a mean flow. Weights are the first arguments of every
function, so one compiled artifact serves all ten encoder layers, all 56 transformer blocks and every checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ENCODER_HEADS = 8
ENCODER_HEAD_SIZE = 64
ESTIMATOR_HEADS = 8
ESTIMATOR_HEAD_SIZE = 64
#: Epsilon of the layer norms in the encoder's layers. All other layer norms use PyTorch's default.
_ENCODER_EPSILON = 1e-12
_EPSILON = 1e-5


def encoder_layer(
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    position_weight: Tensor,
    content_bias: Tensor,
    distance_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    feed_forward_norm_weight: Tensor,
    feed_forward_norm_bias: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    x: Tensor,
    distances: Tensor,
) -> tuple[Tensor]:
    """Run a conformer layer without convolution: attention with relative positions (arXiv:1901.02860), feed-forward.

    The weights belong to upstream's `ConformerEncoderLayer`; `flow.encoder_weights` defines their order.

    Args:
        x: (1, tokens, 512).
        distances: (1, 2 tokens - 1, 512), the embeddings of the distances from tokens - 1 down to 1 - tokens.

    Returns:
        a tensor with the shape of `x`.
    """
    size = x.size(2)
    tokens = x.size(1)
    y = functional.layer_norm(x, (size,), attention_norm_weight, attention_norm_bias, _ENCODER_EPSILON)
    query = functional.linear(y, query_weight, query_bias).view(1, tokens, ENCODER_HEADS, ENCODER_HEAD_SIZE)
    key = functional.linear(y, key_weight, key_bias).view(1, tokens, ENCODER_HEADS, ENCODER_HEAD_SIZE)
    value = functional.linear(y, value_weight, value_bias).view(1, tokens, ENCODER_HEADS, ENCODER_HEAD_SIZE)
    distance_keys = functional.linear(distances, position_weight).view(1, -1, ENCODER_HEADS, ENCODER_HEAD_SIZE)
    content = (query + content_bias).transpose(1, 2) @ key.permute(0, 2, 3, 1)
    by_distance = (query + distance_bias).transpose(1, 2) @ distance_keys.permute(0, 2, 3, 1)
    # Row i needs the distances i - j, which begin at column tokens - 1 - i. Upstream shifts the rows by a padded view,
    # whose guards torch.export of torch 2.6 cannot solve. A gather gives the same result.
    columns = torch.arange(tokens, device=x.device)
    index = (tokens - 1) - columns[:, None] + columns[None, :]
    shifted = by_distance.gather(3, index.expand(1, ENCODER_HEADS, tokens, tokens))
    weights = torch.softmax((content + shifted) / math.sqrt(ENCODER_HEAD_SIZE), dim=-1)
    attended = (weights @ value.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    x = x + functional.linear(attended, output_weight, output_bias)
    y = functional.layer_norm(x, (size,), feed_forward_norm_weight, feed_forward_norm_bias, _ENCODER_EPSILON)
    y = functional.silu(functional.linear(y, inner_weight, inner_bias))
    return (x + functional.linear(y, outer_weight, outer_bias),)


def transformer(
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    feed_forward_norm_weight: Tensor,
    feed_forward_norm_bias: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    x: Tensor,
) -> tuple[Tensor]:
    """Run a transformer block of the estimator: self-attention and a feed-forward with GELU.

    The weights belong to upstream's `BasicTransformerBlock`; `flow.transformer_weights` defines their order.

    Args:
        query, key, value: (512, 256), 8 heads of 64.
        x: (rows, frames, 256).

    Returns:
        a tensor with the shape of `x`.
    """
    rows, frames, size = x.shape
    shape = (rows, frames, ESTIMATOR_HEADS, ESTIMATOR_HEAD_SIZE)
    y = functional.layer_norm(x, (size,), attention_norm_weight, attention_norm_bias, _EPSILON)
    attended = functional.scaled_dot_product_attention(
        functional.linear(y, query).view(shape).transpose(1, 2),
        functional.linear(y, key).view(shape).transpose(1, 2),
        functional.linear(y, value).view(shape).transpose(1, 2),
    )
    attended = attended.transpose(1, 2).reshape(rows, frames, ESTIMATOR_HEADS * ESTIMATOR_HEAD_SIZE)
    x = x + functional.linear(attended, output_weight, output_bias)
    y = functional.layer_norm(x, (size,), feed_forward_norm_weight, feed_forward_norm_bias, _EPSILON)
    y = functional.gelu(functional.linear(y, inner_weight, inner_bias))
    return (x + functional.linear(y, outer_weight, outer_bias),)


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve (rows, frames, channels) over frames; an output frame depends on no later input frame."""
    padded = functional.pad(x.transpose(1, 2), (weight.size(2) - 1, 0))
    return functional.conv1d(padded, weight, bias).transpose(1, 2)


def _causal_block(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """Apply a causal convolution, a layer norm over channels, and Mish."""
    y = causal_convolution(x, weight, bias)
    return functional.mish(functional.layer_norm(y, (y.size(2),), norm_weight, norm_bias, _EPSILON))


def resnet(
    time_weight: Tensor,
    time_bias: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    first_norm_weight: Tensor,
    first_norm_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    second_norm_weight: Tensor,
    second_norm_bias: Tensor,
    skip_weight: Tensor,
    skip_bias: Tensor,
    x: Tensor,
    time: Tensor,
) -> tuple[Tensor]:
    """Run a residual block of the estimator: two causal blocks with the embedding of the time step between them.

    The weights belong to upstream's `CausalResnetBlock1D`; `flow.resnet_weights` defines their order.

    Args:
        x: (rows, frames, channels); 320, 256 or 512 channels.
        time: (1, 1024), the embedding of the time step.

    Returns:
        (rows, frames, 256).
    """
    y = _causal_block(x, first_weight, first_bias, first_norm_weight, first_norm_bias)
    y = y + functional.linear(functional.mish(time), time_weight, time_bias)[:, None]
    y = _causal_block(y, second_weight, second_bias, second_norm_weight, second_norm_bias)
    return ((y + functional.linear(x, skip_weight.squeeze(2), skip_bias)).contiguous(),)


def euler(
    up_weight: Tensor,
    up_bias: Tensor,
    block_weight: Tensor,
    block_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    hidden: Tensor,
    mel: Tensor,
    guidance: Tensor,
    length: Tensor,
) -> tuple[Tensor]:
    """Run the estimator's last convolutions, then one Euler step with classifier-free guidance.

    The weights belong to the estimator's last up-sampling layer (which keeps the length), final block and projection.

    Args:
        hidden: (2, frames, 256), the output of the last transformer block.
        mel: (1, frames, 80), the mel spectrogram before the step.
        guidance: float32 (1,), the strength of the guidance.
        length: float32 (1,), the length of the step in time.

    Returns:
        (1, frames, 80), the mel spectrogram after the step.
    """
    flow = _direction(
        up_weight, up_bias, block_weight, block_bias, norm_weight, norm_bias, output_weight, output_bias, hidden
    )
    return (mel + length * ((1.0 + guidance) * flow[:1] - guidance * flow[1:]),)


def mean_step(
    up_weight: Tensor,
    up_bias: Tensor,
    block_weight: Tensor,
    block_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    hidden: Tensor,
    mel: Tensor,
    length: Tensor,
) -> tuple[Tensor]:
    """Run the estimator's last convolutions, then one step of a mean flow (arXiv:2505.13447), without guidance.

    The weights are those of `euler`.

    Args:
        hidden: (1, frames, 256), the output of the last transformer block.
        mel: (1, frames, 80), the mel spectrogram before the step.
        length: float32 (1,), the length of the step in time.

    Returns:
        (1, frames, 80), the mel spectrogram after the step.
    """
    flow = _direction(
        up_weight, up_bias, block_weight, block_bias, norm_weight, norm_bias, output_weight, output_bias, hidden
    )
    return (mel + length * flow,)


def _direction(
    up_weight: Tensor,
    up_bias: Tensor,
    block_weight: Tensor,
    block_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    hidden: Tensor,
) -> Tensor:
    """Run the estimator's last convolutions: from (rows, frames, 256) to (rows, frames, 80)."""
    y = causal_convolution(hidden, up_weight, up_bias)
    y = _causal_block(y, block_weight, block_bias, norm_weight, norm_bias)
    return functional.linear(y, output_weight.squeeze(2), output_bias)
