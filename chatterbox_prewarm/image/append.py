"""Append: a base image and new layers make a new image, without an engine.

Layers that the target has already are not sent; what remains goes through as a stream.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.attest import attach_evidence
from chatterbox_prewarm.image.compose import NO_CHANGE, add_layers, resolve
from chatterbox_prewarm.image.docker_archive import save_archive
from chatterbox_prewarm.image.labels import PREFIX
from chatterbox_prewarm.image.oci import INDEXES, to_documents
from chatterbox_prewarm.image.state_layers import change_for
from chatterbox_prewarm.image.stores import reading, storing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

    from chatterbox_prewarm.image.compose import Change
    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Descriptor, Document, Image, Readable, Store
    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.state_layers import Addition

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Appended:
    """The new image's manifest, and how many blobs and bytes of it the target lacked."""

    document: Document
    blobs_sent: int
    bytes_sent: int


class TagMovedError(EngineError):
    """The tag names another image than the one that was added to."""


def append(
    base: ImageReference,
    target: ImageReference,
    addition: Addition,
    *,
    platform: str = "",
    device: str = "",
    settings: Change = NO_CHANGE,
    replacing: bool = False,
    expected: str | None = None,
    evidence: Path | None = None,
    insecure: bool | None = None,
    say: Callable[[str], None] = logger.info,
) -> Appended:
    """Add states, and what goes with them, to a base, as a new image.

    Args:
        base: the image below.
        target: what the result is called, and where it goes; a layout or an archive is made if it is not there.
        addition: what is added.
        platform: of the base, where there are several; by default that of the states.
        device: that a start is to use; by default that of the states, if the base names none.
        settings: of the result, beside and before what the addition makes of them.
        replacing: take the tag, or the archive, that is there.
        expected: the digest that the tag must still have when it is taken, or "" if it must not be there.
        evidence: of a proof of what is added, attached before the tag is set; not to an archive.
        insecure: of both registries, as `Repository` has it.
        say: called with one line for each blob that is sent.

    Raises:
        BadInputError: the base is not fit for it, the tag exists, or a setting is of a label that is not for users.
        EngineError: the base cannot be read, or the target not be written; what the tag named is as it was.
    """
    if told := sorted(name for name in settings.labels if name.startswith(PREFIX)):
        raise BadInputError(
            f"the label {told[0]} says what is in the image, and is not to be set", next_step="choose another name"
        )
    with reading(base, insecure=insecure) as (source, name):
        found = resolve(source, name, platform=platform or addition.platform)
        digest = "" if base.kind == "docker-archive" else source.read_manifest(name).digest
        change = change_for(found, addition, name=str(base), digest=digest, device=device).overlaid(settings)
        image = add_layers(found, addition.layers, change, created=addition.created)
        if target.kind == "docker-archive":
            return _save(image, source, addition.layers, target, replacing=replacing)
        with storing(target, insecure=insecure) as (store, tag):
            return send(
                image,
                source,
                addition.layers,
                store,
                tag,
                replacing=replacing,
                expected=expected,
                evidence=evidence,
                say=say,
            )


def _save(
    image: Image, source: Readable, layers: Sequence[Layer], target: ImageReference, *, replacing: bool
) -> Appended:
    """Write an image to an archive of Docker's, all of its layers."""
    assert target.path is not None
    if not target.repository:
        raise BadInputError(f"{target} names no image", next_step=f"write it as {target}:NAME:TAG")
    if target.path.exists() and not replacing:
        raise BadInputError(f"{target.path} exists", next_step="name another file, or take that one with --replace")
    new = {layer.descriptor.digest: layer.opened for layer in layers}

    def opened(descriptor: Descriptor) -> Callable[[], AbstractContextManager[BinaryIO]]:
        return new.get(descriptor.digest) or (lambda: source.open_blob(descriptor))

    blobs = {descriptor.digest: opened(descriptor) for descriptor in image.layers}
    save_archive(image, f"{target.familiar}:{target.tag}", blobs, target.path)
    document, _, _ = to_documents(image)
    return Appended(document=document, blobs_sent=len(blobs), bytes_sent=sum(one.size for one in image.layers))


def send(
    image: Image,
    source: Readable,
    layers: Sequence[Layer],
    target: Store,
    reference: str,
    *,
    replacing: bool = False,
    expected: str | None = None,
    evidence: Path | None = None,
    say: Callable[[str], None] = logger.info,
) -> Appended:
    """Store an image: the blobs that the target lacks, then its documents, its evidence if any, and its tag last.

    Args:
        image: to store.
        source: has the layers of its base.
        layers: those that are new.
        target: to store in.
        reference: the tag it gets.
        replacing: take the tag from an image that has it.
        expected: the digest that the tag must still have when it is taken, or "" if it must not be there.
        evidence: attached to the image while only its digest names it, so that no tag stands for one without.
        say: called with one line for each blob that is sent.

    Raises:
        BadInputError: the tag exists.
        EngineError: the source or the target failed; the tag is as it was.
        TagMovedError: it names another image than the one expected.
    """
    check_tag(target, reference, replacing=replacing, expected=expected)
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
    check_tag(target, reference, replacing=replacing, expected=expected)  # minutes may have passed
    if evidence is not None:
        target.put_manifest(document, document.digest)
        attach_evidence(target, document.digest, evidence)
        check_tag(target, reference, replacing=replacing, expected=expected)
    target.put_manifest(document, reference)
    return Appended(document=document, blobs_sent=len(sent), bytes_sent=sum(sent))


def check_tag(target: Store, reference: str, *, replacing: bool, expected: str | None = None) -> None:
    """Refuse to take a tag from an image that has it, that is not the expected one, or from an index of several.

    Raises:
        BadInputError: the tag exists, or names images for several platforms, of which one would be left.
        TagMovedError: it names another image.
    """
    if expected is None and not replacing:
        if target.has_manifest(reference):
            raise BadInputError(
                f"there is an image {reference!r} already",
                next_step="choose another tag, or take that one with --replace",
            )
        return
    document = target.read_manifest(reference) if target.has_manifest(reference) else None
    if document is not None and document.media_type in INDEXES:
        raise BadInputError(
            f"{reference!r} names an index, of images for several platforms, and would name the one that is made here",
            next_step="choose another tag, and make an index of it and of the other platforms' images: "
            "docker buildx imagetools create",
        )
    if expected is not None:
        found = document.digest if document is not None else ""
        if found != expected:
            raise TagMovedError(
                f"{reference!r} has moved from {expected or 'nothing'} to {found or 'nothing'}", next_step="try again"
            )


def _mounted(source: Readable, target: Store, descriptor: Descriptor) -> bool:
    """Whether the target, a repository, took the blob over from another of its registry."""
    from chatterbox_prewarm.image.registry.client import Repository

    if not isinstance(source, Repository) or not isinstance(target, Repository):
        return False
    if source.reference.host != target.reference.host:
        return False
    return target.mount_blob(descriptor, source.reference.repository)
