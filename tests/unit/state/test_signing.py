"""Test that signing a state uses no network, writes one file next to the state, and agrees with model-signing."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from chatterbox_prewarm.errors import BadInputError, IntegrityError, as_prewarm_error
from chatterbox_prewarm.state.keys import read_public_key
from chatterbox_prewarm.state.signature import Trust, default_signature, verify_signature
from chatterbox_prewarm.state.signing import sign
from chatterbox_prewarm.state.state import State
from tests.helpers.children import call
from tests.helpers.keys import make_keys
from tests.helpers.signed_state import CODE, FILES, SignedState, flip_bit
from tests.helpers.states import make_state

if TYPE_CHECKING:
    from pathlib import Path


def test_a_signature_is_written_next_to_the_state_and_verifies(signed: SignedState) -> None:
    assert signed.signature == signed.folder / "warm.sig" == default_signature(signed.warm / ".")
    assert signed.signature.read_bytes().startswith(b'{"mediaType":"application/vnd.dev.sigstore.bundle')
    (sentence,) = signed.check()
    assert str(signed.public) in sentence
    assert {path.name for path in signed.folder.iterdir()} == {"warm", "warm.sig", "private.pem", "public.pem"}
    State.open(signed.warm).check_files()


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_of_a_bundle_signs_and_verifies(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    make_state(tmp_path / "warm", FILES)
    private, public = make_keys(tmp_path, curve=curve)
    signature = sign(State.open(tmp_path / "warm"), private, tmp_path / "elsewhere.json")
    assert signature == tmp_path / "elsewhere.json"
    (sentence,) = Trust(key=public, signature=signature).check(
        tmp_path / "warm", State.read(tmp_path / "warm").manifest_bytes
    )
    assert str(signature) in sentence


def test_signing_uses_no_network_and_writes_nothing_into_the_state(tmp_path: Path) -> None:
    make_state(tmp_path / "warm", FILES)
    private, _ = make_keys(tmp_path)
    report = call("sign", warm=str(tmp_path / "warm"), key=str(private))
    assert report == {"signature": str(tmp_path / "warm.sig"), "network": [], "programs": [], "writes": []}


def test_model_signing_verifies_our_signature_of_a_moved_state(signed: SignedState) -> None:
    from model_signing import verifying

    moved = signed.folder / "moved"
    shutil.move(signed.warm, moved)
    config = verifying.Config().use_elliptic_key_verifier(public_key=signed.public)
    config.verify(moved, signed.signature)
    flip_bit(moved / CODE)
    with pytest.raises(ValueError, match="Signature mismatch"):
        config.verify(moved, signed.signature)


def test_a_signature_of_model_signing_is_accepted(signed: SignedState) -> None:
    from model_signing import signing

    config = signing.Config().use_elliptic_key_signer(private_key=signed.private)
    config.sign(signed.warm, signed.folder / "other.sig")
    (sentence,) = signed.check(signature=signed.folder / "other.sig")
    assert "other.sig" in sentence


def test_a_damaged_state_is_not_signed_and_its_older_signature_stays(signed: SignedState) -> None:
    before = signed.signature.read_bytes()
    flip_bit(signed.warm / CODE)
    with pytest.raises(IntegrityError, match=r"1 file\(s\) of .* differ from the manifest"):
        sign(State.open(signed.warm), signed.private)
    assert signed.signature.read_bytes() == before


def test_a_signature_is_not_written_into_the_state_or_over_the_key(signed: SignedState) -> None:
    state = State.open(signed.warm)
    with pytest.raises(BadInputError, match="is inside the warm state"):
        sign(state, signed.private, signed.warm / "numba" / "signature.json")
    with pytest.raises(BadInputError, match="would replace the key"):
        sign(state, signed.private, signed.private)
    with pytest.raises(BadInputError, match="writing the signature"):
        sign(state, signed.private, signed.private / "below")
    assert len(signed.check()) == 1
    State.open(signed.warm).check_files()


def test_a_state_behind_a_link_is_signed_next_to_the_link(signed: SignedState) -> None:
    (signed.folder / "link").symlink_to(signed.warm)
    signature = sign(State.open(signed.folder / "link"), signed.private)
    assert signature == signed.folder / "link.sig"
    verify_signature(
        signature, read_public_key(signed.public), signed.warm, (signed.warm / "manifest.json").read_bytes()
    )


def test_an_encrypted_key_signs_with_its_passphrase(signed: SignedState) -> None:
    key = load_pem_private_key(signed.private.read_bytes(), None)
    encrypted = signed.folder / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption("größe".encode()))
    )
    state = State.open(signed.warm)
    signed.signature.unlink()
    for passphrase in (None, "wrong"):
        with pytest.raises(BadInputError, match=r"encrypted\.pem"):
            sign(state, encrypted, passphrase=passphrase)
    assert not signed.signature.exists()
    sign(state, encrypted, passphrase="größe")
    assert len(signed.check()) == 1


def test_a_missing_package_names_the_extra_that_installs_it() -> None:
    for name, extra in (("model_signing", "trust"), ("cyclonedx.model", "trust"), ("torch", "model")):
        assert f"[{extra}]" in as_prewarm_error(ModuleNotFoundError("missing", name=name)).next_step
