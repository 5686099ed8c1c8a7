"""chatterbox-prewarm: warm caches for Chatterbox TTS, baked into the image and proven there.

The public names are imported on first use, so that importing this package imports neither torch nor anything that
reads cache settings.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "ChatterboxWarmupStrategy": "chatterbox_prewarm.warmup.strategy",
    "WarmupMetrics": "chatterbox_prewarm.warmup.metrics",
    "from_pretrained_with_warmup": "chatterbox_prewarm.pretrained",
    "generate_stream": "chatterbox_prewarm.streaming",
    "generate_stream_with_warmup_check": "chatterbox_prewarm.streaming",
    "load_warmup_cache": "chatterbox_prewarm.load",
    "save_warmup_cache": "chatterbox_prewarm.save",
}

#: Without the streams, whose module imports torch: `import *` must not, or it comes before `prepare`.
__all__ = [
    "ChatterboxWarmupStrategy",
    "WarmupMetrics",
    "from_pretrained_with_warmup",
    "load_warmup_cache",
    "save_warmup_cache",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
