"""One fresh process of `benchmarks profiles`: start upstream or our code and time each stage of a synthesis.

Two processes on a shared machine differ by more than two profiles do. So one process also runs upstream's code and ours
in turn with the same weights, and compares the stages of each pair.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.warmup.settings import TEXTS
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.conditionals import Conditionals

_REPEATS = 3
_PAIRS = 5
_TEXT = TEXTS[1]
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options of the process. They are passed to it as JSON.

    Attributes:
        weights: directory of the checkpoint.
        warm: directory of a warm state, or None for upstream without changes.
        voice: file of a baked voice for upstream.
        cache: cache directory.
        device: torch device.
        tokens: speech tokens of each synthesis; 50 are two seconds of audio, which is enough to time a token.
        reference: file for upstream's result. Upstream writes it. Our code is compared with it and also runs in pairs
            with upstream's code.
    """

    weights: str
    warm: str | None
    voice: str
    cache: str
    device: str
    tokens: int = 50
    reference: str | None = None


def run(**fields: Any) -> dict[str, Any]:
    """Start and measure. The arguments are the fields of `StageOptions`.

    Returns:
        moments since exec and medians of the stages in seconds; with a reference also the results of
        `fidelity.compare` and `_in_pairs`.
    """
    options, metrics = StageOptions(**fields), StartMetrics()
    system = (_upstream if options.warm is None else _ours)(options, metrics)
    speak = system.speak

    import torch

    on_gpu = options.device.startswith("cuda")
    first = speak()
    steady = [speak() for _ in range(_REPEATS)]
    medians = {name: statistics.median(stages[name] for stages in steady) for name in first if name != "samples"}
    seconds = sum(medians.values())
    audio = first["samples"] / 24_000
    log = metrics.to_dict()
    return {
        **{name: float(value) for name, value in log["marks"].items()},
        "first_request": sum(value for name, value in first.items() if name != "samples"),
        "steady_request": seconds,
        "tokens_per_second": options.tokens / medians["t3_seconds"],
        "flow_seconds": medians["flow_seconds"],
        "vocoder_seconds": medians["vocoder_seconds"],
        "real_time_factor": seconds / audio,
        **({"peak_gpu_megabytes": torch.cuda.max_memory_allocated() / 1e6} if on_gpu else {}),
        **({"capture_seconds": system.capture_seconds} if system.capture_seconds else {}),
        "misses": log["misses"],
        "hits": log["hits"],
        **(system.check(Path(options.reference)) if options.reference else {}),
    }


@dataclass(frozen=True, kw_only=True)
class _System:
    """System under measurement.

    Attributes:
        speak: synthesize the text; return the seconds of each stage.
        check: compare with upstream's result in a file.
        capture_seconds: seconds that the capture of CUDA graphs took.
    """

    speak: Callable[[], dict[str, float]]
    check: Callable[[Path], dict[str, Any]]
    capture_seconds: float = 0.0


def clock_of(device: str) -> Callable[[], float]:
    """Return a clock that waits for the device before it is read."""
    import torch

    def read() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def _ours(options: StageOptions, metrics: StartMetrics) -> _System:
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.start.prepare import prepare

    device, tokens = options.device, options.tokens
    start = StartOptions(
        warm=Path(options.warm or ""),
        weights=Path(options.weights),
        cache=Path(options.cache),
        device=device,
        policy="require",
    )
    attached = attach(prepare(start, metrics=metrics))
    synthesizer = attached.synthesizer

    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.synthesis import seed_everything

    clock = clock_of(device)
    stages = synthesizer.model
    voice = synthesizer.voices[DEFAULT_VOICE]

    @torch.inference_mode()
    def speak() -> dict[str, float]:
        seed_everything(_SEED)
        started = clock()
        drawn = torch.cat(list(synthesizer.token_blocks(_TEXT, voice=DEFAULT_VOICE, max_new_tokens=tokens)))
        speech = _fit_length(synthesizer.usable(drawn), tokens)
        decoded = clock()
        mel = stages.flow(speech, voice.gen)
        flow_done = clock()
        samples = stages.vocoder(mel).cpu()
        done = clock()
        return _stages(started, decoded, flow_done, done, samples.numel())

    synthesizer.synthesize(_TEXT, voice=DEFAULT_VOICE, seed=_SEED, max_new_tokens=8)
    metrics.mark("ready")

    def check(reference: Path) -> dict[str, Any]:
        from chatterbox_prewarm.bench.fidelity import compare
        from chatterbox_prewarm.start.upstream import attach_upstream

        differences = compare(synthesizer, _TEXT, torch.load(reference, weights_only=True))
        with_t3 = attached.prepared.execution.t3_dtype == "float32"  # upstream's T3 needs float32
        model = attach_upstream(attached.prepared, lean=stages)
        upstream = _upstreams_speak(model, voice, device, tokens, with_t3=with_t3)
        return {**differences, **_in_pairs(speak, upstream, with_t3=with_t3)}

    return _System(speak=speak, check=check, capture_seconds=stages.decoder.capture_seconds)


