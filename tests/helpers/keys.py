"""Generate key pairs for tests of signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

if TYPE_CHECKING:
    from pathlib import Path


def make_keys(folder: Path, name: str = "", curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """Write a new key pair in the formats of openssl, and return the paths of the private and the public key."""
    private = ec.generate_private_key(curve or ec.SECP256R1())
    paths = folder / f"{name}private.pem", folder / f"{name}public.pem"
    paths[0].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    paths[1].write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return paths
