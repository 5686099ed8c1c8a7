"""Variants of the Dockerfile for builders that the one of the project is not for.

A step that wants a GPU by CDI says so (`RUN --device`), which a builder older than BuildKit 0.20 cannot parse. Docker's
classic builder knows no mounts, and builds every stage that it reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VARIANTS = ("cdi", "classic")
#: The frontend that knows `RUN --device`; BuildKit's documentation, "Container Device Interface".
_SYNTAX = "# syntax=docker/dockerfile:1-labs\n"
_GPU = "nvidia.com/gpu=all"
#: The step that bakes, by what it runs.
_BAKE = "/build/bake.py"
_FROM = re.compile(r"FROM\s+(?P<base>\S+)(?:\s+AS\s+(?P<name>\S+))?", re.IGNORECASE)
_ARGUMENT = re.compile(r"ARG\s+(?P<name>\w+)=(?P<value>\S*)")


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage: its name, the base that it names, its instructions, comments between them included."""

    name: str
    base: str
    lines: tuple[str, ...]

    @property
    def needs(self) -> set[str]:
        """The stages that its steps name."""
        return set(re.findall(r"(?:--from=|[,\s]from=)([\w.-]+)", "\n".join(self.lines)))


def for_cdi(text: str) -> str:
    """The Dockerfile with the builder's GPUs in the step that bakes.

    Raises:
        BadInputError: it has no such step.
    """
    lines = text.splitlines(keepends=True)
    step = _step(lines, _BAKE)
    lines[step] = lines[step].replace("RUN ", f"RUN --device={_GPU} ", 1)
    return _SYNTAX + "".join(lines)


def for_classic(text: str, arguments: Mapping[str, str], target: str) -> str:
    """The Dockerfile without mounts, and without the stages that `target` does not stand on.

    What was a cache is none; a secret is not there; what was bound from a stage is copied from it.

    Args:
        text: the Dockerfile.
        arguments: build arguments that choose stages, where they are not the default.
        target: the last stage.

    Raises:
        BadInputError: there is no such stage.
    """
    head, stages = _stages(text)
    defaults = {found["name"]: found["value"] for line in head if (found := _ARGUMENT.match(line))}
    values = {**defaults, **arguments}
    bases = {stage.name: _resolved(stage.base, values) for stage in stages}
    named = {stage.name: stage for stage in stages}
    if target not in named:
        raise BadInputError(f"the Dockerfile has no stage {target!r}", next_step=f"choose from: {', '.join(named)}")
    wanted, left = set[str](), [target]
    while left:
        name = left.pop()
        if name in named and name not in wanted:
            wanted.add(name)
            left += [bases[name], *named[name].needs]
    kept = [line for stage in stages if stage.name in wanted for line in _unmounted(stage.lines)]
    return "".join([*head, *kept])


def _stages(text: str) -> tuple[list[str], list[_Stage]]:
    """What comes before the first stage, and the stages."""
    head: list[str] = []
    parts: list[list[str]] = []
    for line in text.splitlines(keepends=True):
        if _FROM.match(line):
            parts.append([])
        (parts[-1] if parts else head).append(line)
    stages = []
    for number, lines in enumerate(parts):
        found = _FROM.match(lines[0])
        assert found is not None
        stages.append(_Stage(name=found["name"] or str(number), base=found["base"], lines=tuple(lines)))
    return head, stages


def _resolved(base: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], ""), base)


def _unmounted(lines: Sequence[str]) -> list[str]:
    """The lines of a stage, its mounts taken out; a folder bound from another stage is copied before the step."""
    result: list[str] = []
    start = 0
    for line in lines:
        if line.startswith("RUN "):
            start = len(result)
        rest = line
        for mount in re.findall(r"--mount=(\S+)\s*", line):
            settings = dict(part.partition("=")[::2] for part in mount.split(","))
            if settings.get("type") == "bind" and "from" in settings:
                result.insert(start, f"COPY --from={settings['from']} {settings['source']} {settings['target']}\n")
                start += 1
            rest = re.sub(r"--mount=\S+\s*", "", rest, count=1)
        if rest is not line and rest.strip() in {"", "\\"}:
            continue  # a line of mounts alone
        result.append(rest)
    return [re.sub(r"^RUN \\\n", "RUN ", line) for line in _joined(result)]


def _joined(lines: Sequence[str]) -> list[str]:
    """A `RUN` that lost all that stood on its line goes on with the next one."""
    result: list[str] = []
    for line in lines:
        if result and re.fullmatch(r"RUN\s*\\\n", result[-1]):
            result[-1] = f"RUN {line.lstrip()}"
        else:
            result.append(line)
    return result


def _step(lines: Sequence[str], run: str) -> int:
    """The line that begins the step which runs a program."""
    for number, line in enumerate(lines):
        if run in line and not line.startswith(("COPY", "#")):
            return max(index for index in range(number + 1) if lines[index].startswith("RUN "))
    raise BadInputError(f"the Dockerfile has no step that runs {run}", next_step="name the Dockerfile of this project")
