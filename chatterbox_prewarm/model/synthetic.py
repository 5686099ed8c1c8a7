"""Checkpoints of random weights with the real architecture, for tests, demos and closed networks. They output noise.

The files have the names, keys, dtypes and shapes of the published ones; `mini` has fewer layers in each stack. The
tokenizer's vocabulary consists of characters instead of trained merges, and the voice is random.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox
from chatterbox_prewarm.model.upstream import make_t3, shorten_s3gen
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.system.atomic_files import put_in_place, staging_folder
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.weights.record import RECORD_NAME, Synthetic, WeightsRecord, read_record, record
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from chatterbox_prewarm.weights.variants import Variant

logger = logging.getLogger(__name__)

SIZES = ("full", "mini")
REPOSITORY = "synthetic"

#: Lengths of the random voice prompt in S3 speech tokens (25 per second). A published voice has up to 10 s.
_PROMPT_TOKENS = {"full": 75, "mini": 25}


@contextlib.contextmanager
def shortened_upstream(variant: Variant, synthetic: Synthetic | None) -> Iterator[None]:
    """Make upstream's own loading construct the short stacks of a `mini` checkpoint, for benchmarks and tests."""
    if synthetic is None or synthetic.t3_layers is None or synthetic.s3gen_blocks is None:
        yield
        return
    module: Any = sys.modules[code_of(variant).upstream_class().__module__]
    full_t3, full_s3gen, blocks = module.T3, module.S3Gen, synthetic.s3gen_blocks

    def s3gen(**arguments: Any) -> nn.Module:
        model: nn.Module = full_s3gen(**arguments)
        shorten_s3gen(model, blocks)
        return model

    module.T3, module.S3Gen = lambda *_: make_t3(variant, synthetic.t3_layers), s3gen
    try:
        yield
    finally:
        module.T3, module.S3Gen = full_t3, full_s3gen


def synthesize(directory: Path, *, size: str, seed: int, variant: Variant = DEFAULT_VARIANT) -> WeightsRecord:
    """Write a checkpoint of random weights into `directory` atomically, and replace an existing synthetic checkpoint.

    Args:
        directory: created if it does not exist.
        size: "full" (3.2 GB, the published architecture) or "mini" (two layers in each stack).
        seed: of torch's generator. The same seed gives the same bytes with the same version of torch.
        variant: whose architecture the checkpoint has.

    Raises:
        BadInputError: the size is unknown, or the directory cannot be written or has a file that no synthesis wrote.
    """
    if size not in SIZES:
        raise BadInputError(f"unknown synthetic size {size!r}", next_step=f"choose one of: {', '.join(SIZES)}")
    layers = None if size == "full" else 2
    synthetic = Synthetic(size=size, seed=seed, t3_layers=layers, s3gen_blocks=layers)
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 - gives "." a name, and does not resolve links
    _check_replaceable(directory)
    import_chatterbox()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(directory), staging_folder(directory) as staging:
            _write(staging, variant, synthetic)
            weights_record = record(
                staging, variant=variant, repository=REPOSITORY, revision=f"{size}-seed-{seed}", synthetic=synthetic
            )
            _check_replaceable(directory)  # generating the weights takes minutes
            put_in_place(staging, directory)
    except OSError as error:
        raise from_os_error(error, "writing the synthetic weights") from error
    except SafetensorError as error:  # its message contains the operating system's error
        raise BadInputError(
            f"writing the synthetic weights: {error}", next_step="free some space there, or give another directory"
        ) from error
    return weights_record


def _check_replaceable(directory: Path) -> None:
    """Check that a new checkpoint replaces only files that an earlier synthesis wrote, or nothing.

    Raises:
        BadInputError: naming a file that would be lost.
        WeightsError: the record of the checkpoint cannot be read.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise BadInputError(f"{directory} is not a directory", next_step="give an empty or a new directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not (directory / RECORD_NAME).exists():
        raise BadInputError(f"{directory} does not contain a checkpoint", next_step="give an empty or a new directory")
    weights_record = read_record(directory)
    if weights_record.synthetic is None:
        raise BadInputError(
            f"{directory} contains a checkpoint that is not synthetic", next_step="give another directory"
        )
    recorded = [file for file in weights_record.files if (directory / file.path).is_file()]
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    others = files - {RECORD_NAME, *(file.path for file in recorded)}
    if others:
        raise BadInputError(
            f"{directory / min(others)} does not belong to the synthetic checkpoint {directory}, and would be removed",
            next_step="move it to another folder, or give another directory",
        )
    if changed := verify_files(recorded, directory):
        raise BadInputError(
            f"a file in {directory} was changed after the synthesis, and would be replaced: {changed[0]}",
            next_step="move it to another folder, or give another directory",
        )


def _write(directory: Path, variant: Variant, synthetic: Synthetic) -> None:
    from chatterbox.models.s3gen import S3Gen
    from chatterbox.models.voice_encoder import VoiceEncoder
    from chatterbox.tts import Conditionals, T3Cond

    prompt = _PROMPT_TOKENS[synthetic.size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(synthetic.seed)
        logger.info("generating random weights: T3")
        _save(make_t3(variant, synthetic.t3_layers), directory / variant.t3)
        # Again, so that two variants get the same S3Gen and voice encoder, as the published ones do.
        torch.manual_seed(synthetic.seed)
        logger.info("generating random weights: S3Gen")
        s3gen = S3Gen(**code_of(variant).s3gen_arguments())
        if synthetic.s3gen_blocks is not None:
            shorten_s3gen(s3gen, synthetic.s3gen_blocks)
        _save(s3gen, directory / variant.s3gen)
        logger.info("generating random weights: voice encoder")
        _save(VoiceEncoder(), directory / variant.voice_encoder)
        voice = Conditionals(
            T3Cond(
                speaker_emb=torch.nn.functional.normalize(torch.randn(1, 256)),
                cond_prompt_speech_tokens=torch.randint(0, 6561, (1, variant.prompt_tokens)),
                emotion_adv=0.5 * torch.ones(1, 1, 1),
            ),
            {
                "prompt_token": torch.randint(0, 6561, (1, prompt)),
                "prompt_token_len": torch.tensor([prompt]),
                "prompt_feat": torch.randn(1, 2 * prompt, 80) - 5.0,  # typical log-mel values are around -5
                "prompt_feat_len": None,
                "embedding": torch.randn(1, 192),
            },
        )
        pickled = io.BytesIO()
        voice.save(pickled)
        (directory / variant.builtin_voice).write_bytes(pickled.getvalue())
    code_of(variant).write_synthetic_text(directory, variant)


def _save(module: nn.Module, path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}, path)
