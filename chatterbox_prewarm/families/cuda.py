"""Family `cuda`: the driver's cache of code that it compiled from PTX, for GPUs newer than a binary.

The driver keeps no counters; that nothing was compiled shows in a cache that does not grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect, seed

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

_BYTES = 256 * 2**20


class CudaFamily(Family):
    """See the module's docstring."""

    name = "cuda"
    timers = ()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """To every profile on a GPU."""
        return device.startswith("cuda")

    def environment(self, cache: Path) -> dict[str, str]:
        """Where the driver caches, and how much."""
        return {"CUDA_CACHE_PATH": str(cache / "cuda"), "CUDA_CACHE_MAXSIZE": str(_BYTES)}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:
        """Copy the baked cache to where the driver may write."""
        seed(cache / "cuda", directory)
        if directory is not None:
            metrics.loaded[self.name] += sum(path.is_file() for path in directory.rglob("*"))

    def watch(self, metrics: WarmupMetrics) -> None:
        """Nothing to do: the driver does not say what it reads."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Nothing to do: the driver reads its cache by itself."""

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Copy the driver's cache of this process."""
        collect(session.cache / "cuda", directory)
        return ("gpu", "compute_capability", "driver")
