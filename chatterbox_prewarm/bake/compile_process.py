"""The compiling process of a bake: every region is compiled, and what that leaves is kept for the processes after it.

Apart from the cold process, since a compiler imports a thousand modules that a start does not.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.request import BakeRequest
from chatterbox_prewarm.families.cache_folders import seed
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.model.warmup.inputs import TEXTS
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system import metrics as metrics_module
from chatterbox_prewarm.system.json_subprocess import report

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.start.prepared import Prepared

#: On a CPU torch 2.11 compiles the vocoder's convolutions for classes of lengths, by the library that takes them: up to
#: 40 mel frames, up to 256, and more. A token gives two frames.
_RENDERED_TOKENS = (12, 60, 200)
#: Of each synthesis: T3 is compiled for any number of them.
_DRAWN_TOKENS = 12


def run(**request_fields: Any) -> dict[str, Any]:
    """Compile all regions for the device and the profile of the request.

    Returns:
        the log of this process.
    """
    request = BakeRequest(**request_fields)
    logging.getLogger(metrics_module.__name__).setLevel(logging.ERROR)  # nothing is baked yet, so all of it misses
    prepared = prepare(
        Path(request.output),
        Path(request.weights),
        cache=Path(request.cache),
        device=request.device,
        policy="off",
        execution=Execution(**request.execution),
    )
    made = Path(request.made)
    if prepared.execution.profile == "aot":
        _make_packages(prepared, made / "aot")
    else:
        _compile(prepared, made, [name for name in request.families if name in COMPILED])
    return {"metrics": prepared.metrics.to_dict()}


def _make_packages(prepared: Prepared, directory: Path) -> None:
    """Compile packages; the model is needed for the shapes and dtypes of its weights alone."""
    seed(prepared.cache / "inductor", None)  # AOTInductor works there
    import torch

    from chatterbox_prewarm.model.regions.compile_packages import make_packages
    from chatterbox_prewarm.model.regions.executors import eager
    from chatterbox_prewarm.model.regions.packages import has_single_threaded_mode
    from chatterbox_prewarm.model.regions.pipeline import bind
    from chatterbox_prewarm.model.regions.region import IN_GRAPHS
    from chatterbox_prewarm.model.variants import english

    found: dict[str, Sequence[torch.Tensor]] = {}

    def note(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        found.setdefault(region.name, weights)
        return eager(region, weights)

    execution = prepared.execution
    bind(english.load(prepared.weights, device=prepared.device), note, t3_dtype=getattr(torch, execution.t3_dtype))
    if execution.graphs and not has_single_threaded_mode():
        found = {name: weights for name, weights in found.items() if name not in IN_GRAPHS}
    with prepared.metrics.phase("aot make"):
        make_packages(found, directory, progress=_say)


def _compile(prepared: Prepared, made: Path, families: list[str]) -> None:
    """Run every region through `torch.compile`, with top-p and without, and for each class of lengths."""
    _say("compiling while synthesising")
    synthesizer = attach(prepared).synthesizer

    import torch

    from chatterbox_prewarm.model.regions.pipeline import bound
    from chatterbox_prewarm.model.sampling import Sampling

    for text, top_p in zip(TEXTS, (1.0, 0.9, 1.0), strict=True):
        synthesizer.synthesize(text, seed=0, max_new_tokens=_DRAWN_TOKENS, sampling=Sampling(top_p=top_p))
    # How much of what is drawn makes a sound is chance, so that the lengths that are to be met are given.
    stages = bound(synthesizer.model)
    with torch.inference_mode():
        for count in _RENDERED_TOKENS:
            tokens = torch.arange(count, device=synthesizer.model.device)
            stages.vocoder(stages.flow(tokens, synthesizer.voices[DEFAULT_VOICE].gen))
    session = prepared.session(synthesizer)
    for name in families:
        (made / name).mkdir(parents=True)
        FAMILIES[name].save(made / name, session)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    report(run)
