"""The result of the first step of a start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Session
from chatterbox_prewarm.system.fingerprint import device_kind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.model.profiles import Execution
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.system.metrics import WarmupMetrics


POLICIES = ("require", "fallback", "off")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` found.

    Attributes:
        folders: of the usable families by name, each verified and fit for this machine.
        execution: how the model will execute.
    """

    cache: Path
    weights: Path
    device: str
    policy: str
    manifest: Manifest | None
    folders: Mapping[str, Path]
    execution: Execution
    metrics: WarmupMetrics = field(compare=False)

    @property
    def usable(self) -> tuple[str, ...]:
        """The names of the families that can be used."""
        return tuple(self.folders)

    def session(self, synthesizer: Synthesizer, *, sources: frozenset[str] = frozenset()) -> Session:
        """What the families work on, for a model that this start loaded."""
        return Session(
            synthesizer=synthesizer,
            cache=self.cache,
            metrics=self.metrics,
            device=device_kind(self.device),
            sources=sources,
        )
