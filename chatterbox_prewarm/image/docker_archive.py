"""Docker archives: what `docker save` writes and `docker load` reads, a tar whose `manifest.json` lists images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from chatterbox_prewarm.errors import EngineError, from_os_error
from chatterbox_prewarm.image.oci import (
    MAX_DOCUMENT,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    Descriptor,
    Document,
    Image,
    digest_of,
    dump,
    to_documents,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    Opened = Callable[[], AbstractContextManager[BinaryIO]]

_CHUNK = 1 << 20
#: What a compressed layer begins with (RFC 1952, RFC 8878), and its media type; a tar begins with a name.
_COMPRESSED = {b"\x1f\x8b": OCI_LAYER_GZIP, b"\x28\xb5\x2f\xfd": OCI_LAYER_ZSTD}
#: The name of a member that says its digest, as in a layout.
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


class Archive:
    """The images of an archive, for reading as a `Store` is read.

    An archive of `docker save` has its layers as tars, whose digests are their diff ids. One that `append` wrote has
    them as they came, most of them compressed, and so has another digest for each; they are handed on as they are.

    Args:
        path: of the archive.

    Raises:
        EngineError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                self._images = _images(tar)
        except (OSError, tarfile.TarError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{path} is no archive of `docker save`: {error!r}", next_step="save the image again, uncompressed"
            ) from error

    def read_manifest(self, reference: str) -> Document:
        """The manifest that the image would have: by tag ("name:tag"), or of the archive's one image."""
        saved = self._find(reference)
        if saved is None:
            known = ", ".join(tag for image in self._images for tag in image.tags) or "none"
            raise EngineError(f"{self.path} has no image {reference!r}", next_step=f"choose one it has: {known}")
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": digest_of(saved.config), "size": len(saved.config)},
            "layers": [layer.to_json() for layer in saved.layers],
        }
        return Document(media_type=OCI_MANIFEST, raw=dump(manifest))

    def has_manifest(self, reference: str) -> bool:
        """Whether there is such an image."""
        return self._find(reference) is not None

    @contextlib.contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[BinaryIO]:
        """A layer or a configuration by its digest; whoever stores it compares it with that."""
        for saved in self._images:
            if digest_of(saved.config) == descriptor.digest:
                yield BytesIO(saved.config)
                return
            for layer, name in zip(saved.layers, saved.names, strict=True):
                if layer.digest == descriptor.digest:
                    with tarfile.open(self.path, "r:") as tar, cast("BinaryIO", tar.extractfile(name)) as stream:
                        yield stream
                    return
        raise EngineError(f"{self.path} has no blob {descriptor.digest}", next_step="save the image again")

    def _find(self, reference: str) -> _Saved | None:
        for saved in self._images:
            if reference in saved.tags:
                return saved
        return self._images[0] if len(self._images) == 1 and not reference else None


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """An image of an archive: its tags, its configuration, its layers and the members that hold them."""

    tags: tuple[str, ...]
    config: bytes
    layers: tuple[Descriptor, ...]
    names: tuple[str, ...]

    @classmethod
    def read(cls, tar: tarfile.TarFile, entry: Mapping[str, Any]) -> _Saved:
        """Read what `manifest.json` says of an image."""
        config = _document(tar, entry["Config"])
        diff_ids = json.loads(config)["rootfs"]["diff_ids"]
        return cls(
            tags=tuple(entry.get("RepoTags") or ()),
            config=config,
            names=tuple(entry["Layers"]),
            layers=tuple(_layer(tar, name, diff_id) for diff_id, name in zip(diff_ids, entry["Layers"], strict=True)),
        )


def _images(tar: tarfile.TarFile) -> list[_Saved]:
    listed = json.loads(_document(tar, "manifest.json"))
    if not isinstance(listed, list) or not listed:
        raise TypeError("its manifest.json lists no images")
    return [_Saved.read(tar, entry) for entry in listed]


def _document(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise LookupError(name)
    with stream:
        raw = stream.read(MAX_DOCUMENT + 1)
    if len(raw) > MAX_DOCUMENT:
        raise ValueError(f"{name} is too large")
    return raw


def _layer(tar: tarfile.TarFile, name: str, diff_id: str) -> Descriptor:
    """What describes the layer of a member; `docker save` links one that an image has twice.

    A compressed one is read to its end for its digest, unless its name is that: whoever stores it compares them.
    """
    stream = tar.extractfile(name)  # follows links within the archive
    if stream is None:
        raise LookupError(name)
    with stream:
        head = stream.read(max(map(len, _COMPRESSED)))
        size = stream.seek(0, os.SEEK_END)
        media_type = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), OCI_LAYER)
        if media_type == OCI_LAYER:
            digest = diff_id
        elif named := _BLOB.fullmatch(name):
            digest = f"sha256:{named[1]}"
        else:
            sha256 = hashlib.sha256()
            stream.seek(0)
            while chunk := stream.read(_CHUNK):
                sha256.update(chunk)
            digest = f"sha256:{sha256.hexdigest()}"
    return Descriptor(media_type=media_type, digest=digest, size=size)


def write_archive(image: Image, tag: str, blobs: Mapping[str, Opened], target: BinaryIO) -> None:
    """Write an image for `docker load` as a stream.

    Args:
        image: to write.
        tag: "name:tag" that it gets.
        blobs: opens the layers by digest. One that is left out the engine must have already: with the same layers
            below it, an engine takes its own without a look at the archive.
        target: what is written to.

    Raises:
        EngineError: a blob is not what its descriptor says.
    """
    _, descriptor, config = to_documents(image)
    listed = [
        {"Config": _path(descriptor.digest), "RepoTags": [tag], "Layers": [_path(one.digest) for one in image.layers]}
    ]
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "manifest.json", BytesIO(json.dumps(listed).encode()))
        _add(tar, _path(descriptor.digest), BytesIO(config))
        for layer in {one.digest: one for one in image.layers}.values():
            if layer.digest in blobs:
                with blobs[layer.digest]() as stream:
                    _add_blob(tar, layer, stream)


def save_archive(image: Image, tag: str, blobs: Mapping[str, Opened], path: Path) -> None:
    """Write an image to an archive in a file, all of it or nothing.

    Raises:
        EngineError: as `write_archive`.
        BadInputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            write_archive(image, tag, blobs, stream)
        temporary.replace(path)
    except OSError as error:
        raise from_os_error(error, f"writing the archive {path}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _path(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _add(tar: tarfile.TarFile, name: str, content: BytesIO) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content.getvalue())
    tar.addfile(info, content)


def _add_blob(tar: tarfile.TarFile, layer: Descriptor, stream: BinaryIO) -> None:
    """A blob as a member; what is no such blob must not end as one."""
    info = tarfile.TarInfo(_path(layer.digest))
    info.size = layer.size
    checked = _Checked(stream)
    tar.addfile(info, cast("Any", checked))
    if checked.sha256.hexdigest() != layer.digest.removeprefix("sha256:") or stream.read(1):
        raise EngineError(f"the blob {layer.digest} has another content", next_step="try again, or make it again")


class _Checked:
    """Hashes what is read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.sha256.update(data)
        return data
