"""The regions: parts of the model that are compiled separately, written as pure functions of tensors.

An executor (`executors.py`) runs a region with plain PyTorch, `torch.compile` or an ahead-of-time package; the call is
the same for all three. Weights are arguments, so one artifact serves every block of a stack and every checkpoint.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.model.regions import flow_blocks, gpt_blocks, t3_blocks, vocoder_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Shape = tuple[int | "Size", ...]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A dimension whose length differs between calls: `factor` times a named length, plus `offset`.

    Attributes:
        name: of the length. Within a region, dimensions with the same name share one length.
        example: a value of the length for compilation; not 0, not 1 and not the length of another dimension.
        minimum, maximum: the bounds of the length.
    """

    name: str
    example: int
    minimum: int
    maximum: int
    factor: int = 1
    offset: int = 0

    @property
    def length(self) -> int:
        """The size of this dimension in the example."""
        return self.factor * self.example + self.offset


@dataclass(frozen=True, kw_only=True)
class Input:
    """An argument of a region after its weights. A `dtype` of None means the dtype of the weights."""

    shape: Shape
    dtype: torch.dtype | None = None

    def example(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Return a valid tensor for this argument."""
        shape = [size.length if isinstance(size, Size) else size for size in self.shape]
        # Zeros are valid as indices too. The compiled code does not depend on values.
        return torch.zeros(shape, device=device, dtype=self.dtype or dtype)

    @property
    def dynamic(self) -> dict[int, Size]:
        """The dimensions whose length differs between calls, by index."""
        return {index: size for index, size in enumerate(self.shape) if isinstance(size, Size)}


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the model that is compiled separately.

    Attributes:
        name: of the region and of its package.
        function: takes weights and inputs, all of them tensors, and returns a tuple of tensors.
        inputs: the arguments that follow the weights.
    """

    name: str
    function: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[Input, ...]


#: The largest KV cache: the longest text that T3 has position embeddings for, the voice prompt and 40 s of speech.
MAX_POSITIONS = 3328
#: Mel frames (50 per second) of the longest voice prompt and utterance, with a margin.
MAX_FRAMES = 4096

_TOKENS = Size(name="tokens", example=40, minimum=2, maximum=MAX_POSITIONS)
_POSITIONS = Size(name="positions", example=384, minimum=2, maximum=MAX_POSITIONS)
_SPEECH = Size(name="tokens", example=100, minimum=4, maximum=MAX_FRAMES)
_FRAMES = Size(name="frames", example=300, minimum=4, maximum=MAX_FRAMES)
#: Number of speech tokens, special ones included.
_VOCABULARY = 8194
_GPT_VOCABULARY = 6563


def _region(name: str, function: Callable[..., tuple[torch.Tensor, ...]], *inputs: Input | Shape) -> Region:
    """Define a region. An input without a dtype is given as its shape."""
    given = (entry if isinstance(entry, Input) else Input(shape=entry) for entry in inputs)
    return Region(name=name, function=function, inputs=tuple(given))


def _sampling(name: str, function: Callable[..., tuple[torch.Tensor, ...]]) -> Region:
    return _region(
        name,
        function,
        (2, 1024),
        Input(shape=(len(t3_blocks.CONTROLS),), dtype=torch.float32),
        Input(shape=(_VOCABULARY,), dtype=torch.float32),
        Input(shape=(_VOCABULARY,), dtype=torch.bool),
        Input(shape=(1,), dtype=torch.int64),
        Input(shape=(1,), dtype=torch.int64),
    )


_CACHE = (_POSITIONS, 2, t3_blocks.HEADS, t3_blocks.HEAD_SIZE)
T3_PREFILL = _region("t3_prefill", t3_blocks.prefill, (2, _TOKENS, 1024), (_TOKENS, 64), (_TOKENS, 64))
_STEP = (
    (2, 1, 1024),
    (MAX_POSITIONS, 64),
    (MAX_POSITIONS, 64),
    Input(shape=(1,), dtype=torch.int64),
    _CACHE,
    _CACHE,
)
T3_DECODE = _region("t3_decode", t3_blocks.decode, *_STEP)
T3_DECODE_ALIGNED = _region(
    "t3_decode_aligned", t3_blocks.decode_aligned, *_STEP, Input(shape=(t3_blocks.HEADS,), dtype=torch.float32)
)


@dataclass(frozen=True, kw_only=True)
class GptRegions:
    """The regions of a GPT-2 with one width. torch.export fixes a size of 1, so one token has a region of its own."""

    prefill: Region
    decode: Region
    sample: Region

    @staticmethod
    def of(width: int) -> GptRegions:
        """Define the regions of a width, which their names contain."""
        place, vocabulary = Input(shape=(1,), dtype=torch.int64), _GPT_VOCABULARY
        cache = (_POSITIONS, 1, width // t3_blocks.HEAD_SIZE, t3_blocks.HEAD_SIZE)
        return GptRegions(
            prefill=_region(f"t3_gpt_prefill_{width}", gpt_blocks.block, (1, _TOKENS, width), place, cache, cache),
            decode=_region(f"t3_gpt_decode_{width}", gpt_blocks.block, (1, 1, width), place, cache, cache),
            sample=_region(
                f"t3_gpt_sample_{width}",
                gpt_blocks.sample,
                (1, width),
                Input(shape=(len(gpt_blocks.CONTROLS),), dtype=torch.float32),
                Input(shape=(vocabulary,), dtype=torch.float32),
                Input(shape=(vocabulary,), dtype=torch.bool),
                place,
                place,
            ),
        )


#: By the width of the model.
GPT_REGIONS: Mapping[int, GptRegions] = {width: GptRegions.of(width) for width in (1024, 768)}
T3_SAMPLE = _sampling("t3_sample", t3_blocks.sample)
T3_SAMPLE_NUCLEUS = _sampling("t3_sample_nucleus", t3_blocks.sample_nucleus)
FLOW_ENCODER_LAYER = _region(
    "flow_encoder_layer",
    flow_blocks.encoder_layer,
    (1, _SPEECH, 512),
    (1, dataclasses.replace(_SPEECH, factor=2, offset=-1), 512),
)


@dataclass(frozen=True, kw_only=True)
class EstimatorRegions:
    """The regions of the flow's estimator.

    Attributes:
        resnets: by their number of channels.
        transformer: of all blocks.
        step: the last convolutions and one step of the integration.
    """

    resnets: Mapping[int, Region]
    transformer: Region
    step: Region

    @staticmethod
    def of(prefix: str, rows: int, step: Region) -> EstimatorRegions:
        """Define the regions for a number of rows."""
        return EstimatorRegions(
            resnets={
                channels: _region(
                    f"{prefix}_resnet_{channels}", flow_blocks.resnet, (rows, _FRAMES, channels), (1, 1024)
                )
                for channels in (320, 256, 512)
            },
            transformer=_region(f"{prefix}_transformer", flow_blocks.transformer, (rows, _FRAMES, 256)),
            step=step,
        )

    @property
    def all(self) -> tuple[Region, ...]:
        """All of these regions."""
        return (*self.resnets.values(), self.transformer, self.step)


_FLOW_EULER = _region("flow_euler", flow_blocks.euler, (2, _FRAMES, 256), (1, _FRAMES, 80), (1,), (1,))
_FLOW_MEAN_STEP = _region("flow_mean_step", flow_blocks.mean_step, (1, _FRAMES, 256), (1, _FRAMES, 80), (1,))
#: With guidance, and without it for a mean flow.
FLOW_GUIDED = EstimatorRegions.of("flow", 2, _FLOW_EULER)
FLOW_MEAN = EstimatorRegions.of("flow_mean", 1, _FLOW_MEAN_STEP)
VOCODER_PITCH = _region("vocoder_pitch", vocoder_blocks.pitch, (1, 80, _FRAMES))
VOCODER_TRUNK = _region(
    "vocoder_trunk",
    vocoder_blocks.trunk,
    (1, 80, _FRAMES),
    (1, 2 * vocoder_blocks.BINS, dataclasses.replace(_FRAMES, factor=120, offset=1)),
)

#: The regions that the models with a Llama and a guided flow share.
COMMON_REGIONS: Mapping[str, Region] = {
    region.name: region
    for region in (
        T3_PREFILL,
        T3_DECODE,
        T3_SAMPLE,
        T3_SAMPLE_NUCLEUS,
        FLOW_ENCODER_LAYER,
        *FLOW_GUIDED.all,
        VOCODER_PITCH,
        VOCODER_TRUNK,
    )
}
_GPT = tuple(region for group in GPT_REGIONS.values() for region in (group.prefill, group.decode, group.sample))
REGIONS: Mapping[str, Region] = {
    **COMMON_REGIONS,
    **{region.name: region for region in (T3_DECODE_ALIGNED, *_GPT, *FLOW_MEAN.all)},
}
#: The regions of T3's step, which a CUDA graph may contain.
IN_GRAPHS = frozenset(
    region.name
    for region in (
        *(T3_DECODE, T3_DECODE_ALIGNED, T3_SAMPLE, T3_SAMPLE_NUCLEUS),
        *(region for group in GPT_REGIONS.values() for region in (group.decode, group.sample)),
    )
)
