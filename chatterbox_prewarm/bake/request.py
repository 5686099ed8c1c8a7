"""What a bake asks of its child processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatterbox_prewarm.system.digests import hash_file


@dataclass(frozen=True, kw_only=True)
class BakeRequest:
    """What the processes before the last are to do; travels to them as JSON. `made` is where the compiled goes."""

    weights: str
    cache: str
    output: str
    made: str
    device: str
    execution: dict[str, Any]
    levels: tuple[int, ...]
    voices: dict[str, str]
    families: tuple[str, ...]

    def parameters(self) -> dict[str, str]:
        """What was asked for, for the provenance: no places of this machine, and a voice by the digest of its clip."""
        return {
            "device": self.device,
            "families": ",".join(self.families),
            "levels": ",".join(map(str, self.levels)),
            **{name: str(value) for name, value in self.execution.items()},
            **{f"voice:{name}": f"sha256:{hash_file(Path(clip))}" for name, clip in self.voices.items()},
        }
