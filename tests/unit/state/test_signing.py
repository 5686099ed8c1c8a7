"""Signatures of a warm state: made, verified, and refused with the reason, by a start and by `verify`."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from chatterbox_prewarm.errors import BadInputError, IntegrityError, as_prewarm_error
from chatterbox_prewarm.state.manifest import check_layout, read_manifest
from chatterbox_prewarm.state.signing import check_signed, check_trust, default_signature, sign, verify_signature
from chatterbox_prewarm.state.verify import verify
from tests.conftest import run_cli
from tests.helpers.children import call
from tests.helpers.keys import make_keys
from tests.helpers.states import make_state, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = {"numba": {"librosa/filters.nbc": b"machine code"}, "signal": {"constants.safetensors": b"constants"}}


class Signed:
    """A signed state and what belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.warm = folder, folder / "warm"
        self.manifest = make_state(self.warm, FILES)
        self.private, self.public = make_keys(folder)
        self.signature = sign(self.warm, self.private)

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256((self.warm / 'manifest.json').read_bytes()).hexdigest()}"

    def check(self, **given: Any) -> tuple[str, ...]:
        return check_trust(self.warm, **{"key": self.public, **given})

    def prepare(self, policy: str, **given: Any) -> dict[str, Any]:
        record_weights(self.folder / "weights")
        places: dict[str, Any] = {name: str(self.folder / name) for name in ("warm", "weights", "cache")}
        strings: dict[str, Any] = {name: str(value) for name, value in given.items()}
        return call("prepare", policy=policy, **places, **strings)


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return Signed(tmp_path)


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def test_a_signature_lies_beside_the_state_and_verifies(signed: Signed) -> None:
    assert signed.signature == signed.folder / "warm.sig" == default_signature(signed.warm / ".")
    assert signed.signature.read_bytes().startswith(b'{"mediaType":"application/vnd.dev.sigstore.bundle')
    (sentence,) = signed.check()
    assert str(signed.public) in sentence
    assert {path.name for path in signed.folder.iterdir()} == {"warm", "warm.sig", "private.pem", "public.pem"}
    check_layout(signed.manifest, signed.warm)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_of_a_bundle_signs_and_verifies(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    make_state(tmp_path / "warm", FILES)
    private, public = make_keys(tmp_path, curve=curve)
    verify_signature(tmp_path / "warm", sign(tmp_path / "warm", private, tmp_path / "elsewhere.json"), public)


def test_signing_uses_no_network_and_writes_nothing_into_the_state(tmp_path: Path) -> None:
    make_state(tmp_path / "warm", FILES)
    private, _ = make_keys(tmp_path)
    seen = call("sign", warm=str(tmp_path / "warm"), key=str(private))
    assert seen == {"signature": str(tmp_path / "warm.sig"), "network": [], "programs": [], "writes": []}


def test_model_signing_verifies_what_is_signed_here_wherever_the_state_lies(signed: Signed) -> None:
    from model_signing import verifying

    moved = signed.folder / "moved"
    shutil.move(signed.warm, moved)
    config = verifying.Config().use_elliptic_key_verifier(public_key=signed.public)
    config.verify(moved, signed.signature)
    flip(moved / "numba" / "librosa" / "filters.nbc")
    with pytest.raises(ValueError, match="Signature mismatch"):
        config.verify(moved, signed.signature)


def test_what_model_signing_signs_is_verified_here(signed: Signed) -> None:
    from model_signing import signing

    config = signing.Config().use_elliptic_key_signer(private_key=signed.private)
    config.sign(signed.warm, signed.folder / "other.sig")
    assert signed.check(signature=signed.folder / "other.sig")


def test_a_flipped_byte_in_any_file_of_a_signed_state_is_seen(signed: Signed) -> None:
    for entry in signed.manifest.files:
        flip(signed.warm / entry.path)
        with pytest.raises(IntegrityError, match=entry.path):
            verify(signed.warm, signed.folder, signed.folder, key=signed.public)
        flip(signed.warm / entry.path)
    assert "numba: 1 file(s) intact, fits this machine" in verify(
        signed.warm, signed.folder, signed.folder, key=signed.public
    )


def test_a_flipped_byte_anywhere_in_the_manifest_is_seen(signed: Signed) -> None:
    path = signed.warm / "manifest.json"
    for place in range(len(path.read_bytes())):
        flip(path, place)
        with pytest.raises(IntegrityError, match="of another manifest"):
            signed.check()
        flip(path, place)
    signed.check()


def test_a_manifest_that_was_rewritten_to_fit_changed_files_is_not_the_signed_one(signed: Signed) -> None:
    (signed.warm / "numba" / "librosa" / "filters.nbc").write_bytes(b"other code!!")
    rewrite(signed.warm, rescan=True)
    check_layout(read_manifest(signed.warm), signed.warm)  # consistent in itself
    with pytest.raises(IntegrityError, match="of another manifest") as caught:
        signed.check()
    assert signed.manifest.set_digest in caught.value.message
    assert read_manifest(signed.warm).set_digest in caught.value.message


def test_a_change_of_what_families_require_alone_is_seen_though_the_set_digest_stays(signed: Signed) -> None:
    rewrite(signed.warm, lambda raw: raw["families"][0]["requires"].update(arch="another"))
    with pytest.raises(IntegrityError, match="of another manifest"):
        signed.check()


def test_the_signature_of_another_state_names_both_set_digests(signed: Signed, tmp_path: Path) -> None:
    other = make_state(tmp_path / "other", {"numba": {"librosa/filters.nbc": b"another code"}})
    with pytest.raises(IntegrityError, match="is of another manifest than") as caught:
        verify_signature(tmp_path / "other", signed.signature, signed.public)
    assert signed.manifest.set_digest in caught.value.message
    assert other.set_digest in caught.value.message
    assert caught.value.exit_code == 12


def test_whose_state_a_signature_is_of_needs_no_key(signed: Signed, tmp_path: Path) -> None:
    check_signed(signed.warm, signed.signature)
    make_state(tmp_path / "other", {"numba": {"librosa/filters.nbc": b"another code"}})
    with pytest.raises(IntegrityError, match="is of another manifest than") as caught:
        check_signed(tmp_path / "other", signed.signature)
    assert "chatterbox-prewarm sign" in caught.value.next_step
    rewrite(signed.warm, lambda raw: raw.update(created="2030-01-01T00:00:00+00:00"))
    with pytest.raises(IntegrityError, match="is of another manifest than"):
        check_signed(signed.warm, signed.signature)
    signed.signature.write_text("{}")
    with pytest.raises(IntegrityError, match="is no signature of a warm state"):
        check_signed(signed.warm, signed.signature)


def test_a_missing_signature_says_how_to_sign(signed: Signed) -> None:
    signed.signature.unlink()
    with pytest.raises(IntegrityError, match=r"there is no signature .*warm\.sig") as caught:
        signed.check()
    assert "chatterbox-prewarm sign" in caught.value.next_step


def test_a_signature_of_another_key_names_both_keys(signed: Signed) -> None:
    _, stranger = make_keys(signed.folder, "stranger-")
    with pytest.raises(IntegrityError, match="made with the key") as caught:
        signed.check(key=stranger)
    hints = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (signed.public, stranger)}
    assert all(hint in caught.value.message for hint in hints)


