"""A base image and new layers, composed; of a base only its documents are read."""

from __future__ import annotations

import platform as this_machine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.oci import (
    INDEXES,
    MANIFESTS,
    MAX_DOCUMENT,
    Image,
    config_descriptor,
    read_image,
    read_index,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Descriptor, Readable

#: What the kernel calls an architecture, and what an image does.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of a base's configuration; what is None stays as it is. Labels that are dropped are the base's."""

    labels: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    entrypoint: Sequence[str] | None = None
    command: Sequence[str] | None = None

    def overlaid(self, other: Change) -> Change:
        """This change with another on top, which wins where both say something."""
        return Change(
            labels={**self.labels, **other.labels},
            dropped=self.dropped | other.dropped,
            environment={**self.environment, **other.environment},
            entrypoint=self.entrypoint if other.entrypoint is None else other.entrypoint,
            command=self.command if other.command is None else other.command,
        )


#: What leaves a base's configuration as it is.
NO_CHANGE = Change()


def platform_of(machine: str) -> str:
    """The platform of images for a machine, as "linux/amd64" for the kernel's "x86_64"."""
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def resolve(store: Readable, reference: str, *, platform: str = "") -> Image:
    """Read an image's documents; of an index, the image for a platform.

    Args:
        store: where it is.
        reference: its tag or digest.
        platform: "os/architecture"; of this machine by default.

    Raises:
        EngineError: there is no such image, or none for the platform.
    """
    platform = platform or platform_of(this_machine.machine())
    document = store.read_manifest(reference)
    if document.media_type in INDEXES:
        document = store.read_manifest(_choose(read_index(document), platform, reference).digest)
    if document.media_type not in MANIFESTS:
        raise EngineError(
            f"{reference} is no image, but of the media type {document.media_type!r}", next_step="check the reference"
        )
    described = config_descriptor(document)
    if described.size > MAX_DOCUMENT:
        raise EngineError(
            f"the configuration of {reference} has {described.size} bytes, more than {MAX_DOCUMENT}",
            next_step="check the reference",
        )
    with store.open_blob(described) as stream:
        image = read_image(document, stream.read())
    if not _matches(image.platform, platform):
        raise EngineError(
            f"{reference} is an image for {image.platform}, not for {platform}",
            next_step="choose a base for that platform, or another with --platform",
        )
    return image


def add_layers(base: Image, layers: Sequence[Layer], change: Change, *, created: str) -> Image:
    """The image that has `layers` on top of `base`.

    Args:
        base: what lies below.
        layers: in their order, the lowest first.
        change: of the configuration.
        created: an RFC 3339 time; the same input is to give the same image, so it is not the present one.
    """
    config = dict(base.config)
    settings: dict[str, Any] = dict(config.get("config") or {})
    kept = {name: value for name, value in base.labels.items() if name not in change.dropped}
    settings["Labels"] = {**kept, **change.labels}
    variables = dict(line.partition("=")[::2] for line in settings.get("Env") or [])
    settings["Env"] = [f"{name}={value}" for name, value in {**variables, **change.environment}.items()]
    if change.entrypoint is not None:
        settings["Entrypoint"], settings["Cmd"] = list(change.entrypoint), []
    if change.command is not None:
        settings["Cmd"] = list(change.command)
    config["config"] = settings
    config["created"] = created
    config["rootfs"] = {"type": "layers", "diff_ids": [*base.diff_ids, *(f"sha256:{one.diff_id}" for one in layers)]}
    if config.get("history") or not base.diff_ids:  # with none for the layers below, ours would be taken for theirs
        config["history"] = [
            *(config.get("history") or []),
            *({"created": created, "created_by": f"chatterbox-prewarm append: {one.title}"} for one in layers),
        ]
    # What an engine notes of the container that it built the base in, and is no part of an image.
    for name in ("container", "container_config"):
        config.pop(name, None)
    return Image(
        config=config, layers=(*base.layers, *(one.descriptor for one in layers)), annotations=dict(base.annotations)
    )


def _choose(entries: Sequence[Descriptor], platform: str, reference: str) -> Descriptor:
    """The image of an index that is for a platform; attestations are for an unknown one."""
    images = [entry for entry in entries if entry.media_type in MANIFESTS and entry.platform != "unknown/unknown"]
    if len(images) == 1 and not images[0].platform:
        return images[0]
    if chosen := [entry for entry in images if _matches(entry.platform, platform)]:
        return chosen[0]
    known = ", ".join(sorted({entry.platform or "an unnamed one" for entry in images})) or "none"
    raise EngineError(
        f"{reference} has no image for {platform}, only for: {known}", next_step="choose another with --platform"
    )


def _matches(found: str, wanted: str) -> bool:
    """Whether an image of one platform runs on another: a variant counts only where both name one."""
    parts, wanted_parts = found.split("/"), wanted.split("/")
    return parts[:2] == wanted_parts[:2] and (len(parts) < 3 or len(wanted_parts) < 3 or parts[2] == wanted_parts[2])
