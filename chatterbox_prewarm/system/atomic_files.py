"""Write files and folders atomically: under a temporary name first, so that readers see all of it or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OLD = "old-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def atomic_file(
    path: Path,
    *,
    mode: int | None = None,
    durable: bool = False,
    exclusive: bool = False,
    leftovers: str | None = None,
) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` when the block succeeds.

    Args:
        path: the final path; an existing file is replaced.
        mode: permission bits of the file; by default as the block leaves them.
        durable: flush the file to the disk before the rename, and its folder afterwards.
        exclusive: raise an error instead of replacing an existing file. Needs a file system with hard links.
        leftovers: regular expression of final names. Temporary files of killed processes for them are removed first.
            The block must write to the given path and not replace it, because the file is locked until the end.

    Raises:
        FileExistsError: `exclusive` is set and the path exists.
        OSError: the file cannot be written. The temporary file is removed then.
    """
    # Random, because processes in different containers can share a folder and have the same process id.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    lock = None
    try:
        if leftovers is not None:
            _remove_leftovers(path.parent, leftovers)
            lock = _create_locked(temporary)
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        if durable:
            flush(temporary)
        if exclusive:
            try:
                path.hardlink_to(temporary)  # unlike a rename, this never replaces a file
            except FileExistsError:
                # A network file system may lose the first answer. The repeated call then finds the link of the first.
                if temporary.stat().st_nlink != 2:
                    raise
        else:
            temporary.replace(path)
        if durable:
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _create_locked(temporary: Path) -> int:
    """Create a file and lock it, so that no other process removes it as a leftover. Return the descriptor."""
    while True:
        lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # without locks in a file system, no process removes leftovers in it
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.exists():
            return lock
        os.close(lock)  # another process removed the file before it was locked


def _remove_leftovers(folder: Path, names: str) -> None:
    """Remove the temporary files of `atomic_file` that no process has locked, for final names that match `names`."""
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{8}}")
    for leftover in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
        with contextlib.suppress(OSError):  # another process has locked or removed it
            lock = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
                logger.info("removed %s, which an interrupted process left behind", leftover)
            finally:
                os.close(lock)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, *, mode: int | None = None, durable: bool = False) -> None:
    """Write a text file atomically as UTF-8; the arguments are those of `atomic_file`."""
    with atomic_file(path, mode=mode, durable=durable) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`, and remove it afterwards unless `put_in_place` renamed it.

    The caller holds the lock of `target`, so staging folders that exist already belong to killed processes and are
    removed.
    """
    prefix = f".{target.name}.staging-"
    for leftover in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        if leftover.name.startswith(f"{prefix}{_OLD}") and not target.exists():
            leftover.rename(target)  # the process was killed between the two renames in `put_in_place`
            continue
        logger.info("removing %s, which an interrupted process left behind", leftover)
        remove(leftover)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        remove(staging)


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield an empty folder for temporary files, and remove it afterwards.

    The process holds a lock on the folder. Folders with the same prefix that no process has locked belong to killed
    processes of this user and are removed.

    Args:
        prefix: start of the folder's name. Only callers of this function use it.
    """
    parent = Path(tempfile.gettempdir())
    for leftover in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if leftover.lstat().st_uid == os.geteuid():
                _remove_unless_locked(leftover)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        if (lock := _lock_folder(folder)) is not None:
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock_folder(folder: Path) -> int | None:
    """Lock a new folder and return the descriptor. Return None if another process removed the folder before."""
    try:
        lock = os.open(folder, _FOLDER)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # see _create_locked
        fcntl.flock(lock, fcntl.LOCK_EX)
    if folder.exists():
        return lock
    os.close(lock)
    return None


def _remove_unless_locked(folder: Path) -> None:
    """Remove a folder unless a process holds its lock.

    Raises:
        BlockingIOError: a process holds the lock.
        OSError: the path is a link or a file, or is missing.
    """
    lock = os.open(folder, _FOLDER)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        logger.info("removing %s, which an interrupted process left behind", folder)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def seal(root: Path) -> None:
    """Set files to 0444 and folders to 0555, and flush all of it to the disk."""
    for path in sorted(root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root.chmod(0o555)
    os.sync()


def remove(directory: Path) -> None:
    """Remove a folder, even if it is sealed."""
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(directory, ignore_errors=True)


def put_in_place(staging: Path, target: Path) -> None:
    """Rename a finished folder to `target` in one step, and remove the folder that had the name before."""
    if staging.parent == target.parent:
        _rename(staging, target)
        return
    mode = stat.S_IMODE(staging.stat().st_mode)
    for folder in filter(Path.exists, (staging, target)):
        folder.chmod(0o755)  # a folder gets another parent only from a user who may write to it
    _rename(staging, target)
    target.chmod(mode)


def _rename(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
    if libc.renameat2(*arguments) == 0:
        return  # the old folder has the staging name now, and `staging_folder` removes it
    code = ctypes.get_errno()
    if code not in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(code, os.strerror(code), str(target))
    # This file system cannot exchange two names. For a moment `target` is missing, but it is never incomplete.
    old = target.with_name(f".{target.name}.staging-{_OLD}{os.getpid()}")
    target.rename(old)
    staging.rename(target)
    remove(old)
