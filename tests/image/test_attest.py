"""Signed proofs of an image: what is attached, how others read it, and that `verify --image` checks it."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from chatterbox_prewarm.image.oci import digest_of, dump, image_index
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.referrers import EVIDENCE_TYPE, referrers_tag
from chatterbox_prewarm.image.statements import PROVENANCE, STATE_KEY, TEST_RESULT, BakedState, provenance_predicate
from chatterbox_prewarm.image.stores import open_store
from chatterbox_prewarm.state.envelope import BUNDLE_TYPE, Bundle, sign_payload
from chatterbox_prewarm.state.keys import read_private_key
from chatterbox_prewarm.state.manifest import Provenance
from chatterbox_prewarm.state.state import State
from tests.conftest import ROOT, run_cli
from tests.helpers.images import make_base
from tests.helpers.keys import make_keys
from tests.helpers.registry_server import serve
from tests.helpers.states import make_state_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.registry_server import Registry

LABELS = {"io.chatterbox-prewarm.torch": "torch-2.6", "io.chatterbox-prewarm.variant": "english"}
H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "550.54.15", "torch": "2.6.0"}
CHECKS = ["no other miss", "no compiler started"]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with serve(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A layout with an image with a state for an H100 under the tag `warm`."""
    layout = Layout(tmp_path / "layout")
    make_base(layout, "base", Labels=LABELS)
    # Several members of gzip, as in a real layer.
    make_state_for(tmp_path / "h100", H100, code=random.Random(0).randbytes(3 << 20))
    to = f"oci:{layout.path}:warm"
    appended = run_cli("append", "--base", f"oci:{layout.path}:base", "--to", to, "--warm", tmp_path / "h100")
    assert appended.returncode == 0, appended.stderr
    return layout


@pytest.fixture
def evidence(layout: Layout, tmp_path: Path) -> Path:
    """The evidence of a proof of the image's state."""
    path = layout.path.parent / "evidence.json"
    checks = [{"name": name, "passed": True, "seen": "0"} for name in CHECKS]
    set_digest = State.read(tmp_path / "h100").manifest.set_digest
    path.write_text(json.dumps({"passed": True, "set_digest": set_digest, "checks": checks, "observed": {}}))
    return path


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """The facts of a node that fits the state."""
    path = tmp_path / "node.json"
    assert run_cli("facts", "--output", path).returncode == 0
    machine = {name: H100[name] for name in ("arch", "gpu", "compute_capability", "driver")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **machine}))
    return path


def _pinned(image: str) -> str:
    """Return the image by its digest instead of its tag."""
    with open_store(parse(image)) as (store, name):
        return str(parse(image).at(store.read_manifest(name).digest))


def _attest(image: str, evidence: Path, *arguments: str | Path) -> None:
    if "--key" in arguments:
        image = _pinned(image)
    attached = run_cli("attest", "--image", image, "--evidence", evidence, *arguments)
    assert attached.returncode == 0, attached.stderr


def _attached(image: str) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Return the digest of an image, the entries of its referrers, and the manifest under cosign's older tag."""
    with open_store(parse(image)) as (store, name):
        digest = store.read_manifest(name).digest
        listed = json.loads(store.read_manifest(referrers_tag(digest)).raw)["manifests"]
        old = json.loads(store.read_manifest(f"{referrers_tag(digest)}.att").raw)
    return digest, listed, old


def _blob(image: str, entry: dict[str, Any]) -> bytes:
    """Return the only layer of a referrer."""
    with open_store(parse(image)) as (store, _):
        (layer,) = json.loads(store.read_manifest(entry["digest"]).raw)["layers"]
        return _content(image, layer)


def _content(image: str, layer: dict[str, Any]) -> bytes:
    from chatterbox_prewarm.image.oci import Descriptor

    descriptor = Descriptor(media_type=layer["mediaType"], digest=layer["digest"], size=layer["size"])
    with open_store(parse(image)) as (store, _), store.open_blob(descriptor) as stream:
        return stream.read()


def _statements(image: str) -> dict[str, Any]:
    _, listed, _ = _attached(image)
    found = {}
    for entry in listed:
        if entry["artifactType"] == BUNDLE_TYPE:
            statement = json.loads(Bundle.parse(_blob(image, entry)).payload)
            found[statement["predicateType"]] = statement
    return found


