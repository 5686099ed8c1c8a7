"""The cache families: what each persists, behind one Protocol and one registry. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from chatterbox_prewarm.families.aot import AotFamily
from chatterbox_prewarm.families.bytecode import BytecodeFamily
from chatterbox_prewarm.families.conditionals import ConditionalsFamily
from chatterbox_prewarm.families.cuda import CudaFamily
from chatterbox_prewarm.families.inductor import InductorFamily
from chatterbox_prewarm.families.numba_cache import NumbaFamily
from chatterbox_prewarm.families.signal_constants import SignalFamily
from chatterbox_prewarm.families.triton_cache import TritonFamily
from chatterbox_prewarm.fingerprint import ABSENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chatterbox_prewarm.synthesis import Synthesizer
    from chatterbox_prewarm.warmup.metrics import WarmupMetrics


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a family works on once the model is loaded.

    `device` is its kind, "cpu" or "cuda". `sources` are, at bake, the source files of what a start imports up to its
    first sound.
    """

    synthesizer: Synthesizer
    cache: Path
    metrics: WarmupMetrics
    device: str
    sources: frozenset[str] = frozenset()


class Family(Protocol):
    """One kind of persisted state. The calls come in this order in every process; at bake, `save` ends them.

    Attributes:
        name: of the family and of its folder in the warm state.
        timers: the metrics' phases and timers that this family's work shows up in. Their length in a cold process
            less that in a warm one is what the family saves.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def timers(self) -> tuple[str, ...]: ...  # noqa: D102

    def applies(self, profile: str, device: str) -> bool:
        """Whether a model that executes so, on a device such as "cpu" or "cuda:0", has anything of this family."""

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables that must be set before the model's packages are imported."""

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:
        """Put files in place before anything heavy is imported; `directory` is None when the state is not used."""

    def watch(self, metrics: WarmupMetrics) -> None:
        """Begin to count hits and misses; called right before the model's packages are imported."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Take from `directory`, unless it is None, what goes into the loaded model."""

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Write the family's files and return the keys of the facts that their reuse depends on."""


#: Named apart, since a bake asks it what a start imports.
BYTECODE = BytecodeFamily()
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        BYTECODE,
        NumbaFamily(),
        SignalFamily(),
        ConditionalsFamily(),
        AotFamily(),
        InductorFamily(),
        TritonFamily(),
        CudaFamily(),
    )
}
#: What a bake compiles, in a process of its own before all others.
COMPILED = ("aot", "inductor", "triton")
#: What may hold nothing although it applies: a GPU whose code is all there, so that the driver compiles none.
MAY_BE_EMPTY = ("cuda",)


def applicable(profile: str, device: str) -> tuple[str, ...]:
    """The families that a model which executes so has anything of."""
    return tuple(name for name, family in FAMILIES.items() if family.applies(profile, device))


def current_facts(keys: Iterable[str], machine: Mapping[str, str]) -> dict[str, str]:
    """The present values of the facts named by `keys`.

    Args:
        keys: fields of a fingerprint, or `source:PATH` for the size and modification time of a source file.
        machine: the fingerprint's fields, with what else a family may depend on beside them, as `fit.facts` gives it.
    """
    return {
        key: _stamp(Path(key.removeprefix("source:"))) if key.startswith("source:") else machine.get(key, ABSENT)
        for key in keys
    }


def _stamp(path: Path) -> str:
    """Modification time and size as Numba compares them, to the last digit of the time."""
    try:
        stat = path.stat()
    except OSError:
        return ABSENT
    return f"{stat.st_size} bytes, modified at {stat.st_mtime!r}"
