"""T3 as a GPT-2 with regions: turns text and a voice into speech tokens. The model is Turbo or Nano.

A voice fills the first 376 positions of each prompt, and no text changes their keys and values. So they are computed
once for each voice, and kept while memory allows.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from chatterbox_prewarm.model.regions import gpt_blocks
from chatterbox_prewarm.model.regions.decode_state import DecodeState
from chatterbox_prewarm.model.regions.decoder import TokenDecoder
from chatterbox_prewarm.model.regions.region import GPT_REGIONS, MAX_POSITIONS
from chatterbox_prewarm.model.regions.t3_blocks import HEAD_SIZE, START_SPEECH_TOKEN
from chatterbox_prewarm.model.regions.t3_prompt import Prompt

if TYPE_CHECKING:
    from chatterbox_prewarm.model.conditionals import T3Conditionals
    from chatterbox_prewarm.model.regions.executors import BoundRegion, Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
    from chatterbox_prewarm.model.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class VoicePrefix:
    """The keys and values of a voice.

    Attributes:
        keys, values: (length, 1, heads, 64) for each block.
        hidden: (1, 1, width), the output of the last block at the last position.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    hidden: torch.Tensor

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.keys[0].size(0)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(frozen=True, kw_only=True)
class _GptPrompt(Prompt):
    """A prompt whose `embeddings`, (1, n, width), follow those of the voice."""

    prefix: VoicePrefix

    @property
    def length(self) -> int:
        return self.prefix.length + self.embeddings.size(1)


