"""The file of an added voice: conditionals as safetensors, with metadata about their origin.

Every check that does not need torch is here. The front runs it before it lists a voice, and a worker before it loads
one: another version of this package may have written the file, for another checkpoint, or anyone with access.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.voices.voice_errors import UnusableVoiceError
from chatterbox_prewarm.system.regular_files import NotRegularError, open_regular
from chatterbox_prewarm.weights.safetensors_header import parse_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA = 1
SUFFIX = ".safetensors"
#: S3Gen's longest reference, 10 s, makes a file of 170 kB.
MAX_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGITS = re.compile(r"[0-9]{1,12}")
#: Dtype and allowed dimensions of each tensor. S3Gen takes 10 s at 25 tokens per second, T3 takes 150 tokens.
_TENSORS: dict[str, tuple[str, tuple[range, ...]]] = {
    "t3.speaker_emb": ("F32", (range(1, 2), range(256, 257))),
    "t3.cond_prompt_speech_tokens": ("I64", (range(1, 2), range(1, 151))),
    "t3.emotion_adv": ("F32", (range(1, 2), range(1, 2), range(1, 2))),
    "gen.prompt_token": ("I64", (range(1, 2), range(1, 252))),
    "gen.prompt_token_len": ("I64", (range(1, 2),)),
    "gen.prompt_feat": ("F32", (range(1, 2), range(2, 504), range(80, 81))),
    "gen.embedding": ("F32", (range(1, 2), range(192, 193))),
}
_ADD_AGAIN = "delete it and add the voice again"


def make_metadata(*, variant: str, weights: str, clip_sha256: str) -> dict[str, str]:
    """Return the safetensors metadata of a voice that is created now.

    Args:
        variant: name of the model variant.
        weights: set digest of the checkpoint.
        clip_sha256: SHA-256 of the WAV file that the conditionals were computed from, in hexadecimal.
    """
    return {
        "variant": variant,
        "weights": weights,
        "created": str(int(time.time())),  # seconds since the epoch
        "clip_sha256": clip_sha256,
        "schema": str(SCHEMA),
    }


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


def check_bytes(data: bytes, *, variant: str, weights: str) -> int:
    """Check the content of a voice's file without torch.

    Args:
        data: the whole file.
        variant: name of the model variant that will speak with it.
        weights: set digest of the checkpoint.

    Returns:
        when the voice was created, in seconds since the epoch.

    Raises:
        UnusableVoiceError: the file is damaged, or was made for another model.
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
    created = _check_metadata(header.metadata, variant=variant, weights=weights)
    _check_shapes(header.tensors)
    return created


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of a voice's file in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _check_metadata(metadata: Mapping[str, str], *, variant: str, weights: str) -> int:
    schema = metadata.get("schema", "none")
    if schema != str(SCHEMA):
        raise UnusableVoiceError(
            f"its schema is {schema[:20]!r}, this version reads {SCHEMA}",
            next_step="add the voice again from its clip, or use the version that made it",
        )
    created, clip = metadata.get("created", ""), metadata.get("clip_sha256", "")
    if not _DIGITS.fullmatch(created) or not _SHA256.fullmatch(clip):
        raise UnusableVoiceError("its metadata are incomplete", next_step=_ADD_AGAIN)
    for label, actual, expected in (
        ("variant", metadata.get("variant", ""), variant),
        ("checkpoint", metadata.get("weights", ""), weights),
    ):
        if actual != expected:
            raise UnusableVoiceError(
                f"it was made for the {label} {actual[:64]!r}, this server has {expected!r}",
                next_step="add the voice again from its clip, under another name or after deleting this one",
            )
    return int(created)


def _check_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse tensors that would raise errors inside upstream's code."""
    if set(shapes) != set(_TENSORS):
        raise _unexpected(f"it contains the tensors {', '.join(sorted(shapes))[:200]}")
    for name, (expected_dtype, dimensions) in _TENSORS.items():
        dtype, shape = shapes[name]
        fits = len(shape) == len(dimensions) and all(map(range.__contains__, dimensions, shape))
        if dtype != expected_dtype or not fits:
            raise _unexpected(f"its tensor {name} is {dtype} of shape {shape}")
    frames, tokens = shapes["gen.prompt_feat"][1][1], shapes["gen.prompt_token"][1][1]
    if frames - 2 * tokens not in {0, 1}:
        raise _unexpected(f"it has {frames} frames for {tokens} speech tokens")


def _unexpected(problem: str) -> UnusableVoiceError:
    return UnusableVoiceError(f"{problem}, unlike a voice of this version", next_step=_ADD_AGAIN)
