"""The proof process: start from a state, repeat the bake's synthesis, make a voice, and report what happened.

A start that converts speech has no T3, so it converts a generated clip instead.

A bake runs it to check its result, and `prove` runs it in isolation.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.families.registry import is_used
from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio, reference_clip
from chatterbox_prewarm.proof import probes
from chatterbox_prewarm.start.attach import attach_baked, with_eager_regions
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.start.upstream import attach_upstream
from chatterbox_prewarm.start.voices import make_missing_voices
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.fingerprint import upstream_installed
from chatterbox_prewarm.system.gpu_stand_in import stand_in_target
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import StartMetrics, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.model.synthesis import Speech
    from chatterbox_prewarm.start.attach import Attached
    from chatterbox_prewarm.state.manifest import Reference


def run(*, warm: str, weights: str, cache: str, converts: bool = False) -> dict[str, Any]:
    """Load a state and repeat its reference synthesis, or convert speech.

    Returns:
        the observations for `judge`: isolation, counters, and how the audio compares.

    Raises:
        PrewarmError: the state cannot be used at all.
    """
    metrics = StartMetrics()
    state = State.read(Path(warm))
    surroundings = isolation(state.path)  # it tries to write, so it comes before the probes
    observer = probes.install(state.path)
    packets = probes.outgoing_packets()
    reference = state.manifest.reference
    options = StartOptions(
        warm=state.path,
        weights=Path(weights),
        cache=Path(cache),
        device=reference.device,
        policy="require",
        converts=converts,
    )
    prepared = prepare(options, metrics=metrics)
    files_before = probes.listing(options.cache)
    attached = attach_baked(prepared, threads=reference.threads)
    upstream = make_missing_voices(attached.synthesizer, attached.prepared, {})
    from chatterbox_prewarm.model.voices import prepare_voice

    computes, synthesize = stand_in_target() is None, _convert if converts else _speak
    with metrics.phase("synthesis"):
        if computes:
            speech = synthesize(attached, reference)
        else:
            attached.synthesizer.check()
    ready = now() - metrics.origin
    if upstream_installed():  # with the families that only it uses
        lean = attached.synthesizer.model if computes and not converts else None
        with metrics.phase("voice"), reference_clip() as clip:
            prepare_voice(upstream or attach_upstream(prepared, lean=lean), clip)
    metrics.marks["ready"] = ready  # only now, because misses of bytecode count until then
    files_after = probes.listing(options.cache)
    changed = [path for path, stamp in files_after.items() if stamp != files_before.get(path)]
    return {
        "isolation": surroundings,
        "metrics": metrics.to_dict(),
        "families": {
            entry.name: list(entry.requires) for entry in state.manifest.families if entry.files and is_used(entry.name)
        },
        "network": observer.network,
        "packets": {name: count - packets.get(name, 0) for name, count in probes.outgoing_packets().items()},
        "programs": observer.programs,
        "state_writes": observer.writes + _changes(state),
        # Inductor locks each entry that it reads. An empty lock file is of no use to a later start.
        "cache_writes": sorted(path for path in changed if not _is_lock(Path(path))),
        "audio": _compare(speech, attached, reference, synthesize) if computes else None,
    }


def _speak(attached: Attached, reference: Reference) -> Speech:
    return attached.synthesizer.synthesize(
        reference.text, voice=reference.voice, seed=reference.seed, max_new_tokens=reference.max_new_tokens
    )


def _convert(attached: Attached, reference: Reference) -> Speech:
    from chatterbox_prewarm.model.conversion import load_converter

    converter = load_converter(attached.synthesizer.model, attached.prepared.options.weights)
    voice, samples = attached.synthesizer.voice(reference.voice), reference_audio(1.0)
    return converter.convert(samples, CLIP_SAMPLE_RATE, voice, seed=reference.seed)


def _compare(
    speech: Speech, attached: Attached, reference: Reference, synthesize: Callable[[Attached, Reference], Speech]
) -> dict[str, Any]:
    """Compare speech with the speech of the bake. If the bake made none, compare it with eager mode on this device.

    Returns:
        the digests of tokens and audio, here and expected; and how far the difference from eager mode is below the
        audio, in dB, or None if the bake's audio is known.
    """
    expected, decibels = reference, None
    if not reference.pcm_sha256 or synthesize is not _speak:
        eager = synthesize(with_eager_regions(attached), reference)
        expected = replace(reference, tokens_sha256=eager.tokens_sha256)
        decibels = _decibels(speech, eager)
    return {
        "tokens_sha256": speech.tokens_sha256,
        "pcm_sha256": speech.pcm_sha256,
        "samples": len(speech.samples),
        "expected_tokens_sha256": expected.tokens_sha256,
        "expected_pcm_sha256": expected.pcm_sha256,
        "decibels": decibels,
    }


def _decibels(speech: Speech, other: Speech) -> float:
    """Return the energy of the audio relative to the energy of its difference from `other`, in dB, from 0 to 300."""
    import numpy as np

    if len(speech.samples) != len(other.samples):
        return 0.0
    difference = np.square(speech.samples - other.samples, dtype=np.float64).sum()
    energy = np.square(speech.samples, dtype=np.float64).sum()
    decibels = 10 * np.log10(max(energy, 1e-30) / max(difference, 1e-30))
    return float(np.nan_to_num(np.clip(decibels, 0.0, 300.0)))


def _is_lock(path: Path) -> bool:
    return path.suffix == ".lock" and path.stat().st_size == 0


def isolation(warm: Path) -> dict[str, Any]:
    """Describe the isolation that this process can see."""
    return {
        "uid": os.getuid(),
        "hostname": socket.gethostname(),
        "home": os.environ.get("HOME", ""),
        "cwd": str(Path.cwd()),
        "interfaces": probes.interfaces(),
        "state_writable": probes.can_write(warm),
    }


def _changes(state: State) -> list[str]:
    """Describe each file of the state that no longer matches the manifest."""
    try:
        state.check_folder()
        state.check_files()
    except IntegrityError as error:
        return [error.message]
    return []


if __name__ == "__main__":
    report(run)