class GptDecoder(TokenDecoder):
    """Draws speech tokens with a GPT-2, without guidance: one row.

    Args:
        weights, dtype, graphs: see `TokenDecoder`.
        executor: makes the regions callable.
        max_prefix_bytes: the memory for the keys and values of voices. The latest voice is always kept.
    """

    _gpu_cache_sizes: ClassVar[tuple[int, ...]] = (1536, 2304, MAX_POSITIONS)
    prepares_voices: ClassVar[bool] = True
    # Upstream does not look for the stop token in its first draw.
    _never_last: ClassVar[int] = 1

    def __init__(
        self,
        weights: NamedTensors,
        executor: Executor,
        *,
        dtype: torch.dtype | None = None,
        graphs: bool = False,
        max_prefix_bytes: int = 320 << 20,
    ) -> None:
        super().__init__(weights, dtype=dtype, graphs=graphs)
        self._width = weights["speech_emb.weight"].size(1)
        regions = GPT_REGIONS[self._width]
        layers = [[weight.to(self.dtype) for weight in layer_weights(layer)] for layer in weights.layers("tfmr.h")]
        self._prefill = [executor(regions.prefill, weights) for weights in layers]
        self._decode = [executor(regions.decode, weights) for weights in layers]
        last = [
            *weights.pairs("tfmr.ln_f", "speech_head"),
            weights["speech_emb.weight"],
            weights["tfmr.wpe.weight"],
        ]
        sampler = executor(regions.sample, [weight.to(self.dtype) for weight in last])
        self._samplers = {False: sampler, True: sampler}
        self._max_prefix_bytes = max_prefix_bytes
        self._prefixes: OrderedDict[bytes, VoicePrefix] = OrderedDict()
        #: How often the keys and values of a voice were there, were computed, and were removed for others.
        self.prefix_hits = self.prefix_misses = self.prefix_evictions = 0

    @property
    def prefixes(self) -> int:
        """Number of voices whose keys and values are kept."""
        return len(self._prefixes)

    @property
    def prefix_bytes(self) -> int:
        """Bytes of their keys and values."""
        return sum(prefix.size for prefix in self._prefixes.values())

    @torch.inference_mode()
    def prepare_voice(self, conditionals: T3Conditionals) -> None:
        """Compute the keys and values of a voice, so that no request waits for them."""
        self._prefix(conditionals)

    def prefix_usage(self) -> dict[str, int]:
        """Return the number and the bytes of the voices' keys and values, and how they were used."""
        names = ("prefixes", "prefix_bytes", "prefix_hits", "prefix_misses", "prefix_evictions")
        return {name: getattr(self, name) for name in names}

    def has_room(self) -> bool:
        """Return whether the keys and values of one more voice would be kept."""
        largest = max((prefix.size for prefix in self._prefixes.values()), default=0)
        return self.prefix_bytes + largest <= self._max_prefix_bytes

    def _prefix(self, conditionals: T3Conditionals) -> VoicePrefix:
        """Return the keys and values of a voice. Its content is the key, because callers copy voices."""
        tensors = (conditionals.speaker_emb, conditionals.cond_prompt_speech_tokens)
        key = b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)
        found = self._prefixes.get(key)
        if found is not None:
            self.prefix_hits += 1
            self._prefixes.move_to_end(key)
            return found
        self.prefix_misses += 1
        computed = self._prefixes[key] = self._compute_prefix(conditionals)
        while len(self._prefixes) > 1 and self.prefix_bytes > self._max_prefix_bytes:
            self._prefixes.popitem(last=False)
            self.prefix_evictions += 1
        return computed

    def _compute_prefix(self, conditionals: T3Conditionals) -> VoicePrefix:
        weights = self._weights
        speaker = functional.linear(conditionals.speaker_emb.view(1, 1, -1), *weights.pair("cond_enc.spkr_enc"))
        speech = weights["speech_emb.weight"][conditionals.cond_prompt_speech_tokens]
        x = torch.cat([speaker, speech], dim=1)
        length = x.size(1)
        shape = (self._rounded(length + 1), 1, self._width // HEAD_SIZE)
        caches = DecodeState.caches(len(self._decode), shape, self._device, self.dtype)
        hidden = self._run(x, 0, *caches)[:, -1:].clone()
        keys, values = (tuple(cache[:length].clone() for cache in kind) for kind in caches)
        return VoicePrefix(keys=keys, values=values, hidden=hidden)

    def _prompt(self, conditionals: T3Conditionals, text_tokens: torch.Tensor, sampling: Sampling) -> _GptPrompt:  # noqa: ARG002 - there is no guidance
        weights, prefix = self._weights, self._prefix(conditionals)
        start = weights["speech_emb.weight"][START_SPEECH_TOKEN].view(1, 1, -1)
        embeddings = torch.cat([weights["text_emb.weight"][text_tokens], start], dim=1)
        return _GptPrompt(
            embeddings=embeddings, text_start=prefix.length, text_tokens=text_tokens.size(1), prefix=prefix
        )

    def _shortened(self, prompt: Prompt) -> Prompt:
        assert isinstance(prompt, _GptPrompt)
        # No text, because the positions of the voice went through the same regions.
        return dataclasses.replace(prompt, embeddings=prompt.embeddings[:, :0])

    def _new_state(self, positions: int) -> DecodeState:
        return DecodeState(
            len(self._decode),
            positions,
            self._device,
            self.dtype,
            self._weights["speech_emb.weight"].size(0),
            rows=1,
            heads=self._width // HEAD_SIZE,
            controls=gpt_blocks.CONTROLS,
        )

    def _run_prompt(self, state: DecodeState, prompt: Prompt, sampling: Sampling) -> None:
        assert isinstance(prompt, _GptPrompt)
        prefix, used = prompt.prefix, self._attended(state, prompt.length + 1)
        keys, values = ([cache[:used] for cache in caches] for caches in (state.keys, state.values))
        for caches, computed in ((keys, prefix.keys), (values, prefix.values)):
            for cache, tensor in zip(caches, computed, strict=True):
                cache[: prefix.length] = tensor
        x = self._run(prompt.embeddings, prefix.length, keys, values) if prompt.embeddings.size(1) else prefix.hidden
        state.begin(x[:, -1:], prompt, sampling, START_SPEECH_TOKEN)

    def _run(self, x: torch.Tensor, start: int, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
        """Run embeddings, (1, n, width), through the blocks, from position `start` on."""
        x = (x + self._weights["tfmr.wpe.weight"][start : start + x.size(1)]).to(self.dtype)
        position = torch.tensor([start], device=self._device)
        for block, layer_keys, layer_values in zip(self._prefill, keys, values, strict=True):
            (x,) = block(x, position, layer_keys, layer_values)
        return x

    def _known(self, prompt: Prompt, speech_tokens: torch.Tensor) -> torch.Tensor:
        weights, start = self._weights, prompt.length
        tokens = weights["speech_emb.weight"][speech_tokens]
        positions = weights["tfmr.wpe.weight"][start : start + len(speech_tokens)]
        return tokens.to(self.dtype) + positions.to(self.dtype)

    def likeliest(self, hidden: torch.Tensor, tokens: torch.Tensor, *, sampling: Sampling) -> torch.Tensor:  # noqa: ARG002
        """Return the most likely tokens; see `TokenDecoder`. The penalty comes after top-k, so it changes nothing."""
        weight, bias = self._weights.pair("tfmr.ln_f")
        y = functional.layer_norm(hidden[:, 0].float(), (self._width,), weight.float(), bias.float())
        return functional.linear(y, *self._weights.pair("speech_head")).argmax(dim=1)

    def _uses_nucleus(self, sampling: Sampling) -> bool:  # noqa: ARG002 - top-k sorts, too
        return False

    def _step(self, state: DecodeState, sampler: BoundRegion, positions: int) -> None:
        x = state.embedding
        for block, keys, values in zip(self._decode, state.keys, state.values, strict=True):
            (x,) = block(x, state.position, keys[:positions], values[:positions])
        state.hidden.copy_(x)
        state.position += 1
        state.step += 1
        self._sample(state, sampler)

    def _sample(self, state: DecodeState, sampler: BoundRegion) -> None:
        drawn = sampler(
            state.hidden[:, 0], state.controls, state.noise.exponential_(), state.used, state.step, state.position
        )
        state.take(*drawn)


def layer_weights(layer: NamedTensors) -> list[torch.Tensor]:
    """Return the weight arguments of `gpt_blocks.block` for a GPT-2 block of `transformers`."""
    return layer.pairs("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
