"""Layers: tars whose bytes depend on what is in them alone.

Sorted entries, modification time zero, owner root, modes 0555 and 0444, no links, no extended attributes. The warm
state is small and compressed: gzip at a fixed level, without name and time, in members of a fixed size. Weights do not
compress, so each group of their files is a tar as it is, which is made anew whenever it is read: no second copy lies on
the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

from chatterbox_prewarm.errors import IntegrityError, from_os_error
from chatterbox_prewarm.image.oci import OCI_LAYER, OCI_LAYER_GZIP, Descriptor
from chatterbox_prewarm.image.parallel_gzip import MEMBER, compressed
from chatterbox_prewarm.state.folder import key_of
from chatterbox_prewarm.state.manifest import check_layout, read_manifest
from chatterbox_prewarm.state.signing import check_signed
from chatterbox_prewarm.system.digests import verify_files
from chatterbox_prewarm.system.paths import WARM, WEIGHTS
from chatterbox_prewarm.weights.record import RECORD_NAME, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

#: As a tar names them.
_WARM = PurePosixPath(WARM).relative_to("/")
_WEIGHTS = PurePosixPath(WEIGHTS).relative_to("/")

_GZIP_LEVEL = 6
#: What made the bytes besides the content: another zlib may compress to others of the same tar.
_PACKER = "io.chatterbox-prewarm.packer"
_TAR = "tar pax"
#: A file of at least this many bytes has a layer of its own, so that one that changes costs no other.
_LARGE = 100_000_000
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that is not in an image yet: the SHA-256 of its bytes and of its tar (OCI's diff id), its size in bytes.

    `opened` opens it from its beginning, as often as it is asked for. `title` says what it holds.
    """

    digest: str
    diff_id: str
    size: int
    media_type: str
    packer: str
    title: str
    opened: Callable[[], AbstractContextManager[BinaryIO]]

    @property
    def descriptor(self) -> Descriptor:
        """As a manifest names it."""
        return Descriptor(
            media_type=self.media_type,
            digest=f"sha256:{self.digest}",
            size=self.size,
            annotations={_PACKER: self.packer, "org.opencontainers.image.title": self.title},
        )


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A member of a tar, and the file that has its content."""

    info: tarfile.TarInfo
    path: Path | None = None


class _Tar(io.RawIOBase):
    """A tar as a stream, made while it is read."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self._pieces = _pieces(entries)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = piece
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def pack(warm: Path, output: Path) -> Layer:
    """Write a warm state as a gzip-compressed layer that unpacks to a folder of an image named by the state's key.

    Raises:
        IntegrityError: the state is not as its manifest says; a broken one is not shipped.
        BadInputError: `output` cannot be written.
    """
    manifest = read_manifest(warm)
    check_layout(manifest, warm)
    if problems := verify_files(manifest.files, warm):
        raise IntegrityError(
            f"{warm} is not as its manifest says: {'; '.join(problems)}", next_step="bake the warm state again"
        )
    key = key_of(manifest)
    entries = [*_parents(_WARM / key), *_members(warm, _WARM / key)]
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    packed, plain = hashlib.sha256(), hashlib.sha256()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            for piece in compressed(_hashed(_pieces(entries), plain), _GZIP_LEVEL):
                packed.update(piece)
                stream.write(piece)
            size = stream.tell()
        temporary.replace(output)
    except OSError as error:
        raise from_os_error(error, "writing the layer") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Layer(
        digest=packed.hexdigest(),
        diff_id=plain.hexdigest(),
        size=size,
        media_type=OCI_LAYER_GZIP,
        packer=f"{_TAR}; gzip {_GZIP_LEVEL} in members of {MEMBER}; zlib {zlib.ZLIB_RUNTIME_VERSION}",
        title=f"warm state {key}",
        opened=lambda: output.open("rb"),
    )


