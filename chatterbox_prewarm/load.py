"""Load: put a warm state in place at the start of a process.

Two steps, because torch and Numba read their cache settings when they are imported: `prepare` runs before any of them
is imported, `attach` after. A start that cannot use a part of the state says why, counts a miss and goes on cold,
unless the policy forbids it.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.choice import choose
from chatterbox_prewarm.clips import DEFAULT_VOICE, check_clip
from chatterbox_prewarm.errors import BadInputError, IntegrityError, from_os_error
from chatterbox_prewarm.families import COMPILED, FAMILIES, Session, applicable
from chatterbox_prewarm.fit import device_kind, facts, possible_execution, usable_families
from chatterbox_prewarm.places import BAKE, CACHE, WARM, WEIGHTS, make_cache, model_environment
from chatterbox_prewarm.profiles import Execution
from chatterbox_prewarm.signing import check_trust
from chatterbox_prewarm.staging import share
from chatterbox_prewarm.states import key_of
from chatterbox_prewarm.text import check_voice_name
from chatterbox_prewarm.warmup.metrics import WarmupMetrics
from chatterbox_prewarm.weights import check_quickly, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.choice import Choice
    from chatterbox_prewarm.manifest import Manifest
    from chatterbox_prewarm.regions.execute import Executor
    from chatterbox_prewarm.synthesis import Synthesizer

POLICIES = ("require", "fallback", "off")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` found.

    Attributes:
        folders: of the usable families by name, each verified and fit for this machine.
        execution: how the model will execute.
    """

    cache: Path
    weights: Path
    device: str
    policy: str
    manifest: Manifest | None
    folders: Mapping[str, Path]
    execution: Execution
    metrics: WarmupMetrics = field(compare=False)

    @property
    def usable(self) -> tuple[str, ...]:
        """The names of the families that can be used."""
        return tuple(self.folders)

    def session(self, synthesizer: Synthesizer, *, sources: frozenset[str] = frozenset()) -> Session:
        """What the families work on, for a model that this start loaded."""
        return Session(
            synthesizer=synthesizer,
            cache=self.cache,
            metrics=self.metrics,
            device=device_kind(self.device),
            sources=sources,
        )


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


