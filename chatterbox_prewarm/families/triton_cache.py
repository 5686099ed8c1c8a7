"""Family `triton`: GPU kernels and their launchers, for the profile `compiled`.

Triton's group files name their members by absolute paths, so bake and run must see one cache path. A launcher that is
missing needs a C compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect, seed
from chatterbox_prewarm.families.compiler_version_cache import Answers

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

#: The modules of Triton that ask ptxas for its version; the second one is there since Triton 3.4.
_ASKING = ("triton.backends.nvidia.compiler", "triton.knobs")


class TritonFamily(Family):
    """See the module's docstring."""

    name = "triton"
    timers = ()

    def __init__(self) -> None:
        self._answers = Answers()

    def applies(self, profile: str, device: str) -> bool:
        """Only to the profile `compiled` on a GPU."""
        return profile == "compiled" and device.startswith("cuda")

    def environment(self, cache: Path) -> dict[str, str]:
        """Where Triton caches; kernels come through its own cache, where hits are counted, and not past it."""
        return {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0"}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:  # noqa: ARG002
        """Copy the baked cache to where Triton may write."""
        seed(cache / "triton", directory)

    def watch(self, metrics: WarmupMetrics) -> None:
        """Nothing to do yet: Triton comes with the compiler."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Count at the doors of Triton's cache: a group of files that is found is a hit, a file put in was compiled.

        And answer for ptxas, which Triton asks for its version even on a hit.
        """
        from triton.runtime.cache import FileCacheManager

        count(FileCacheManager, session.metrics)
        self._answers.load(directory)
        for name in _ASKING:
            if importlib.util.find_spec(name) is not None:
                self._answers.stand_in(importlib.import_module(name))

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Copy Triton's cache of this process."""
        collect(session.cache / "triton", directory)
        self._answers.save(directory)
        return ("arch", "gpu", "compute_capability", "driver", "python", "torch", "triton", "regions", "cache")


def count(manager: Any, metrics: WarmupMetrics) -> None:
    """Have a cache manager's class count what it finds and what is put into it."""
    get_group, put = manager.get_group, manager.put

    def counting_get_group(self: Any, filename: str) -> Any:
        found = get_group(self, filename)
        if found:
            metrics.hit("triton")
        return found

    def counting_put(self: Any, data: Any, filename: str, *arguments: Any, **settings: Any) -> Any:
        metrics.miss("triton", f"made {filename}")
        return put(self, data, filename, *arguments, **settings)

    manager.get_group, manager.put = counting_get_group, counting_put
