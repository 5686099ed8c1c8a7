"""Signing: who vouches for a warm state, checked before any file of it but its manifest is opened.

A signature is a Sigstore bundle as model-signing makes it, over the digests of all files of the state and of its
manifest. It lies beside the state, since a state holds nothing that its manifest does not list.

A start opens the bundle itself. It needs the signature over the envelope and one digest, that of the manifest, which
covers every file; model-signing's own verification hashes all files once more, and importing it takes longer than the
whole of `prepare` may (docs/trust.md has the figures). The formats: DSSE v1 for what is signed, in-toto Statement v1
and the predicate `https://model_signing/signature/v1.0` for what it says.
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, IntegrityError, from_os_error
from chatterbox_prewarm.state.keys import CURVES, key_hint, read_private_key, read_public_key
from chatterbox_prewarm.state.manifest import MANIFEST_NAME, check_layout, manifest_digest, read_manifest
from chatterbox_prewarm.system.digests import FileEntry, set_digest, verify_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SIGN = "sign the state with `chatterbox-prewarm sign`, or give the signature's place with --signature"
_STALE = "sign the state as it is now with `chatterbox-prewarm sign`, or remove {}"
_NOT_TRUSTED = "take the state from where it was signed, or sign it if you vouch for it"


def default_signature(warm: Path) -> Path:
    """Where a state's signature lies unless another place is given: beside it, with `.sig` after its name."""
    warm = Path(os.path.abspath(warm))  # noqa: PTH100 - `warm/.` and `warm/..` have no name; links stay what they are
    return warm.with_name(f"{warm.name}.sig")


def check_trust(
    warm: Path, *, key: Path | None = None, signature: Path | None = None, expected_digest: str | None = None
) -> tuple[str, ...]:
    """Check what was given from outside a state against its manifest; with nothing given, nothing is checked.

    Of the state only the manifest is read. Whoever goes on to open a file compares it with the manifest first.

    Args:
        warm: the state's directory.
        key: a public key in PEM; the state must be signed with its private one.
        signature: the signature's place; `default_signature` by default.
        expected_digest: `sha256:` and the SHA-256 of `manifest.json`, as `sha256sum` gives it.

    Returns:
        a sentence for each thing that was checked.

    Raises:
        IntegrityError: the state is not signed, or not with this key, or is another one.
        BadInputError: the key or the digest is none, or there is a signature and no key.
    """
    if key is None and signature is not None:
        raise BadInputError(
            f"the signature {signature} says nothing without the key that it is to be of",
            next_step="give the public key with --key",
        )
    checked = []
    if expected_digest is not None:
        _check_digest(warm, expected_digest)
        checked.append(f"the manifest has the expected digest {expected_digest}")
    if key is not None:
        place = signature or default_signature(warm)
        verify_signature(warm, place, key)
        checked.append(f"the manifest is signed with the key of {key}, signature {place}")
    return tuple(checked)


def sign(warm: Path, key: Path, output: Path | None = None, *, passphrase: str | None = None) -> Path:
    """Sign a warm state whose files are as its manifest says. Uses no network.

    Args:
        warm: the state's directory; not written to.
        key: a private key in PEM, of the curve P-256, P-384 or P-521.
        output: where the signature goes; `default_signature` by default.
        passphrase: of the key, if it is encrypted.

    Returns:
        where the signature is.

    Raises:
        IntegrityError: the state is not as its manifest says; nobody vouches for a broken one.
        BadInputError: the key cannot be used, or `output` cannot be written, or lies within the state.
    """
    output = output or default_signature(warm)
    if output.resolve().is_relative_to(warm.resolve()):
        raise BadInputError(
            f"{output} lies in the warm state, which holds nothing that its manifest does not list",
            next_step=f"name a place beside it, such as {default_signature(warm)}",
        )
    if output.resolve() == key.resolve():
        raise BadInputError(f"the signature would replace the key {key}", next_step="name another place with --output")
    private = read_private_key(key, passphrase)
    manifest = read_manifest(warm)
    check_layout(manifest, warm)
    if problems := verify_files(manifest.files, warm):
        raise IntegrityError(
            f"{warm} is not as its manifest says: {'; '.join(problems)}", next_step="bake the warm state again"
        )
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(
        private_key=key,
        password=passphrase and passphrase.encode(),  # it says str, and hands it on to where bytes belong
    )
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False))
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "writing the signature") from error
    try:
        config.sign(warm.resolve(), temporary)  # it refuses links, that to the state as well
        _verify(warm, temporary, private.public_key())  # what is handed out is what a start accepts
        temporary.replace(output)
    except OSError as error:
        raise from_os_error(error, "writing the signature") from error
    finally:
        temporary.unlink(missing_ok=True)
    return output


def verify_signature(warm: Path, signature: Path, public_key: Path) -> None:
    """Check that a state's manifest is the one that the owner of a key signed. Reads no other file of the state.

    Raises:
        IntegrityError: there is no signature, or it is broken, of another key, or of another state.
        BadInputError: the key cannot be used.
    """
    _verify(warm, signature, read_public_key(public_key))


def check_signed(warm: Path, signature: Path) -> None:
    """Check that a signature says it is of this state, whoever made it: without a key nothing tells whether that is so.

    For whoever hands a state on together with its signature, and would hand on an old one.

    Raises:
        IntegrityError: it is broken, or of another state.
    """
    _compare(warm, signature, _read_bundle(signature).payload, next_step=_STALE.format(signature))


