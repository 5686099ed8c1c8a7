"""What is compiled: pieces of the model as pure functions of tensors, their weights among the arguments.

A region is called the same way whatever made it, plain PyTorch, `torch.compile` or an ahead-of-time package; `execute`
makes them. Since weights are arguments, one artifact serves every block of a stack and every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.model.regions import flow_blocks, t3_blocks, vocoder_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, kw_only=True)
class Size:
    """A dimension whose length differs between calls: `factor` times the length called `name`, plus `offset`.

    Attributes:
        name: lengths of one name are one length within a region.
        example: of that length, for the making; not 0, 1 or any other dimension's length.
        least, most: the bounds of that length.
    """

    name: str
    example: int
    least: int
    most: int
    factor: int = 1
    offset: int = 0

    @property
    def length(self) -> int:
        """The example's length in this dimension."""
        return self.factor * self.example + self.offset


@dataclass(frozen=True, kw_only=True)
class Input:
    """An argument of a region after its weights; `dtype` None is that of the weights."""

    shape: tuple[int | Size, ...]
    dtype: torch.dtype | None = None

    def example(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A tensor as the region may be called with."""
        shape = [size.length if isinstance(size, Size) else size for size in self.shape]
        # Zeros, since they are valid as indices too; what is compiled does not depend on values.
        return torch.zeros(shape, device=device, dtype=self.dtype or dtype)

    @property
    def dynamic(self) -> dict[int, Size]:
        """Which dimensions differ between calls."""
        return {place: size for place, size in enumerate(self.shape) if isinstance(size, Size)}


@dataclass(frozen=True, kw_only=True)
class Region:
    """A piece of the model that is compiled by itself.

    Attributes:
        name: of the region and of its package.
        function: takes weights and inputs, tensors all, and gives a tuple of tensors.
        inputs: what follows the weights.
    """

    name: str
    function: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[Input, ...]


#: The most places of the KV cache: the longest text that T3 has positions for, the voice's prompt, 40 s of speech.
MOST_PLACES = 3328
#: Mel frames of the longest voice prompt and utterance, with a margin; 50 a second.
MOST_FRAMES = 4096

_TOKENS = Size(name="tokens", example=40, least=2, most=MOST_PLACES)
_PLACES = Size(name="places", example=384, least=2, most=MOST_PLACES)
_SPEECH = Size(name="tokens", example=100, least=4, most=MOST_FRAMES)
_FRAMES = Size(name="frames", example=300, least=4, most=MOST_FRAMES)
_LONG = torch.int64


def _resnet(channels: int) -> Region:
    return Region(
        name=f"flow_resnet_{channels}",
        function=flow_blocks.resnet,
        inputs=(Input(shape=(2, _FRAMES, channels)), Input(shape=(1, 1024))),
    )


def _sampling(name: str, function: Callable[..., tuple[torch.Tensor, ...]]) -> Region:
    vocabulary = 8194
    return Region(
        name=name,
        function=function,
        inputs=(
            Input(shape=(2, 1024)),
            Input(shape=(len(t3_blocks.CONTROLS),), dtype=torch.float32),
            Input(shape=(vocabulary,), dtype=torch.float32),
            Input(shape=(vocabulary,), dtype=torch.bool),
            Input(shape=(1,), dtype=_LONG),
        ),
    )


T3_PREFILL = Region(
    name="t3_prefill",
    function=t3_blocks.prefill,
    inputs=(Input(shape=(2, _TOKENS, 1024)), Input(shape=(_TOKENS, 64)), Input(shape=(_TOKENS, 64))),
)
T3_DECODE = Region(
    name="t3_decode",
    function=t3_blocks.decode,
    inputs=(
        Input(shape=(2, 1, 1024)),
        Input(shape=(MOST_PLACES, 64)),
        Input(shape=(MOST_PLACES, 64)),
        Input(shape=(1,), dtype=_LONG),
        Input(shape=(_PLACES, 2, t3_blocks.HEADS, t3_blocks.HEAD_SIZE)),
        Input(shape=(_PLACES, 2, t3_blocks.HEADS, t3_blocks.HEAD_SIZE)),
    ),
)
T3_SAMPLE = _sampling("t3_sample", t3_blocks.sample)
T3_SAMPLE_NUCLEUS = _sampling("t3_sample_nucleus", t3_blocks.sample_nucleus)
FLOW_ENCODER_LAYER = Region(
    name="flow_encoder_layer",
    function=flow_blocks.encoder_layer,
    inputs=(
        Input(shape=(1, _SPEECH, 512)),
        Input(shape=(1, Size(name="tokens", example=100, least=4, most=MOST_FRAMES, factor=2, offset=-1), 512)),
    ),
)
FLOW_RESNETS: Mapping[int, Region] = {channels: _resnet(channels) for channels in (320, 256, 512)}
FLOW_TRANSFORMER = Region(
    name="flow_transformer", function=flow_blocks.transformer, inputs=(Input(shape=(2, _FRAMES, 256)),)
)
FLOW_EULER = Region(
    name="flow_euler",
    function=flow_blocks.euler,
    inputs=(
        Input(shape=(2, _FRAMES, 256)),
        Input(shape=(1, _FRAMES, 80)),
        Input(shape=(1,)),
        Input(shape=(1,)),
    ),
)
VOCODER_PITCH = Region(name="vocoder_pitch", function=vocoder_blocks.pitch, inputs=(Input(shape=(1, 80, _FRAMES)),))
VOCODER_TRUNK = Region(
    name="vocoder_trunk",
    function=vocoder_blocks.trunk,
    inputs=(
        Input(shape=(1, 80, _FRAMES)),
        Input(
            shape=(
                1,
                2 * vocoder_blocks.BINS,
                Size(name="frames", example=300, least=4, most=MOST_FRAMES, factor=120, offset=1),
            )
        ),
    ),
)

REGIONS: Mapping[str, Region] = {
    region.name: region
    for region in (
        T3_PREFILL,
        T3_DECODE,
        T3_SAMPLE,
        T3_SAMPLE_NUCLEUS,
        FLOW_ENCODER_LAYER,
        *FLOW_RESNETS.values(),
        FLOW_TRANSFORMER,
        FLOW_EULER,
        VOCODER_PITCH,
        VOCODER_TRUNK,
    )
}
#: The regions of T3's step, which a CUDA graph may hold.
IN_GRAPHS = frozenset({T3_DECODE.name, T3_SAMPLE.name, T3_SAMPLE_NUCLEUS.name})
