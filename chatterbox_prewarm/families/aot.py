"""Family `aot`: ahead-of-time packages of the regions, loaded from the warm state without a copy.

Compiling them takes minutes and loading them takes milliseconds. A package depends on the machine's instruction set or
GPU, on torch and on the sources of the regions. It does not depend on the weights, so one set works with every
checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect
from chatterbox_prewarm.system.fingerprint import device_kind
from chatterbox_prewarm.system.gpu_stand_in import stand_in_target

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import FamilyContext


class AotFamily(Family):
    """See the module's docstring."""

    name = "aot"
    timers = ("aot make",)

    def __init__(self) -> None:
        self._directory: Path | None = None

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Return whether the profile is `aot`."""
        return profile == "aot"

    def attach(self, directory: Path | None, context: FamilyContext) -> None:  # noqa: ARG002
        """Remember the folder for `save`. The executor loads the packages when it binds the regions."""
        self._directory = directory

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Copy the packages that this process uses."""
        if self._directory is not None:
            collect(self._directory, directory)
        software = ("arch", "torch", "regions", "device")
        if device_kind(context.device) == "cpu":
            return (*software, "instruction_set")
        target = stand_in_target()
        if target is None:
            return (*software, "instruction_set", "gpu", "compute_capability")
        # Compiled without the instructions of this machine's processor.
        return (*software, *(("gpu",) if target.gpu else ()), "compute_capability")
