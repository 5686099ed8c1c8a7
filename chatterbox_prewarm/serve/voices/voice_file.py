"""The file of an added voice: conditionals as safetensors, and in their metadata what they were made of.

Everything that can be said without torch is checked here, by the front before it lists a voice and by a worker before
it loads one. A file may have been made by another version, for another checkpoint, or by somebody else.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.voices.voice_errors import UnusableVoiceError
from chatterbox_prewarm.weights.safetensors_header import parse_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA = 1
SUFFIX = ".safetensors"
#: The longest reference that S3Gen takes, ten seconds, makes 170 kB.
MAX_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGITS = re.compile(r"[0-9]{1,12}")
#: Dtype of each tensor, and how long each dimension may be. S3Gen hears 10 s at 25 tokens a second, T3 150 tokens.
_TENSORS: dict[str, tuple[str, tuple[range, ...]]] = {
    "t3.speaker_emb": ("F32", (range(1, 2), range(256, 257))),
    "t3.cond_prompt_speech_tokens": ("I64", (range(1, 2), range(1, 151))),
    "t3.emotion_adv": ("F32", (range(1, 2), range(1, 2), range(1, 2))),
    "gen.prompt_token": ("I64", (range(1, 2), range(1, 252))),
    "gen.prompt_token_len": ("I64", (range(1, 2),)),
    "gen.prompt_feat": ("F32", (range(1, 2), range(2, 504), range(80, 81))),
    "gen.embedding": ("F32", (range(1, 2), range(192, 193))),
}


@dataclass(frozen=True, kw_only=True)
class VoiceMetadata:
    """What the metadata of a voice's file say.

    Attributes:
        variant: of the model, as `models.Variant.name`.
        weights: the checkpoint's set digest, as `weights.WeightsRecord.set_digest`.
        created: seconds since the epoch.
        clip_sha256: of the WAV file that the conditionals were computed from, in hexadecimal.
        schema: of the file.
    """

    variant: str
    weights: str
    created: int
    clip_sha256: str
    schema: int = SCHEMA

    def to_strings(self) -> dict[str, str]:
        """As safetensors keeps metadata."""
        return {name: str(value) for name, value in asdict(self).items()}


def read_file(directory: Path, name: str) -> bytes:
    """Read the file of a voice; follows no link and waits for nothing.

    Args:
        directory: of the voices.
        name: one that `text.check_voice_name` has passed.

    Raises:
        UnusableVoiceError: it is no regular file, or larger than any voice.
        OSError: as the system says; `FileNotFoundError` when there is none.
    """
    descriptor = os.open(directory / f"{name}{SUFFIX}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnusableVoiceError("it is no regular file", next_step="delete it")
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnusableVoiceError(f"it is larger than {MAX_BYTES} bytes", next_step="delete it")
    return data


def check_bytes(data: bytes, *, variant: str, weights: str) -> VoiceMetadata:
    """Check a voice's file as far as that can be done without torch.

    Args:
        data: all of the file.
        variant: of the model that is to speak with it.
        weights: the set digest of its checkpoint.

    Raises:
        UnusableVoiceError: it is broken, or was made for something else.
    """
    if len(data) > MAX_BYTES:
        raise UnusableVoiceError(f"it is larger than {MAX_BYTES} bytes", next_step="delete it")
    try:
        shapes, strings, promised = parse_safetensors_header(io.BytesIO(data), len(data))
    except ValueError as error:
        raise UnusableVoiceError(
            f"it is no safetensors file: {str(error)[:200]}", next_step="delete it and add the voice again"
        ) from error
    if promised != len(data):
        raise UnusableVoiceError(
            f"its header promises {promised} bytes, {len(data)} are there",
            next_step="delete it and add the voice again",
        )
    metadata = _read_metadata(strings)
    for what, made, ours in (("variant", metadata.variant, variant), ("checkpoint", metadata.weights, weights)):
        if made != ours:
            raise UnusableVoiceError(
                f"it was made for the {what} {made[:64]!r}, this server has {ours!r}",
                next_step="add the voice again from its clip, under another name or after deleting this one",
            )
    _check_shapes(shapes)
    return metadata


def digest_of(data: bytes) -> str:
    """What tells a voice from another of the same name: SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _read_metadata(strings: Mapping[str, str]) -> VoiceMetadata:
    schema = strings.get("schema", "none")
    if schema != str(SCHEMA):
        raise UnusableVoiceError(
            f"its schema is {schema[:20]!r}, this version reads {SCHEMA}",
            next_step="add the voice again from its clip, or run the version that made it",
        )
    created, clip = strings.get("created", ""), strings.get("clip_sha256", "")
    if not _DIGITS.fullmatch(created) or not _SHA256.fullmatch(clip):
        raise UnusableVoiceError("its metadata are incomplete", next_step="delete it and add the voice again")
    return VoiceMetadata(
        variant=strings.get("variant", ""),
        weights=strings.get("weights", ""),
        created=int(created),
        clip_sha256=clip,
    )


def _check_shapes(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse tensors that upstream's code would stumble over."""
    problem = None
    if set(shapes) != set(_TENSORS):
        problem = f"it holds the tensors {', '.join(sorted(shapes))[:200]}"
    else:
        for name, (dtype, dimensions) in _TENSORS.items():
            found = shapes[name]
            fits = len(found[1]) == len(dimensions) and all(map(range.__contains__, dimensions, found[1]))
            if found[0] != dtype or not fits:
                problem = f"its tensor {name} is {found[0]} of shape {found[1]}"
                break
        else:
            rows, tokens = shapes["gen.prompt_feat"][1][1], shapes["gen.prompt_token"][1][1]
            if rows - 2 * tokens not in {0, 1}:
                problem = f"it has {rows} frames for {tokens} speech tokens"
    if problem:
        raise UnusableVoiceError(f"{problem}, not what a voice holds", next_step="delete it and add the voice again")
