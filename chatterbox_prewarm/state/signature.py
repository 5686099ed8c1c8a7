"""Verify the signature of a warm state, before any file of the state except its manifest is opened.

A signature is a Sigstore bundle in the format of model-signing, over the digests of the manifest and of all files. It
is stored next to the state, because a state contains only files that its manifest lists.

A start verifies the bundle itself. It needs only the signature over the envelope and the digest of the manifest, which
covers every file. model-signing would hash all files a second time, and importing it takes longer than `prepare` may
take (docs/trust.md has the figures). Formats: DSSE v1 for the envelope, in-toto Statement v1 with the predicate
`https://model_signing/signature/v1.0` for its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.state.envelope import STATEMENT, Bundle
from chatterbox_prewarm.state.keys import key_hint, read_public_key
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.system.digests import FileEntry, set_digest
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

_PREDICATE = "https://model_signing/signature/v1.0"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SIGN = "sign the state with `chatterbox-prewarm sign`, or give the path of the signature with --signature"
_STALE = "sign the state in its present form with `chatterbox-prewarm sign`, or remove {}"
_NOT_TRUSTED = "take the state from the place where it was signed, or sign it if you vouch for it"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """A key or a digest, from outside a state, that shows whether to trust the state. An empty one checks nothing.

    Attributes:
        key: a public key in PEM; the state must be signed with its private key.
        signature: the path of the signature; by default `default_signature` of the state.
        expected_digest: `sha256:` and the SHA-256 of `manifest.json`, as `sha256sum` prints it.
    """

    key: Path | None = None
    signature: Path | None = None
    expected_digest: str | None = None

    def check(self, root: Path, manifest: bytes) -> tuple[str, ...]:
        """Check the bytes of a state's manifest. No other file of the state is read.

        Args:
            root: the directory of the state.
            manifest: the bytes of its `manifest.json`.

        Returns:
            a sentence for each check that passed.

        Raises:
            IntegrityError: the state is not signed, is signed with another key, or is another state.
            BadInputError: the key or the digest is invalid, or a signature is given without a key.
        """
        if self.key is None and self.signature is not None:
            raise BadInputError(
                f"the signature {self.signature} proves nothing without a public key",
                next_step="give the public key with --key, in Python as `Trust(key=…)`",
            )
        passed = []
        if self.expected_digest is not None:
            _check_digest(root, manifest, self.expected_digest)
            passed.append(f"the manifest has the expected digest {self.expected_digest}")
        if self.key is not None:
            signature = self.signature or default_signature(root)
            verify_signature(signature, read_public_key(self.key), root, manifest)
            passed.append(f"the manifest is signed with the key of {self.key}, signature {signature}")
        return tuple(passed)


def check_trust_for_models(trust: Trust, models: Collection[str]) -> None:
    """Check that trust options can hold for the states of several models.

    Raises:
        BadInputError: they name one state, by its digest or its signature.
    """
    if len(models) > 1 and (trust.expected_digest is not None or trust.signature is not None):
        raise BadInputError(
            f"--expect-digest and --signature are for one state, and there are {len(models)} models: "
            f"{', '.join(models)}",
            next_step="sign each state and give the key with --key, or serve the models separately with --variant",
        )


def default_signature(root: Path) -> Path:
    """Return the default path of a state's signature: next to the state, with `.sig` added to its name."""
    root = Path(os.path.abspath(root))  # noqa: PTH100 - `warm/.` and `warm/..` have no name; links must stay links
    return root.with_name(f"{root.name}.sig")


def verify_signature(signature: Path, key: EllipticCurvePublicKey, root: Path, manifest: bytes) -> None:
    """Check that the owner of a key signed exactly this manifest.

    Raises:
        IntegrityError: the signature is missing, invalid, of another key, or of another manifest.
    """
    _compare(signature, _open_bundle(signature, key), root, manifest, next_step=_NOT_TRUSTED)


def check_same_state(signature: Path, root: Path, manifest: bytes) -> None:
    """Check that a signature names this manifest. Without a key this does not show who made the signature.

    It prevents that a state is shipped together with the signature of an older one.

    Raises:
        IntegrityError: the signature is invalid, or of another manifest.
    """
    _compare(signature, _read_bundle(signature).payload, root, manifest, next_step=_STALE.format(signature))


