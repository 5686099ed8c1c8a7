"""One fresh process of `bench profiles`: start, speak, and time each stage of a synthesis; upstream's, or ours.

Two processes of a shared machine differ by more than two profiles do. So one process also runs upstream's code and ours
in turn, over the same weights, and compares the stages of each pair.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.warmup.inputs import TEXTS
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox.tts import ChatterboxTTS, Conditionals

_REPEATS = 3
_PAIRS = 5
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
        reference: a file for what upstream makes of the text; upstream writes it, and ours is compared with it and runs
            in pairs with upstream's code.

    Returns:
        moments since exec, the medians of the stages, in seconds, and with a reference what `fidelity.compare` and
        `_in_pairs` find.
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
    check: Callable[[Path], dict[str, Any]]
    capture_seconds: float = 0.0


def clock_of(device: str) -> Callable[[], float]:
    """A clock that first waits for the device."""
    import torch

    def read() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _ours(warm: Path, weights: Path, cache: Path, device: str, tokens: int, metrics: WarmupMetrics) -> _System:
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.prepare import prepare

    attached = attach(prepare(warm, weights, cache=cache, device=device, policy="require", metrics=metrics))
    synthesizer = attached.synthesizer

    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.regions.pipeline import bound
    from chatterbox_prewarm.model.synthesis import seed_everything

    clock = clock_of(device)
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

    def check(reference: Path) -> dict[str, Any]:
        from benchmarks.fidelity import compare

        found = compare(synthesizer, _TEXT, torch.load(reference, weights_only=True))
        with_t3 = attached.prepared.execution.t3_dtype == "float32"  # in another type upstream's T3 cannot run
        theirs = _upstreams_speak(synthesizer.model, voice, device, tokens, with_t3=with_t3)
        return {**found, **_in_pairs(speak, theirs, with_t3=with_t3)}

    return _System(speak=speak, check=check, capture_seconds=stages.speech_tokens.capture_seconds)


def _upstream(weights: str, voice: str, device: str, tokens: int, metrics: WarmupMetrics) -> _System:
    import torch

    from benchmarks.fidelity import reference
    from chatterbox_prewarm.bench.upstream import load
    from chatterbox_prewarm.families.conditionals import load_voice

    model = load(weights, device)
    conditionals = load_voice(Path(voice), device=device)
    metrics.mark("attached")

    def check(file: Path) -> dict[str, Any]:
        torch.save(reference(model, conditionals, _TEXT), file)
        return {}

    return _System(speak=_upstreams_speak(model, conditionals, device, tokens), check=check)


def _upstreams_speak(
    model: ChatterboxTTS, voice: Conditionals, device: str, tokens: int, *, with_t3: bool = True
) -> Callable[[], dict[str, float]]:
    """A synthesis by upstream's own code over a model's weights, without its T3 on request."""
    import torch

    from benchmarks.fidelity import text_tokens
    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.voices import detached

    clock = clock_of(device)
    text = text_tokens(model, _TEXT).repeat(2, 1)
    conditionals = detached(voice).t3  # upstream stores what it computes into it

    @torch.inference_mode()
    def speak() -> dict[str, float]:
        seed_everything(_SEED)
        started = clock()
        drawn = torch.arange(tokens)
        if with_t3:
            drawn = model.t3.inference(t3_cond=conditionals, text_tokens=text, max_new_tokens=tokens, top_p=1.0)[0]
        drawn = _of_one_length(drawn[drawn < model.t3.hp.start_speech_token], tokens)
        decoded = clock()
        mel = model.s3gen.flow_inference(drawn.to(device), ref_dict=dict(voice.gen), finalize=True)
        made = clock()
        samples, _ = model.s3gen.hift_inference(mel)
        samples = samples.cpu()
        done = clock()
        return _stages(started, decoded, made, done, samples.numel())

    return speak


def _in_pairs(
    ours: Callable[[], dict[str, float]], theirs: Callable[[], dict[str, float]], *, with_t3: bool
) -> dict[str, list[float]]:
    """How many times as fast our stages are as upstream's, pair by pair; each first in half of them."""
    theirs()  # the first run of upstream's code pays for what a second does not
    found: dict[str, list[float]] = {"t3_speeds": [], "s3gen_speeds": []}
    for number in range(_PAIRS):
        if number % 2:
            mine, other = ours(), theirs()
        else:
            other, mine = theirs(), ours()
        if with_t3:
            found["t3_speeds"].append(other["t3_seconds"] / mine["t3_seconds"])
        s3gen = [stages["flow_seconds"] + stages["vocoder_seconds"] for stages in (other, mine)]
        found["s3gen_speeds"].append(s3gen[0] / s3gen[1])
    return found


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
