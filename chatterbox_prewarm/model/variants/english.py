"""The English model: text → tokens → mel spectrogram → watermarked audio, from the tensors of a checkpoint.

Upstream's packages are not imported and its modules are not constructed: a start loads torch, numpy, safetensors,
tokenizers and soxr, and maps the tensors. `model.upstream` loads upstream's model, which voices from clips need.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from chatterbox_prewarm.errors import BadInputError, ModelError, WeightsError, first_line
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.regions.t3_prompt import START_SPEECH_TOKEN, START_TEXT_TOKEN, STOP_TEXT_TOKEN
from chatterbox_prewarm.model.regions.vocoder import SAMPLE_RATE, Vocoder
from chatterbox_prewarm.model.text import SPACE, normalize_punctuation
from chatterbox_prewarm.model.watermark import Watermark
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.tensor_shapes import check_tensors
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from chatterbox_prewarm.model.regions.executors import Executor

#: The parts of each file that a synthesis uses. S3Gen's other parts and the voice encoder make voices from clips.
_PARTS = {"t3_cfg": ("",), "s3gen": ("flow.", "mel2wav.")}
#: The parts of T3 that may run in another dtype than the checkpoint's.
_TRANSFORMER = ("tfmr.layers.", "tfmr.norm.")
#: `madvise(2)`, since Linux 5.14: map all pages now instead of one page fault each, and read missing pages from disk.
_MADV_POPULATE_READ = 22


@dataclass(frozen=True, kw_only=True, eq=False)
class English:
    """A loaded English model. Only one call may run at a time, because the decoder keeps state during a call.

    Attributes:
        tensors: the tensors by the stem of their file and their name in it, such as "t3_cfg.speech_head.weight".
        tokenizer: turns text into tokens.
        decoder: T3, draws speech tokens.
        flow: turns speech tokens into a mel spectrogram.
        vocoder: turns a mel spectrogram into a waveform.
        watermark: marks the waveform.
        device: a torch device as a string.
    """

    tensors: Mapping[str, torch.Tensor]
    tokenizer: Tokenizer
    decoder: T3Decoder
    flow: Flow
    vocoder: Vocoder
    watermark: Watermark
    device: str
    #: Of the audio, in Hz.
    sample_rate: int = SAMPLE_RATE
    #: The number of speech tokens that have a sound.
    codebook: int = START_SPEECH_TOKEN

    def text_tokens(self, text: str) -> torch.Tensor:
        """Return the text tokens that the decoder expects, int64 (1, n), with the start and the stop token."""
        ids = self.tokenizer.encode(normalize_punctuation(text).replace(" ", SPACE)).ids
        return torch.tensor([[START_TEXT_TOKEN, *ids, STOP_TEXT_TOKEN]], device=self.device)

    def marked(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add the watermark to mono audio, (samples,), at the model's sample rate."""
        return self.watermark.apply(samples, sample_rate=self.sample_rate)


def load(
    directory: Path,
    *,
    device: str = "cpu",
    executor: Executor = eager,
    t3_dtype: torch.dtype | None = None,
    graphs: bool = False,
) -> English:
    """Load the English model from a weights directory.

    On a CPU the tensors are mapped pages of the files. On a GPU each is loaded directly to the device.

    Args:
        directory: contains the variant's files and `weights.json`; `weights.record.check_quickly` has checked it.
        device: a torch device as a string, such as "cpu" or "cuda".
        executor: makes the regions callable.
        t3_dtype: of T3's transformer; None keeps the checkpoint's.
        graphs: capture T3's step as a CUDA graph.

    Raises:
        WeightsError: a tensor is missing, unknown, or has another shape or dtype, or the tokenizer is damaged.
        ModelError: torch sees no GPU, or the watermark's weights are missing.
        BadInputError: there is no GPU with this number.
    """
    record = read_record(directory)
    if record.variant != ENGLISH.name:
        raise WeightsError(
            f"{directory} contains the variant {record.variant!r}, not {ENGLISH.name!r}",
            next_step="give the directory of the English weights",
        )
    check_tensors(directory, ENGLISH, record.synthetic)
    check_device(device)
    tensors = dict(_read(directory, device, t3_dtype))
    populate(tensors)
    return English(
        tensors=tensors,
        tokenizer=read_tokenizer(directory / "tokenizer.json"),
        decoder=T3Decoder(NamedTensors(tensors, "t3_cfg."), executor, dtype=t3_dtype, graphs=graphs),
        flow=Flow(NamedTensors(tensors, "s3gen.flow."), executor),
        vocoder=Vocoder(NamedTensors(tensors, "s3gen.mel2wav."), executor),
        watermark=Watermark(),
        device=device,
    )


def _read(directory: Path, device: str, t3_dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of a synthesis. Half-precision files become float32, as in upstream.

    The transformer is cast here, so that memory holds it once.
    """
    for stem, parts in _PARTS.items():
        path = directory / f"{stem}.safetensors"
        try:
            with safe_open(path, framework="pt", device=device) as file:  # type: ignore[no-untyped-call]
                for name in file.keys():  # noqa: SIM118 - this is no dictionary
                    if name.startswith(parts):
                        tensor = file.get_tensor(name)
                        narrow = stem == "t3_cfg" and name.startswith(_TRANSFORMER)
                        yield f"{stem}.{name}", tensor.to((t3_dtype if narrow else None) or torch.float32)
        except SafetensorError as error:
            raise WeightsError(
                f"{path} is not a safetensors file: {error}",
                next_step="check that the files belong to this variant with `chatterbox-prewarm weights verify`",
            ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer.

    Raises:
        WeightsError: it is damaged, or lacks the tokens that every text needs.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        missing = [token for token in ("[START]", "[STOP]", SPACE) if tokenizer.token_to_id(token) is None]
    except Exception as error:  # tokenizers raises Exception itself
        missing, cause = [], first_line(error)
        raise _tokenizer_error(path, cause) from error
    if missing:
        raise _tokenizer_error(path, f"it lacks the token {missing[0]}")
    return tokenizer


def _tokenizer_error(path: Path, cause: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a tokenizer for this model: {cause}",
        next_step="use the tokenizer of the published checkpoint, or the one that this T3 was trained with",
    )


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


def populate(tensors: Mapping[str, torch.Tensor]) -> None:
    """Map all pages of tensors on the CPU at once, so that the first synthesis causes no page faults.

    The page faults of 3 GB took 0.4 s of the first synthesis; this call takes 0.06 s. An older kernel refuses it, which
    does no harm.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors.values():
        if tensor.device.type == "cpu":
            begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            madvise(begin, tensor.data_ptr() + tensor.nbytes - begin, _MADV_POPULATE_READ)
