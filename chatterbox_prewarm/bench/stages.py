"""One fresh process of `bench profiles`: start, speak, and time each stage of a synthesis; upstream's, or ours."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.child import report
from chatterbox_prewarm.warmup.inputs import TEXTS
from chatterbox_prewarm.warmup.metrics import WarmupMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

_REPEATS = 3
_TEXT = TEXTS[1]
_SEED = 1


def run(
    *, weights: str, warm: str | None, voice: str, cache: str, device: str, tokens: int, reference: str | None = None
) -> dict[str, Any]:
    """Start and measure.

    Args:
        weights: the checkpoint's directory.
        warm: of a warm state, or None for upstream as it is.
        voice: the file of a baked voice, for upstream.
        cache: the cache directory.
        device: to run on.
        tokens: speech tokens of each synthesis.
        reference: a file for what upstream makes of the text; upstream writes it and ours is compared with it.

    Returns:
        moments since exec, the medians of the stages, in seconds, and with a reference what `fidelity.compare` finds.
    """
    metrics = WarmupMetrics()
    system = (
        _upstream(weights, voice, device, tokens, metrics)
        if warm is None
        else _ours(Path(warm), Path(weights), Path(cache), device, tokens, metrics)
    )
    speak = system.speak

    import torch

    on_gpu = device.startswith("cuda")
    first = speak()
    steady = [speak() for _ in range(_REPEATS)]
    found = {name: statistics.median(stages[name] for stages in steady) for name in first if name != "samples"}
    seconds = sum(found.values())
    audio = first["samples"] / 24_000
    log = metrics.to_dict()
    return {
        **{name: float(value) for name, value in log["marks"].items()},
        "first_request": sum(value for name, value in first.items() if name != "samples"),
        "steady_request": seconds,
        "tokens_per_second": tokens / found["t3_seconds"],
        "flow_seconds": found["flow_seconds"],
        "vocoder_seconds": found["vocoder_seconds"],
        "real_time_factor": seconds / audio,
        "loading_seconds": sum(phase["seconds"] for phase in log["phases"] if phase["name"] == "regions")
        + log["timers"].get("compile", 0.0),
        **({"peak_gpu_megabytes": torch.cuda.max_memory_allocated() / 1e6} if on_gpu else {}),
        **({"capture_seconds": system.capture_seconds} if system.capture_seconds else {}),
        "misses": log["misses"],
        "hits": log["hits"],
        **(system.check(Path(reference)) if reference else {}),
    }


@dataclass(frozen=True, kw_only=True)
class _System:
    """What is measured: a synthesis that tells the seconds of its stages, and a comparison with upstream's results."""

    speak: Callable[[], dict[str, float]]
    check: Callable[[Path], dict[str, float]]
    capture_seconds: float = 0.0


def _clock(device: str) -> Callable[[], float]:
    """A clock that first waits for the device."""
    import torch

    def read() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _ours(warm: Path, weights: Path, cache: Path, device: str, tokens: int, metrics: WarmupMetrics) -> _System:
    from chatterbox_prewarm.load import attach, prepare

    attached = attach(prepare(warm, weights, cache=cache, device=device, policy="require", metrics=metrics))
    synthesizer = attached.synthesizer

    import torch

    from chatterbox_prewarm.clips import DEFAULT_VOICE
    from chatterbox_prewarm.regions.bound import bound
    from chatterbox_prewarm.synthesis import seed_everything

    clock = _clock(device)
    stages = bound(synthesizer.model)
    voice = synthesizer.voices[DEFAULT_VOICE]

    @torch.inference_mode()
    def speak() -> dict[str, float]:
        seed_everything(_SEED)
        started = clock()
        drawn = synthesizer.speech_tokens(_TEXT, voice=DEFAULT_VOICE, max_new_tokens=tokens)
        drawn = _of_one_length(drawn, tokens)
        decoded = clock()
        mel = stages.flow(drawn, voice.gen)
        made = clock()
        samples = stages.vocoder(mel).cpu()
        done = clock()
        return _stages(started, decoded, made, done, samples.numel())

    synthesizer.synthesize(_TEXT, voice=DEFAULT_VOICE, seed=_SEED, max_new_tokens=8)
    metrics.mark("ready")

    def check(reference: Path) -> dict[str, float]:
        from chatterbox_prewarm.bench.fidelity import compare

        return compare(synthesizer, _TEXT, torch.load(reference, weights_only=True))

    return _System(speak=speak, check=check, capture_seconds=stages.speech_tokens.capture_seconds)


def _upstream(weights: str, voice: str, device: str, tokens: int, metrics: WarmupMetrics) -> _System:
    import torch
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.bench.fidelity import reference, text_tokens
    from chatterbox_prewarm.families.conditionals import load_voice
    from chatterbox_prewarm.synthesis import seed_everything

    model = ChatterboxTTS.from_local(weights, device)
    conditionals = load_voice(Path(voice), device=device)
    metrics.mark("attached")
    clock = _clock(device)
    text = text_tokens(model, _TEXT).repeat(2, 1)

    @torch.inference_mode()
    def speak() -> dict[str, float]:
        seed_everything(_SEED)
        started = clock()
        drawn = model.t3.inference(t3_cond=conditionals.t3, text_tokens=text, max_new_tokens=tokens, top_p=1.0)[0]
        drawn = _of_one_length(drawn[drawn < model.t3.hp.start_speech_token], tokens)
        decoded = clock()
        mel = model.s3gen.flow_inference(drawn.to(device), ref_dict=dict(conditionals.gen), finalize=True)
        made = clock()
        samples, _ = model.s3gen.hift_inference(mel)
        samples = samples.cpu()
        done = clock()
        return _stages(started, decoded, made, done, samples.numel())

    def check(file: Path) -> dict[str, float]:
        torch.save(reference(model, conditionals, _TEXT), file)
        return {}

    return _System(speak=speak, check=check)


def _of_one_length(drawn: Any, tokens: int) -> Any:
    """Random weights draw special tokens too, which are dropped: fill up, so that every system renders as much."""
    return drawn.repeat(-(-tokens // max(drawn.numel(), 1)))[:tokens]


def _stages(started: float, decoded: float, made: float, done: float, samples: int) -> dict[str, float]:
    return {
        "t3_seconds": decoded - started,
        "flow_seconds": made - decoded,
        "vocoder_seconds": done - made,
        "samples": float(samples),
    }


if __name__ == "__main__":
    report(run)
