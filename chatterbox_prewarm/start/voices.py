"""The voices of a start: make those that are not baked, and compute what all texts of a voice share."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.reference_clip import reference_clip

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.start.prepare import Prepared


def make_missing_voices(
    synthesizer: Synthesizer, prepared: Prepared, clips: Mapping[str, Path]
) -> ChatterboxTTS | None:
    """Make the built-in voice and those of `clips` that are not baked; each is a miss. Then mark "attached".

    Afterwards, compute what all texts of a voice share, if the model has such a thing: the start is not ready before.

    Args:
        synthesizer: the model with the baked voices; gets those that are made.
        prepared: the first step of the start of this process.
        clips: the reference clips by the names of their voices.

    Returns:
        upstream's model, if a voice needed it.
    """
    upstream = _make_voices(synthesizer, prepared, clips)
    prepared.metrics.mark("attached")
    prepare_voices(synthesizer, prepared)
    return upstream


def prepare_voices(synthesizer: Synthesizer, prepared: Prepared) -> None:
    """Compute what all texts of a voice share, if the model has such a thing."""
    if synthesizer.model.decoder.prepares_voices:
        with prepared.metrics.phase("voice prefixes"):
            synthesizer.prepare_voices()


def _make_voices(synthesizer: Synthesizer, prepared: Prepared, clips: Mapping[str, Path]) -> ChatterboxTTS | None:
    from chatterbox_prewarm.model.voices import prepare_voice, read_builtin_voice

    model, voices = synthesizer.model, synthesizer.voices
    missing = [name for name in (DEFAULT_VOICE, *clips) if name not in voices]
    for name in missing:
        bake = "chatterbox-prewarm bake"
        if name in clips:
            bake += f" --voice {shlex.quote(f'{name}={clips[name]}')}"
        prepared.metrics.miss(
            "conditionals",
            f"the voice {name!r} was made at start",
            next_step=f"bake it with these weights: `{bake}`",
        )
    if DEFAULT_VOICE in missing:
        builtin = read_builtin_voice(prepared.options.weights, device=model.device)
        if builtin is not None:
            voices[DEFAULT_VOICE] = builtin
            missing.remove(DEFAULT_VOICE)
    if not missing:
        return None
    from chatterbox_prewarm.start.upstream import attach_upstream

    # A model that converts has no T3, so upstream's model cannot share its tensors, and is loaded onto the CPU. When
    # the model converts, it moves the voice to its device.
    upstream = attach_upstream(prepared, lean=None if prepared.options.converts else model)
    with prepared.metrics.phase("conditionals"), contextlib.ExitStack() as stack:
        for name in missing:
            clip = clips[name] if name in clips else stack.enter_context(reference_clip())
            voices[name] = prepare_voice(upstream, clip)
    return upstream
