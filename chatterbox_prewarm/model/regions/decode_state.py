"""The tensors of T3's decoding: the KV cache, the random numbers and the tokens drawn so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatterbox_prewarm.model.regions import alignment, t3_blocks

if TYPE_CHECKING:
    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.t3_prompt import Prompt
    from chatterbox_prewarm.model.sampling import Sampling


class DecodeState:
    """The tensors that a decoding step reads and writes. Their addresses stay the same, so a CUDA graph can use them.

    Args:
        layers: number of transformer blocks.
        positions: size of the KV cache.
        device: of all tensors.
        dtype: of the transformer.
        vocabulary: number of speech tokens, special ones included.
        rows: 2 with guidance, otherwise 1.
        heads: number of attention heads.
        controls: names of the sampling settings that the sampler takes.

    Attributes:
        keys, values: the KV cache, (positions, rows, heads, 64) for each block.
        hidden: (rows, 1, 64 heads), the input of sampling.
        embedding: (rows, 1, 64 heads), the last token.
        position: int64 (1,), the position of the last token in the KV cache.
        step: int64 (1,), the number of the last token among the speech tokens.
        drawn: int64 (positions,), the tokens drawn so far.
        attention: float32 (positions,), of the last token, for `alignment.analyze`.
        graphs: captured steps, by whether they sample with top-p.
    """

    def __init__(  # noqa: PLR0913 - three of them have defaults
        self,
        layers: int,
        positions: int,
        device: torch.device,
        dtype: torch.dtype,
        vocabulary: int,
        *,
        rows: int = 2,
        heads: int = t3_blocks.HEADS,
        controls: tuple[str, ...] = t3_blocks.CONTROLS,
    ) -> None:
        def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=kind)

        self.positions = positions
        width = heads * t3_blocks.HEAD_SIZE
        self.keys, self.values = self.caches(layers, (positions, rows, heads), device, dtype)
        self.hidden, self.embedding = zeros(rows, 1, width), zeros(rows, 1, width)
        self.position, self.step = zeros(1, kind=torch.int64), zeros(1, kind=torch.int64)
        self.drawn = zeros(positions, kind=torch.int64)
        self.used = zeros(vocabulary, kind=torch.bool)
        self.noise = zeros(vocabulary, kind=torch.float32)
        self._names = controls
        self.controls = zeros(len(controls), kind=torch.float32)
        # A text of three tokens, because a graph is captured before the first utterance.
        self._text = torch.tensor([0, 3], device=device)
        self._recent = zeros(2, kind=torch.int64)
        self._progress = zeros(alignment.PROGRESS, kind=torch.float32)
        self._decision = zeros(1, kind=torch.int64)
        self.attention = zeros(positions, kind=torch.float32)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    @staticmethod
    def caches(
        layers: int, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Allocate the keys and the values of all blocks for a number of positions, rows and heads."""
        keys, values = ([_unwritten((*shape, t3_blocks.HEAD_SIZE), device, dtype) for _ in range(layers)] for _ in "kv")
        return keys, values

    def begin(self, hidden: torch.Tensor, prompt: Prompt, sampling: Sampling, start_token: int) -> None:
        """Reset everything except the KV cache for a new utterance, after its prompt."""
        self.hidden.copy_(hidden)
        self.position.fill_(prompt.length)
        self.attention.zero_()
        self._text.copy_(torch.tensor([prompt.text_start, prompt.text_tokens]))
        self._recent.copy_(torch.tensor([-1, -2]))
        self._progress.zero_()
        self.step.zero_()
        self.used.zero_()
        self.used[start_token] = True
        self.controls.copy_(torch.tensor([getattr(sampling, name) for name in self._names]))

    def sample(self, sampler: BoundRegion, *, aligned: bool) -> None:
        """Draw a token from `hidden` and embed it; if `aligned`, the attention decides about the stop token."""
        if aligned:
            progress, decision = alignment.analyze(self.attention, self._text, self.step, self._recent, self._progress)
            self._progress.copy_(progress)
            self._decision.copy_(decision)
        token, embedding, used = sampler(
            self.hidden[:, 0], self.controls, self.noise.exponential_(), self.used, self.step, self._decision
        )
        self._recent.copy_(torch.cat([token, self._recent[:1]]))
        self.take(token, embedding, used)

    def take(self, token: torch.Tensor, embedding: torch.Tensor, used: torch.Tensor) -> None:
        """Store a drawn token, its embedding, and which tokens the sequence contains."""
        self.drawn.index_copy_(0, self.step, token)
        self.embedding.copy_(embedding)
        self.used.copy_(used)


def _unwritten(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros; on a CPU without writing them, so that unused pages take no memory and no time."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
