"""Variants of the project's Dockerfile for other builders.

A step that needs a GPU through CDI has to say so (`RUN --device`), which a builder older than BuildKit 0.20 cannot
parse. Docker's classic builder does not support mounts, and builds every stage of the file.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VARIANTS = ("cdi", "classic")
#: The Dockerfile frontend that supports `RUN --device`; see "Container Device Interface" in BuildKit's documentation.
_SYNTAX = "# syntax=docker/dockerfile:1-labs\n"
_GPU = "nvidia.com/gpu=all"
#: The program that the bake step runs.
_BAKE = "/build/bake.py"
_FROM = re.compile(r"FROM\s+(?P<base>\S+)(?:\s+AS\s+(?P<name>\S+))?", re.IGNORECASE)
_ARGUMENT = re.compile(r"ARG\s+(?P<name>\w+)=(?P<value>\S*)")
_RUN = re.compile(r"^RUN (?:.*\\\n)*.*\n", re.MULTILINE)


def for_cdi(text: str) -> str:
    """Return the Dockerfile with the builder's GPUs in the bake step.

    Raises:
        BadInputError: there is no bake step.
    """
    for step in _RUN.finditer(text):
        if _BAKE in step[0]:
            with_gpu = step[0].replace("RUN ", f"RUN --device={_GPU} ", 1)
            return _SYNTAX + text[: step.start()] + with_gpu + text[step.end() :]
    raise BadInputError(
        f"the Dockerfile has no step that runs {_BAKE}", next_step="name the Dockerfile of this project"
    )


def for_classic(text: str, arguments: Mapping[str, str], target: str) -> str:
    """Return the Dockerfile without mounts, and only with the stages that `target` needs.

    A cache or a secret is left out. A folder that is bound from another stage is copied instead.

    Args:
        text: the Dockerfile.
        arguments: build arguments that select stages, if they differ from the defaults.
        target: name of the last stage.

    Raises:
        BadInputError: there is no such stage.
    """
    head, stages = _split(text)
    if target not in stages:
        raise BadInputError(f"the Dockerfile has no stage {target!r}", next_step=f"choose from: {', '.join(stages)}")
    defaults = {match["name"]: match["value"] for line in head if (match := _ARGUMENT.match(line))}
    needed, queue = set[str](), [target]
    while queue:
        name = queue.pop()
        if name in stages and name not in needed:
            needed.add(name)
            queue += _references(stages[name], {**defaults, **arguments})
    kept = "".join(line for name, lines in stages.items() if name in needed for line in lines)
    return "".join(head) + _RUN.sub(_without_mounts, kept)


def _split(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the lines before the first stage, and the lines of each stage by its name or number."""
    head: list[str] = []
    stages: dict[str, list[str]] = {}
    current = head
    for line in text.splitlines(keepends=True):
        if match := _FROM.match(line):
            current = stages.setdefault(match["name"] or str(len(stages)), [])
        current.append(line)
    return head, stages


def _references(stage: Sequence[str], arguments: Mapping[str, str]) -> list[str]:
    """Return the stages and images that a stage is based on or copies from."""
    first = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), stage[0])
    return [
        *(match["base"] for match in _FROM.finditer(first)),
        *re.findall(r"(?:--from=|[,\s]from=)([\w.-]+)", "".join(stage)),
    ]


def _without_mounts(step: re.Match[str]) -> str:
    """Return a RUN step without its mounts, after a COPY for each folder that it binds from another stage."""
    copies = []
    for mount in re.findall(r"--mount=(\S+)", step[0]):
        options = dict(part.partition("=")[::2] for part in mount.split(","))
        if options.get("type") == "bind" and "from" in options:
            copies.append(f"COPY --from={options['from']} {options['source']} {options['target']}\n")
    return "".join(copies) + re.sub(r"--mount=\S+\s*(?:\\\n\s*)?", "", step[0])
