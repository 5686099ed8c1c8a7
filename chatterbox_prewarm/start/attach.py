"""Attach: the second step of a start. Import the packages, load the weights, and add the warm state to the model."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.families.registry import FAMILIES
from chatterbox_prewarm.model.chatterbox_imports import free_import_frames, import_chatterbox
from chatterbox_prewarm.model.clips import DEFAULT_VOICE, check_clip
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.system.cpus import usable_cpus
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.start.prepare import Prepared
    from chatterbox_prewarm.system.metrics import StartMetrics


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A loaded model with its warm state, ready to synthesize.

    Attributes:
        synthesizer: the model with its voices.
        prepared: the first step of the start.
        misses, reasons: the misses of the start by family, and why. They do not change afterwards, because a voice that
            is added later imports modules that a start does not need.
    """

    synthesizer: Synthesizer
    prepared: Prepared
    misses: Mapping[str, int]
    reasons: tuple[str, ...]

    @property
    def metrics(self) -> StartMetrics:
        """The event log and counters of this start."""
        return self.prepared.metrics


def load_warmup_cache(  # noqa: PLR0913 - public API: keywords are easier to use than an options object
    warm: str | Path = WARM,
    weights: str | Path = WEIGHTS,
    *,
    cache: str | Path = CACHE,
    device: str = "cpu",
    policy: str = "fallback",
    profile: str | None = None,
    trust: Trust | None = None,
) -> Attached:
    """Load the model with its warm state: `prepare`, then `attach`.

    Call this before torch, Numba or Chatterbox is imported. A package that was imported earlier keeps its own cache
    settings. The arguments are the attributes of `StartOptions`.

    Example:
        >>> attached = load_warmup_cache("warm", "weights", cache="cache")
        >>> speech = attached.synthesizer.synthesize("Hello.", seed=1)

    Raises:
        PrewarmError: as `prepare` and `attach`.
    """
    options = StartOptions(
        warm=Path(warm),
        weights=Path(weights),
        cache=Path(cache),
        device=device,
        policy=policy,
        profile=profile,
        trust=trust or Trust(),
    )
    attached = attach(prepare(options))
    free_import_frames()
    return attached


def attach(
    prepared: Prepared,
    *,
    threads: int | None = None,
    voices: Mapping[str, Path] | None = None,
) -> Attached:
    """Import the model's packages, load the weights, and add the warm state to the model.

    Args:
        prepared: the result of `prepare` in this process.
        threads: CPU threads of torch; by default torch's own number, but at most `usable_cpus`.
        voices: names and reference clips of voices to make at start unless they are baked.

    Raises:
        WeightsError, ModelError: as `model.variants.english.load`.
        IntegrityError: under "require", a package cannot be loaded.
        BadInputError: a clip or a name of a voice is invalid.
    """
    metrics, device = prepared.metrics, prepared.options.device
    clips = {check_voice_name(name): clip for name, clip in (voices or {}).items()}
    for name, clip in clips.items():
        check_clip(clip, name=name)  # before anything slow
    with metrics.phase("import"):
        _import_packages(prepared)
        import torch

        from chatterbox_prewarm.model.synthesis import Synthesizer
        from chatterbox_prewarm.model.t3_backend import keep_backend
        from chatterbox_prewarm.model.variants import english

    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cpus()))
    english.check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # packages and graph captures use the current device
        torch.backends.cudnn.deterministic = True  # a proof compares every bit
    with metrics.phase("weights"):
        model = english.load(prepared.options.weights, device=device)
        keep_backend(model.t3)
    with metrics.phase("regions"):
        _bind_regions(model, prepared)
    context = prepared.family_context(Synthesizer(model, {}))
    for name, family in FAMILIES.items():
        if family.applies(prepared.execution.profile, device):
            family.attach(prepared.folders.get(name), context)
    _make_missing_voices(context.synthesizer, prepared, clips)
    metrics.mark("attached")
    counters = metrics.to_dict()
    return Attached(
        synthesizer=context.synthesizer,
        prepared=prepared,
        misses=counters["misses"],
        reasons=tuple(counters["reasons"]),
    )


def _import_packages(prepared: Prepared) -> None:
    """Import Chatterbox and torch, with the families counting hits and misses from the first import on."""
    for family in FAMILIES.values():
        if family.applies(prepared.execution.profile, prepared.options.device):
            family.watch(prepared.metrics)
    if prepared.execution.profile == "compiled":
        importlib.import_module("torch._dynamo")  # first, or the lean imports keep the compiler out
    import_chatterbox()


def _bind_regions(model: ChatterboxTTS, prepared: Prepared) -> None:
    """Bind the regions of the profile to the model's weights."""
    import torch

    from chatterbox_prewarm.model.regions.pipeline import bind_pipeline

    execution = prepared.execution
    t3_dtype = getattr(torch, execution.t3_dtype)
    # In place, so that memory holds T3 once; upstream's own code cannot run another dtype than the checkpoint's. The
    # frequencies of the rotary embedding stay in float32, because they are too coarse in half the bits.
    for part in (model.t3.tfmr.layers, model.t3.tfmr.norm):
        part.to(t3_dtype)
    graphs = execution.graphs and prepared.options.device.startswith("cuda")
    bind_pipeline(model, _executor(prepared), t3_dtype=t3_dtype, graphs=graphs)


def _executor(prepared: Prepared) -> Executor:
    """Make the executor of the profile."""
    import torch

    from chatterbox_prewarm.model.regions.executors import ahead_of_time_executor, compiled_executor, eager

    strict = prepared.options.policy == "require"
    match prepared.execution.profile:
        case "aot":
            return ahead_of_time_executor(
                prepared.folders.get("aot"),
                torch.device(prepared.options.device),
                prepared.metrics,
                in_graphs=prepared.execution.graphs,
                strict=strict,
            )
        case "compiled":
            return compiled_executor(prepared.metrics, strict=strict or prepared.state is None)
        case _:
            return eager


def _make_missing_voices(synthesizer: Synthesizer, prepared: Prepared, clips: Mapping[str, Path]) -> None:
    """Make the built-in voice and the voices of `clips` that are not baked; each one is a miss."""
    from chatterbox_prewarm.model.voices import builtin_voice, prepare_voice

    model, metrics = synthesizer.model, prepared.metrics
    for name in (DEFAULT_VOICE, *clips):
        if name in synthesizer.voices:
            continue
        metrics.miss("conditionals", f"the voice {name!r} was made at start")
        with metrics.phase("conditionals"):
            synthesizer.voices[name] = (
                prepare_voice(model, clips[name]) if name in clips else builtin_voice(model, prepared.options.weights)
            )
