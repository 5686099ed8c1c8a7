"""OCI image layouts: a folder of blobs, and an index that names images by tag."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

from chatterbox_prewarm.errors import EngineError, from_os_error
from chatterbox_prewarm.image.oci import (
    INDEXES,
    MANIFESTS,
    MAX_DOCUMENT,
    Descriptor,
    Document,
    dump,
    image_index,
    own_media_type,
)
from chatterbox_prewarm.image.references import familiar_name, is_digest
from chatterbox_prewarm.system.atomic_files import atomic_file, write_whole
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.system.locks import open_lock_file
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from chatterbox_prewarm.image.oci import OpenStream

_TAG = "org.opencontainers.image.ref.name"
_NAME = "io.containerd.image.name"
_CREATE_AGAIN = "create the layout again"
_CHUNK = 1 << 20
_MARKER = "oci-layout"


class Layout:
    """A layout as a `Store`.

    Args:
        path: its folder; the first write creates it.

    Raises:
        EngineError: the folder has other content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not (path / _MARKER).is_file() and not _is_unfinished(path):
            raise EngineError(f"{path} is not an OCI image layout", next_step="name an empty or a new folder")

    @property
    def name(self) -> str:
        """See `Store.name`."""
        return str(self.path)

    def read_manifest(self, reference: str) -> Document:
        """See `Store.read_manifest`. If a layout has only one image and no tags, every tag finds it."""
        digest = self._digest_of(reference)
        if digest is None:
            known = ", ".join(sorted(filter(None, map(_tag, self._entries())))) or "(no tags)"
            raise EngineError(f"{self.path} has no image {reference!r}", next_step=f"choose a tag that it has: {known}")
        size = self._blob_path(digest).stat().st_size
        if size > MAX_DOCUMENT:
            raise EngineError(
                f"the manifest {digest} has {size} bytes; the limit is {MAX_DOCUMENT}", next_step=_CREATE_AGAIN
            )
        with self.open_blob(Descriptor(media_type="", digest=digest, size=size)) as stream:
            raw = stream.read()
        return Document(media_type=own_media_type(raw, f"the blob {digest} of {self.path}"), raw=raw)

    def has_manifest(self, reference: str) -> bool:
        """See `Store.has_manifest`."""
        return self._digest_of(reference) is not None

    @contextlib.contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[BinaryIO]:
        """See `Store.open_blob`. The digest is verified first."""
        path = self._blob_path(descriptor.digest)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise EngineError(f"{self.path} lacks the blob {descriptor.digest}", next_step=_CREATE_AGAIN) from error
        with stream:
            if (size := path.stat().st_size) != descriptor.size:
                raise EngineError(f"{path} has {size} bytes instead of {descriptor.size}", next_step=_CREATE_AGAIN)
            if (digest := f"sha256:{hash_file(path)}") != descriptor.digest:
                raise EngineError(f"{path} was changed: its digest is {digest}", next_step=_CREATE_AGAIN)
            yield stream

    def has_blob(self, descriptor: Descriptor) -> bool:
        """See `Store.has_blob`. Checking the size is enough, because blobs are written atomically."""
        try:
            return self._blob_path(descriptor.digest).stat().st_size == descriptor.size
        except OSError:
            return False

    def put_blob(self, descriptor: Descriptor, open_stream: OpenStream) -> None:
        """See `Store.put_blob`."""
        path = self._blob_path(descriptor.digest)
        sha256, size = hashlib.sha256(), 0
        with _writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, leftovers="[0-9a-f]{64}") as temporary:
                with temporary.open("wb") as target, open_stream() as source:
                    while chunk := source.read(_CHUNK):
                        sha256.update(chunk)
                        size += len(chunk)
                        target.write(chunk)
                if f"sha256:{sha256.hexdigest()}" != descriptor.digest or size != descriptor.size:
                    raise EngineError(
                        f"the blob {descriptor.digest} of {descriptor.size} bytes was not stored: "
                        f"its source has sha256:{sha256.hexdigest()} and {size} bytes",
                        next_step="try again; if it fails again, the source is damaged",
                    )

    def put_manifest(self, document: Document, reference: str, *, check: Callable[[], None] | None = None) -> None:
        """See `Store.put_manifest`. The image that had the tag keeps its entry, without the tag."""
        descriptor = document.descriptor
        self.put_blob(descriptor, lambda: BytesIO(document.raw))
        entry = descriptor.to_json()
        if reference != document.digest:
            entry["annotations"] = {_TAG: reference}
        with _writing(self.path), os.fdopen(open_lock_file(self.path / ".lock"), "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time reads and writes the index
            if check is not None:
                check()
            entries = self._entries()
            for existing in entries:
                if _tag(existing) == reference:
                    del existing["annotations"]
            entries.append(entry)
            tagged = {other["digest"] for other in entries if _tag(other)}
            unique = {
                (other["digest"], _tag(other)): other
                for other in entries
                if _tag(other) or other["digest"] not in tagged
            }
            write_whole(self.path / "index.json", image_index(list(unique.values())).raw.decode())

    def _digest_of(self, reference: str) -> str | None:
        """Return the digest of a manifest or an index by tag, name or digest.

        Only the tagged documents have to be in the layout's index: `skopeo copy --all` and buildx put an index there,
        whose images are only blobs.
        """
        entries = self._entries()
        if is_digest(reference):
            known = any(entry["digest"] == reference for entry in entries)
            return reference if known or self._blob_path(reference).is_file() else None
        name = familiar_name(reference)
        tagged = [entry for entry in entries if _tag(entry) == reference]
        named = [entry for entry in entries if name in _names(entry)]
        only = [entry for entry in entries if len(entries) == 1 and _tag(entry) is None]
        return next((str(entry["digest"]) for entry in (*tagged, *named, *only)), None)

    def _entries(self) -> list[dict[str, Any]]:
        """Read the manifests and indexes of the layout's index."""
        path = self.path / "index.json"
        if not path.exists():
            return []
        try:
            raw = read_regular(path, follow_links=True, limit=MAX_DOCUMENT)
            entries: list[dict[str, Any]] = json.loads(raw)["manifests"]
            images = [entry for entry in entries if entry["mediaType"] in (*INDEXES, *MANIFESTS)]
            for entry in images:
                self._blob_path(entry["digest"])
                _tag(entry)
                int(entry["size"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise EngineError(f"{path} is not an index of images: {error!r}", next_step=_CREATE_AGAIN) from error
        return images

    def _blob_path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise ValueError(f"{digest!r} is not a SHA-256 digest")
        return self.path / "blobs" / digest.replace(":", "/")


def _names(entry: dict[str, Any]) -> set[str]:
    """Return the names of an image as Docker shows them. podman stores the name as the tag, Docker separately."""
    annotations = entry.get("annotations") or {}
    return {familiar_name(str(annotations[key])) for key in (_TAG, _NAME) if annotations.get(key)}


def _tag(entry: dict[str, Any]) -> str | None:
    tag = (entry.get("annotations") or {}).get(_TAG)
    return str(tag) if tag is not None else None


def _is_unfinished(path: Path) -> bool:
    """Return whether a folder has only the files of an unfinished first write. Older versions made `blobs` first."""
    names = {child.name for child in path.iterdir() if not child.name.startswith(f".{_MARKER}.")}
    if not names <= {".lock", "blobs"}:
        return False
    return "blobs" not in names or {child.name for child in (path / "blobs").iterdir()} <= {"sha256"}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Create the layout's folder with the file that marks it, and translate errors of the file system.

    The file is written first, so that the next run can use the folder if this run is killed.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / _MARKER).is_file():
            write_whole(path / _MARKER, dump({"imageLayoutVersion": "1.0.0"}).decode())
        yield
    except OSError as error:
        raise from_os_error(error, f"writing the layout {path}") from error
