"""in-toto statements about an image: that its state was proven, and how the state was made.

Formats: in-toto Statement v1, the predicate of test results v0.1 (https://in-toto.io/attestation/test-result/v0.1) and
SLSA's provenance v1 (https://slsa.dev/provenance/v1). Signing them is the task of `state/envelope.py`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.state.envelope import STATEMENT
from chatterbox_prewarm.state.manifest import MANIFEST_NAME, UNKNOWN
from chatterbox_prewarm.state.state import state_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.state.manifest import Manifest

TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
PROVENANCE = "https://slsa.dev/provenance/v1"
#: Annotation of the tested configuration: the key of the state.
STATE_KEY = "io.chatterbox-prewarm.state"
#: SLSA's build type of a bake. `docs/trust.md` describes its parameters.
_BUILD_TYPE = "urn:chatterbox-prewarm:bake:1"
_NO_BUILDER = "urn:chatterbox-prewarm:builder:not-recorded"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The image that a statement is about: its repository, and the digest of its manifest."""

    name: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return the subject as a resource descriptor of in-toto."""
        return {"name": self.name, "digest": _digest(self.digest)}


@dataclass(frozen=True, kw_only=True)
class BakedState:
    """A state of an image: its manifest, and the digest of the manifest's file."""

    manifest: Manifest
    digest: str


def proof_predicate(evidence: Mapping[str, Any], evidence_digest: str, state: BakedState) -> dict[str, Any]:
    """Describe a proof that passed as the result of a test.

    Args:
        evidence: the document that `prove` wrote.
        evidence_digest: of its bytes.
        state: the state that was proven.
    """
    return {
        "result": "PASSED",
        "configuration": [
            {
                "name": MANIFEST_NAME,
                "digest": _digest(state.digest),
                "annotations": {STATE_KEY: state_key(state.manifest), "set-digest": state.manifest.set_digest},
            },
            {"name": "evidence.json", "digest": _digest(evidence_digest)},
        ],
        "passedTests": [check["name"] for check in evidence["checks"]],
        "warnedTests": [],
        "failedTests": [],
    }


def provenance_predicate(state: BakedState) -> dict[str, Any]:
    """Describe how a state was made, as provenance of SLSA. Facts that the bake did not record are left out."""
    manifest = state.manifest
    provenance = manifest.provenance
    source: dict[str, Any] = {
        "name": "chatterbox-prewarm",
        "annotations": {"sources": provenance.source, "packages": provenance.packages},
    }
    if _COMMIT.fullmatch(provenance.revision):
        source["digest"] = {"gitCommit": provenance.revision}
    elif provenance.revision != UNKNOWN:
        source["annotations"]["revision"] = provenance.revision
    dependencies = [source]
    if provenance.base_image != UNKNOWN:
        name, _, digest = provenance.base_image.rpartition("@")
        dependencies.append({"name": name or "base image", "digest": _digest(digest)})
    weights = manifest.weights
    # Random or private weights have no owner, and therefore no address on the model hub.
    hub = f"pkg:huggingface/{weights.repository}@{weights.revision}" if "/" in weights.repository else ""
    dependencies += [
        {"name": file.path, "digest": {"sha256": file.sha256}, **({"uri": f"{hub}#{file.path}"} if hub else {})}
        for file in weights.files
    ]
    return {
        "buildDefinition": {
            "buildType": _BUILD_TYPE,
            "externalParameters": {"variant": manifest.variant, **provenance.parameters},
            "internalParameters": {"execution": asdict(manifest.execution), "machine": dict(manifest.fingerprint)},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {
                "id": provenance.builder if provenance.builder != UNKNOWN else _NO_BUILDER,
                "version": {"chatterbox-prewarm": manifest.tool},
            },
            "metadata": {"finishedOn": manifest.created},
            "byproducts": [{"name": MANIFEST_NAME, "digest": _digest(state.digest)}],
        },
    }


def make_statement(subject: Subject, predicate_type: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return a statement of in-toto."""
    return {
        "_type": STATEMENT,
        "subject": [subject.to_json()],
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }


@dataclass(frozen=True, kw_only=True)
class SignedProof:
    """Content of a signed statement about a proof: the key of the state, and the tests that passed."""

    state: str
    tests: tuple[str, ...]


def read_proof(statement: Mapping[str, Any], image_digest: str) -> SignedProof:
    """Read a statement of a test result.

    Args:
        statement: its signature was verified.
        image_digest: of the image that it must be about.

    Raises:
        IntegrityError: it is about another image, says that a test failed, or is malformed.
    """
    try:
        check_subject(statement, image_digest)
        predicate = statement["predicate"]
        if predicate["result"] != "PASSED" or predicate.get("failedTests"):
            raise ValueError(f"its result is {predicate['result']!r}")  # noqa: TRY301 - one error for all of them
        states = [entry["annotations"][STATE_KEY] for entry in predicate["configuration"] if "annotations" in entry]
        return SignedProof(state=str(states[0]), tests=tuple(map(str, predicate["passedTests"])))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise IntegrityError(f"this is not the statement of a proof: {error}", next_step="attach it again") from error


def check_subject(statement: Mapping[str, Any], image_digest: str) -> None:
    """Check that a statement is about an image.

    Raises:
        ValueError, LookupError, TypeError: it is not.
    """
    if statement["_type"] != STATEMENT:
        raise ValueError(f"it is a {statement['_type']!r}")
    digests = [subject["digest"].get("sha256") for subject in statement["subject"]]
    if image_digest.removeprefix("sha256:") not in digests:
        raise ValueError(f"it is about another image, {digests}")


def _digest(digest: str) -> dict[str, str]:
    algorithm, _, value = digest.partition(":")
    return {algorithm: value}
