"""The Docker engine, through docker-py: run an image the way it is meant to be run, and read what it reports."""

from __future__ import annotations

import json
import logging
from typing import Any

from chatterbox_prewarm.errors import EXIT_CODES, EngineError, NotWarmError, error_with_code
from chatterbox_prewarm.places import CACHE
from chatterbox_prewarm.prove import Check, Evidence

logger = logging.getLogger(__name__)

_USER = "12345:12345"


def prove_image(image: str, *, timeout: float = 900.0) -> Evidence:
    """Run `prove` in a container of `image`: read-only, no network, no capabilities, a user that nobody knows.

    Raises:
        EngineError: no engine answers, there is no such image, or the container could not report.
    """
    import docker
    import docker.errors
    import requests.exceptions

    try:
        client = docker.from_env(timeout=int(timeout))
        container = client.containers.create(
            image,
            ["prove", "--here", "--evidence", "-"],
            read_only=True,
            network_mode="none",
            user=_USER,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            tmpfs={"/tmp": "", str(CACHE): "exec,mode=1777"},  # noqa: S108 - a path in the container
        )
    except docker.errors.ImageNotFound as error:
        raise EngineError(f"there is no image {image!r}", next_step="build it: make image") from error
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise EngineError(
            f"the Docker engine cannot run {image!r}: {error}", next_step="start the engine, or set DOCKER_HOST"
        ) from error
    logger.info("container %s of %s", container.short_id, image)
    try:
        container.start()
        status = container.wait(timeout=timeout)["StatusCode"]
        output = container.logs(stdout=True, stderr=False).decode()
        if status not in {0, NotWarmError.exit_code}:
            said = container.logs(stdout=False).decode()[-2000:].strip()
            raise error_with_code(
                status if status in EXIT_CODES else EngineError.exit_code,
                f"the container ended with status {status}: {said}",
                "run it by hand with the flags of the README",
            )
    except (docker.errors.APIError, requests.exceptions.RequestException) as error:
        raise EngineError(f"the container of {image!r} failed: {error}", next_step="see the engine's log") from error
    finally:
        container.remove(force=True)
    try:
        raw: dict[str, Any] = json.loads(output)
        return Evidence(**{**raw, "checks": tuple(Check(**check) for check in raw["checks"])})
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"the container of {image!r} printed something else than evidence: {output[:200]!r}",
            next_step="check that it is an image of this project, of a version that this one knows",
        ) from error
