"""Predict whether a start on a node would hit: compare the labels of an image with the facts of the node before a pull.

Facts about machines are compared with the node. Torch, sources and weights are part of the image, so they always fit.
The Python version and the path of the packages fit if the state was baked in this image or in one like it. They are
compared with the environment of the image, because a state may have been baked elsewhere and appended.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError
from chatterbox_prewarm.image.labels import PACKAGES, read_states
from chatterbox_prewarm.state.compatibility import compatibility_of
from chatterbox_prewarm.system.fingerprint import MACHINE, Fingerprint, describe_fact, device_kind, explain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.image.labels import FamilyLabel
    from chatterbox_prewarm.image.oci import Image
    from chatterbox_prewarm.state.compatibility import Compatibility

#: Facts that the image determines: the fields of the fingerprint that do not describe the machine, and other facts that
#: a bake records.
_FIXED_BY_IMAGE = frozenset({field.name for field in fields(Fingerprint)} - {*MACHINE}) | {
    "weights",
    "variant",
    "regions",
    "cache",
}


@dataclass(frozen=True, kw_only=True)
class NodeFit:
    """How the states of an image fit a host.

    Attributes:
        states: the best one of each model first; a start selects these.
        variants: the variant of each state by the state's key.
        proven: keys of states that were compiled without their GPU, and proven since then.
    """

    states: tuple[Compatibility, ...]
    variants: Mapping[str, str]
    proven: frozenset[str] = frozenset()

    @property
    def selected(self) -> dict[str, Compatibility]:
        """The states that a start selects, by the variant of the model."""
        return {self.variants[state.name]: state for state in reversed(self.states)}

    @property
    def misses(self) -> list[Compatibility]:
        """The selected states that lack a family that a start uses, or have one that does not fit."""
        return [state for state in self.selected.values() if not state.fits or state.missing]

    @property
    def hits(self) -> bool:
        """True if a start would use every family that it needs."""
        return not self.misses

    def lines(self) -> list[str]:
        """Return a report for users: each selected state, family by family, then why each other state is not used."""
        selected = self.selected
        lines: list[str] = []
        for variant, state in sorted(selected.items(), key=lambda item: self.states.index(item[1])):
            lines += [f"model {variant}:"] * (len(selected) > 1)
            lines += self._selected_lines(state)
        for state in self.states:
            used = selected[self.variants[state.name]]
            if state is not used:
                lines.append(f"state {state.name}: not used: {state.why_not_selected(used)}")
        return lines

    def _selected_lines(self, state: Compatibility) -> list[str]:
        here = state.other_device
        proof = "and proven since then" if state.name in self.proven else "unproven"
        return [
            f"state {state.name}: {'would miss' if state in self.misses else 'would hit'}",
            *([f"  compiled without the GPU, {proof}"] if state.cross_compiled else []),
            *([f"  device: baked for {state.device}, here {here}"] if here else []),
            *(f"  {name}: {'; '.join(words) or 'fits'}" for name, words in state.differences.items()),
            *(f"  {name}: not in the state" for name in state.missing),
        ]

    def require_hit(self) -> None:
        """Check that a start would hit.

        Raises:
            FingerprintMismatchError: a start would miss; the message names what differs from the nearest state.
        """
        for nearest in self.misses:
            raise FingerprintMismatchError(
                f"a start on this node would miss; differences from the nearest state, {nearest.name}: "
                f"{nearest.explain()}",
                next_step="bake on that kind of machine and add the state to the image, or choose another node",
            )


def compare_with_node(image: Image, host: Mapping[str, str]) -> NodeFit:
    """Compare the states that an image's labels describe with a host.

    Args:
        image: the image; only its configuration is used.
        host: the facts of the node, as `node_facts` returns them. If they have no device, the device in the image's
            environment is used, or else the device that each state was baked for.

    Raises:
        EngineError: the labels cannot be read.
    """
    device = host.get("device") or image_setting(image, "DEVICE")
    profile = image_setting(image, "PROFILE")
    compared = []
    states = read_states(image.labels)
    for state in states:
        facts = {**host, "device": device_kind(device or state.device)}
        fit = compatibility_of(
            state.key,
            {family.name: _differences(family, facts, image) for family in state.families},
            {family.name: family.size for family in state.families},
            baked=(state.device, state.profile),
            start=(device, profile),
            upstream=image.labels.get(PACKAGES) != "lean",
        )
        compared.append(replace(fit, cross_compiled=state.cross_compiled))
    return NodeFit(
        states=tuple(sorted(compared, key=lambda state: state.rank)),
        variants={state.key: state.variant for state in states},
        proven=frozenset(state.key for state in states if state.proven),
    )


def explain_python(image: Image, required: Mapping[str, str]) -> list[str]:
    """Say how the Python of an image differs from the required one, according to the environment of the image.

    The program `python` is in a folder of PATH, and its packages are next to that folder. Docker's official images of
    Python also set PYTHON_VERSION.

    Args:
        image: the image; only its configuration is used.
        required: the facts that the family requires.
    """
    variables, differences = _environment(image), []
    prefix, separator, _ = required.get("site_packages", "").rpartition("/lib/python")
    folders = variables.get("PATH", "").split(":")
    if separator and "PATH" in variables and f"{prefix}/bin" not in folders:
        differences.append(
            f"{describe_fact('site_packages')}: baked with {required['site_packages']}, but {prefix}/bin is not in the "
            f"image's PATH ({variables['PATH']})"
        )
    version = variables.get("PYTHON_VERSION", "")
    if version and "python" in required and required["python"].split()[-1] != version:
        differences.append(f"{describe_fact('python')}: baked with {required['python']}, the image has {version}")
    return differences


def _environment(image: Image) -> dict[str, str]:
    """Return the environment variables of an image."""
    return dict(str(line).partition("=")[::2] for line in (image.config.get("config") or {}).get("Env") or ())


def image_setting(image: Image, name: str) -> str | None:
    """Read an option of `serve` from the environment of the image."""
    return _environment(image).get(f"CHATTERBOX_PREWARM_{name}") or None


def _differences(family: FamilyLabel, facts: Mapping[str, str], image: Image) -> list[str]:
    """Say what differs for a family. A fact that this version does not know counts as different."""
    required = {name: value for name, value in family.requires.items() if name not in _FIXED_BY_IMAGE}
    unknown = [name for name in required if name not in {*MACHINE, "device"}]
    return [
        *explain({name: value for name, value in required.items() if name not in unknown}, facts),
        *explain_python(image, family.requires),
        *(f"{describe_fact(name)}: baked with {required[name]}, which this version cannot compare" for name in unknown),
    ]
