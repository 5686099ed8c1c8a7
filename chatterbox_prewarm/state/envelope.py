"""Signed statements: a DSSE envelope in a Sigstore bundle (v0.3), with a key and without certificate or log.

Formats: DSSE v1 (https://github.com/secure-systems-lab/dsse), in-toto Statement v1 and the bundle of Sigstore's
protobuf-specs. cosign, model-signing and the admission controllers read and write the same.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.state.keys import CURVES, key_hint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The content of a bundle's envelope, the signature over it, and the hint that names the key."""

    payload: bytes
    signature: bytes
    hint: str | None = None

    @classmethod
    def parse(cls, raw: bytes) -> Bundle:
        """Read a bundle without verifying it.

        Raises:
            ValueError, KeyError, TypeError, AttributeError, RecursionError: it is not a bundle with a statement.
        """
        bundle = json.loads(raw)
        envelope = bundle["dsseEnvelope"]
        (only,) = envelope["signatures"]
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"its content is {envelope['payloadType']!r}")
        return cls(
            payload=base64.b64decode(envelope["payload"], validate=True),
            signature=base64.b64decode(only["sig"], validate=True),
            hint=bundle["verificationMaterial"]["publicKey"].get("hint"),
        )

    def is_signed_with(self, key: EllipticCurvePublicKey) -> bool:
        """Return whether the signature is of this key."""
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(self.signature, _encoded(self.payload), _algorithm(key))
        except InvalidSignature:
            return False
        return True

    def envelope(self) -> dict[str, Any]:
        """Return the DSSE envelope as a JSON object."""
        return {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": "", "sig": base64.b64encode(self.signature).decode()}],
        }

    def to_json(self) -> dict[str, Any]:
        """Return the bundle as a JSON object."""
        return {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": self.hint or ""}, "tlogEntries": []},
            "dsseEnvelope": self.envelope(),
        }


def sign_payload(payload: bytes, key: EllipticCurvePrivateKey) -> Bundle:
    """Sign a statement. Uses no network."""
    signature = key.sign(_encoded(payload), _algorithm(key))
    return Bundle(payload=payload, signature=signature, hint=key_hint(key.public_key()))


def _encoded(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _algorithm(key: EllipticCurvePublicKey | EllipticCurvePrivateKey) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA(getattr(hashes, CURVES[key.curve.name])())
