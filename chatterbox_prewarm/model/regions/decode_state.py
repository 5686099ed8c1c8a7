"""The tensors of T3's decoding: the KV cache, the random numbers and the tokens drawn so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatterbox_prewarm.model.regions import t3_blocks

if TYPE_CHECKING:
    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.sampling import Sampling


class DecodeState:
    """The tensors that a decoding step reads and writes. Their addresses stay the same, so a CUDA graph can use them.

    Args:
        layers: number of transformer blocks.
        positions: size of the KV cache.
        device: of all tensors.
        dtype: of the transformer.
        vocabulary: number of speech tokens, special ones included.

    Attributes:
        keys, values: the KV cache, (positions, 2, 16, 64) for each block.
        hidden: (2, 1, 1024), the input of sampling.
        embedding: (2, 1, 1024), the last token.
        position: int64 (1,), the position of the last token in the KV cache.
        step: int64 (1,), the number of the last token among the speech tokens.
        drawn: int64 (positions,), the tokens drawn so far.
        graphs: captured steps, by whether they sample with top-p.
    """

    def __init__(self, layers: int, positions: int, device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
        def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, device=device, dtype=kind)

        self.positions = positions
        cache = (positions, 2, t3_blocks.HEADS, t3_blocks.HEAD_SIZE)
        self.keys = [_unwritten(cache, device, dtype) for _ in range(layers)]
        self.values = [_unwritten(cache, device, dtype) for _ in range(layers)]
        self.hidden, self.embedding = zeros(2, 1, 1024), zeros(2, 1, 1024)
        self.position, self.step = zeros(1, kind=torch.int64), zeros(1, kind=torch.int64)
        self.drawn = zeros(positions, kind=torch.int64)
        self.used = zeros(vocabulary, kind=torch.bool)
        self.noise = zeros(vocabulary, kind=torch.float32)
        self.controls = zeros(len(t3_blocks.CONTROLS), kind=torch.float32)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def begin(self, hidden: torch.Tensor, length: int, sampling: Sampling, start_token: int) -> None:
        """Reset everything except the KV cache for a new utterance, after a prompt of `length` positions."""
        self.hidden.copy_(hidden)
        self.position.fill_(length)
        self.step.zero_()
        self.used.zero_()
        self.used[start_token] = True
        self.controls.copy_(torch.tensor([getattr(sampling, name) for name in t3_blocks.CONTROLS]))

    def sample(self, sampler: BoundRegion) -> None:
        """Draw a token from `hidden` and embed it."""
        token, embedding, used = sampler(
            self.hidden[:, 0], self.controls, self.noise.exponential_(), self.used, self.step
        )
        self.drawn.index_copy_(0, self.step, token)
        self.embedding.copy_(embedding)
        self.used.copy_(used)


def _unwritten(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros; on a CPU without writing them, so that unused pages take no memory and no time."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)