def _compare(signature: Path, payload: bytes, root: Path, manifest: bytes, *, next_step: str) -> None:
    """Compare the signed manifest digest with the digest of this manifest.

    Raises:
        IntegrityError: they differ.
    """
    signed = _signed_files(payload, signature)
    digest = hashlib.sha256(manifest).hexdigest()
    if signed.get(MANIFEST_NAME) == digest:
        return
    signed_set = set_digest(
        FileEntry(path=path, size=0, sha256=sha256) for path, sha256 in signed.items() if path != MANIFEST_NAME
    )
    raise IntegrityError(
        f"the signature {signature} is of another manifest than {root / MANIFEST_NAME}: it signs one with sha256 "
        f"{signed.get(MANIFEST_NAME, 'none')} and set digest {signed_set}, but this one has sha256 {digest} and "
        f"set digest {_stated_set_digest(manifest)}",
        next_step=next_step,
    )


def _stated_set_digest(manifest: bytes) -> str:
    """Return the set digest that an untrusted manifest states, for an error message."""
    try:
        return str(json.loads(manifest)["set_digest"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return "unknown, because the manifest cannot be read"


def _read_bundle(path: Path) -> Bundle:
    """Read a bundle without verifying it.

    Raises:
        IntegrityError: the file is missing or is not a bundle.
    """
    try:
        return Bundle.parse(read_regular(path, follow_links=True))
    except FileNotFoundError as error:
        raise IntegrityError(f"there is no signature {path}", next_step=_SIGN) from error
    except OSError as error:
        raise IntegrityError(f"the signature {path} cannot be read: {error.strerror}", next_step=_SIGN) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path} is not the signature of a warm state: {error!r}", next_step=_SIGN) from error


def _open_bundle(path: Path, key: EllipticCurvePublicKey) -> bytes:
    """Return the content of a bundle's envelope after verifying its signature with a key.

    Raises:
        IntegrityError: the file is not a bundle, or the signature is not of this key.
    """
    bundle = _read_bundle(path)
    if not bundle.is_signed_with(key):
        if bundle.hint == (expected := key_hint(key)):
            reason = "it is of this key, but the signature or its content was changed"
        else:
            reason = f"it names the key {bundle.hint}, and the given key is {expected}"
        raise IntegrityError(f"the signature {path} is not valid: {reason}", next_step=_NOT_TRUSTED)
    return bundle.payload


def _signed_files(payload: bytes, signature: Path) -> Mapping[str, str]:
    """Return path and SHA-256 of every file that a statement covers, including the manifest.

    A key may sign other things too, such as a bill of materials, so only a model signature counts.

    Raises:
        IntegrityError: it is another kind of statement.
    """
    try:
        statement: Any = json.loads(payload)
        predicate = statement["predicate"]
        if (statement["_type"], statement["predicateType"]) != (STATEMENT, _PREDICATE):
            raise ValueError(f"a statement of the type {statement['predicateType']!r}")  # noqa: TRY301 - as above
        if predicate["serialization"]["method"] != "files":
            raise ValueError("files were signed in pieces")  # noqa: TRY301 - as above
        signed = {entry["name"]: entry["digest"] for entry in predicate["resources"] if entry["algorithm"] == "sha256"}
        if len(signed) != len(predicate["resources"]):
            raise ValueError("a file is listed twice, or has another digest than SHA-256")  # noqa: TRY301 - as above
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{signature} does not sign a warm state: {error!r}", next_step=_SIGN) from error
    return signed


def parse_digest(text: str) -> str:
    """Return the hexadecimal digits of a digest such as "sha256:…".

    Raises:
        BadInputError: the text is not a digest.
    """
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise BadInputError(
            f"the expected digest {text!r} is not a digest",
            next_step=f"write sha256: and the output of `sha256sum {MANIFEST_NAME}`",
        )
    return match.group(1)


def _check_digest(root: Path, manifest: bytes, expected: str) -> None:
    wanted = parse_digest(expected)
    if (digest := hashlib.sha256(manifest).hexdigest()) != wanted:
        raise IntegrityError(
            f"{root / MANIFEST_NAME} has sha256:{digest}, expected was {expected}",
            next_step="take the state with that digest; `inspect` shows the digest of a state that you trust",
        )
