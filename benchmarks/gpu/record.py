"""Record the results of a part in a JSON file, which is complete and valid after every step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from benchmarks.profiles import variants
from chatterbox_prewarm.errors import as_prewarm_error
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.model.profiles import Execution

Arguments = ParamSpec("Arguments")

#: Executions to measure on a GPU. Not all that `benchmarks profiles` knows, because each bake takes minutes.
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
        known = variants(self.device, PROFILES)
        return {name: known[name] for name in _ON_GPU} if self.device.startswith("cuda") else known

    def state(self, name: str) -> Path:
        """Return the directory of the warm state of an execution."""
        return Path(self.out) / "states" / name.replace(", ", "-")


class Record:
    """The steps of a part and their results.

    Args:
        path: JSON file. Steps that it already contains are skipped, unless they belong to another plan.
        plan: options of the measurement.
        say: called with one line for each step.
    """

    def __init__(self, path: Path, plan: Plan, say: Callable[[str], None]) -> None:
        self._path = path
        self._plan = plan
        self._say = say
        self.steps: dict[str, Any] = _read(path, plan).get("steps", {})
        self.failed: dict[str, str] = {}

    def step(
        self, name: str, measure: Callable[Arguments, dict[str, Any]], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> dict[str, Any] | None:
        """Call `measure` unless the result is already recorded; record a failure, so that later steps still run."""
        if name not in self.steps:
            self._say(name)
            try:
                self.steps[name] = measure(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - an unexpected error must not prevent later steps
                self.failed[name] = as_prewarm_error(error).message
                self._say(f"{name} failed: {self.failed[name]}")
            self.write(complete=False)
        result: dict[str, Any] | None = self.steps.get(name)
        return result

    def write(self, *, complete: bool) -> None:
        """Replace the file atomically. A part with a failed step is not complete."""
        content = {
            "plan": asdict(self._plan),
            "complete": complete and not self.failed,
            "failed": self.failed,
            "steps": self.steps,
        }
        write_whole(self._path, json.dumps(content, indent=1) + "\n")


def is_complete(path: Path, plan: Plan) -> bool:
    """Return whether the file contains every step of the plan."""
    return bool(_read(path, plan).get("complete"))


def _read(path: Path, plan: Plan) -> dict[str, Any]:
    """Read a file; return an empty dict if it is missing or belongs to another plan."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if content["plan"] == asdict(plan) else {}
