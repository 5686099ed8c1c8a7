"""Read the elliptic curve keys that sign and verify warm states, from PEM files as openssl writes them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

#: The curves that Sigstore bundles allow, with the hash function of each.
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
#: The environment variable for the passphrase of a key. An option would show up in the list of processes.
PASSPHRASE = "CHATTERBOX_PREWARM_PASSPHRASE"  # noqa: S105 - the name of a variable

_PASSPHRASE = f"set {PASSPHRASE} to the key's passphrase if it is encrypted, and unset it if not"
_MAKE_KEY = "make a key with `openssl ecparam -name prime256v1 -genkey -noout -out private.pem`"
_MAKE_PUBLIC = "write the public one with `openssl ec -in private.pem -pubout -out public.pem`"


def read_private_key(path: Path, passphrase: str | None) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        BadInputError: the file is not a private key, the passphrase is wrong, or the curve is not supported.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    if b"PUBLIC KEY" in data:
        raise BadInputError(f"{path} is a public key, but signing needs a private key", next_step=_MAKE_KEY)
    try:
        key = load_pem_private_key(data, None if passphrase is None else passphrase.encode())
    except TypeError as error:  # an unencrypted key with a passphrase, or an encrypted key without one
        raise BadInputError(f"the key {path}: {error}", next_step=_PASSPHRASE) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInputError(
            f"{path} is not a private key in PEM that can be opened{' with this passphrase' if passphrase else ''}: "
            f"{str(error).partition('.')[0]}",
            next_step=_PASSPHRASE if passphrase else _MAKE_KEY,
        ) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise BadInputError(f"the key {path} does not use one of the curves {', '.join(CURVES)}", next_step=_MAKE_KEY)
    return key


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """Read a public key.

    Raises:
        BadInputError: the file is not a public key, or the curve is not supported.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise BadInputError(f"{path} is a private key; verifying needs only the public key", next_step=_MAKE_PUBLIC)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInputError(
            f"{path} is not a public key in PEM: {str(error).partition('.')[0]}", next_step=_MAKE_PUBLIC
        ) from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise BadInputError(f"the key {path} does not use one of the curves {', '.join(CURVES)}", next_step=_MAKE_KEY)
    return key


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, follow_links=True)
    except OSError as error:
        raise from_os_error(error, "reading the key") from error


def key_hint(key: EllipticCurvePublicKey) -> str:
    """Return the hint with which a bundle names its key: SHA-256 over the PEM of the public key. It is not signed."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
