"""The file of an added voice: its conditionals for each model of the server, as safetensors, with their origin.

The tensors of a model are named `VARIANT/t3.NAME` and `VARIANT/gen.NAME` in schema 2. A file for one model has
schema 1, and no variant in the names of the tensors.

Every check that does not need torch is here. The front runs it before it lists a voice, and a worker before it loads
one: another version of this package may have written the file, for another checkpoint, or anyone with access.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.voices.voice_errors import UnusableVoiceError
from chatterbox_prewarm.system.regular_files import NotRegularError, open_regular
from chatterbox_prewarm.weights.safetensors_header import parse_safetensors_header
from chatterbox_prewarm.weights.variants import VARIANTS, get_variant

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from chatterbox_prewarm.weights.safetensors_header import Header

SCHEMA = 2
SUFFIX = ".safetensors"
#: S3Gen's longest reference, 10 s, makes 170 kB for each model.
MAX_BYTES = len(VARIANTS) << 20
#: Begins the name of the metadata with the set digest of a model's checkpoint; the variant follows.
_WEIGHTS = "weights:"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGITS = re.compile(r"[0-9]{1,12}")
#: Dtype and allowed dimensions of each tensor. S3Gen takes 10 s at 25 tokens per second. T3's tokens have the limit of
#: their variant.
_TENSORS: dict[str, tuple[str, tuple[range, ...]]] = {
    "t3.speaker_emb": ("F32", (range(1, 2), range(256, 257))),
    "t3.cond_prompt_speech_tokens": ("I64", (range(1, 2), range(1, sys.maxsize))),
    "t3.emotion_adv": ("F32", (range(1, 2), range(1, 2), range(1, 2))),
    "gen.prompt_token": ("I64", (range(1, 2), range(1, 252))),
    "gen.prompt_token_len": ("I64", (range(1, 2),)),
    "gen.prompt_feat": ("F32", (range(1, 2), range(2, 504), range(80, 81))),
    "gen.embedding": ("F32", (range(1, 2), range(192, 193))),
}
_ADD_AGAIN = "delete it and add the voice again"


def make_metadata(weights: Mapping[str, str], *, clip_sha256: str) -> dict[str, str]:
    """Return the safetensors metadata of a voice that is created now.

    Args:
        weights: set digest of the checkpoint by the variant of each model.
        clip_sha256: SHA-256 of the WAV file that the conditionals were computed from, in hexadecimal.
    """
    origin = {"created": str(int(time.time())), "clip_sha256": clip_sha256}  # seconds since the epoch
    if len(weights) == 1:  # replicas of an older version, which have one model, read this
        ((variant, digest),) = weights.items()
        return {**origin, "schema": "1", "variant": variant, "weights": digest}
    return {
        **origin,
        "schema": str(SCHEMA),
        **{f"{_WEIGHTS}{variant}": digest for variant, digest in weights.items()},
    }


def tensor_prefix(variant: str, names: Collection[str]) -> str:
    """Return what stands before the names of a model's tensors in a file with these names."""
    return f"{variant}/" if any("/" in name for name in names) else ""


def read_file(directory: Path, name: str) -> bytes:
    """Read the file of a voice. This follows no link and does not block on a pipe.

    Args:
        directory: directory of the added voices.
        name: a name that `text.check_voice_name` has accepted.

    Returns:
        the content; of a file that is too large, the first `MAX_BYTES` + 1 bytes, which `check_bytes` refuses.

    Raises:
        UnusableVoiceError: it is not a regular file.
        OSError: the file cannot be read.
    """
    path = directory / f"{name}{SUFFIX}"
    try:
        with open_regular(path) as stream:
            return stream.read(MAX_BYTES + 1)
    except NotRegularError as error:
        raise UnusableVoiceError(str(error.strerror), next_step="delete it") from error


@dataclass(frozen=True, kw_only=True)
class CheckedFile:
    """The result of `check_bytes`.

    Attributes:
        created: when the voice was created, in seconds since the epoch.
        problems: why a model cannot use the voice, by its variant. A model that can use it has no entry.
    """

    created: int
    problems: Mapping[str, str]


