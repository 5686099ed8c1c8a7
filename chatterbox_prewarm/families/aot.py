"""Family `aot`: ahead-of-time packages of the regions, loaded where they lie.

What takes minutes to compile loads in milliseconds. A package depends on the machine's instruction set or GPU, on torch
and on the sources of the regions, and on no weight: the same packages serve every checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics


class AotFamily(Family):
    """See the module's docstring."""

    name = "aot"
    timers = ("aot make", "regions")

    def __init__(self) -> None:
        self._directory: Path | None = None

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Only to the profile of that name."""
        return profile == "aot"

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Nothing to set."""
        return {}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:
        """Nothing to do: packages are loaded from the warm state itself."""

    def watch(self, metrics: WarmupMetrics) -> None:
        """Nothing to do: the executor counts."""

    def attach(self, directory: Path | None, session: Session) -> None:  # noqa: ARG002
        """Only note where the packages are: the executor loads them when it binds the regions."""
        self._directory = directory

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Copy the packages that this process runs on."""
        if self._directory is not None:
            collect(self._directory, directory)
        machine = ("gpu", "compute_capability") if session.device == "cuda" else ()
        return ("arch", "instruction_set", "torch", "regions", "device", *machine)
