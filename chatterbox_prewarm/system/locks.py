"""Locks on a path. The kernel releases a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.process import PARENT

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
    with _lock_file(target).open("a+", encoding="ascii") as lock:
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
    path = _lock_file(target)
    if path in _SHARED:
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with os.fdopen(descriptor, encoding="ascii") as lock:
            if lock.read().strip() == os.environ.get(PARENT):
                return
            raise _busy(lock, target) from None
    _SHARED[path] = descriptor


def _lock_file(target: Path) -> Path:
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
