"""Prepare: the first step of a start, before torch, Triton or Numba is imported.

A start has two steps because these packages read their cache settings when they are imported. `prepare` runs before
that, `attach` afterwards. A start that cannot use a part of the state says why, counts a miss and runs cold, unless the
policy forbids it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError, IntegrityError, from_os_error
from chatterbox_prewarm.families.base import FamilyContext
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES, applicable
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.start.usable import possible_execution, usable_families
from chatterbox_prewarm.state.compatibility import machine_facts
from chatterbox_prewarm.state.places import check_cache_place
from chatterbox_prewarm.state.selection import Request, select_state
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.locks import share_lock
from chatterbox_prewarm.system.metrics import StartMetrics
from chatterbox_prewarm.system.paths import BAKE, make_cache, model_environment
from chatterbox_prewarm.weights.record import check_quickly, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.state.selection import Selection
    from chatterbox_prewarm.state.state import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The result of `prepare`.

    Attributes:
        options: the options of the start, with the absolute path of the cache.
        state: the warm state in use, or None.
        folders: the folder of each usable family. Its files were verified and it fits this machine.
        execution: how the model runs.
    """

    options: StartOptions
    state: State | None
    folders: Mapping[str, Path]
    execution: Execution
    metrics: StartMetrics = field(compare=False)

    @property
    def usable(self) -> tuple[str, ...]:
        """Names of the families that can be used."""
        return tuple(self.folders)

    def family_context(self, voices: dict[str, Conditionals], *, device: str | None = None) -> FamilyContext:
        """Make the context that families attach to, for a model on `device`; by default on the device of the start."""
        return FamilyContext(
            voices=voices, cache=self.options.cache, metrics=self.metrics, device=device or self.options.device
        )


def prepare(options: StartOptions, *, metrics: StartMetrics | None = None) -> Prepared:
    """Verify the warm state, check that it fits, fill the caches and set the environment.

    Args:
        options: of the start.
        metrics: the event log and counters; new ones by default.

    Raises:
        WeightsError: the weights are missing, or a file is truncated.
        FingerprintMismatchError: under "require", a family or every one of several states does not fit.
        IntegrityError: under "require", the state is damaged or not trusted.
        BadInputError: the device, profile or key is invalid, the cache cannot be written or is refused by
            `check_cache_place`, or a bake is using it.
        ModelError: this machine has no GPU.
    """
    metrics = metrics or StartMetrics()
    # Compilers store the path of the cache in their files, so it must always be the same.
    options = replace(options, cache=options.cache.resolve(), device=check_device(options.device))
    device, cache = options.device, options.cache
    execution = options.execution or Execution(profile=options.profile or "eager", graphs=device.startswith("cuda"))
    state: State | None = None
    folders: dict[str, Path] = {}
    with metrics.phase("prepare"):
        check_quickly(options.weights, read_record(options.weights))  # no policy works without weights
        check_cache_place(cache, warm=options.warm, weights=options.weights)
        make_cache(cache)
        share_lock(cache / BAKE)  # a bake would empty the cache
        if options.policy == "off":
            folders = _compiled_folders(options.compiled, applicable(execution.profile, device), metrics)
        else:
            selection = _select(options, metrics)
            if selection is not None:
                state = selection.state
                metrics.state, metrics.cross_compiled = state.key, state.manifest.cross_compiled
                if metrics.cross_compiled:
                    logger.warning("the state %s was compiled without this GPU", state.key)
                baked = state.manifest.execution
                execution = baked if options.profile is None else replace(baked, profile=options.profile)
                wanted = applicable(execution.profile, device)
                usable = usable_families(selection, wanted, options, metrics)
                folders = {name: state.path / name for name in usable}
            execution = possible_execution(execution, folders, options, metrics)
        metrics.profile = execution.profile
        _fill_caches(folders, execution.profile, options, metrics)
        _warn_if_late(metrics)
    return Prepared(options=options, state=state, folders=folders, execution=execution, metrics=metrics)


def _select(options: StartOptions, metrics: StartMetrics) -> Selection | None:
    """Select the state to use. Without one, count a miss and return None if the policy allows that.

    Raises:
        IntegrityError: under "require", there is no trusted and undamaged state.
        FingerprintMismatchError: under "require", no state of several fits, or the only one is for another variant.
        BadInputError: the key or the digest is invalid.
    """
    strict = options.policy == "require"
    facts = machine_facts(options.weights, options.cache, options.device)
    request = Request(device=options.device, profile=options.profile, strict=strict, trust=options.trust)
    try:
        selection = select_state(options.warm, lambda _: facts, request)
        selection.state.check_sealed(strict=strict)
    except (IntegrityError, FingerprintMismatchError, OSError) as error:
        found = from_os_error(error, "reading the warm state") if isinstance(error, OSError) else error
        if strict:
            if found is error:
                raise
            raise found from error
        metrics.miss("all", found.message, next_step=found.next_step)
        return None
    if not selection.compatibility.fits:  # a state that cannot be read might have been the better one
        for sentence, next_step in selection.unusable.items():
            metrics.miss("states", sentence, next_step=next_step)
    return selection


def _compiled_folders(compiled: Path | None, wanted: Sequence[str], metrics: StartMetrics) -> dict[str, Path]:
    """Return the folders that a bake compiled before this start; every other family is a miss."""
    folders = {name: compiled / name for name in COMPILED if compiled is not None and (compiled / name).is_dir()}
    for name in wanted:
        if name not in folders:
            metrics.miss(name, "the policy is off", next_step="start with the policy fallback or require")
    return folders


def _fill_caches(folders: Mapping[str, Path], profile: str, options: StartOptions, metrics: StartMetrics) -> None:
    """Copy what compilers read from the cache directory, and set the environment variables that name it.

    Raises:
        BadInputError: the cache cannot be written.
    """
    try:
        environment = model_environment(options.cache)
        used = applicable(profile, options.device)
        for name, family in FAMILIES.items():
            environment |= family.environment(options.cache)
            if name in used:
                family.prepare(folders.get(name), options.cache, metrics)
    except OSError as error:
        raise from_os_error(error, f"filling the cache directory {options.cache}") from error
    os.environ.update(environment)


def _warn_if_late(metrics: StartMetrics) -> None:
    for name in ("numba", "torch"):
        if name in sys.modules:
            metrics.miss(
                "late",
                f"{name} was imported before the state was loaded and keeps its cache settings",
                next_step=f"call `load_warmup_cache` or `from_pretrained_with_warmup` before you import {name}",
            )
