"""The warm-up process of a bake: start with nothing but compiled code, add the voices, warm up, save."""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.families.registry import BYTECODE
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.proof.probes import peak_resident_bytes
from chatterbox_prewarm.start.attach import attach_baked, make_missing_voices
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system import metrics as metrics_module
from chatterbox_prewarm.system.json_subprocess import report


def run(*, options: dict[str, Any], output: str, compiled: str) -> dict[str, Any]:
    """Warm the model up and write the state.

    Args:
        options: of the bake; see `BakeOptions.to_dict`.
        output: the directory for the state.
        compiled: the folder with the code that the compile process made.

    Returns:
        the event log of this process, and its peak memory, resident and of the GPU, in bytes.
    """
    bake = BakeOptions.from_dict(options)
    # Nothing is baked yet, so everything is a miss: warnings about it would only confuse.
    logging.getLogger(metrics_module.__name__).setLevel(logging.ERROR)
    attached = attach_baked(prepare(bake.start_options(Path(output), Path(compiled))))

    import torch

    from chatterbox_prewarm.families.conditionals import load_voice, save_voice
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.model.voices import placeholder_voice, prepare_voice
    from chatterbox_prewarm.model.warmup.settings import TEXTS
    from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
    from chatterbox_prewarm.start.save import WarmupRecord, make_reference, save_warmup_cache
    from chatterbox_prewarm.start.upstream import attach_upstream

    metrics, synthesizer = attached.metrics, attached.synthesizer
    # Before upstream's model is imported, to learn which modules a start imports that finds its voices in the state.
    with tempfile.TemporaryDirectory() as folder:
        save_voice(placeholder_voice(), Path(folder) / "voice.safetensors")
        voice = load_voice(Path(folder) / "voice.safetensors", device=bake.device)
    Synthesizer(synthesizer.model, {DEFAULT_VOICE: voice}).check()
    importlib.import_module("soundfile")  # a start with `--voice` checks the clips
    sources = BYTECODE.start_sources()
    upstream = make_missing_voices(attached, {}) or attach_upstream(attached.prepared, lean=synthesizer.model)
    with metrics.phase("reference"):
        reference = make_reference(attached)
    for name, clip in bake.voices.items():
        print(f"voice {name}", file=sys.stderr)
        with metrics.phase("conditionals"):
            synthesizer.voices[name] = prepare_voice(upstream, clip)
    strategy = ChatterboxWarmupStrategy(
        levels=bake.levels,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
        metrics=metrics,
    )
    strategy.perform_full_warmup(upstream)
    record = WarmupRecord(
        levels=strategy.levels,
        texts=TEXTS if 2 in bake.levels else (),
        reference=reference,
        sources=sources,
        parameters=bake.parameters(),
    )
    save_warmup_cache(attached, Path(output), families=bake.families, record=record)
    return {
        "metrics": metrics.to_dict(),
        "resident_bytes": peak_resident_bytes(),
        "device_bytes": torch.cuda.max_memory_reserved(bake.device) if bake.device.startswith("cuda") else 0,
    }


if __name__ == "__main__":
    report(run)
