"""Choice: which of several states a machine takes, and in words why not the others.

A start reads every manifest, and opens the files of the state that it takes alone.
"""

from __future__ import annotations

import logging
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES, applicable
from chatterbox_prewarm.state.compatibility import check_fit
from chatterbox_prewarm.state.folder import named, states_in
from chatterbox_prewarm.state.manifest import check_layout, read_manifest
from chatterbox_prewarm.system.fingerprint import device_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest

logger = logging.getLogger(__name__)

#: Why a state that fits comes after another, by the place in `Fit.rank` where the two first differ.
_COMES_LATER = (
    "it is for another device",
    "it does not fit",
    "it has another profile than asked for",
    "the other has more that is compiled",
    "more families of the other fit",
    "the other has more that fits",
    "fewer facts of the other differ",
    "the other's name comes first",
)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well a state fits a machine, whether it is read from its manifest or from an image's label.

    Attributes:
        device: the kind of device that it was baked for.
        sizes: bytes of each family.
        differences: in words, for each family of the state that a start would use; empty for one that fits.
        missing: the families that a start would use and that the state has not.
        other_device: what a start would run on instead, or "".
    """

    name: str
    device: str
    profile: str
    sizes: Mapping[str, int]
    differences: Mapping[str, list[str]]
    missing: tuple[str, ...]
    other_device: str

    @property
    def whole(self) -> bool:
        """Whether all of it fits; as for one state alone, what was left out at bake is no misfit."""
        return not self.other_device and not any(self.differences.values())

    def rank(self, profile: str | None) -> tuple[int | str, ...]:
        """What states are sorted by: the best for this machine has the least.

        Args:
            profile: asked for, or None.
        """
        fitting = [name for name, words in self.differences.items() if not words]
        return (
            bool(self.other_device),
            not self.whole,
            profile not in {None, self.profile},
            -sum(self.sizes[name] for name in fitting if name in COMPILED),
            -len(fitting),
            -sum(self.sizes[name] for name in fitting),
            sum(map(len, self.differences.values())),
            self.name,
        )

    def words(self) -> str:
        """What differs, or that nothing does."""
        device = [f"device: baked for {self.device}, here {self.other_device}"] if self.other_device else []
        families = [f"{name} ({'; '.join(words)})" for name, words in self.differences.items() if words]
        missing = [f"{name} (not in the state)" for name in self.missing]
        return ", ".join([*device, *families, *missing]) or "it fits"


def measure(
    name: str,
    differences: Mapping[str, list[str]],
    sizes: Mapping[str, int],
    *,
    baked: tuple[str, str],
    device: str | None,
    profile: str | None,
) -> Fit:
    """Judge a state by the differences of its families, as far as a start would use them, or does not know them.

    Args:
        name: of the state.
        differences: of every family, in words.
        sizes: of every family, bytes.
        baked: the device and the profile that it was baked for.
        device: of the start; the state's own by default.
        profile: asked for; the state's own by default.
    """
    own, now = device_kind(baked[0]), device_kind(device or baked[0])
    wanted = applicable(profile or baked[1], now)
    return Fit(
        name=name,
        device=own,
        profile=baked[1],
        sizes=sizes,
        differences={
            family: words for family, words in differences.items() if family in wanted or family not in FAMILIES
        },
        missing=tuple(family for family in wanted if family not in differences),
        other_device=now if now != own else "",
    )


def outranked(fit: Fit, best: Fit, profile: str | None) -> str:
    """Why a state is not the one that is taken."""
    if not fit.whole:
        return fit.words()
    pairs = zip(fit.rank(profile), best.rank(profile), strict=True)
    place = next(index for index, (one, other) in enumerate(pairs) if one != other)
    return f"it fits, but {_COMES_LATER[place]}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The state that a start takes.

    Attributes:
        path: its directory, whose layout was checked.
        fits: whether all of it that a start uses fits; not compared, and true, where there was nothing to choose.
        broken: the states that cannot be read, a sentence each.
        remarks: which state was taken and why each other one was not, a line each; none where there was one.
    """

    path: Path
    manifest: Manifest
    fits: bool = True
    broken: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def choose(
    folder: Path,
    facts: Callable[[Manifest], Mapping[str, str]],
    *,
    device: str | None = None,
    profile: str | None = None,
    name: str | None = None,
    strict: bool = False,
) -> Choice:
    """The state of a folder that fits this machine best; the folder itself, or the one named, if that leaves no choice.

    A state for the device comes before one for another; then one of which all fits; then one of the profile asked for;
    then the one with the most bytes of compiled families that fit, the most families, the most bytes, the fewest facts
    that differ; then by name.

    Args:
        folder: a state, or a folder of states.
        facts: the present facts, as `fit.facts` gives them, for a state.
        device: of the start; each state's own by default.
        profile: that the start asks for; each state's own by default.
        name: of the state to take, whether it fits or not.
        strict: take none that does not fit.

    Raises:
        IntegrityError: there is no state, or none that can be read; or others can write the folder of states.
        FingerprintMismatchError: with `strict`, several were compared and none fits; names what differs for each.
        BadInputError: there is no state of that name.
        OSError: the state where nothing is to choose cannot be reached.
    """
    found = states_in(folder)
    if name is not None or not found or folder in found.values():
        path = named(folder, name)
        manifest = read_manifest(path)
        check_layout(manifest, path)
        return Choice(path=path, manifest=manifest)
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise IntegrityError(
            f"{folder} can be written by other users; compiled caches are code", next_step=f"chmod go-w {folder}"
        )
    broken: dict[str, str] = {}
    read: dict[str, tuple[Manifest, Fit]] = {}
    for key, path in found.items():
        if path.is_symlink():
            broken[key] = f"{path} is a link"
            continue
        try:
            manifest = read_manifest(path)
        except IntegrityError as error:
            broken[key] = error.message
            continue
        sizes = {family.name: family.size for family in manifest.families}
        baked = manifest.reference.device, manifest.execution.profile
        differences = {
            family: words for family, words in check_fit(manifest, facts(manifest)).items() if family in FAMILIES
        }
        read[key] = manifest, measure(key, differences, sizes, baked=baked, device=device, profile=profile)
    order = sorted(read, key=lambda key: read[key][1].rank(profile))
    while order:
        try:
            check_layout(read[order[0]][0], found[order[0]])
        except (IntegrityError, OSError) as error:
            broken[order[0]] = str(error).partition("\n")[0]
            del read[order.pop(0)]
        else:
            break
    return _taken(folder, found, order, read, broken, profile=profile, strict=strict)


