"""Check that no other user can change a warm state: the owners and the permissions of its paths."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: The number of paths that a message names.
_NAMED = 3
_UID_MAP = Path("/proc/self/uid_map")
#: The user id that a user namespace shows for every user without an id in it.
_OVERFLOW_UID = Path("/proc/sys/fs/overflowuid")


def refuse_changeable(root: Path, paths: Iterable[Path]) -> None:
    """Refuse paths that belong to another user, or that other users can write.

    The owner of a file can always make it writable, so a mode without write permission is not enough.

    Args:
        root: the folder that the error names, and that the advised command mends.
        paths: `root`, and paths below it.

    Raises:
        IntegrityError: naming the number of these paths and the first ones.
    """
    writable: list[Path] = []
    foreign: dict[Path, int] = {}
    user = os.geteuid()
    for path in paths:
        status = path.stat()
        if status.st_uid not in {0, user}:
            foreign[path] = status.st_uid
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            writable.append(path)
    if foreign and not set(foreign.values()) <= trusted_owners():
        raise IntegrityError(
            f"{_count(root, list(foreign), 'belong', 'belongs')} to another user (user id "
            f"{', '.join(map(str, sorted(set(foreign.values()))))}), who can change the code in it; only root and the "
            f"user of this process ({user}) may own a warm state",
            next_step=f"if you trust the files, run `chown -R {user} {shlex.quote(str(root))}` as root; otherwise bake "
            "the warm state again",
        )
    if writable:
        raise IntegrityError(
            f"{_count(root, writable, 'can', 'can')} be written by other users; compiled caches are code",
            next_step=f"if you trust the files, run `chmod -R go-w {shlex.quote(str(root))}`; otherwise bake the warm "
            "state again",
        )


def trusted_owners(uid_map: Path = _UID_MAP) -> frozenset[int]:
    """Return the ids of the users who may own a warm state: root and the user of this process.

    If the user namespace has no id for root, files of root seem to belong to the overflow id, usually 65534. This id
    counts as root then, because the files of an image could not be used otherwise. docs/trust.md explains the
    consequences.
    """
    owners = {0, os.geteuid()}
    try:
        ranges = [line.split() for line in uid_map.read_text(encoding="utf-8").splitlines()]
        if all(int(first) != 0 for first, _, _ in ranges):
            owners.add(int(_OVERFLOW_UID.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass  # without /proc, no one knows whether root is mapped, so only the known users count
    return frozenset(owners)


def _count(root: Path, paths: Sequence[Path], plural: str, singular: str) -> str:
    """Say how many paths a sentence is about, name the first ones, and add the verb."""
    if len(paths) == 1:
        return f"{paths[0]} {singular}"
    names = ", ".join(path.relative_to(root).as_posix() for path in paths[:_NAMED])
    return f"{len(paths)} paths of {root} ({names}{', …' if len(paths) > _NAMED else ''}) {plural}"
