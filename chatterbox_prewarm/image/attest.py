"""Attach the evidence of a proof to an image, as OCI referrers: manifests whose subject is the image.

The evidence itself is attached as `prove` wrote it. With a private key, two signed statements are attached too: the
result of the proof and the provenance of the state. Each is stored in both ways that admission controllers read: as a
Sigstore bundle (cosign's BUNDLE_SPEC.md), and as a layer of cosign's older tag `sha256-….att` (ATTESTATION_SPEC.md).
"""

from __future__ import annotations

import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError, IntegrityError, NotWarmError
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.image_states import baked_states, with_states
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.image.oci import (
    INDEXES,
    OCI_CONFIG,
    OCI_EMPTY,
    Descriptor,
    digest_of,
    dump,
    image_manifest,
    read_image_layers,
)
from chatterbox_prewarm.image.references import is_digest
from chatterbox_prewarm.image.referrers import EVIDENCE_TYPE, add_referrer, read_bundles, referrers_tag
from chatterbox_prewarm.image.statements import (
    PROVENANCE,
    TEST_RESULT,
    Subject,
    make_statement,
    proof_predicate,
    provenance_predicate,
)
from chatterbox_prewarm.state.envelope import BUNDLE_TYPE, Bundle, sign_payload
from chatterbox_prewarm.state.places import check_output_place
from chatterbox_prewarm.system.atomic_files import write_whole
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from chatterbox_prewarm.image.oci import Document, Image, Store

_ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
#: Annotations of a bundle and of an envelope, by which cosign and others find it.
_PREDICATE_TYPE, _CONTENT = "dev.sigstore.bundle.predicateType", "dev.sigstore.bundle.content"
_OLD_SIGNATURE, _OLD_PREDICATE_TYPE = "dev.cosignproject.cosign/signature", "predicateType"


def attach_evidence(store: Store, reference: str, evidence: Path, *, key: EllipticCurvePrivateKey | None = None) -> str:
    """Attach the evidence of a proof to an image.

    Args:
        store: has the image.
        reference: tag or digest of the image; with a key, the digest. See `check_pinned`.
        evidence: the file that `prove` wrote.
        key: signs the statements; None attaches only the evidence.

    Returns:
        the digest of the referrer with the evidence.

    Raises:
        BadInputError: the file is not evidence, the store is read-only, or there is a key and no digest.
        NotWarmError: the proof did not pass.
        IntegrityError: the proof is for a state that the image does not have.
        EngineError: the image cannot be read, or the store cannot be written.
    """
    raw = _read_evidence(evidence)
    subject, image = read_subject(store, reference)
    if key is not None:
        check_pinned(reference, subject.digest)
    set_digest = json.loads(raw)["set_digest"]
    if set_digest not in {state.set_digest for state in read_states(image.labels)}:
        raise IntegrityError(
            f"{evidence} is for a state with the set digest {set_digest}, which {reference} does not have",
            next_step="prove this image, and attach the evidence of that proof",
        )
    if key is not None:
        predicates = make_predicates(store, image, raw)
        about = Subject(name=store.name, digest=subject.digest)
        payloads = [dump(make_statement(about, kind, predicate)) for kind, predicate in predicates.items()]
        _attach_signed(store, subject, payloads, key)
    return _attach(store, subject, raw, EVIDENCE_TYPE).digest


def check_pinned(reference: str, digest: str) -> None:
    """Check that an image that gets signed statements is named by its digest.

    The evidence names the state, and not the image. Anyone who may write to the registry can move the tag to another
    image with the same state and another layer. A statement about that image would be wrong.

    Args:
        reference: the name of the image in its store.
        digest: the digest that the name has now.

    Raises:
        BadInputError: it is a tag; the message has its digest.
    """
    if not is_digest(reference):
        raise BadInputError(
            f"with a key, name the image by its digest: the tag {reference!r} can move after the proof, "
            f"and has the digest {digest} now",
            next_step="compare this digest with the one that the push of the proven image printed, and if they are "
            f"equal, write @{digest} instead of the tag",
        )


