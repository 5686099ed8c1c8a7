"""How fast a state decodes and renders, in a fresh process: seconds a token, and flow and vocoder by length."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.stages import clock_of
from chatterbox_prewarm.model.warmup.inputs import TEXTS
from chatterbox_prewarm.system.json_subprocess import report

if TYPE_CHECKING:
    from collections.abc import Callable

_REPEATS = 3
#: Two counts of tokens, whose difference leaves the prompt out, and the lengths that are rendered.
_COUNTS = {"cpu": (4, 12), "cuda": (50, 300)}
_LENGTHS = {"cpu": (12, 25), "cuda": (25, 50, 100, 250, 500)}


def run(*, warm: str, weights: str, cache: str, device: str) -> dict[str, Any]:
    """Measure one state.

    Returns:
        `seconds_per_token`, `tokens_per_second`, `prompt_seconds`, `token_bytes` (what a token has to read of T3's
        weights), on a GPU `busy` (the share of a step in which a kernel runs) and `capture_seconds`; `rendering`: for
        each number of tokens the seconds of flow and vocoder, and the real-time factor with T3.
    """
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.prepare import prepare

    attached = attach(prepare(Path(warm), Path(weights), cache=Path(cache), device=device, policy="require"))

    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.regions.pipeline import bound
    from chatterbox_prewarm.model.sampling import Sampling
    from chatterbox_prewarm.model.synthesis import seed_everything

    synthesizer = attached.synthesizer
    stages, voice = bound(synthesizer.model), synthesizer.voices[DEFAULT_VOICE]
    kind = torch.device(device).type
    clock = clock_of(device)

    from benchmarks.fidelity import text_tokens

    prompt = text_tokens(synthesizer.model, TEXTS[1])

    def draw(count: int) -> None:
        seed_everything(1)
        stages.speech_tokens(voice.t3, prompt, sampling=Sampling(), max_new_tokens=count)

    def seconds(work: Callable[[], object]) -> float:
        work()
        measured = []
        for _ in range(_REPEATS):
            started = clock()
            work()
            measured.append(clock() - started)
        return statistics.median(measured)

    few, many = _COUNTS[kind]
    short, long = seconds(lambda: draw(few)), seconds(lambda: draw(many))
    per_token = (long - short) / (many - few)
    t3 = synthesizer.model.t3
    found: dict[str, Any] = {
        "seconds_per_token": per_token,
        "tokens_per_second": 1 / per_token,
        "prompt_seconds": short - few * per_token,
        "token_bytes": sum(weight.nbytes for part in (t3.tfmr.layers, t3.speech_head) for weight in part.parameters()),
        "capture_seconds": stages.speech_tokens.capture_seconds,
        "rendering": {},
    }
    if kind == "cuda":
        found["busy"] = _kernel_seconds(lambda: draw(many)) / long
    for length in _LENGTHS[kind]:
        tokens = torch.arange(length, device=device)
        with torch.inference_mode():
            mel = stages.flow(tokens, voice.gen)
            flow = seconds(lambda tokens=tokens: stages.flow(tokens, voice.gen))  # type: ignore[misc]
            vocoder = seconds(lambda mel=mel: stages.vocoder(mel))  # type: ignore[misc]
        total = found["prompt_seconds"] + length * per_token + flow + vocoder
        found["rendering"][str(length)] = {
            "flow_seconds": flow,
            "vocoder_seconds": vocoder,
            "real_time_factor": total / (length / 25),
        }
    return found


def _kernel_seconds(work: Callable[[], object]) -> float:
    """How long kernels ran in all, by CUPTI."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in seen.key_averages())) / 1e6


if __name__ == "__main__":
    report(run)
