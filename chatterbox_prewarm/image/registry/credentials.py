"""What `docker login` left for a registry, in Docker's configuration or with a helper that it names.

The reading is docker-py's; here its silences and its errors get words.
"""

from __future__ import annotations

import base64
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatterbox_prewarm.errors import EngineError, first_line


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What `docker login` left for a registry; never printed."""

    username: str
    password: str = field(default="", repr=False)
    #: In the password's place, of registries that hand one out at the login.
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """As the value of an Authorization header."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


def find_credentials(host: str) -> Credentials | None:
    """What `docker login` left for a registry: in Docker's configuration (DOCKER_CONFIG) or with its helper.

    Raises:
        EngineError: the configuration cannot be read, or its helper is missing or fails.
    """
    import docker.auth
    import docker.errors

    path = _configuration()
    if path is None:
        return None
    try:
        with warnings.catch_warnings():
            # docker-py warns of a helper that is not installed, and then fails with the same words.
            warnings.simplefilter("ignore", UserWarning)
            found: dict[str, Any] | None = docker.auth.resolve_authconfig(docker.auth.load_config(str(path)), host)
        if not found:
            return None
        entry = {key.lower(): value for key, value in found.items()}
        if entry.get("identitytoken"):
            return Credentials(username="<token>", identity_token=str(entry["identitytoken"]))
        if entry.get("username") is None:
            return None
        return Credentials(username=str(entry["username"]), password=str(entry["password"]))
    except docker.errors.DockerException as error:
        raise EngineError(
            f"no login for {host} can be had: {first_line(error)}",
            next_step=f"install the helper that {path} names, or take it out there and log in with docker login {host}",
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # What could not be parsed may be the password: only the kind of the error is said, and nothing is chained.
        raise EngineError(
            f"the login for {host} of {path} cannot be read ({type(error).__name__})",
            next_step=f"log in anew with docker login {host}",
        ) from None


def _configuration() -> Path | None:
    """Docker's configuration, or None where there is none; docker-py takes one that is broken for none."""
    from docker.utils.config import find_config_file

    found = find_config_file()
    if found is None:
        return None
    path = Path(str(found))
    try:
        readable = path.name != "config.json" or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        readable = False
    if not readable:
        raise EngineError(
            f"Docker's configuration {path} is no JSON object that can be read",
            next_step="mend it, or name another folder in DOCKER_CONFIG",
        )
    return path
