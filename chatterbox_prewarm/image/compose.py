"""Compose a base image and new layers into an image; only the documents of the base are read."""

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
    from chatterbox_prewarm.image.oci import Descriptor, Document, Store

#: The kernel's name of an architecture -> the name in images.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Changes to the configuration of a base image. `dropped` names labels of the base; None keeps the base's value."""

    labels: Mapping[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    entrypoint: Sequence[str] | None = None
    command: Sequence[str] | None = None

    def overlaid(self, other: Change) -> Change:
        """Return both changes combined; `other` takes precedence."""
        return Change(
            labels={**self.labels, **other.labels},
            dropped=self.dropped | other.dropped,
            environment={**self.environment, **other.environment},
            entrypoint=self.entrypoint if other.entrypoint is None else other.entrypoint,
            command=self.command if other.command is None else other.command,
        )


NO_CHANGE = Change()


def platform_of(machine: str) -> str:
    """Return the image platform of a machine, e.g. "linux/amd64" for the kernel's "x86_64"."""
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def resolve(store: Store, reference: str, *, platform: str = "") -> Image:
    """Read the manifest and the configuration of an image; an index is searched for the platform.

    Args:
        store: has the image.
        reference: its tag or digest.
        platform: "os/architecture". Default: the platform of this machine.

    Raises:
        EngineError: the image does not exist, is malformed, or is for another platform.
    """
    platform = platform or platform_of(this_machine.machine())
    document = find_manifest(store, reference, platform=platform)
    config = config_descriptor(document)
    if config.size > MAX_DOCUMENT:
        raise EngineError(
            f"the configuration of {reference} has {config.size} bytes; the limit is {MAX_DOCUMENT}",
            next_step="check the reference",
        )
    with store.open_blob(config) as stream:
        image = read_image(document, stream.read())
    if not _matches(image.platform, platform):
        raise EngineError(
            f"{reference} is an image for {image.platform}, not for {platform}",
            next_step="choose a base for that platform, or another platform with --platform",
        )
    return image


def find_manifest(store: Store, reference: str, *, platform: str) -> Document:
    """Read the manifest of an image; an index is searched for the platform. The arguments are those of `resolve`.

    Raises:
        EngineError: there is no such image.
    """
    document = store.read_manifest(reference)
    if document.media_type in INDEXES:
        document = store.read_manifest(_choose(read_index(document), platform, reference).digest)
    if document.media_type not in MANIFESTS:
        raise EngineError(
            f"{reference} is not an image; its media type is {document.media_type!r}", next_step="check the reference"
        )
    return document


def add_layers(base: Image, layers: Sequence[Layer], change: Change, *, created: str) -> Image:
    """Return an image with `layers` on top of `base`.

    Args:
        base: the base image.
        layers: the new layers, lowest first.
        change: changes to the configuration.
        created: the creation time of the image (RFC 3339). It is not the current time, so that equal inputs give equal
            images.
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
    if config.get("history") or not base.diff_ids:  # without the base's history, ours would describe its layers
        config["history"] = [
            *(config.get("history") or []),
            *({"created": created, "created_by": f"chatterbox-prewarm append: {one.title}"} for one in layers),
        ]
    # Docker records the container that it built the base in; that is not part of an image.
    for name in ("container", "container_config"):
        config.pop(name, None)
    return Image(
        config=config, layers=(*base.layers, *(one.descriptor for one in layers)), annotations=dict(base.annotations)
    )


def _choose(entries: Sequence[Descriptor], platform: str, reference: str) -> Descriptor:
    """Choose the image for a platform from an index. Attestations have the platform "unknown/unknown"."""
    images = [entry for entry in entries if entry.media_type in MANIFESTS and entry.platform != "unknown/unknown"]
    if len(images) == 1 and not images[0].platform:
        return images[0]
    if chosen := [entry for entry in images if _matches(entry.platform, platform)]:
        return chosen[0]
    known = ", ".join(sorted({entry.platform or "(no platform)" for entry in images})) or "(no images)"
    raise EngineError(
        f"{reference} has no image for {platform}, only for: {known}",
        next_step="choose another platform with --platform",
    )


def _matches(found: str, wanted: str) -> bool:
    """Compare two platforms; variants are only compared if both have one."""
    parts, wanted_parts = found.split("/"), wanted.split("/")
    return parts[:2] == wanted_parts[:2] and (len(parts) < 3 or len(wanted_parts) < 3 or parts[2] == wanted_parts[2])