def prepare(
    warm: Path,
    weights: Path,
    *,
    cache: Path,
    device: str = "cpu",
    policy: str = "fallback",
    profile: str | None = None,
    execution: Execution | None = None,
    made: Path | None = None,
    metrics: WarmupMetrics | None = None,
    key: Path | None = None,
    signature: Path | None = None,
    expected_digest: str | None = None,
) -> Prepared:
    """Verify the warm state, compare fingerprints, seed the caches and set the environment; imports nothing heavy.

    Args:
        warm: the warm state's directory, or a folder of states, of which the one that fits best is used; never written
            to.
        weights: the checkpoint's directory.
        cache: a writable directory for what compilers and Numba keep.
        device: as upstream takes it, a string.
        policy: "require" raises on any misfit, "fallback" leaves the family out, "off" ignores the state.
        profile: how to execute; by default as the state was baked for, and as written without a state.
        execution: the same with all that goes on top of a profile, for a bake.
        made: what a bake compiled before, a folder for each family; used as if it were baked.
        metrics: the log to write into; a new one by default.
        key: a public key; a state that is not signed with its private one counts as no state.
        signature: where the signature is; beside the state by default.
        expected_digest: of the state's manifest, as for `signing.check_trust`; another state counts as none.

    Raises:
        WeightsError: the weights are missing, or a file of theirs is truncated.
        FingerprintMismatchError: under "require", a family was baked for something else, or each of several states was.
        IntegrityError: under "require", the state or a file of it is not as its manifest says, or is not trusted.
        BadInputError: an unknown policy or profile, or a key that is none, or `cache` cannot be written, or a bake is
            at work in it.
    """
    if policy not in POLICIES:
        raise BadInputError(f"there is no policy {policy!r}", next_step=f"choose one of: {', '.join(POLICIES)}")
    metrics = metrics or WarmupMetrics()
    cache = cache.resolve()  # one name for it, since compilers keep it in what they write
    asked = execution or Execution(profile=profile or "eager", graphs=device.startswith("cuda"))
    with metrics.phase("prepare"):
        check_quickly(weights, read_record(weights))  # no policy can do without weights, so this comes first
        make_cache(cache)
        share(cache / BAKE)  # a bake would empty it
        manifest: Manifest | None = None
        folders: dict[str, Path] = {}
        if policy == "off":
            folders = _compiled_before(made, applicable(asked.profile, device), metrics)
        else:
            known = facts(weights, cache, device)
            trust = {"key": key, "signature": signature, "expected_digest": expected_digest}
            found = _read_state(warm, known, policy, metrics, device=device, profile=profile, trust=trust)
            if found is not None:
                manifest, warm = found.manifest, found.path
                metrics.state = key_of(manifest)
                asked = manifest.execution if profile is None else replace(manifest.execution, profile=profile)
                wanted = applicable(asked.profile, device)
                usable = usable_families(manifest, warm, wanted, known, policy=policy, metrics=metrics)
                folders = {name: warm / name for name in usable}
            asked = possible_execution(asked, folders, device, cache, policy, metrics, by_name=profile is not None)
        metrics.profile = asked.profile
        try:
            environment = model_environment(cache)
            for name, family in FAMILIES.items():
                environment |= family.environment(cache)
                if family.applies(asked.profile, device):
                    family.prepare(folders.get(name), cache, metrics)
        except OSError as error:
            raise from_os_error(error, f"seeding the cache directory {cache}") from error
        os.environ.update(environment)
        _warn_if_late(metrics)
    return Prepared(
        cache=cache,
        weights=weights,
        device=device,
        policy=policy,
        manifest=manifest,
        folders=folders,
        execution=asked,
        metrics=metrics,
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
        from chatterbox_prewarm.models.lean import import_chatterbox

        if prepared.execution.profile == "compiled":
            importlib.import_module("torch._dynamo")  # first, or the lean imports keep the compiler out
        import_chatterbox()
        import torch

        from chatterbox_prewarm.models import english
        from chatterbox_prewarm.models.t3_backend import keep_backend
        from chatterbox_prewarm.regions.bound import bind
        from chatterbox_prewarm.synthesis import Synthesizer

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

    from chatterbox_prewarm.regions.execute import AheadOfTime, Compiled, eager

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


def _compiled_before(made: Path | None, wanted: Sequence[str], metrics: WarmupMetrics) -> dict[str, Path]:
    """What a bake compiled before this start, which has nothing else; all else counts as missed."""
    folders = {name: made / name for name in COMPILED if made is not None and (made / name).is_dir()}
    for name in wanted:
        if name not in folders:
            metrics.miss(name, "the policy is off")
    return folders


def _read_state(
    warm: Path,
    known: Mapping[str, str],
    policy: str,
    metrics: WarmupMetrics,
    *,
    device: str,
    profile: str | None,
    trust: Mapping[str, Any],
) -> Choice | None:
    """The state to use, trusted and of a sound layout; None, and a miss, when the policy lets a start go on without.

    Raises:
        IntegrityError: under "require", there is no such state.
        FingerprintMismatchError: under "require", none of several fits.
        BadInputError: what was given to trust it by cannot be used.
    """
    try:
        found = choose(warm, lambda _: known, device=device, profile=profile, strict=policy == "require")
        check_trust(found.path, **trust)
    except (IntegrityError, OSError) as error:
        if policy == "require":
            if isinstance(error, OSError):
                raise from_os_error(error, "reading the warm state") from error
            raise
        metrics.miss("all", str(error).partition("\n")[0])
        return None
    if not found.fits:  # then a broken one might have done better
        for sentence in found.broken:
            metrics.miss("states", sentence)
    return found


def _warn_if_late(metrics: WarmupMetrics) -> None:
    for name in ("numba", "torch"):
        if name in sys.modules:
            metrics.miss("late", f"{name} was imported before prepare, and keeps the settings that it found")


def _make_missing_voices(synthesizer: Synthesizer, prepared: Prepared, clips: Mapping[str, Path]) -> None:
    """Make the built-in voice and those of `clips` as far as they are not baked; each is a miss."""
    from chatterbox_prewarm.voices import builtin_voice, prepare_voice

    model, metrics = synthesizer.model, prepared.metrics
    for name in (DEFAULT_VOICE, *clips):
        if name in synthesizer.voices:
            continue
        metrics.miss("conditionals", f"the voice {name!r} was made at start")
        with metrics.phase("conditionals"):
            synthesizer.voices[name] = (
                prepare_voice(model, clips[name]) if name in clips else builtin_voice(model, prepared.weights)
            )
