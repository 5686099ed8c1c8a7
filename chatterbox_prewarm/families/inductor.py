"""Family `inductor`: the caches of `torch.compile` for the regions, for the profile `compiled`.

Inductor's cache key contains the sources of torch, its settings and the name of the device. Its files contain absolute
paths, so bake and run must use one cache path. Hits and misses come from Inductor's own counters; a bypass counts as a
miss.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import BAKE_AGAIN, Family
from chatterbox_prewarm.families.cache_folders import collect, seed
from chatterbox_prewarm.families.compiler_version_cache import cache_versions, load_versions, save_versions
from chatterbox_prewarm.system.fingerprint import device_kind

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import FamilyContext
    from chatterbox_prewarm.system.metrics import StartMetrics

#: Counters of the FX graph cache, and of the AOTAutograd cache if it is on: group, name, and the reason of a miss. A
#: hit has no reason.
_COUNTERS = (
    ("inductor", "fxgraph_cache_hit", ""),
    ("aot_autograd", "autograd_cache_hit", ""),
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
        self._versions: dict[str, str] = {}

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Return whether the profile is `compiled`."""
        return profile == "compiled"

    def environment(self, cache: Path) -> dict[str, str]:
        """Set Inductor's cache folder, and skip checks that would start a compiler.

        The number of compile threads and the check of vector instructions are not part of a cache key. With one thread
        Inductor starts no worker processes; otherwise it starts up to 32. A bake may set more threads.
        """
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "1"),
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
        }

    def prepare(self, directory: Path | None, cache: Path, metrics: StartMetrics) -> None:  # noqa: ARG002
        """Copy the baked cache to a folder in which Inductor may create its lock files."""
        seed(cache / "inductor", directory)

    def watch(self, metrics: StartMetrics) -> None:
        """Take over Inductor's counters whenever the metrics are read."""
        seen: dict[tuple[str, str], int] = {}

        def read() -> None:
            for group, name, reason in _COUNTERS:
                count = _counter(group, name)
                new = count - seen.get((group, name), 0)
                seen[group, name] = count
                if new and reason:
                    metrics.miss(self.name, f"{reason} ({new} times)", new, next_step=BAKE_AGAIN)
                elif new:
                    metrics.hit(self.name, new)

        metrics.before_reading(read)

    def attach(self, directory: Path | None, context: FamilyContext) -> None:  # noqa: ARG002
        """Answer Inductor's requests for the compiler's version, so that no compiler is needed."""
        from torch._inductor import cpp_builder

        self._versions = load_versions(directory)
        cache_versions(cpp_builder, self._versions)

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Copy Inductor's cache of this process, without lock files."""
        collect(context.cache / "inductor", directory, skip=lambda path: path.suffix == ".lock")
        save_versions(self._versions, directory)
        software = ("arch", "instruction_set", "python", "site_packages", "torch", "triton", "regions", "cache")
        machine = ("gpu", "compute_capability", "driver") if device_kind(context.device) == "cuda" else ()
        return (*software, "device", *machine)


def _counter(group: str, name: str) -> int:
    """Return a counter of torch's compiler, or 0 while the compiler is not imported."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters[group][name]) if utils is not None and group in utils.counters else 0
