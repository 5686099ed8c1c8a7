"""Locks on a path. The kernel releases a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.children import PARENT

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The shared locks of this process: the lock file and its descriptor.
_SHARED: dict[Path, int] = {}


@contextlib.contextmanager
def exclusive_lock(target: Path) -> Iterator[None]:
    """Hold the exclusive lock of a path while it is written.

    Raises:
        BadInputError: another process holds or shares the lock. The message names the holder.
    """
    with os.fdopen(open_lock_file(lock_file(target)), "r+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(lock, target) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def share_lock(target: Path) -> None:
    """Share the lock of a path until this process ends, so that no other process gets it exclusively.

    A child of the process that holds the exclusive lock is part of that process's work and does not need a lock.

    Raises:
        BadInputError: another process holds the exclusive lock. The message names it.
    """
    path = lock_file(target)
    if path in _SHARED:
        return
    descriptor = open_lock_file(path, write=False)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with os.fdopen(descriptor, encoding="ascii") as lock:
            if lock.read().strip() == os.environ.get(PARENT):
                return
            raise _busy(lock, target) from None
    _SHARED[path] = descriptor


def open_lock_file(path: Path, *, write: bool = True) -> int:
    """Open a lock file, create it if it is missing, and return its descriptor.

    The holder of a lock overwrites the content of its file. So another user who may create files in the folder must not
    make it overwrite a different file, with a link or a hard link.

    Raises:
        BadInputError: the path is a link, has a second name, or is not a regular file.
        OSError: it cannot be opened.
    """
    # Without O_CREAT first: Linux refuses it for another user's file in a folder such as /tmp.
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            descriptor = os.open(path, flags | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise _not_a_lock_file(path) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise _not_a_lock_file(path)
    return descriptor


def _not_a_lock_file(path: Path) -> BadInputError:
    return BadInputError(
        f"{path} is not a lock file of this program: it is a link, or not a regular file",
        next_step="remove it; the next run creates it again",
    )


def lock_file(target: Path) -> Path:
    """Return the path of the file that is locked for `target`. It is next to `target`, and stays after the lock."""
    return target.parent / f".{target.name}.lock"


def _busy(lock: IO[str], target: Path) -> BadInputError:
    """Make the error that names the other process. Only an exclusive holder writes its process id into the file."""
    lock.seek(0)
    holder = lock.read().strip()
    if holder and Path(f"/proc/{holder}").exists():  # otherwise the holder was killed, and others share the lock now
        message = f"another process ({holder}) is writing {target}"
    else:
        message = f"another process uses {target.parent}"
    return BadInputError(message, next_step="wait for it to end, or name another path")
