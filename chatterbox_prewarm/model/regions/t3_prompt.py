"""The prompt of T3: the embeddings of a voice and a text, from which T3 draws speech tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from chatterbox_prewarm.model.regions.t3_blocks import START_SPEECH_TOKEN

if TYPE_CHECKING:
    from chatterbox_prewarm.model.conditionals import T3Conditionals
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

_PERCEIVER_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of T3.

    Attributes:
        embeddings: (rows, length, width).
        text_start: the position of the first text token.
        text_tokens: the number of text tokens, with the start and the stop token if the model has them.
    """

    embeddings: torch.Tensor
    text_start: int
    text_tokens: int

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.embeddings.size(1)


def embed_prompt(
    weights: NamedTensors, conditionals: T3Conditionals, text_tokens: torch.Tensor, cfg_weight: float
) -> Prompt:
    """Embed a voice, a text and two start tokens. The second row has no text, for guidance.

    Args:
        weights: of upstream's `T3`.
        conditionals: of the voice.
        text_tokens: int64 (1, tokens), start and stop tokens included.
        cfg_weight: the strength of the guidance; without guidance both rows are equal.

    Returns:
        the prompt, with 34 + tokens + 2 positions.
    """
    voice = embed_voice(weights, conditionals)
    text = weights["text_emb.weight"][text_tokens]
    # Upstream zeroes the text of the second row before it adds the positions, and only with guidance.
    unconditional = torch.zeros_like(text) if cfg_weight > 0.0 else text
    text = torch.cat([text, unconditional]) + weights["text_pos_emb.emb.weight"][: text_tokens.size(1)]
    start = weights["speech_emb.weight"][START_SPEECH_TOKEN] + weights["speech_pos_emb.emb.weight"][0]
    # Two start tokens: upstream embeds one with the prompt, and one as the first token of its loop.
    embeddings = torch.cat([voice.expand(2, -1, -1), text, start.expand(2, 2, -1)], dim=1)
    return Prompt(embeddings=embeddings, text_start=voice.size(1), text_tokens=text.size(1))


def embed_voice(weights: NamedTensors, conditionals: T3Conditionals) -> torch.Tensor:
    """Compute the embeddings of a voice, (1, 34, 1024), as upstream's `T3CondEnc`.

    They are the speaker, 32 tokens that a perceiver (arXiv:2103.03206) makes from the voice's speech tokens, and the
    emotion.
    """
    encoder = weights.below("cond_enc")
    speaker = functional.linear(conditionals.speaker_emb.view(1, 1, -1), *encoder.pair("spkr_enc"))
    tokens = conditionals.cond_prompt_speech_tokens
    prompt = weights["speech_emb.weight"][tokens] + weights["speech_pos_emb.emb.weight"][: tokens.size(1)]
    attention = encoder.below("perceiver.attn")
    summary = _attend(attention, encoder["perceiver.pre_attention_query"], prompt)
    summary = _attend(attention, summary, summary)
    emotion = functional.linear(conditionals.emotion_adv.view(1, 1, 1), encoder["emotion_adv_fc.weight"])
    return torch.cat([speaker, summary, emotion], dim=1)


def _attend(weights: NamedTensors, queries: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Run the perceiver's attention block: `queries` (1, m, 1024) attend to `x` (1, n, 1024), with a residual."""

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        normalized = functional.layer_norm(x, [x.size(-1)], *weights.pair("norm"))
        projected = functional.linear(normalized, *weights.pair(name))
        return projected.view(1, x.size(1), _PERCEIVER_HEADS, -1).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(heads(queries, "to_q"), heads(x, "to_k"), heads(x, "to_v"))
    return queries + functional.linear(attended.transpose(1, 2).reshape(queries.shape), *weights.pair("proj_out"))
