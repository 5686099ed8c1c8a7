"""Read the states of an image whose labels do not describe them: the image of a plain `docker build`.

A Dockerfile cannot set labels from the result of a step. So the manifests of the states are read from the layers.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import tarfile
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, cast

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.compose import find_manifest, resolve
from chatterbox_prewarm.image.engines.connect import connect
from chatterbox_prewarm.image.engines.engine import ContainerRun
from chatterbox_prewarm.image.labels import PREFIX, STATES, image_labels, read_states
from chatterbox_prewarm.image.oci import MAX_DOCUMENT, digest_of
from chatterbox_prewarm.image.referrers import proven_states, read_attestations
from chatterbox_prewarm.image.statements import BakedState
from chatterbox_prewarm.image.stores import open_store
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.state.manifest_file import parse_manifest
from chatterbox_prewarm.system.paths import WARM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from chatterbox_prewarm.image.engines.engine import Engine
    from chatterbox_prewarm.image.oci import Descriptor, Image, Store
    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.referrers import Attestations
    from chatterbox_prewarm.state.manifest import Manifest

logger = logging.getLogger(__name__)

#: Only the image of the Dockerfile's last stage has this label. Its last layer contains the state.
_PROFILE = f"{PREFIX}profile"
#: Layers that are read, from the top, for images that add some layers. Larger layers contain weights or packages.
_LAYERS, _MAX_LAYER = 8, 512 << 20
_CHUNK = 1 << 20
_MANIFEST = re.compile(rf"(\./)?{WARM.relative_to('/')}/(?P<state>([^/]+/)?){re.escape(MANIFEST_NAME)}")


def with_states(store: Store, image: Image) -> Image:
    """Return an image with the labels of its states. It is returned unchanged if it has them, or has no state.

    Args:
        store: has the image.
        image: the image.

    Raises:
        EngineError: a layer cannot be read.
        IntegrityError: the manifest of a state is malformed.
    """
    if not _lacks_labels(image):
        return image
    for layer in _state_layers(image):
        if states := _read_states(store, layer):
            return _labelled(image, [state.manifest for state in states])
    return image


def baked_states(store: Store, image: Image) -> Iterator[BakedState]:
    """Yield the states in the layers of an image, newest layer first. Each layer is read when it is needed.

    Raises:
        EngineError: a layer cannot be read.
        IntegrityError: the manifest of a state is malformed.
    """
    for layer in _state_layers(image):
        yield from _read_states(store, layer)


def _state_layers(image: Image) -> list[Descriptor]:
    return [layer for layer in image.layers[: -_LAYERS - 1 : -1] if layer.size <= _MAX_LAYER]


def attested_image(
    reference: ImageReference, key: EllipticCurvePublicKey, *, platform: str, insecure: bool | None
) -> tuple[Image, Attestations]:
    """Read an image with the labels of its states, and its signed statements. The local engine has none.

    Args:
        reference: names the image.
        key: the public key of the statements.
        platform: of the image, if the reference is an index.
        insecure: for a registry, see `Repository`.

    Raises:
        EngineError: the store does not have the image.
        IntegrityError: the manifest of a state is malformed.
    """
    with open_store(reference, insecure=insecure) as (store, name):
        digest = find_manifest(store, name, platform=platform).digest
        image = with_states(store, resolve(store, digest, platform=platform))
        return image, read_attestations(store, digest, key)


def image_with_states(reference: ImageReference, *, platform: str, insecure: bool | None) -> tuple[str, Image]:
    """Read an image with the labels of its states, and with the evidence that is attached to it.

    An image that its registry does not have, or whose registry does not answer, is read from the local engine.

    Args:
        reference: names the image.
        platform: of the image, if the reference is an index.
        insecure: for a registry, see `Repository`.

    Returns:
        the digest of the image, "" if it comes from the engine, and the image.

    Raises:
        EngineError: neither the store nor an engine has the image.
        IntegrityError: the manifest of a state is malformed.
    """
    try:
        with open_store(reference, insecure=insecure) as (store, name):
            digest = store.read_manifest(name).digest
            image = with_states(store, resolve(store, digest, platform=platform))
            return digest, _with_evidence(store, digest, image)
    except EngineError as error:
        local = _from_engine(reference) if reference.kind == "registry" else None
        if local is None:
            raise
        logger.warning("%s; using the image of the local engine", error.message)
        return "", local


def _with_evidence(store: Store, digest: str, image: Image) -> Image:
    """Mark the states that were compiled without their GPU and have evidence of a proof since then."""
    states = read_states(image.labels) if STATES in image.labels else ()
    if not any(state.cross_compiled for state in states):
        return image
    proven = proven_states(store, digest)
    label = json.loads(image.labels[STATES])
    for state in label["states"]:
        state["proven"] = state["key"] in proven
    return _with_labels(image, {STATES: json.dumps(label)})


def _from_engine(reference: ImageReference) -> Image | None:
    """Return the image of the local engine with the labels of its states, or None if no engine has the image."""
    name = f"{reference.familiar}:{reference.target}"
    with contextlib.suppress(EngineError), contextlib.closing(connect()) as engine:
        if not reference.digest and engine.exists(name):
            image = engine.image(name)
            if not _lacks_labels(image):
                return image
            return _labelled(image, _inspect(engine, name))
    return None


def _inspect(engine: Engine, name: str, state: str | None = None) -> list[Manifest]:
    """Read the manifests of the states in an image by running it. Of several states, it lists only the names."""
    command = ["inspect", "--json", *(() if state is None else ("--state", state))]
    _, output = engine.run(ContainerRun(image=name, command=command))
    if state is None and (several := json.loads(output).get("states")):
        return [manifest for each in several for manifest in _inspect(engine, name, each)]
    return [parse_manifest(output.encode(), source=f"the manifest in {name}")]


def _lacks_labels(image: Image) -> bool:
    """Return whether an image comes from a plain build: it has a state, and no label that describes it."""
    return _PROFILE in image.labels and STATES not in image.labels


def _labelled(image: Image, manifests: Sequence[Manifest]) -> Image:
    """Return the image with the labels of states."""
    return _with_labels(image, image_labels(manifests))


def _with_labels(image: Image, labels: Mapping[str, str]) -> Image:
    settings = dict(image.config.get("config") or {})
    settings["Labels"] = {**image.labels, **labels}
    return replace(image, config={**image.config, "config": settings})


def _read_states(store: Store, layer: Descriptor) -> list[BakedState]:
    """Read the manifests of the states in a layer. The layer is read to its end, which verifies its digest."""
    logger.info("reading the states of the image from layer %s, %.1f MB", layer.digest, layer.size / 1e6)
    found: dict[str, bytes] = {}
    try:
        with store.open_blob(layer) as stream:
            # tarfile itself reads only the first member of a gzip stream, and `pack` writes several.
            zipped = layer.media_type.endswith("gzip")
            unzipped = cast("BinaryIO", gzip.GzipFile(fileobj=stream)) if zipped else stream
            with tarfile.open(fileobj=unzipped, mode="r|" if zipped else "r|*") as tar:
                for member in tar:
                    match = _MANIFEST.fullmatch(member.name)
                    if match and member.size <= MAX_DOCUMENT and (content := tar.extractfile(member)):
                        found[match["state"]] = content.read()
            while stream.read(_CHUNK):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise EngineError(
            f"the layer {layer.digest} cannot be read: {error!r}",
            next_step="build the image with `chatterbox-prewarm build`, which sets the labels of its states",
        ) from error
    # If the folder has a manifest, it is one state, and its folders are cache families.
    roots = [""] if "" in found else sorted(found)
    source = f"{MANIFEST_NAME} in the layer {layer.digest}"
    return [
        BakedState(manifest=parse_manifest(found[root], source=source), digest=digest_of(found[root])) for root in roots
    ]
