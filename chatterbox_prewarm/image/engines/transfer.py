"""Files on their way in and out of containers: tars, of which nothing may lie outside of where they are meant to go."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, EngineError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def packed(source: Path, name: str) -> Iterator[IO[bytes]]:
    """A tar with a file that anybody may read, under another name.

    Raises:
        BadInputError: the file cannot be read.
    """
    with tempfile.TemporaryFile() as spool:
        try:
            with tarfile.open(fileobj=spool, mode="w") as tar, source.open("rb") as stream:
                info = tarfile.TarInfo(name)
                info.size, info.mode = source.stat().st_size, 0o444
                tar.addfile(info, stream)
        except OSError as error:
            raise from_os_error(error, f"reading {source}") from error
        spool.seek(0)
        yield spool


def unpack(spool: IO[bytes], target: Path) -> None:
    """Write the folder that a tar holds into the folder `target`, without the folder's own name.

    Raises:
        EngineError: it is no tar, or holds a link or a special file.
        BadInputError: the target cannot be written, or the tar holds a single file.
    """
    spool.seek(0)
    try:
        with tarfile.open(fileobj=spool) as tar:
            for member in tar:
                _extract(tar, member, target)
    except tarfile.TarError as error:
        raise EngineError(f"the engine sent no tar: {error}", next_step="see the engine's log") from error
    except OSError as error:
        raise from_os_error(error, f"writing {target}") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write a member below `target`: a container may hold anything."""
    parts = PurePosixPath(member.name).parts[1:]
    if ".." in parts or not (member.isdir() or member.isfile()):
        raise EngineError(
            f"{member.name} of the container is neither a file nor a folder", next_step="bake the warm state again"
        )
    path = target.joinpath(*parts)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    stream = tar.extractfile(member)
    if stream is None or not parts:
        raise BadInputError(f"{member.name} of the container is no folder", next_step="name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with stream, path.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
