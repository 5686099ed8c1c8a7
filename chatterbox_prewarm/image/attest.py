"""Attach the evidence of a proof to an image, as an OCI referrer: a manifest whose subject is the image."""

from __future__ import annotations

import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError, IntegrityError, NotWarmError
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.image_states import with_states
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.image.oci import (
    INDEXES,
    OCI_EMPTY,
    Descriptor,
    digest_of,
    image_index,
    image_manifest,
    read_index,
)
from chatterbox_prewarm.image.referrers import EVIDENCE_TYPE, referrers_tag
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.oci import Document, Image, Store


def attach_evidence(store: Store, reference: str, evidence: Path) -> str:
    """Attach the evidence of a proof to an image.

    Args:
        store: has the image.
        reference: tag or digest of the image.
        evidence: the file that `prove` wrote.

    Returns:
        the digest of the referrer's manifest.

    Raises:
        BadInputError: the file is not evidence, or the store is read-only.
        NotWarmError: the proof did not pass.
        IntegrityError: the proof is for a state that the image does not have.
        EngineError: the image cannot be read, or the store cannot be written.
    """
    raw = _read_evidence(evidence)
    subject, image = read_subject(store, reference)
    set_digest = json.loads(raw)["set_digest"]
    if set_digest not in {state.set_digest for state in read_states(image.labels)}:
        raise IntegrityError(
            f"{evidence} is for a state with the set digest {set_digest}, which {reference} does not have",
            next_step="prove this image, and attach the evidence of that proof",
        )
    config = _put_bytes(store, OCI_EMPTY, b"{}")
    layer = _put_bytes(store, EVIDENCE_TYPE, raw)
    referrer = image_manifest(config, [layer], artifactType=EVIDENCE_TYPE, subject=subject.descriptor.to_json())
    store.put_manifest(referrer, referrer.digest)
    _add_to_referrers(store, subject, referrer)
    return referrer.digest


def read_subject(store: Store, reference: str) -> tuple[Document, Image]:
    """Read an image that can have evidence. Return its manifest, and the image with the labels of its states.

    Raises:
        EngineError: the image cannot be read, is an index, or has no state.
    """
    subject = store.read_manifest(reference)
    if subject.media_type in INDEXES:
        raise EngineError(f"{reference} is an index of several images", next_step="name the proven image by its digest")
    image = with_states(store, resolve(store, subject.digest))
    read_states(image.labels)  # checks that it has some
    return subject, image


def _read_evidence(evidence: Path) -> bytes:
    try:
        raw = read_regular(evidence, follow_links=True)
        parsed = json.loads(raw)
        passed, set_digest = parsed["passed"], parsed["set_digest"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInputError(
            f"{evidence} is not evidence: {error!r}", next_step="write it with `prove --image IMAGE --evidence FILE`"
        ) from error
    if passed is not True or not isinstance(set_digest, str):
        raise NotWarmError(
            f"{evidence} is of a proof that did not pass", next_step="see its failed checks, and bake again"
        )
    return raw


def _put_bytes(store: Store, media_type: str, content: bytes) -> Descriptor:
    descriptor = Descriptor(media_type=media_type, digest=digest_of(content), size=len(content))
    store.put_blob(descriptor, lambda: BytesIO(content))
    return descriptor


def _add_to_referrers(store: Store, subject: Document, referrer: Document) -> None:
    """Add the referrer to the index that lists referrers in registries without the referrers API."""
    tag = referrers_tag(subject.digest)
    entries: list[dict[str, Any]] = []
    if store.has_manifest(tag):
        referrers = store.read_manifest(tag)
        read_index(referrers)  # checks it
        entries = json.loads(referrers.raw)["manifests"]
    entry = {**referrer.descriptor.to_json(), "artifactType": EVIDENCE_TYPE}
    if entry not in entries:
        store.put_manifest(image_index([*entries, entry]), tag)
