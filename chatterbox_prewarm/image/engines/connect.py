"""Connect to a container engine by name."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.image.engines.engine import Engine, prove
from chatterbox_prewarm.image.labels import PREFIX, variants_of
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT

if TYPE_CHECKING:
    from chatterbox_prewarm.proof.checks import Evidence


def connect(name: str = "docker") -> Engine:
    """Connect to the engine `name`, one of `ENGINES`.

    Raises:
        EngineError: the engine does not answer or is too old.
    """
    if name == "podman":
        from chatterbox_prewarm.image.engines.podman import PodmanEngine

        return PodmanEngine()
    from chatterbox_prewarm.image.engines.docker import DockerEngine

    return DockerEngine()


def image_variants(image: str, *, engine: str = "docker") -> list[str]:
    """Return the variants of an image's models, from its label.

    Raises:
        EngineError: there is no such image.
    """
    with contextlib.closing(connect(engine)) as connected:
        label = connected.image(image).labels.get(f"{PREFIX}variant", DEFAULT_VARIANT.name)
    return variants_of(label)


def prove_image(image: str, *, engine: str = "docker", variant: str | None = None, converts: bool = False) -> Evidence:
    """Prove a model of an image that the engine has, on the device that the image was built for; see `prove`."""
    with contextlib.closing(connect(engine)) as connected:
        variables = connected.image(image).config["config"].get("Env") or []
        device = dict(line.partition("=")[::2] for line in variables).get("CHATTERBOX_PREWARM_DEVICE", "cpu")
        return prove(connected, image, device=device, variant=variant, converts=converts)
