"""Fit: which families of a warm state this machine may use, and in words why not the others."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm import manifest as manifests
from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, IntegrityError, WeightsError
from chatterbox_prewarm.families import FAMILIES, MAY_BE_EMPTY, applicable, current_facts
from chatterbox_prewarm.fingerprint import explain, package_digest, read_fingerprint
from chatterbox_prewarm.places import require_execution
from chatterbox_prewarm.signing import check_trust
from chatterbox_prewarm.weights import read_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.manifest import FamilyEntry, Manifest
    from chatterbox_prewarm.profiles import Execution
    from chatterbox_prewarm.warmup.metrics import WarmupMetrics

logger = logging.getLogger(__name__)

#: The families that a profile stands on: without one the model runs as written, since compiling takes minutes.
_STANDS_ON = {"eager": (), "aot": ("aot",), "compiled": ("inductor", "triton")}


def device_kind(device: str) -> str:
    """The kind of a torch device: "cpu" or "cuda"."""
    return device.partition(":")[0]


def facts(weights: Path, cache: Path, device: str) -> dict[str, str]:
    """What a family's reuse may depend on besides source files: the machine, its software, weights, places, device."""
    known = read_fingerprint(device).fields() | {
        "cache": str(cache.resolve()),
        "device": device_kind(device),
        "regions": package_digest("chatterbox_prewarm.regions"),
    }
    try:
        record = read_record(weights)
    except WeightsError as error:
        logger.warning("%s", error.message)
        return known
    return known | {"weights": record.set_digest, "variant": record.variant}


def check_fit(manifest: Manifest, known: Mapping[str, str]) -> dict[str, list[str]]:
    """Compare each family's requirements with the present `facts`.

    Returns:
        for every family the differences in words; an empty list means that it fits.
    """
    return {entry.name: explain(entry.requires, current_facts(entry.requires, known)) for entry in manifest.families}


def verify(
    warm: Path,
    weights: Path,
    cache: Path,
    *,
    key: Path | None = None,
    signature: Path | None = None,
    expected_digest: str | None = None,
) -> list[str]:
    """Check every digest of a warm state and the fit of every family to this machine, and to its places.

    What it is trusted by, a key or a digest, is as for `signing.check_trust`.

    Returns:
        lines that say by what the state is trusted, and for each family that it is intact and fits.

    Raises:
        IntegrityError: the state is not trusted, or a file is not as baked, or does not belong there.
        FingerprintMismatchError: a family was baked for something else; names every difference.
    """
    trusted = check_trust(warm, key=key, signature=signature, expected_digest=expected_digest)
    manifest = manifests.read(warm)
    manifests.check_layout(manifest, warm)
    if problems := manifests.verify_files(manifest.files, warm):
        raise IntegrityError(
            f"{len(problems)} file(s) of {warm} are not as baked: {'; '.join(problems)}",
            next_step="restore the warm state, or bake it again with `chatterbox-prewarm bake`",
        )
    differences = check_fit(manifest, facts(weights, cache, manifest.reference.device))
    if misfits := [f"{name} ({'; '.join(words)})" for name, words in differences.items() if words]:
        raise FingerprintMismatchError(
            f"all files are intact, but not every family fits this machine: {', '.join(misfits)}",
            next_step="bake on this kind of machine; with --policy fallback a start leaves these families out",
        )
    notes = explain(manifest.fingerprint, read_fingerprint(manifest.reference.device).fields())
    return [
        *trusted,
        *(f"{entry.name}: {len(entry.files)} file(s) intact, fits this machine" for entry in manifest.families),
        *(f"note: {sentence}; no family depends on it" for sentence in notes),
    ]


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
        elif problems := manifests.verify_files(entry.files, warm):
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
