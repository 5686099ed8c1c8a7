"""Added voices in a worker: they stay on the device while they are in use."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.families.conditionals import voice_of, voice_tensors
from chatterbox_prewarm.model.synthesis import Synthesizer
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.serve.voices.voice_errors import UnusableVoiceError
from chatterbox_prewarm.serve.voices.voice_file import check_bytes, digest_of, read_file, tensor_prefix
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached

#: Tensors of speech tokens. A token outside the codebook would break the CUDA context, not only the request.
_TOKENS = ("t3.cond_prompt_speech_tokens", "gen.prompt_token")
_RETRY = "send the request again"


def voice_sizes(synthesizer: Synthesizer) -> dict[str, int]:
    """Return the bytes that each voice of a synthesizer takes on its device."""
    return {name: _size(voice_tensors(voice)) for name, voice in synthesizer.voices.items()}


class VoiceCache:
    """The added voices on a worker's device. The least recently used voices are removed first. Not thread-safe.

    Args:
        attached: the model.
        directory: directory of the voice store.
        max_voices: maximum number of voices.
        max_bytes: maximum size of their tensors together.

    Attributes:
        hits, misses: how often a voice was in the cache, and how often it was read from its file.
    """

    def __init__(self, attached: Attached, directory: Path, *, max_voices: int = 64, max_bytes: int = 16 << 20) -> None:
        self._model = attached.synthesizer.model
        self._record = read_record(attached.prepared.options.weights)
        self._directory = directory
        self._max_voices, self._max_bytes = max_voices, max_bytes
        self._cached: OrderedDict[tuple[str, str], tuple[Synthesizer, int]] = OrderedDict()
        self.hits = self.misses = 0

    @property
    def voices(self) -> int:
        """Number of voices in the cache."""
        return len(self._cached)

    @property
    def size(self) -> int:
        """Bytes of their tensors."""
        return sum(size for _, size in self._cached.values())

    def synthesizer(self, name: str, digest: str) -> Synthesizer:
        """Return a synthesizer with one added voice. Read the voice from its file if it is not in the cache.

        Args:
            name: name of the voice.
            digest: digest of its file, as `VoiceStore.digest` returned it.

        Returns:
            a synthesizer with this voice only, which shares the model with all others.

        Raises:
            UnusableVoiceError: the file is missing, was replaced, or is not a voice for this model.
        """
        key = (check_voice_name(name), digest)
        if key in self._cached:
            self.hits += 1
            self._cached.move_to_end(key)
            return self._cached[key][0]
        self.misses += 1
        for old in [cached for cached in self._cached if cached[0] == name]:
            del self._cached[old]  # it was deleted, and another voice has its name now
        tensors = self._load(name, digest)
        synthesizer = Synthesizer(self._model, {name: voice_of(tensors)})
        self._cached[key] = (synthesizer, _size(tensors))
        while len(self._cached) > 1 and (self.voices > self._max_voices or self.size > self._max_bytes):
            self._cached.popitem(last=False)
        return synthesizer

    def _load(self, name: str, digest: str) -> dict[str, torch.Tensor]:
        """Read a voice onto the device. Names, dtypes and shapes are those of `voice_tensors`."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = read_file(self._directory, name)
            if digest_of(data) != digest:
                raise UnusableVoiceError("another voice has just replaced it", next_step=_RETRY)  # noqa: TRY301
            check_bytes(data, {self._record.variant: self._record.set_digest})
            loaded = load(data)
            prefix = tensor_prefix(self._record.variant, loaded)
            tensors = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
            check_values(tensors, codebook=self._model.codebook)
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
                f"the voice {name!r} cannot be read: {error.strerror}", next_step=_RETRY
            ) from error
        return {key: tensor.to(self._model.device) for key, tensor in tensors.items()}


def check_values(tensors: Mapping[str, torch.Tensor], *, codebook: int) -> None:
    """Refuse values that the model cannot use; `check_bytes` has checked dtypes and shapes.

    Args:
        tensors: tensors on the CPU, with names, dtypes and shapes as in `voice_tensors`.
        codebook: number of speech tokens in the codebook.

    Raises:
        UnusableVoiceError: a tensor contains NaN or infinity, or a speech token outside the codebook.
    """
    problem = None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problem = f"{name} contains NaN or infinity"
    for name in _TOKENS:
        if not 0 <= int(tensors[name].min()) <= int(tensors[name].max()) < codebook:
            problem = f"{name} contains speech tokens that do not exist"
    stated, actual = int(tensors["gen.prompt_token_len"]), tensors["gen.prompt_token"].shape[1]
    if stated != actual:
        problem = f"it has {actual} speech tokens, but states {stated}"
    if problem:
        raise UnusableVoiceError(problem, next_step="delete it and add it again")


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
