"""Images as data: descriptors, manifests and configurations, in the formats of OCI and in Docker's older formats.

This module reads no disk and no network; a `Store` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.references import is_digest

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
#: OCI's media type for each media type of Docker. The bytes are the same.
_AS_OCI = {
    DOCKER_CONFIG: OCI_CONFIG,
    DOCKER_LAYER: OCI_LAYER,
    DOCKER_LAYER_GZIP: OCI_LAYER_GZIP,
}
#: Maximum size of a manifest or a configuration in bytes. Real ones have a few kilobytes; registries are not trusted.
MAX_DOCUMENT = 4 << 20

#: Opens a blob at its first byte. It can be called again, e.g. for a retry.
OpenStream = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """Identifies a blob: media type, digest ("sha256:" and 64 hexadecimal digits) and size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    #: "os/architecture" or "os/architecture/variant". Only entries of an index have it.
    platform: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the descriptor as an entry of a manifest."""
        entry: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            entry["annotations"] = dict(self.annotations)
        return entry


@dataclass(frozen=True, kw_only=True)
class Document:
    """A manifest or an index as bytes, because its digest covers the exact bytes."""

    media_type: str
    raw: bytes

    @property
    def digest(self) -> str:
        """The digest of the bytes."""
        return digest_of(self.raw)

    @property
    def descriptor(self) -> Descriptor:
        """The descriptor of the document."""
        return Descriptor(media_type=self.media_type, digest=self.digest, size=len(self.raw))


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image: its configuration and the descriptors of its layers, lowest first."""

    config: Mapping[str, Any]
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, str]:
        """The labels of the configuration."""
        return dict((self.config.get("config") or {}).get("Labels") or {})

    @property
    def platform(self) -> str:
        """The platform: "os/architecture" or "os/architecture/variant"."""
        return _platform(self.config)

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """The digests of the uncompressed layers."""
        return tuple(self.config["rootfs"]["diff_ids"])