def _verify(warm: Path, signature: Path, key: EllipticCurvePublicKey) -> None:
    _compare(warm, signature, _open(signature, key), next_step=_NOT_TRUSTED)


def _compare(warm: Path, signature: Path, payload: bytes, *, next_step: str) -> None:
    """Whether what was signed is this state's manifest.

    Raises:
        IntegrityError: it is another one.
    """
    signed = _signed_files(payload, signature)
    found = manifest_digest(warm)
    if signed.get(MANIFEST_NAME) == found:
        return
    theirs = set_digest(
        FileEntry(path=path, size=0, sha256=digest) for path, digest in signed.items() if path != MANIFEST_NAME
    )
    raise IntegrityError(
        f"the signature {signature} is of another manifest than {warm / MANIFEST_NAME}: signed was one with sha256 "
        f"{signed.get(MANIFEST_NAME, 'none')} and set digest {theirs}, found is one with sha256 {found} and "
        f"set digest {_set_digest(warm)}",
        next_step=next_step,
    )


def _set_digest(warm: Path) -> str:
    """The set digest that a manifest states, for a message; it may state none."""
    try:
        return read_manifest(warm).set_digest
    except IntegrityError:
        return "unknown, since it cannot be read"


@dataclass(frozen=True, kw_only=True)
class _Bundle:
    """What a bundle holds: the envelope's content, the signature over it, and of which key it says that it is."""

    payload: bytes
    raw: bytes
    hint: str | None


def _read_bundle(signature: Path) -> _Bundle:
    """Read a bundle; nothing of it is verified.

    Raises:
        IntegrityError: there is none, or it is no bundle.
    """
    try:
        bundle = json.loads(signature.read_bytes())
        envelope = bundle["dsseEnvelope"]
        kind, payload = envelope["payloadType"], base64.b64decode(envelope["payload"], validate=True)
        (only,) = envelope["signatures"]
        raw = base64.b64decode(only["sig"], validate=True)
        hint = bundle["verificationMaterial"]["publicKey"].get("hint")
        if kind != _PAYLOAD_TYPE:
            raise ValueError(f"its content is {kind!r}")  # noqa: TRY301 - one way out
        return _Bundle(payload=payload, raw=raw, hint=hint)
    except FileNotFoundError as error:
        raise IntegrityError(f"there is no signature {signature}", next_step=_SIGN) from error
    except OSError as error:
        raise IntegrityError(f"the signature {signature} cannot be read: {error.strerror}", next_step=_SIGN) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{signature} is no signature of a warm state: {error!r}", next_step=_SIGN) from error


def _open(signature: Path, key: EllipticCurvePublicKey) -> bytes:
    """The content of a bundle's envelope, whose signature is of this key.

    Raises:
        IntegrityError: there is none, it is no bundle, or not of this key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    bundle = _read_bundle(signature)
    kind, payload = _PAYLOAD_TYPE.encode(), bundle.payload
    try:
        key.verify(
            bundle.raw,
            b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload),
            ECDSA(getattr(hashes, CURVES[key.curve.name])()),
        )
    except InvalidSignature:
        if bundle.hint == (ours := key_hint(key)):
            why = "it is of this key, but it or what it signs was changed"
        else:
            why = f"it says that it was made with the key {bundle.hint}, and yours is {ours}"
        raise IntegrityError(f"the signature {signature} is not valid: {why}", next_step=_NOT_TRUSTED) from None
    return payload


def _signed_files(payload: bytes, signature: Path) -> Mapping[str, str]:
    """Path and SHA-256 of every file that a statement is about, the state's manifest among them.

    One key may sign other things, such as a bill of materials; only what says that it is a model's signature counts.

    Raises:
        IntegrityError: it is another kind of statement.
    """
    try:
        statement: Any = json.loads(payload)
        predicate = statement["predicate"]
        if (statement["_type"], statement["predicateType"]) != (_STATEMENT, _PREDICATE):
            raise ValueError(f"a statement of the type {statement['predicateType']!r}")  # noqa: TRY301 - one way out
        if predicate["serialization"]["method"] != "files":
            raise ValueError("files were signed in pieces")  # noqa: TRY301 - one way out
        signed = {entry["name"]: entry["digest"] for entry in predicate["resources"] if entry["algorithm"] == "sha256"}
        if len(signed) != len(predicate["resources"]):
            raise ValueError("a file is named twice, or has another digest than SHA-256")  # noqa: TRY301 - one way out
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{signature} does not sign a warm state: {error!r}", next_step=_SIGN) from error
    return signed


def _check_digest(warm: Path, expected: str) -> None:
    match = _DIGEST.fullmatch(expected)
    if match is None:
        raise BadInputError(
            f"the expected digest {expected!r} is none",
            next_step=f"write sha256: and what `sha256sum {MANIFEST_NAME}` gives",
        )
    if (found := manifest_digest(warm)) != match.group(1):
        raise IntegrityError(
            f"{warm / MANIFEST_NAME} has sha256:{found}, expected was {expected}",
            next_step="take the state with that digest; of a state that you trust, `inspect` shows it",
        )
