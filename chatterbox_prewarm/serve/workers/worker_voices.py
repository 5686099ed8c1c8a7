"""Added voices in a worker: made of a clip, and held on the device while they are in use."""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.errors import BadInputError, ModelError, first_line
from chatterbox_prewarm.families.conditionals import voice_of, voice_tensors
from chatterbox_prewarm.families.tensors import tensor_bytes
from chatterbox_prewarm.model.synthesis import Synthesizer
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.model.voices import prepare_voice
from chatterbox_prewarm.serve.voices.voice_errors import UnusableVoiceError
from chatterbox_prewarm.serve.voices.voice_file import VoiceMetadata, check_bytes, digest_of, read_file
from chatterbox_prewarm.serve.workers.fatal_errors import is_broken
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.start.attach import Attached

#: Tensors of speech tokens: an id beyond the codebook would end a GPU's context, not the request alone.
_TOKENS = ("t3.cond_prompt_speech_tokens", "gen.prompt_token")
_AGAIN = "send the request again"


@dataclass(frozen=True, kw_only=True)
class CacheLimits:
    """How much of the device added voices may take; what was used least recently goes first.

    Attributes:
        voices: how many are held.
        size: bytes of their tensors together.
    """

    voices: int = 64
    size: int = 16 << 20


def voice_bytes(attached: Attached, clip_wav: bytes) -> bytes:
    """Compute the conditionals of a clip.

    Args:
        attached: the model.
        clip_wav: a WAV file, as `decode_clip.decode` returned it.

    Returns:
        a safetensors file as `VoiceStore.add` takes it.

    Raises:
        BadInputError: the model can make no voice of this clip.
        RuntimeError: PyTorch's own, when it is no fault of the clip: the device failed, or has no memory left.
    """
    # In memory alone: whose voice it is has not agreed to a copy that a killed process leaves on a disk.
    with os.fdopen(os.memfd_create("clip", os.MFD_CLOEXEC), "wb") as file:
        file.write(clip_wav)
        file.flush()
        try:
            voice = prepare_voice(attached.synthesizer.model, Path(f"/proc/self/fd/{file.fileno()}"))
        except ModelError as error:
            cause = error.__cause__ or error
            if is_broken(cause) or "CUDA" in str(cause):
                raise cause from None
            raise BadInputError(
                f"no voice could be made of the clip: {first_line(cause)}", next_step="give 5 to 10 s of clean speech"
            ) from error
    variant, weights = _checkpoint(attached)
    metadata = VoiceMetadata(
        variant=variant,
        weights=weights,
        created=int(time.time()),
        clip_sha256=hashlib.sha256(clip_wav).hexdigest(),
    )
    return tensor_bytes(voice_tensors(voice), metadata.to_strings())


def voice_sizes(synthesizer: Synthesizer) -> dict[str, int]:
    """Bytes that each voice of a synthesizer takes on its device."""
    return {name: _size(voice_tensors(voice)) for name, voice in synthesizer.voices.items()}


class VoiceCache:
    """The added voices that a worker has on its device; for one thread.

    Args:
        attached: the model that speaks.
        directory: the store's.
        limits: of what is held.

    Attributes:
        hits, misses: how often a voice was there, and how often it had to be read.
    """

    def __init__(self, attached: Attached, directory: Path, limits: CacheLimits | None = None) -> None:
        self._model = attached.synthesizer.model
        self._variant, self._weights = _checkpoint(attached)
        self._directory = directory
        self._limits = limits or CacheLimits()
        self._held: OrderedDict[tuple[str, str], tuple[Synthesizer, int]] = OrderedDict()
        self.hits = self.misses = 0

    @property
    def voices(self) -> int:
        """How many are held."""
        return len(self._held)

    @property
    def size(self) -> int:
        """Bytes of their tensors."""
        return sum(size for _, size in self._held.values())

    def synthesizer(self, name: str, digest: str) -> Synthesizer:
        """The model with one added voice, which is read from its file unless it is held already.

        Args:
            name: of the voice.
            digest: of its file, as `VoiceStore.digest` gives it.

        Returns:
            a synthesizer whose only voice it is, of the same model as all others.

        Raises:
            UnusableVoiceError: there is no such file any more, or it is none that this model can speak with.
        """
        key = (check_voice_name(name), digest)
        if key in self._held:
            self.hits += 1
            self._held.move_to_end(key)
            return self._held[key][0]
        self.misses += 1
        for old in [held for held in self._held if held[0] == name]:
            del self._held[old]  # it was deleted, or another has its name now
        tensors = self._load(name, digest)
        synthesizer = Synthesizer(self._model, {name: voice_of(tensors)})
        self._held[key] = (synthesizer, _size(tensors))
        while len(self._held) > 1 and (self.voices > self._limits.voices or self.size > self._limits.size):
            self._held.popitem(last=False)
        return synthesizer

    def _load(self, name: str, digest: str) -> dict[str, torch.Tensor]:
        """Read a voice onto the device; names, dtypes and shapes are `voice_tensors`'."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = read_file(self._directory, name)
            if digest_of(data) != digest:
                raise UnusableVoiceError("it was replaced by another just now", next_step=_AGAIN)  # noqa: TRY301
            check_bytes(data, variant=self._variant, weights=self._weights)
            tensors: dict[str, torch.Tensor] = load(data)
            check_values(tensors, codebook=self._model.t3.hp.start_speech_token)
        except UnusableVoiceError as error:
            raise UnusableVoiceError(
                f"the voice {name!r} cannot be used: {error.message}", next_step=error.next_step
            ) from error
        except SafetensorError as error:
            raise UnusableVoiceError(
                f"the voice {name!r} cannot be used: {error}", next_step="delete it and add it again"
            ) from error
        except OSError as error:
            raise UnusableVoiceError(
                f"the voice {name!r} cannot be read: {error.strerror}", next_step=_AGAIN
            ) from error
        return {key: tensor.to(self._model.device) for key, tensor in tensors.items()}


def check_values(tensors: Mapping[str, torch.Tensor], *, codebook: int) -> None:
    """Refuse values that the model cannot take; shapes and dtypes were checked before.

    Args:
        tensors: on the CPU, names, dtypes and shapes as `voice_tensors`'.
        codebook: how many speech tokens there are.

    Raises:
        UnusableVoiceError: a number is none, or a speech token is not of the codebook.
    """
    problem = None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problem = f"{name} holds numbers that are none"
    for name in _TOKENS:
        if not 0 <= int(tensors[name].min()) <= int(tensors[name].max()) < codebook:
            problem = f"{name} holds speech tokens that do not exist"
    if int(tensors["gen.prompt_token_len"]) != tensors["gen.prompt_token"].shape[1]:
        problem = "the number of its speech tokens is another than it says"
    if problem:
        raise UnusableVoiceError(f"{problem}", next_step="delete it and add it again")


def _checkpoint(attached: Attached) -> tuple[str, str]:
    """Variant and set digest of the weights in use."""
    record = read_record(attached.prepared.weights)
    return record.variant, record.set_digest


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
