"""Family `triton`: GPU kernels and their launchers, for the profile `compiled`.

Triton's group files contain the absolute paths of their members, so bake and run must use one cache path. Triton needs
a C compiler to rebuild a missing launcher.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import BAKE_AGAIN, Family
from chatterbox_prewarm.families.cache_folders import collect, seed
from chatterbox_prewarm.families.compiler_version_cache import cache_versions, load_versions, save_versions

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import FamilyContext
    from chatterbox_prewarm.system.metrics import StartMetrics

#: The modules of Triton that run ptxas to read its version. The second one exists since Triton 3.4.
_VERSION_READERS = ("triton.backends.nvidia.compiler", "triton.knobs")


class TritonFamily(Family):
    """See the module's docstring."""

    name = "triton"

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}

    def applies(self, profile: str, device: str) -> bool:
        """Return whether the profile is `compiled` and the device is a GPU."""
        return profile == "compiled" and device.startswith("cuda")

    def environment(self, cache: Path) -> dict[str, str]:
        """Set Triton's cache folder, and load kernels through that cache, because it counts hits."""
        return {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0"}

    def prepare(self, directory: Path | None, cache: Path, metrics: StartMetrics) -> None:  # noqa: ARG002
        """Copy the baked cache to a folder that Triton may write to."""
        seed(cache / "triton", directory)

    def attach(self, directory: Path | None, context: FamilyContext) -> None:
        """Count hits and misses, and answer Triton's requests for the version of ptxas, which it makes on every hit."""
        from triton.runtime.cache import FileCacheManager

        count(FileCacheManager, context.metrics)
        self._versions = load_versions(directory)
        for name in _VERSION_READERS:
            if importlib.util.find_spec(name) is not None:
                cache_versions(importlib.import_module(name), self._versions)

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Copy Triton's cache of this process."""
        collect(context.cache / "triton", directory)
        save_versions(self._versions, directory)
        return ("arch", "gpu", "compute_capability", "driver", "python", "torch", "triton", "regions", "cache")


def count(manager: Any, metrics: StartMetrics) -> None:
    """Make a class of cache managers count a hit for each group found and a miss for each file written."""
    get_group, put = manager.get_group, manager.put

    def counting_get_group(self: Any, filename: str) -> Any:
        group = get_group(self, filename)
        if group:
            metrics.hit("triton")
        return group

    def counting_put(self: Any, data: Any, filename: str, *arguments: Any, **settings: Any) -> Any:
        metrics.miss("triton", f"compiled {filename}", next_step=BAKE_AGAIN)
        return put(self, data, filename, *arguments, **settings)

    manager.get_group, manager.put = counting_get_group, counting_put
