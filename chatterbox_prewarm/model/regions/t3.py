"""T3 as a Llama with regions: turns text and a voice into speech tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from chatterbox_prewarm.model.regions.decode_state import DecodeState
from chatterbox_prewarm.model.regions.decoder import TokenDecoder
from chatterbox_prewarm.model.regions.region import (
    MAX_POSITIONS,
    T3_DECODE,
    T3_DECODE_ALIGNED,
    T3_PREFILL,
    T3_SAMPLE,
    T3_SAMPLE_NUCLEUS,
)
from chatterbox_prewarm.model.regions.rotary import rotary_tables
from chatterbox_prewarm.model.regions.t3_blocks import HEADS, START_SPEECH_TOKEN, rms_norm
from chatterbox_prewarm.model.regions.t3_prompt import Prompt, embed_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.model.conditionals import T3Conditionals
    from chatterbox_prewarm.model.regions.executors import BoundRegion, Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
    from chatterbox_prewarm.model.sampling import Sampling

#: How many positions of a prompt the check of a start runs. All 41 positions of the shortest text take three times as
#: long on a CPU.
_CHECKED_POSITIONS = 4


class T3Decoder(TokenDecoder):
    """Draws speech tokens with a Llama, with guidance: two rows, with and without the text.

    Args:
        weights, dtype, graphs: see `TokenDecoder`.
        executor: makes the regions callable.
        aligned: the heads that follow the text, as pairs of layer and head; none for a model without `alignment`.
    """

    def __init__(
        self,
        weights: NamedTensors,
        executor: Executor,
        *,
        dtype: torch.dtype | None = None,
        graphs: bool = False,
        aligned: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(weights, dtype=dtype, graphs=graphs)
        layers = [[weight.to(self.dtype) for weight in layer_weights(layer)] for layer in weights.layers("tfmr.layers")]
        self._prefill = [executor(T3_PREFILL, weights) for weights in layers]
        self._heads: list[torch.Tensor | None] = [None] * len(layers)
        for layer, head in aligned:
            weights_of_heads = self._heads[layer]
            if weights_of_heads is None:
                weights_of_heads = self._heads[layer] = torch.zeros(HEADS, device=self._device)
            weights_of_heads[head] += 1 / len(aligned)
        self._decode = [
            executor(T3_DECODE if heads is None else T3_DECODE_ALIGNED, weights)
            for weights, heads in zip(layers, self._heads, strict=True)
        ]
        last = [
            weights[f"{name}.weight"].to(self.dtype)
            for name in ("tfmr.norm", "speech_head", "speech_emb", "speech_pos_emb.emb")
        ]
        self._samplers = {False: executor(T3_SAMPLE, last), True: executor(T3_SAMPLE_NUCLEUS, last)}
        self._cosine, self._sine = (table.to(self.dtype) for table in rotary_tables(MAX_POSITIONS, self._device))

    def _prompt(self, conditionals: T3Conditionals, text_tokens: torch.Tensor, sampling: Sampling) -> Prompt:
        return embed_prompt(self._weights, conditionals, text_tokens, sampling.cfg_weight)

    def _shortened(self, prompt: Prompt) -> Prompt:
        embeddings = prompt.embeddings[:, :_CHECKED_POSITIONS]
        return Prompt(embeddings=embeddings, text_start=0, text_tokens=_CHECKED_POSITIONS)

    def _new_state(self, positions: int) -> DecodeState:
        return DecodeState(
            len(self._decode), positions, self._device, self.dtype, self._weights["speech_emb.weight"].size(0)
        )

    def _known(self, prompt: Prompt, speech_tokens: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - positions are own
        numbers = torch.arange(1, len(speech_tokens) + 1, device=self._device)
        tokens = self._weights["speech_emb.weight"][speech_tokens]
        positions = self._weights["speech_pos_emb.emb.weight"][numbers]
        return tokens.to(self.dtype) + positions.to(self.dtype)

    def likeliest(self, hidden: torch.Tensor, tokens: torch.Tensor, *, sampling: Sampling) -> torch.Tensor:
        """Return the most likely tokens; see `TokenDecoder`."""
        norm, head = (self._weights[f"{name}.weight"].to(hidden.dtype) for name in ("tfmr.norm", "speech_head"))
        logits = functional.linear(rms_norm(hidden, norm), head).float()
        guided = logits[:, 0] + sampling.cfg_weight * (logits[:, 0] - logits[:, 1])
        before = torch.cat([tokens.new_tensor([START_SPEECH_TOKEN]), tokens[:-1]])
        # Row i marks the tokens that occur in the sequence before position i.
        used = functional.one_hot(before, guided.size(1)).cumsum(0) > 0
        penalty = sampling.repetition_penalty
        penalized = torch.where(guided < 0, guided * penalty, guided / penalty)
        return torch.where(used, penalized, guided).argmax(dim=1)

    def _run_prompt(self, state: DecodeState, prompt: Prompt, sampling: Sampling) -> None:
        x, length = prompt.embeddings.to(self.dtype), prompt.length
        for block, keys, values in zip(self._prefill, state.keys, state.values, strict=True):
            x, keys[:length], values[:length] = block(x, self._cosine[:length], self._sine[:length])
        state.begin(x[:, -1:], prompt, sampling, START_SPEECH_TOKEN)

    def _step(self, state: DecodeState, sampler: BoundRegion, positions: int) -> None:
        x = state.embedding
        attention = state.attention[:positions].zero_()
        for block, heads, keys, values in zip(self._decode, self._heads, state.keys, state.values, strict=True):
            inputs = (x, self._cosine, self._sine, state.position, keys[:positions], values[:positions])
            if heads is None:
                (x,) = block(*inputs)
            else:
                x, row = block(*inputs, heads)
                attention += row
        state.hidden.copy_(x)
        state.position += 1
        state.step += 1
        self._sample(state, sampler)

    def _sample(self, state: DecodeState, sampler: BoundRegion) -> None:
        state.sample(sampler, aligned=any(heads is not None for heads in self._heads))


def layer_weights(layer: NamedTensors) -> list[torch.Tensor]:
    """Return the weight arguments of `t3_blocks.prefill` and `decode` for a Llama layer of `transformers`."""
    names = (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    return [layer[f"{name}.weight"] for name in names]
