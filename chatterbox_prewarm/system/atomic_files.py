"""Staging: a folder is written under another name, then appears under its own all at once, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OLD = "old-"


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside the target, for the holder of its lock; left-overs of killed processes go first."""
    prefix = f".{target.name}.staging-"
    for leftover in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        if leftover.name.startswith(f"{prefix}{_OLD}") and not target.exists():
            leftover.rename(target)  # killed between the two renames of a file system without exchange
            continue
        logger.info("removing %s, left over from a process that was interrupted", leftover)
        remove(leftover)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        remove(staging)


def write_whole(path: Path, text: str) -> None:
    """Write a file all at once, in the place of one that is there.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def seal(root: Path) -> None:
    """Make files 0444 and folders 0555, and ask the disk to have all of it before it gets its name."""
    for path in sorted(root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    root.chmod(0o555)
    os.sync()


def remove(directory: Path) -> None:
    """Remove a folder, sealed or not."""
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(directory, ignore_errors=True)


def put_in_place(staging: Path, target: Path) -> None:
    """Give a finished folder its name in one step; one that had it before is exchanged, then removed."""
    if not target.exists():
        staging.rename(target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
    if libc.renameat2(*arguments) == 0:
        return  # the old one now has the staging name, and goes with it
    code = ctypes.get_errno()
    if code not in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(code, os.strerror(code), str(target))
    # A file system without exchange: for a moment there is none, but never half of one.
    aside = target.with_name(f".{target.name}.staging-{_OLD}{os.getpid()}")
    target.rename(aside)
    staging.rename(target)
    remove(aside)