@pytest.mark.programs
def test_both_statements_are_bundles_in_a_registry_and_attaching_them_again_changes_nothing(
    layout: Layout, registry: Registry, evidence: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    image = f"{registry.address}/speech:warm"
    assert (
        run_cli("append", "--base", f"oci:{layout.path}:base", "--to", image, "--warm", tmp_path / "h100").returncode
        == 0
    )
    _attest(image, evidence, "--key", keys[0])
    first = _attached(image)
    _attest(image, evidence, "--key", keys[0])
    assert _attached(image) == first
    digest, listed, old = first
    assert [entry["artifactType"] for entry in listed] == [BUNDLE_TYPE, BUNDLE_TYPE, EVIDENCE_TYPE]
    kinds = [entry["annotations"]["dev.sigstore.bundle.predicateType"] for entry in listed[:2]]
    assert kinds == [TEST_RESULT, PROVENANCE]
    assert all(entry["annotations"]["dev.sigstore.bundle.content"] == "dsse-envelope" for entry in listed[:2])
    with open_store(parse(image)) as (store, _):
        referrer = json.loads(store.read_manifest(listed[0]["digest"]).raw)
    assert referrer["subject"]["digest"] == digest
    assert [layer["mediaType"] for layer in referrer["layers"]] == [BUNDLE_TYPE]
    assert [layer["mediaType"] for layer in old["layers"]] == ["application/vnd.dsse.envelope.v1+json"] * 2
    assert [layer["annotations"]["predicateType"] for layer in old["layers"]] == [TEST_RESULT, PROVENANCE]


def test_the_statements_say_what_was_proven_and_how_it_was_made(
    layout: Layout, evidence: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    image = f"oci:{layout.path}:warm"
    _attest(image, evidence, "--key", keys[0])
    digest, _, _ = _attached(image)
    state = State.read(tmp_path / "h100")
    statements = _statements(image)
    assert set(statements) == {TEST_RESULT, PROVENANCE}
    for statement in statements.values():
        assert statement["subject"][0]["digest"] == {"sha256": digest.removeprefix("sha256:")}
    proof, provenance = statements[TEST_RESULT]["predicate"], statements[PROVENANCE]["predicate"]
    assert (proof["result"], proof["passedTests"], proof["failedTests"]) == ("PASSED", CHECKS, [])
    assert proof["configuration"][0]["digest"] == {"sha256": state.manifest_digest}
    assert proof["configuration"][0]["annotations"][STATE_KEY] == state.key
    assert proof["configuration"][1]["digest"] == {"sha256": digest_of(evidence.read_bytes()).removeprefix("sha256:")}
    assert provenance["runDetails"]["byproducts"][0]["digest"] == {"sha256": state.manifest_digest}
    dependencies = {entry["name"]: entry for entry in provenance["buildDefinition"]["resolvedDependencies"]}
    for file in state.manifest.weights.files:
        assert dependencies[file.path]["digest"] == {"sha256": file.sha256}


def test_in_toto_and_securesystemslib_read_the_statements_and_verify_the_signatures(
    layout: Layout, evidence: Path, keys: tuple[Path, Path]
) -> None:
    """They are other implementations of the formats."""
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance as ProvenanceMessage
    from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as TestResultMessage
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey
    from sigstore_models.bundle.v1 import Bundle as SigstoreBundle

    image = f"oci:{layout.path}:warm"
    _attest(image, evidence, "--key", keys[0])
    _, listed, old = _attached(image)
    public = load_pem_public_key(keys[1].read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    key = SSlibKey.from_crypto(public)
    key.keyid = ""  # this library only uses keys whose names are equal, and DSSE does not require names
    for layer in old["layers"]:
        content = _content(image, layer)
        assert Envelope.from_dict(json.loads(content)).verify([key], 1)
        changed = {**json.loads(content), "payload": base64.b64encode(b"{}").decode()}
        with pytest.raises(Exception, match="Found: 0"):
            Envelope.from_dict(changed).verify([key], 1)
    messages = {TEST_RESULT: TestResultMessage(), PROVENANCE: ProvenanceMessage()}
    for entry in listed:
        if entry["artifactType"] != BUNDLE_TYPE:
            continue
        raw = _blob(image, entry)
        assert SigstoreBundle.from_json(raw).media_type == BUNDLE_TYPE
        statement = json.loads(Bundle.parse(raw).payload)
        parsed = ParseDict({**statement, "_type": statement["_type"]}, StatementMessage())
        Statement.copy_from_pb(parsed).validate()
        ParseDict(statement["predicate"], messages.pop(parsed.predicate_type))
    assert not messages


def test_verify_accepts_an_image_only_with_a_proof_that_is_signed_with_the_key(
    layout: Layout, evidence: Path, keys: tuple[Path, Path], node: Path, tmp_path: Path
) -> None:
    image = f"oci:{layout.path}:warm"
    verify = ("verify", "--image", image, "--host-facts", node, "--key")
    unsigned = run_cli(*verify, keys[1])
    assert unsigned.returncode == 12, unsigned.stderr
    assert "has no proof of the state" in unsigned.stderr
    _attest(image, evidence, "--key", keys[0])
    verified = run_cli(*verify, keys[1])
    assert verified.returncode == 11, "the state of this test lacks families"
    assert f"proof of {State.read(tmp_path / 'h100').key}: signed, 2 tests passed" in verified.stdout
    assert "provenance: signed, builder" in verified.stdout
    _, other = make_keys(tmp_path, "other-")
    refused = run_cli(*verify, other)
    assert refused.returncode == 12
    assert "is signed with another key" in refused.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": [{"name": "x", "digest": {"sha256": "0" * 64}}]}, "it is about another image"),
        ({"predicate": {"result": "FAILED"}}, "its result is 'FAILED'"),
        ({"_type": "https://in-toto.io/Statement/v0.1"}, "it is a 'https://in-toto.io/Statement/v0.1'"),
        ({"predicate": []}, "this is not the statement of a proof"),
    ],
)
def test_a_signed_statement_of_something_else_is_no_proof(
    change: dict[str, Any], reason: str, layout: Layout, evidence: Path, keys: tuple[Path, Path], node: Path
) -> None:
    image = f"oci:{layout.path}:warm"
    _attest(image, evidence, "--key", keys[0])
    digest, listed, _ = _attached(image)
    statement = {**_statements(image)[TEST_RESULT], **change}
    bundle = dump(sign_payload(dump(statement), read_private_key(keys[0], None)).to_json())
    _replace_bundles(layout, digest, listed[0], bundle)
    refused = run_cli("verify", "--image", image, "--host-facts", node, "--key", keys[1])
    assert refused.returncode == 12, refused.stderr
    assert reason in refused.stderr


def test_a_changed_payload_is_no_proof(layout: Layout, evidence: Path, keys: tuple[Path, Path], node: Path) -> None:
    image = f"oci:{layout.path}:warm"
    _attest(image, evidence, "--key", keys[0])
    digest, listed, _ = _attached(image)
    bundle = Bundle.parse(_blob(image, listed[0]))
    changed = replace(bundle, payload=bundle.payload.replace(b"no other miss", b"no other mist"))
    _replace_bundles(layout, digest, listed[0], dump(changed.to_json()))
    refused = run_cli("verify", "--image", image, "--host-facts", node, "--key", keys[1])
    assert refused.returncode == 12, refused.stderr


def _replace_bundles(layout: Layout, digest: str, entry: dict[str, Any], content: bytes) -> None:
    """Let an image have only one bundle, with this content."""
    from io import BytesIO

    from chatterbox_prewarm.image.oci import Descriptor, Document

    blob = Descriptor(media_type=BUNDLE_TYPE, digest=digest_of(content), size=len(content))
    layout.put_blob(blob, lambda: BytesIO(content))
    manifest = json.loads(layout.read_manifest(entry["digest"]).raw)
    manifest["layers"] = [blob.to_json()]
    document = Document(media_type=manifest["mediaType"], raw=dump(manifest))
    layout.put_manifest(document, document.digest)
    listed = {**document.descriptor.to_json(), "artifactType": BUNDLE_TYPE}
    layout.put_manifest(image_index([listed]), referrers_tag(digest))


def test_the_predicates_can_be_written_for_another_signer(layout: Layout, evidence: Path, tmp_path: Path) -> None:
    _attest(f"oci:{layout.path}:warm", evidence, "--predicates", tmp_path / "predicates")
    proof, provenance = (
        json.loads((tmp_path / "predicates" / f"{name}.json").read_text()) for name in ("proof", "provenance")
    )
    assert proof["result"] == "PASSED"
    assert provenance["buildDefinition"]["buildType"] == "urn:chatterbox-prewarm:bake:1"
    assert not layout.has_manifest(referrers_tag(layout.read_manifest("warm").digest)), "nothing is attached"


def test_the_provenance_has_the_facts_of_the_builder(layout: Layout, tmp_path: Path) -> None:
    assert layout.path.is_dir()
    manifest = State.read(tmp_path / "h100").manifest
    known = Provenance(
        source="a" * 64,
        packages="b" * 64,
        revision="c" * 40,
        base_image=f"debian@sha256:{'d' * 64}",
        builder="https://ci.example.com/jobs/1",
        parameters={"device": "cuda"},
    )
    for provenance, builder, count in (
        (known, known.builder, 2),
        (Provenance(), "urn:chatterbox-prewarm:builder:not-recorded", 1),
    ):
        state = BakedState(manifest=replace(manifest, provenance=provenance), digest=f"sha256:{'e' * 64}")
        predicate = provenance_predicate(state)
        assert predicate["runDetails"]["builder"]["id"] == builder
        dependencies = predicate["buildDefinition"]["resolvedDependencies"]
        assert len(dependencies) == count + len(manifest.weights.files)
        if provenance is known:
            assert dependencies[0]["digest"] == {"gitCommit": "c" * 40}
            assert dependencies[1] == {"name": "debian", "digest": {"sha256": "d" * 64}}
            assert predicate["buildDefinition"]["externalParameters"]["device"] == "cuda"


def test_the_policy_for_kyverno_admits_what_is_attached_and_nothing_else(
    layout: Layout, evidence: Path, keys: tuple[Path, Path]
) -> None:
    """The conditions are evaluated as Kyverno does: names are those of the predicate."""
    _attest(f"oci:{layout.path}:warm", evidence, "--key", keys[0])
    statements = _statements(f"oci:{layout.path}:warm")
    policy = yaml.safe_load((EXAMPLES / "kyverno-proved-warm.yaml").read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("kyverno.io/v1", "ClusterPolicy")
    (verified,) = policy["spec"]["rules"][0]["verifyImages"]
    assert {entry["type"] for entry in verified["attestations"]} == set(statements)
    for entry in verified["attestations"]:
        (attestor,) = entry["attestors"]
        assert attestor["entries"][0]["keys"]["rekor"]["ignoreTlog"] is True
        conditions = entry["conditions"][0]["all"]
        predicate = statements[entry["type"]]["predicate"]
        assert all(_holds(condition, predicate) for condition in conditions)
        if entry["type"] == TEST_RESULT:
            failed = {**predicate, "result": "FAILED", "failedTests": ["a"], "passedTests": []}
            assert not any(_holds(condition, failed) for condition in conditions)


def _holds(condition: dict[str, Any], predicate: dict[str, Any]) -> bool:
    key, value = (_resolved(condition[name], predicate) for name in ("key", "value"))
    if condition["operator"] == "Equals":
        return bool(key == value)
    assert condition["operator"] == "AnyIn"
    return key in value


def _resolved(text: object, predicate: dict[str, Any]) -> Any:
    if not isinstance(text, str) or not text.startswith("{{"):
        return text
    found: Any = predicate
    for name in text.strip("{} ").split("."):
        found = found[name]
    return found


def test_the_policy_of_the_policy_controller_names_what_is_attached(
    layout: Layout, evidence: Path, keys: tuple[Path, Path]
) -> None:
    _attest(f"oci:{layout.path}:warm", evidence, "--key", keys[0])
    statements = _statements(f"oci:{layout.path}:warm")
    policy = yaml.safe_load((EXAMPLES / "policy-controller-proved-warm.yaml").read_text())
    assert (policy["apiVersion"], policy["kind"]) == ("policy.sigstore.dev/v1beta1", "ClusterImagePolicy")
    (authority,) = policy["spec"]["authorities"]
    assert authority["key"]["hashAlgorithm"] == "sha256", "of the curve P-256, which the documentation names"
    assert {entry["predicateType"] for entry in authority["attestations"]} == set(statements)
    for entry in authority["attestations"]:
        cue = entry["policy"]["data"]
        assert f'predicateType: "{entry["predicateType"]}"' in cue
        predicate = statements[entry["predicateType"]]["predicate"]
        values = [predicate["result"]] if "result" in predicate else [predicate["buildDefinition"]["buildType"]]
        assert all(f'"{value}"' in cue for value in values)
