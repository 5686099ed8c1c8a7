"""The interface of a cache family, and the defaults that families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.system.metrics import WarmupMetrics


@dataclass(frozen=True, kw_only=True)
class Session:
    """The loaded model that families attach to and save from.

    Attributes:
        synthesizer: the model and its voices.
        cache: the cache directory.
        metrics: where hits, misses and times are counted.
        device: the kind of the device, "cpu" or "cuda".
        sources: at bake, the source files of all modules that a start imports until its first audio.
    """

    synthesizer: Synthesizer
    cache: Path
    metrics: WarmupMetrics
    device: str
    sources: frozenset[str] = frozenset()


class Family:
    """One kind of persisted state.

    Every process calls the methods in the order in which they are defined here; only a bake calls `save`. The defaults
    do nothing, so that a family defines only the steps that it takes part in.

    Attributes:
        name: name of the family and of its folder in the warm state.
        timers: the phases and timers of the metrics that measure this family's work. The family saves the difference
            between their sums in a cold and in a warm process.
    """

    name: ClassVar[str]
    timers: ClassVar[tuple[str, ...]] = ()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Return whether a model with this profile on this device ("cpu", "cuda:0") uses the family."""
        return True

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Return the environment variables to set before the model's packages are imported."""
        return {}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:
        """Fill the cache before anything heavy is imported.

        Args:
            directory: the verified folder of the family, or None if the state cannot be used.
            cache: the cache directory.
            metrics: where the family counts what it loads.
        """

    def watch(self, metrics: WarmupMetrics) -> None:
        """Start to count hits and misses. Called just before the model's packages are imported."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Load the contents of `directory`, unless it is None, into the model."""

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Write the family's files into `directory` and return the names of the facts that their reuse depends on."""
        raise NotImplementedError
