"""Provenance: what a bake was made from that the bake can see itself, and what the builder tells it.

A claim like all else in a manifest: it is worth what the signature over the manifest is worth.
"""

from __future__ import annotations

import hashlib
import os
import re
from importlib import metadata
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.fingerprint import package_digest
from chatterbox_prewarm.manifest import UNKNOWN, Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What only the builder knows, told through the environment.
REVISION = "CHATTERBOX_PREWARM_REVISION"
BASE_DIGEST = "CHATTERBOX_PREWARM_BASE_DIGEST"
BUILDER = "CHATTERBOX_PREWARM_BUILDER"

_DIGEST = re.compile(r"(?:\S+@)?sha256:[0-9a-f]{64}")


def read_provenance(parameters: Mapping[str, str]) -> Provenance:
    """The provenance of a bake in this process.

    Args:
        parameters: of the bake, by name.

    Raises:
        BadInputError: the base image is named by a tag, which moves.
    """
    return Provenance(
        source=package_digest("chatterbox_prewarm"),
        packages=packages_digest(installed_packages()),
        revision=os.environ.get(REVISION) or UNKNOWN,
        base_image=check_base_image(),
        builder=os.environ.get(BUILDER) or UNKNOWN,
        parameters=dict(sorted(parameters.items())),
    )


def check_base_image() -> str:
    """The base image as the builder named it, by its digest; a bake asks before its minutes of work.

    Raises:
        BadInputError: it is named by a tag, which moves.
    """
    found = os.environ.get(BASE_DIGEST)
    if found and not _DIGEST.fullmatch(found):
        raise BadInputError(
            f"{BASE_DIGEST} is {found!r}, which is no digest of an image",
            next_step="write sha256: and 64 hexadecimal digits, with NAME@ before it if you like",
        )
    return found or UNKNOWN


def installed_packages() -> dict[str, str]:
    """Versions of the Python packages that this interpreter would import, by their normalized names."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # What an interrupted installation leaves has no name; of two, the first on the path is imported.
        if name := distribution.metadata["Name"]:
            found.setdefault(normalized(name), distribution.version)
    return found


def normalized(name: str) -> str:
    """A distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages_digest(packages: Mapping[str, str]) -> str:
    """SHA-256 over the sorted lines `name==version`."""
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