def change_bundle(signed: Signed, change: Callable[[dict[str, Any]], object]) -> None:
    bundle = json.loads(signed.signature.read_bytes())
    change(bundle)
    signed.signature.write_text(json.dumps(bundle))


def test_a_signature_of_another_key_that_claims_to_be_ours_is_refused(signed: Signed) -> None:
    stranger, _ = make_keys(signed.folder, "stranger-")
    ours = json.loads(signed.signature.read_bytes())["verificationMaterial"]
    sign(signed.warm, stranger)
    change_bundle(signed, lambda bundle: bundle.update(verificationMaterial=ours))
    with pytest.raises(IntegrityError, match="it is of this key, but it or what it signs was changed"):
        signed.check()


def test_a_flipped_byte_anywhere_in_what_is_signed_is_seen(signed: Signed) -> None:
    envelope = json.loads(signed.signature.read_bytes())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    for place in range(0, len(payload), 7):
        changed = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
        envelope["payload"] = base64.b64encode(changed).decode()
        change_bundle(signed, lambda bundle: bundle.update(dsseEnvelope=envelope))
        with pytest.raises(IntegrityError, match="is not valid"):
            signed.check()


def statement(**change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {**found, **change}


def predicate(**change: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {**found, "predicate": {**found["predicate"], **change}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (statement(predicateType="https://cyclonedx.org/bom"), "a statement of the type 'https://cyclonedx.org/bom'"),
        (statement(predicate=None), "does not sign a warm state"),
        (predicate(serialization={"method": "shards"}), "files were signed in pieces"),
        (predicate(resources=[{"name": "manifest.json", "algorithm": "blake3", "digest": "0"}]), "another digest"),
        (predicate(resources=[{"name": ["x"], "algorithm": "sha256", "digest": "0"}]), "does not sign a warm state"),
        (predicate(resources=[]), "signed was one with sha256 none"),
        (lambda _: ["no statement"], "does not sign a warm state"),
    ],
)
def test_what_else_the_key_has_signed_is_no_signature_of_the_state(
    signed: Signed, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    envelope = json.loads(signed.signature.read_bytes())["dsseEnvelope"]
    payload = json.dumps(change(json.loads(base64.b64decode(envelope["payload"])))).encode()
    key = load_pem_private_key(signed.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    kind = b"application/vnd.in-toto+json"
    raw = key.sign(b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload), ec.ECDSA(hashes.SHA256()))
    envelope |= {
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(raw).decode(), "keyid": ""}],
    }
    change_bundle(signed, lambda bundle: bundle.update(dsseEnvelope=envelope))
    with pytest.raises(IntegrityError) as caught:
        signed.check()
    assert says in caught.value.message


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b'{"dsseEnvelope": {}}', b"[" * 100_000, b'{"dsseEnvelope": 1}'],
)
def test_what_is_no_bundle_is_refused(signed: Signed, content: bytes) -> None:
    signed.signature.write_bytes(content)
    with pytest.raises(IntegrityError, match="is no signature of a warm state"):
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
def test_a_bundle_of_another_kind_is_refused(signed: Signed, change: Callable[[dict[str, Any]], object]) -> None:
    change_bundle(signed, change)
    with pytest.raises(IntegrityError, match="is no signature of a warm state"):
        signed.check()


