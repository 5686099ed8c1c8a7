"""An OCI image layout: a folder of blobs by digest, and an index that names images by tag."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from chatterbox_prewarm.errors import EngineError, from_os_error
from chatterbox_prewarm.image.oci import INDEXES, MANIFESTS, MAX_DOCUMENT, OCI_INDEX, Descriptor, Document, dump
from chatterbox_prewarm.system.digests import hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

_TAG = "org.opencontainers.image.ref.name"
_AGAIN = "make the layout again"
_CHUNK = 1 << 20


class Layout:
    """A layout as a `Store`.

    Args:
        path: its folder; made when something is first put there.

    Raises:
        EngineError: the folder holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not (path / "oci-layout").is_file() and any(self._visible()):
            raise EngineError(f"{path} is no OCI image layout", next_step="name an empty or a new folder")

    def read_manifest(self, reference: str) -> Document:
        """As `Store`; the one image of a layout without tags is found under any tag."""
        entry = self._find(reference)
        if entry is None:
            known = ", ".join(sorted(filter(None, map(_tag, self._entries())))) or "none"
            raise EngineError(f"{self.path} has no image {reference!r}", next_step=f"choose a tag it has: {known}")
        if entry["size"] > MAX_DOCUMENT:
            raise EngineError(f"{entry['digest']} has {entry['size']} bytes, too many for a manifest", next_step=_AGAIN)
        descriptor = Descriptor(media_type=entry["mediaType"], digest=entry["digest"], size=entry["size"])
        with self.open_blob(descriptor) as stream:
            return Document(media_type=descriptor.media_type, raw=stream.read())

    def has_manifest(self, reference: str) -> bool:
        """As `Store`."""
        return self._find(reference) is not None

    @contextlib.contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[BinaryIO]:
        """As `Store`."""
        path = self._blob(descriptor.digest)
        try:
            stream = path.open("rb")
        except OSError as error:
            raise EngineError(f"{self.path} lacks the blob {descriptor.digest}", next_step=_AGAIN) from error
        with stream:
            if (found := f"sha256:{hash_file(path)}") != descriptor.digest:
                raise EngineError(f"{path} was changed: its digest is {found}", next_step=_AGAIN)
            yield stream

    def has_blob(self, descriptor: Descriptor) -> bool:
        """As `Store`: one of the right size counts, since blobs get their names when they are complete."""
        try:
            return self._blob(descriptor.digest).stat().st_size == descriptor.size
        except OSError:
            return False

    def put_blob(self, descriptor: Descriptor, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> None:
        """As `Store`."""
        with _writing(self.path):
            blobs = self.path / "blobs" / "sha256"
            blobs.mkdir(parents=True, exist_ok=True)
            sha256, size = hashlib.sha256(), 0
            with _temporary(blobs) as (stream, path), opened() as source:
                while chunk := source.read(_CHUNK):
                    sha256.update(chunk)
                    size += len(chunk)
                    stream.write(chunk)
                if f"sha256:{sha256.hexdigest()}" != descriptor.digest or size != descriptor.size:
                    raise EngineError(
                        f"{descriptor.digest} of {descriptor.size} bytes was to be stored, "
                        f"but sha256:{sha256.hexdigest()} of {size} bytes came",
                        next_step="try again; if it stays so, the source is damaged",
                    )
                stream.flush()
                path.replace(self._blob(descriptor.digest))

    def put_manifest(self, document: Document, reference: str) -> None:
        """As `Store`; a tag moves from the image that had it, which stays under its digest."""
        descriptor = Descriptor(media_type=document.media_type, digest=document.digest, size=len(document.raw))
        self.put_blob(descriptor, lambda: BytesIO(document.raw))
        with _writing(self.path), _locked(self.path):
            entry = descriptor.to_json()
            if reference != document.digest:
                entry["annotations"] = {_TAG: reference}
            entries = [_untagged(other) if _tag(other) == reference else other for other in self._entries()]
            entries.append(entry)
            named = {other["digest"] for other in entries if _tag(other)}
            unique = {
                (other["digest"], _tag(other)): other
                for other in entries
                if _tag(other) or other["digest"] not in named
            }
            index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(unique.values())}
            _write(self.path / "oci-layout", dump({"imageLayoutVersion": "1.0.0"}))
            _write(self.path / "index.json", dump(index))

    def _find(self, reference: str) -> dict[str, Any] | None:
        entries = self._entries()
        for entry in entries:
            if reference in {entry["digest"], _tag(entry)}:
                return entry
        return entries[0] if len(entries) == 1 and _tag(entries[0]) is None and ":" not in reference else None

    def _entries(self) -> list[dict[str, Any]]:
        path = self.path / "index.json"
        if not path.exists():
            return []
        try:
            entries: list[dict[str, Any]] = json.loads(path.read_bytes())["manifests"]
            known = [entry for entry in entries if entry["mediaType"] in (*INDEXES, *MANIFESTS)]
            for entry in known:
                self._blob(entry["digest"])
                _tag(entry)
                int(entry["size"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"{path} is no index of images: {error!r}", next_step=_AGAIN) from error
        return known

    def _blob(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        if algorithm != "sha256" or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            raise ValueError(f"{digest!r} is no digest of SHA-256")
        return self.path / "blobs" / algorithm / name

    def _visible(self) -> Iterator[Path]:
        return (path for path in self.path.iterdir() if path.name != ".lock")


def _tag(entry: dict[str, Any]) -> str | None:
    tag = (entry.get("annotations") or {}).get(_TAG)
    return str(tag) if tag is not None else None


def _untagged(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "annotations"}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise from_os_error(error, f"writing the layout {path}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two processes may add to one layout: its index is read and written by one at a time."""
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file under a name of its own, gone afterwards unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".")
    try:
        os.fchmod(descriptor, 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with _temporary(path.parent) as (stream, temporary):
        stream.write(content)
        stream.flush()
        temporary.replace(path)
