"""The layers of warm states, their signatures and weights, and the change that they make to a base image."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.compose import Change, platform_of
from chatterbox_prewarm.image.labels import EVIDENCE, PREFIX, STATES, image_labels, read_states, variants_of
from chatterbox_prewarm.image.layer import pack, signature_layer, weight_layers
from chatterbox_prewarm.image.node_fit import explain_python
from chatterbox_prewarm.state.selection import states_in
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.atomic_files import scratch_folder
from chatterbox_prewarm.system.fingerprint import ABSENT, device_kind
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image
    from chatterbox_prewarm.state.manifest import Manifest

_TORCH = f"{PREFIX}torch"
_DEVICE = "CHATTERBOX_PREWARM_DEVICE"


@dataclass(frozen=True, kw_only=True)
class StateLayers:
    """New layers of an image, lowest first, and the manifests of the states in them."""

    layers: tuple[Layer, ...]
    manifests: tuple[Manifest, ...]

    @property
    def created(self) -> str:
        """When the newest state was baked. An image gets this time, so that the same layers give the same image."""
        return max(manifest.created for manifest in self.manifests)

    @property
    def platform(self) -> str:
        """The image platform of the states, such as "linux/amd64".

        Raises:
            BadInputError: the states are for different platforms.
        """
        platforms = {platform_of(manifest.fingerprint.get("arch", ABSENT)) for manifest in self.manifests}
        if len(platforms) > 1:
            raise BadInputError(
                f"the states are for different platforms: {', '.join(sorted(platforms))}",
                next_step="add them to one image for each platform",
            )
        return platforms.pop()


@contextlib.contextmanager
def pack_states(folders: Sequence[Path], weights: Path | None = None) -> Iterator[StateLayers]:
    """Pack states, the signatures next to them, and weights. The layers exist until the end of the block.

    Args:
        folders: states, or folders of several states.
        weights: a checkpoint to add, if any.

    Raises:
        IntegrityError: a state differs from its manifest, or has the signature of another state.
        WeightsError: the weights differ from their record.
        BadInputError: a state was baked with other weights.
    """
    paths = [path for folder in folders for path in (states_in(folder).values() or [folder])]
    states = [State.open(path) for path in paths]
    if weights is not None:
        digest = read_record(weights).set_digest
        for state in states:
            if state.manifest.weights.set_digest != digest:
                raise BadInputError(
                    f"{state.path} was baked with other weights than {weights}",
                    next_step="name the checkpoint that it was baked with, or bake it again",
                )
    with scratch_folder("chatterbox-prewarm-layers-") as scratch:
        layers = list(weight_layers(weights)) if weights is not None else []
        for number, state in enumerate(states):
            layers.append(pack(state, scratch / f"{number}.tar.gz"))
            if (signature := state.find_signature()) is not None:
                layers.append(signature_layer(state, signature))
        yield StateLayers(layers=tuple(layers), manifests=tuple(state.manifest for state in states))


def change_for(base: Image, added: StateLayers, *, name: str = "", digest: str = "", device: str = "") -> Change:
    """Return the labels and settings of the image that has the layers on top of a base.

    Args:
        base: the base image.
        added: the layers that are added to it.
        name: reference of the base, for a label.
        digest: digest of the base's manifest, for a label.
        device: device of a start. By default the device of the states, unless the base sets one.

    Raises:
        BadInputError: the base is not an image of this project, or is for another torch, Python or variant, or it
            contains a state for the same machine and software.
    """
    _check_base(base, added.manifests)
    existing = read_states(base.labels) if STATES in base.labels else ()
    labels = image_labels(added.manifests, existing=existing, base_name=name, base_digest=digest)
    if not device:
        kinds = {device_kind(manifest.reference.device) for manifest in added.manifests}
        variables = (base.config.get("config") or {}).get("Env") or []
        if len(kinds) == 1 and not any(line.startswith(f"{_DEVICE}=") for line in variables):
            (device,) = kinds
    # The evidence of the base does not cover the new states.
    return Change(labels=labels, dropped=frozenset({EVIDENCE}), environment={_DEVICE: device} if device else {})


def _check_base(base: Image, manifests: Sequence[Manifest]) -> None:
    """Refuse a base in which a start could not use the states.

    Raises:
        BadInputError: the base is not an image of this project, or is for another torch, Python or variant.
    """
    torch = base.labels.get(_TORCH, "")
    if not torch:
        raise BadInputError(
            f"the base has no label {_TORCH}, so it is not an image of this project's Dockerfile",
            next_step="build one with `docker build --target cold`, or add that label to yours, such as torch-2.6",
        )
    versions = [version.removeprefix("torch-") for version in torch.split(", ")]
    for manifest in manifests:
        baked = manifest.fingerprint.get("torch", ABSENT)
        if not any(baked == version or baked.startswith((f"{version}.", f"{version}+")) for version in versions):
            raise BadInputError(
                f"the base has torch {', '.join(versions)}, but the state was baked with {baked}",
                next_step="use the base that it was baked in, or bake in this one",
            )
        variants = base.labels.get(f"{PREFIX}variant", manifest.variant)
        if manifest.variant not in variants_of(variants):
            raise BadInputError(
                f"the base is for the model variant {variants}, but the state is for {manifest.variant}",
                next_step="use a base for that variant",
            )
        for family in manifest.families:
            if differences := explain_python(base, family.requires):
                raise BadInputError(
                    f"the base cannot use the family {family.name} of the state: {'; '.join(differences)}",
                    next_step="bake in a container of the base, as `chatterbox-prewarm build` does",
                )