def test_a_broken_state_is_not_signed_and_an_older_signature_stays(signed: Signed) -> None:
    before = signed.signature.read_bytes()
    flip(signed.warm / "numba" / "librosa" / "filters.nbc")
    with pytest.raises(IntegrityError, match="not as its manifest says"):
        sign(signed.warm, signed.private)
    assert signed.signature.read_bytes() == before


def test_a_signature_goes_neither_into_the_state_nor_over_the_key(signed: Signed) -> None:
    with pytest.raises(BadInputError, match="lies in the warm state"):
        sign(signed.warm, signed.private, signed.warm / "numba" / "signature.json")
    with pytest.raises(BadInputError, match="would replace the key"):
        sign(signed.warm, signed.private, signed.private)
    with pytest.raises(BadInputError, match="writing the signature"):
        sign(signed.warm, signed.private, signed.private / "below")
    assert signed.check()


def test_a_state_that_is_reached_by_a_link_is_signed(signed: Signed) -> None:
    (signed.folder / "link").symlink_to(signed.warm)
    signature = sign(signed.folder / "link", signed.private)
    assert signature == signed.folder / "link.sig"
    verify_signature(signed.warm, signature, signed.public)


def test_an_encrypted_key_needs_its_passphrase(signed: Signed) -> None:
    key = load_pem_private_key(signed.private.read_bytes(), None)
    closed = signed.folder / "closed.pem"
    closed.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption("größe".encode())))
    for passphrase, says in ((None, "encrypted"), ("wrong", "with this passphrase")):
        with pytest.raises(BadInputError, match=says) as caught:
            sign(signed.warm, closed, passphrase=passphrase)
        assert "CHATTERBOX_PREWARM_PASSPHRASE" in caught.value.next_step
    with pytest.raises(BadInputError, match="not encrypted"):
        sign(signed.warm, signed.private, passphrase="without need")
    sign(signed.warm, closed, passphrase="größe")
    assert signed.check()


