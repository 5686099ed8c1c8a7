"""Test which key files can sign and verify, and that errors explain why others cannot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.keys import read_private_key, read_public_key
from tests.helpers.keys import make_keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: Keys of kinds that a Sigstore bundle cannot be signed with.
UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "rsa": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
}


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    plain, _ = make_keys(tmp_path)
    key = load_pem_private_key(plain.read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption("größe".encode()))
    )
    for passphrase, message in ((None, "encrypted"), ("wrong", "with this passphrase")):
        with pytest.raises(BadInputError, match=message) as caught:
            read_private_key(encrypted, passphrase)
        assert "CHATTERBOX_PREWARM_PASSPHRASE" in caught.value.next_step
    with pytest.raises(BadInputError, match="not encrypted"):
        read_private_key(plain, "not needed")
    assert read_private_key(encrypted, "größe").private_numbers() == read_private_key(plain, None).private_numbers()


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED))
def test_a_key_of_an_unsupported_kind_neither_signs_nor_verifies(tmp_path: Path, kind: str) -> None:
    key = UNSUPPORTED[kind]()
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for read in (lambda: read_private_key(private, None), lambda: read_public_key(public)):
        with pytest.raises(BadInputError, match=r"curve.* secp256r1") as caught:
            read()
        assert "openssl" in caught.value.next_step


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_without_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "invalid.pem").write_bytes(content)
    with pytest.raises(BadInputError, match="private key"):
        read_private_key(tmp_path / "invalid.pem", None)
    with pytest.raises(BadInputError, match="public key"):
        read_public_key(tmp_path / "invalid.pem")


def test_a_public_key_does_not_sign_and_a_private_key_does_not_verify(tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    with pytest.raises(BadInputError, match="is a public key"):
        read_private_key(public, None)
    with pytest.raises(BadInputError, match="is a private key"):
        read_public_key(private)


def test_a_key_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pem", tmp_path):
        with pytest.raises(BadInputError, match="reading the key"):
            read_private_key(path, None)
        with pytest.raises(BadInputError, match="reading the key"):
            read_public_key(path)


@pytest.mark.timeout(20)
def test_a_key_may_be_a_link_but_not_a_pipe(tmp_path: Path) -> None:
    _, public = make_keys(tmp_path)
    link, pipe = tmp_path / "link.pem", tmp_path / "pipe.pem"
    link.symlink_to(public)  # as Kubernetes mounts a secret
    assert read_public_key(link) == read_public_key(public)
    os.mkfifo(pipe)
    for read in (read_public_key, lambda path: read_private_key(path, None)):
        with pytest.raises(BadInputError, match="reading the key: it is a pipe and not a regular file"):
            read(pipe)
