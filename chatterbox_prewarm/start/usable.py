"""Decide which families of a state a start can use, and how the model can run with them."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.families.registry import FAMILIES, MAY_BE_EMPTY, applicable
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.system.fingerprint import describe_fact
from chatterbox_prewarm.system.paths import require_execution

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.model.profiles import Execution
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.state.manifest import FamilyEntry
    from chatterbox_prewarm.state.selection import Selection
    from chatterbox_prewarm.system.metrics import StartMetrics

logger = logging.getLogger(__name__)

#: Families without which a profile does not run: compiling them at start takes minutes.
_REQUIRED_BY = {"eager": (), "aot": ("aot",), "compiled": ("inductor", "triton")}
#: The next step after a file of the state was changed.
_RESTORE = "restore the warm state (pull the image again), or bake it again with `chatterbox-prewarm bake`"


def usable_families(
    selection: Selection, wanted: Sequence[str], options: StartOptions, metrics: StartMetrics
) -> tuple[str, ...]:
    """Return the families that fit this machine and whose files are intact. A family with a wrong digest is never read.

    Args:
        selection: the state, and how it fits this machine.
        wanted: the families that this start uses; no others are read or counted.
        options: of the start.
        metrics: counts the misses.

    Raises:
        FingerprintMismatchError, IntegrityError: under "require", a wanted family does not fit or is damaged.
    """
    state, differences = selection.state, selection.compatibility.differences
    profile = options.profile or state.manifest.execution.profile
    bake = f"`chatterbox-prewarm bake --device {options.device} --profile {profile}`"
    usable = []
    for entry in state.manifest.families:
        if entry.name not in FAMILIES:
            metrics.miss(
                entry.name,
                "this version does not know this family",
                next_step=f"upgrade chatterbox-prewarm, or bake with this version: {bake}",
            )
        elif entry.name not in wanted:
            continue
        elif differences[entry.name]:
            _refuse(entry, differences[entry.name], options, metrics, bake)
        elif not entry.files:
            if entry.name not in MAY_BE_EMPTY:
                metrics.miss(entry.name, "it has no files", next_step=f"bake again: {bake}")
        elif problems := verify_files(entry.files, state.path):
            if options.policy == "require":
                raise IntegrityError(
                    f"files of the family {entry.name} of {state.path} differ from the manifest: {'; '.join(problems)}",
                    next_step=_RESTORE,
                )
            reason = f"not read, its files differ from the manifest: {'; '.join(problems)}"
            metrics.miss(entry.name, reason, next_step=_RESTORE)
        else:
            usable.append(entry.name)
    # A state that was baked without a GPU has no family that may be empty. That is no miss: it shows up at every start.
    for name in set(wanted) - {entry.name for entry in state.manifest.families} - set(MAY_BE_EMPTY):
        metrics.miss(name, "not in the warm state", next_step=f"bake it too, without `--without {name}`: {bake}")
    return tuple(usable)


def _refuse(
    entry: FamilyEntry, differences: list[str], options: StartOptions, metrics: StartMetrics, bake: str
) -> None:
    if options.policy == "require":
        raise FingerprintMismatchError(
            f"the family {entry.name} was baked for another machine or other software: {'; '.join(differences)}",
            next_step="bake on this kind of machine, or start with the policy fallback to run cold",
        )
    metrics.miss(entry.name, f"left out: {'; '.join(differences)}", next_step=_mend(differences, options, bake))


def _mend(differences: list[str], options: StartOptions, bake: str) -> str:
    """Return the next step for a family that does not fit."""
    if all(difference.startswith(f"{describe_fact('cache')}: ") for difference in differences):
        return f"start with the cache path of the bake, or bake with this one: {bake}"
    paths = {"--warm": options.warm, "--weights": options.weights, "--cache": options.cache}
    verify = ["chatterbox-prewarm", "verify", "--device", options.device]
    verify += [part for name, path in paths.items() for part in (name, str(path))]
    return f"bake on this kind of machine: {bake}; `{shlex.join(verify)}` lists every difference"


def possible_execution(
    wanted: Execution, folders: Mapping[str, Path], options: StartOptions, metrics: StartMetrics
) -> Execution:
    """Return `wanted` if the usable families allow it, and otherwise the profile `eager`.

    A start that asks for `compiled` by name compiles cold if it must.

    Raises:
        FingerprintMismatchError: under "require", the state lacks a family of the requested profile.
        BadInputError: under "require", the profile is `compiled` and the cache is mounted `noexec`.
    """
    strict = options.policy == "require"
    if wanted.profile == "compiled":  # it loads libraries from the cache
        try:
            require_execution(options.cache)
        except BadInputError as error:
            if strict:
                raise
            metrics.miss("inductor", f"{error.message}; the model runs in eager mode", next_step=error.next_step)
            return replace(wanted, profile="eager")
    required = set(applicable(wanted.profile, options.device)).intersection(_REQUIRED_BY[wanted.profile])
    if required <= folders.keys():
        return wanted
    if strict:
        raise FingerprintMismatchError(
            f"the warm state has no family {min(required - folders.keys())!r}, which the profile {wanted.profile!r} "
            "needs",
            next_step=f"bake with the profile {wanted.profile}, or start with the profile of the state",
        )
    if options.profile is not None and wanted.profile == "compiled":
        return wanted
    logger.warning("no compiled code for the profile %s is usable; the model runs in eager mode", wanted.profile)
    return replace(wanted, profile="eager")
