"""Test that a signature or an expected digest is verified, and that every other one is refused with the reason."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.state.keys import read_public_key
from chatterbox_prewarm.state.signature import Trust, check_same_state, check_trust_for_models, verify_signature
from chatterbox_prewarm.state.signing import sign
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.state.verify import verify
from tests.conftest import run_cli
from tests.helpers.keys import make_keys
from tests.helpers.signed_state import CODE, SignedState, flip_bit
from tests.helpers.states import make_state, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable


# ---- the signed content


def test_verify_notices_a_flipped_bit_in_any_file(signed: SignedState) -> None:
    trust = Trust(key=signed.public)
    for entry in signed.manifest.files:
        flip_bit(signed.warm / entry.path)
        with pytest.raises(IntegrityError, match=entry.path):
            verify(State.open(signed.warm, trust), signed.folder, signed.folder)
        flip_bit(signed.warm / entry.path)
    lines = verify(State.open(signed.warm, trust), signed.folder, signed.folder)
    assert "numba: 1 file(s) intact, fits this machine" in lines


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(signed: SignedState) -> None:
    path = signed.warm / "manifest.json"
    for position in range(0, len(path.read_bytes()), 5):
        flip_bit(path, position)
        with pytest.raises(IntegrityError, match="of another manifest"):
            signed.check()
        flip_bit(path, position)
    assert len(signed.check()) == 1


def test_a_manifest_rewritten_for_changed_files_is_refused(signed: SignedState) -> None:
    (signed.warm / CODE).write_bytes(b"other code!!")
    rewrite(signed.warm, rescan=True)
    state = State.open(signed.warm)
    state.check_files()  # the state is consistent in itself
    with pytest.raises(IntegrityError, match="of another manifest") as caught:
        signed.check()
    assert signed.manifest.set_digest in caught.value.message
    assert state.manifest.set_digest in caught.value.message


def test_changed_requirements_are_refused_although_the_set_digest_is_the_same(signed: SignedState) -> None:
    rewrite(signed.warm, lambda raw: raw["families"][0]["requires"].update(arch="another"))
    assert State.read(signed.warm).manifest.set_digest == signed.manifest.set_digest
    with pytest.raises(IntegrityError, match="of another manifest"):
        signed.check()


def test_the_signature_of_another_state_is_refused_with_both_set_digests(signed: SignedState, tmp_path: Path) -> None:
    other = make_state(tmp_path / "other", {"numba": {"librosa/filters.nbc": b"another code"}})
    manifest = State.read(tmp_path / "other").manifest_bytes
    with pytest.raises(IntegrityError, match="is of another manifest than") as caught:
        verify_signature(signed.signature, read_public_key(signed.public), tmp_path / "other", manifest)
    assert signed.manifest.set_digest in caught.value.message
    assert other.set_digest in caught.value.message
    assert caught.value.exit_code == 12


def test_check_same_state_needs_no_key(signed: SignedState, tmp_path: Path) -> None:
    def check(warm: Path) -> None:
        check_same_state(signed.signature, warm, (warm / "manifest.json").read_bytes())

    check(signed.warm)
    make_state(tmp_path / "other", {"numba": {"librosa/filters.nbc": b"another code"}})
    with pytest.raises(IntegrityError, match="is of another manifest than") as caught:
        check(tmp_path / "other")
    assert "chatterbox-prewarm sign" in caught.value.next_step
    rewrite(signed.warm, lambda raw: raw.update(created="2030-01-01T00:00:00+00:00"))
    with pytest.raises(IntegrityError, match="is of another manifest than"):
        check(signed.warm)
    signed.signature.write_text("{}")
    with pytest.raises(IntegrityError, match="is not the signature of a warm state"):
        check(signed.warm)


# ---- the bundle and its key


def change_bundle(signed: SignedState, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the fields of the signature file."""
    bundle = json.loads(signed.signature.read_bytes())
    change(bundle)
    signed.signature.write_text(json.dumps(bundle))


