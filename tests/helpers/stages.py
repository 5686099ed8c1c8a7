"""The processes of `benchmarks profiles`, as tests run them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.profiles import measure_one
from benchmarks.stages import StageOptions
from chatterbox_prewarm.bench.executions import voice_of

if TYPE_CHECKING:
    from pathlib import Path


def measure_both(weights: Path, warm: Path, folder: Path, *, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure upstream and then a warm state, which is compared with upstream; return both results."""
    options = StageOptions(
        weights=str(weights),
        warm=None,
        voice=str(voice_of(warm)),
        cache=str(folder / "cache"),
        device="cpu",
        tokens=tokens,
        reference=str(folder / "reference.pt"),
    )
    return measure_one(options), measure_one(replace(options, warm=str(warm)))
