"""Create small images."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.image.layer import Layer
from chatterbox_prewarm.image.oci import OCI_LAYER, OCI_LAYER_GZIP, Descriptor, Image, digest_of, to_documents

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.image.oci import Store


def tar_of(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def layer_of(files: Mapping[str, bytes]) -> Layer:
    """Return a gzip-compressed layer with these files."""
    plain = tar_of(files)
    packed = gzip.compress(plain, mtime=0)
    return Layer(
        digest=hashlib.sha256(packed).hexdigest(),
        diff_id=hashlib.sha256(plain).hexdigest(),
        size=len(packed),
        media_type=OCI_LAYER_GZIP,
        packer="test",
        title="test layer",
        open=lambda: io.BytesIO(packed),
    )


def make_base(store: Store, tag: str, *, architecture: str = "amd64", **config: Any) -> Image:
    """Store an image with one layer."""
    raw = tar_of({"etc/base": architecture.encode()})
    layer = Descriptor(media_type=OCI_LAYER, digest=digest_of(raw), size=len(raw))
    image = Image(
        config={
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/bin", "A=1"], "Labels": {"kept": "yes"}, "Cmd": ["sh"], **config},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
            "history": [{"created_by": "base"}],
        },
        layers=(layer,),
    )
    document, descriptor, raw_config = to_documents(image)
    store.put_blob(layer, lambda: io.BytesIO(raw))
    store.put_blob(descriptor, lambda: io.BytesIO(raw_config))
    store.put_manifest(document, tag)
    return image


def make_bases(store: Store, *architectures: str, **config: Any) -> list[dict[str, Any]]:
    """Store a base image per architecture, tagged with its name, and return their entries for an index."""
    entries = []
    for architecture in architectures:
        make_base(store, architecture, architecture=architecture, **config)
        document = store.read_manifest(architecture)
        entry = document.descriptor.to_json()
        entries.append({**entry, "platform": {"os": "linux", "architecture": architecture}})
    return entries
