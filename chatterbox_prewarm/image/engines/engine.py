"""Container engines: what a build asks of one, and a proof in a container; Docker's and podman's stand apart."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from chatterbox_prewarm.errors import EXIT_CODES, EngineError, NotWarmError, error_with_code
from chatterbox_prewarm.proof.checks import Check, Evidence
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path, PurePosixPath

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image

logger = logging.getLogger(__name__)

ENGINES = ("docker", "podman")
#: Whom a container of a finished image runs as: a user that nobody knows.
USER = "12345:12345"
#: Where a build's log goes, whichever stream the engine's client writes it to; standard output is for results.
_STDERR = 2


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an engine says of itself.

    `gpu` is how a container gets a GPU, "nvidia" or "cdi", or empty. `free` are the bytes left where it keeps images,
    or None when that is another machine.
    """

    name: str
    version: str
    gpu: str
    default_runtime: str
    free: int | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A container that is run to its end.

    Attributes:
        image: it is of.
        command: arguments of its entrypoint.
        device: whose GPU it gets, as torch names it.
        isolated: as a finished image is meant to be run: read-only, no capabilities, as `USER`. Neither kind has a
            network.
        files: that are put in before it starts, by their places there.
        environment: variables beside those of the image.
        export: a folder to copy out of it when it ended well, and where to; that folder is there.
        allowed: exit codes that are no failure.
        follow: log what it says on the way.
    """

    image: str
    command: Sequence[str]
    device: str = "cpu"
    isolated: bool = True
    files: Mapping[PurePosixPath, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    export: tuple[PurePosixPath, Path] | None = None
    allowed: Sequence[int] = (0,)
    follow: bool = False


class Engine(Protocol):
    """A container engine that answers. Whatever it fails at raises EngineError."""

    @property
    def facts(self) -> Facts:
        """What it says of itself."""

    def close(self) -> None:
        """Give its connections back."""

    def check_device(self, device: str) -> None:
        """Make sure that a container can get the GPU of a torch device, if it is one.

        Raises:
            EngineError: the engine gives containers no GPU.
        """

    def build_command(self, arguments: Sequence[str], *, classic: bool = False) -> list[str]:
        """The command that builds an image, before those arguments that Docker's and podman's share.

        Raises:
            EngineError: it has no such builder as the classic one.
        """

    def run(self, container: Run) -> tuple[int, str]:
        """Run a container to its end, and remove it whatever happens; its exit code and standard output.

        Raises:
            PrewarmError: it ended with a code that is not allowed: the error that the code stands for.
        """

    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """Give the engine an image that is one of its own with more layers; those alone travel.

        Args:
            base: that the engine has.
            layers: the new ones.
            image: what they make together.
            tag: "name:tag" that it gets.
        """

    def image(self, reference: str) -> Image:
        """An image of the engine's; of its layers the diff ids alone are known."""

    def exists(self, reference: str) -> bool:
        """Whether the engine has an image of that name."""

    def tag(self, reference: str, tag: str) -> None:
        """Give an image one more name."""

    def forget(self, tag: str) -> None:
        """Remove a name, and the image that has no other; one that is not there is no failure."""


def prove(engine: Engine, image: str, *, device: str) -> Evidence:
    """Run `prove` in a container of `image`, isolated.

    Raises:
        EngineError: there is no such image, or the container could not report.
    """
    command = ["prove", "--here", "--device", device, "--evidence", "-"]
    _, output = engine.run(Run(image=image, command=command, device=device, allowed=(0, NotWarmError.exit_code)))
    try:
        raw: dict[str, Any] = json.loads(output)
        return Evidence(**{**raw, "checks": tuple(Check(**check) for check in raw["checks"])})
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"the container of {image!r} printed something else than evidence: {output[:200]!r}",
            next_step="check that it is an image of this project, of a version that this one knows",
        ) from error


def run_build(engine: Engine, arguments: Sequence[str], *, dockerfile: str | None = None) -> None:
    """Build an image; its log passes through.

    Args:
        engine: to build with.
        arguments: of the build.
        dockerfile: of the classic builder, which reads it from standard input.

    Raises:
        EngineError: the build failed.
    """
    command = engine.build_command(arguments, classic=dockerfile is not None)
    finished = run_process(command, stdout=_STDERR, given=dockerfile)
    if finished.returncode != 0:
        raise EngineError(
            f"the build ended with status {finished.returncode}", next_step="see the end of its log above"
        )


def parse_version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version, to be compared."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def check_status(status: int, allowed: Sequence[int], said: str) -> None:
    """Raise the error that a container's exit code stands for.

    Args:
        status: its exit code.
        allowed: those that are no failure.
        said: the end of what it printed on standard error.
    """
    if status not in allowed:
        raise error_with_code(
            status if status in EXIT_CODES else EngineError.exit_code,
            f"the container ended with status {status}: {said[-2000:].strip()}",
            "see what it said above; or run it by hand with the flags of the README",
        )
