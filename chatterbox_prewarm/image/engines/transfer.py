"""Tar archives that carry files into and out of containers. Nothing is written outside the target folder."""

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
    """Open a tar that contains the file `source`, readable for every user, as `name`.

    Raises:
        BadInputError: the file cannot be read.
    """
    with tempfile.TemporaryFile() as archive:
        try:
            with tarfile.open(fileobj=archive, mode="w") as tar, source.open("rb") as stream:
                info = tarfile.TarInfo(name)
                info.size, info.mode = source.stat().st_size, 0o444
                tar.addfile(info, stream)
        except OSError as error:
            raise from_os_error(error, f"reading {source}") from error
        archive.seek(0)
        yield archive


def unpack(archive: IO[bytes], target: Path) -> None:
    """Write the content of the folder in a tar to the folder `target`.

    Raises:
        EngineError: it is not a tar, or contains a link or a special file.
        BadInputError: the tar contains a single file instead of a folder, or `target` cannot be written.
    """
    archive.seek(0)
    try:
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                _extract(tar, member, target)
    except tarfile.TarError as error:
        raise EngineError(f"the engine sent an invalid tar: {error}", next_step="see the engine's log") from error
    except OSError as error:
        raise from_os_error(error, f"writing {target}") from error


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write a member of the tar below `target`. The container's content is not trusted."""
    parts = PurePosixPath(member.name).parts[1:]
    if ".." in parts or not (member.isdir() or member.isfile()):
        raise EngineError(
            f"{member.name} in the container is neither a file nor a folder", next_step="bake the warm state again"
        )
    path = target.joinpath(*parts)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    stream = tar.extractfile(member)
    if stream is None or not parts:
        raise BadInputError(f"{member.name} in the container is not a folder", next_step="name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with stream, path.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
