"""Append: a base image and new layers make a new image, without an engine. Of the base only its documents are read.

Layers that the target has already are not sent; what remains goes through as a stream.
"""

from __future__ import annotations

import contextlib
import logging
import platform as this_machine
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.oci import (
    INDEXES,
    MANIFESTS,
    MAX_DOCUMENT,
    Document,
    Image,
    config_descriptor,
    read_image,
    read_index,
    to_documents,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import BinaryIO

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Descriptor, Readable, Store

logger = logging.getLogger(__name__)

#: What the kernel calls an architecture, and what an image does.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of a base's configuration; what is None stays as it is."""

    labels: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    entrypoint: Sequence[str] | None = None
    command: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Appended:
    """The new image's manifest, and how many blobs and bytes of it the target lacked."""

    document: Document
    blobs_sent: int
    bytes_sent: int


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
    settings["Labels"] = {**base.labels, **change.labels}
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


def send(
    image: Image,
    source: Readable,
    layers: Sequence[Layer],
    target: Store,
    reference: str,
    *,
    replacing: bool = False,
    say: Callable[[str], None] = logger.info,
) -> Appended:
    """Store an image: the blobs that the target lacks, then its documents, and its tag last.

    Args:
        image: to store.
        source: has the layers of its base.
        layers: those that are new.
        target: to store in.
        reference: the tag it gets.
        replacing: take the tag from an image that has it.
        say: called with one line for each blob that is sent.

    Raises:
        BadInputError: the tag exists.
        EngineError: the source or the target failed; the tag is as it was.
    """
    check_tag(target, reference, replacing=replacing)
    document, config, raw = to_documents(image)
    new = {layer.descriptor.digest: layer for layer in layers}
    sent: list[int] = []

    def put(descriptor: Descriptor, opened: Callable[[], AbstractContextManager[BinaryIO]], what: str) -> None:
        if target.has_blob(descriptor):
            return
        say(f"sending {what}, {descriptor.size / 1e6:.1f} MB")
        target.put_blob(descriptor, opened)
        sent.append(descriptor.size)

    for number, descriptor in enumerate(image.layers, start=1):
        if layer := new.get(descriptor.digest):
            put(descriptor, layer.opened, layer.title)
        elif not target.has_blob(descriptor) and not _mounted(source, target, descriptor):
            put(descriptor, lambda wanted=descriptor: source.open_blob(wanted), f"layer {number} of the base")  # type: ignore[misc]
    put(config, lambda: contextlib.nullcontext(BytesIO(raw)), "the configuration")
    check_tag(target, reference, replacing=replacing)  # minutes may have passed
    target.put_manifest(document, reference)
    return Appended(document=document, blobs_sent=len(sent), bytes_sent=sum(sent))


def check_tag(target: Store, reference: str, *, replacing: bool) -> None:
    """Refuse to take a tag from an image that has it.

    Raises:
        BadInputError: the tag exists.
    """
    if not replacing and target.has_manifest(reference):
        raise BadInputError(
            f"there is an image {reference!r} already", next_step="choose another tag, or take that one with --replace"
        )


def with_annotations(image: Image, annotations: Mapping[str, str]) -> Image:
    """The image with more annotations on its manifest."""
    return replace(image, annotations={**image.annotations, **annotations})


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


def _mounted(source: Readable, target: Store, descriptor: Descriptor) -> bool:
    """Whether the target took the blob over from a source beside it."""
    mount = getattr(target, "mount_blob", None)
    return bool(mount and mount(descriptor, source))


def _matches(found: str, wanted: str) -> bool:
    """Whether an image of one platform runs on another: a variant counts only where both name one."""
    parts, wanted_parts = found.split("/"), wanted.split("/")
    return parts[:2] == wanted_parts[:2] and (len(parts) < 3 or len(wanted_parts) < 3 or parts[2] == wanted_parts[2])
