"""What a part has measured so far: a JSON file that is whole after every step."""

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

#: What is baked and measured on a GPU, among what `bench profiles` knows: a bake there takes minutes of a short lease.
_ON_GPU = ("eager", "eager, graphs", "compiled, graphs", "aot, graphs", "aot, graphs, bf16")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured, and where it is kept; travels as JSON.

    Attributes:
        out: the folder of everything: results, checkpoint, states, cache.
        device: to run on.
        size: of the random weights, "full" or "mini".
        rounds: fresh processes of each system.
    """

    out: str
    device: str
    size: str
    rounds: int

    @property
    def weights(self) -> Path:
        """The checkpoint."""
        return Path(self.out) / f"weights-{self.size}"

    @property
    def cache(self) -> Path:
        """The one cache directory of all bakes and starts."""
        return Path(self.out) / "cache"

    def executions(self) -> dict[str, Execution]:
        """The ways of executing that are compared, by name."""
        known = variants(self.device, PROFILES)
        return {name: known[name] for name in _ON_GPU} if self.device.startswith("cuda") else known

    def state(self, name: str) -> Path:
        """The warm state of a way of executing."""
        return Path(self.out) / "states" / name.replace(", ", "-")


class Record:
    """The steps of a part and what each gave.

    Args:
        path: the file; steps that it names are not done again, unless they were of another plan.
        plan: what is measured.
        say: called with a line for each step.
    """

    def __init__(self, path: Path, plan: Plan, say: Callable[[str], None]) -> None:
        self._path = path
        self._plan = plan
        self._say = say
        self.steps: dict[str, Any] = _read(path, plan).get("steps", {})
        self.failed: dict[str, str] = {}

    def step(
        self, name: str, measure: Callable[Arguments, dict[str, Any]], *given: Arguments.args, **named: Arguments.kwargs
    ) -> dict[str, Any] | None:
        """Call `measure`, unless an earlier run did; a failure is kept, and the steps after it go on."""
        if name not in self.steps:
            self._say(name)
            try:
                self.steps[name] = measure(*given, **named)
            except Exception as error:  # noqa: BLE001 - one that nobody foresaw must not cost the steps after it
                self.failed[name] = as_prewarm_error(error).message
                self._say(f"{name} failed: {self.failed[name]}")
            self.write(complete=False)
        found: dict[str, Any] | None = self.steps.get(name)
        return found

    def write(self, *, complete: bool) -> None:
        """Write all of it at once; a part with a failed step is not complete."""
        content = {
            "plan": asdict(self._plan),
            "complete": complete and not self.failed,
            "failed": self.failed,
            "steps": self.steps,
        }
        write_whole(self._path, json.dumps(content, indent=1) + "\n")


def is_complete(path: Path, plan: Plan) -> bool:
    """Whether a part has been measured as planned, with every step."""
    return bool(_read(path, plan).get("complete"))


def _read(path: Path, plan: Plan) -> dict[str, Any]:
    """What a file holds of this plan; nothing when it is of another one."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content if content["plan"] == asdict(plan) else {}
