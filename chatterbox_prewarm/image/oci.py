"""Images as data: descriptors, manifests and configurations of the OCI image specification, and of Docker's before it.

Nothing here touches a disk or a network: a `Store` does, a registry's repository or a layout in a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from chatterbox_prewarm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = f"{OCI_LAYER}+gzip"
OCI_LAYER_ZSTD = f"{OCI_LAYER}+zstd"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = f"{DOCKER_LAYER}.gzip"

INDEXES = (OCI_INDEX, DOCKER_INDEX)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
#: What a layer of Docker's kind is called in an OCI manifest; the bytes are the same.
_AS_OCI = {
    DOCKER_CONFIG: OCI_CONFIG,
    DOCKER_LAYER: OCI_LAYER,
    DOCKER_LAYER_GZIP: OCI_LAYER_GZIP,
}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: A manifest or a configuration is some kilobytes; a registry may be anybody's.
MAX_DOCUMENT = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """What names a blob: its media type, its digest ("sha256:" and hexadecimal), its size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    #: "os/architecture" or "os/architecture/variant", of an entry of an index.
    platform: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found


@dataclass(frozen=True, kw_only=True)
class Document:
    """A manifest or an index, as bytes: its digest is over these."""

    media_type: str
    raw: bytes

    @property
    def digest(self) -> str:
        """Of the bytes."""
        return digest_of(self.raw)


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image: its configuration, and descriptors of its layers from the lowest up."""

    config: Mapping[str, Any]
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        """The labels of its configuration."""
        return dict((self.config.get("config") or {}).get("Labels") or {})

    @property
    def platform(self) -> str:
        """What it runs on, "os/architecture" or "os/architecture/variant"."""
        parts = (self.config.get("os"), self.config.get("architecture"), self.config.get("variant"))
        return "/".join(str(part) for part in parts if part)

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """Digests of the layers' tars, uncompressed."""
        return tuple(self.config["rootfs"]["diff_ids"])


class Readable(Protocol):
    """Where an image is read from.

    Every method raises EngineError: the place cannot be reached, refuses, or has something else than it should.
    """

    def read_manifest(self, reference: str) -> Document:
        """A manifest or an index, by tag or by digest; its bytes are checked against a digest asked for.

        Raises:
            EngineError: there is none of that name.
        """

    def has_manifest(self, reference: str) -> bool:
        """Whether there is a manifest of that tag or digest."""

    def open_blob(self, descriptor: Descriptor) -> AbstractContextManager[BinaryIO]:
        """A blob for reading, as a stream; its digest and size are checked, at its end at the latest."""


class Store(Readable, Protocol):
    """Where an image's blobs and manifests are kept: a repository of a registry, or a layout in a folder."""

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there already."""

    def put_blob(self, descriptor: Descriptor, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> None:
        """Store a blob as a stream; `opened` opens it from its beginning, for every attempt anew."""

    def put_manifest(self, document: Document, reference: str) -> None:
        """Store a manifest or an index under a tag, or under its own digest."""


def digest_of(content: bytes) -> str:
    """The digest of bytes in memory."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def dump(document: Mapping[str, Any]) -> bytes:
    """A document as bytes that depend on its content alone."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_index(document: Document) -> tuple[Descriptor, ...]:
    """The entries of an index.

    Raises:
        EngineError: it is none.
    """
    raw = _parse(document.raw, "an image index")
    try:
        return tuple(_descriptor(entry) for entry in raw["manifests"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed("an image index", error) from error


def read_image(document: Document, config: bytes) -> Image:
    """An image from its manifest and the blob of its configuration.

    Raises:
        EngineError: they are no image, or do not belong together.
    """
    manifest = _parse(document.raw, "an image manifest")
    parsed = _parse(config, "an image configuration")
    try:
        image = Image(
            config=parsed,
            layers=tuple(_descriptor(entry) for entry in manifest["layers"]),
            annotations=dict(manifest.get("annotations") or {}),
        )
        counts = len(image.layers), len(image.diff_ids)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed("an image", error) from error
    if counts[0] != counts[1]:
        raise EngineError(
            f"the image has {counts[0]} layers in its manifest and {counts[1]} in its configuration",
            next_step="build or push the image again",
        )
    return image


def config_descriptor(document: Document) -> Descriptor:
    """The descriptor of an image's configuration.

    Raises:
        EngineError: the manifest names none.
    """
    try:
        return _descriptor(_parse(document.raw, "an image manifest")["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed("an image manifest", error) from error


def to_documents(image: Image) -> tuple[Document, Descriptor, bytes]:
    """An image as an OCI manifest, with the descriptor and the bytes of its configuration."""
    config = dump(image.config)
    descriptor = Descriptor(media_type=OCI_CONFIG, digest=digest_of(config), size=len(config))
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor.to_json(),
        "layers": [layer.to_json() for layer in image.layers],
    }
    if image.annotations:
        manifest["annotations"] = dict(image.annotations)
    return Document(media_type=OCI_MANIFEST, raw=dump(manifest)), descriptor, config


def _descriptor(raw: Mapping[str, Any]) -> Descriptor:
    """Parse a descriptor; one of Docker's media types gets OCI's."""
    media_type, digest, size = raw["mediaType"], raw["digest"], raw["size"]
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is no digest of SHA-256")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{size!r} is no size")
    platform = raw.get("platform") or {}
    parts = (platform.get("os"), platform.get("architecture"), platform.get("variant"))
    return Descriptor(
        media_type=_AS_OCI.get(media_type, media_type),
        digest=digest,
        size=size,
        annotations=dict(raw.get("annotations") or {}),
        platform="/".join(part for part in parts if part),
    )


def _parse(raw: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _malformed(what, error) from error
    if not isinstance(found, dict):
        raise _malformed(what, TypeError(f"it is a {type(found).__name__}"))
    return found


def _malformed(what: str, error: Exception) -> EngineError:
    return EngineError(f"this is not {what}: {error!r}", next_step="check the reference, or build the image again")
