"""Where a start in Python finds its files when the caller names none, and the device that it uses."""

from __future__ import annotations

import os
from pathlib import Path

from chatterbox_prewarm.system.fingerprint import visible_gpus
from chatterbox_prewarm.system.paths import WEIGHTS
from chatterbox_prewarm.weights.fetch import fetch
from chatterbox_prewarm.weights.record import RECORD_NAME
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant


def default_device() -> str:
    """Return "cuda" on a machine with a GPU, and otherwise "cpu"."""
    return "cuda" if visible_gpus() else "cpu"


def default_cache() -> Path:
    """Return the directory for compilers and Numba below the user's cache directory."""
    return _home() / "cache"


def default_weights(variant: Variant = DEFAULT_VARIANT) -> Path:
    """Return the weights of the image, or those in the user's cache directory after fetching what is missing.

    Raises:
        WeightsError: the weights could not be fetched.
    """
    weights = WEIGHTS if (WEIGHTS / RECORD_NAME).exists() else _home() / "weights" / variant.name
    if not (weights / RECORD_NAME).exists():
        fetch(weights, variant=variant)
    return weights


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatterbox-prewarm"
