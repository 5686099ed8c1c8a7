"""Attach a warm state: import the packages, load the weights and bind everything that was baked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.families.registry import FAMILIES
from chatterbox_prewarm.model.clips import DEFAULT_VOICE, check_clip
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.start.prepared import Prepared
    from chatterbox_prewarm.system.metrics import WarmupMetrics


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A loaded model with its warm state: the next thing is a synthesis."""

    synthesizer: Synthesizer
    prepared: Prepared

    @property
    def metrics(self) -> WarmupMetrics:
        """The event log and counters of this start."""
        return self.prepared.metrics


def load_warmup_cache(
    warm: Path = WARM,
    weights: Path = WEIGHTS,
    *,
    cache: Path = CACHE,
    device: str = "cpu",
    policy: str = "fallback",
    profile: str | None = None,
    key: Path | None = None,
    signature: Path | None = None,
    expected_digest: str | None = None,
) -> Attached:
    """Load the model with its persistent warm state: `prepare`, then `attach`.

    Call it before torch, Numba or Chatterbox is imported; what was imported earlier keeps its own cache settings.

    Raises:
        PrewarmError: as `prepare` and `attach` do.
    """
    return attach(
        prepare(
            warm,
            weights,
            cache=cache,
            device=device,
            policy=policy,
            profile=profile,
            key=key,
            signature=signature,
            expected_digest=expected_digest,
        )
    )


def attach(
    prepared: Prepared,
    *,
    threads: int | None = None,
    voices: Mapping[str, Path] | None = None,
) -> Attached:
    """Import the model's packages, load the weights and put the warm state into the model.

    Args:
        prepared: of this process.
        threads: of torch; all that the process may use by default.
        voices: names and reference clips of voices to make now, as far as they are not baked.

    Raises:
        WeightsError, ModelError: as `models.english.load`.
        IntegrityError: under "require", a package cannot be loaded.
        BadInputError: a clip or a name cannot be used.
    """
    metrics, device = prepared.metrics, prepared.device
    voices = {check_voice_name(name): clip for name, clip in (voices or {}).items()}
    for name, clip in voices.items():
        check_clip(clip, name=name)  # before anything slow
    with metrics.phase("import"):
        for family in FAMILIES.values():
            if family.applies(prepared.execution.profile, device):
                family.watch(metrics)
        from chatterbox_prewarm.model.lean_imports import import_chatterbox

        if prepared.execution.profile == "compiled":
            importlib.import_module("torch._dynamo")  # first, or the lean imports keep the compiler out
        import_chatterbox()
        import torch

        from chatterbox_prewarm.model.regions.pipeline import bind
        from chatterbox_prewarm.model.synthesis import Synthesizer
        from chatterbox_prewarm.model.t3_backend import keep_backend
        from chatterbox_prewarm.model.variants import english

    if threads is not None:
        torch.set_num_threads(threads)
    english.check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # what packages and graph captures go by
        torch.backends.cudnn.deterministic = True  # a proof compares to the last bit
    with metrics.phase("weights"):
        model = english.load(prepared.weights, device=device)
        keep_backend(model.t3)
    with metrics.phase("regions"):
        execution = prepared.execution
        # In place, so that T3 is held once; in another type than the checkpoint's, upstream's own code cannot run it.
        # Not the frequencies of the rotary embedding, which are too coarse in half the bits.
        for part in (model.t3.tfmr.layers, model.t3.tfmr.norm):
            part.to(getattr(torch, execution.t3_dtype))
        bind(
            model,
            _executor(prepared),
            t3_dtype=getattr(torch, execution.t3_dtype),
            graphs=execution.graphs and device.startswith("cuda"),
        )
    session = prepared.session(Synthesizer(model, {}))
    for name, family in FAMILIES.items():
        if family.applies(execution.profile, device):
            family.attach(prepared.folders.get(name), session)
    _make_missing_voices(session.synthesizer, prepared, voices)
    metrics.mark("attached")
    return Attached(synthesizer=session.synthesizer, prepared=prepared)


def _executor(prepared: Prepared) -> Executor:
    """What makes the regions under the profile of this start."""
    import torch

    from chatterbox_prewarm.model.regions.executors import AheadOfTime, Compiled, eager

    match prepared.execution.profile:
        case "aot":
            return AheadOfTime(
                prepared.folders.get("aot"),
                torch.device(prepared.device),
                prepared.metrics,
                in_graphs=prepared.execution.graphs,
                strict=prepared.policy == "require",
            )
        case "compiled":
            return Compiled(prepared.metrics, strict=prepared.policy == "require" or prepared.manifest is None)
        case _:
            return eager


def _make_missing_voices(synthesizer: Synthesizer, prepared: Prepared, clips: Mapping[str, Path]) -> None:
    """Make the built-in voice and those of `clips` as far as they are not baked; each is a miss."""
    from chatterbox_prewarm.model.voices import builtin_voice, prepare_voice

    model, metrics = synthesizer.model, prepared.metrics
    for name in (DEFAULT_VOICE, *clips):
        if name in synthesizer.voices:
            continue
        metrics.miss("conditionals", f"the voice {name!r} was made at start")
        with metrics.phase("conditionals"):
            synthesizer.voices[name] = (
                prepare_voice(model, clips[name]) if name in clips else builtin_voice(model, prepared.weights)
            )
