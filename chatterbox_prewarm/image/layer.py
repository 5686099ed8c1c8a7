"""The warm state as an image layer: a tar whose bytes depend on the state alone.

Sorted entries, modification time zero, owner root, modes 0555 and 0444, no links, no extended attributes; gzip at a
fixed level with no name and no time in its header. So one warm state has one layer digest.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

from chatterbox_prewarm import manifest as manifests
from chatterbox_prewarm.errors import IntegrityError, from_os_error
from chatterbox_prewarm.places import WARM

if TYPE_CHECKING:
    from collections.abc import Iterator

_GZIP_LEVEL = 6
IMAGE_PREFIX = PurePosixPath(WARM)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A packed layer: the SHA-256 of the compressed file, that of the tar inside (OCI's diff id), and its bytes."""

    digest: str
    diff_id: str
    size: int


class _Hashing(io.RawIOBase):
    """Passes bytes on and hashes them."""

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.sha256.update(data)
        return self._target.write(data)


def pack(warm: Path, output: Path, *, prefix: PurePosixPath = IMAGE_PREFIX) -> Layer:
    """Write the warm state as a gzip-compressed layer that unpacks to `prefix`.

    Raises:
        IntegrityError: the state is not as its manifest says; a broken one is not shipped.
        BadInputError: `output` cannot be written.
    """
    manifest = manifests.read(warm)
    manifests.check_layout(manifest, warm)
    if problems := manifests.verify_files(manifest.files, warm):
        raise IntegrityError(
            f"{warm} is not as its manifest says: {'; '.join(problems)}", next_step="bake the warm state again"
        )
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            compressed = _Hashing(cast("BinaryIO", stream))
            with gzip.GzipFile("", "wb", _GZIP_LEVEL, cast("BinaryIO", compressed), mtime=0) as zipped:
                plain = _Hashing(cast("BinaryIO", zipped))
                with tarfile.open(fileobj=cast("BinaryIO", plain), mode="w|", format=tarfile.PAX_FORMAT) as tar:
                    for info, path in _entries(warm, prefix):
                        if path is None:
                            tar.addfile(info)
                        else:
                            with path.open("rb") as content:
                                tar.addfile(info, content)
            size = stream.tell()
        temporary.replace(output)
    except OSError as error:
        raise from_os_error(error, "writing the layer") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Layer(digest=compressed.sha256.hexdigest(), diff_id=plain.sha256.hexdigest(), size=size)


def _entries(warm: Path, prefix: PurePosixPath) -> Iterator[tuple[tarfile.TarInfo, Path | None]]:
    """Tar members in the order of their names: parents of the prefix, then the state."""
    relative = prefix.relative_to("/")
    for parent in [*reversed(relative.parents)][1:]:
        yield _info(parent, directory=True, mode=0o755), None
    yield _info(relative, directory=True), None
    for path in sorted(warm.rglob("*")):
        name = relative / path.relative_to(warm).as_posix()
        if path.is_dir():
            yield _info(name, directory=True), None
        else:
            yield _info(name, size=path.stat().st_size), path


def _info(name: PurePosixPath, *, directory: bool = False, size: int = 0, mode: int | None = None) -> tarfile.TarInfo:
    info = tarfile.TarInfo(str(name))
    info.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    info.mode = mode if mode is not None else (0o555 if directory else 0o444)
    info.size = size
    info.mtime = 0
    return info