def make_predicates(store: Store, image: Image, evidence: bytes) -> dict[str, dict[str, Any]]:
    """Return the predicates of the proof and of the provenance, by their types.

    Args:
        store: has the layers of the image.
        image: the image.
        evidence: the bytes that `prove` wrote.

    Raises:
        IntegrityError: no layer of the image has the manifest of the proven state.
        EngineError: a layer cannot be read.
    """
    parsed = json.loads(evidence)
    for state in baked_states(store, image):
        if state.manifest.set_digest == parsed["set_digest"]:
            return {
                TEST_RESULT: proof_predicate(parsed, digest_of(evidence), state),
                PROVENANCE: provenance_predicate(state),
            }
    raise IntegrityError(
        f"no layer of the image has the state with the set digest {parsed['set_digest']}, although a label names it",
        next_step="build the image again",
    )


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
        failed = [str(check["name"]) for check in parsed["checks"] if check["passed"] is not True]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInputError(
            f"{evidence} is not evidence: {error!r}", next_step="write it with `prove --image IMAGE --evidence FILE`"
        ) from error
    if passed is not True or failed or not isinstance(set_digest, str):
        names = f": {', '.join(failed)}" if failed else ""
        raise NotWarmError(
            f"{evidence} is of a proof that did not pass{names}", next_step="see its failed checks, and bake again"
        )
    return raw


def _attach_signed(store: Store, subject: Document, payloads: Sequence[bytes], key: EllipticCurvePrivateKey) -> None:
    """Sign statements and attach them. A statement that is attached already with this key is not signed again."""
    public = key.public_key()
    attached = {
        bundle.payload: bundle for _, bundle in read_bundles(store, subject.digest) if bundle.is_signed_with(public)
    }
    bundles = [attached.get(payload) or sign_payload(payload, key) for payload in payloads]
    for bundle in bundles:
        annotations = {_CONTENT: "dsse-envelope", _PREDICATE_TYPE: json.loads(bundle.payload)["predicateType"]}
        _attach(store, subject, dump(bundle.to_json()), BUNDLE_TYPE, annotations)
    _add_to_old_tag(store, subject, bundles)


def _attach(
    store: Store, subject: Document, content: bytes, kind: str, annotations: Mapping[str, str] | None = None
) -> Document:
    config = _put_bytes(store, OCI_EMPTY, b"{}")
    layer = _put_bytes(store, kind, content)
    referrer = image_manifest(config, [layer], annotations, artifactType=kind, subject=subject.descriptor.to_json())
    add_referrer(store, subject, referrer)
    return referrer


def _add_to_old_tag(store: Store, subject: Document, bundles: Sequence[Bundle]) -> None:
    """Add envelopes to the manifest under cosign's older tag, which has a layer for each attestation of the image."""
    tag = f"{referrers_tag(subject.digest)}.att"
    listed = store.read_manifest(tag) if store.has_manifest(tag) else None
    # A layout that has only one image, without a tag, finds it by every tag.
    layers = [] if listed is None or listed.digest == subject.digest else list(read_image_layers(listed))
    for bundle in bundles:
        kind = json.loads(bundle.payload)["predicateType"]
        layer = _put_bytes(
            store, _ENVELOPE_TYPE, dump(bundle.envelope()), {_OLD_SIGNATURE: "", _OLD_PREDICATE_TYPE: kind}
        )
        if all(layer.digest != existing.digest for existing in layers):
            layers.append(layer)
    config = {
        "architecture": "",
        "os": "",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    store.put_manifest(image_manifest(_put_bytes(store, OCI_CONFIG, dump(config)), layers), tag)


def _put_bytes(
    store: Store, media_type: str, content: bytes, annotations: Mapping[str, str] | None = None
) -> Descriptor:
    descriptor = Descriptor(
        media_type=media_type, digest=digest_of(content), size=len(content), annotations=annotations or {}
    )
    store.put_blob(descriptor, lambda: BytesIO(content))
    return descriptor


def write_predicates(store: Store, reference: str, evidence: Path, folder: Path) -> list[Path]:
    """Write the predicates of the proof and of the provenance as JSON files, to be signed by another program.

    Args:
        store: has the image.
        reference: tag or digest of the image.
        evidence: the file that `prove` wrote.
        folder: gets `proof.json` and `provenance.json`.

    Raises:
        PrewarmError: as `attach_evidence`.
    """
    raw = _read_evidence(evidence)
    _, image = read_subject(store, reference)
    predicates = make_predicates(store, image, raw)
    written = []
    for name, kind in (("proof.json", TEST_RESULT), ("provenance.json", PROVENANCE)):
        path = folder / name
        check_output_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(predicates[kind], indent=1, sort_keys=True) + "\n")
        written.append(path)
    return written
