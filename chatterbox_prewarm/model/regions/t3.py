"""T3 with regions: text and voice to speech tokens, one token at a time, without a host sync in between.

Keys and values are cached in tensors of fixed places. Sampling stays on the device. The end of speech is looked for
every few tokens, and what was drawn past it is dropped. On a GPU the step can be captured as a CUDA graph.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.regions import t3_blocks
from chatterbox_prewarm.model.regions.region import MOST_PLACES, T3_DECODE, T3_PREFILL, T3_SAMPLE, T3_SAMPLE_NUCLEUS

if TYPE_CHECKING:
    from collections.abc import Generator

    from chatterbox.models.t3 import T3
    from chatterbox.models.t3.modules.cond_enc import T3Cond

    from chatterbox_prewarm.model.regions.executors import BoundRegion, Executor
    from chatterbox_prewarm.model.sampling import Sampling

#: On a CPU attention reads as many places as are in use, rounded up to this: few shapes, little waste.
_ROUNDING = 256
#: On a GPU it always reads all places that the cache has, so that one graph serves every step. The first number holds
#: the voice, a text of 240 tokens and the most speech that upstream gives; a longer sequence takes a larger cache.
_GPU_PLACES = (1280, 2304, MOST_PLACES)
#: How many tokens are drawn between two looks for the end of speech: a look costs a GPU a host sync, and a surplus
#: token costs a CPU as much as any other.
_LOOK_EVERY_ON_CPU = 1
_LOOK_EVERY_ON_GPU = 16


class SpeechTokens:
    """T3's decoder over compiled regions; one call at a time.

    Args:
        t3: of upstream, whose weights are used where they lie.
        executor: makes the regions.
        dtype: of the transformer; None keeps the checkpoint's.
        graphs: capture the step of a token as a CUDA graph; needs a GPU.
    """

    def __init__(self, t3: T3, executor: Executor, *, dtype: torch.dtype | None = None, graphs: bool = False) -> None:
        self._t3 = t3
        self._device = torch.device(t3.device)
        self.dtype: torch.dtype = dtype or t3.speech_head.weight.dtype
        self._graphs = graphs
        layers = [[weight.to(self.dtype) for weight in layer_weights(layer)] for layer in t3.tfmr.layers]
        self._prefill = [executor(T3_PREFILL, weights) for weights in layers]
        self._decode = [executor(T3_DECODE, weights) for weights in layers]
        last = (t3.tfmr.norm, t3.speech_head, t3.speech_emb, t3.speech_pos_emb.emb)
        weights = [module.weight.detach().to(self.dtype) for module in last]
        self._samplers = {False: executor(T3_SAMPLE, weights), True: executor(T3_SAMPLE_NUCLEUS, weights)}
        positions = torch.arange(MOST_PLACES, device=self._device)[None]
        cosine, sine = t3.tfmr.rotary_emb(torch.empty(0, device=self._device, dtype=self.dtype), positions)
        self._cosine, self._sine = cosine[0].contiguous(), sine[0].contiguous()
        self._kept: _State | None = None
        #: What the captures of graphs took so far.
        self.capture_seconds = 0.0

    @torch.inference_mode()
    def __call__(
        self, conditionals: T3Cond, text_tokens: torch.Tensor, *, sampling: Sampling, max_new_tokens: int
    ) -> torch.Tensor:
        """Draw speech tokens until the stop token or `max_new_tokens`.

        Args:
            conditionals: of the voice; not changed.
            text_tokens: int64 (1, tokens), start and stop tokens included.
            sampling: how tokens are drawn.
            max_new_tokens: the most to draw.

        Returns:
            int64 (n,), the stop token last when it was drawn.

        Raises:
            BadInputError: the text and the speech to come have more places than the cache may have.
        """
        blocks = self.blocks(conditionals, text_tokens, sampling=sampling, max_new_tokens=max_new_tokens)
        return torch.cat([text_tokens.new_empty(0), *blocks])

    @torch.inference_mode()
    def blocks(
        self, conditionals: T3Cond, text_tokens: torch.Tensor, *, sampling: Sampling, max_new_tokens: int
    ) -> Generator[torch.Tensor]:
        """As a call, in the blocks between two looks for the end of speech; arguments and errors as a call's.

        The generators of random numbers must stand as this left them when the next block is asked for.

        Yields:
            int64 (n,), 1 token on a CPU and up to 16 on a GPU.
        """
        prompt = self._prompt(conditionals, text_tokens, sampling.cfg_weight)
        length = prompt.size(1)
        if length + max_new_tokens > MOST_PLACES:
            raise BadInputError(
                f"voice and text take {length} places of T3's cache and the speech up to {max_new_tokens}, "
                f"more than the {MOST_PLACES} there are",
                next_step="split the text at sentences and send the parts one by one, or ask for fewer tokens",
            )
        nucleus = sampling.top_p < 1.0
        state = self._state(length + max_new_tokens, nucleus=nucleus)
        kept, self._kept = self._kept, None  # a call between two blocks of this one takes tensors of its own
        try:
            self._begin(state, prompt, sampling)
            state.sample(self._samplers[nucleus])
            look_every = _LOOK_EVERY_ON_CPU if self._device.type == "cpu" else _LOOK_EVERY_ON_GPU
            looked = 0
            for count in range(1, max_new_tokens + 1):
                if count % look_every == 0 or count == max_new_tokens:
                    block = state.drawn[looked:count]
                    looked = count
                    ended = (block == self._t3.hp.stop_speech_token).nonzero()
                    if ended.numel():
                        yield block[: int(ended[0, 0]) + 1].clone()
                        return
                    yield block.clone()
                if count < max_new_tokens:
                    self._advance(state, nucleus=nucleus, places=self._places(state, length + count))
        finally:
            self._kept = kept

    @torch.inference_mode()
    def hidden(
        self, conditionals: T3Cond, text_tokens: torch.Tensor, speech_tokens: torch.Tensor, *, sampling: Sampling
    ) -> torch.Tensor:
        """What the transformer gives where each token of a known sequence would be drawn (teacher forcing).

        Step by step, through what a synthesis runs; only the tokens drawn are replaced.

        Args:
            conditionals: of the voice.
            text_tokens: int64 (1, tokens), start and stop tokens included.
            speech_tokens: int64 (n,), without the start token.
            sampling: of which the guidance counts.

        Returns:
            (n, 2, 1024), before the last normalisation.
        """
        t3, count = self._t3, len(speech_tokens)
        prompt = self._prompt(conditionals, text_tokens, sampling.cfg_weight)
        length = prompt.size(1)
        state = self._state(length + count, nucleus=False)
        self._begin(state, prompt, sampling)
        places = torch.arange(1, count + 1, device=self._device)
        tokens, positions = t3.speech_emb.weight[speech_tokens], t3.speech_pos_emb.emb.weight[places]
        found = [state.hidden.clone()]
        for number, embedding in enumerate(tokens.to(self.dtype) + positions.to(self.dtype), start=1):
            if number < count:
                state.embedding.copy_(embedding.expand(2, 1, -1))
                self._advance(state, nucleus=False, places=self._places(state, length + number))
                found.append(state.hidden.clone())
        return torch.stack(found)[:, :, 0]

    def _prompt(self, conditionals: T3Cond, text_tokens: torch.Tensor, cfg_weight: float) -> torch.Tensor:
        """Embeddings of voice, text and two start tokens, (2, length, 1024); the second row is without the text."""
        t3 = self._t3
        voice = t3.prepare_conditioning(_copy(conditionals))
        text = t3.text_emb(text_tokens)
        # Upstream zeroes the other row's text before it adds the positions, and without guidance not at all.
        other = torch.zeros_like(text) if cfg_weight > 0.0 else text
        text = torch.cat([text, other]) + t3.text_pos_emb(text_tokens)
        start = t3.speech_emb.weight[t3.hp.start_speech_token] + t3.speech_pos_emb.emb.weight[0]
        # Twice: upstream embeds the start token with the prompt, and again as the first of its loop.
        return torch.cat([voice.expand(2, -1, -1), text, start.expand(2, 2, -1)], dim=1).to(self.dtype)

    def _state(self, places: int, *, nucleus: bool) -> _State:
        """Tensors for a sequence of so many places; on a GPU kept between calls, since graphs hold their addresses."""
        if self._device.type == "cpu":
            return _State(len(self._decode), places, self._device, self.dtype, self._t3.hp.speech_tokens_dict_size)
        if self._kept is None or self._kept.places < places:
            self._kept = None  # before the larger one is made
            room = next(step for step in _GPU_PLACES if step >= places)
            self._kept = _State(len(self._decode), room, self._device, self.dtype, self._t3.hp.speech_tokens_dict_size)
        if self._graphs and nucleus not in self._kept.graphs:
            self._capture(self._kept, nucleus=nucleus)
        return self._kept

    def _places(self, state: _State, used: int) -> int:
        """How many places a step's attention reads."""
        if self._device.type == "cpu":
            return min(-(-used // _ROUNDING) * _ROUNDING, state.places)
        return state.places

    def _begin(self, state: _State, prompt: torch.Tensor, sampling: Sampling) -> None:
        """Put the prompt through the transformer; what the first token is drawn from is then in the state."""
        x, length = prompt, prompt.size(1)
        for block, keys, values in zip(self._prefill, state.keys, state.values, strict=True):
            x, keys[:length], values[:length] = block(x, self._cosine[:length], self._sine[:length])
        state.begin(x[:, -1:], length, sampling, self._t3.hp.start_speech_token)

    def _advance(self, state: _State, *, nucleus: bool, places: int) -> None:
        """One token further, from the captured graph where there is one."""
        graph = state.graphs.get(nucleus)
        if graph is not None:
            graph.replay()  # type: ignore[no-untyped-call]
        else:
            self._step(state, self._samplers[nucleus], places)

    def _step(self, state: _State, sampler: BoundRegion, places: int) -> None:
        """Put the last token through the transformer, and draw the next."""
        x = state.embedding
        for block, keys, values in zip(self._decode, state.keys, state.values, strict=True):
            (x,) = block(x, self._cosine, self._sine, state.position, keys[:places], values[:places])
        state.hidden.copy_(x)
        state.position += 1
        state.step += 1
        state.sample(sampler)

    def _capture(self, state: _State, *, nucleus: bool) -> None:
        """Capture the step as a CUDA graph, between two utterances; the random generator stays as it was.

        Only when a request first needs it: few ask for top-p, and what a start does is waited for.
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
                self._step(state, sampler, state.places)  # libraries set themselves up outside of the capture
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
            # The stream names the device; other threads may go on using theirs meanwhile. The two graphs never run at
            # once, so they share one pool of memory.
            pool = next((other.pool() for other in state.graphs.values()), None)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._step(state, sampler, state.places)
            state.graphs[nucleus] = graph
        except BaseException:
            self._kept = None  # the next call begins anew, or says why not
            raise
        finally:
            torch.cuda.set_rng_state(generator, device)
        torch.cuda.synchronize(device)
        self.capture_seconds += time.perf_counter() - started


class _State:
    """The tensors that a step reads and writes, always the same ones, so that a graph may hold them.

    Attributes:
        places: of the caches.
        keys, values: for each block (places, 2, 16, 64).
        hidden: what sampling reads, (2, 1, 1024).
        embedding: of the last token, (2, 1, 1024).
        position, step: int64 (1,), the place of the last token in the sequence and among the speech tokens.
        drawn: int64, the tokens so far.
        graphs: captured steps, with and without top-p.
    """

    def __init__(self, layers: int, places: int, device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
        def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=kind)

        self.places = places
        cache = (places, 2, t3_blocks.HEADS, t3_blocks.HEAD_SIZE)
        self.keys = [_unwritten(cache, device, dtype) for _ in range(layers)]
        self.values = [_unwritten(cache, device, dtype) for _ in range(layers)]
        self.hidden, self.embedding = zeros(2, 1, 1024), zeros(2, 1, 1024)
        self.position, self.step = zeros(1, kind=torch.int64), zeros(1, kind=torch.int64)
        self.drawn = zeros(places, kind=torch.int64)
        self.used = zeros(vocabulary, kind=torch.bool)
        self.noise = zeros(vocabulary, kind=torch.float32)
        self.controls = zeros(len(t3_blocks.CONTROLS), kind=torch.float32)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def begin(self, hidden: torch.Tensor, length: int, sampling: Sampling, start_token: int) -> None:
        """Set everything but the caches for a new utterance after a prompt of `length` places."""
        self.hidden.copy_(hidden)
        self.position.fill_(length)
        self.step.zero_()
        self.used.zero_()
        self.used[start_token] = True
        self.controls.copy_(torch.tensor([getattr(sampling, name) for name in t3_blocks.CONTROLS]))

    def sample(self, sampler: BoundRegion) -> None:
        """Draw a token from `hidden`."""
        token, embedding, used = sampler(
            self.hidden[:, 0], self.controls, self.noise.exponential_(), self.used, self.step
        )
        self.drawn.index_copy_(0, self.step, token)
        self.embedding.copy_(embedding)
        self.used.copy_(used)


def _unwritten(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros; on a CPU pages that nobody writes to take no memory and no time, and `torch.zeros` would write them."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)


def layer_weights(layer: Any) -> list[torch.Tensor]:
    """What `t3_blocks.prefill` and `decode` take, from a Llama layer of `transformers`."""
    attention, feed_forward = layer.self_attn, layer.mlp
    modules = (
        layer.input_layernorm,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        layer.post_attention_layernorm,
        feed_forward.gate_proj,
        feed_forward.up_proj,
        feed_forward.down_proj,
    )
    return [module.weight.detach() for module in modules]


def _copy(conditionals: T3Cond) -> T3Cond:
    """Upstream stores what it computes into the object that it is given."""
    return type(conditionals)(
        speaker_emb=conditionals.speaker_emb,
        cond_prompt_speech_tokens=conditionals.cond_prompt_speech_tokens,
        emotion_adv=conditionals.emotion_adv,
    )
