"""Connect to a container engine by its name."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.image.engines.engine import Engine, prove

if TYPE_CHECKING:
    from chatterbox_prewarm.proof.checks import Evidence


def connect(name: str = "docker") -> Engine:
    """The engine of that name.

    Raises:
        EngineError: it does not answer, or is too old.
    """
    if name == "podman":
        from chatterbox_prewarm.image.engines.podman import PodmanEngine

        return PodmanEngine()
    from chatterbox_prewarm.image.engines.docker import DockerEngine

    return DockerEngine()


def prove_image(image: str, *, engine: str = "docker") -> Evidence:
    """Prove an image of an engine's, with the device that it is made for; see `prove`."""
    with contextlib.closing(connect(engine)) as connected:
        environment = connected.image(image).config["config"].get("Env") or []
        device = dict(line.partition("=")[::2] for line in environment).get("CHATTERBOX_PREWARM_DEVICE", "cpu")
        return prove(connected, image, device=device)
