"""Read and list the documents that are attached to an image: OCI referrers, manifests whose subject is the image."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError, IntegrityError
from chatterbox_prewarm.image.oci import MAX_DOCUMENT, image_index, read_image_layers, read_index
from chatterbox_prewarm.image.statements import PROVENANCE, TEST_RESULT, SignedProof, check_subject, read_proof
from chatterbox_prewarm.state.envelope import BUNDLE_TYPE, Bundle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from chatterbox_prewarm.image.oci import Document, Store

logger = logging.getLogger(__name__)

EVIDENCE_TYPE = "application/vnd.chatterbox-prewarm.evidence.v1+json"
#: Errors of a referrer that is malformed, or listed but missing. Anyone who may write to the registry can attach one.
_UNREADABLE = (EngineError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def referrers_tag(digest: str) -> str:
    """Return the tag of the index that lists referrers in registries without the referrers API.

    It is the subject's digest with a dash (OCI distribution specification, "Referrers Tag Schema").
    """
    return digest.replace(":", "-")


def list_referrers(store: Store, digest: str, artifact_type: str) -> list[dict[str, Any]]:
    """List the referrers of an image, from the registry's API and from the tag.

    Args:
        store: has the image.
        digest: of the image's manifest.
        artifact_type: of the referrers to list.

    Raises:
        EngineError: the store cannot be read.
    """
    from chatterbox_prewarm.image.registry.client import Repository

    entries: dict[str, dict[str, Any]] = {}
    documents = [store.read_referrers(digest)] if isinstance(store, Repository) else []
    if store.has_manifest(tag := referrers_tag(digest)):
        documents.append(store.read_manifest(tag))
    for document in filter(None, documents):
        read_index(document)  # checks it
        for entry in json.loads(document.raw).get("manifests") or []:
            if entry.get("artifactType") == artifact_type:
                entries.setdefault(entry["digest"], entry)
    return list(entries.values())


def add_referrer(store: Store, subject: Document, referrer: Document) -> None:
    """Store a referrer, and list it under the tag for registries without the referrers API."""
    store.put_manifest(referrer, referrer.digest)
    tag = referrers_tag(subject.digest)
    entries: list[dict[str, Any]] = []
    if store.has_manifest(tag):
        listed = store.read_manifest(tag)
        read_index(listed)  # checks it
        entries = json.loads(listed.raw)["manifests"]
    manifest = json.loads(referrer.raw)
    entry = {**referrer.descriptor.to_json(), "artifactType": manifest["artifactType"]}
    if manifest.get("annotations"):
        entry["annotations"] = manifest["annotations"]
    if entry not in entries:
        store.put_manifest(image_index([*entries, entry]), tag)


def proven_states(store: Store, digest: str) -> frozenset[str]:
    """Return the keys of the states for which an image has the evidence of a proof that passed.

    Anyone who may write to the registry can attach evidence, so this is a hint for users and not a check.

    Args:
        store: has the image.
        digest: of the image's manifest.

    Raises:
        EngineError: the store cannot be read.
    """
    entries = list_referrers(store, digest, EVIDENCE_TYPE)
    return frozenset(key for entry in entries if (key := _proven_state(store, entry["digest"])))


@dataclass(frozen=True, kw_only=True)
class Attestations:
    """The signed statements of an image whose signatures are of one key.

    Attributes:
        proofs: of the states, by their keys.
        provenances: the predicates of provenance.
        others: why each other bundle does not count.
    """

    proofs: Mapping[str, SignedProof]
    provenances: tuple[Mapping[str, Any], ...]
    others: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return a report for users."""
        builders = (predicate["runDetails"]["builder"]["id"] for predicate in self.provenances)
        return [
            *(f"proof of {key}: signed, {len(proof.tests)} tests passed" for key, proof in self.proofs.items()),
            *(f"provenance: signed, builder {builder}" for builder in builders),
        ]

    def require_proof(self, image: str, state: str) -> None:
        """Check that there is a signed proof of a state.

        Raises:
            IntegrityError: the image has no such proof.
        """
        if state not in self.proofs:
            reasons = f": {'; '.join(self.others)}" if self.others else ""
            raise IntegrityError(
                f"{image} has no proof of the state {state} that is signed with this key{reasons}",
                next_step="prove the image and attach the evidence with `attest --key`, or give another key",
            )


def read_attestations(store: Store, digest: str, key: EllipticCurvePublicKey) -> Attestations:
    """Read the signed statements of an image, and verify their signatures and subjects.

    Args:
        store: has the image.
        digest: of the image's manifest.
        key: the public key.

    Raises:
        EngineError: the store cannot be read.
    """
    proofs: dict[str, SignedProof] = {}
    provenances, others = [], []
    for referrer, bundle in read_bundles(store, digest):
        if not bundle.is_signed_with(key):
            others.append(f"{referrer[:19]} is signed with another key, {bundle.hint}")
            continue
        try:
            statement = json.loads(bundle.payload)
            kind = statement["predicateType"]
            if kind == TEST_RESULT:
                proof = read_proof(statement, digest)
                proofs[proof.state] = proof
            elif kind == PROVENANCE:
                check_subject(statement, digest)
                provenances.append(statement["predicate"])
        except IntegrityError as error:
            others.append(f"{referrer[:19]}: {error.message}")
        except (ValueError, LookupError, TypeError) as error:
            others.append(f"{referrer[:19]}: {error!r}")
    return Attestations(proofs=proofs, provenances=tuple(provenances), others=tuple(others))


def read_bundles(store: Store, digest: str) -> Iterator[tuple[str, Bundle]]:
    """Yield the digest and the content of each bundle that is attached to an image, without verifying it.

    A bundle that cannot be read is logged and left out.

    Raises:
        EngineError: the list of the referrers cannot be read.
    """
    for entry in list_referrers(store, digest, BUNDLE_TYPE):
        try:
            bundle = Bundle.parse(_read_layer(store, entry["digest"]))
        except _UNREADABLE as error:
            logger.warning("the bundle in the manifest %s cannot be read: %r", entry["digest"], error)
        else:
            yield entry["digest"], bundle


def _proven_state(store: Store, digest: str) -> str:
    """Return the key of the state that evidence is for, or "" if it is unknown or its proof did not pass."""
    try:
        evidence = json.loads(_read_layer(store, digest))
        return str(evidence["observed"]["metrics"]["state"]) if evidence["passed"] is True else ""
    except _UNREADABLE as error:
        logger.warning("the evidence in the manifest %s cannot be read: %r", digest, error)
        return ""


def _read_layer(store: Store, digest: str) -> bytes:
    """Read the only layer of a referrer."""
    layers = read_image_layers(store.read_manifest(digest))
    if len(layers) != 1:
        raise EngineError(f"the manifest {digest} has {len(layers)} layers", next_step="attach the document again")
    with store.open_blob(layers[0]) as stream:
        return stream.read(MAX_DOCUMENT)
