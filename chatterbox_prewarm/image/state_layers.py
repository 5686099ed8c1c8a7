"""What is added to an image: states, weights, signatures; as layers, labels and settings, checked against its base."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.compose import Change, platform_of
from chatterbox_prewarm.image.labels import EVIDENCE, PREFIX, STATES, labels_of, read_states
from chatterbox_prewarm.image.layer import pack, signature_layer, weight_layers
from chatterbox_prewarm.state.folder import states_in
from chatterbox_prewarm.state.manifest import read_manifest
from chatterbox_prewarm.state.signing import default_signature
from chatterbox_prewarm.system.fingerprint import ABSENT, device_kind
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image
    from chatterbox_prewarm.state.manifest import Manifest

_TORCH = f"{PREFIX}torch"
DEVICE = "CHATTERBOX_PREWARM_DEVICE"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Layers, from the lowest up, and the states that are in them."""

    layers: tuple[Layer, ...]
    manifests: tuple[Manifest, ...]

    @property
    def created(self) -> str:
        """When the newest of the states was baked: the same addition is to give the same image."""
        return max(manifest.created for manifest in self.manifests)

    @property
    def platform(self) -> str:
        """Of the machines that the states are for.

        Raises:
            BadInputError: they are for several.
        """
        found = {platform_of(manifest.fingerprint.get("arch", ABSENT)) for manifest in self.manifests}
        if len(found) > 1:
            raise BadInputError(
                f"the states are for different platforms: {', '.join(sorted(found))}",
                next_step="add them to one image for each platform",
            )
        return found.pop()


@contextlib.contextmanager
def gather(states: Sequence[Path], weights: Path | None = None) -> Iterator[Addition]:
    """Pack states, their signatures where they have one beside them, and weights; the layers last as long as the block.

    Args:
        states: directories of states, or folders of several, all of which are taken.
        weights: a checkpoint that is to go along.

    Raises:
        IntegrityError: a state is not as its manifest says, or has the signature of another one beside it.
        WeightsError: the weights are not as recorded.
        BadInputError: the states were made with other weights.
    """
    paths = [path for folder in states for path in (states_in(folder).values() or [folder])]
    found = tuple(read_manifest(path) for path in paths)
    if weights is not None:
        digest = read_record(weights).set_digest
        for manifest, path in zip(found, paths, strict=True):
            if manifest.weights.set_digest != digest:
                raise BadInputError(
                    f"{path} was baked with other weights than those in {weights}",
                    next_step="name the checkpoint that it was baked with, or bake again",
                )
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-") as scratch:
        layers = list(weight_layers(weights)) if weights is not None else []
        for number, path in enumerate(paths):
            layers.append(pack(path, Path(scratch) / f"{number}.tar.gz"))
            if (signature := default_signature(path)).is_file():
                layers.append(signature_layer(path, signature))
        yield Addition(layers=tuple(layers), manifests=found)


def change_for(base: Image, addition: Addition, *, name: str = "", digest: str = "", device: str = "") -> Change:
    """What becomes of a base's labels and settings with an addition.

    Args:
        base: what it is added to.
        addition: what is added.
        name: the base's reference, for a label.
        digest: of the base's manifest, for a label.
        device: that a start is to use; by default that of the states, if the base names none.

    Raises:
        BadInputError: the base is not fit to take it: no image of this project, another torch, the same state already.
    """
    check_base(base, addition)
    beside = read_states(base.labels) if STATES in base.labels else ()
    labels = labels_of(addition.manifests, beside=beside, base_name=name, base_digest=digest)
    kinds = {device_kind(manifest.reference.device) for manifest in addition.manifests}
    named = any(line.startswith(f"{DEVICE}=") for line in (base.config.get("config") or {}).get("Env") or [])
    chosen = device or ("" if named or len(kinds) > 1 else kinds.pop())
    # What was proven was an image without these states.
    return Change(labels=labels, dropped=frozenset({EVIDENCE}), environment={DEVICE: chosen} if chosen else {})


def check_base(base: Image, addition: Addition) -> None:
    """Refuse a base that a start could not use the states in.

    Raises:
        BadInputError: as `change_for`.
    """
    torch = base.labels.get(_TORCH, "")
    if not torch:
        raise BadInputError(
            f"the base has no label {_TORCH}, so it is no image of this project's Dockerfile",
            next_step="build one with `docker build --target cold`, or give yours that label, as in torch-2.6",
        )
    known = [version.removeprefix("torch-") for version in torch.split(", ")]
    for manifest in addition.manifests:
        baked = manifest.fingerprint.get("torch", ABSENT)
        if not any(baked == version or baked.startswith((f"{version}.", f"{version}+")) for version in known):
            raise BadInputError(
                f"the base has torch {', '.join(known)}, and the state was baked with {baked}",
                next_step="take the base that it was baked in, or bake in this one",
            )
        variants = base.labels.get(f"{PREFIX}variant", manifest.variant)
        if manifest.variant not in variants.split(", "):
            raise BadInputError(
                f"the base is for the model variant {variants}, the state for {manifest.variant}",
                next_step="take a base for that variant",
            )
