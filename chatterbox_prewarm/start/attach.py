"""Attach: the second step of a start. Import torch, map the weights, and add the warm state to the model.

Upstream's packages are not imported; `start.upstream` does that for what needs them.
"""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import ModelError, first_line
from chatterbox_prewarm.families.registry import FAMILIES
from chatterbox_prewarm.model.chatterbox_imports import free_import_frames, paused_gc
from chatterbox_prewarm.model.clips import check_clip
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.start.ahead import Ahead, create_context, torch_libraries
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.start.voices import make_missing_voices, prepare_voices
from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.system.cpus import usable_cpus
from chatterbox_prewarm.system.gpu_stand_in import stand_in_target
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS, as_path
from chatterbox_prewarm.weights.mapped import CONVERSION, SYNTHESIS, MappedWeights
from chatterbox_prewarm.weights.record import read_variant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.families.base import Family
    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.start.prepare import Prepared
    from chatterbox_prewarm.system.metrics import StartMetrics


#: Packages that a start imports and that do not import torch.
_WITHOUT_TORCH = ("numpy", "tokenizers", "soxr")


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

    @property
    def untried(self) -> bool:
        """True if the model runs code that was compiled on a machine without this GPU, which no one has run."""
        state = self.prepared.state
        return state is not None and state.manifest.cross_compiled and self.prepared.execution.profile == "aot"

    def judged_again(self) -> Attached:
        """Return this start with the misses until now."""
        counters = self.metrics.to_dict()
        return replace(self, misses=counters["misses"], reasons=tuple(counters["reasons"]))


def load_warmup_cache(  # noqa: PLR0913 - public API: keywords are easier to use than an options object
    warm: str | Path = WARM,
    weights: str | Path = WEIGHTS,
    *,
    cache: str | Path = CACHE,
    device: str = "cpu",
    policy: str = "fallback",
    profile: str | None = None,
    trust: Trust | None = None,
    plain_text: Sequence[str] = (),
) -> Attached:
    """Load the model with its warm state: `prepare`, then `attach`.

    Call this before torch, Numba or Chatterbox is imported. A package that was imported earlier keeps its own cache
    settings. The arguments are the attributes of `StartOptions`. Code that was compiled without this GPU runs once
    here; see `checked`.

    Example:
        >>> attached = load_warmup_cache("warm", "weights", cache="cache")
        >>> speech = attached.synthesizer.synthesize("Hello.", seed=1)

    Raises:
        PrewarmError: as `prepare`, `attach` and `checked`.
    """
    options = StartOptions(
        warm=as_path(warm, "the warm state"),
        weights=as_path(weights, "the checkpoint"),
        cache=as_path(cache, "the cache directory"),
        device=device,
        policy=policy,
        profile=profile,
        trust=trust or Trust(),
        plain_text=tuple(plain_text),
    )
    return start(options)


def start(options: StartOptions) -> Attached:
    """Do what `load_warmup_cache` does, with options.

    Raises:
        PrewarmError: as `prepare`, `attach` and `checked`.
    """
    attached = attach(prepare(options))
    if attached.untried:
        with attached.metrics.phase("first synthesis"):
            attached = checked(attached)
    free_import_frames()
    return attached


def attach(
    prepared: Prepared,
    *,
    threads: int | None = None,
    voices: Mapping[str, Path] | None = None,
) -> Attached:
    """Import torch, map the weights, add the warm state to the model, and make the voices that are missing.

    Args:
        prepared: the result of `prepare` in this process.
        threads: CPU threads of torch; by default torch's own number, but at most `usable_cpus`.
        voices: names and reference clips of voices to make at start unless they are baked.

    Raises:
        WeightsError, ModelError: as `model.model.load`.
        IntegrityError: under "require", a package cannot be loaded.
        BadInputError: a clip or a name of a voice is invalid.
    """
    clips = {check_voice_name(name): clip for name, clip in (voices or {}).items()}
    if clips:
        longer_than = read_variant(prepared.options.weights).clip_seconds
        for name, clip in clips.items():
            check_clip(clip, name=name, longer_than=longer_than)  # before anything slow
    attached = attach_baked(prepared, threads=threads)
    make_missing_voices(attached.synthesizer, prepared, clips)
    return attached.judged_again()