def test_a_missing_signature_says_how_to_sign(signed: SignedState) -> None:
    signed.signature.unlink()
    with pytest.raises(IntegrityError, match=r"there is no signature .*warm\.sig") as caught:
        signed.check()
    assert "chatterbox-prewarm sign" in caught.value.next_step


def test_a_signature_of_another_key_names_both_keys(signed: SignedState) -> None:
    _, other = make_keys(signed.folder, "other-")
    with pytest.raises(IntegrityError, match="it names the key") as caught:
        signed.check(key=other)
    hints = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (signed.public, other)}
    assert all(hint in caught.value.message for hint in hints)


def test_a_signature_of_another_key_with_a_forged_hint_is_refused(signed: SignedState) -> None:
    other, _ = make_keys(signed.folder, "other-")
    material = json.loads(signed.signature.read_bytes())["verificationMaterial"]
    sign(State.open(signed.warm), other)
    change_bundle(signed, lambda bundle: bundle.update(verificationMaterial=material))
    with pytest.raises(IntegrityError, match="it is of this key, but the signature or its content was changed"):
        signed.check()


def test_a_flipped_bit_anywhere_in_the_signed_content_is_noticed(signed: SignedState) -> None:
    envelope = json.loads(signed.signature.read_bytes())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    for position in range(0, len(payload), 7):
        changed = payload[:position] + bytes([payload[position] ^ 1]) + payload[position + 1 :]
        envelope["payload"] = base64.b64encode(changed).decode()
        change_bundle(signed, lambda bundle: bundle.update(dsseEnvelope=envelope))
        with pytest.raises(IntegrityError, match="is not valid"):
            signed.check()


def with_statement(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that replaces fields of a statement."""
    return lambda statement: {**statement, **fields}


def with_predicate(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that replaces fields of a statement's predicate."""
    return lambda statement: {**statement, "predicate": {**statement["predicate"], **fields}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_statement(predicateType="https://cyclonedx.org/bom"), "of the type 'https://cyclonedx.org/bom'"),
        (with_statement(predicate=None), "does not sign a warm state"),
        (with_predicate(serialization={"method": "shards"}), "files were signed in pieces"),
        (with_predicate(resources=[{"name": "manifest.json", "algorithm": "blake3", "digest": "0"}]), "another digest"),
        (with_predicate(resources=[{"name": ["x"], "algorithm": "sha256", "digest": "0"}]), "does not sign a warm"),
        (with_predicate(resources=[]), "it signs one with sha256 none"),
        (lambda _: ["a list"], "does not sign a warm state"),
    ],
)
def test_another_statement_of_the_same_key_is_not_accepted(
    signed: SignedState, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    envelope = json.loads(signed.signature.read_bytes())["dsseEnvelope"]
    payload = json.dumps(change(json.loads(base64.b64decode(envelope["payload"])))).encode()
    key = load_pem_private_key(signed.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    kind = b"application/vnd.in-toto+json"
    signature = key.sign(b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload), ec.ECDSA(hashes.SHA256()))
    envelope |= {
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    change_bundle(signed, lambda bundle: bundle.update(dsseEnvelope=envelope))
    with pytest.raises(IntegrityError) as caught:
        signed.check()
    assert message in caught.value.message


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b'{"dsseEnvelope": {}}', b"[" * 100_000, b'{"dsseEnvelope": 1}'],
)
def test_a_file_that_is_not_a_bundle_is_refused(signed: SignedState, content: bytes) -> None:
    signed.signature.write_bytes(content)
    with pytest.raises(IntegrityError, match="is not the signature of a warm state"):
        signed.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"),
        lambda bundle: bundle["dsseEnvelope"].update(payload="not base64!"),
        lambda bundle: bundle["dsseEnvelope"].update(signatures=[]),
        lambda bundle: bundle["dsseEnvelope"]["signatures"].append(bundle["dsseEnvelope"]["signatures"][0]),
        lambda bundle: bundle.update(verificationMaterial={"certificate": {}}),
    ],
)
def test_a_bundle_of_another_kind_is_refused(signed: SignedState, change: Callable[[dict[str, Any]], object]) -> None:
    change_bundle(signed, change)
    with pytest.raises(IntegrityError, match="is not the signature of a warm state"):
        signed.check()


