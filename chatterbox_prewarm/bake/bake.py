"""Bake: create a warm state on the machine that it is for.

A bake runs two or three fresh processes. If the profile needs compiled code, the compile process makes it. The warm-up
process starts with nothing but that code, warms the model up and saves every family. The proof process starts from the
saved state, repeats a synthesis of the warm-up process, and must not miss once. The state saves the
difference between their times. It appears at its path atomically, or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.costs import measurements, merge_logs, with_costs
from chatterbox_prewarm.errors import BadInputError, NotWarmError, from_os_error
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES, MAY_BE_EMPTY, applicable
from chatterbox_prewarm.model.chatterbox_imports import require_upstream
from chatterbox_prewarm.model.clips import check_clip
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.model.warmup.settings import SWITCH, check_levels, switched_off
from chatterbox_prewarm.proof.checks import audio_check, counter_checks
from chatterbox_prewarm.proof.prove import proof_command
from chatterbox_prewarm.state.manifest import MANIFEST_NAME, Manifest
from chatterbox_prewarm.state.manifest_file import parse_manifest, read_manifest_bytes, write_manifest
from chatterbox_prewarm.state.places import check_apart, check_cache_place, check_state_place
from chatterbox_prewarm.state.provenance import check_base_image
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.atomic_files import put_in_place, remove, seal, staging_folder
from chatterbox_prewarm.system.cpus import usable_cpus
from chatterbox_prewarm.system.gpu_stand_in import READS_ZEROS, check_torch, make_stand_in
from chatterbox_prewarm.system.gpu_targets import check_target, find_target
from chatterbox_prewarm.system.json_subprocess import parse_report, run_module
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.system.paths import (
    BAKE,
    BYTECODE_FOLDER,
    COMPILED_FOLDER,
    STAND_IN_FOLDER,
    make_cache,
    require_execution,
)
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import read_variant, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from chatterbox_prewarm.bake.options import BakeOptions

logger = logging.getLogger(__name__)


def bake(options: BakeOptions, *, progress: Callable[[str], None] = logger.info) -> Manifest:
    """Bake a warm state and replace the state that is at its path.

    Args:
        options: of the bake.
        progress: called with one line for each step.

    Raises:
        WeightsError: the weights differ from their record.
        BadInputError: a clip, a name or a path cannot be used, or another process is using one of the paths.
        ModelError: the warm-up failed.
        NotWarmError: a start from the new state had a miss; the new state was discarded.
    """
    options = check_options(options)
    progress("verifying the weights")
    verify(options.weights)
    return bake_checked(options, progress=progress)


def bake_checked(options: BakeOptions, *, progress: Callable[[str], None], packages_of: Path | None = None) -> Manifest:
    """Do what `bake` does, with options that `check_options` returned and weights that were verified.

    Args:
        options: of the bake.
        progress: called with one line for each step.
        packages_of: a state with the packages that this bake would compile.
    """
    make_cache(options.cache)
    options = replace(options, weights=options.weights.resolve(), cache=options.cache.resolve())
    if _compiles(options):
        require_execution(options.cache)
    warm = options.warm
    try:
        warm.parent.mkdir(parents=True, exist_ok=True)
        with (
            exclusive_lock(warm),
            exclusive_lock(options.cache / BAKE),
            staging_folder(warm) as staging,
            _private_folder(options.cache / COMPILED_FOLDER) as compiled,
            _stand_in(options) as environment,
        ):
            manifest = _bake_into(staging, compiled, options, environment, progress, packages_of)
            seal(staging)
            put_in_place(staging, warm)
    except OSError as error:
        raise from_os_error(error, "baking the warm state") from error
    return manifest


def check_options(options: BakeOptions) -> BakeOptions:
    """Check the options before anything slow; return them with absolute paths and only the families that are needed.

    Raises:
        BadInputError: naming the first option that cannot be used.
        ModelError: the installed torch cannot compile for the target.
    """
    if options.voices and "conditionals" not in options.families:
        raise BadInputError(
            "voices are stored in the family 'conditionals', which is left out",
            next_step="leave out --voice, or bake with that family",
        )
    if switched_off():
        raise BadInputError(
            f"{SWITCH} switches the warm-up off, and a bake needs a warm-up", next_step=f"unset {SWITCH}"
        )
    require_upstream()
    voices = {check_voice_name(name): clip.resolve() for name, clip in options.voices.items()}
    options = replace(
        options,
        warm=Path(os.path.abspath(options.warm)),  # noqa: PTH100 - a link must stay a link
        voices=voices,
        families=_needed_families(options),
        target=_check_target(options),
        levels=check_levels(options.levels),
    )
    check_apart({"--warm": options.warm, "--weights": options.weights, "--cache": options.cache})
    check_state_place(options.warm)
    check_cache_place(options.cache, warm=options.warm, weights=options.weights)
    if voices:
        longer_than = read_variant(options.weights).clip_seconds
        for name, clip in voices.items():
            check_clip(clip, name=name, longer_than=longer_than)
    check_base_image()
    return options


def _check_target(options: BakeOptions) -> str | None:
    """Refuse what cannot be compiled without a GPU. Return the full name of the target, or None without one.

    Raises:
        BadInputError: the target is unknown, or does not go with the device or the profile.
        ModelError: the installed torch cannot compile for the target.
    """
    if options.target is None:
        return None
    target = check_target(options.target, options.device, options.how.profile, options.how.t3_dtype)
    if "conditionals" not in options.families:
        raise BadInputError(
            "a bake without the GPU cannot leave out the voices, because it starts from them",
            next_step="leave out --without conditionals",
        )
    check_torch(target)
    return target.name


def _needed_families(options: BakeOptions) -> tuple[str, ...]:
    """Return the requested families that the model uses.

    Raises:
        BadInputError: a family is unknown, or one that the profile needs is left out.
    """
    requested, profile = options.families, options.how.profile
    used = applicable(profile, options.device)
    if options.target is not None:
        used = tuple(name for name in used if name not in MAY_BE_EMPTY)  # the driver's own cache
    if unknown := set(requested) - set(FAMILIES):
        raise BadInputError(
            f"there is no cache family {min(unknown)!r}", next_step=f"choose from: {', '.join(FAMILIES)}"
        )
    if left_out := [name for name in used if name in COMPILED and name not in requested]:
        raise BadInputError(
            f"the profile {profile!r} needs the family {left_out[0]!r}, which is left out",
            next_step="bake with that family, or with --profile eager",
        )
    return tuple(name for name in used if name in requested)


def _compiles(options: BakeOptions) -> bool:
    return any(name in COMPILED for name in options.families)


@contextlib.contextmanager
def _stand_in(options: BakeOptions) -> Iterator[Mapping[str, str]]:
    """Yield the environment variables that show the target to a process; none without a target."""
    if options.target is None:
        yield {}
        return
    with _private_folder(options.cache / STAND_IN_FOLDER) as folder:
        yield make_stand_in(find_target(options.target), folder)


def _bake_into(
    staging: Path,
    compiled: Path,
    options: BakeOptions,
    environment: Mapping[str, str],
    progress: Callable[[str], None],
    packages_of: Path | None,
) -> Manifest:
    """Run the processes of the bake; `staging` holds the finished state afterwards.

    With a stand-in for a GPU, the processes run without computing anything there. So the packages are loaded and every
    region is called, but nothing is spoken.

    Raises:
        ModelError: a process failed.
        NotWarmError: the proof process had a miss.
    """
    compile_log: dict[str, Any] | None = None
    if packages_of is not None:
        compile_log = _copy_packages(packages_of, compiled)
    elif _compiles(options):
        progress("compiling the regions, in a separate process")
        compile_log = _run_process("compile_process", options, staging, compiled, environment)["metrics"]
    computes_nothing = options.target is not None
    if computes_nothing:
        environment = {**environment, **READS_ZEROS}
    progress(f"cold start, {'' if options.target else 'warm-up '}and save, in a separate process")
    cold = _run_process("warm_process", options, staging, compiled, environment)
    progress("start from the new state, in another process")
    _empty_cache(options.cache)
    proof = run_process(proof_command(staging, options.weights, options.cache), env={**os.environ, **environment})
    warm = parse_report(proof.stdout, proof.returncode)
    left_out = frozenset(applicable(options.how.profile, options.device)) - set(options.families)
    if computes_nothing:
        left_out -= set(MAY_BE_EMPTY)
    checks = counter_checks(warm, left_out=left_out)
    if not computes_nothing:
        checks.append(audio_check(warm))
    if failed := [f"{check.name} (seen: {check.seen})" for check in checks if not check.passed]:
        raise NotWarmError(
            f"a start from the new state is not warm: {'; '.join(failed)}",
            next_step="this is a fault of the bake, not of your input; please report it with this message",
        )
    manifest = parse_manifest(read_manifest_bytes(staging), source=str(staging / MANIFEST_NAME))
    manifest = with_costs(manifest, merge_logs(cold["metrics"], compile_log), warm["metrics"])
    if not computes_nothing:  # else the seconds and bytes are not those of a start on the GPU
        manifest = replace(manifest, measured=measurements(manifest, cold, warm))
    write_manifest(manifest, staging)
    return manifest


def _copy_packages(state: Path, compiled: Path) -> dict[str, Any]:
    """Copy the packages of a state. Return what `merge_logs` needs of the log of the process that compiled them."""
    shutil.copytree(state / "aot", compiled / "aot")
    entry = State.read(state).manifest.family("aot")
    return {"phases": [{"name": "aot make", "seconds": entry.seconds_spent if entry else 0.0}], "timers": {}}


def _run_process(
    module: str, options: BakeOptions, output: Path, compiled: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run a process of the bake with empty caches and without bytecode, so that the costs of both are measured."""
    _empty_cache(options.cache)
    # In the cache, which this bake has locked. The next bake removes the files that a killed one leaves there.
    bytecode = options.cache / BYTECODE_FOLDER
    shutil.rmtree(bytecode, ignore_errors=True)
    environment = {**os.environ, **environment, "PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if module == "compile_process":  # all others use one thread, like a start
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(usable_cpus()))
    arguments = {"options": options.to_dict(), "output": str(output), "compiled": str(compiled)}
    try:
        return run_module(f"chatterbox_prewarm.bake.{module}", arguments, env=environment)
    finally:
        shutil.rmtree(bytecode, ignore_errors=True)


@contextlib.contextmanager
def _private_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder for compiled code. This bake runs that code, so only this user can enter the folder."""
    remove(folder)  # of a killed bake
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)


def _empty_cache(cache: Path) -> None:
    for name in FAMILIES:
        shutil.rmtree(cache / name, ignore_errors=True)
