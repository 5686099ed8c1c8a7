"""Docker archives, which `docker save` writes and `docker load` reads: a tar whose `manifest.json` lists images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, cast

from chatterbox_prewarm.errors import BadInputError, EngineError, from_os_error
from chatterbox_prewarm.image.oci import (
    MAX_DOCUMENT,
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Descriptor,
    Document,
    Image,
    digest_of,
    image_manifest,
    to_documents,
)
from chatterbox_prewarm.image.references import familiar_name
from chatterbox_prewarm.system.atomic_files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from chatterbox_prewarm.image.oci import OpenStream

_CHUNK = 1 << 20
#: The first bytes of a compressed layer (RFC 1952, RFC 8878), and its media type. A tar starts with a file name.
_MAGIC = {b"\x1f\x8b": OCI_LAYER_GZIP, b"\x28\xb5\x2f\xfd": OCI_LAYER_ZSTD}
#: The member name of a blob that contains its digest, as in an OCI layout.
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


class Archive:
    """An archive as a `Store`, read-only.

    `docker save` writes layers uncompressed, so their digests are their diff ids. `append` writes them as they are,
    usually compressed. Both kinds are read without a change.

    Args:
        path: the archive.

    Raises:
        EngineError: it is not an uncompressed archive of `docker save`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifests: list[Document] = []
        self._tags: dict[str, Document] = {}
        #: Digest -> the bytes of a configuration, or the member name of a layer.
        self._blobs: dict[str, bytes | str] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                self._read_images(tar)
        except (OSError, tarfile.TarError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if _is_oci_archive(path):
                raise EngineError(
                    f"{path} is an OCI archive and not an archive of `docker save`",
                    next_step=f"unpack it: mkdir layout && tar -xf {path} -C layout; then name it oci:layout:TAG",
                ) from error
            raise EngineError(
                f"{path} is not an archive of `docker save`: {error!r}", next_step="save the image again, uncompressed"
            ) from error

    @property
    def name(self) -> str:
        """See `Store.name`."""
        return str(self.path)

    def read_manifest(self, reference: str) -> Document:
        """Return the OCI manifest of an image, by "name:tag", or "" if the archive has only one image."""
        manifest = self._find(reference)
        if manifest is None:
            known = ", ".join(self._tags) or "(no names)"
            raise EngineError(f"{self.path} has no image {reference!r}", next_step=f"choose one that it has: {known}")
        return manifest

    def has_manifest(self, reference: str) -> bool:
        """See `Store.has_manifest`."""
        return self._find(reference) is not None

    @contextlib.contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[BinaryIO]:
        """Open a layer or a configuration. The digest is not verified here, but by every store that it is put into."""
        blob = self._blobs.get(descriptor.digest)
        if blob is None:
            raise EngineError(f"{self.path} has no blob {descriptor.digest}", next_step="save the image again")
        if isinstance(blob, bytes):
            yield BytesIO(blob)
            return
        with tarfile.open(self.path, "r:") as tar, cast("BinaryIO", tar.extractfile(blob)) as stream:
            yield stream

    def has_blob(self, descriptor: Descriptor) -> bool:
        """See `Store.has_blob`."""
        return descriptor.digest in self._blobs

    def put_blob(self, descriptor: Descriptor, open_stream: OpenStream) -> None:  # noqa: ARG002
        """Raise BadInputError: `save_archive` writes an archive as a whole."""
        self._refuse_change()

    def put_manifest(
        self,
        document: Document,  # noqa: ARG002
        reference: str,  # noqa: ARG002
        *,
        check: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> None:
        """Raise BadInputError: `save_archive` writes an archive as a whole."""
        self._refuse_change()

    def _read_images(self, tar: tarfile.TarFile) -> None:
        entries = json.loads(_read_document(tar, "manifest.json"))
        if not isinstance(entries, list) or not entries:
            raise TypeError("its manifest.json lists no images")
        for entry in entries:
            names = entry["Layers"]
            raw_config = _read_document(tar, entry["Config"])
            diff_ids = json.loads(raw_config)["rootfs"]["diff_ids"]
            layers = [_describe_layer(tar, name, diff_id) for name, diff_id in zip(names, diff_ids, strict=True)]
            config = Descriptor(media_type=OCI_CONFIG, digest=digest_of(raw_config), size=len(raw_config))
            manifest = image_manifest(config, layers)
            self._manifests.append(manifest)
            # podman writes "docker.io/acme/x:1" where Docker writes "acme/x:1".
            self._tags.update(dict.fromkeys(map(familiar_name, entry.get("RepoTags") or ()), manifest))
            self._blobs[config.digest] = raw_config
            self._blobs.update((layer.digest, name) for layer, name in zip(layers, names, strict=True))

    def _find(self, reference: str) -> Document | None:
        if not reference and len(self._manifests) == 1:
            return self._manifests[0]
        digests = {manifest.digest: manifest for manifest in self._manifests}
        return self._tags.get(reference) or digests.get(reference)

    def _refuse_change(self) -> None:
        raise BadInputError(
            f"the Docker archive {self.path} cannot be changed",
            next_step="name a registry, or a layout as oci:PATH:TAG",
        )


def _is_oci_archive(path: Path) -> bool:
    with contextlib.suppress(OSError, tarfile.TarError, LookupError), tarfile.open(path, "r:") as tar:
        return tar.getmember("oci-layout").isfile()
    return False


def _read_document(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise LookupError(name)
    with stream:
        raw = stream.read(MAX_DOCUMENT + 1)
    if len(raw) > MAX_DOCUMENT:
        raise ValueError(f"{name} is too large")
    return raw


def _describe_layer(tar: tarfile.TarFile, name: str, diff_id: str) -> Descriptor:
    """Return the descriptor of a layer.

    Computing the digest of a compressed layer reads all of it, unless its name is the digest.
    """
    stream = tar.extractfile(name)  # follows a link: `docker save` links a layer that an image has twice
    if stream is None:
        raise LookupError(name)
    with stream:
        head = stream.read(max(map(len, _MAGIC)))
        size = stream.seek(0, os.SEEK_END)
        media_type = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), OCI_LAYER)
        if media_type == OCI_LAYER:
            digest = diff_id
        elif match := _BLOB.fullmatch(name):
            digest = f"sha256:{match[1]}"
        else:
            stream.seek(0)
            sha256 = hashlib.sha256()
            while chunk := stream.read(_CHUNK):
                sha256.update(chunk)
            digest = f"sha256:{sha256.hexdigest()}"
    return Descriptor(media_type=media_type, digest=digest, size=size)


def write_archive(image: Image, tag: str, blobs: Mapping[str, OpenStream], target: BinaryIO) -> None:
    """Write an image for `docker load` as a stream.

    Args:
        image: the image.
        tag: "name:tag" of the image in the archive.
        blobs: digest -> opens the layer. Omit a layer if the engine has it, with the same layers below it: the engine
            then does not read it from the archive.
        target: a stream for writing.

    Raises:
        EngineError: a layer differs from its descriptor.
    """
    _, descriptor, config = to_documents(image)
    layers = [_member_name(layer.digest) for layer in image.layers]
    entries = [{"Config": _member_name(descriptor.digest), "RepoTags": [tag], "Layers": layers}]
    listing = json.dumps(entries).encode()
    _write_member(target, "manifest.json", len(listing), BytesIO(listing))
    _write_member(target, _member_name(descriptor.digest), len(config), BytesIO(config))
    for layer in {one.digest: one for one in image.layers}.values():  # an image can have a layer twice
        if layer.digest in blobs:
            with blobs[layer.digest]() as stream:
                digest = _write_member(target, _member_name(layer.digest), layer.size, stream)
                if digest != layer.digest or stream.read(1):
                    raise EngineError(
                        f"the content of layer {layer.digest} differs from its digest",
                        next_step="try again, or create the layer again",
                    )
    target.write(b"\0" * (2 * tarfile.BLOCKSIZE))


def save_archive(image: Image, tag: str, blobs: Mapping[str, OpenStream], path: Path) -> None:
    """Write an image to an archive file atomically.

    Raises:
        EngineError: see `write_archive`.
        BadInputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, leftovers=re.escape(path.name)) as temporary, temporary.open("wb") as stream:
            write_archive(image, tag, blobs, stream)
    except OSError as error:
        raise from_os_error(error, f"writing the archive {path}") from error


def _member_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _write_member(target: BinaryIO, name: str, size: int, stream: BinaryIO) -> str:
    """Write a tar member of `size` bytes, and return the digest of the bytes that were read."""
    info = tarfile.TarInfo(name)
    info.size = size
    target.write(info.tobuf(tarfile.PAX_FORMAT))
    sha256 = hashlib.sha256()
    remaining = size
    while chunk := stream.read(min(_CHUNK, remaining)):
        sha256.update(chunk)
        target.write(chunk)
        remaining -= len(chunk)
    target.write(b"\0" * (-size % tarfile.BLOCKSIZE))
    return f"sha256:{sha256.hexdigest()}"