# ---- trust


def test_an_empty_trust_checks_nothing(signed: SignedState) -> None:
    signed.signature.unlink()
    assert signed.check(key=None) == ()
    assert State.open(signed.warm, Trust()).trusted_by == ()


def test_a_signature_without_a_key_is_refused(signed: SignedState) -> None:
    with pytest.raises(BadInputError, match="proves nothing without a public key") as caught:
        signed.check(key=None, signature=signed.signature)
    assert "--key" in caught.value.next_step
    with pytest.raises(BadInputError, match="proves nothing without a public key"):
        State.open(signed.warm, Trust(signature=signed.signature))


def test_the_expected_digest_is_the_digest_of_the_manifest_file(signed: SignedState) -> None:
    assert signed.digest == f"sha256:{hashlib.sha256((signed.warm / 'manifest.json').read_bytes()).hexdigest()}"
    assert signed.digest in signed.check(key=None, expected_digest=signed.digest)[0]
    assert len(signed.check(expected_digest=signed.digest)) == 2
    with pytest.raises(IntegrityError, match=f"has {signed.digest}, expected was sha256:{'0' * 64}"):
        signed.check(expected_digest=f"sha256:{'0' * 64}")
    rewrite(signed.warm, lambda raw: raw["reference"].update(seed=8))
    with pytest.raises(IntegrityError, match="expected was"):
        signed.check(key=None, expected_digest=f"sha256:{signed.manifest.set_digest}")
    (signed.warm / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"has no manifest\.json"):
        State.open(signed.warm, Trust(expected_digest=f"sha256:{'0' * 64}"))


@pytest.mark.parametrize("digest", ["", "0" * 64, "sha256:", "sha256:" + "g" * 64, "SHA256:" + "0" * 64])
def test_an_invalid_expected_digest_is_bad_input(signed: SignedState, digest: str) -> None:
    with pytest.raises(BadInputError, match="is not a digest"):
        signed.check(key=None, expected_digest=digest)


# ---- a start


@pytest.mark.parametrize("policy", ["require", "fallback"])
def test_a_start_uses_a_state_with_the_right_signature_and_digest(signed: SignedState, policy: str) -> None:
    report = signed.prepare(policy, key=signed.public, expected_digest=signed.digest)
    assert sorted(report["usable"]) == ["numba", "signal"]
    assert report["heavy"] == ["cryptography"]  # and no package of model-signing


def test_a_start_without_a_key_imports_no_package_for_signatures(signed: SignedState) -> None:
    report = signed.prepare("require", expected_digest=signed.digest)
    assert sorted(report["usable"]) == ["numba", "signal"]
    assert report["heavy"] == []


def remove_signature(signed: SignedState) -> None:
    signed.signature.unlink()


def replace_code(signed: SignedState) -> None:
    (signed.warm / CODE).write_bytes(b"other code!!")
    rewrite(signed.warm, rescan=True)


@pytest.mark.parametrize(
    ("damage", "message"), [(remove_signature, "no signature"), (replace_code, "of another manifest")]
)
def test_an_untrusted_state_is_not_used_and_only_its_manifest_is_opened(
    signed: SignedState, damage: Callable[[SignedState], None], message: str
) -> None:
    damage(signed)
    report = signed.prepare("fallback", key=signed.public)
    assert (report["usable"], report["has_manifest"]) == ([], False)
    assert {name: count for name, count in report["metrics"]["misses"].items() if name != "bytecode"} == {"all": 1}
    (reason,) = [reason for reason in report["metrics"]["reasons"] if reason.startswith("all: ")]
    assert message in reason
    assert report["opened"] == ["manifest.json"]
    with pytest.raises(IntegrityError, match=message):
        signed.prepare("require", key=signed.public)