def _taken(
    folder: Path,
    found: Mapping[str, Path],
    order: list[str],
    read: Mapping[str, tuple[Manifest, Fit]],
    broken: Mapping[str, str],
    *,
    profile: str | None,
    strict: bool,
) -> Choice:
    """The first of the states in order, unless it may not be taken."""
    unusable = tuple(f"the state {key} is left out: {reason}" for key, reason in broken.items())
    if not order:
        raise IntegrityError(
            f"no state of {folder} can be used: {'; '.join(unusable)}",
            next_step="restore them, or bake again with `chatterbox-prewarm bake`",
        )
    manifest, best = read[order[0]]
    if strict and not best.whole:
        each = [f"{key}: {read[key][1].words()}" for key in order] + [f"{key}: {why}" for key, why in broken.items()]
        raise FingerprintMismatchError(
            f"no state of {folder} fits this machine: {' | '.join(each)}",
            next_step="bake on this kind of machine and add that state, or start with --policy fallback to run cold",
        )
    taken = f"the state {order[0]} is taken" + ("" if best.whole else f", which fits in part: {best.words()}")
    left_out = [f"the state {key} is left out: {outranked(read[key][1], best, profile)}" for key in order[1:]]
    for line in (taken, *left_out):
        logger.info("%s", line)
    for line in unusable:
        logger.warning("%s", line)
    return Choice(
        path=found[order[0]],
        manifest=manifest,
        fits=best.whole,
        broken=unusable,
        remarks=(taken, *left_out, *unusable),
    )
