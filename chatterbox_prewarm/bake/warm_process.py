"""The cold process of a bake: load with nothing but what was compiled before, add the voices, warm up, save."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from chatterbox_prewarm.bake.request import BakeRequest
from chatterbox_prewarm.families.registry import BYTECODE
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.proof.probes import peak_resident_bytes
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system import metrics as metrics_module
from chatterbox_prewarm.system.json_subprocess import report


def run(**request_fields: Any) -> dict[str, Any]:
    """Do the cold half of a bake.

    Returns:
        the log of this process, and the most memory that it had, resident and of the GPU.
    """
    request = BakeRequest(**request_fields)
    logging.getLogger(metrics_module.__name__).setLevel(logging.ERROR)  # nothing is baked yet, so all of it misses
    output = Path(request.output)
    prepared = prepare(
        output,
        Path(request.weights),
        cache=Path(request.cache),
        device=request.device,
        policy="off",
        execution=Execution(**request.execution),
        made=Path(request.made),
    )
    voices = {name: Path(clip) for name, clip in request.voices.items()}
    attached = attach(prepared)

    import torch

    from chatterbox_prewarm.bake.save import make_reference, save_warmup_cache
    from chatterbox_prewarm.model.voices import prepare_voice
    from chatterbox_prewarm.model.warmup.inputs import TEXTS
    from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy

    metrics, synthesizer = attached.metrics, attached.synthesizer
    # The very first synthesis, as after a start: what is imported by now is what a start imports.
    with metrics.phase("reference"):
        reference = make_reference(attached)
    sources = BYTECODE.start_sources()
    for name, clip in voices.items():
        print(f"voice {name}", file=sys.stderr)
        with metrics.phase("conditionals"):
            synthesizer.voices[name] = prepare_voice(synthesizer.model, clip)
    strategy = ChatterboxWarmupStrategy(
        levels=request.levels,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        metrics=metrics,
        upstream=False,
    )
    strategy.perform_full_warmup(synthesizer.model)
    save_warmup_cache(
        attached,
        output,
        families=request.families,
        levels=strategy.levels,
        texts=TEXTS if 2 in request.levels else (),
        reference=reference,
        sources=sources,
        parameters=request.parameters(),
    )
    return {
        "metrics": metrics.to_dict(),
        "resident_bytes": peak_resident_bytes(),
        "device_bytes": torch.cuda.max_memory_reserved(request.device) if request.device.startswith("cuda") else 0,
    }


if __name__ == "__main__":
    report(run)
