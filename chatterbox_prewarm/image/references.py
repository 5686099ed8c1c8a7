"""Parse image references: a repository in a registry, an OCI layout or a Docker archive, in the syntax of skopeo."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from chatterbox_prewarm.errors import BadInputError

Kind = Literal["registry", "oci", "docker-archive"]

#: The registry of a reference without a host, and the host of its API.
DOCKER_HUB = "docker.io"
_DOCKER_HUB_API = "registry-1.docker.io"
DEFAULT_TAG = "latest"

_HOST = re.compile(
    r"(?:(?P<name>[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?)|\[(?P<ipv6>[0-9a-fA-F:.]+)\])(?::(?P<port>[0-9]{1,5}))?"
)
#: The grammar of the OCI distribution specification, "Pulling manifests". A name has at most 255 characters.
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_MAX_NAME = 255
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
#: The grammar of a tag in an OCI image layout ("org.opencontainers.image.ref.name").
_LAYOUT_TAG = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*"
)
#: Transports of skopeo that would otherwise be read as the name of a repository.
_OTHER_TRANSPORTS = {"oci-archive", "docker-daemon", "containers-storage", "dir"}
_EXPECTED = "HOST[:PORT]/REPOSITORY[:TAG][@sha256:…], oci:PATH[:TAG] or docker-archive:PATH[:REPOSITORY[:TAG]]"


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """Names an image, as a source or as a target.

    Attributes:
        kind: a repository in a registry, an OCI layout in a folder, or a tar of `docker save`.
        host: host of the registry, with the port if there is one. Default: "docker.io".
        repository: path of the repository; "library/NAME" for Docker Hub's official images.
        path: path of the layout or the archive.
        tag: the tag, or empty.
        digest: "sha256:…", or empty. It takes precedence over the tag.
    """

    kind: Kind
    host: str = ""
    repository: str = ""
    path: Path | None = None
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        """Return the reference in the form that `parse` reads, always with the registry."""
        named = f"{self.host}/{self.repository}" if self.repository else ""
        ending = (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")
        if self.kind == "registry":
            return named + ending
        if self.kind == "oci":
            return f"oci:{self.path}{ending}"
        return f"docker-archive:{self.path}" + (f":{named}{ending}" if named else "")

    @property
    def target(self) -> str:
        """The name of the manifest in its repository: the digest, the tag or "latest"."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def familiar(self) -> str:
        """The repository as Docker shows it: short for Docker Hub."""
        if self.host != DOCKER_HUB:
            return f"{self.host}/{self.repository}"
        return self.repository.removeprefix("library/")

    @property
    def api_host(self) -> str:
        """The host, and the port if there is one, of the registry's API."""
        return _DOCKER_HUB_API if self.host == DOCKER_HUB else self.host

    def at(self, digest: str) -> ImageReference:
        """Return a reference to the same repository by digest instead of by tag, because a tag may move."""
        return replace(self, tag="", digest=digest)


def parse(text: str) -> ImageReference:
    """Parse an image reference. One to a registry may start with "docker://", as in skopeo.

    Raises:
        BadInputError: the reference is malformed; the message shows the syntax.
    """
    transport, colon, rest = text.partition(":")
    if colon and transport == "oci":
        return _parse_layout(text, rest)
    if colon and transport == "docker-archive":
        return _parse_archive(text, rest)
    if colon and transport in _OTHER_TRANSPORTS:
        raise _bad(text, f"the transport {transport} is not supported; copy the image to an oci: folder with skopeo")
    return _parse_registry(text, text.removeprefix("docker://"))


def familiar_name(text: str) -> str:
    """Return the name of an image as Docker shows it: "acme/x:1" for "docker.io/acme/x:1". Other text is unchanged."""
    try:
        named = _parse_registry(text, text)
    except BadInputError:
        return text
    return f"{named.familiar}:{named.target}"


def is_tag(text: str) -> bool:
    """Return whether this is a valid tag in a registry."""
    return bool(_TAG.fullmatch(text))


def is_digest(text: str) -> bool:
    """Return whether this is a SHA-256 digest, the only supported kind."""
    return bool(_DIGEST.fullmatch(text))


def is_loopback(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine. Docker uses plain HTTP for such a registry."""
    match = _HOST.fullmatch(host)
    if not match:
        return False
    name = match["name"] or match["ipv6"]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def _parse_registry(text: str, rest: str) -> ImageReference:
    import docker.auth
    import docker.errors

    if "://" in rest:
        raise _bad(text, "it has a scheme")
    rest, digest = _split_digest(rest)
    if ":" in rest.rpartition("/")[2]:
        rest, _, tag = rest.rpartition(":")
        if not is_tag(tag):
            raise _bad(text, f"{tag!r} is not a tag: at most 128 letters, digits, '_', '.' and '-'")
    else:
        tag = ""
    if not rest:
        raise _bad(text, "it names no repository")
    try:
        host, repository = docker.auth.resolve_repository_name(rest)
    except (docker.errors.InvalidRepository, IndexError) as error:
        raise _bad(text, "its host is invalid") from error
    match = _HOST.fullmatch(host)
    if not match or (match["port"] and not 0 < int(match["port"]) < 1 << 16) or not _is_ipv6(match["ipv6"]):
        raise _bad(text, f"{host!r} is not a host")
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or len(host) + 1 + len(repository) > _MAX_NAME:
        raise _bad(
            text,
            f"{repository!r} is not a repository: lower-case letters and digits, separated by '.', '_', '-' and '/'",
        )
    return ImageReference(kind="registry", host=host, repository=repository, tag=tag, digest=digest)


def _parse_layout(text: str, rest: str) -> ImageReference:
    rest, digest = _split_digest(rest)
    path, colon, tag = rest.partition(":")
    if not path or (colon and not _LAYOUT_TAG.fullmatch(tag)):
        raise _bad(text, f"{tag!r} is not a tag of a layout" if path else "it names no folder")
    return ImageReference(kind="oci", path=Path(path), tag=tag, digest=digest)


def _parse_archive(text: str, rest: str) -> ImageReference:
    path, colon, name = rest.partition(":")
    if not path:
        raise _bad(text, "it names no file")
    if not colon:
        return ImageReference(kind="docker-archive", path=Path(path))
    inside = _parse_registry(text, name)
    if inside.digest:
        raise _bad(text, "an archive names its images by tags, not by digests")
    return replace(inside, kind="docker-archive", path=Path(path), tag=inside.tag or DEFAULT_TAG)


def _split_digest(rest: str) -> tuple[str, str]:
    rest, at, digest = rest.partition("@")
    if at and not is_digest(digest):
        # The text before "@" may be a password.
        raise _bad(f"…@{digest}", f"{digest!r} is not a digest: sha256: and 64 hexadecimal digits")
    return rest, digest


def _is_ipv6(ipv6: str | None) -> bool:
    """Return whether the text in brackets, if there is any, is an IPv6 address."""
    try:
        return ipv6 is None or bool(ipaddress.IPv6Address(ipv6))
    except ValueError:
        return False


def _bad(text: str, why: str) -> BadInputError:
    return BadInputError(f"{text!r} is not an image reference: {why}", next_step=f"write it as {_EXPECTED}")
