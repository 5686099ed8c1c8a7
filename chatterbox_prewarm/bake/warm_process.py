"""The warm-up process of a bake: start with nothing but compiled code, add the voices, warm up, save."""

from __future__ import annotations

import importlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.families.registry import BYTECODE
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.reference_clip import reference_clip
from chatterbox_prewarm.proof.probes import peak_resident_bytes
from chatterbox_prewarm.start.attach import attach_baked
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.start.upstream import attach_upstream
from chatterbox_prewarm.start.voices import make_missing_voices
from chatterbox_prewarm.system import metrics as metrics_module
from chatterbox_prewarm.system.gpu_stand_in import stand_in_target
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.progress import detail

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.start.attach import Attached


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

    metrics, synthesizer = attached.metrics, attached.synthesizer
    # Before upstream's model is imported, to learn which modules a start imports that finds its voices in the state.
    with tempfile.TemporaryDirectory() as folder:
        save_voice(placeholder_voice(), Path(folder) / "voice.safetensors")
        voice = load_voice(Path(folder) / "voice.safetensors", device=bake.device)
    Synthesizer(synthesizer.model, {DEFAULT_VOICE: voice}).check()
    _read_all_languages(synthesizer.model)
    importlib.import_module("soundfile")  # a start with `--voice` checks the clips
    sources = BYTECODE.start_sources()
    computes = stand_in_target() is None
    if computes:
        upstream = make_missing_voices(synthesizer, attached.prepared, {})
        upstream = upstream or attach_upstream(attached.prepared, lean=synthesizer.model)
    else:
        upstream = _make_voice_on_cpu(attached)
    with metrics.phase("reference"):
        reference = make_reference(attached)
    for name, clip in bake.voices.items():
        detail(f"voice {name}")
        with metrics.phase("conditionals"):
            synthesizer.voices[name] = prepare_voice(upstream, clip)
    # Only a GPU chooses kernels by the length of a text. On a CPU, the reference has run what another text would run.
    texts = TEXTS if bake.device.startswith("cuda") else ()
    strategy = ChatterboxWarmupStrategy(levels=bake.levels, texts=texts, progress=detail, metrics=metrics)
    if computes:
        strategy.perform_full_warmup(upstream)
    record = WarmupRecord(
        levels=strategy.levels if computes else (),
        texts=texts if computes and 2 in strategy.levels else (),
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


def _read_all_languages(model: Model) -> None:
    """Turn a text in each language into tokens, because an image must have all data that its languages need.

    Raises:
        WeightsError, ModelError: data or a package is missing or damaged.
        BadInputError: the tokenizer does not know a language.
    """
    for language, text in model.variant.samples.items():
        model.text.check(text, language)
        model.text_tokens(text, language)


def _make_voice_on_cpu(attached: Attached) -> ChatterboxTTS:
    """Add the built-in voice to a model on a stand-in for a GPU, which computes nothing. Return upstream's model."""
    from chatterbox_prewarm.model.voices import prepare_voice, read_builtin_voice

    upstream = attach_upstream(attached.prepared)
    with attached.metrics.phase("conditionals"), reference_clip() as clip:
        made = prepare_voice(upstream, clip)  # also if the checkpoint has a voice, for Numba's cache
        attached.synthesizer.voices[DEFAULT_VOICE] = read_builtin_voice(attached.prepared.options.weights) or made
    attached.metrics.mark("attached")
    return upstream


if __name__ == "__main__":
    report(run)
