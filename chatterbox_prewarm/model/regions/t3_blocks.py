"""The regions of T3: a transformer block for the prompt, one for a single token, and the sampling of a speech token.

T3 is a Llama of 30 equal blocks (16 heads of 64). It runs with two rows, with and without the text, for classifier-free
guidance. Weights are the first arguments of every function, so one compiled artifact serves all blocks and every
checkpoint. The mathematics follows Llama in `transformers` and upstream's sampling loop (`T3.inference`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from chatterbox_prewarm.model.regions.alignment import CONTINUE, STOP

#: The first id after the codebook of speech tokens begins the speech, and the next one ends it.
START_SPEECH_TOKEN, STOP_SPEECH_TOKEN = 6561, 6562
#: The logit of a token that must be drawn, as upstream sets it; with a minus sign, of one that must not.
_CERTAIN = 2.0**15

HEADS = 16
HEAD_SIZE = 64
RMS_EPSILON = 1e-5

#: On a CPU, PyTorch's exponential distribution returns 1e-38 instead of 0 about once in 2^24 numbers, so in one
#: of 2,000 draws among 8,194 tokens. A very unlikely token divided by this noise would win against all others, as it
#: does in `torch.multinomial`. The next smallest number is 2^-24.
_MIN_NOISE = 2.0**-25

#: The order of the values in `controls`. They are arguments, so neither an artifact nor a graph fixes them.
CONTROLS = ("temperature", "cfg_weight", "repetition_penalty", "min_p", "top_p")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root mean square of the last dimension, computed in float32 (Llama's normalization)."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPSILON)
    return weight * scaled.to(x.dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply the rotary position embedding to (rows, heads, tokens, 64), with tables of (tokens, 64)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer to (rows, tokens, 1024) and split the result into heads: (rows, heads, tokens, 64)."""
    rows, tokens, _ = x.shape
    return functional.linear(x, weight).view(rows, tokens, HEADS, HEAD_SIZE).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor) -> Tensor:
    """Compute attention for a few queries on a GPU.

    PyTorch's GPU kernels need a mask whose length is a multiple of 8 or 16, so a package would only support such
    lengths. With one query they also use one thread block for each head, a quarter of a GPU. PyTorch's CPU kernel is
    faster than this function and has no such limit. As in that kernel, everything is computed in float32: scores
    rounded to bfloat16 are wrong by percents when attention is peaked.
    """
    scores = torch.matmul(q.float() * HEAD_SIZE**-0.5, k.float().transpose(2, 3))
    weights = torch.softmax(scores.masked_fill(~attn_mask, -torch.inf), dim=-1)
    return torch.matmul(weights, v.float()).to(q.dtype)


