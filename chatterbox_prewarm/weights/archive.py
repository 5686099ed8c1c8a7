"""Download an archive that a variant needs, and unpack it into the checkpoint."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
import zipfile
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import WeightsError, from_os_error
from chatterbox_prewarm.system.digests import hash_file

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.weights.variants import Archive

_TIMEOUT = 60.0


def fetch_archive(directory: Path, archive: Archive) -> None:
    """Download an archive unless it is there, check its digest, and unpack its members.

    Where its address cannot be reached, put the file into the checkpoint by hand.

    Raises:
        WeightsError: it cannot be downloaded, has another digest, or lacks a member.
        BadInputError: the checkpoint cannot be written.
    """
    path = directory / archive.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or hash_file(path) != archive.sha256:
            _download(archive, path)
        _unpack(path, archive)
    except OSError as error:
        raise from_os_error(error, f"writing {archive.path}") from error


def _download(archive: Archive, path: Path) -> None:
    """Download an archive to `path`, which never holds an incomplete or wrong file.

    Raises:
        WeightsError: the address cannot be reached, or sends something else.
    """
    part = path.with_name(f".{path.name}.part")
    by_hand = f"check the network; or download it elsewhere and put it at {path}"
    try:
        # The address comes from the table of variants.
        with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as response, part.open("wb") as stream:  # noqa: S310
            shutil.copyfileobj(response, stream)
        if (digest := hash_file(part)) != archive.sha256:
            raise WeightsError(
                f"{archive.url} sent a file with the digest {digest}, expected {archive.sha256}", next_step=by_hand
            )
        part.replace(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise WeightsError(f"{archive.url} could not be fetched: {error}", next_step=by_hand) from error
    finally:
        part.unlink(missing_ok=True)


def _unpack(path: Path, archive: Archive) -> None:
    """Unpack the members that the table names into the folder next to the archive.

    Raises:
        WeightsError: the file is not an archive, or lacks a member.
    """
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(path) as opened:
            for member in archive.members:
                content = opened.read(member)
                target = folder / member
                if not target.is_file() or target.read_bytes() != content:
                    part = target.with_name(f".{target.name}.part")
                    part.write_bytes(content)
                    part.replace(target)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise WeightsError(f"{path} cannot be unpacked: {error}", next_step="delete it, and fetch it again") from error
