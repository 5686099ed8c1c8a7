"""Fill a library's folder of cached code from the warm state, and remove all other files from it.

Such a folder must be writable, and the library executes the files that it reads there. So the folder belongs to this
user only, and a start removes the files of an earlier process, unless another process still uses the folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.atomic_files import atomic_file
from chatterbox_prewarm.system.digests import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: File descriptors of the locks that this process holds until it ends, by folder.
_HELD: dict[Path, int] = {}


def seed(target: Path, source: Path | None, *, in_use: Callable[[Path], bool] | None = None) -> None:
    """Make `target` contain exactly the files of `source`. Several processes may call this for one folder at once.

    Args:
        target: created if it is missing.
        source: a verified folder of the warm state. None leaves `target` empty.
        in_use: returns whether another process may be writing the file at a path, as its name shows. Such a file is not
            removed. None if names do not show this: each process then holds a lock until it ends, and removes files
            only if no other process holds one.

    Raises:
        PermissionError: `target` belongs to another user.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if target.lstat().st_uid != os.geteuid() or target.is_symlink():
        raise PermissionError(errno.EPERM, "belongs to another user, and its files are executed", str(target))
    target.chmod(0o700)  # another user with write access could plant code
    lock = _HELD.get(target)
    if lock is None:
        lock = _HELD[target] = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _lock(lock, wait=in_use is not None):
            _remove_unknown_files(target, source, in_use or (lambda _: False))
        if source is not None:
            _copy_changed_files(source, target)
    finally:
        if in_use is not None:
            os.close(_HELD.pop(target))
        else:
            fcntl.flock(lock, fcntl.LOCK_SH)


def _lock(lock: int, *, wait: bool) -> bool:
    """Take an exclusive lock and return True. If it is not free and `wait` is false, share it and return False."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return False
    return True


def collect(cache: Path, directory: Path, *, skip: Callable[[Path], bool] = lambda _: False) -> None:
    """Copy the files of a cache folder into a folder of the warm state, without empty folders."""
    for source in sorted(path for path in cache.rglob("*") if path.is_file()):
        if not skip(source):
            destination = directory / source.relative_to(cache)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, destination)


def _remove_unknown_files(target: Path, source: Path | None, in_use: Callable[[Path], bool]) -> None:
    for path in sorted(target.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            continue
        known = source is not None and (source / path.relative_to(target)).is_file()
        if path.is_symlink() or not (known or in_use(path)):
            path.unlink(missing_ok=True)


def _copy_changed_files(source: Path, target: Path) -> None:
    """Copy each file that is missing or differs, and replace it atomically."""
    for path in sorted(source.rglob("*")):
        destination = target / path.relative_to(source)
        if path.is_dir():
            destination.mkdir(parents=True, exist_ok=True)
        elif not destination.is_file() or hash_file(destination) != hash_file(path):
            with atomic_file(destination, mode=0o600) as temporary:
                shutil.copyfile(path, temporary)
