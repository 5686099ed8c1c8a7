"""The loop that draws speech tokens, one at a time, without a host sync for each token.

The KV cache has fixed addresses, and sampling runs on the device. The decoder checks for the end of speech every few
tokens and drops the tokens drawn after it. On a GPU a step can be captured as a CUDA graph. The subclasses have the
transformer: `t3.T3Decoder` a Llama, and `gpt.GptDecoder` a GPT-2.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.regions.region import MAX_POSITIONS
from chatterbox_prewarm.model.regions.t3_blocks import STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Generator

    from chatterbox_prewarm.model.conditionals import T3Conditionals
    from chatterbox_prewarm.model.regions.decode_state import DecodeState
    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
    from chatterbox_prewarm.model.regions.t3_prompt import Prompt

#: On a CPU, attention reads the used positions, rounded up to this number: few shapes and little wasted work.
_CPU_ROUNDING = 256
#: How many tokens are drawn between two checks for the end of speech. A check costs a GPU a host sync. A surplus token
#: costs a CPU as much as any other token.
_CHECK_EVERY_ON_CPU = 1
_CHECK_EVERY_ON_GPU = 16


class TokenDecoder(ABC):
    """Draws speech tokens with the regions of a T3. Only one call may run at a time.

    Args:
        weights: of upstream's `T3`; they are used in place.
        dtype: of the transformer; None keeps the checkpoint's.
        graphs: capture the step of a token as a CUDA graph; needs a GPU.
    """

    #: On a GPU, attention always reads the complete KV cache, so that one graph serves every step. The first size holds
    #: the voice, a text of 240 tokens and the longest speech that upstream allows. A longer sequence uses a larger one.
    _gpu_cache_sizes: ClassVar[tuple[int, ...]] = (1280, 2304, MAX_POSITIONS)
    #: The number of drawn tokens before the first one that may end the speech.
    _never_last: ClassVar[int] = 0
    #: Whether `prepare_voice` computes anything.
    prepares_voices: ClassVar[bool] = False
    #: By whether they sample with top-p.
    _samplers: dict[bool, BoundRegion]

    def __init__(self, weights: NamedTensors, *, dtype: torch.dtype | None = None, graphs: bool = False) -> None:
        self._weights = weights
        self._device = weights["speech_head.weight"].device
        self.dtype: torch.dtype = dtype or weights["speech_head.weight"].dtype
        self.graphs = graphs
        self._kept: DecodeState | None = None
        #: Seconds spent on capturing graphs so far.
        self.capture_seconds = 0.0

    @abstractmethod
    def _prompt(self, conditionals: T3Conditionals, text_tokens: torch.Tensor, sampling: Sampling) -> Prompt:
        """Embed a voice and a text."""

    @abstractmethod
    def _shortened(self, prompt: Prompt) -> Prompt:
        """Return the few positions of a prompt that the check of a start runs."""

    @abstractmethod
    def _new_state(self, positions: int) -> DecodeState:
        """Allocate the tensors of a decoding."""

    @abstractmethod
    def _run_prompt(self, state: DecodeState, prompt: Prompt, sampling: Sampling) -> None:
        """Run the prompt through the transformer and store the hidden state of its last position for sampling."""

    @abstractmethod
    def _known(self, prompt: Prompt, speech_tokens: torch.Tensor) -> torch.Tensor:
        """Embed known speech tokens, (n,), that follow a prompt: (n, width)."""

    @abstractmethod
    def _step(self, state: DecodeState, sampler: BoundRegion, positions: int) -> None:
        """Run the last token through the transformer and draw the next one."""

    @abstractmethod
    def _sample(self, state: DecodeState, sampler: BoundRegion) -> None:
        """Draw a token from the state and embed it."""

    @abstractmethod
    def likeliest(self, hidden: torch.Tensor, tokens: torch.Tensor, *, sampling: Sampling) -> torch.Tensor:
        """Return the most likely token at the position of each of `tokens`, given the tokens before it: int64 (n,).

        Args:
            hidden: hidden states at these positions, from `hidden`.
            tokens: int64 (n,).
            sampling: has the guidance and the repetition penalty.
        """

    def prepare_voice(self, conditionals: T3Conditionals) -> None:  # noqa: B027 - most decoders need nothing
        """Compute what all texts of a voice share, so that no request waits for it."""

    def has_room(self) -> bool:
        """Return whether the results of `prepare_voice` for one more voice would be kept."""
        return False

    def prefix_usage(self) -> dict[str, int]:
        """Return the number and the bytes of the results of `prepare_voice`, and how they were used."""
        return {}

    def _uses_nucleus(self, sampling: Sampling) -> bool:
        """Return whether the sampler with top-p is needed."""
        return sampling.top_p < 1.0

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
        prompt = self._prompt(conditionals, text_tokens, sampling)
        length = prompt.length
        if length + max_new_tokens > MAX_POSITIONS:
            raise BadInputError(
                f"the voice and the text need {length} positions of T3's KV cache and the speech up to "
                f"{max_new_tokens}; the cache has at most {MAX_POSITIONS}",
                next_step="split the text at sentences and send the parts separately, or request fewer tokens",
            )
        nucleus = self._uses_nucleus(sampling)
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
                    begin = max(0, self._never_last - (count - block.numel()))
                    ended = (block[begin:] == STOP_SPEECH_TOKEN).nonzero()
                    if ended.numel():
                        yield block[: begin + int(ended[0, 0]) + 1].clone()
                        return
                    yield block.clone()
                if count < max_new_tokens:
                    self._advance(state, nucleus=nucleus, positions=self._attended(state, length + count))
        finally:
            self._kept = kept

    @torch.inference_mode()
    def check(self, conditionals: T3Conditionals, text_tokens: torch.Tensor) -> None:
        """Run each region once: a few positions of a prompt, one step, and the samplers. On a GPU, capture the step.

        Args:
            conditionals: of the voice.
            text_tokens: int64 (1, tokens), start and stop tokens included.

        Raises:
            ModelError: the transformer computes values that are not finite.
        """
        sampling = Sampling()
        prompt = self._shortened(self._prompt(conditionals, text_tokens, sampling))
        length = prompt.length
        state = self._acquire_state(length + 1, nucleus=False)
        self._run_prompt(state, prompt, sampling)
        if self._samplers[True] is not self._samplers[False]:
            self._sample(state, self._samplers[True])
        self._advance(state, nucleus=False, positions=self._attended(state, length + 1))
        # The first positions have the largest values, so a checkpoint that is too large for float16 shows here. The
        # comparison runs on the CPU, because the stand-in for a GPU computes nothing and returns zeros.
        if not bool(state.hidden.cpu().isfinite().all()):
            dtype = str(self.dtype).removeprefix("torch.")
            raise ModelError(
                f"T3 computes values that are not finite, in {dtype}",
                next_step="bake with `--t3-dtype bfloat16`, or check the weights with "
                "`chatterbox-prewarm weights verify`"
                if self.dtype == torch.float16
                else "check the weights with `chatterbox-prewarm weights verify`",
            )

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
            (n, rows, width), before the last normalization.
        """
        count = len(speech_tokens)
        prompt = self._prompt(conditionals, text_tokens, sampling)
        length = prompt.length
        state = self._acquire_state(length + count, nucleus=False)
        self._run_prompt(state, prompt, sampling)
        outputs = [state.hidden.clone()]
        for number, embedding in enumerate(self._known(prompt, speech_tokens), start=1):
            if number < count:
                state.embedding.copy_(embedding.expand_as(state.embedding))
                self._advance(state, nucleus=False, positions=self._attended(state, length + number))
                outputs.append(state.hidden.clone())
        return torch.stack(outputs)[:, :, 0]

    def _acquire_state(self, positions: int, *, nucleus: bool) -> DecodeState:
        """Return tensors for a sequence of this length. On a GPU they are reused, because graphs store addresses."""
        if self._device.type == "cpu":
            return self._new_state(positions)
        if self._kept is None or self._kept.positions < positions:
            self._kept = None  # free its memory before the larger one is allocated
            size = next(size for size in self._gpu_cache_sizes if size >= positions)
            self._kept = self._new_state(size)
        if self.graphs and nucleus not in self._kept.graphs:
            self._capture(self._kept, nucleus=nucleus)
        return self._kept

    def _attended(self, state: DecodeState, used: int) -> int:
        """Return how many positions a step's attention reads."""
        if self._device.type == "cpu":
            return min(self._rounded(used), state.positions)
        return state.positions

    @staticmethod
    def _rounded(used: int) -> int:
        """Round a number of positions up, for few shapes."""
        return -(-used // _CPU_ROUNDING) * _CPU_ROUNDING

    def _advance(self, state: DecodeState, *, nucleus: bool, positions: int) -> None:
        """Draw the next token, with the captured graph if there is one."""
        graph = state.graphs.get(nucleus)
        if graph is not None:
            graph.replay()  # type: ignore[no-untyped-call]
        else:
            self._step(state, self._samplers[nucleus], positions)

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
