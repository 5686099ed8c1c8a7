"""One fresh process of `benchmarks conversion`: start one system, and convert the same speech twice.

It imports torch only when a system does, because our start counts an earlier import as a miss.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.proof.probes import peak_resident_bytes
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch
    from numpy.typing import NDArray

    #: Converts the speech; returns float32 (n,), and the speech tokens of the source.
    Convert = Callable[[], tuple[NDArray[np.float32], list[int]]]

_SEED = 1


def measure(*, system: str, weights: str, warm: str, device: str, seconds: float, folder: str) -> dict[str, Any]:
    """Start one system in this process, and convert the speech twice."""
    metrics = StartMetrics()
    start = _start_upstream if system == "upstream" else _start_ours
    convert = start(metrics, weights=weights, warm=warm, device=device, seconds=seconds, folder=folder)
    durations = []
    for _ in range(2):
        started = time.perf_counter()
        samples, tokens = convert()
        durations.append(time.perf_counter() - started)
    import numpy as np

    np.save(Path(folder) / "audio.npy", samples)
    return {
        "attached": metrics.marks["attached"],
        "first_conversion": durations[0],
        "steady_conversion": durations[1],
        "resident_bytes": peak_resident_bytes(),
        "tokens": tokens,
    }


def _start_upstream(
    metrics: StartMetrics, *, weights: str, warm: str, device: str, seconds: float, folder: str
) -> Convert:
    from chatterbox.vc import ChatterboxVC

    model = ChatterboxVC.from_local(weights, device)
    metrics.mark("attached")
    import soundfile

    from chatterbox_prewarm.families.conditionals import load_voice
    from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio
    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.voices import for_upstream

    voice = load_voice(Path(warm) / "conditionals" / f"{DEFAULT_VOICE}.safetensors", device=device)
    model.ref_dict = for_upstream(voice).gen
    source = Path(folder) / "speech.wav"
    soundfile.write(source, reference_audio(seconds), CLIP_SAMPLE_RATE, subtype="FLOAT")
    inference = model.s3gen.inference
    tokens: list[int] = []

    def recorded(*, speech_tokens: torch.Tensor, ref_dict: Any) -> Any:
        tokens[:] = speech_tokens[0].tolist()
        return inference(speech_tokens=speech_tokens, ref_dict=ref_dict)

    model.s3gen.inference = recorded

    def convert() -> tuple[NDArray[np.float32], list[int]]:
        seed_everything(_SEED)
        return model.generate(source)[0].numpy(), tokens

    return convert


def _start_ours(metrics: StartMetrics, *, weights: str, warm: str, device: str, seconds: float, folder: str) -> Convert:
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.start.prepare import prepare

    options = StartOptions(
        warm=Path(warm), weights=Path(weights), cache=Path(folder), device=device, policy="require", converts=True
    )
    attached = attach(prepare(options, metrics=metrics))
    from chatterbox_prewarm.model.conversion import load_converter
    from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio

    converter = load_converter(attached.synthesizer.model, options.weights)
    metrics.mark("attached")
    voice = attached.synthesizer.voice(DEFAULT_VOICE)
    samples = reference_audio(seconds)

    def convert() -> tuple[NDArray[np.float32], list[int]]:
        speech = converter.convert(samples, CLIP_SAMPLE_RATE, voice, seed=_SEED)
        return speech.samples, speech.tokens.tolist()

    return convert


if __name__ == "__main__":
    report(measure)
