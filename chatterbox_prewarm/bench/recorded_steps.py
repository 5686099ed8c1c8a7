"""Record the results of the steps of a measurement in a JSON file, so that an interrupted measurement continues."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ParamSpec

from chatterbox_prewarm.errors import BadInputError, as_prewarm_error
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Arguments = ParamSpec("Arguments")


class RecordedSteps:
    """The steps of a measurement and their results. The file is complete and valid JSON after every step.

    Args:
        path: JSON file. Steps that it already contains are not measured again.
        plan: inputs that change the results, such as the machine and the options; JSON values.
        say: called with one line for each step.

    Attributes:
        steps: result of each step by its name.
        failed: message of each step that failed.

    Raises:
        BadInputError: the file contains results of another plan.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._path = path
        self._plan = dict(plan)
        self._say = say
        content = read_results(path)
        if content and (different := differences(content["plan"], self._plan)):
            raise BadInputError(
                f"{path} contains results of another measurement ({'; '.join(different)})",
                next_step="name another folder, or remove that file",
            )
        self.steps: dict[str, Any] = content.get("steps", {})
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

    def write(self, *, complete: bool) -> dict[str, Any]:
        """Replace the file atomically, and return its content. A measurement with a failed step is not complete."""
        content = {
            "plan": self._plan,
            "complete": complete and not self.failed,
            "failed": self.failed,
            "steps": self.steps,
        }
        write_whole(self._path, json.dumps(content, indent=1) + "\n")
        return content


def read_results(path: Path) -> dict[str, Any]:
    """Read a file that `RecordedSteps` wrote; return an empty dict if it does not exist.

    Raises:
        BadInputError: it is another kind of file.
    """
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["plan"], content["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{path} does not contain results of a measurement", next_step="name the JSON file of a report"
        ) from error
    return content


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each field in which two plans differ."""
    return [
        f"{name}: {old.get(name)} there, {new.get(name)} here"
        for name in sorted({*old, *new})
        if old.get(name) != json.loads(json.dumps(new.get(name)))
    ]


def is_complete(path: Path, plan: Mapping[str, Any]) -> bool:
    """Return whether the file contains every step of this plan."""
    content = read_results(path)
    return bool(content.get("complete")) and not differences(content["plan"], plan)
