"""Bake several states into one folder: one for each model, and for each of several GPUs that this machine lacks."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.bake.bake import bake_checked, check_options
from chatterbox_prewarm.errors import from_os_error
from chatterbox_prewarm.state.places import check_apart, check_states_place
from chatterbox_prewarm.state.state import state_key
from chatterbox_prewarm.system.atomic_files import put_in_place, staging_folder
from chatterbox_prewarm.system.gpu_targets import check_targets, find_target
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.weights.checkpoints import checkpoints_in
from chatterbox_prewarm.weights.record import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chatterbox_prewarm.bake.options import BakeOptions
    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.system.gpu_targets import GpuTarget

logger = logging.getLogger(__name__)


def bake_several(
    options: BakeOptions, targets: Sequence[str] = (), *, progress: Callable[[str], None] = logger.info
) -> dict[str, Manifest]:
    """Bake a state for each checkpoint and target into the folder `options.warm`, next to the states that it has.

    The folder changes only after the last bake. Then each state replaces a state with the same key. Targets that differ
    only in name and memory, such as H100 80GB HBM3 and H200, share the packages.

    Args:
        options: of the bakes; `weights` has one or several checkpoints, and `target` is not used.
        targets: GPUs that this machine lacks, as `find_target` takes them; none to bake for this machine.
        progress: called with one line for each step.

    Returns:
        the manifests by the names of the states' directories, which are the states' keys.

    Raises:
        BadInputError: a target is unknown or given twice, or the folder is a state or contains something else.
        PrewarmError: see `bake`.
    """
    folder = Path(os.path.abspath(options.warm))  # noqa: PTH100 - a link must stay a link
    how = options.how
    chosen = check_targets(targets, options.device, how.profile, how.t3_dtype)
    names = [target.name for target in chosen] if chosen else [None]
    checkpoints = checkpoints_in(options.weights)
    checked = [
        check_options(replace(options, weights=weights, warm=folder / "new", target=name))
        for weights, name in product(checkpoints.values(), names)
    ]
    check_apart({"--warm": folder, "--weights": options.weights, "--cache": options.cache})
    check_states_place(folder)
    progress("verifying the weights")
    for weights in checkpoints.values():
        verify(weights)
    made: dict[str, Manifest] = {}
    compiled: dict[tuple[Path, GpuTarget], Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder), staging_folder(folder) as staging:
            for each in checked:
                kind = _kind(each)
                shared = compiled.get(kind) if kind else None
                progress(f"{_title(each, checkpoints)}{', with the same packages' if shared else ''}")
                new = replace(each, warm=staging / "new")
                manifest = bake_checked(new, progress=progress, packages_of=shared)
                made[key := state_key(manifest)] = manifest
                place = new.warm.rename(staging / key)
                if kind:
                    compiled[kind] = place
            for key in made:
                put_in_place(staging / key, folder / key)
    except OSError as error:
        raise from_os_error(error, "baking the warm states") from error
    return made


def _kind(options: BakeOptions) -> tuple[Path, GpuTarget] | None:
    """Return the inputs of the packages of a bake for a target; None for a bake for this machine."""
    if options.target is None:
        return None
    return options.weights, replace(find_target(options.target), gpu="", memory=0)


def _title(options: BakeOptions, checkpoints: Mapping[str, Path]) -> str:
    """Name the model, if there are several, and the target of a bake."""
    models = [name for name, path in checkpoints.items() if path == options.weights and len(checkpoints) > 1]
    targets = [] if options.target is None else [options.target]
    return ", ".join([*(f"model {name}" for name in models), *(f"target {name}" for name in targets)])
