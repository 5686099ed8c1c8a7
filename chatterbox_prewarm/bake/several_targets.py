"""Bake a state for each of several GPUs that this machine does not have."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.bake.bake import bake_checked, check_options
from chatterbox_prewarm.errors import from_os_error
from chatterbox_prewarm.state.places import check_apart, check_states_place
from chatterbox_prewarm.state.state import state_key
from chatterbox_prewarm.system.atomic_files import put_in_place, staging_folder
from chatterbox_prewarm.system.gpu_targets import check_targets, find_target
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.weights.record import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_prewarm.bake.options import BakeOptions
    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.system.gpu_targets import GpuTarget

logger = logging.getLogger(__name__)


def bake_for_targets(
    options: BakeOptions, targets: Sequence[str], *, progress: Callable[[str], None] = logger.info
) -> dict[str, Manifest]:
    """Bake a state for each target into the folder `options.warm`, next to the states that it has already.

    The folder changes only after the last bake. Then each state replaces a state with the same key. Targets that differ
    only in name and memory, such as H100 80GB HBM3 and H200, share the packages.

    Args:
        options: of the bakes; `target` is not used.
        targets: one or more GPUs, as `find_target` takes them.
        progress: called with one line for each step.

    Returns:
        the manifests by the names of the states' directories, which are the states' keys.

    Raises:
        BadInputError: a target is unknown or given twice, or the folder is a state or contains something else.
        PrewarmError: see `bake`.
    """
    folder = Path(os.path.abspath(options.warm))  # noqa: PTH100 - a link must stay a link
    how = options.how
    names = [target.name for target in check_targets(targets, options.device, how.profile, how.t3_dtype)]
    checked = [check_options(replace(options, warm=folder / "new", target=name)) for name in names]
    check_apart({"--warm": folder, "--weights": options.weights, "--cache": options.cache})
    check_states_place(folder)
    progress("verifying the weights")
    verify(options.weights)
    made: dict[str, Manifest] = {}
    compiled: dict[GpuTarget, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder), staging_folder(folder) as staging:
            for each in checked:
                kind = _without_identity(each)
                progress(f"target {each.target}{', with the same packages' if kind in compiled else ''}")
                new = replace(each, warm=staging / "new")
                manifest = bake_checked(new, progress=progress, packages_of=compiled.get(kind))
                made[key := state_key(manifest)] = manifest
                compiled[kind] = new.warm.rename(staging / key)
            for key in made:
                put_in_place(staging / key, folder / key)
    except OSError as error:
        raise from_os_error(error, "baking the warm states") from error
    return made


def _without_identity(options: BakeOptions) -> GpuTarget:
    """Return the target of a bake without the properties that compiled code does not depend on."""
    return replace(find_target(options.target or ""), gpu="", memory=0)