def attach_baked(prepared: Prepared, *, threads: int | None = None) -> Attached:
    """Do the same as `attach`, with the baked voices only."""
    metrics, device = prepared.metrics, prepared.options.device
    libraries, weights = torch_libraries(), prepared.options.weights
    mapped = MappedWeights(weights, read_variant(weights), CONVERSION if prepared.options.converts else SYNTHESIS)
    ahead = [libraries, Ahead("read ahead", mapped.read_ahead)]
    if device.startswith("cuda"):
        ahead.append(Ahead("CUDA context", partial(create_context, int(device.partition(":")[2] or 0))))
    with metrics.phase("import"), paused_gc():
        _import_packages(prepared, libraries)
        import torch

        from chatterbox_prewarm.model.model import check_device
        from chatterbox_prewarm.model.synthesis import Synthesizer

    for work in ahead:
        work.wait(metrics)
    set_threads(threads)
    check_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # packages and graph captures use the current device
        torch.backends.cudnn.deterministic = True  # a proof compares every bit
        if stand_in_target() is not None:
            torch.backends.cudnn.enabled = False  # the stand-in has no cuDNN
    with metrics.phase("weights"), paused_gc():
        model = _load(prepared, mapped)
    found: dict[str, Conditionals] = {}
    context = prepared.family_context(found)
    for name, family in lean_families(prepared).items():
        family.attach(prepared.folders.get(name), context)
    return Attached(synthesizer=Synthesizer(model, found), prepared=prepared, misses={}, reasons=()).judged_again()


def checked(attached: Attached) -> Attached:
    """Run every region of a start once. Unless the policy is "require", eager mode replaces a state that fails.

    That can only happen to code that was compiled without the GPU: a bake on the GPU has run its code. The model in
    eager mode is new, so what all texts of a voice share is computed again.

    Raises:
        ModelError: the model does not work here.
    """
    prepared = attached.prepared
    try:
        attached.synthesizer.check()
    except Exception as error:
        if not attached.untried or prepared.options.policy == "require":
            raise
        failure = first_line(error)
    else:
        return attached
    # Outside of the `except` block, because the traceback keeps the model in memory.
    attached = with_eager_regions(attached)
    attached.synthesizer.check()  # it fails too if the error made the GPU unusable for this process
    prepare_voices(attached.synthesizer, attached.prepared)
    prepared.metrics.miss(
        "aot",
        f"code that was compiled without this GPU failed: {failure}; the model runs in eager mode",
        next_step=f"bake on this GPU with `chatterbox-prewarm bake --device {prepared.options.device}`",
    )
    prepared.metrics.profile = "eager"
    return attached.judged_again()


def with_eager_regions(attached: Attached) -> Attached:
    """Load the model of a start again in eager mode, with the same voices.

    The synthesizer of `attached` gets the new model. The old one is freed before, because both may not fit into the
    memory of the GPU.
    """
    import torch

    prepared = replace(attached.prepared, execution=replace(attached.prepared.execution, profile="eager"))
    del attached.synthesizer.model
    gc.collect()
    if prepared.options.device.startswith("cuda"):
        torch.cuda.empty_cache()
    attached.synthesizer.model = _load(prepared)
    return replace(attached, prepared=prepared)


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of torch; by default torch's own number, but at most `usable_cpus`."""
    import torch

    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cpus()))


def lean_families(prepared: Prepared) -> dict[str, Family]:
    """Return the families of this start, without those that only upstream's code uses."""
    return {
        name: family
        for name, family in FAMILIES.items()
        if family.applies(prepared.execution.profile, prepared.options.device) and not family.for_upstream
    }


def _import_packages(prepared: Prepared, libraries: Ahead) -> None:
    """Import torch, with the families counting hits and misses from the first import on.

    The packages that do not need torch come first, while a thread loads its libraries.

    Raises:
        ModelError: a package is missing.
    """
    for family in lean_families(prepared).values():
        family.watch(prepared.metrics)
    try:
        for name in _WITHOUT_TORCH:
            importlib.import_module(name)
        libraries.wait(prepared.metrics)
        importlib.import_module("chatterbox_prewarm.model.synthesis")
    except ImportError as error:
        raise ModelError(
            f"the model's packages cannot be imported: {error}",
            next_step="install the lean extra: pip install 'chatterbox-prewarm[lean]'",
        ) from error


def _load(prepared: Prepared, mapped: MappedWeights | None = None) -> Model:
    """Map the weights, and bind the regions of the profile to them."""
    import torch

    from chatterbox_prewarm.model.model import load

    options, execution = prepared.options, prepared.execution
    return load(
        mapped or options.weights,
        device=options.device,
        executor=_executor(prepared),
        t3_dtype=getattr(torch, execution.t3_dtype),
        graphs=execution.graphs and options.device.startswith("cuda"),
        plain_text=options.plain_text,
        converts=options.converts,
    )


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
