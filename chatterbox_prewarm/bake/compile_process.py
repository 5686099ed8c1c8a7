"""The compile process of a bake: compile every region and keep the result for the other processes.

It is a separate process because a compiler imports a thousand modules that a start does not import.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.families.cache_folders import seed
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.warmup.settings import TEXTS
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system import metrics as metrics_module
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.progress import detail

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.start.prepare import Prepared

#: Token counts, one for each class of lengths. On a CPU torch 2.11 compiles the vocoder's convolutions separately for
#: up to 40 mel frames, up to 256, and more, because other libraries compute them. A token gives two frames.
_RENDERED_TOKENS = (12, 60, 200)
#: Tokens of each synthesis. T3 is compiled once for any number of tokens.
_DRAWN_TOKENS = 12
#: Tokens of each stream, more than one chunk, and how many of them the flow waits for.
_STREAMED_TOKENS, _LOOK_AHEAD = 40, 6


def run(*, options: dict[str, Any], output: str, compiled: str) -> dict[str, Any]:
    """Compile all regions for the device and the profile of a bake.

    Args:
        options: of the bake; see `BakeOptions.to_dict`.
        output: the directory for the state.
        compiled: the folder for the compiled code.

    Returns:
        the event log of this process.
    """
    bake = BakeOptions.from_dict(options)
    # Nothing is baked yet, so everything is a miss: warnings about it would only confuse.
    logging.getLogger(metrics_module.__name__).setLevel(logging.ERROR)
    prepared = prepare(bake.start_options(Path(output)))
    if prepared.execution.profile == "aot":
        _compile_packages(prepared, Path(compiled) / "aot")
    else:
        _fill_compiler_caches(prepared, Path(compiled), [name for name in bake.families if name in COMPILED])
    return {"metrics": prepared.metrics.to_dict()}


def _compile_packages(prepared: Prepared, directory: Path) -> None:
    """Compile AOTInductor packages. The model is only loaded for the shapes and dtypes of its weights."""
    options = prepared.options
    seed(options.cache / "inductor", None)  # AOTInductor writes its files there
    import torch

    from chatterbox_prewarm.model.model import load
    from chatterbox_prewarm.model.regions.compile_packages import compile_packages
    from chatterbox_prewarm.model.regions.executors import eager, has_single_threaded_mode
    from chatterbox_prewarm.model.regions.region import IN_GRAPHS

    weights_of: dict[str, Sequence[torch.Tensor]] = {}

    def record_weights(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        weights_of.setdefault(region.name, weights)
        return eager(region, weights)

    execution = prepared.execution
    t3_dtype = getattr(torch, execution.t3_dtype)
    load(options.weights, device=options.device, executor=record_weights, t3_dtype=t3_dtype)
    if execution.graphs and not has_single_threaded_mode():
        weights_of = {name: weights for name, weights in weights_of.items() if name not in IN_GRAPHS}
    with prepared.metrics.phase("aot make"):
        compile_packages(weights_of, directory)


def _fill_compiler_caches(prepared: Prepared, compiled: Path, families: list[str]) -> None:
    """Run every region through `torch.compile`: with and without top-p, for each class of lengths, and in streams."""
    detail("compiling during a synthesis")
    synthesizer = attach(prepared).synthesizer

    import torch

    from chatterbox_prewarm.model.sampling import Sampling
    from chatterbox_prewarm.model.streaming import generate_stream

    for text, top_p in zip(TEXTS, (1.0, 0.9, 1.0), strict=True):
        synthesizer.synthesize(text, seed=0, max_new_tokens=_DRAWN_TOKENS, sampling=Sampling(top_p=top_p))
    # The number of usable tokens of a synthesis is random, so these lengths are fixed.
    model, voices = synthesizer.model, synthesizer.voices
    with torch.inference_mode():
        for count in _RENDERED_TOKENS:
            tokens = torch.arange(count, device=model.device)
            model.vocoder(model.flow(tokens, voices[DEFAULT_VOICE].gen))
    # The regions get tensors with other strides in a stream.
    for look_ahead in (None, _LOOK_AHEAD):
        for _ in generate_stream(synthesizer, TEXTS[0], seed=0, max_new_tokens=_STREAMED_TOKENS, look_ahead=look_ahead):
            pass
    context = prepared.family_context(voices)
    for name in families:
        (compiled / name).mkdir(parents=True)
        FAMILIES[name].save(compiled / name, context)


if __name__ == "__main__":
    report(run)
