"""What `attest` refuses to sign, and how unreadable documents that are attached to an image are handled."""

from __future__ import annotations

import json
from io import BytesIO
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError, NotWarmError
from chatterbox_prewarm.image.append import append
from chatterbox_prewarm.image.attest import attach_evidence
from chatterbox_prewarm.image.oci import OCI_EMPTY, Descriptor, Document, digest_of, image_index, image_manifest
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.publish import PublishOptions, prove_image
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.referrers import EVIDENCE_TYPE, proven_states, read_bundles, referrers_tag
from chatterbox_prewarm.image.state_layers import pack_states
from chatterbox_prewarm.state.envelope import BUNDLE_TYPE
from chatterbox_prewarm.state.keys import read_private_key
from chatterbox_prewarm.state.state import State
from tests.helpers.images import make_base
from tests.helpers.keys import make_keys
from tests.helpers.states import make_state_for

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

LABELS = {"io.chatterbox-prewarm.torch": "torch-2.6", "io.chatterbox-prewarm.variant": "english"}
H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "550.54.15", "torch": "2.6.0"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A layout with an image that has a state, under the tag `warm`."""
    layout = Layout(tmp_path / "layout")
    make_base(layout, "base", Labels=LABELS)
    make_state_for(tmp_path / "h100", H100)
    with pack_states([tmp_path / "h100"]) as states:
        append(parse(f"oci:{layout.path}:base"), parse(f"oci:{layout.path}:warm"), states)
    return layout


@pytest.fixture
def key(tmp_path: Path) -> EllipticCurvePrivateKey:
    return read_private_key(make_keys(tmp_path)[0], None)


def _evidence(folder: Path, **checks: bool) -> Path:
    set_digest = State.read(folder / "h100").manifest.set_digest
    listed = [{"name": name, "passed": passed, "seen": ""} for name, passed in checks.items()]
    path = folder / "evidence.json"
    path.write_text(json.dumps({"passed": True, "set_digest": set_digest, "checks": listed, "observed": {}}))
    return path


def test_only_an_image_that_is_named_by_its_digest_is_signed(
    layout: Layout, key: EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    evidence = _evidence(tmp_path, misses=True)
    digest = layout.read_manifest("warm").digest
    with pytest.raises(BadInputError, match=f"has the digest {digest} now") as caught:
        attach_evidence(layout, "warm", evidence, key=key)
    assert f"@{digest}" in caught.value.next_step
    assert not layout.has_manifest(referrers_tag(digest)), "nothing is attached"
    attach_evidence(layout, digest, evidence, key=key)
    assert len(list(read_bundles(layout, digest))) == 2
    attach_evidence(layout, "warm", evidence)  # without a key, the evidence is only a hint


def test_a_proof_in_a_container_is_signed_only_for_a_digest(
    layout: Layout, key: EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    options = PublishOptions(weights=tmp_path / "weights", warm=tmp_path / "h100", cache=tmp_path / "cache", key=key)
    with pytest.raises(BadInputError, match="with a key, name the image by its digest"):
        prove_image(f"oci:{layout.path}:warm", options)


def test_evidence_with_a_failed_check_is_refused_although_it_says_that_it_passed(
    layout: Layout, key: EllipticCurvePrivateKey, tmp_path: Path
) -> None:
    digest = layout.read_manifest("warm").digest
    evidence = _evidence(tmp_path, misses=True, compiler=False)
    with pytest.raises(NotWarmError, match="did not pass: compiler"):
        attach_evidence(layout, digest, evidence, key=key)
    assert not layout.has_manifest(referrers_tag(digest))


@pytest.mark.parametrize("kind", [BUNDLE_TYPE, EVIDENCE_TYPE])
def test_unreadable_documents_are_logged_and_the_others_are_read(
    kind: str, layout: Layout, key: EllipticCurvePrivateKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = layout.read_manifest("warm").digest
    evidence = _evidence(tmp_path, misses=True)
    observed = {"metrics": {"state": "the state"}}
    evidence.write_text(json.dumps({**json.loads(evidence.read_text()), "observed": observed}))
    attach_evidence(layout, digest, evidence, key=key)
    listed = json.loads(layout.read_manifest(referrers_tag(digest)).raw)["manifests"]
    deep = b"[" * 100_000
    bad = [_referrer(layout, kind, b"{}", b"{}"), _referrer(layout, kind, deep), _referrer(layout, kind, b"[]")]
    missing = Document(media_type=bad[0].media_type, raw=b"{}")
    entries = [{**each.descriptor.to_json(), "artifactType": kind} for each in (*bad, missing)]
    layout.put_manifest(image_index([*entries, *listed]), referrers_tag(digest))
    if kind == BUNDLE_TYPE:
        assert len(list(read_bundles(layout, digest))) == 2
    else:
        assert proven_states(layout, digest) == {"the state"}
    assert all(f"{each.digest} cannot be read" in caplog.text for each in (*bad, missing))


def _referrer(layout: Layout, kind: str, *contents: bytes) -> Document:
    """Store a referrer with these layers."""
    config, *layers = (
        Descriptor(media_type=media_type, digest=digest_of(content), size=len(content))
        for media_type, content in ((OCI_EMPTY, b"{}"), *((kind, content) for content in contents))
    )
    for descriptor, content in zip((config, *layers), (b"{}", *contents), strict=True):
        layout.put_blob(descriptor, lambda content=content: BytesIO(content))  # type: ignore[misc]
    document = image_manifest(config, layers, artifactType=kind)
    layout.put_manifest(document, document.digest)
    return document
