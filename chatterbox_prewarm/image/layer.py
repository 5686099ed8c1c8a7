"""Image layers: tar archives whose bytes depend only on their content.

The entries are sorted and have modification time zero, owner root and mode 0555 or 0444. There are no links and no
extended attributes. The layer of a warm state is small and compressed: gzip with a fixed level, without name and time,
in members of a fixed size. Weights cannot be compressed well, so their layers are plain tars. These are generated each
time they are read, so that the disk never has a second copy of the weights.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import from_os_error
from chatterbox_prewarm.image.byte_stream import chunk_stream
from chatterbox_prewarm.image.oci import OCI_LAYER, OCI_LAYER_GZIP, Descriptor
from chatterbox_prewarm.image.parallel_gzip import MEMBER_SIZE, gzip_chunks
from chatterbox_prewarm.state.places import check_output_place
from chatterbox_prewarm.system.atomic_files import atomic_file
from chatterbox_prewarm.system.paths import WARM, WEIGHTS
from chatterbox_prewarm.system.regular_files import open_regular
from chatterbox_prewarm.weights.record import RECORD_NAME, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from chatterbox_prewarm.state.state import State

    #: A member of a tar, and the file with its content.
    Entry = tuple[tarfile.TarInfo, Path | None]

#: Paths in an image as a tar names them, without the leading slash.
_WARM = PurePosixPath(WARM).relative_to("/")
_WEIGHTS = PurePosixPath(WEIGHTS).relative_to("/")

_GZIP_LEVEL = 6
#: Annotation with the software that packed the layer: another zlib may compress the same tar to different bytes.
_PACKER = "io.chatterbox-prewarm.packer"
_TAR = "tar pax"
#: A weights file of at least this many bytes gets a separate layer, which does not change when other files change.
_LARGE = 100_000_000
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that is not part of an image yet.

    Attributes:
        digest: SHA-256 of the layer in hexadecimal.
        diff_id: SHA-256 of its uncompressed tar in hexadecimal.
        size: size of the layer in bytes.
        packer: software that packed the layer.
        title: a description of the content.
        open: opens the layer at its beginning; may be called several times.
    """

    digest: str
    diff_id: str
    size: int
    media_type: str
    packer: str
    title: str
    open: Callable[[], AbstractContextManager[BinaryIO]]

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of the layer in an image manifest."""
        return Descriptor(
            media_type=self.media_type,
            digest=f"sha256:{self.digest}",
            size=self.size,
            annotations={_PACKER: self.packer, "org.opencontainers.image.title": self.title},
        )


def pack(state: State, output: Path) -> Layer:
    """Write a warm state to `output` as a gzip-compressed layer, which unpacks to a folder named by the state's key.

    Raises:
        IntegrityError: a file of the state differs from the manifest.
        BadInputError: `output` cannot be written, or is inside a state or a checkpoint.
    """
    check_output_place(output)
    state.check_files()
    key = state.key
    entries = [*_parents(_WARM / key), *_state_entries(state.path, _WARM / key)]
    layer_hash, tar_hash = hashlib.sha256(), hashlib.sha256()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output, leftovers=re.escape(output.name)) as temporary, temporary.open("wb") as stream:
            for chunk in gzip_chunks(_hashed(_tar_chunks(entries), tar_hash), _GZIP_LEVEL):
                layer_hash.update(chunk)
                stream.write(chunk)
            size = stream.tell()
    except OSError as error:
        raise from_os_error(error, "writing the layer") from error
    return Layer(
        digest=layer_hash.hexdigest(),
        diff_id=tar_hash.hexdigest(),
        size=size,
        media_type=OCI_LAYER_GZIP,
        packer=f"{_TAR}; gzip {_GZIP_LEVEL} in members of {MEMBER_SIZE}; zlib {zlib.ZLIB_RUNTIME_VERSION}",
        title=f"warm state {key}",
        open=lambda: output.open("rb"),
    )


def signature_layer(state: State, signature: Path) -> Layer:
    """Make a layer of a state's signature. It is separate, because each signature of a state has different bytes.

    Raises:
        BadInputError: the signature cannot be read.
    """
    return _plain_layer({f"{state.key}{signature.suffix}": signature}, _WARM, f"signature of {state.key}")


def weight_layers(weights: Path) -> tuple[Layer, ...]:
    """Make uncompressed layers of a checkpoint: one for each large file, and one for all other files.

    Raises:
        WeightsError: a file differs from the record.
        BadInputError: a file cannot be read.
    """
    record = verify(weights)
    names = [RECORD_NAME, *(file.path for file in record.files)]
    large = [file.path for file in sorted(record.files) if file.size >= _LARGE]
    groups = [sorted(set(names) - set(large)), *([name] for name in large)]
    return tuple(
        _plain_layer({name: weights / name for name in group}, _WEIGHTS, f"weights {' '.join(group)}")
        for group in groups
    )


def _plain_layer(files: Mapping[str, Path], folder: PurePosixPath, title: str) -> Layer:
    """Make an uncompressed layer of files. The keys of `files` are their paths below `folder` in the image."""
    sha256, size = hashlib.sha256(), 0
    try:
        entries = [
            *_parents(folder),
            _folder_entry(folder, mode=0o755),
            *(_folder_entry(folder / parent, mode=0o755) for parent in _folders_of(files)),
            *(_file_entry(folder / name, path) for name, path in files.items()),
        ]
        for chunk in _tar_chunks(entries):
            sha256.update(chunk)
            size += len(chunk)
    except OSError as error:
        raise from_os_error(error, f"reading the files of the layer {title!r}") from error
    return Layer(
        digest=sha256.hexdigest(),
        diff_id=sha256.hexdigest(),
        size=size,
        media_type=OCI_LAYER,
        packer=_TAR,
        title=title,
        open=lambda: chunk_stream(_tar_chunks(entries)),
    )


def _folders_of(files: Iterable[str]) -> list[str]:
    """Return the folders of relative paths, outer ones first. An engine may make a missing one inaccessible."""
    return sorted({str(parent) for name in files for parent in PurePosixPath(name).parents if parent.name})


def _tar_chunks(entries: Sequence[Entry]) -> Generator[bytes]:
    """Yield the bytes of a tar in chunks of at most a megabyte."""
    for info, path in entries:
        yield info.tobuf(tarfile.PAX_FORMAT)
        if path is None:
            continue
        unread = info.size
        with open_regular(path, follow_links=True) as stream:
            while unread:
                chunk = stream.read(min(_CHUNK, unread))
                if not chunk:
                    raise OSError(0, "the file became shorter while it was read", str(path))
                unread -= len(chunk)
                yield chunk
        yield b"\0" * (-info.size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _hashed(chunks: Iterator[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _parents(path: PurePosixPath) -> list[Entry]:
    return [_folder_entry(parent, mode=0o755) for parent in [*reversed(path.parents)][1:]]


def _state_entries(root: Path, target: PurePosixPath) -> Iterator[Entry]:
    """Yield the entries of a state's folder and everything in it, sorted by name."""
    yield _folder_entry(target)
    for path in sorted(root.rglob("*")):
        name = target / path.relative_to(root).as_posix()
        yield _folder_entry(name) if path.is_dir() else _file_entry(name, path)


def _folder_entry(path: PurePosixPath, *, mode: int = 0o555) -> Entry:
    info = tarfile.TarInfo(str(path))  # with modification time 0 and owner root
    info.type, info.mode = tarfile.DIRTYPE, mode
    return info, None


def _file_entry(path: PurePosixPath, source: Path) -> Entry:
    info = tarfile.TarInfo(str(path))
    info.mode, info.size = 0o444, source.stat().st_size
    return info, source