def pem(key: Any) -> bytes:
    private: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private


def public_pem(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return public


OTHERS = {
    "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
    "secp256k1": ec.generate_private_key(ec.SECP256K1()),
}


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_a_key_of_another_kind_is_refused_by_both_sides(signed: Signed, kind: str) -> None:
    signed.private.write_bytes(pem(OTHERS[kind]))
    signed.public.write_bytes(public_pem(OTHERS[kind]))
    for use in (lambda: sign(signed.warm, signed.private), signed.check):
        with pytest.raises(BadInputError, match="is not of a curve among secp256r1") as caught:
            use()
        assert "openssl" in caught.value.next_step


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_key_is_refused_by_both_sides(signed: Signed, content: bytes) -> None:
    (signed.folder / "none.pem").write_bytes(content)
    with pytest.raises(BadInputError, match="holds no private key"):
        sign(signed.warm, signed.folder / "none.pem")
    with pytest.raises(BadInputError, match="holds no public key"):
        signed.check(key=signed.folder / "none.pem")


def test_a_key_of_the_wrong_half_or_none_at_all_is_refused(signed: Signed) -> None:
    with pytest.raises(BadInputError, match="is a public key, and a private one signs"):
        sign(signed.warm, signed.public)
    with pytest.raises(BadInputError, match="is a private key; it belongs to who signs"):
        signed.check(key=signed.private)
    for place in (signed.folder / "missing.pem", signed.folder):
        with pytest.raises(BadInputError, match="reading the key"):
            signed.check(key=place)


def test_nothing_given_is_nothing_checked_and_a_signature_alone_is_bad_input(signed: Signed) -> None:
    signed.signature.unlink()
    assert signed.check(key=None) == ()
    with pytest.raises(BadInputError, match="says nothing without the key"):
        signed.check(key=None, signature=signed.signature)


def test_the_expected_digest_is_that_of_the_manifest_file(signed: Signed) -> None:
    assert signed.digest in signed.check(key=None, expected_digest=signed.digest)[0]
    assert len(signed.check(expected_digest=signed.digest)) == 2
    with pytest.raises(IntegrityError, match=f"has {signed.digest}, expected was sha256:{'0' * 64}"):
        signed.check(expected_digest=f"sha256:{'0' * 64}")
    rewrite(signed.warm, lambda raw: raw["reference"].update(seed=8))
    with pytest.raises(IntegrityError, match="expected was"):
        signed.check(key=None, expected_digest=f"sha256:{signed.manifest.set_digest}")
    (signed.warm / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="holds no manifest"):
        signed.check(key=None, expected_digest=f"sha256:{'0' * 64}")


@pytest.mark.parametrize("digest", ["", "0" * 64, "sha256:", "sha256:" + "g" * 64, "SHA256:" + "0" * 64])
def test_a_digest_that_is_none_is_bad_input(signed: Signed, digest: str) -> None:
    with pytest.raises(BadInputError, match="the expected digest"):
        signed.check(key=None, expected_digest=digest)


@pytest.mark.parametrize("policy", ["require", "fallback"])
def test_a_start_uses_a_state_that_is_signed_and_expected(signed: Signed, policy: str) -> None:
    seen = signed.prepare(policy, key=signed.public, expected_digest=signed.digest)
    assert sorted(seen["usable"]) == ["numba", "signal"]
    assert seen["heavy"] == ["cryptography"]  # nothing of model-signing's


def test_a_start_without_a_key_imports_nothing_that_verifies(signed: Signed) -> None:
    seen = signed.prepare("require", expected_digest=signed.digest)
    assert sorted(seen["usable"]) == ["numba", "signal"]
    assert seen["heavy"] == []


def unsigned(signed: Signed) -> None:
    signed.signature.unlink()


def tampered(signed: Signed) -> None:
    (signed.warm / "numba" / "librosa" / "filters.nbc").write_bytes(b"other code!!")
    rewrite(signed.warm, rescan=True)


@pytest.mark.parametrize(("damage", "says"), [(unsigned, "no signature"), (tampered, "of another manifest")])
def test_an_untrusted_state_is_not_used_at_all_and_nothing_but_its_manifest_is_opened(
    signed: Signed, damage: Callable[[Signed], None], says: str
) -> None:
    damage(signed)
    seen = signed.prepare("fallback", key=signed.public)
    assert (seen["usable"], seen["has_manifest"]) == ([], False)
    assert {name: count for name, count in seen["metrics"]["misses"].items() if name != "bytecode"} == {"all": 1}
    (reason,) = [reason for reason in seen["metrics"]["reasons"] if reason.startswith("all: ")]
    assert says in reason
    assert set(seen["opened"]) <= {"manifest.json"}
    with pytest.raises(IntegrityError, match=says):
        signed.prepare("require", key=signed.public)


def test_an_unexpected_state_is_not_used(signed: Signed) -> None:
    expected = f"sha256:{'0' * 64}"
    seen = signed.prepare("fallback", expected_digest=expected)
    assert (seen["usable"], set(seen["opened"])) == ([], {"manifest.json"})
    with pytest.raises(IntegrityError, match=expected):
        signed.prepare("require", expected_digest=expected)


@pytest.mark.parametrize("policy", ["require", "fallback"])
def test_a_key_that_is_none_ends_a_start_under_every_policy_that_reads_a_state(signed: Signed, policy: str) -> None:
    with pytest.raises(BadInputError, match="reading the key"):
        signed.prepare(policy, key=signed.folder / "missing.pem")
    assert signed.prepare("off", key=signed.folder / "missing.pem")["usable"] == []


def test_verify_says_by_what_a_state_is_trusted(signed: Signed) -> None:
    arguments = ("verify", "--warm", signed.warm, "--weights", signed.folder)
    plain = run_cli(*arguments)
    assert plain.returncode == 0, plain.stderr
    assert "signed" not in plain.stdout
    trusted = run_cli(*arguments, "--key", signed.public, "--expect-digest", signed.digest)
    assert trusted.returncode == 0, trusted.stderr
    assert trusted.stdout.splitlines()[:2] == list(signed.check(expected_digest=signed.digest))
    shown = run_cli("inspect", "--warm", signed.warm)
    assert signed.digest in shown.stdout
    unsigned(signed)
    refused = run_cli(*arguments, "--key", signed.public)
    assert refused.returncode == 12
    assert "there is no signature" in refused.stderr


def test_serve_does_not_start_from_an_unsigned_state_under_require(signed: Signed) -> None:
    record_weights(signed.folder / "weights")
    moved = signed.signature.rename(signed.folder / "moved.json")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = [f"--{name}={signed.folder / name}" for name in ("warm", "weights", "cache")]
    refused = run_cli("serve", *places, "--policy=require", f"--port={port}", f"--key={signed.public}", timeout=60)
    assert refused.returncode == 12, refused.stderr
    assert "there is no signature" in refused.stderr
    flip(signed.warm / "numba" / "librosa" / "filters.nbc")  # what only a trusted state is read for
    options = [f"--key={signed.public}", f"--signature={moved}", f"--expect-digest={signed.digest}"]
    refused = run_cli("serve", *places, "--policy=require", f"--port={port}", *options, timeout=60)
    assert refused.returncode == 12, refused.stderr
    assert "the family numba" in refused.stderr


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    for name, extra in (("model_signing", "trust"), ("cyclonedx.model", "trust"), ("torch", "model")):
        assert f"[{extra}]" in as_prewarm_error(ModuleNotFoundError("none", name=name)).next_step
