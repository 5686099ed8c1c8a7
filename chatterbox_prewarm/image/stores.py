"""Open the store that an image reference names."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.image.docker_archive import Archive
from chatterbox_prewarm.image.oci_layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.image.oci import Store
    from chatterbox_prewarm.image.references import ImageReference


@contextlib.contextmanager
def open_store(reference: ImageReference, *, insecure: bool | None = None) -> Iterator[tuple[Store, str]]:
    """Yield the store of an image, and the image's tag or digest in it.

    Args:
        reference: names the image.
        insecure: for a registry, see `Repository`.

    Raises:
        EngineError: the layout or the archive is malformed.
    """
    if reference.kind == "registry":
        from chatterbox_prewarm.image.registry.client import Repository

        with Repository(reference, insecure=insecure) as repository:
            yield repository, reference.target
        return
    assert reference.path is not None
    if reference.kind == "oci":
        yield Layout(reference.path), reference.target
    else:
        yield Archive(reference.path), f"{reference.familiar}:{reference.tag}" if reference.repository else ""
