"""One trial of a warm state in a fresh process: prepare, attach, repeat the bake's own synthesis, report.

Run as a program by `bake`, to check its result, and by `prove`, in isolation.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.proof import probes
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.state.manifest import check_layout, read_manifest
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from chatterbox_prewarm.state.manifest import Manifest


def run(*, warm: str, weights: str, cache: str) -> dict[str, Any]:
    """Load `warm` and repeat its reference synthesis.

    Returns:
        what was observed, for `judge`: isolation, counters, and how the audio compares.

    Raises:
        PrewarmError: the state cannot be used at all.
    """
    metrics = WarmupMetrics()
    manifest = read_manifest(Path(warm))
    surroundings = isolation(Path(warm))  # tries to write, so it comes before the counting
    observer = probes.install(Path(warm))
    packets = probes.outgoing_packets()
    reference = manifest.reference
    prepared = prepare(
        Path(warm), Path(weights), cache=Path(cache), device=reference.device, policy="require", metrics=metrics
    )
    seeded = probes.listing(Path(cache))
    attached = attach(prepared, threads=reference.threads)
    with metrics.phase("synthesis"):
        speech = attached.synthesizer.synthesize(
            reference.text, voice=reference.voice, seed=reference.seed, max_new_tokens=reference.max_new_tokens
        )
    metrics.mark("ready")
    cached = probes.listing(Path(cache))
    return {
        "isolation": surroundings,
        "metrics": metrics.to_dict(),
        "families": {entry.name: list(entry.requires) for entry in manifest.families if entry.files},
        "network": observer.network,
        "packets": {name: count - packets.get(name, 0) for name, count in probes.outgoing_packets().items()},
        "programs": observer.programs,
        "state_writes": observer.writes + changed_state(manifest, Path(warm)),
        # Inductor locks each entry that it reads, and an empty lock is nothing that a later start could use.
        "cache_writes": sorted(
            path for path in cached if cached[path] != seeded.get(path) and not is_lock(Path(cache) / path)
        ),
        "audio": {
            "tokens_sha256": speech.tokens_sha256,
            "pcm_sha256": speech.pcm_sha256,
            "samples": len(speech.samples),
            "expected_tokens_sha256": reference.tokens_sha256,
            "expected_pcm_sha256": reference.pcm_sha256,
        },
    }


def is_lock(path: Path) -> bool:
    """Whether a file is a lock: empty, and named so."""
    return path.suffix == ".lock" and path.stat().st_size == 0


def isolation(warm: Path) -> dict[str, Any]:
    """How this process is set apart, as it can see itself."""
    return {
        "uid": os.getuid(),
        "hostname": socket.gethostname(),
        "home": os.environ.get("HOME", ""),
        "cwd": str(Path.cwd()),
        "interfaces": probes.interfaces(),
        "state_writable": probes.can_write(warm),
    }


def changed_state(manifest: Manifest, warm: Path) -> list[str]:
    """Sentences about files of the state that are no longer as the manifest says; empty when all are."""
    try:
        check_layout(manifest, warm)
    except IntegrityError as error:
        return [error.message]
    return verify_files(manifest.files, warm)


if __name__ == "__main__":
    report(run)