def signature_layer(warm: Path, signature: Path) -> Layer:
    """The signature of a state as a layer of its own, beside the state's folder: two signatures of one state differ.

    Raises:
        IntegrityError: the state has no sound manifest, or the signature is of another state.
        BadInputError: the signature cannot be read.
    """
    check_signed(warm, signature)
    key = key_of(read_manifest(warm))
    return _plain([signature], [PurePosixPath(f"{key}{signature.suffix}")], _WARM, f"signature of {key}")


def weight_layers(weights: Path) -> tuple[Layer, ...]:
    """A checkpoint as uncompressed layers that unpack to its place: one for each large file, one for all others.

    Raises:
        WeightsError: a file is not as recorded.
        BadInputError: one cannot be read.
    """
    record = verify(weights)
    names = [RECORD_NAME, *(file.path for file in record.files)]
    large = [file.path for file in sorted(record.files) if file.size >= _LARGE]
    groups = [sorted(set(names) - set(large)), *([name] for name in large)]
    return tuple(
        _plain(
            [weights / name for name in group], list(map(PurePosixPath, group)), _WEIGHTS, f"weights {' '.join(group)}"
        )
        for group in groups
    )


def _plain(files: Sequence[Path], names: Sequence[PurePosixPath], place: PurePosixPath, title: str) -> Layer:
    """An uncompressed layer of files in one folder."""
    try:
        entries = [
            *_parents(place),
            _Entry(info=_info(place, directory=True, mode=0o755)),
            *(
                _Entry(info=_info(place / name, size=path.stat().st_size), path=path)
                for path, name in zip(files, names, strict=True)
            ),
        ]
        sha256, size = hashlib.sha256(), 0
        for piece in _pieces(entries):
            sha256.update(piece)
            size += len(piece)
    except OSError as error:
        raise from_os_error(error, f"reading what becomes the layer {title!r}") from error

    def opened() -> AbstractContextManager[BinaryIO]:
        return contextlib.closing(cast("BinaryIO", io.BufferedReader(_Tar(entries), _CHUNK)))

    return Layer(
        digest=sha256.hexdigest(),
        diff_id=sha256.hexdigest(),
        size=size,
        media_type=OCI_LAYER,
        packer=_TAR,
        title=title,
        opened=opened,
    )


def _pieces(entries: Sequence[_Entry]) -> Iterator[bytes]:
    """The bytes of a tar, a megabyte at most at a time."""
    for entry in entries:
        yield entry.info.tobuf(tarfile.PAX_FORMAT)
        if entry.path is None:
            continue
        left = entry.info.size
        with entry.path.open("rb") as stream:
            while left:
                piece = stream.read(min(_CHUNK, left))
                if not piece:
                    raise OSError(0, "it became shorter while it was read", str(entry.path))
                left -= len(piece)
                yield piece
        if over := entry.info.size % tarfile.BLOCKSIZE:
            yield b"\0" * (tarfile.BLOCKSIZE - over)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _hashed(pieces: Iterator[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _parents(place: PurePosixPath) -> Iterator[_Entry]:
    for parent in [*reversed(place.parents)][1:]:
        yield _Entry(info=_info(parent, directory=True, mode=0o755))


def _members(warm: Path, place: PurePosixPath) -> Iterator[_Entry]:
    """The state's folder, then what is in it, in the order of the names."""
    yield _Entry(info=_info(place, directory=True))
    for path in sorted(warm.rglob("*")):
        name = place / path.relative_to(warm).as_posix()
        if path.is_dir():
            yield _Entry(info=_info(name, directory=True))
        else:
            yield _Entry(info=_info(name, size=path.stat().st_size), path=path)


def _info(name: PurePosixPath, *, directory: bool = False, size: int = 0, mode: int | None = None) -> tarfile.TarInfo:
    info = tarfile.TarInfo(str(name))
    info.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    info.mode = mode if mode is not None else (0o555 if directory else 0o444)
    info.size = size
    info.mtime = 0
    return info