def _upstream(options: StageOptions, metrics: StartMetrics) -> _System:
    import torch

    from chatterbox_prewarm.bench.fidelity import reference
    from chatterbox_prewarm.bench.upstream import load
    from chatterbox_prewarm.families.conditionals import load_voice

    model = load(options.weights, options.device)
    conditionals = load_voice(Path(options.voice), device=options.device)
    metrics.mark("attached")

    def check(file: Path) -> dict[str, Any]:
        torch.save(reference(model, conditionals, _TEXT), file)
        return {}

    return _System(speak=_upstreams_speak(model, conditionals, options.device, options.tokens), check=check)


def _upstreams_speak(
    model: ChatterboxTTS, voice: Conditionals, device: str, tokens: int, *, with_t3: bool = True
) -> Callable[[], dict[str, float]]:
    """Return a function that synthesizes with upstream's code and the weights of `model`, optionally without T3."""
    import torch

    from chatterbox_prewarm.model.regions.t3_blocks import START_SPEECH_TOKEN
    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.upstream import variant_of
    from chatterbox_prewarm.model.variants import code_of, default_sampling
    from chatterbox_prewarm.model.voices import for_upstream

    clock = clock_of(device)
    variant, conditionals = variant_of(model), for_upstream(voice)
    code, sampling = code_of(variant), default_sampling(variant)
    text = code.upstream_text_ids(model, _TEXT, variant.check_language(None))

    @torch.inference_mode()
    def speak() -> dict[str, float]:
        seed_everything(_SEED)
        started = clock()
        speech = torch.arange(tokens)
        if with_t3:
            speech = code.upstream_speech_tokens(
                model, conditionals.t3, text, sampling=sampling, max_new_tokens=tokens
            ).cpu()
        speech = _fit_length(speech[speech < START_SPEECH_TOKEN], tokens)
        decoded = clock()
        mel = model.s3gen.flow_inference(speech.to(device), ref_dict=conditionals.gen, finalize=True)
        flow_done = clock()
        samples, _ = model.s3gen.hift_inference(mel)
        samples = samples.cpu()
        done = clock()
        return _stages(started, decoded, flow_done, done, samples.numel())

    return speak


def _in_pairs(
    ours: Callable[[], dict[str, float]], upstream: Callable[[], dict[str, float]], *, with_t3: bool
) -> dict[str, list[float]]:
    """Return the speed of our stages relative to upstream's for each pair; each side runs first in half of them."""
    upstream()  # the first run of upstream's code is slower
    speeds: dict[str, list[float]] = {"t3_speeds": [], "s3gen_speeds": []}
    for number in range(_PAIRS):
        if number % 2:
            our_stages, upstream_stages = ours(), upstream()
        else:
            upstream_stages, our_stages = upstream(), ours()
        if with_t3:
            speeds["t3_speeds"].append(upstream_stages["t3_seconds"] / our_stages["t3_seconds"])
        s3gen = [stages["flow_seconds"] + stages["vocoder_seconds"] for stages in (upstream_stages, our_stages)]
        speeds["s3gen_speeds"].append(s3gen[0] / s3gen[1])
    return speeds


def _fit_length(speech: Any, tokens: int) -> Any:
    """Repeat the tokens up to the length `tokens`, so that every system renders the same length.

    Random weights also sample special tokens, which have been dropped.
    """
    return speech.repeat(-(-tokens // max(speech.numel(), 1)))[:tokens]


def _stages(started: float, decoded: float, flow_done: float, done: float, samples: int) -> dict[str, float]:
    return {
        "t3_seconds": decoded - started,
        "flow_seconds": flow_done - decoded,
        "vocoder_seconds": done - flow_done,
        "samples": float(samples),
    }


if __name__ == "__main__":
    report(run)