def test_a_state_with_another_digest_than_expected_is_not_used(signed: SignedState) -> None:
    expected = f"sha256:{'0' * 64}"
    report = signed.prepare("fallback", expected_digest=expected)
    assert (report["usable"], report["opened"]) == ([], ["manifest.json"])
    with pytest.raises(IntegrityError, match=expected):
        signed.prepare("require", expected_digest=expected)


@pytest.mark.parametrize("policy", ["require", "fallback"])
def test_a_missing_key_file_ends_a_start_unless_the_policy_is_off(signed: SignedState, policy: str) -> None:
    with pytest.raises(BadInputError, match="reading the key"):
        signed.prepare(policy, key=signed.folder / "missing.pem")
    assert signed.prepare("off", key=signed.folder / "missing.pem")["usable"] == []


# ---- the command line


def test_verify_says_why_a_state_is_trusted(signed: SignedState) -> None:
    arguments = ("verify", "--warm", signed.warm, "--weights", signed.folder)
    plain = run_cli(*arguments)
    assert plain.returncode == 0, plain.stderr
    assert "signed" not in plain.stdout
    trusted = run_cli(*arguments, "--key", signed.public, "--expect-digest", signed.digest)
    assert trusted.returncode == 0, trusted.stderr
    assert trusted.stdout.splitlines()[:2] == list(signed.check(expected_digest=signed.digest))
    shown = run_cli("inspect", "--warm", signed.warm)
    assert signed.digest in shown.stdout
    remove_signature(signed)
    refused = run_cli(*arguments, "--key", signed.public)
    assert refused.returncode == 12
    assert "there is no signature" in refused.stderr


def test_serve_under_require_refuses_an_unsigned_or_damaged_state(signed: SignedState) -> None:
    record_weights(signed.folder / "weights")
    moved = signed.signature.rename(signed.folder / "moved.json")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    paths = [f"--{name}={signed.folder / name}" for name in ("warm", "weights", "cache")]
    refused = run_cli("serve", *paths, "--policy=require", f"--port={port}", f"--key={signed.public}", timeout=60)
    assert refused.returncode == 12, refused.stderr
    assert "there is no signature" in refused.stderr
    flip_bit(signed.warm / CODE)  # only the files of a trusted state are read, so this error shows that it is trusted
    options = [f"--key={signed.public}", f"--signature={moved}", f"--expect-digest={signed.digest}"]
    refused = run_cli("serve", *paths, "--policy=require", f"--port={port}", *options, timeout=60)
    assert refused.returncode == 12, refused.stderr
    assert "the family numba" in refused.stderr


@pytest.mark.timeout(20)
def test_a_signature_may_be_a_link_but_not_a_pipe(signed: SignedState) -> None:
    link, pipe = signed.folder / "link.sig", signed.folder / "pipe.sig"
    link.symlink_to(signed.folder / "warm.sig")  # as Kubernetes mounts a ConfigMap
    assert signed.check(key=signed.public, signature=link)
    os.mkfifo(pipe)
    with pytest.raises(IntegrityError, match="cannot be read: it is a pipe and not a regular file"):
        signed.check(key=signed.public, signature=pipe)


@pytest.mark.parametrize(
    "trust", [Trust(expected_digest="sha256:" + "0" * 64), Trust(key=Path("k"), signature=Path("s"))]
)
def test_options_for_one_state_are_refused_for_several_models(trust: Trust) -> None:
    check_trust_for_models(trust, ["english"])
    check_trust_for_models(Trust(key=Path("k")), ["english", "multilingual"])
    with pytest.raises(BadInputError, match="are for one state, and there are 2 models: english, multilingual"):
        check_trust_for_models(trust, ["english", "multilingual"])
