"""A loaded model: text → tokens → mel spectrogram → watermarked audio, from the tensors of a checkpoint.

Upstream's packages are not imported and its modules are not constructed: a start loads torch, numpy, safetensors,
tokenizers and soxr, and maps the tensors. `model.upstream` loads upstream's model, which voices from clips need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.t3_blocks import START_SPEECH_TOKEN
from chatterbox_prewarm.model.regions.vocoder import SAMPLE_RATE, SAMPLES_PER_FRAME, Vocoder
from chatterbox_prewarm.model.variants import code_of, default_sampling
from chatterbox_prewarm.model.watermark import Watermark
from chatterbox_prewarm.model.without_t3 import no_decoder, no_text
from chatterbox_prewarm.weights.mapped import CONVERSION, SYNTHESIS, MappedWeights
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.tensor_shapes import check_tensors
from chatterbox_prewarm.weights.variants import get_variant

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from chatterbox_prewarm.model.regions.decoder import TokenDecoder
    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.sampling import Sampling
    from chatterbox_prewarm.model.upstream_source import Behaviour
    from chatterbox_prewarm.model.variants import TextFrontEnd
    from chatterbox_prewarm.weights.variants import Variant

#: The parts of T3 that may run in another dtype than the checkpoint's.
_TRANSFORMER = ("tfmr.layers.", "tfmr.norm.", "tfmr.h.", "tfmr.ln_f.")
#: A speech token is 40 ms of audio, two mel frames.
_SAMPLES_PER_TOKEN = 2 * SAMPLES_PER_FRAME
#: Torch's dtypes by their names in safetensors files.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A loaded model. Only one call may run at a time, because the decoder keeps state during a call.

    Attributes:
        variant: what the model is.
        behaviour: details of this variant.
        tensors: the tensors by the part of the model and their name in its file, such as "t3.speech_head.weight".
        text: turns text into tokens; see `without_t3` for a model that only converts speech.
        decoder: T3, draws speech tokens; see `without_t3`, too.
        flow: turns speech tokens into a mel spectrogram.
        vocoder: turns a mel spectrogram into a waveform.
        watermark: marks the waveform.
        device: a torch device as a string.
        sample_rate: of the audio, in Hz.
        codebook: the number of speech tokens that have a sound.
    """

    variant: Variant
    behaviour: Behaviour
    tensors: Mapping[str, torch.Tensor]
    text: TextFrontEnd
    decoder: TokenDecoder
    flow: Flow
    vocoder: Vocoder
    watermark: Watermark
    device: str
    sample_rate: int = SAMPLE_RATE
    codebook: int = START_SPEECH_TOKEN

    @property
    def sampling(self) -> Sampling:
        """The sampling settings that upstream uses by default."""
        return default_sampling(self.variant)

    def text_tokens(self, text: str, language: str | None = None) -> torch.Tensor:
        """Return the text tokens that the decoder expects, int64 (1, n), with the tokens around the text.

        Args:
            text: the text to speak.
            language: a code of the variant's languages; None chooses the first one.

        Raises:
            BadInputError: the variant does not speak this language.
        """
        ids, frame = self.text.ids(text, self.variant.check_language(language)), self.text.frame
        return torch.tensor([[*frame.start, *ids, *frame.stop]], device=self.device)

    def heard_samples(self, tokens: int) -> int | None:
        """Return how many samples of an utterance of so many tokens are heard; None for all."""
        dropped = self.behaviour.dropped_tokens
        return max(1, tokens - dropped) * _SAMPLES_PER_TOKEN if dropped else None

    def marked(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add the watermark to mono audio, (samples,), at the model's sample rate."""
        return self.watermark.apply(samples, sample_rate=self.sample_rate)


def load(  # noqa: PLR0913 - keyword arguments, most of which have defaults
    weights: Path | MappedWeights,
    *,
    device: str = "cpu",
    executor: Executor = eager,
    t3_dtype: torch.dtype | None = None,
    graphs: bool = False,
    plain_text: Collection[str] = (),
    converts: bool = False,
) -> Model:
    """Load the model in a weights directory.

    On a CPU the tensors are mapped pages of the files. On a GPU each is loaded directly to the device.

    Args:
        weights: the directory with the variant's files and `weights.json`, or its files, if they are mapped
            already. `weights.record.check_quickly` has checked it.
        device: a torch device as a string, such as "cpu" or "cuda".
        executor: makes the regions callable.
        t3_dtype: of T3's transformer; None keeps the checkpoint's.
        graphs: capture T3's step as a CUDA graph.
        plain_text: languages whose texts may lack the marks that their pronunciation needs.
        converts: load what converts speech, and not what speaks texts.

    Raises:
        WeightsError: a tensor is missing, unknown, or has another shape or dtype, or a file of the text is damaged.
        ModelError: torch sees no GPU, or the watermark's weights or a package are missing.
        BadInputError: there is no GPU with this number.
    """
    directory = weights if isinstance(weights, Path) else weights.directory
    record = read_record(directory)
    variant = get_variant(record.variant)
    check_tensors(directory, variant, record.synthetic)
    check_device(device)
    if isinstance(weights, Path):
        weights = MappedWeights(directory, variant, CONVERSION if converts else SYNTHESIS)
    weights.populate()
    tensors = dict(read_tensors(weights, device, t3_dtype))
    code, t3 = code_of(variant), NamedTensors(tensors, "t3.")
    if converts:
        text, decoder = no_text(), no_decoder()
    else:
        text = code.read_text(directory, variant, frozenset(plain_text))
        decoder = code.decoder(variant, t3, executor, dtype=t3_dtype, graphs=graphs)
    return Model(
        variant=variant,
        behaviour=code.behaviour(variant),
        tensors=tensors,
        text=text,
        decoder=decoder,
        flow=Flow(NamedTensors(tensors, "s3gen.flow."), executor),
        vocoder=Vocoder(NamedTensors(tensors, "s3gen.mel2wav."), executor),
        watermark=Watermark(),
        device=device,
    )


def read_tensors(
    mapped: MappedWeights, device: str, t3_dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Make the tensors of a synthesis: on a CPU mapped pages, on a GPU one copy of each.

    Half-precision files become float32, as in upstream. The transformer is cast here, so that memory holds it once.
    """
    for file in mapped.files:
        for name in file.used:
            dtype, shape = file.header.tensors[name]
            pages = torch.frombuffer(
                file.memory, dtype=_DTYPES[dtype], count=math.prod(shape), offset=file.header.offsets[name]
            )
            narrow = file.part == "t3" and name.startswith(_TRANSFORMER)
            tensor = pages.view(shape).to(device)
            yield f"{file.part}.{name}", tensor.to((t3_dtype if narrow else None) or torch.float32)


def check_device(device: str) -> None:
    """Refuse a GPU that torch cannot use, although the machine has one: a driver that is too old, for example.

    Raises:
        BadInputError: torch sees no GPU with this number.
        ModelError: torch sees no GPU.
    """
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ModelError(f"the device {device!r} cannot be used: torch sees no GPU", next_step="use the device cpu")
    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise BadInputError(
            f"there is no device {device!r}: torch sees {torch.cuda.device_count()} GPU(s), numbered from 0",
            next_step="use one of these numbers",
        )
