"""The options of a bake. A bake passes them to its child processes as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.registry import FAMILIES
from chatterbox_prewarm.model.profiles import Execution, default_execution
from chatterbox_prewarm.model.warmup.settings import LEVELS
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.system.digests import hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class BakeOptions:
    """The options of a bake.

    Attributes:
        weights: the directory of a complete checkpoint.
        warm: the directory of the new state. While the bake runs, the state is in a hidden directory next to it.
        cache: the cache directory, with the same path as at run time. A bake empties the caches in it.
        device: the device of the warm-up.
        target: the GPU to compile for on a machine without one; None compiles on the device.
        execution: how the model runs; None for the default of the device.
        levels: the levels of the warm-up.
        voices: names and reference clips of voices to bake in addition to the built-in voice.
        families: the cache families to bake.
    """

    weights: Path
    warm: Path
    cache: Path
    device: str = "cpu"
    target: str | None = None
    execution: Execution | None = None
    levels: tuple[int, ...] = LEVELS
    voices: Mapping[str, Path] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)

    @property
    def how(self) -> Execution:
        """The execution: `execution`, or the default of the device."""
        return self.execution or default_execution(self.device)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a JSON object."""
        return {
            **asdict(self),
            **{name: str(getattr(self, name)) for name in ("weights", "warm", "cache")},
            "execution": asdict(self.how),
            "voices": {name: str(clip) for name, clip in self.voices.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BakeOptions:
        """Read options that `to_dict` returned."""
        return cls(
            **{
                **raw,
                **{name: Path(raw[name]) for name in ("weights", "warm", "cache")},
                "execution": Execution(**raw["execution"]),
                "levels": tuple(raw["levels"]),
                "voices": {name: Path(clip) for name, clip in raw["voices"].items()},
                "families": tuple(raw["families"]),
            }
        )

    def start_options(self, output: Path, compiled: Path | None = None) -> StartOptions:
        """Return the options of a start without a state.

        Args:
            output: the directory of the new state.
            compiled: the folder with the code that the compile process made.
        """
        return StartOptions(
            warm=output,
            weights=self.weights,
            cache=self.cache,
            device=self.device,
            policy="off",
            execution=self.how,
            compiled=compiled,
        )

    def parameters(self) -> dict[str, str]:
        """Return the options for the provenance: without paths, and with the digest of each voice's clip."""
        return {
            "device": self.device,
            **({} if self.target is None else {"target": self.target}),
            "families": ",".join(self.families),
            "levels": ",".join(map(str, self.levels)),
            **{name: str(value) for name, value in asdict(self.how).items()},
            **{f"voice:{name}": f"sha256:{hash_file(clip)}" for name, clip in self.voices.items()},
        }
