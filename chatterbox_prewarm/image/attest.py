"""Attest: the evidence of a proof beside an image, as an OCI referrer: a manifest whose subject is the image."""

from __future__ import annotations

import contextlib
import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError, IntegrityError, NotWarmError
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.image.oci import (
    INDEXES,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Document,
    digest_of,
    dump,
)

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.oci import Store

EVIDENCE_TYPE = "application/vnd.chatterbox-prewarm.evidence.v1+json"


def attach_evidence(store: Store, reference: str, evidence: Path) -> str:
    """Attach the evidence of a proof to an image.

    Args:
        store: where the image is.
        reference: its tag or digest.
        evidence: a file that `prove` wrote.

    Returns:
        the digest of the referrer's manifest.

    Raises:
        BadInputError: the file holds no evidence.
        NotWarmError: the proof did not pass.
        IntegrityError: it is a proof of another state than those of the image.
        EngineError: the image cannot be read, or the store not be written.
    """
    raw = _read(evidence)
    subject = store.read_manifest(reference)
    if subject.media_type in INDEXES:
        raise EngineError(
            f"{reference} is an index of several images", next_step="name the image that was proven, by its digest"
        )
    states = read_states(resolve(store, reference).labels)
    digest = json.loads(raw)["set_digest"]
    if digest not in {state.set_digest for state in states}:
        raise IntegrityError(
            f"{evidence} is of a state with the set digest {digest}, which {reference} does not have",
            next_step="prove this image, and attach what that gives",
        )
    empty = b"{}"
    blobs = {OCI_EMPTY: empty, EVIDENCE_TYPE: raw}
    described = {kind: Descriptor(media_type=kind, digest=digest_of(one), size=len(one)) for kind, one in blobs.items()}
    for kind, content in blobs.items():
        store.put_blob(described[kind], lambda content=content: contextlib.nullcontext(BytesIO(content)))  # type: ignore[misc]
    document = Document(
        media_type=OCI_MANIFEST,
        raw=dump(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "artifactType": EVIDENCE_TYPE,
                "config": described[OCI_EMPTY].to_json(),
                "layers": [described[EVIDENCE_TYPE].to_json()],
                "subject": _described(subject).to_json(),
            }
        ),
    )
    store.put_manifest(document, document.digest)
    _list(store, subject, document)
    return document.digest


def _read(evidence: Path) -> bytes:
    try:
        raw = evidence.read_bytes()
        found = json.loads(raw)
        passed, digest = found["passed"], found["set_digest"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInputError(
            f"{evidence} holds no evidence: {error!r}", next_step="write it with `prove --image IMAGE --evidence FILE`"
        ) from error
    if passed is not True or not isinstance(digest, str):
        raise NotWarmError(f"{evidence} is of a proof that did not pass", next_step="see its checks, and bake again")
    return raw


def _described(document: Document) -> Descriptor:
    return Descriptor(media_type=document.media_type, digest=document.digest, size=len(document.raw))


def _list(store: Store, subject: Document, referrer: Document) -> None:
    """Name the referrer in the index that stands for OCI's list of referrers in a registry that has none.

    OCI's distribution specification, "Referrers Tag Schema": its tag is the subject's digest with a dash.
    """
    tag = subject.digest.replace(":", "-")
    entries: list[dict[str, Any]] = []
    if store.has_manifest(tag):
        entries = json.loads(store.read_manifest(tag).raw).get("manifests", [])
    entry = {**_described(referrer).to_json(), "artifactType": EVIDENCE_TYPE}
    if entry not in entries:
        index = dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*entries, entry]})
        store.put_manifest(Document(media_type=OCI_INDEX, raw=index), tag)
