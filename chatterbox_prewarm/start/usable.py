"""Decide which families of a state a start can use, and how the model can execute with them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.families.registry import FAMILIES, MAY_BE_EMPTY, applicable
from chatterbox_prewarm.state.compatibility import check_fit
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.system.paths import require_execution

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.model.profiles import Execution
    from chatterbox_prewarm.state.manifest import FamilyEntry, Manifest
    from chatterbox_prewarm.system.metrics import WarmupMetrics

logger = logging.getLogger(__name__)

#: The families that a profile stands on: without one the model runs as written, since compiling takes minutes.
_STANDS_ON = {"eager": (), "aot": ("aot",), "compiled": ("inductor", "triton")}


def usable_families(
    manifest: Manifest,
    warm: Path,
    wanted: Sequence[str],
    known: Mapping[str, str],
    *,
    policy: str,
    metrics: WarmupMetrics,
) -> tuple[str, ...]:
    """The families that fit this machine and whose files are intact; a family whose digest is wrong is never read.

    Args:
        manifest: of the state.
        warm: its directory.
        wanted: the families that this start has any use for; of the others nothing is read or counted.
        known: the present `facts`.
        policy: of the start.
        metrics: where misses are counted.

    Raises:
        FingerprintMismatchError, IntegrityError: under "require", a wanted family does not fit or is not intact.
    """
    differences = check_fit(manifest, known)
    usable = []
    for entry in manifest.families:
        if entry.name not in FAMILIES:
            metrics.miss(entry.name, "this version knows no such family")
        elif entry.name not in wanted:
            continue
        elif differences[entry.name]:
            _misfit(entry, differences[entry.name], policy, metrics)
        elif not entry.files:
            if entry.name not in MAY_BE_EMPTY:
                metrics.miss(entry.name, "it has no files")
        elif problems := verify_files(entry.files, warm):
            if policy == "require":
                raise IntegrityError(
                    f"the family {entry.name} of {warm} is not as baked: {'; '.join(problems)}",
                    next_step="restore the warm state, or bake it again with `chatterbox-prewarm bake`",
                )
            metrics.miss(entry.name, f"not read, its files are not as baked: {'; '.join(problems)}")
        else:
            usable.append(entry.name)
    for name in set(wanted) - {entry.name for entry in manifest.families}:
        metrics.miss(name, "not in the warm state")
    return tuple(usable)


def _misfit(entry: FamilyEntry, differences: list[str], policy: str, metrics: WarmupMetrics) -> None:
    if policy == "require":
        raise FingerprintMismatchError(
            f"the family {entry.name} was baked for something else: {'; '.join(differences)}",
            next_step="bake on this machine's kind, or start with --policy fallback to run cold",
        )
    metrics.miss(entry.name, f"left out: {'; '.join(differences)}")


def possible_execution(
    asked: Execution,
    folders: Mapping[str, Path],
    device: str,
    cache: Path,
    policy: str,
    metrics: WarmupMetrics,
    *,
    by_name: bool,
) -> Execution:
    """How the model can execute with what is usable: as asked for, or as written.

    Whoever asks for `compiled` by name has it compiled cold.

    Raises:
        FingerprintMismatchError: under "require", the state has nothing for the profile asked for.
        BadInputError: under "require", the profile is `compiled` and the cache forbids execution.
    """
    if asked.profile == "compiled":  # the one that loads libraries from the cache
        try:
            require_execution(cache)
        except BadInputError as error:
            if policy == "require":
                raise
            metrics.miss("inductor", f"{error.message}; the model runs as written")
            return replace(asked, profile="eager")
    needed = set(applicable(asked.profile, device)).intersection(_STANDS_ON[asked.profile])
    if needed <= folders.keys():
        return asked
    if policy == "require":
        raise FingerprintMismatchError(
            f"the warm state has no family {min(needed - folders.keys())!r}, which the profile {asked.profile!r} needs",
            next_step=f"bake with --profile {asked.profile}, or leave the profile to the state",
        )
    if by_name and asked.profile == "compiled":
        return asked
    logger.warning("the profile %s has nothing to run from; the model runs as written", asked.profile)
    return replace(asked, profile="eager")
