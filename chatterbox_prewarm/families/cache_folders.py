"""Folders that a package caches code in: filled from the warm state, and emptied of whatever it does not vouch for.

Such a folder lies at a place that must be writable, and what is read from it is executed. So it belongs to this user
alone, and a start removes what an earlier process left there, unless another one is still at work in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.digests import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable

#: Locks held to the end of this process, by folder.
_HELD: dict[Path, int] = {}


def seed(target: Path, source: Path | None, *, in_use: Callable[[Path], bool] | None = None) -> None:
    """Make `target` hold the files of `source` and no others; several processes may do so at once.

    Args:
        target: made when it is missing.
        source: a verified folder of the warm state; None leaves `target` empty.
        in_use: tells the files that another process may be at work on. Where a name does not tell, None: then each
            process holds a lock while it lives, and only one that is alone removes anything.

    Raises:
        PermissionError: `target` belongs to another user.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if target.lstat().st_uid != os.geteuid() or target.is_symlink():
        raise PermissionError(errno.EPERM, "belongs to another user, and what lies in it is executed", str(target))
    target.chmod(0o700)  # whoever else could write here could plant code
    lock = _HELD.get(target)
    if lock is None:
        lock = _HELD[target] = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _lock(lock, wait=in_use is not None):
            _sweep(target, source, in_use or (lambda _: False))
        if source is not None:
            _copy(source, target)
    finally:
        if in_use is not None:
            os.close(_HELD.pop(target))
        else:
            fcntl.flock(lock, fcntl.LOCK_SH)


def _lock(lock: int, *, wait: bool) -> bool:
    """Take a lock: an exclusive one, or where that would mean to wait for a process to end, a shared one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return False
    return True


def collect(made: Path, directory: Path, *, leave: Callable[[Path], bool] = lambda _: False) -> None:
    """Copy the files of a cache folder into a folder of the warm state; empty folders are left behind."""
    for source in sorted(path for path in made.rglob("*") if path.is_file()):
        if not leave(source):
            destination = directory / source.relative_to(made)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, destination)


def _sweep(target: Path, source: Path | None, in_use: Callable[[Path], bool]) -> None:
    for path in sorted(target.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            continue
        vouched = source is not None and (source / path.relative_to(target)).is_file()
        if path.is_symlink() or not (vouched or in_use(path)):
            path.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copy what is missing or differs, each file all at once."""
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(parents=True, exist_ok=True)
        elif not destination.is_file() or hash_file(destination) != hash_file(path):
            # Processes in different containers can have one and the same id.
            descriptor, temporary = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(path.read_bytes())
            Path(temporary).replace(destination)
