"""Check where a command writes, before it changes anything on disk.

A command never writes into a warm state or a checkpoint, and never removes a file that this project did not write.
"""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.families.registry import FAMILIES
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.system.locks import lock_file
from chatterbox_prewarm.system.paths import BAKE, BAKE_FOLDERS
from chatterbox_prewarm.system.regular_files import read_regular
from chatterbox_prewarm.weights.record import RECORD_NAME
from chatterbox_prewarm.weights.variants import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHECKPOINT = "checkpoint"
_STATE_KEYS = frozenset({"schema", "set_digest", "families"})
_RECORD_KEYS = frozenset({"schema", "variant", "files"})


def check_output_place(path: Path) -> None:
    """Check that a file or folder can be written without changing a warm state or a checkpoint.

    Links are resolved, and the path itself need not exist.

    Raises:
        BadInputError: the path is a state or a checkpoint, or is inside one.
    """
    # A rename replaces a link, and other calls follow it. So check the link and its target.
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - gives "." a name, and does not resolve links
    for place in dict.fromkeys((absolute.parent.resolve() / absolute.name, path.resolve())):
        for folder in (place, *place.parents):
            if (kind := _kind(folder)) is None:
                continue
            where = "is" if folder == place else "is inside"
            raise BadInputError(
                f"{path} {where} the {kind} {folder}, where this command must not write",
                next_step="name a path outside that folder",
            )


def check_apart(places: Mapping[str, Path]) -> None:
    """Check that no path is equal to another path or inside it.

    Args:
        places: the path of each option by the option's name.

    Raises:
        BadInputError: naming the first two paths that are equal or nested.
    """
    for (one, first), (other, second) in combinations(places.items(), 2):
        outer, inner = first.resolve(), second.resolve()
        if outer == inner:
            relation = "is the same folder as"
        elif inner.is_relative_to(outer):
            relation = "contains"
        elif outer.is_relative_to(inner):
            relation = "is inside"
        else:
            continue
        raise BadInputError(
            f"{one} {first} {relation} {other} {second}, and writing to one of them would damage the other",
            next_step=f"name a path for {one} or {other} that is outside the other one",
        )


def check_cache_place(cache: Path, *, warm: Path, weights: Path) -> None:
    """Check that a start or a bake can use a cache directory. Both remove files from the folders of the cache families.

    Args:
        cache: the cache directory; it need not exist.
        warm: the directory of the state, or of several states.
        weights: the directory of the checkpoint.

    Raises:
        BadInputError: the directory is inside a state or a checkpoint, contains one of `warm` and `weights`, or
            has folders that this project did not write.
    """
    check_output_place(cache)
    for option, place in (("--warm", warm), ("--weights", weights)):
        if place.resolve().is_relative_to(cache.resolve()):
            check_apart({"--cache": cache, option: place})
    # Each start and each bake makes the lock before the folders.
    foreign = [name for name in (*FAMILIES, *BAKE_FOLDERS) if (cache / name).exists()]
    if foreign and not lock_file(cache / BAKE).exists():
        raise BadInputError(
            f"the cache directory {cache} has a folder {foreign[0]!r} that this program did not write, "
            f"and would remove the files in {cache / foreign[0]}",
            next_step="choose an empty or a new directory for the cache",
        )


def check_state_place(warm: Path) -> None:
    """Check that a bake can replace the folder: it is missing or empty, or contains only a state.

    Raises:
        BadInputError: the path is inside a state or a checkpoint, is not a directory, or contains other files.
    """
    check_output_place(warm.parent)
    if warm.is_symlink() or (warm.exists() and not warm.is_dir()):
        raise BadInputError(f"{warm} is not a directory", next_step="choose another path for the warm state")
    if not warm.is_dir() or not any(warm.iterdir()):
        return
    listed = _listed_files(warm)
    if listed is None:
        raise BadInputError(
            f"{warm} holds something other than a warm state, and a bake would replace it",
            next_step="choose an empty or a new directory for the warm state",
        )
    files = {str(path.relative_to(warm)) for path in warm.rglob("*") if path.is_symlink() or not path.is_dir()}
    if unlisted := sorted(files - listed):
        raise BadInputError(
            f"{warm} holds something other than a warm state, the file {unlisted[0]}, and a bake would remove it",
            next_step="move it to another folder, or choose an empty or a new directory for the warm state",
        )


def check_states_place(folder: Path) -> None:
    """Check that bakes can add states to a folder: it is missing, or each directory in it is a state.

    Raises:
        BadInputError: the folder is not a directory, is a state, is inside a state or a checkpoint, or has a directory
            that a bake cannot replace.
    """
    check_output_place(folder)
    if folder.is_symlink() or not folder.is_dir():
        check_state_place(folder)
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name[0] != ".":
            check_state_place(path)


def check_weights_place(directory: Path) -> None:
    """Check that a checkpoint can be written to a folder, which may contain an older checkpoint.

    Raises:
        BadInputError: the folder is a warm state, or is inside a state or another checkpoint.
    """
    check_output_place(directory.resolve().parent)
    if _kind(directory.resolve()) not in {None, _CHECKPOINT}:
        check_output_place(directory)


def _kind(folder: Path) -> str | None:
    """Return the kind of a folder: a warm state, a checkpoint, or None for any other folder."""
    found, manifest = _read_json(folder / MANIFEST_NAME)
    if isinstance(manifest, dict) and manifest.keys() >= _STATE_KEYS:
        return "warm state"
    if found and manifest is None and any((folder / name).is_dir() for name in FAMILIES):
        return "damaged warm state"
    found, record = _read_json(folder / RECORD_NAME)
    if isinstance(record, dict) and record.keys() >= _RECORD_KEYS:
        return _CHECKPOINT
    if any(all((folder / name).is_file() for name in variant.safetensors) for variant in VARIANTS.values()):
        return _CHECKPOINT
    return None


def _read_json(path: Path) -> tuple[bool, Any]:
    """Read a JSON file. Return whether the file exists, and its content or None if it is no JSON."""
    try:
        return True, json.loads(read_regular(path))
    except OSError:
        return False, None
    except (ValueError, RecursionError):
        return True, None


def _listed_files(warm: Path) -> frozenset[str] | None:
    """Return the files that a manifest of this project lists, with the manifest itself, or None without a manifest.

    The manifest is not verified, so that a damaged state can be replaced.
    """
    _, raw = _read_json(warm / MANIFEST_NAME)
    try:
        if not raw.keys() >= {*_STATE_KEYS, "weights"}:
            return None
        return frozenset({MANIFEST_NAME, *(file["path"] for family in raw["families"] for file in family["files"])})
    except (AttributeError, LookupError, TypeError):
        return None