class Store(Protocol):
    """Stores the blobs and manifests of images: a registry repository, an OCI layout or a Docker archive.

    Every method raises EngineError if the store cannot be reached, refuses, or has damaged content.
    """

    @property
    def name(self) -> str:
        """The repository with its registry, or the path of the layout or the archive."""

    def read_manifest(self, reference: str) -> Document:
        """Read a manifest or an index by tag or digest, and verify its digest.

        Raises:
            EngineError: it does not exist.
        """

    def has_manifest(self, reference: str) -> bool:
        """Return whether a manifest with this tag or digest exists."""

    def open_blob(self, descriptor: Descriptor) -> AbstractContextManager[BinaryIO]:
        """Open a blob as a stream. Its digest and size are verified when the stream ends, or before."""

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Return whether the blob is stored already."""

    def put_blob(self, descriptor: Descriptor, open_stream: OpenStream) -> None:
        """Store a blob, and verify its digest and size.

        Raises:
            BadInputError: the store is read-only.
        """

    def put_manifest(self, document: Document, reference: str, *, check: Callable[[], None] | None = None) -> None:
        """Store a manifest or an index under a tag, or under its own digest.

        Args:
            document: the manifest or the index.
            reference: the tag or the digest.
            check: called directly before the tag is set. An error of it leaves the tag unchanged. No other process can
                set a tag of a layout between the call and the write; a registry has no such lock.

        Raises:
            BadInputError: the store is read-only.
        """


def digest_of(content: bytes) -> str:
    """Return the digest of some bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def dump(document: Mapping[str, Any]) -> bytes:
    """Serialize a document; equal documents have equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def own_media_type(raw: bytes, subject: str) -> str:
    """Return the media type that a manifest or an index states. OCI's documents need not state it.

    Raises:
        EngineError: it is neither.
    """
    with _parsing(f"a manifest: {subject}"):
        document = json.loads(raw)
        fallback = OCI_INDEX if "manifests" in document else OCI_MANIFEST if "layers" in document else ""
        media_type = document.get("mediaType", fallback)
        if media_type not in (*INDEXES, *MANIFESTS):
            raise ValueError(f"its media type is {media_type!r}")
    return str(media_type)


def read_index(document: Document) -> tuple[Descriptor, ...]:
    """Parse the entries of an index.

    Raises:
        EngineError: the index is malformed.
    """
    with _parsing("an image index"):
        return tuple(map(_descriptor, json.loads(document.raw)["manifests"]))


def read_image(document: Document, config: bytes) -> Image:
    """Parse an image from its manifest and its configuration.

    Raises:
        EngineError: they are malformed, or do not belong together.
    """
    with _parsing("an image"):
        manifest = json.loads(document.raw)
        image = Image(
            config=_check_config(json.loads(config)),
            layers=tuple(map(_descriptor, manifest["layers"])),
            annotations=_texts(manifest.get("annotations")),
        )
        counts = len(image.layers), len(image.diff_ids)
    if counts[0] != counts[1]:
        raise EngineError(
            f"the image has {counts[0]} layers in its manifest and {counts[1]} in its configuration",
            next_step="build or push the image again",
        )
    return image


def read_image_layers(document: Document) -> tuple[Descriptor, ...]:
    """Parse the descriptors of the layers from a manifest.

    Raises:
        EngineError: the manifest is malformed.
    """
    with _parsing("a manifest"):
        return tuple(map(_descriptor, json.loads(document.raw)["layers"]))


def config_descriptor(document: Document) -> Descriptor:
    """Parse the descriptor of an image's configuration from its manifest.

    Raises:
        EngineError: the manifest is malformed.
    """
    with _parsing("an image manifest"):
        return _descriptor(json.loads(document.raw)["config"])


def to_documents(image: Image) -> tuple[Document, Descriptor, bytes]:
    """Return the OCI manifest of an image, and the descriptor and the bytes of its configuration."""
    config = dump(image.config)
    descriptor = Descriptor(media_type=OCI_CONFIG, digest=digest_of(config), size=len(config))
    return image_manifest(descriptor, image.layers, image.annotations), descriptor, config


def image_manifest(
    config: Descriptor, layers: Sequence[Descriptor], annotations: Mapping[str, str] | None = None, **more: Any
) -> Document:
    """Return an OCI manifest. `more` are additional fields, such as `subject`."""
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        **more,
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    return Document(media_type=OCI_MANIFEST, raw=dump(manifest))


def image_index(entries: list[dict[str, Any]]) -> Document:
    """Return an OCI index with these entries."""
    return Document(media_type=OCI_INDEX, raw=dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}))


def _descriptor(raw: Mapping[str, Any]) -> Descriptor:
    """Parse a descriptor, and replace Docker's media types by OCI's."""
    media_type, digest, size = raw["mediaType"], raw["digest"], raw["size"]
    if not isinstance(media_type, str):
        raise TypeError(f"the media type is {media_type!r}")
    if not isinstance(digest, str) or not is_digest(digest):
        raise ValueError(f"{digest!r} is not a SHA-256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{size!r} is not a size")
    return Descriptor(
        media_type=_AS_OCI.get(media_type, media_type),
        digest=digest,
        size=size,
        annotations=_texts(raw.get("annotations")),
        platform=_platform(raw.get("platform") or {}),
    )


def _check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Check the types of the fields of a configuration that this package reads or changes."""
    settings = config.get("config") or {}
    _texts(settings.get("Labels"))
    names = [config.get(name, "") for name in ("os", "architecture", "variant")]
    for texts in (settings.get("Env") or [], config["rootfs"]["diff_ids"], names):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{texts!r} is not a list of texts")
    if not isinstance(config.get("history") or [], list):
        raise TypeError("its history is not a list")
    return config


def _texts(raw: Any) -> dict[str, str]:
    """Read labels or annotations."""
    texts = dict(raw.items()) if raw is not None else {}
    if not all(isinstance(value, str) for value in texts.values()):
        raise TypeError(f"{texts!r} has values that are not text")
    return texts


def _platform(raw: Mapping[str, Any]) -> str:
    return "/".join(str(raw[key]) for key in ("os", "architecture", "variant") if raw.get(key))


@contextlib.contextmanager
def _parsing(what: str) -> Iterator[None]:
    """Translate the errors of parsing a JSON document whose content is not trusted."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"this is not {what}: {error!r}", next_step="check the reference, or build the image again"
        ) from error
