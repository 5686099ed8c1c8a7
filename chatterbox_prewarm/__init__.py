"""chatterbox-prewarm: warm caches for Chatterbox TTS, baked into the image and proven there.

The public names are imported on first use, so that importing this package imports neither torch nor anything that
reads cache settings. `import *` imports neither: the modules of the names import torch when it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.version import __version__ as __version__

if TYPE_CHECKING:  # for type checkers; at run time `__getattr__` imports the names
    from chatterbox_prewarm.bench.effectiveness import WarmupMetrics, benchmark_warmup_effectiveness
    from chatterbox_prewarm.bench.report.page import generate_warmup_report
    from chatterbox_prewarm.bench.report.run import run_warmup_benchmarks
    from chatterbox_prewarm.model.streaming import generate_stream
    from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
    from chatterbox_prewarm.serve.embedded import ChatterboxServer, warm_up_multi_gpu
    from chatterbox_prewarm.start.adaptive import AdaptiveWarmup
    from chatterbox_prewarm.start.attach import load_warmup_cache
    from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox, from_pretrained_with_warmup
    from chatterbox_prewarm.start.pretrained_multilingual import PrewarmedMultilingual
    from chatterbox_prewarm.start.pretrained_turbo import PrewarmedTurbo
    from chatterbox_prewarm.start.pretrained_vc import PrewarmedVC
    from chatterbox_prewarm.start.save import save_warmup_cache
    from chatterbox_prewarm.start.service import ChatterboxService
    from chatterbox_prewarm.start.streaming import generate_stream_with_warmup_check


#: The module of each public name.
_PUBLIC = {
    "AdaptiveWarmup": "chatterbox_prewarm.start.adaptive",
    "ChatterboxServer": "chatterbox_prewarm.serve.embedded",
    "ChatterboxService": "chatterbox_prewarm.start.service",
    "ChatterboxWarmupStrategy": "chatterbox_prewarm.model.warmup.strategy",
    "PrewarmedChatterbox": "chatterbox_prewarm.start.pretrained",
    "PrewarmedMultilingual": "chatterbox_prewarm.start.pretrained_multilingual",
    "PrewarmedTurbo": "chatterbox_prewarm.start.pretrained_turbo",
    "PrewarmedVC": "chatterbox_prewarm.start.pretrained_vc",
    "WarmupMetrics": "chatterbox_prewarm.bench.effectiveness",
    "benchmark_warmup_effectiveness": "chatterbox_prewarm.bench.effectiveness",
    "from_pretrained_with_warmup": "chatterbox_prewarm.start.pretrained",
    "generate_stream": "chatterbox_prewarm.model.streaming",
    "generate_stream_with_warmup_check": "chatterbox_prewarm.start.streaming",
    "generate_warmup_report": "chatterbox_prewarm.bench.report.page",
    "load_warmup_cache": "chatterbox_prewarm.start.attach",
    "run_warmup_benchmarks": "chatterbox_prewarm.bench.report.run",
    "save_warmup_cache": "chatterbox_prewarm.start.save",
    "warm_up_multi_gpu": "chatterbox_prewarm.serve.embedded",
}

__all__ = [
    "AdaptiveWarmup",
    "ChatterboxServer",
    "ChatterboxService",
    "ChatterboxWarmupStrategy",
    "PrewarmedChatterbox",
    "PrewarmedMultilingual",
    "PrewarmedTurbo",
    "PrewarmedVC",
    "WarmupMetrics",
    "benchmark_warmup_effectiveness",
    "from_pretrained_with_warmup",
    "generate_stream",
    "generate_stream_with_warmup_check",
    "generate_warmup_report",
    "load_warmup_cache",
    "run_warmup_benchmarks",
    "save_warmup_cache",
    "warm_up_multi_gpu",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
