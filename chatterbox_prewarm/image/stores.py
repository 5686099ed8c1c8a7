"""Stores by reference: a registry's repository, a layout in a folder, an archive of Docker's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.docker_archive import Archive
from chatterbox_prewarm.image.oci_layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.image.oci import Readable, Store
    from chatterbox_prewarm.image.references import ImageReference


@contextlib.contextmanager
def reading(reference: ImageReference, *, insecure: bool | None = None) -> Iterator[tuple[Readable, str]]:
    """Where an image is read from, and its name there.

    Args:
        reference: of the image.
        insecure: of a registry, as `Repository` has it.

    Raises:
        EngineError: there is no such place.
    """
    if reference.kind == "docker-archive":
        assert reference.path is not None
        yield Archive(reference.path), f"{reference.familiar}:{reference.tag}" if reference.repository else ""
        return
    with storing(reference, insecure=insecure) as found:
        yield found


@contextlib.contextmanager
def storing(reference: ImageReference, *, insecure: bool | None = None) -> Iterator[tuple[Store, str]]:
    """Where an image is stored, and its name there.

    Args:
        reference: of the image.
        insecure: of a registry, as `Repository` has it.

    Raises:
        BadInputError: nothing can be added to an archive.
        EngineError: there is no such place.
    """
    if reference.kind == "docker-archive":
        raise BadInputError(
            "an archive of Docker's is written as a whole", next_step="name a registry, or a layout as oci:PATH:TAG"
        )
    if reference.kind == "oci":
        assert reference.path is not None
        yield Layout(reference.path), reference.target
        return
    from chatterbox_prewarm.image.registry.client import Repository

    with Repository(reference, insecure=insecure) as repository:
        yield repository, reference.target
