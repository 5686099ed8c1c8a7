"""The English model: constructed without initialisation, its weights mapped from the files without a copy."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from chatterbox_prewarm.errors import BadInputError, ModelError, WeightsError
from chatterbox_prewarm.model.lean_imports import import_chatterbox, paused_gc
from chatterbox_prewarm.weights.record import Synthetic, check_quickly, read_record
from chatterbox_prewarm.weights.safetensors_header import read_safetensors_header
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox.models.t3 import T3
    from chatterbox.tts import ChatterboxTTS

logger = logging.getLogger(__name__)

#: Constants that upstream computes in the constructor and published files may lack (`S3Token2Wav`).
_COMPUTED = frozenset({"tokenizer._mel_filters", "tokenizer.window"})
_SHORT_LLAMA = "chatterbox_prewarm_{layers}_layers"
#: `madvise(2)`, since Linux 5.14: map the pages now, reading what is not in the page cache, instead of one fault each.
_MADV_POPULATE_READ = 22


def load(directory: Path, *, device: str = "cpu") -> ChatterboxTTS:
    """Build `ChatterboxTTS` from a weights directory, equal tensor for tensor to `ChatterboxTTS.from_local`.

    On a CPU the parameters are the mapped pages of the files themselves; on a GPU each file goes straight to the
    device. The voice (`conds`) is left unset: it comes from the warm state, or is prepared by the caller.

    Args:
        directory: holds the variant's files and `weights.json`.
        device: a torch device as upstream takes it, a string such as "cpu" or "cuda".

    Raises:
        WeightsError: a file is missing, truncated, or has tensors of other names or shapes.
        ModelError: the packages that make up the model cannot be imported.
    """
    record = read_record(directory)
    if record.variant != ENGLISH.name:
        raise WeightsError(
            f"{directory} holds the variant {record.variant!r}, not {ENGLISH.name!r}",
            next_step="name the directory of the English weights",
        )
    check_quickly(directory, record)
    check_device(device)
    read_ahead(directory)
    import_chatterbox()

    from chatterbox.models.tokenizers import EnTokenizer
    from chatterbox.tts import ChatterboxTTS

    with paused_gc():
        t3, s3gen, ve = construct(record.synthetic)
        _assign(ve, directory / "ve.safetensors", device)
        _assign(t3, directory / "t3_cfg.safetensors", device)
        _assign(s3gen, directory / "s3gen.safetensors", device, may_lack=_COMPUTED, may_have_more=True)
        for module in (ve, t3, s3gen):
            module.to(device).eval()
            populate(module)
        return ChatterboxTTS(t3, s3gen, ve, EnTokenizer(str(directory / "tokenizer.json")), device)


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        BadInputError: no device of a kind that Chatterbox runs on, or no GPU of that number.
        ModelError: a GPU is asked for and torch sees none.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in {"cpu", "cuda"}:
        raise BadInputError(f"there is no device {device!r}", next_step="use --device cpu, cuda, or cuda:NUMBER")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"the device {device!r} cannot be used: torch sees no GPU", next_step="use --device cpu")
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise BadInputError(
            f"there is no device {device!r}: torch sees {torch.cuda.device_count()} GPU(s), numbered from 0",
            next_step="name one of them",
        )


def read_ahead(directory: Path) -> None:
    """Ask the kernel to read the tensor files into the page cache while imports keep this process busy."""
    for name in ENGLISH.safetensors:
        descriptor = os.open(directory / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def populate(module: nn.Module) -> None:
    """Map the pages of a module's parameters at once, so that its first forward does not fault them in one by one.

    Page faults of 3 GB took 0.4 s of the first synthesis, and this takes 0.06 s. An older kernel refuses, and nothing
    is lost.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for parameter in module.parameters():
        if parameter.device.type != "cpu":
            continue
        begin = parameter.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(begin, parameter.data_ptr() + parameter.nbytes - begin, _MADV_POPULATE_READ)


def construct(synthetic: Synthetic | None) -> tuple[T3, nn.Module, nn.Module]:
    """Make T3, S3Gen and the voice encoder with parameters of undefined content.

    Args:
        synthetic: for a shortened checkpoint, how many layers each stack keeps.
    """
    from chatterbox.models.s3gen import S3Gen
    from chatterbox.models.voice_encoder import VoiceEncoder

    from chatterbox_prewarm.model.uninitialized import Uninitialized

    with Uninitialized():
        t3 = make_t3(synthetic.t3_layers if synthetic else None)
        s3gen = S3Gen()
        ve = VoiceEncoder()
    if synthetic and synthetic.s3gen_blocks is not None:
        shorten_s3gen(s3gen, synthetic.s3gen_blocks)
    return t3, s3gen, ve


def make_t3(layers: int | None, *, multilingual: bool = False) -> T3:
    """Construct T3, with fewer transformer layers than published when `layers` is given."""
    from chatterbox.models.t3 import T3
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
    from chatterbox.models.t3.modules.t3_config import T3Config

    config = T3Config.multilingual() if multilingual else T3Config.english_only()
    if layers is not None:
        # Upstream looks its transformer up by name, so a shorter one is an entry of that table.
        name = _SHORT_LLAMA.format(layers=layers)
        LLAMA_CONFIGS[name] = {**LLAMA_CONFIGS[config.llama_config_name], "num_hidden_layers": layers}
        config.llama_config_name = name
    return T3(config)


def shorten_s3gen(s3gen: nn.Module, blocks: int) -> None:
    """Cut S3Gen's four deep stacks to `blocks` each; every kept layer has its published shape."""
    encoder, estimator = s3gen.flow.encoder, s3gen.flow.decoder.estimator  # type: ignore[union-attr]
    encoder.encoders = encoder.encoders[:blocks]  # type: ignore[union-attr,index]
    encoder.up_encoders = encoder.up_encoders[:blocks]  # type: ignore[union-attr,index]
    estimator.mid_blocks = estimator.mid_blocks[:blocks]  # type: ignore[union-attr,index]
    tokenizer = s3gen.tokenizer.encoder  # type: ignore[union-attr]
    tokenizer.blocks = tokenizer.blocks[:blocks]  # type: ignore[union-attr,index]


def _assign(
    module: nn.Module,
    path: Path,
    device: str,
    *,
    may_lack: frozenset[str] = frozenset(),
    may_have_more: bool = False,
) -> None:
    """Make the tensors of a file the module's own.

    Raises:
        WeightsError: naming the first tensor that is missing, unexpected, or of another shape.
    """
    expected = module.state_dict()
    found = read_safetensors_header(path)
    step = "check that the files belong to this variant with `chatterbox-prewarm weights verify`"
    if missing := sorted(expected.keys() - found.keys() - may_lack):
        raise WeightsError(f"{path} lacks {len(missing)} tensor(s), the first: {missing[0]}", next_step=step)
    if extra := sorted(found.keys() - expected.keys()):
        if not may_have_more:
            raise WeightsError(f"{path} has {len(extra)} unknown tensor(s), the first: {extra[0]}", next_step=step)
        logger.info("%s: %d tensors that the model has no place for are left out", path.name, len(extra))
    for name, (_, shape) in found.items():
        if name in expected and tuple(expected[name].shape) != shape:
            raise WeightsError(
                f"{path}: {name} has shape {list(shape)}, the model needs {list(expected[name].shape)}", next_step=step
            )
    try:
        tensors = load_file(path, device=device)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}", next_step=step) from error
    module.load_state_dict(
        # The cast is for half-precision files alone: upstream would copy them into float32 parameters too.
        {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items() if name in expected},
        strict=False,
        assign=True,
    )
