"""Add layers to a base image without an engine.

The target receives only the layers that it does not have. Layers are streamed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.attest import attach_evidence
from chatterbox_prewarm.image.compose import NO_CHANGE, Change, add_layers, resolve
from chatterbox_prewarm.image.docker_archive import save_archive
from chatterbox_prewarm.image.labels import PREFIX
from chatterbox_prewarm.image.oci import INDEXES, to_documents
from chatterbox_prewarm.image.state_layers import change_for
from chatterbox_prewarm.image.stores import open_store
from chatterbox_prewarm.state.places import check_output_place
from chatterbox_prewarm.system.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Descriptor, Document, Image, OpenStream, Store
    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.state_layers import StateLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AppendOptions:
    """Options of `append` and `send`.

    Attributes:
        platform: platform of the base, if it is an index. Default: the platform of the states.
        device: device that a start uses. Default: the device of the states, unless the base sets one.
        settings: additional changes of the image configuration; they override the changes that the states need.
        replacing: replace an existing tag or archive.
        expected: the digest that the tag must have, or "" if it must not exist. None disables the check.
        evidence: evidence of a proof of the states, attached before the tag is set. Ignored for an archive.
        key: private key that signs the statements about the proof; see `attach_evidence`.
        insecure: HTTP or HTTPS for both registries, as in `Repository`.
        say: called with one line of progress for each blob that is sent.
    """

    platform: str = ""
    device: str = ""
    settings: Change = NO_CHANGE
    replacing: bool = False
    expected: str | None = None
    evidence: Path | None = None
    key: EllipticCurvePrivateKey | None = None
    insecure: bool | None = None
    say: Callable[[str], None] = logger.info


_DEFAULTS = AppendOptions()


@dataclass(frozen=True, kw_only=True)
class AppendResult:
    """The manifest of the new image, and the number of blobs and bytes that were sent."""

    document: Document
    blobs_sent: int
    bytes_sent: int


class TagMovedError(EngineError):
    """The tag no longer has the expected digest."""


def append(
    base: ImageReference, target: ImageReference, states: StateLayers, options: AppendOptions = _DEFAULTS
) -> AppendResult:
    """Add states, and optionally weights and signatures, to a base image, and store the result as a new image.

    Args:
        base: the base image.
        target: reference of the new image; a missing layout or archive is created.
        states: the states and their layers.
        options: see `AppendOptions`.

    Raises:
        BadInputError: the states do not fit the base, the tag exists, a label in `settings` is reserved, or the layout
            or archive of the target is inside a state or a checkpoint.
        EngineError: the base cannot be read, or the target cannot be written. The tag does not change.
    """
    if reserved := sorted(name for name in options.settings.labels if name.startswith(PREFIX)):
        raise BadInputError(
            f"the label {reserved[0]} is reserved: it describes the image's content", next_step="choose another name"
        )
    if target.path is not None:
        check_output_place(target.path)
    with open_store(base, insecure=options.insecure) as (source, name):
        base_image = resolve(source, name, platform=options.platform or states.platform)
        digest = "" if base.kind == "docker-archive" else source.read_manifest(name).digest
        change = change_for(base_image, states, name=str(base), digest=digest, device=options.device)
        image = add_layers(base_image, states.layers, change.overlaid(options.settings), created=states.created)
        if target.kind == "docker-archive":
            return _save(image, source, states.layers, target, replacing=options.replacing)
        with open_store(target, insecure=options.insecure) as (store, tag):
            return send(image, source, states.layers, store, tag, options)


def _save(
    image: Image, source: Store, layers: Sequence[Layer], target: ImageReference, *, replacing: bool
) -> AppendResult:
    """Write an image with all its layers to a Docker archive."""
    assert target.path is not None
    if not target.repository:
        raise BadInputError(f"{target} has no image name", next_step=f"write it as {target}:NAME:TAG")
    if target.path.exists() and not replacing:
        raise BadInputError(f"{target.path} exists", next_step="name another file, or replace it with --replace")
    blobs = _openers(image, source, layers)
    save_archive(image, f"{target.familiar}:{target.tag}", blobs, target.path)
    document, _, _ = to_documents(image)
    return AppendResult(document=document, blobs_sent=len(blobs), bytes_sent=sum(one.size for one in image.layers))


def send(
    image: Image,
    source: Store,
    layers: Sequence[Layer],
    target: Store,
    reference: str,
    options: AppendOptions = _DEFAULTS,
) -> AppendResult:
    """Store an image: first the blobs that the target lacks, then manifest and evidence, and the tag last.

    Args:
        image: the image.
        source: the store that has the layers of the base image.
        layers: the new layers.
        target: the store to write to.
        reference: the tag of the image.
        options: `replacing`, `expected`, `evidence`, `key` and `say` are used.

    Raises:
        BadInputError: the tag exists.
        EngineError: the source or the target failed; the tag is unchanged.
        TagMovedError: the tag does not have the expected digest.
    """
    check = partial(check_tag, target, reference, replacing=options.replacing, expected=options.expected)
    check()
    document, config, raw = to_documents(image)
    openers = _openers(image, source, layers)
    titles = {layer.descriptor.digest: layer.title for layer in layers}
    sent: list[int] = []

    def put(descriptor: Descriptor, open_stream: OpenStream, title: str) -> None:
        options.say(f"sending {title}, {descriptor.size / 1e6:.1f} MB")
        target.put_blob(descriptor, lambda: counted(open_stream(), descriptor.size))
        sent.append(descriptor.size)

    for number, descriptor in enumerate(image.layers, start=1):
        new = descriptor.digest in titles
        if not target.has_blob(descriptor) and (new or not _mount(source, target, descriptor)):
            put(descriptor, openers[descriptor.digest], titles.get(descriptor.digest, f"layer {number} of the base"))
    if not target.has_blob(config):
        put(config, lambda: BytesIO(raw), "the configuration")
    if options.evidence is not None:
        check()  # sending can take minutes
        # Attach the evidence by digest before the tag exists, so that no tag names an image without its evidence.
        target.put_manifest(document, document.digest)
        attach_evidence(target, document.digest, options.evidence, key=options.key)
    target.put_manifest(document, reference, check=check)
    return AppendResult(document=document, blobs_sent=len(sent), bytes_sent=sum(sent))


def check_tag(target: Store, reference: str, *, replacing: bool, expected: str | None = None) -> None:
    """Check that a tag may be set.

    Args:
        target: the store of the tag.
        reference: the tag.
        replacing: the tag may exist.
        expected: the digest that the tag must have, or "" if it must not exist; then `replacing` has no effect.

    Raises:
        BadInputError: the tag exists, or names an index: one image must not replace the images of several platforms.
        TagMovedError: the tag does not have the expected digest.
    """
    if expected is None and not replacing:
        if target.has_manifest(reference):
            raise BadInputError(
                f"there is an image {reference!r} already",
                next_step="choose another tag, or replace the image with --replace",
            )
        return
    document = target.read_manifest(reference) if target.has_manifest(reference) else None
    if document is not None and document.media_type in INDEXES:
        raise BadInputError(
            f"{reference!r} is an index of images for several platforms; the new image is for one",
            next_step="choose another tag, and create an index of it and the other platforms' images: "
            "docker buildx imagetools create",
        )
    digest = document.digest if document is not None else ""
    if expected is not None and digest != expected:
        raise TagMovedError(
            f"{reference!r} has moved from {expected or 'nothing'} to {digest or 'nothing'}", next_step="try again"
        )


def _openers(image: Image, source: Store, layers: Sequence[Layer]) -> dict[str, OpenStream]:
    """Return a function that opens each layer of an image, by the digest of the layer."""
    openers: dict[str, OpenStream] = {
        descriptor.digest: partial(source.open_blob, descriptor) for descriptor in image.layers
    }
    openers.update((layer.descriptor.digest, layer.open) for layer in layers)
    return openers


def _mount(source: Store, target: Store, descriptor: Descriptor) -> bool:
    """Mount a blob if source and target are in the same registry; return whether the target has the blob now."""
    from chatterbox_prewarm.image.registry.client import Repository

    if not isinstance(source, Repository) or not isinstance(target, Repository):
        return False
    if source.reference.host != target.reference.host:
        return False
    return target.mount_blob(descriptor, source.reference.repository)
