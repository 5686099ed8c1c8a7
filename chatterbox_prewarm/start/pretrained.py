"""Load upstream's `ChatterboxTTS` like its `from_pretrained`, but warm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system.paths import WEIGHTS
from chatterbox_prewarm.weights.fetch import fetch
from chatterbox_prewarm.weights.record import RECORD_NAME
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy


def from_pretrained_with_warmup(
    device: str = "cpu",
    *,
    weights: Path | None = None,
    warm: Path | None = None,
    cache: Path | None = None,
    policy: str = "fallback",
    strategy: ChatterboxWarmupStrategy | None = None,
) -> ChatterboxTTS:
    """Load the English model and warm it up.

    Args:
        device: as upstream takes it, a string such as "cpu" or "cuda".
        weights: the directory of a checkpoint. By default the path in an image, or a directory below the user's
            cache directory, into which an incomplete checkpoint is downloaded.
        warm: a warm state. Without one, or if no family of it fits, the warm-up runs.
        cache: a writable directory for compilers and Numba; by default below the user's cache directory.
        policy: what to do with a warm state that does not fit; see `StartOptions`.
        strategy: the warm-up; by default all levels. If it is given, it also runs with a usable warm state.

    Returns:
        upstream's class, with its built-in voice set.

    Raises:
        PrewarmError: as `fetch`, `prepare` and `attach`.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatterbox-prewarm"
    if weights is None:
        weights = WEIGHTS if (WEIGHTS / RECORD_NAME).exists() else home / "weights" / ENGLISH.name
        if not (weights / RECORD_NAME).exists():
            fetch(weights, variant=ENGLISH)
    prepared = prepare(
        StartOptions(
            warm=warm or Path(os.devnull),
            weights=weights,
            cache=cache or home / "cache",
            device=device,
            policy=policy if warm is not None else "off",
        )
    )
    if prepared.execution.t3_dtype != "float32":
        raise BadInputError(
            f"the warm state has T3 in {prepared.execution.t3_dtype}, which upstream's `generate` cannot run",
            next_step="bake with --t3-dtype float32, or use load_warmup_cache",
        )
    attached = attach(prepared)

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.voices import detached
    from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy

    model = attached.synthesizer.model
    model.conds = detached(attached.synthesizer.voices[DEFAULT_VOICE])
    if strategy is not None or not prepared.usable:
        (strategy or ChatterboxWarmupStrategy(metrics=attached.metrics)).perform_full_warmup(model)
    return model
