"""Bake: produce a warm state on the machine that it is for.

Two fresh processes, or three. Where the profile compiles, the first does only that. The next starts cold but for what
was compiled, warms the model up and saves every family; the last starts from what was saved, repeats the reference
synthesis of the one before and must not miss once. What the others paid more than the last is what the state saves. The
state appears under its name all at once, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.request import BakeRequest
from chatterbox_prewarm.errors import BadInputError, ModelError, NotWarmError, from_os_error
from chatterbox_prewarm.families.registry import COMPILED, FAMILIES, applicable
from chatterbox_prewarm.model.clips import check_clip
from chatterbox_prewarm.model.profiles import default_execution
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.model.warmup.levels import LEVELS, SWITCH, check_levels, switched_off
from chatterbox_prewarm.proof.checks import counter_checks
from chatterbox_prewarm.proof.proof_command import proof_command
from chatterbox_prewarm.state.manifest import MANIFEST_NAME, Measurements, read_manifest, write_manifest
from chatterbox_prewarm.state.provenance import check_base_image
from chatterbox_prewarm.system.atomic_files import put_in_place, seal, staging_folder
from chatterbox_prewarm.system.json_subprocess import parse_report
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.system.paths import BAKE, make_cache, require_execution
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from chatterbox_prewarm.model.profiles import Execution
    from chatterbox_prewarm.state.manifest import FamilyEntry, Manifest

logger = logging.getLogger(__name__)


def bake(
    weights: Path,
    warm: Path,
    *,
    cache: Path,
    device: str = "cpu",
    execution: Execution | None = None,
    levels: Sequence[int] = LEVELS,
    voices: Mapping[str, Path] | None = None,
    families: Sequence[str] = tuple(FAMILIES),
    progress: Callable[[str], None] = logger.info,
) -> Manifest:
    """Bake a warm state into `warm`, replacing one that is there.

    Args:
        weights: a complete checkpoint; its digests are verified first.
        warm: where the state goes. The folder beside it is used while it is in the making.
        cache: the cache directory, the same path as at run time. What it holds of the families is removed.
        device: to warm up on.
        execution: how the model is to execute; by default what is best for the device.
        levels: of the warm-up.
        voices: names and reference clips to bake beside the built-in voice.
        families: which cache families to bake.
        progress: called with one line for each step.

    Raises:
        WeightsError: the weights are not as recorded.
        BadInputError: a clip or a name cannot be used, a place cannot be written, or another process is at work there.
        ModelError: the warm-up failed.
        NotWarmError: a start from the new state missed; nothing was put in place.
    """
    warm = Path(os.path.abspath(warm))  # noqa: PTH100 - a link must stay visible as one
    clips = {check_voice_name(name): str(path.resolve()) for name, path in (voices or {}).items()}
    execution = execution or default_execution(device)
    wanted = _wanted(families, execution.profile, device)
    compiles = any(name in COMPILED for name in wanted)
    if clips and "conditionals" not in families:
        raise BadInputError(
            "voices are kept in the family 'conditionals', which is left out",
            next_step="leave out --voice, or bake with that family",
        )
    if switched_off():
        raise BadInputError(f"{SWITCH} switches the warm-up off, and a bake is a warm-up", next_step=f"unset {SWITCH}")
    levels = check_levels(levels)
    _check_target(warm)
    for name, clip in clips.items():
        check_clip(Path(clip), name=name)  # before minutes of compiling
    check_base_image()
    progress("verifying the weights")
    verify(weights)
    make_cache(cache)
    if compiles:
        require_execution(cache)
    try:
        warm.parent.mkdir(parents=True, exist_ok=True)
        with (
            exclusive_lock(warm),
            exclusive_lock(cache / BAKE),
            staging_folder(warm) as staging,
            _folder_for_compiled(cache.resolve()) as made,
        ):
            request = BakeRequest(
                weights=str(weights.resolve()),
                cache=str(cache.resolve()),
                output=str(staging),
                made=str(made),
                device=device,
                execution=asdict(execution),
                levels=levels,
                voices=clips,
                families=wanted,
            )
            compiled: dict[str, Any] = {}
            if compiles:
                progress("compiling the regions, in a process of its own")
                compiled = _run_child("compile_process", request)
            progress("cold start, warm-up and save, in a process of its own")
            cold = _run_child("warm_process", request)
            progress("start from the new state, in another process")
            _empty_cache(cache)
            trial = run_process(proof_command(staging, weights.resolve(), cache.resolve()))
            warm_run = parse_report(trial.stdout, trial.returncode)
            left_out = set(applicable(execution.profile, device)) - set(wanted)
            checks = counter_checks(warm_run, left_out=frozenset(left_out))
            failed = [f"{check.name} (seen: {check.seen})" for check in checks if not check.passed]
            if warm_run["audio"]["pcm_sha256"] != warm_run["audio"]["expected_pcm_sha256"]:
                failed.append("the audio is the bake's own (seen: it differs)")
            if failed:
                raise NotWarmError(
                    f"a start from the new state is not warm: {'; '.join(failed)}",
                    next_step="this is a fault of the bake, not of your input; please report it with this message",
                )
            before = _added(cold["metrics"], compiled.get("metrics"))
            manifest = _with_costs(read_manifest(staging), before, warm_run["metrics"])
            manifest = replace(manifest, measured=_measured(manifest, cold, warm_run))
            write_manifest(manifest, staging)
            seal(staging)
            put_in_place(staging, warm)
    except OSError as error:
        raise from_os_error(error, "baking the warm state") from error
    return manifest


def _wanted(families: Sequence[str], profile: str, device: str) -> tuple[str, ...]:
    """Those of `families` that a model which executes so has anything of.

    Raises:
        BadInputError: one is unknown, or one is left out that the profile stands on.
    """
    if unknown := set(families) - set(FAMILIES):
        raise BadInputError(
            f"there is no cache family {min(unknown)!r}", next_step=f"choose from: {', '.join(FAMILIES)}"
        )
    if unmade := [name for name in applicable(profile, device) if name in COMPILED and name not in families]:
        raise BadInputError(
            f"the profile {profile!r} stands on the family {unmade[0]!r}, which is left out",
            next_step="bake with that family, or with --profile eager",
        )
    return tuple(name for name in applicable(profile, device) if name in families)


def _check_target(warm: Path) -> None:
    """Refuse to replace anything but a warm state.

    Raises:
        BadInputError: the target is a file, or a folder with something else in it.
    """
    if warm.is_symlink() or (warm.exists() and not warm.is_dir()):
        raise BadInputError(f"{warm} is no directory", next_step="name another place with --warm")
    if warm.is_dir() and any(warm.iterdir()) and not _looks_like_a_state(warm):
        raise BadInputError(
            f"{warm} holds something else than a warm state, and a bake would replace it",
            next_step="name an empty or a new directory with --warm",
        )


def _looks_like_a_state(directory: Path) -> bool:
    """Whether a folder holds a manifest of ours and nothing that it does not name; damage and age do not matter."""
    try:
        raw = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        families = {entry["name"] for entry in raw["families"]}
        ours = {"schema", "set_digest", "weights"} <= raw.keys()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    return ours and {path.name for path in directory.iterdir()} <= {MANIFEST_NAME, *families}


def _run_child(module: str, request: BakeRequest) -> dict[str, Any]:
    """Run a process of the bake with empty caches and no bytecode to use, so that the cost of both is seen."""
    _empty_cache(Path(request.cache))
    # In the cache, which this bake holds: what a killed one leaves there is removed by the next.
    bytecode = Path(request.cache) / "bake-bytecode"
    shutil.rmtree(bytecode, ignore_errors=True)
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if module == "compile_process":  # in all others one thread, which is also what a start has
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        finished = run_process(
            [sys.executable, "-m", f"chatterbox_prewarm.bake.{module}", json.dumps(asdict(request))], env=environment
        )
    finally:
        shutil.rmtree(bytecode, ignore_errors=True)
    if finished.returncode < 0:
        raise ModelError(
            f"the process {module} was ended by signal {-finished.returncode}",
            next_step="if it was out of memory, give the machine more; see its output above",
        )
    return parse_report(finished.stdout, finished.returncode)


@contextlib.contextmanager
def _folder_for_compiled(cache: Path) -> Iterator[Path]:
    """A new folder for what is compiled, which this bake also runs: only this user can enter it.

    One that a killed bake left behind goes first.
    """
    folder = cache / "bake-made"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _empty_cache(cache: Path) -> None:
    for name in FAMILIES:
        shutil.rmtree(cache / name, ignore_errors=True)


def _added(cold: dict[str, Any], compiled: dict[str, Any] | None) -> dict[str, Any]:
    """The log of the cold process with what the compiled families cost in the process before it."""
    if compiled is None:
        return cold
    names = {timer for name in COMPILED for timer in FAMILIES[name].timers}
    timers = {name: value for name, value in compiled["timers"].items() if name in names}
    return {
        "phases": [*cold["phases"], *(phase for phase in compiled["phases"] if phase["name"] in names)],
        "timers": {name: cold["timers"].get(name, 0.0) + timers.get(name, 0.0) for name in {*cold["timers"], *timers}},
    }


def _measured(manifest: Manifest, cold: dict[str, Any], warm: dict[str, Any]) -> Measurements:
    """What the two processes took as a whole. Packages apart, a start without them compiles if it can."""
    anew = sum(family.seconds_spent for family in manifest.families if family.name in COMPILED and family.name != "aot")
    return Measurements(
        cold_seconds=round(cold["metrics"]["marks"]["attached"] + anew, 3),
        ready_seconds=round(warm["metrics"]["marks"]["ready"], 3),
        resident_bytes=cold["resident_bytes"],
        device_bytes=cold["device_bytes"],
    )


def _with_costs(manifest: Manifest, cold: dict[str, Any], warm: dict[str, Any]) -> Manifest:
    """Fill in what each family cost and saves, from the logs of the two processes."""

    def seconds(log: dict[str, Any], entry: FamilyEntry) -> float:
        names = FAMILIES[entry.name].timers
        phases = sum(phase["seconds"] for phase in log["phases"] if phase["name"] in names)
        return float(phases + sum(value for name, value in log["timers"].items() if name in names))

    return replace(
        manifest,
        families=tuple(
            replace(
                entry,
                seconds_spent=round(seconds(cold, entry), 3),
                seconds_saved=round(seconds(cold, entry) - seconds(warm, entry), 3),
            )
            for entry in manifest.families
        ),
    )
