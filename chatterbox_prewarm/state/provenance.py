"""Provenance of a bake: facts that the bake can see, and facts that the builder states.

Like all of the manifest, it is as trustworthy as the signature of the manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
from importlib import metadata
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.manifest import UNKNOWN, Provenance
from chatterbox_prewarm.system.fingerprint import package_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Environment variables for facts that only the builder knows.
REVISION = "CHATTERBOX_PREWARM_SOURCE_REVISION"
BASE_DIGEST = "CHATTERBOX_PREWARM_BASE_DIGEST"
BUILDER = "CHATTERBOX_PREWARM_BUILDER"
#: The build arguments of the Dockerfile for these facts, and the variable that its bake step sets from each.
ARGUMENTS = {"SOURCE_REVISION": REVISION, "BASE_DIGEST": BASE_DIGEST, "BUILDER": BUILDER}

_DIGEST = re.compile(r"(?:\S+@)?sha256:[0-9a-f]{64}")


def read_provenance(parameters: Mapping[str, str]) -> Provenance:
    """Read the provenance of a bake in this process.

    Args:
        parameters: the parameters of the bake by name.

    Raises:
        BadInputError: the base image is not given by its digest.
    """
    return Provenance(
        source=package_digest("chatterbox_prewarm"),
        packages=packages_digest({name: found.version for name, found in by_name(metadata.distributions()).items()}),
        revision=os.environ.get(REVISION) or UNKNOWN,
        base_image=check_base_image(),
        builder=os.environ.get(BUILDER) or UNKNOWN,
        parameters=dict(sorted(parameters.items())),
    )


def builder_args(arguments: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the facts of the builder as build arguments of the Dockerfile.

    Args:
        arguments: the given build arguments, which take precedence. A `BASE` with a digest gives the base image.
        environment: the environment of the builder, with the variables of a bake.
    """
    pinned = {"BASE_DIGEST": arguments["BASE"]} if _DIGEST.fullmatch(arguments.get("BASE", "")) else {}
    variables = {name: environment[variable] for name, variable in ARGUMENTS.items() if environment.get(variable)}
    given = {name: arguments[name] for name in ARGUMENTS if arguments.get(name)}
    return {**pinned, **variables, **given}


def check_base_image(stated: str | None = None) -> str:
    """Return the digest of the base image that the builder gave. A bake checks it before its minutes of work.

    Args:
        stated: the value from the builder; by default the environment variable.

    Raises:
        BadInputError: it is not a digest. Tags can change.
    """
    found = os.environ.get(BASE_DIGEST) if stated is None else stated
    if found and not _DIGEST.fullmatch(found):
        raise BadInputError(
            f"{BASE_DIGEST} is {found!r}, which is not the digest of an image",
            next_step="write sha256: and 64 hexadecimal digits, optionally after NAME@",
        )
    return found or UNKNOWN


def by_name(distributions: Iterable[metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """Return Python packages by their normalized names (PEP 503), sorted."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in distributions:
        # The remains of an interrupted installation have no name. Of two with one name, the first on the path counts.
        for name in (distribution.metadata.get_all("Name") or [])[:1]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
    return dict(sorted(found.items()))


def packages_digest(packages: Mapping[str, str]) -> str:
    """SHA-256 over the sorted lines `name==version`."""
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
