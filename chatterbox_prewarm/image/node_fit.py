"""Why a node will hit or miss: an image's labels against the facts of a host, before anything is pulled.

Only facts of machines are compared. Torch, sources, weights and paths are in the image, and fit as they were baked.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError
from chatterbox_prewarm.image.compose import platform_of, resolve
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.state.selection import Fit, measure, outranked
from chatterbox_prewarm.system.fingerprint import MACHINE, Fingerprint, device_kind, explain, words_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.image.labels import FamilyLabel, StateLabel
    from chatterbox_prewarm.image.oci import Image, Readable

#: What is in the image and fits as it was baked, beside the fields of a fingerprint that are no machine's.
_IN_THE_IMAGE = frozenset({field.name for field in fields(Fingerprint)} - {*MACHINE}) | {
    "weights",
    "variant",
    "regions",
    "cache",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the states of an image fit a host, the one that a start would take first.

    Attributes:
        profile: that a start would ask for, or None.
    """

    fits: tuple[Fit, ...]
    profile: str | None

    @property
    def hits(self) -> bool:
        """Whether a start would take a state that has every family and of which every one fits."""
        return self.fits[0].whole and not self.fits[0].missing

    def lines(self) -> list[str]:
        """For people: the state that a start would take, family by family, then why not the others."""
        best, *others = self.fits
        device = [f"  device: baked for {best.device}, here {best.other_device}"] if best.other_device else []
        return [
            f"state {best.name}: {'would hit' if self.hits else 'would miss'}",
            *device,
            *(f"  {name}: {'; '.join(words) or 'fits'}" for name, words in best.differences.items()),
            *(f"  {name}: not in the state" for name in best.missing),
            *(f"state {fit.name}: not taken: {outranked(fit, best, self.profile)}" for fit in others),
        ]

    def require_hit(self) -> None:
        """Raise when a start would miss.

        Raises:
            FingerprintMismatchError: naming what differs from the nearest state.
        """
        if not self.hits:
            nearest = self.fits[0]
            raise FingerprintMismatchError(
                f"a start there would miss; what differs from the nearest state, {nearest.name}: {nearest.words()}",
                next_step="bake on that kind of machine and add the state to the image, or choose another node",
            )


def judge(image: Image, host: Mapping[str, str]) -> Verdict:
    """How the states that an image's labels tell of fit a host.

    Args:
        image: its configuration is all that is looked at.
        host: facts, as `hosts.host_facts` gives them. The device is the host's if it names one, else that of the
            image's environment, else each state's own.

    Raises:
        EngineError: the labels cannot be read.
    """
    device = host.get("device") or _setting(image, "DEVICE")
    profile = _setting(image, "PROFILE")
    known = {**host, "device": device_kind(device)} if device else host
    fits = (_fit(state, known, device, profile) for state in read_states(image.labels))
    return Verdict(fits=tuple(sorted(fits, key=lambda fit: fit.rank(profile))), profile=profile)


def judge_reference(store: Readable, reference: str, host: Mapping[str, str]) -> Verdict:
    """The same for an image in a registry or a layout, of which two or three small documents are read.

    Args:
        store: where it is.
        reference: a tag or a digest in that store.
        host: facts; of an index, the image for Linux on the host's architecture is taken.

    Raises:
        EngineError: the image cannot be read, has no such platform, or its labels cannot be read.
    """
    return judge(resolve(store, reference, platform=platform_of(host["arch"])), host)


def _setting(image: Image, name: str) -> str | None:
    """An option of `serve` that the image's environment sets."""
    settings = image.config.get("config") or {}
    variables = dict(str(entry).partition("=")[::2] for entry in settings.get("Env") or ())
    return variables.get(f"CHATTERBOX_PREWARM_{name}") or None


def _fit(state: StateLabel, host: Mapping[str, str], device: str | None, profile: str | None) -> Fit:
    known = {"device": state.device, **host}
    return measure(
        state.key,
        {family.name: _differences(family, known) for family in state.families},
        {family.name: family.size for family in state.families},
        baked=(state.device, state.profile),
        device=device,
        profile=profile,
    )


def _differences(family: FamilyLabel, known: Mapping[str, str]) -> list[str]:
    """In words what differs; a fact that this version cannot compare counts as different."""
    machine = {name: value for name, value in family.requires.items() if name not in _IN_THE_IMAGE}
    unknown = [name for name in machine if name not in {*MACHINE, "device"}]
    return [
        *explain({name: value for name, value in machine.items() if name not in unknown}, known),
        *(f"{words_for(name)}: baked with {machine[name]}, which this version cannot compare" for name in unknown),
    ]
