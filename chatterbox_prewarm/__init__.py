"""chatterbox-prewarm: warm caches for Chatterbox TTS, baked into the image and proven there.

The public names are imported on first use, so that importing this package imports neither torch nor anything that
reads cache settings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees; at run time `__getattr__` imports the same
    from chatterbox_prewarm.bench.startup import benchmark_warmup_effectiveness
    from chatterbox_prewarm.load import load_warmup_cache
    from chatterbox_prewarm.pretrained import from_pretrained_with_warmup
    from chatterbox_prewarm.save import save_warmup_cache
    from chatterbox_prewarm.serve.embedded import ChatterboxServer, warm_up_multi_gpu
    from chatterbox_prewarm.streaming import generate_stream as generate_stream
    from chatterbox_prewarm.streaming import generate_stream_with_warmup_check as generate_stream_with_warmup_check
    from chatterbox_prewarm.warmup.adaptive import AdaptiveWarmup
    from chatterbox_prewarm.warmup.metrics import WarmupMetrics
    from chatterbox_prewarm.warmup.strategy import ChatterboxWarmupStrategy

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptiveWarmup": "chatterbox_prewarm.warmup.adaptive",
    "ChatterboxServer": "chatterbox_prewarm.serve.embedded",
    "ChatterboxWarmupStrategy": "chatterbox_prewarm.warmup.strategy",
    "WarmupMetrics": "chatterbox_prewarm.warmup.metrics",
    "benchmark_warmup_effectiveness": "chatterbox_prewarm.bench.startup",
    "from_pretrained_with_warmup": "chatterbox_prewarm.pretrained",
    "generate_stream": "chatterbox_prewarm.streaming",
    "generate_stream_with_warmup_check": "chatterbox_prewarm.streaming",
    "load_warmup_cache": "chatterbox_prewarm.load",
    "save_warmup_cache": "chatterbox_prewarm.save",
    "warm_up_multi_gpu": "chatterbox_prewarm.serve.embedded",
}

#: Without the streams, whose module imports torch: `import *` must not, or it comes before `prepare`.
__all__ = [
    "AdaptiveWarmup",
    "ChatterboxServer",
    "ChatterboxWarmupStrategy",
    "WarmupMetrics",
    "benchmark_warmup_effectiveness",
    "from_pretrained_with_warmup",
    "load_warmup_cache",
    "save_warmup_cache",
    "warm_up_multi_gpu",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
