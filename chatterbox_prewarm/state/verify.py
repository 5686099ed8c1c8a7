"""Verify a warm state completely: trust, digests, and whether it fits this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError
from chatterbox_prewarm.state.compatibility import compare_families, machine_facts
from chatterbox_prewarm.system.fingerprint import explain, read_fingerprint, used_facts

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.state.state import State


def verify(state: State, weights: Path, cache: Path) -> list[str]:
    """Compare the digest of every file, and the requirements of every family with this machine and these paths.

    Returns:
        lines that say why the state is trusted, and for each family that it is intact and fits.

    Raises:
        IntegrityError: a file differs from the manifest.
        FingerprintMismatchError: a family was baked for something else. The message names every difference.
    """
    state.check_sealed(strict=False)
    state.check_files()
    manifest = state.manifest
    differences = compare_families(manifest, machine_facts(weights, cache, manifest.reference.device))
    if incompatible := [f"{name} ({'; '.join(words)})" for name, words in differences.items() if words]:
        raise FingerprintMismatchError(
            f"all files are intact, but not every family fits this machine: {', '.join(incompatible)}",
            next_step="bake on this kind of machine; with the policy fallback a start leaves these families out",
        )
    notes = explain(used_facts(manifest.fingerprint), read_fingerprint(manifest.reference.device).fields())
    return [
        *state.trusted_by,
        *(
            f"{entry.name}: {len(entry.files)} file(s) intact, "
            + ("fits this machine" if entry.name in differences else "not used: upstream's model is not installed")
            for entry in manifest.families
        ),
        *(f"note: {sentence}; no family depends on it" for sentence in notes),
    ]
