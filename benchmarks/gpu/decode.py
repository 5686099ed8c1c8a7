"""Measure how fast a state decodes and renders: seconds per token, and seconds of flow and vocoder by length."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.stages import clock_of
from chatterbox_prewarm.model.warmup.settings import TEXTS
from chatterbox_prewarm.system.json_subprocess import report

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.model import Model

_REPEATS = 3
#: Two numbers of tokens. The difference of their times does not include the prompt.
_COUNTS = {"cpu": (4, 12), "cuda": (50, 300)}
#: Numbers of tokens that are rendered.
_LENGTHS = {"cpu": (12, 25), "cuda": (25, 50, 100, 250, 500)}


def run(*, warm: str, weights: str, cache: str, device: str) -> dict[str, Any]:
    """Measure one state.

    Returns:
        `seconds_per_token`, `tokens_per_second`, `prompt_seconds`; `token_bytes`, the bytes of T3's weights that each
        token reads; `capture_seconds`; on a GPU `busy`, the share of a step in which a kernel runs; and `rendering`,
        for each number of tokens the seconds of flow and vocoder and the real-time factor including T3.
    """
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.start.prepare import prepare

    options = StartOptions(warm=Path(warm), weights=Path(weights), cache=Path(cache), device=device, policy="require")
    attached = attach(prepare(options))

    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.sampling import Sampling
    from chatterbox_prewarm.model.synthesis import seed_everything

    synthesizer = attached.synthesizer
    stages, voice = synthesizer.model, synthesizer.voices[DEFAULT_VOICE]
    kind = torch.device(device).type
    clock = clock_of(device)

    prompt = stages.text_tokens(TEXTS[1])

    def decode(count: int) -> None:
        seed_everything(1)
        stages.decoder(voice.t3, prompt, sampling=Sampling(), max_new_tokens=count)

    def seconds(work: Callable[[], object]) -> float:
        work()
        measured = []
        for _ in range(_REPEATS):
            started = clock()
            work()
            measured.append(clock() - started)
        return statistics.median(measured)

    few, many = _COUNTS[kind]
    short, long = seconds(lambda: decode(few)), seconds(lambda: decode(many))
    per_token = (long - short) / (many - few)
    prefixes = ("t3.tfmr.layers.", "t3.speech_head.")
    result: dict[str, Any] = {
        "seconds_per_token": per_token,
        "tokens_per_second": 1 / per_token,
        "prompt_seconds": short - few * per_token,
        "token_bytes": sum(tensor.nbytes for name, tensor in stages.tensors.items() if name.startswith(prefixes)),
        "capture_seconds": stages.decoder.capture_seconds,
        "rendering": {},
    }
    if kind == "cuda":
        result["busy"] = _kernel_seconds(lambda: decode(many)) / long
    for length in _LENGTHS[kind]:
        rendering = _render(stages, voice, torch.arange(length, device=device), seconds)
        total = result["prompt_seconds"] + length * per_token + sum(rendering.values())
        result["rendering"][str(length)] = {**rendering, "real_time_factor": total / (length / 25)}
    return result


def _render(
    stages: Model, voice: Conditionals, tokens: torch.Tensor, seconds: Callable[[Callable[[], object]], float]
) -> dict[str, float]:
    import torch

    with torch.inference_mode():
        mel = stages.flow(tokens, voice.gen)
        return {
            "flow_seconds": seconds(lambda: stages.flow(tokens, voice.gen)),
            "vocoder_seconds": seconds(lambda: stages.vocoder(mel)),
        }


def _kernel_seconds(work: Callable[[], object]) -> float:
    """Return the total time of all kernels in seconds, measured with CUPTI."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profiled.key_averages())) / 1e6


if __name__ == "__main__":
    report(run)
