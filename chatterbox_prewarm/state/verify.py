"""Verify a warm state: digests, trust and compatibility with this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.state.compatibility import check_fit, facts
from chatterbox_prewarm.state.manifest import check_layout, read_manifest
from chatterbox_prewarm.state.signing import check_trust
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.system.fingerprint import explain, read_fingerprint

if TYPE_CHECKING:
    from pathlib import Path


def verify(
    warm: Path,
    weights: Path,
    cache: Path,
    *,
    key: Path | None = None,
    signature: Path | None = None,
    expected_digest: str | None = None,
) -> list[str]:
    """Check every digest of a warm state and the fit of every family to this machine, and to its places.

    What it is trusted by, a key or a digest, is as for `signing.check_trust`.

    Returns:
        lines that say by what the state is trusted, and for each family that it is intact and fits.

    Raises:
        IntegrityError: the state is not trusted, or a file is not as baked, or does not belong there.
        FingerprintMismatchError: a family was baked for something else; names every difference.
    """
    trusted = check_trust(warm, key=key, signature=signature, expected_digest=expected_digest)
    manifest = read_manifest(warm)
    check_layout(manifest, warm)
    if problems := verify_files(manifest.files, warm):
        raise IntegrityError(
            f"{len(problems)} file(s) of {warm} are not as baked: {'; '.join(problems)}",
            next_step="restore the warm state, or bake it again with `chatterbox-prewarm bake`",
        )
    differences = check_fit(manifest, facts(weights, cache, manifest.reference.device))
    if misfits := [f"{name} ({'; '.join(words)})" for name, words in differences.items() if words]:
        raise FingerprintMismatchError(
            f"all files are intact, but not every family fits this machine: {', '.join(misfits)}",
            next_step="bake on this kind of machine; with --policy fallback a start leaves these families out",
        )
    notes = explain(manifest.fingerprint, read_fingerprint(manifest.reference.device).fields())
    return [
        *trusted,
        *(f"{entry.name}: {len(entry.files)} file(s) intact, fits this machine" for entry in manifest.families),
        *(f"note: {sentence}; no family depends on it" for sentence in notes),
    ]