def check_bytes(data: bytes, models: Mapping[str, str]) -> CheckedFile:
    """Check the content of a voice's file without torch.

    Args:
        data: the whole file.
        models: set digest of the checkpoint by the variant of each model that will speak with the voice.

    Raises:
        UnusableVoiceError: the file is damaged, or no model can use it.
    """
    if len(data) > MAX_BYTES:
        raise UnusableVoiceError(f"it is larger than {MAX_BYTES} bytes", next_step="delete it")
    try:
        header = parse_safetensors_header(io.BytesIO(data), len(data))
    except ValueError as error:
        raise UnusableVoiceError(f"it is not a safetensors file: {str(error)[:200]}", next_step=_ADD_AGAIN) from error
    if header.size != len(data):
        raise UnusableVoiceError(
            f"it has {len(data)} bytes, but its header describes {header.size} bytes", next_step=_ADD_AGAIN
        )
    created, recorded = _read_metadata(header.metadata)
    problems: dict[str, UnusableVoiceError] = {}
    for variant, weights in models.items():
        try:
            _check_model(header, recorded, variant, weights)
        except UnusableVoiceError as error:
            problems[variant] = error
    if len(problems) == len(models):
        raise next(iter(problems.values()))
    return CheckedFile(created=created, problems={name: error.message for name, error in problems.items()})


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of a voice's file in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _read_metadata(metadata: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """Return when a voice was created, and the set digest of the checkpoint by the variant of each of its models."""
    schema = metadata.get("schema", "none")
    if schema not in {"1", str(SCHEMA)}:
        raise UnusableVoiceError(
            f"its schema is {schema[:20]!r}, this version reads {SCHEMA}",
            next_step="add the voice again from its clip, or use the version that made it",
        )
    created, clip = metadata.get("created", ""), metadata.get("clip_sha256", "")
    if not _DIGITS.fullmatch(created) or not _SHA256.fullmatch(clip):
        raise UnusableVoiceError("its metadata are incomplete", next_step=_ADD_AGAIN)
    if schema == "1":
        return int(created), {metadata.get("variant", ""): metadata.get("weights", "")}
    weights = {name: digest for name, digest in metadata.items() if name.startswith(_WEIGHTS)}
    return int(created), {name.removeprefix(_WEIGHTS): digest for name, digest in weights.items()}


def _check_model(header: Header, recorded: Mapping[str, str], variant: str, weights: str) -> None:
    """Check that a model can use a voice, whose metadata record these models.

    Raises:
        UnusableVoiceError: it cannot.
    """
    again = "add the voice again from its clip, under another name or after deleting this one"
    if variant not in recorded:
        made_for = ", ".join(sorted(recorded))[:64]
        raise UnusableVoiceError(f"it was made for the model {made_for!r}, and not for {variant!r}", next_step=again)
    if recorded[variant] != weights:
        raise UnusableVoiceError(
            f"it was made for the checkpoint {recorded[variant][:64]!r}, this server has {weights!r}", next_step=again
        )
    prefix = tensor_prefix(variant, header.tensors)
    shapes = {name.removeprefix(prefix): shape for name, shape in header.tensors.items() if name.startswith(prefix)}
    _check_shapes(shapes, get_variant(variant).prompt_tokens)


def _check_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]], prompt_tokens: int) -> None:
    """Refuse tensors that would raise errors inside upstream's code."""
    if set(shapes) != set(_TENSORS):
        raise _unexpected(f"it contains the tensors {', '.join(sorted(shapes))[:200]}")
    for name, (expected_dtype, dimensions) in _TENSORS.items():
        dtype, shape = shapes[name]
        fits = len(shape) == len(dimensions) and all(map(range.__contains__, dimensions, shape))
        if dtype != expected_dtype or not fits:
            raise _unexpected(f"its tensor {name} is {dtype} of shape {shape}")
    if (count := shapes["t3.cond_prompt_speech_tokens"][1][1]) > prompt_tokens:
        raise _unexpected(f"it has {count} speech tokens for T3")
    frames, tokens = shapes["gen.prompt_feat"][1][1], shapes["gen.prompt_token"][1][1]
    if frames - 2 * tokens not in {0, 1}:
        raise _unexpected(f"it has {frames} frames for {tokens} speech tokens")


def _unexpected(problem: str) -> UnusableVoiceError:
    return UnusableVoiceError(f"{problem}, unlike a voice of this version", next_step=_ADD_AGAIN)
