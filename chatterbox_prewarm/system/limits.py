"""Limits of a synthesis. A request is checked against them before the model is loaded, so this imports nothing."""

from __future__ import annotations

from types import MappingProxyType

#: The largest seed that NumPy's generator accepts.
MAX_SEED = 2**32 - 1
#: S3Gen's convolutions look three tokens ahead.
MIN_TOKENS = 3
#: The flow's encoder has a convolution over the next three tokens, so a stream must look at least that far ahead.
MIN_LOOK_AHEAD = 3
#: The size of T3's position table for speech tokens.
MAX_TOKENS = 4096
#: Minimum and maximum of each field of `model.sampling.Sampling`.
SAMPLING = MappingProxyType(
    {
        "temperature": (0.05, 5.0),
        "cfg_weight": (0.0, 5.0),
        "exaggeration": (0.0, 2.0),
        "repetition_penalty": (1.0, 5.0),
        "min_p": (0.0, 1.0),
        "top_p": (0.01, 1.0),
        "top_k": (0, 10_000),
    }
)
