"""What a synthesis takes, in numbers: for whoever checks a request before the model is there. Imports nothing."""

from __future__ import annotations

from types import MappingProxyType

#: NumPy's generator takes no larger seed.
MAX_SEED = 2**32 - 1
#: S3Gen's convolutions look three tokens ahead.
LEAST_TOKENS = 3
#: And one over three tokens to come is in the flow's encoder, so that a stream cannot look less far ahead.
LEAST_LOOK_AHEAD = 3
#: T3's position table of speech tokens ends there.
MOST_TOKENS = 4096
#: Least and most of each setting of `synthesis.Sampling`.
SAMPLING = MappingProxyType(
    {
        "temperature": (0.05, 5.0),
        "cfg_weight": (0.0, 5.0),
        "exaggeration": (0.0, 2.0),
        "repetition_penalty": (1.0, 5.0),
        "min_p": (0.0, 1.0),
        "top_p": (0.01, 1.0),
    }
)
