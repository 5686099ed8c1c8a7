"""The executions that a benchmark compares, and the warm state of each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.bench.room import OTHER_BYTES, STATE_BYTES, check_disk, check_memory
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.families.registry import COMPILED
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.profiles import PROFILES, Execution
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS
from chatterbox_prewarm.system.paths import WARM, as_path
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


#: The data types of T3 with half the bytes, and their names in reports.
HALVES = {"bfloat16": "bf16", "float16": "fp16"}


def select_executions(device: str, profiles: Sequence[str]) -> dict[str, Execution]:
    """Return each profile, and the last one in bfloat16. On a GPU, add each profile with graphs, and float16."""
    if unknown := set(profiles) - set(PROFILES):
        raise BadInputError(f"unknown profile {min(unknown)!r}", next_step=f"choose from {', '.join(PROFILES)}")
    found = {profile: Execution(profile=profile) for profile in profiles}
    last, on_gpu = profiles[-1], device.startswith("cuda")
    if on_gpu:
        found |= {f"{profile}, graphs": Execution(profile=profile, graphs=True) for profile in profiles}
        last = f"{last}, graphs"
    for dtype, short in HALVES.items():
        if dtype == "float16" and not on_gpu:
            continue
        found[f"{last}, {short}"] = Execution(profile=profiles[-1], graphs=on_gpu, t3_dtype=dtype)
    return found


def file_name(name: str) -> str:
    """Return the name of an execution as part of a path."""
    return name.replace(", ", "-")


def bake_one(weights: Path, warm: Path, cache: Path, device: str, execution: Execution) -> dict[str, float]:
    """Bake a state for one execution; return the seconds and the sizes."""
    started = time.monotonic()
    manifest = bake(
        BakeOptions(weights=weights, warm=warm, cache=cache, device=device, execution=execution, levels=(1,))
    )
    seconds = time.monotonic() - started
    compiled = [entry for entry in manifest.families if entry.name in COMPILED]
    return {
        "bake_seconds": round(seconds, 1),
        "state_megabytes": round(sum(entry.size for entry in manifest.families) / 1e6, 1),
        "compiled_megabytes": round(sum(entry.size for entry in compiled) / 1e6, 1),
        "compile_seconds": round(sum(entry.seconds_spent for entry in compiled), 1),
    }


def voice_of(state: Path) -> Path:
    """Return the file of the built-in voice of a state; upstream gets the same voice."""
    return state / "conditionals" / f"{DEFAULT_VOICE}.safetensors"


def choose_state(warm: str | Path | None, folder: Path) -> Path:
    """Return the given state, or the one in an image, or the path of a state to bake in `folder`.

    Raises:
        BadInputError: `warm` is no path.
    """
    if warm is not None:
        return as_path(warm, "the warm state")
    return WARM if WARM.is_dir() else folder / "warm"


def bake_if_missing(warm: Path, weights: Path, device: str, folder: Path, *, say: Callable[[str], None]) -> None:
    """Bake a state at the path that `choose_state` returned for `folder`, unless there is one.

    Raises:
        BadInputError: there is too little disk space or memory for a bake.
        PrewarmError: the bake failed.
    """
    if warm.exists():
        return
    check_memory(weights, purpose="a bake")
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder, STATE_BYTES + OTHER_BYTES, purpose="a bake")
    say("baking a warm state")
    bake(BakeOptions(weights=weights, warm=warm, cache=folder / "cache", device=device))


def token_limit(weights: Path, tokens: int) -> int:
    """Return a limit of speech tokens: `tokens` for random weights, which never stop, and otherwise upstream's."""
    return MAX_NEW_TOKENS if read_record(weights).synthetic is None else tokens
