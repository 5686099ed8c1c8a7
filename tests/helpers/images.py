"""Small images made by hand."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.image.layer import Layer
from chatterbox_prewarm.image.oci import OCI_LAYER, OCI_LAYER_GZIP, Descriptor, Image, digest_of, to_documents

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.image.oci import Store


def tar_of(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def layer_of(files: Mapping[str, bytes]) -> Layer:
    """A layer with files, gzip-compressed."""
    plain = tar_of(files)
    packed = gzip.compress(plain, mtime=0)
    return Layer(
        digest=hashlib.sha256(packed).hexdigest(),
        diff_id=hashlib.sha256(plain).hexdigest(),
        size=len(packed),
        media_type=OCI_LAYER_GZIP,
        packer="test",
        title="a test's",
        opened=lambda: contextlib.closing(io.BytesIO(packed)),
    )


def make_base(store: Store, tag: str, *, architecture: str = "amd64", **config: Any) -> Image:
    """An image of one layer, in a store."""
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
    document, descriptor, text = to_documents(image)
    store.put_blob(layer, lambda: nullcontext(io.BytesIO(raw)))
    store.put_blob(descriptor, lambda: nullcontext(io.BytesIO(text)))
    store.put_manifest(document, tag)
    return image


def make_bases(store: Store, *architectures: str, **config: Any) -> list[dict[str, Any]]:
    """A base for each architecture, under its name as a tag; as an index lists them."""
    entries = []
    for architecture in architectures:
        make_base(store, architecture, architecture=architecture, **config)
        document = store.read_manifest(architecture)
        entries.append(
            {
                "mediaType": document.media_type,
                "digest": document.digest,
                "size": len(document.raw),
                "platform": {"os": "linux", "architecture": architecture},
            }
        )
    return entries
