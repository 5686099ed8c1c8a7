"""Where a start in Python finds its files when the caller names none, and the device that it uses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.fingerprint import visible_gpus
from chatterbox_prewarm.system.paths import WARM, WEIGHTS, as_path
from chatterbox_prewarm.weights.fetch import fetch
from chatterbox_prewarm.weights.record import RECORD_NAME
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant

if TYPE_CHECKING:
    from collections.abc import Sequence


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


def default_options(  # noqa: PLR0913 - the arguments of `from_pretrained_with_warmup`
    variant: Variant,
    device: str,
    *,
    weights: str | Path | None,
    warm: str | Path | None,
    cache: str | Path | None,
    policy: str,
    plain_text: Sequence[str] = (),
    converts: bool = False,
) -> StartOptions:
    """Return the options of a start in Python; the arguments are those of `from_pretrained_with_warmup`.

    Raises:
        BadInputError: an argument is no path.
        PrewarmError: as `check_device` and `default_weights`.
    """
    device = check_device(device)
    if warm is None and WARM.is_dir():
        warm = WARM
    return StartOptions(
        warm=as_path(warm or os.devnull, "the warm state"),
        weights=as_path(weights, "the checkpoint") if weights is not None else default_weights(variant),
        cache=as_path(cache or default_cache(), "the cache directory"),
        device=device,
        policy=policy if warm is not None else "off",
        plain_text=tuple(plain_text),
        converts=converts,
    )


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chatterbox-prewarm"
