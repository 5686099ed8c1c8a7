"""Settings of the sampling of speech tokens. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.limits import SAMPLING

#: Upstream's limit in `ChatterboxTTS.generate`: 40 s of audio.
MAX_NEW_TOKENS = 1000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the sampling of speech tokens. The defaults are those of upstream's English model.

    `Model.sampling` has the defaults of a variant, and `Variant.controls` lists the settings that it has.
    """

    temperature: float = 0.8
    cfg_weight: float = 0.5
    exaggeration: float | None = None
    repetition_penalty: float = 1.2
    min_p: float = 0.05
    top_p: float = 1.0
    top_k: float = 0

    def __post_init__(self) -> None:
        for name, (low, high) in SAMPLING.items():
            value = getattr(self, name)
            if value is None and name == "exaggeration":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise BadInputError(f"{name} is {value!r}", next_step=f"give a number from {low} to {high}")
        if self.top_k != int(self.top_k):
            raise BadInputError(f"top_k is {self.top_k!r}", next_step="give a whole number; 0 keeps all tokens")
