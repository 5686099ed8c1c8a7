"""Compatibility: whether the families of a state can be reused on a machine, and the reasons if not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES, MAY_BE_EMPTY, applicable, is_used
from chatterbox_prewarm.system.fingerprint import (
    ABSENT,
    device_kind,
    explain,
    package_digest,
    read_fingerprint,
    used_facts,
)
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chatterbox_prewarm.state.manifest import Manifest

logger = logging.getLogger(__name__)

#: The reasons why a state ranks lower, one for each position in `Compatibility.rank`.
_RANKED_LOWER = (
    "it is for another device",
    "it does not fit",
    "it has another profile than requested",
    "it was compiled without the GPU",
    "the other state has more compiled code that fits",
    "more families of the other state fit",
    "the other state has more bytes that fit",
    "fewer facts of the other state differ",
    "the name of the other state comes first",
)


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """The result of comparing a state with a machine.

    The state is given by its manifest or by a label of an image.

    Attributes:
        device: the kind of device that the state was baked for.
        sizes: bytes of each family.
        differences: for each family that the start uses, what differs in words; an empty list if it fits.
        missing: families that the start uses and that the state does not have.
        other_device: the kind of device of the start, if it differs from `device`; otherwise "".
        requested_profile: the profile that the start asks for, or None.
        cross_compiled: the state was compiled for a GPU on a machine without one.
    """

    name: str
    device: str
    profile: str
    sizes: Mapping[str, int]
    differences: Mapping[str, list[str]]
    missing: tuple[str, ...]
    other_device: str
    requested_profile: str | None
    cross_compiled: bool = False

    @property
    def fits(self) -> bool:
        """True if every family of the state fits. A family that was left out at bake does not count."""
        return not self.other_device and not any(self.differences.values())

    @property
    def rank(self) -> tuple[int | str, ...]:
        """Sort key of states: the best state for the machine has the smallest."""
        fitting = [name for name, words in self.differences.items() if not words]
        return (
            bool(self.other_device),
            not self.fits,
            self.requested_profile not in {None, self.profile},
            self.cross_compiled,
            -sum(self.sizes[name] for name in fitting if name in COMPILED),
            -len(fitting),
            -sum(self.sizes[name] for name in fitting),
            sum(map(len, self.differences.values())),
            self.name,
        )

    def explain(self) -> str:
        """Say what differs, or that the state fits."""
        device = [f"device: baked for {self.device}, here {self.other_device}"] if self.other_device else []
        families = [f"{name} ({'; '.join(words)})" for name, words in self.differences.items() if words]
        missing = [f"{name} (not in the state)" for name in self.missing]
        return ", ".join([*device, *families, *missing]) or "it fits"

    def why_not_selected(self, selected: Compatibility) -> str:
        """Say why a start uses the state `selected` and not this one."""
        if not self.fits:
            return self.explain()
        position = next(i for i, (own, other) in enumerate(zip(self.rank, selected.rank, strict=True)) if own != other)
        return f"it fits, but {_RANKED_LOWER[position]}"


def compatibility_of(
    name: str,
    differences: Mapping[str, list[str]],
    sizes: Mapping[str, int],
    *,
    baked: tuple[str, str],
    start: tuple[str | None, str | None],
    upstream: bool | None = None,
) -> Compatibility:
    """Keep only the differences of families that a start uses.

    Args:
        name: the name of the state.
        differences: for every family, what differs in words.
        sizes: bytes of every family.
        baked: the device and the profile that the state was baked for.
        start: the device and the profile of the start; None for those of the state.
        upstream: whether upstream's model is installed where the start runs; by default as here.
    """
    device, requested_profile = start
    baked_device, start_device = device_kind(baked[0]), device_kind(device or baked[0])
    wanted = applicable(requested_profile or baked[1], start_device, upstream=upstream)
    return Compatibility(
        name=name,
        device=baked_device,
        profile=baked[1],
        sizes=sizes,
        differences={
            # A family that this version does not know may be used by another version: it stays listed.
            family: words
            for family, words in differences.items()
            if family in wanted or family not in FAMILIES
        },
        missing=tuple(family for family in wanted if family not in differences and family not in MAY_BE_EMPTY),
        other_device=start_device if start_device != baked_device else "",
        requested_profile=requested_profile,
    )


def machine_facts(weights: Path, cache: Path, device: str) -> dict[str, str]:
    """Collect the facts that a family can depend on, except source files: machine, software, weights, cache, device."""
    facts = read_fingerprint(device).fields() | {
        "cache": str(cache.resolve()),
        "device": device_kind(device),
        "regions": package_digest("chatterbox_prewarm.model.regions"),
    }
    try:
        record = read_record(weights)
    except WeightsError as error:
        logger.warning("%s", error.message)
        return facts
    return facts | {"weights": record.set_digest, "variant": record.variant}


def compare_families(manifest: Manifest, facts: Mapping[str, str]) -> dict[str, list[str]]:
    """Compare the requirements of every family that is used here with `facts`; an empty list means that it fits."""
    return {
        entry.name: explain(used_facts(entry.requires), current_facts(entry.requires, facts))
        for entry in manifest.families
        if is_used(entry.name)
    }


def current_facts(names: Iterable[str], facts: Mapping[str, str]) -> dict[str, str]:
    """Return the present values of the named facts.

    Args:
        names: names in `facts`, or `source:PATH` for the size and modification time of a source file.
        facts: as `machine_facts` returns them.
    """
    return {
        name: _source_stamp(Path(name.removeprefix("source:")))
        if name.startswith("source:")
        else facts.get(name, ABSENT)
        for name in names
    }


def _source_stamp(path: Path) -> str:
    """Return size and modification time of a file. Numba compares the time to the last digit, so this does too."""
    try:
        stat = path.stat()
    except OSError:
        return ABSENT
    return f"{stat.st_size} bytes, modified at {stat.st_mtime!r}"