def _after_attention(
    x: Tensor, attended: Tensor, output: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Apply the output projection and the gated feed-forward, each with its residual connection."""
    x = x + functional.linear(attended.transpose(1, 2).reshape(x.shape), output)
    y = rms_norm(x, norm)
    return x + functional.linear(functional.silu(functional.linear(y, gate)) * functional.linear(y, up), down)


def prefill(
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one transformer block over a complete prompt.

    Args:
        attention_norm, feed_forward_norm: (1024,).
        query, key, value, output: (1024, 1024).
        gate, up: (4096, 1024).
        down: (1024, 4096).
        x: (2, tokens, 1024).
        cosine, sine: (tokens, 64).

    Returns:
        the block's output, with the shape of `x`, and the keys and values to cache, (tokens, 2, 16, 64) each.
    """
    normed = rms_norm(x, attention_norm)
    q = rotate(_project(normed, query), cosine, sine)
    k = rotate(_project(normed, key), cosine, sine)
    v = _project(normed, value)
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = _after_attention(x, attended, output, feed_forward_norm, gate, up, down)
    return x, k.permute(2, 0, 1, 3).contiguous(), v.permute(2, 0, 1, 3).contiguous()


def decode(
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor]:
    """Run one transformer block for one new token. The weights are those of `prefill`.

    Args:
        x: (2, 1, 1024).
        cosines, sines: (n, 64), with n not smaller than the number of positions in the KV cache.
        position: int64 (1,), the position of the token.
        keys, values: (positions, 2, 16, 64), the KV cache. It is written at `position` and read up to it. Positions are
            the first dimension, so that the beginning of a longer cache is contiguous.

    Returns:
        the block's output, with the shape of `x`.
    """
    attended, _, _ = _attend_to_cache(attention_norm, query, key, value, x, cosines, sines, position, keys, values)
    return (_after_attention(x, attended, output, feed_forward_norm, gate, up, down),)


def decode_aligned(
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    feed_forward_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run `decode` for a block whose attention `alignment.analyze` needs.

    Args:
        heads: float32 (16,), the weight of each head in the result.

    Returns:
        the block's output, and the attention of the first row, float32 (positions,).
    """
    attended, q, seen = _attend_to_cache(attention_norm, query, key, value, x, cosines, sines, position, keys, values)
    scores = torch.matmul(q[0].float() * HEAD_SIZE**-0.5, keys[:, 0].float().permute(1, 2, 0))
    weights = torch.softmax(scores.masked_fill(~seen[0], -torch.inf), dim=-1)
    attention = torch.matmul(heads, weights[:, 0])
    return _after_attention(x, attended, output, feed_forward_norm, gate, up, down), attention


def _attend_to_cache(
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write a token into the KV cache and attend to it.

    Returns:
        the result of the attention and the queries, (2, 16, 1, 64) each, and which positions are used, bool
        (1, 1, 1, positions).
    """
    normed = rms_norm(x, attention_norm)
    cosine, sine = cosines.index_select(0, position), sines.index_select(0, position)
    keys.index_copy_(0, position, rotate(_project(normed, key), cosine, sine).permute(2, 0, 1, 3))
    values.index_copy_(0, position, _project(normed, value).permute(2, 0, 1, 3))
    seen = torch.arange(keys.size(0), device=x.device)[None, None, None, :] <= position
    function = attend if x.is_cuda else functional.scaled_dot_product_attention
    q = rotate(_project(normed, query), cosine, sine)
    return function(q, keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), attn_mask=seen), q, seen


def sample(
    norm: Tensor,
    head: Tensor,
    tokens: Tensor,
    positions: Tensor,
    x: Tensor,
    controls: Tensor,
    noise: Tensor,
    used: Tensor,
    step: Tensor,
    decision: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a speech token from the transformer's output and embed it. The steps have upstream's order.

    The drawn token has the largest quotient of probability and exponential noise, as in `torch.multinomial`.

    Args:
        norm: (1024,), the weight of the last normalization.
        head: (8194, 1024).
        tokens: (8194, 1024), the embeddings of speech tokens.
        positions: (4100, 1024), the embeddings of their positions.
        x: (2, 1024), the hidden state of the last token, with and without the text.
        controls: float32 (5,), see `CONTROLS`.
        noise: float32 (8194,), from an exponential distribution with rate 1.
        used: bool (8194,), the tokens that the sequence already contains, for the repetition penalty.
        step: int64 (1,), the number of the new token among the speech tokens.
        decision: int64 (1,), whether the stop token may or must be drawn, see `alignment`.

    Returns:
        the token, int64 (1,); its embedding for both rows, (2, 1, 1024); `used` including the token.
    """
    probabilities = _softmax_above_minimum(_penalized(norm, head, x, controls, used, decision), controls)
    return _embed(draw(probabilities, noise), tokens, positions, used, step)


def sample_nucleus(
    norm: Tensor,
    head: Tensor,
    tokens: Tensor,
    positions: Tensor,
    x: Tensor,
    controls: Tensor,
    noise: Tensor,
    used: Tensor,
    step: Tensor,
    decision: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token like `sample`, with top-p: from the smallest set of tokens whose probability reaches `top_p`.

    This is a separate region because it sorts, which is useless work if `top_p` is 1.
    """
    probabilities = _softmax_above_minimum(_penalized(norm, head, x, controls, used, decision), controls)
    ordered, order = torch.sort(probabilities)
    dropped = ordered.cumsum(0) <= 1.0 - controls[4]
    # Always keep the most likely token: rounding of the sum could drop it.
    dropped = dropped & (torch.arange(dropped.size(0), device=x.device) < dropped.size(0) - 1)
    kept = torch.zeros_like(probabilities).scatter(0, order, torch.where(dropped, 0.0, ordered))
    return _embed(draw(kept / kept.sum(), noise), tokens, positions, used, step)


def _penalized(norm: Tensor, head: Tensor, x: Tensor, controls: Tensor, used: Tensor, decision: Tensor) -> Tensor:
    """Compute the logits with guidance, decision, repetition penalty and temperature: float32 (8194,)."""
    temperature, cfg_weight, penalty = controls[0], controls[1], controls[2]
    logits = functional.linear(rms_norm(x, norm), head).float()
    guided = logits[0] + cfg_weight * (logits[0] - logits[1])
    is_stop = torch.arange(guided.size(0), device=x.device) == STOP_SPEECH_TOKEN
    guided = torch.where(is_stop & (decision == CONTINUE), -_CERTAIN, guided)
    guided = torch.where(decision == STOP, torch.where(is_stop, _CERTAIN, -_CERTAIN), guided)
    penalized = torch.where(guided < 0, guided * penalty, guided / penalty)
    return torch.where(used, penalized, guided) / temperature


def _softmax_above_minimum(logits: Tensor, controls: Tensor) -> Tensor:
    """Compute probabilities without tokens that are less likely than `min_p` times the most likely one."""
    probabilities = torch.softmax(logits, dim=0)
    kept = probabilities >= controls[3] * probabilities.max()
    return torch.softmax(torch.where(kept, logits, -torch.inf), dim=0)


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Return the token with the largest quotient of probability and noise, int64 (1,), from two tensors (n,)."""
    return torch.argmax(probabilities / noise.clamp(min=_MIN_NOISE), dim=0, keepdim=True)


def _embed(
    token: Tensor, tokens: Tensor, positions: Tensor, used: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `sample` for a drawn token."""
    used = used | (torch.arange(used.size(0), device=used.device) == token)
    # Position 0 belongs to the start token.
    embedding = tokens.index_select(0, token) + positions.index_select(0, step + 1)
    return token, embedding[None].expand(2, 1, -1).contiguous(), used
