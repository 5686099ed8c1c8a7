"""Voices: compute the conditionals of a reference clip with upstream's model, or read the checkpoint's.

A bake computes them once, in inference mode: upstream computes them with autograd, which keeps a graph of about 280 MB
alive for each voice.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from chatterbox_prewarm.errors import ModelError, WeightsError, first_line, is_out_of_memory, is_out_of_threads
from chatterbox_prewarm.model.clips import decoded_clip
from chatterbox_prewarm.model.conditionals import Conditionals, T3Conditionals
from chatterbox_prewarm.model.upstream import variant_of
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import get_variant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chatterbox.tts import ChatterboxTTS
    from chatterbox.tts import Conditionals as UpstreamConditionals

logger = logging.getLogger(__name__)


def prepare_voice(model: ChatterboxTTS, clip: Path | BinaryIO) -> Conditionals:
    """Compute the conditionals of a reference clip without changing `model.conds`.

    Args:
        model: upstream's model.
        clip: a mono file in a format that libsndfile reads.

    Returns:
        the conditionals, with all tensors detached and on the model's device.

    Raises:
        BadInputError: the clip would give a bad voice, see `clips.check_clip`.
        ModelError: upstream cannot process this clip.
    """
    saved, what = model.conds, f"the clip {clip}" if isinstance(clip, Path) else "the clip"
    decoded = decoded_clip(clip, what=what, longer_than=variant_of(model).clip_seconds)
    try:
        with torch.inference_mode(), decoded as path, _without_a_search_for_decoders():
            model.prepare_conditionals(path)
            return detached(model.conds)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error) or is_out_of_threads(error):
            raise  # another clip would not help
        raise ModelError(
            f"the conditionals of {what} cannot be computed: {error}", next_step="try another clip of clean speech"
        ) from error
    finally:
        model.conds = saved


@contextlib.contextmanager
def _without_a_search_for_decoders() -> Iterator[None]:
    """Keep librosa's fallback from starting `gcc`, `ld` and `ffmpeg` to find decoders: libsndfile has read the clip."""
    audioread: Any = importlib.import_module("audioread")
    rawread: Any = importlib.import_module("audioread.rawread")
    found = list(audioread.BACKENDS)
    audioread.BACKENDS[:] = found or [rawread.RawAudioFile]
    try:
        yield
    finally:
        audioread.BACKENDS[:] = found


def placeholder_voice(device: str = "cpu") -> Conditionals:
    """Return conditionals without a voice, which run the same code as those of a clip."""
    t3 = {
        "speaker_emb": torch.zeros(1, 256, device=device),
        "cond_prompt_speech_tokens": torch.zeros(1, 150, dtype=torch.int64, device=device),
        "emotion_adv": torch.full((1, 1, 1), 0.5, device=device),
    }
    gen = {
        "prompt_token": torch.zeros(1, 25, dtype=torch.int64, device=device),
        "prompt_token_len": torch.tensor([25], device=device),
        "prompt_feat": torch.zeros(1, 50, 80, device=device),
        "embedding": torch.ones(1, 192, device=device),
    }
    return Conditionals(t3=T3Conditionals(**t3), gen=gen)


def detached(conditionals: UpstreamConditionals) -> Conditionals:
    """Copy upstream's conditionals into tensors without autograd history and without cached values."""
    return _copied(vars(conditionals.t3), conditionals.gen)


def for_upstream(conditionals: Conditionals) -> UpstreamConditionals:
    """Copy conditionals into upstream's class, which changes them when it speaks."""
    from chatterbox.tts import Conditionals as UpstreamConditionals
    from chatterbox.tts import T3Cond

    copy = _copied(vars(conditionals.t3), conditionals.gen)
    return UpstreamConditionals(T3Cond(**vars(copy.t3)), {"prompt_feat_len": None, **copy.gen})


def _copied(t3: Mapping[str, Any], gen: Mapping[str, Any]) -> Conditionals:
    return Conditionals(
        t3=T3Conditionals(
            speaker_emb=t3["speaker_emb"].detach().clone(),
            cond_prompt_speech_tokens=t3["cond_prompt_speech_tokens"].detach().clone(),
            emotion_adv=torch.as_tensor(t3["emotion_adv"], dtype=torch.float32).detach().clone(),
        ),
        gen={key: value.detach().clone() for key, value in gen.items() if torch.is_tensor(value)},
    )


def read_builtin_voice(weights: Path, *, device: str = "cpu") -> Conditionals | None:
    """Read the checkpoint's voice. Return None if the checkpoint has none.

    The voice is a pickle. torch reads it with `weights_only`, which runs no code from it.

    Raises:
        WeightsError: the file does not contain a voice, or tries to run code.
    """
    record = read_record(weights)
    name = get_variant(record.variant).builtin_voice
    # A pickle that the record does not list has no digest, and must not be read.
    if not any(entry.path == name for entry in record.files):
        logger.info("the checkpoint has no voice; one is made from a generated clip")
        return None
    path = weights / name
    try:
        halves = torch.load(path, map_location=device, weights_only=True)
        return _copied(halves["t3"], halves["gen"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} does not contain a Chatterbox voice: {first_line(error)}",
            next_step="fetch the published file; or remove it and record the checkpoint again, to generate one",
        ) from error
