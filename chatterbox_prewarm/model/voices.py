"""Voices: compute the conditionals of a reference clip.

Conditionals contain the features of a reference clip that T3 and S3Gen use. A bake computes them once, in inference
mode: upstream computes them with autograd, which keeps a graph of about 280 MB alive for each voice.
"""

from __future__ import annotations

import logging
import pickle
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.errors import ModelError, WeightsError, first_line
from chatterbox_prewarm.model.reference_clip import reference_clip
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS, Conditionals

logger = logging.getLogger(__name__)


def prepare_voice(model: ChatterboxTTS, clip: Path) -> Conditionals:
    """Compute the conditionals of a reference clip without changing `model.conds`.

    Returns:
        upstream's `Conditionals`, with all tensors detached and on the model's device.
        T3: `speaker_emb` float32 (1, 256), `cond_prompt_speech_tokens` int64 (1, n <= 150), `emotion_adv` float32
        (1, 1, 1). S3Gen: `prompt_token` int64 (1, m), `prompt_token_len` int64 (1,), `prompt_feat` float32
        (1, 2m or 2m + 1, 80), `embedding` float32 (1, 192).

    Raises:
        ModelError: upstream cannot process this clip.
    """
    saved = model.conds
    try:
        with torch.inference_mode():
            model.prepare_conditionals(clip)
            return detached(model.conds)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"the conditionals of {clip} cannot be computed: {error}", next_step="try another clip of clean speech"
        ) from error
    finally:
        model.conds = saved


def detached(conditionals: Conditionals) -> Conditionals:
    """Copy conditionals into tensors without autograd history, and drop the values that a generation cached in them."""
    from chatterbox.tts import Conditionals, T3Cond

    t3, gen = conditionals.t3, conditionals.gen
    return Conditionals(
        T3Cond(
            speaker_emb=t3.speaker_emb.detach().clone(),
            cond_prompt_speech_tokens=t3.cond_prompt_speech_tokens.detach().clone(),
            emotion_adv=torch.as_tensor(t3.emotion_adv, dtype=torch.float32).detach().clone(),
        ),
        {key: value.detach().clone() if torch.is_tensor(value) else value for key, value in gen.items()},
    )


def builtin_voice(model: ChatterboxTTS, weights: Path) -> Conditionals:
    """Return the built-in voice: the checkpoint's voice, or a voice computed from a generated clip.

    The checkpoint's voice is a pickle. torch reads it with `weights_only`, which runs no code from it.

    Raises:
        WeightsError: the file does not contain a voice, or tries to run code.
    """
    from chatterbox.tts import Conditionals

    path = weights / ENGLISH.builtin_voice
    # A pickle that the record does not list has no digest, and must not be read.
    if any(entry.path == ENGLISH.builtin_voice for entry in read_record(weights).files):
        try:
            loaded = Conditionals.load(path)
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{path} does not contain a Chatterbox voice: {first_line(error)}",
                next_step="fetch the published file; or remove it and record the checkpoint again, to generate one",
            ) from error
        return detached(loaded.to(model.device))
    logger.info("the checkpoint has no voice; computing one from a generated clip")
    with reference_clip() as clip:
        return prepare_voice(model, clip)
