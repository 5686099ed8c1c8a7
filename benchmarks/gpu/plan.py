"""Options of the measurement on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.bench.executions import file_name, select_executions
from chatterbox_prewarm.model.profiles import PROFILES

if TYPE_CHECKING:
    from chatterbox_prewarm.model.profiles import Execution

#: Executions to measure on a GPU: a selection, because each bake takes minutes.
_ON_GPU = ("eager", "eager, graphs", "compiled, graphs", "aot, graphs", "aot, graphs, bf16")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Options of the measurement, which are passed to its processes as JSON.

    Attributes:
        out: folder for results, checkpoint, states and cache.
        device: torch device.
        size: size of the random weights, "full" or "mini".
        rounds: fresh processes of each system.
    """

    out: str
    device: str
    size: str
    rounds: int

    @property
    def weights(self) -> Path:
        """Directory of the checkpoint."""
        return Path(self.out) / f"weights-{self.size}"

    @property
    def cache(self) -> Path:
        """Cache directory that all bakes and starts share."""
        return Path(self.out) / "cache"

    def executions(self) -> dict[str, Execution]:
        """Return the executions to compare by name."""
        known = select_executions(self.device, PROFILES)
        return {name: known[name] for name in _ON_GPU} if self.device.startswith("cuda") else known

    def state(self, name: str) -> Path:
        """Return the directory of the warm state of an execution."""
        return Path(self.out) / "states" / file_name(name)
