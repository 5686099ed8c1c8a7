"""Load: put a warm state in place at the start of a process.

Two steps, because torch and Numba read their cache settings when they are imported: `prepare` runs before any of them
is imported, `attach` after. A start that cannot use a part of the state says why, counts a miss and goes on cold,
unless the policy forbids it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, IntegrityError, from_os_error
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES, applicable
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.start.prepared import POLICIES, Prepared
from chatterbox_prewarm.start.usable import possible_execution, usable_families
from chatterbox_prewarm.state.compatibility import facts
from chatterbox_prewarm.state.folder import key_of
from chatterbox_prewarm.state.selection import choose
from chatterbox_prewarm.state.signing import check_trust
from chatterbox_prewarm.system.locks import share_lock
from chatterbox_prewarm.system.metrics import WarmupMetrics
from chatterbox_prewarm.system.paths import BAKE, make_cache, model_environment
from chatterbox_prewarm.weights.record import check_quickly, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.state.selection import Choice


def prepare(
    warm: Path,
    weights: Path,
    *,
    cache: Path,
    device: str = "cpu",
    policy: str = "fallback",
    profile: str | None = None,
    execution: Execution | None = None,
    made: Path | None = None,
    metrics: WarmupMetrics | None = None,
    key: Path | None = None,
    signature: Path | None = None,
    expected_digest: str | None = None,
) -> Prepared:
    """Verify the warm state, compare fingerprints, seed the caches and set the environment; imports nothing heavy.

    Args:
        warm: the warm state's directory, or a folder of states, of which the one that fits best is used; never written
            to.
        weights: the checkpoint's directory.
        cache: a writable directory for what compilers and Numba keep.
        device: as upstream takes it, a string.
        policy: "require" raises on any misfit, "fallback" leaves the family out, "off" ignores the state.
        profile: how to execute; by default as the state was baked for, and as written without a state.
        execution: the same with all that goes on top of a profile, for a bake.
        made: what a bake compiled before, a folder for each family; used as if it were baked.
        metrics: the log to write into; a new one by default.
        key: a public key; a state that is not signed with its private one counts as no state.
        signature: where the signature is; beside the state by default.
        expected_digest: of the state's manifest, as for `signing.check_trust`; another state counts as none.

    Raises:
        WeightsError: the weights are missing, or a file of theirs is truncated.
        FingerprintMismatchError: under "require", a family was baked for something else, or each of several states was.
        IntegrityError: under "require", the state or a file of it is not as its manifest says, or is not trusted.
        BadInputError: an unknown policy or profile, or a key that is none, or `cache` cannot be written, or a bake is
            at work in it.
    """
    if policy not in POLICIES:
        raise BadInputError(f"there is no policy {policy!r}", next_step=f"choose one of: {', '.join(POLICIES)}")
    metrics = metrics or WarmupMetrics()
    cache = cache.resolve()  # one name for it, since compilers keep it in what they write
    asked = execution or Execution(profile=profile or "eager", graphs=device.startswith("cuda"))
    with metrics.phase("prepare"):
        check_quickly(weights, read_record(weights))  # no policy can do without weights, so this comes first
        make_cache(cache)
        share_lock(cache / BAKE)  # a bake would empty it
        manifest: Manifest | None = None
        folders: dict[str, Path] = {}
        if policy == "off":
            folders = _compiled_before(made, applicable(asked.profile, device), metrics)
        else:
            known = facts(weights, cache, device)
            trust = {"key": key, "signature": signature, "expected_digest": expected_digest}
            found = _read_state(warm, known, policy, metrics, device=device, profile=profile, trust=trust)
            if found is not None:
                manifest, warm = found.manifest, found.path
                metrics.state = key_of(manifest)
                asked = manifest.execution if profile is None else replace(manifest.execution, profile=profile)
                wanted = applicable(asked.profile, device)
                usable = usable_families(manifest, warm, wanted, known, policy=policy, metrics=metrics)
                folders = {name: warm / name for name in usable}
            asked = possible_execution(asked, folders, device, cache, policy, metrics, by_name=profile is not None)
        metrics.profile = asked.profile
        try:
            environment = model_environment(cache)
            for name, family in FAMILIES.items():
                environment |= family.environment(cache)
                if family.applies(asked.profile, device):
                    family.prepare(folders.get(name), cache, metrics)
        except OSError as error:
            raise from_os_error(error, f"seeding the cache directory {cache}") from error
        os.environ.update(environment)
        _warn_if_late(metrics)
    return Prepared(
        cache=cache,
        weights=weights,
        device=device,
        policy=policy,
        manifest=manifest,
        folders=folders,
        execution=asked,
        metrics=metrics,
    )


def _compiled_before(made: Path | None, wanted: Sequence[str], metrics: WarmupMetrics) -> dict[str, Path]:
    """What a bake compiled before this start, which has nothing else; all else counts as missed."""
    folders = {name: made / name for name in COMPILED if made is not None and (made / name).is_dir()}
    for name in wanted:
        if name not in folders:
            metrics.miss(name, "the policy is off")
    return folders


def _read_state(
    warm: Path,
    known: Mapping[str, str],
    policy: str,
    metrics: WarmupMetrics,
    *,
    device: str,
    profile: str | None,
    trust: Mapping[str, Any],
) -> Choice | None:
    """The state to use, trusted and of a sound layout; None, and a miss, when the policy lets a start go on without.

    Raises:
        IntegrityError: under "require", there is no such state.
        FingerprintMismatchError: under "require", none of several fits.
        BadInputError: what was given to trust it by cannot be used.
    """
    try:
        found = choose(warm, lambda _: known, device=device, profile=profile, strict=policy == "require")
        check_trust(found.path, **trust)
    except (IntegrityError, OSError) as error:
        if policy == "require":
            if isinstance(error, OSError):
                raise from_os_error(error, "reading the warm state") from error
            raise
        metrics.miss("all", str(error).partition("\n")[0])
        return None
    if not found.fits:  # then a broken one might have done better
        for sentence in found.broken:
            metrics.miss("states", sentence)
    return found


def _warn_if_late(metrics: WarmupMetrics) -> None:
    for name in ("numba", "torch"):
        if name in sys.modules:
            metrics.miss("late", f"{name} was imported before prepare, and keeps the settings that it found")
