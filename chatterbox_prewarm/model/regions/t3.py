"""T3 with regions: turns text and a voice into speech tokens, one at a time, without a host sync for each token.

The KV cache has fixed addresses, and sampling runs on the device. The decoder checks for the end of speech every few
tokens and drops the tokens drawn after it. On a GPU a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.regions.decode_state import DecodeState
from chatterbox_prewarm.model.regions.region import (
    MAX_POSITIONS,
    T3_DECODE,
    T3_DECODE_ALIGNED,
    T3_PREFILL,
    T3_SAMPLE,
    T3_SAMPLE_NUCLEUS,
)
from chatterbox_prewarm.model.regions.rotary import rotary_tables
from chatterbox_prewarm.model.regions.t3_blocks import HEADS, START_SPEECH_TOKEN, STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.regions.t3_prompt import Prompt, embed_prompt
from chatterbox_prewarm.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from chatterbox_prewarm.model.conditionals import T3Conditionals
    from chatterbox_prewarm.model.regions.executors import BoundRegion, Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

#: On a CPU, attention reads the used positions, rounded up to this number: few shapes and little wasted work.
_CPU_ROUNDING = 256
#: On a GPU, attention always reads the complete KV cache, so that one graph serves every step. The first size holds the
#: voice, a text of 240 tokens and the longest speech that upstream allows. A longer sequence uses a larger cache.
_GPU_CACHE_SIZES = (1280, 2304, MAX_POSITIONS)
#: How many tokens are drawn between two checks for the end of speech. A check costs a GPU a host sync. A surplus token
#: costs a CPU as much as any other token.
_CHECK_EVERY_ON_CPU = 1
_CHECK_EVERY_ON_GPU = 16
#: How many positions of a prompt the check of a start runs. All 41 positions of the shortest text take three times as
#: long on a CPU.
_CHECKED_POSITIONS = 4


class T3Decoder:
    """Draws speech tokens with T3's regions. Only one call may run at a time.

    Args:
        weights: of upstream's `T3`; they are used in place.
        executor: makes the regions callable.
        dtype: of the transformer; None keeps the checkpoint's.
        graphs: capture the step of a token as a CUDA graph; needs a GPU.
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
        self._weights = weights
        self._device = weights["speech_head.weight"].device
        self.dtype: torch.dtype = dtype or weights["speech_head.weight"].dtype
        self.graphs = graphs
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
        self._kept: DecodeState | None = None
        #: Seconds spent on capturing graphs so far.
        self.capture_seconds = 0.0

    @torch.inference_mode()
    def __call__(
        self, conditionals: T3Conditionals, text_tokens: torch.Tensor, *, sampling: Sampling, max_new_tokens: int
    ) -> torch.Tensor:
        """Draw speech tokens until the stop token or `max_new_tokens`.

        Args:
            conditionals: of the voice; not changed.
            text_tokens: int64 (1, tokens), start and stop tokens included.
            sampling: the sampling settings.
            max_new_tokens: the maximum number of tokens.

        Returns:
            int64 (n,); the stop token comes last if it was drawn.

        Raises:
            BadInputError: the text and the speech need more positions than the KV cache may have.
        """
        blocks = self.blocks(conditionals, text_tokens, sampling=sampling, max_new_tokens=max_new_tokens)
        return torch.cat([text_tokens.new_empty(0), *blocks])

    @torch.inference_mode()
    def blocks(
        self, conditionals: T3Conditionals, text_tokens: torch.Tensor, *, sampling: Sampling, max_new_tokens: int
    ) -> Generator[torch.Tensor]:
        """Draw the same tokens as a call, one block between two checks for the end of speech at a time.

        Before asking for the next block, the caller must restore the random generators to their state at the yield.

        Yields:
            int64 (n,): 1 token on a CPU and up to 16 tokens on a GPU.
        """
        prompt = embed_prompt(self._weights, conditionals, text_tokens, sampling.cfg_weight)
        length = prompt.length
        if length + max_new_tokens > MAX_POSITIONS:
            raise BadInputError(
                f"the voice and the text need {length} positions of T3's KV cache and the speech up to "
                f"{max_new_tokens}; the cache has at most {MAX_POSITIONS}",
                next_step="split the text at sentences and send the parts separately, or request fewer tokens",
            )
        nucleus = sampling.top_p < 1.0
        state = self._acquire_state(length + max_new_tokens, nucleus=nucleus)
        kept, self._kept = self._kept, None  # a call between two blocks of this one needs its own tensors
        try:
            self._run_prompt(state, prompt, sampling)
            self._sample(state, self._samplers[nucleus])
            check_every = _CHECK_EVERY_ON_CPU if self._device.type == "cpu" else _CHECK_EVERY_ON_GPU
            checked = 0
            for count in range(1, max_new_tokens + 1):
                if count % check_every == 0 or count == max_new_tokens:
                    block = state.drawn[checked:count]
                    checked = count
                    ended = (block == STOP_SPEECH_TOKEN).nonzero()
                    if ended.numel():
                        yield block[: int(ended[0, 0]) + 1].clone()
                        return
                    yield block.clone()
                if count < max_new_tokens:
                    self._advance(state, nucleus=nucleus, positions=self._attended(state, length + count))
        finally:
            self._kept = kept

    @torch.inference_mode()
    def check(self, conditionals: T3Conditionals, text_tokens: torch.Tensor) -> None:
        """Run each region once: a few positions of a prompt, one step, and both samplers. On a GPU, capture the step.

        Args:
            conditionals: of the voice.
            text_tokens: int64 (1, tokens), start and stop tokens included.
        """
        sampling = Sampling()
        embeddings = embed_prompt(self._weights, conditionals, text_tokens, sampling.cfg_weight).embeddings
        length = _CHECKED_POSITIONS
        prompt = Prompt(embeddings=embeddings[:, :length], text_start=0, text_tokens=length)
        state = self._acquire_state(length + 1, nucleus=False)
        self._run_prompt(state, prompt, sampling)
        self._sample(state, self._samplers[True])
        self._advance(state, nucleus=False, positions=self._attended(state, length + 1))

    @torch.inference_mode()
    def hidden(
        self,
        conditionals: T3Conditionals,
        text_tokens: torch.Tensor,
        speech_tokens: torch.Tensor,
        *,
        sampling: Sampling,
    ) -> torch.Tensor:
        """Return the transformer's outputs for a known sequence of speech tokens (teacher forcing).

        Runs the same steps as a synthesis, but replaces each drawn token with the known one.

        Args:
            conditionals: of the voice.
            text_tokens: int64 (1, tokens), start and stop tokens included.
            speech_tokens: int64 (n,), without the start token.
            sampling: only `cfg_weight` is used.

        Returns:
            (n, 2, 1024), before the last normalization.
        """
        weights, count = self._weights, len(speech_tokens)
        prompt = embed_prompt(self._weights, conditionals, text_tokens, sampling.cfg_weight)
        length = prompt.length
        state = self._acquire_state(length + count, nucleus=False)
        self._run_prompt(state, prompt, sampling)
        numbers = torch.arange(1, count + 1, device=self._device)
        tokens = weights["speech_emb.weight"][speech_tokens]
        positions = weights["speech_pos_emb.emb.weight"][numbers]
        outputs = [state.hidden.clone()]
        for number, embedding in enumerate(tokens.to(self.dtype) + positions.to(self.dtype), start=1):
            if number < count:
                state.embedding.copy_(embedding.expand(2, 1, -1))
                self._advance(state, nucleus=False, positions=self._attended(state, length + number))
                outputs.append(state.hidden.clone())
        return torch.stack(outputs)[:, :, 0]

    def _acquire_state(self, positions: int, *, nucleus: bool) -> DecodeState:
        """Return tensors for a sequence of this length. On a GPU they are reused, because graphs store addresses."""
        layers, vocabulary = len(self._decode), self._weights["speech_emb.weight"].size(0)
        if self._device.type == "cpu":
            return DecodeState(layers, positions, self._device, self.dtype, vocabulary)
        if self._kept is None or self._kept.positions < positions:
            self._kept = None  # free its memory before the larger one is allocated
            size = next(size for size in _GPU_CACHE_SIZES if size >= positions)
            self._kept = DecodeState(layers, size, self._device, self.dtype, vocabulary)
        if self.graphs and nucleus not in self._kept.graphs:
            self._capture(self._kept, nucleus=nucleus)
        return self._kept

    def _attended(self, state: DecodeState, used: int) -> int:
        """Return how many positions a step's attention reads."""
        if self._device.type == "cpu":
            return min(-(-used // _CPU_ROUNDING) * _CPU_ROUNDING, state.positions)
        return state.positions

    def _run_prompt(self, state: DecodeState, prompt: Prompt, sampling: Sampling) -> None:
        """Run the prompt through the transformer and store the hidden state of its last position for sampling."""
        x, length = prompt.embeddings.to(self.dtype), prompt.length
        for block, keys, values in zip(self._prefill, state.keys, state.values, strict=True):
            x, keys[:length], values[:length] = block(x, self._cosine[:length], self._sine[:length])
        state.begin(x[:, -1:], prompt, sampling, START_SPEECH_TOKEN)

    def _advance(self, state: DecodeState, *, nucleus: bool, positions: int) -> None:
        """Draw the next token, with the captured graph if there is one."""
        graph = state.graphs.get(nucleus)
        if graph is not None:
            graph.replay()  # type: ignore[no-untyped-call]
        else:
            self._step(state, self._samplers[nucleus], positions)

    def _step(self, state: DecodeState, sampler: BoundRegion, positions: int) -> None:
        """Run the last token through the transformer and draw the next one."""
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

    def _capture(self, state: DecodeState, *, nucleus: bool) -> None:
        """Capture a step as a CUDA graph between two utterances. The random generator keeps its state.

        A capture happens when a request first needs it: few requests use top-p, and a capture delays the start.
        """
        device, sampler = self._device, self._samplers[nucleus]
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        generator = torch.cuda.get_rng_state(device)
        try:
            state.position.zero_()
            state.step.zero_()
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self._step(state, sampler, state.positions)  # libraries must initialize outside the capture
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
            # The stream selects the device. Other threads may use other streams during the capture. The two graphs
            # never run at the same time, so they share one memory pool.
            pool = next((other.pool() for other in state.graphs.values()), None)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._step(state, sampler, state.positions)
            state.graphs[nucleus] = graph
        except BaseException:
            self._kept = None  # the next call captures again, or raises the same error
            raise
        finally:
            torch.cuda.set_rng_state(generator, device)
        torch.cuda.synchronize(device)
        self.capture_seconds += time.perf_counter() - started


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
