"""The regions of a T3 that is a GPT-2: a transformer block for several positions or one, and the sampling of a token.

The model is Turbo, 24 equal blocks with 16 heads of 64, or Nano, 12 blocks with 12 heads. It runs with one row, because
it was distilled from a model with guidance. Weights are the first arguments of every function, so one compiled artifact
serves all blocks and every checkpoint. The mathematics follows GPT-2 in `transformers` and upstream's
`T3.inference_turbo`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from chatterbox_prewarm.model.regions.t3_blocks import HEAD_SIZE, attend, draw

#: The order of the values in `controls`. They are arguments, so neither an artifact nor a graph fixes them.
CONTROLS = ("temperature", "top_k", "top_p", "repetition_penalty")
_EPSILON = 1e-5


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a layer whose weight is (in, out), as GPT-2 stores it."""
    return torch.addmm(bias, x.reshape(-1, x.size(-1)), weight).view(1, -1, weight.size(1))


def block(
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    feed_forward_norm_weight: Tensor,
    feed_forward_norm_bias: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    x: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor]:
    """Run one transformer block over new positions that follow those in the KV cache.

    Args:
        attention_weight: (width, 3 width), for queries, keys and values.
        output_weight: (width, width).
        inner_weight: (width, 4 width).
        outer_weight: (4 width, width).
        x: (1, tokens, width); the width is 64 times the number of heads.
        position: int64 (1,), the position of the first token.
        keys, values: (positions, 1, heads, 64), the KV cache. It is written at the new positions and read up to them.
            Positions are the first dimension, so that the beginning of a longer cache is contiguous.

    Returns:
        the block's output, with the shape of `x`.
    """
    _, tokens, width = x.shape
    heads = width // HEAD_SIZE
    y = functional.layer_norm(x, (width,), attention_norm_weight, attention_norm_bias, _EPSILON)
    # (3, tokens, heads, 64)
    q, k, v = _linear(y, attention_weight, attention_bias).view(tokens, 3, heads, HEAD_SIZE).unbind(1)
    places = position + torch.arange(tokens, device=x.device)
    keys.index_copy_(0, places, k[:, None])
    values.index_copy_(0, places, v[:, None])
    seen = (torch.arange(keys.size(0), device=x.device)[None, :] <= places[:, None])[None, None]
    function = attend if x.is_cuda else functional.scaled_dot_product_attention
    attended = function(q.transpose(0, 1)[None], keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), attn_mask=seen)
    x = x + _linear(attended.transpose(1, 2).reshape(x.shape), output_weight, output_bias)
    y = functional.layer_norm(x, (width,), feed_forward_norm_weight, feed_forward_norm_bias, _EPSILON)
    y = functional.gelu(_linear(y, inner_weight, inner_bias), approximate="tanh")
    return (x + _linear(y, outer_weight, outer_bias),)


def sample(
    norm_weight: Tensor,
    norm_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    tokens: Tensor,
    positions: Tensor,
    x: Tensor,
    controls: Tensor,
    noise: Tensor,
    used: Tensor,
    step: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a speech token from the transformer's output and embed it.

    The steps have upstream's order: temperature, top-k, top-p, and the repetition penalty last, so that the penalty
    changes probabilities but not which tokens are left out. The drawn token has the largest quotient of probability and
    exponential noise, as in `torch.multinomial`.

    Args:
        norm_weight, norm_bias: (width,), of the last normalization.
        head_weight: (6563, width).
        head_bias: (6563,).
        tokens: (6563, width), the embeddings of speech tokens.
        positions: (8196, width), the embeddings of positions.
        x: (1, width), the hidden state of the last token.
        controls: float32 (4,), see `CONTROLS`. A top-k of 0 keeps all tokens.
        noise: float32 (6563,), from an exponential distribution with rate 1.
        used: bool (6563,), the tokens for the repetition penalty: those drawn so far, or the start token before the
            first one.
        step: int64 (1,), the number of the new token among the speech tokens.
        position: int64 (1,), the position of the new token.

    Returns:
        the token, int64 (1,); its embedding, (1, 1, width); `used` for the next token.
    """
    y = functional.layer_norm(x, (x.size(1),), norm_weight, norm_bias, _EPSILON)
    logits = functional.linear(y, head_weight, head_bias).float()[0] / controls[0]
    count = logits.size(0)
    ordered, order = torch.sort(logits)
    limit = torch.where(controls[1] < 1, float(count), controls[1]).clamp(max=float(count)).long()
    threshold = ordered.index_select(0, (count - limit)[None])
    likely = torch.where(ordered < threshold, -torch.inf, ordered)
    dropped = torch.softmax(likely, dim=0).cumsum(0) <= 1.0 - controls[2]
    # Always keep the most likely token, as upstream does. A top-p of 1 keeps all tokens that top-k keeps.
    dropped = dropped & (torch.arange(count, device=x.device) < count - 1) & (controls[2] < 1.0)
    kept = torch.zeros_like(logits).scatter(0, order, torch.where(dropped, -torch.inf, likely))
    penalized = torch.where(kept < 0, kept * controls[3], kept / controls[3])
    probabilities = torch.softmax(torch.where(used, penalized, kept), dim=0)
    token = draw(probabilities, noise)
    drawn = torch.arange(count, device=x.device) == token
    embedding = tokens.index_select(0, token) + positions.index_select(0, position)
    return token, embedding[None], drawn | (used & (step > 0))
