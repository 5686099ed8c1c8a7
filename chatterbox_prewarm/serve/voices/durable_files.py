"""Files that are there as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def publish(data: bytes, part: Path, path: Path) -> None:
    """Write a file under another name, then give it its own, unless that is taken.

    Raises:
        FileExistsError: it is.
        OSError: as the system says.
    """
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(descriptor, "wb") as stream:  # noqa: PTH123 - a descriptor
        stream.write(data)
        stream.flush()
        os.fsync(descriptor)
        try:
            os.link(part, path)  # never replaces, as a rename would
        except FileExistsError:
            # Over a network the first answer may get lost, and a repeated call then find what it made itself.
            if os.fstat(descriptor).st_nlink != 2:
                raise
    sync(path.parent)


def sync(directory: Path) -> None:
    """Have a directory's entries on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
