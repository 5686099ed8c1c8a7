"""The interface of a cache family, and the defaults that families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.system.metrics import StartMetrics


#: The next step after something was compiled or computed that the cache of a family should have had.
BAKE_AGAIN = "if this family or `all` has other misses, mend those; otherwise bake again with `chatterbox-prewarm bake`"


@dataclass(frozen=True, kw_only=True)
class FamilyContext:
    """What families attach to and save from.

    Attributes:
        voices: the voices of the model by name. Families may add voices.
        cache: the cache directory.
        metrics: counts hits, misses and times.
        device: of the model, such as "cuda:0".
        sources: at bake, the source files of all modules that a start imports until its first audio.
        upstream_sources: at bake, the source files of the further modules that upstream's model imports.
    """

    voices: dict[str, Conditionals]
    cache: Path
    metrics: StartMetrics
    device: str
    sources: frozenset[str] = frozenset()
    upstream_sources: frozenset[str] = frozenset()


class Family:
    """One kind of persisted state.

    Every process calls the methods in the order in which they are defined here; only a bake calls `save`. The defaults
    do nothing, so that a family defines only the steps that it takes part in.

    Attributes:
        name: name of the family and of its folder in the warm state.
        for_upstream: whether only upstream's code uses the family, which makes voices. `watch` and `attach` then wait
            until upstream's model is loaded (`start.upstream`).
        timers: the phases and timers of the metrics that measure this family's work. The family saves the difference
            between their sums in a cold and in a warm process.
    """

    name: ClassVar[str]
    for_upstream: ClassVar[bool] = False
    timers: ClassVar[tuple[str, ...]] = ()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """Return whether a model with this profile on this device ("cpu", "cuda:0") uses the family."""
        return True

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Return the environment variables to set before the model's packages are imported."""
        return {}

    def prepare(self, directory: Path | None, cache: Path, metrics: StartMetrics) -> None:
        """Fill the cache before torch and the model's packages are imported.

        Args:
            directory: the verified folder of the family, or None if the state cannot be used.
            cache: the cache directory.
            metrics: counts the artifacts that the family loads.
        """

    def watch(self, metrics: StartMetrics) -> None:
        """Start to count hits and misses. Called just before the model's packages are imported."""

    def attach(self, directory: Path | None, context: FamilyContext) -> None:
        """Load the contents of `directory` into the model. `directory` is None if the state cannot be used."""

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Write the family's files into `directory` and return the names of the facts that their reuse depends on."""
        raise NotImplementedError


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialize tensors of any device in the safetensors format. Without metadata, equal tensors give equal bytes.

    Write the result with Python: the writer of safetensors hides the operating system's error, such as a full disk.
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(save(plain, dict(metadata) if metadata else None))
