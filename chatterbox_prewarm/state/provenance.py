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
from chatterbox_prewarm.state.manifest import UNKNOWN, Provenance
from chatterbox_prewarm.system.fingerprint import package_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: What only the builder knows, told through the environment.
REVISION = "CHATTERBOX_PREWARM_REVISION"
BASE_DIGEST = "CHATTERBOX_PREWARM_BASE_DIGEST"
BUILDER = "CHATTERBOX_PREWARM_BUILDER"
#: The Dockerfile's build arguments of the same, and the variables that its step sets from them.
ARGUMENTS = {"SOURCE_REVISION": REVISION, "BASE_DIGEST": BASE_DIGEST, "BUILDER": BUILDER}

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
        packages=packages_digest({name: found.version for name, found in by_name(metadata.distributions()).items()}),
        revision=os.environ.get(REVISION) or UNKNOWN,
        base_image=check_base_image(),
        builder=os.environ.get(BUILDER) or UNKNOWN,
        parameters=dict(sorted(parameters.items())),
    )


def told(arguments: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """What a builder tells of the provenance, as the Dockerfile's build arguments.

    Args:
        arguments: build arguments that are given, which count more. A `BASE` that is named by its digest tells it.
        environment: of the builder, whose variables are those of a bake.
    """
    pinned = {"BASE_DIGEST": arguments["BASE"]} if _DIGEST.fullmatch(arguments.get("BASE", "")) else {}
    variables = {name: environment[variable] for name, variable in ARGUMENTS.items() if environment.get(variable)}
    given = {name: arguments[name] for name in ARGUMENTS if arguments.get(name)}
    return {**pinned, **variables, **given}


def check_base_image(told: str | None = None) -> str:
    """The base image as the builder named it, by its digest; a bake asks before its minutes of work.

    Args:
        told: what the builder said, where it is not in this process's environment.

    Raises:
        BadInputError: it is named by a tag, which moves.
    """
    found = os.environ.get(BASE_DIGEST) if told is None else told
    if found and not _DIGEST.fullmatch(found):
        raise BadInputError(
            f"{BASE_DIGEST} is {found!r}, which is no digest of an image",
            next_step="write sha256: and 64 hexadecimal digits, with NAME@ before it if you like",
        )
    return found or UNKNOWN


def by_name(distributions: Iterable[metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """Python packages by their names, as indexes compare these (PEP 503), sorted."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in distributions:
        # What an interrupted installation leaves has no name; of two, the first on the path is imported.
        for name in (distribution.metadata.get_all("Name") or [])[:1]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution)
    return dict(sorted(found.items()))


def packages_digest(packages: Mapping[str, str]) -> str:
    """SHA-256 over the sorted lines `name==version`."""
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
