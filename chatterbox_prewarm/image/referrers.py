"""Read the evidence that is attached to an image: OCI referrers, that is manifests whose subject is the image."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from chatterbox_prewarm.image.oci import MAX_DOCUMENT, read_image_layers, read_index

if TYPE_CHECKING:
    from chatterbox_prewarm.image.oci import Store

logger = logging.getLogger(__name__)

EVIDENCE_TYPE = "application/vnd.chatterbox-prewarm.evidence.v1+json"


def referrers_tag(digest: str) -> str:
    """Return the tag of the index that lists referrers in registries without the referrers API.

    It is the subject's digest with a dash (OCI distribution specification, "Referrers Tag Schema").
    """
    return digest.replace(":", "-")


def proven_states(store: Store, digest: str) -> frozenset[str]:
    """Return the keys of the states for which an image has the evidence of a proof that passed.

    Anyone who may write to the registry can attach evidence, so this is a hint for users and not a check.

    Args:
        store: has the image.
        digest: of the image's manifest.

    Raises:
        EngineError: the store cannot be read.
    """
    tag = referrers_tag(digest)
    if not store.has_manifest(tag):
        return frozenset()
    listed = store.read_manifest(tag)
    read_index(listed)  # checks it
    entries = [entry for entry in json.loads(listed.raw)["manifests"] if entry.get("artifactType") == EVIDENCE_TYPE]
    return frozenset(key for entry in entries if (key := _proven_state(store, entry["digest"])))


def _proven_state(store: Store, digest: str) -> str:
    """Return the key of the state that evidence is for, or "" if it is unknown or its proof did not pass."""
    (layer,) = read_image_layers(store.read_manifest(digest))
    with store.open_blob(layer) as stream:
        raw = stream.read(MAX_DOCUMENT)
    try:
        evidence = json.loads(raw)
        return str(evidence["observed"]["metrics"]["state"]) if evidence["passed"] is True else ""
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("the manifest %s has no evidence that this version can read: %r", digest, error)
        return ""
