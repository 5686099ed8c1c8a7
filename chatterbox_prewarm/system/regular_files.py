"""Open files that must be regular files. Opening a pipe would block until another process writes into it."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

#: Default limit for the size of a document. Git files of the hub have at most 10 MB.
_MAX_BYTES = 16 << 20
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(OSError):
    """The path is a link, a pipe, a directory, a device or a socket."""


def open_regular(path: Path, *, follow_links: bool = False) -> BinaryIO:
    """Open a regular file for reading, without blocking.

    Args:
        path: the file.
        follow_links: the path may be a link to a regular file. Keys and signatures need this, because Kubernetes mounts
            the files of a ConfigMap or a secret as links. Links in the folders above are followed in any case.

    Raises:
        NotRegularError: it is something else.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise _not_regular(path, "a link") from error
        if error.errno == errno.ENXIO:
            raise _not_regular(path, "a socket") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(path, _KINDS.get(stat.S_IFMT(mode), "a special file"))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, follow_links: bool = False, limit: int = _MAX_BYTES) -> bytes:
    """Read a regular file, with the arguments and errors of `open_regular`.

    Raises:
        OSError: it has more than `limit` bytes.
    """
    with open_regular(path, follow_links=follow_links) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return content


def _not_regular(path: Path, kind: str) -> NotRegularError:
    return NotRegularError(errno.EINVAL, f"it is {kind} and not a regular file", str(path))
