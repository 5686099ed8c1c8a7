"""Family `cuda`: the driver's cache of machine code that it compiled from PTX, for GPUs newer than a binary.

The driver has no counters. If it compiles nothing, its cache does not grow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect, seed

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import FamilyContext
    from chatterbox_prewarm.system.metrics import StartMetrics

_MAX_BYTES = 256 * 2**20


class CudaFamily(Family):
    """See the module's docstring."""

    name = "cuda"

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Return whether the device is a GPU."""
        return device.startswith("cuda")

    def environment(self, cache: Path) -> dict[str, str]:
        """Set the folder and the maximum size of the driver's cache."""
        return {"CUDA_CACHE_PATH": str(cache / "cuda"), "CUDA_CACHE_MAXSIZE": str(_MAX_BYTES)}

    def prepare(self, directory: Path | None, cache: Path, metrics: StartMetrics) -> None:
        """Copy the baked cache to a folder that the driver may write to."""
        seed(cache / "cuda", directory)
        if directory is not None:
            metrics.loaded[self.name] += sum(path.is_file() for path in directory.rglob("*"))

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Copy the driver's cache of this process."""
        collect(context.cache / "cuda", directory)
        return ("gpu", "compute_capability", "driver")
