"""States: several of them side by side, each in a folder of its own, so that one image serves several types of GPU.

A folder that holds a manifest is a state; one that holds none, but folders that do, is a folder of states.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.system.fingerprint import ABSENT, device_kind

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest

#: Facts that no key depends on: an image has one checkpoint and one cache path, which all its states share. So a bake
#: for new weights has the key of the state that it replaces.
_OF_THE_PLACE = frozenset({"weights", "cache"})


def key_of(manifest: Manifest) -> str:
    """The name of what a state is for, fit for a file name: two bakes for one machine and software have one key.

    It reads as device, GPU or processor architecture, compute capability, driver if a family depends on it, torch,
    profile; then 12 digits of a SHA-256 over how the model executes and every fact of the machine and the software
    that a family depends on. The profile is part of it because two profiles for one GPU are two states, and either may
    be asked for. The checkpoint, the cache path and single source files are not.
    """
    required = {
        (name, value)
        for family in manifest.families
        for name, value in family.requires.items()
        if not name.startswith("source:") and name not in _OF_THE_PLACE
    }
    device, found = device_kind(manifest.reference.device), manifest.fingerprint
    execution = manifest.execution
    parts = [device]
    if device == "cuda":
        parts += [found.get("gpu", ABSENT), "cc" + found.get("compute_capability", ABSENT)]
        parts += ["driver" + found.get("driver", ABSENT)] * any(name == "driver" for name, _ in required)
    else:
        parts.append(found.get("arch", ABSENT))
    parts += ["torch" + found.get("torch", ABSENT), execution.profile]
    parts += [execution.t3_dtype] * (execution.t3_dtype != "float32")
    text = json.dumps([[execution.profile, execution.t3_dtype, execution.graphs], manifest.variant, sorted(required)])
    parts.append(hashlib.sha256(text.encode()).hexdigest()[:12])
    return "-".join(_slug(part) for part in parts)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.") or ABSENT


def states_in(folder: Path) -> dict[str, Path]:
    """The states of a folder by name, which is that of their own folder; the folder itself when it is a state.

    Where one folder holds a manifest, all beside it count as states, so that a broken one is seen. Hidden ones are
    those of a bake at work.
    """
    if os.path.lexists(folder / MANIFEST_NAME):
        return {folder.absolute().name: folder}
    try:
        found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."}
    except OSError:
        return {}  # reading it as a state says what is wrong
    if any(os.path.lexists(path / MANIFEST_NAME) for path in found.values()):
        return found
    return {}


def named(folder: Path, name: str | None) -> Path:
    """One state of a folder: the one of that name, or the only one.

    Raises:
        BadInputError: there is none of that name, or there are several and none is named; lists them.
    """
    found = states_in(folder)
    if name is None and len(found) < 2:
        return next(iter(found.values()), folder)
    if name in found:
        return found[name]
    listed = ", ".join(found) or "none"
    if name is None:
        raise BadInputError(f"{folder} holds {len(found)} states: {listed}", next_step="name one with --state")
    raise BadInputError(f"{folder} holds no state {name!r}; it holds: {listed}", next_step="name one of them")
