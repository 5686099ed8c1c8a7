"""Family `inductor`: what `torch.compile` keeps of the regions, for the profile `compiled`.

Inductor's key holds the sources of torch, its settings and the device's name, and its files hold absolute paths: bake
and run must see one cache path. A hit or a miss is what Inductor itself counted, a bypass counts as a miss.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect, seed
from chatterbox_prewarm.families.compiler_version_cache import Answers

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

#: Inductor's own counters: of the FX graph cache, and of AOTAutograd's where that is on.
_HITS = (("inductor", "fxgraph_cache_hit"), ("aot_autograd", "autograd_cache_hit"))
_MISSES = (
    ("inductor", "fxgraph_cache_miss", "compiled a graph"),
    ("inductor", "fxgraph_cache_bypass", "bypassed the cache for a graph"),
    ("aot_autograd", "autograd_cache_miss", "traced a graph"),
    ("aot_autograd", "autograd_cache_bypass", "bypassed the cache for a trace"),
)


class InductorFamily(Family):
    """See the module's docstring."""

    name = "inductor"
    timers = ("compile",)

    def __init__(self) -> None:
        self._answers = Answers()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Only to the profile `compiled`."""
        return profile == "compiled"

    def environment(self, cache: Path) -> dict[str, str]:
        """Where Inductor caches, and what it needs not find out by compiling.

        The number of compile threads and the check of vector instructions enter no key. With one thread no worker
        processes are started, up to 32 of them otherwise, which a bake may want.
        """
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"),
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
        }

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:  # noqa: ARG002
        """Copy the baked cache to where Inductor may take its locks."""
        seed(cache / "inductor", directory)

    def watch(self, metrics: WarmupMetrics) -> None:
        """Count what Inductor counts."""
        seen: dict[tuple[str, str], int] = {}

        def read() -> None:
            for group, name in _HITS:
                if new := _counter(group, name) - seen.get((group, name), 0):
                    metrics.hit(self.name, new)
                    seen[group, name] = _counter(group, name)
            for group, name, reason in _MISSES:
                if new := _counter(group, name) - seen.get((group, name), 0):
                    metrics.miss(self.name, f"{reason} ({new} times)", new)
                    seen[group, name] = _counter(group, name)

        metrics.before_reading(read)

    def attach(self, directory: Path | None, session: Session) -> None:  # noqa: ARG002
        """Answer for the compiler, so that it need not be started, nor be there."""
        from torch._inductor import cpp_builder

        self._answers.load(directory)
        self._answers.stand_in(cpp_builder)

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Copy Inductor's cache of this process, without its locks."""
        collect(session.cache / "inductor", directory, leave=lambda path: path.suffix == ".lock")
        self._answers.save(directory)
        machine = ("gpu", "compute_capability", "driver") if session.device == "cuda" else ()
        return (
            "arch",
            "instruction_set",
            "python",
            "site_packages",
            "torch",
            "triton",
            "regions",
            "cache",
            "device",
            *machine,
        )


def _counter(group: str, name: str) -> int:
    """A counter of torch's compiler, 0 while that is not imported."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters[group][name]) if utils is not None and group in utils.counters else 0
