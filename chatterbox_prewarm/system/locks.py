"""Locks on a path, held by the kernel until the process ends."""

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


#: Locks that this process shares to its end, by their files.
_SHARED: dict[Path, int] = {}


@contextlib.contextmanager
def exclusive_lock(target: Path) -> Iterator[None]:
    """Hold the lock of a place that is being written; the kernel drops it with the process, however it ends.

    Raises:
        BadInputError: another process holds it, or shares it; names one that holds it.
    """
    with _lock_file(target).open("a+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInputError(
                _who_uses(lock, target), next_step="wait for it to end, or name another place"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def share_lock(target: Path) -> None:
    """Share the lock of a place to the end of this process: until then nobody holds it alone.

    A process that the holder started is part of its work, and shares nothing.

    Raises:
        BadInputError: another process holds it; names that process.
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
            raise BadInputError(
                _who_uses(lock, target), next_step="wait for it to end, or name another place"
            ) from None
    _SHARED[path] = descriptor


def _lock_file(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _who_uses(lock: IO[str], target: Path) -> str:
    """Who is in the way, in words: whoever holds a lock wrote its number into the file, those that share it did not."""
    lock.seek(0)
    holder = lock.read().strip()
    if holder and Path(f"/proc/{holder}").exists():  # or it was killed, and others came after it
        return f"another process ({holder}) is writing {target}"
    return f"another process uses {target.parent}"
