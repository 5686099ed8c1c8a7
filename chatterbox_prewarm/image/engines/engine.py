"""The interface of a container engine, and a build and a proof on top of it."""

from __future__ import annotations

import abc
import json
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EXIT_CODES, EngineError, NotWarmError, error_with_code
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image
from chatterbox_prewarm.proof.checks import Check, Evidence
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path, PurePosixPath

    from chatterbox_prewarm.image.layer import Layer

ENGINES = ("docker", "podman")
#: User and group of a container of a finished image. The image has no entry for them in /etc/passwd.
USER = "12345:12345"


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Properties that an engine reports.

    `gpu` is how a container gets a GPU: "nvidia" (a runtime), "cdi", or "" if it gets none. `free_bytes` is the free
    space where the engine stores images, or None if that is unknown or on another machine.
    """

    name: str
    version: str
    gpu: str
    default_runtime: str
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class ContainerRun:
    """A container to run until it exits. No container has a network.

    Attributes:
        image: image to run.
        command: arguments of the image's entrypoint.
        device: torch device. The container gets the GPUs if it is a CUDA device.
        isolated: run with a read-only root, without capabilities, as `USER`, which is how a finished image must work.
        files: files to copy in before the start, by their paths in the container.
        environment: variables to add to those of the image.
        export: folder to copy out after a successful run, and the existing folder to copy it to.
        allowed: exit codes that are not failures.
        follow: log standard error while the container runs.
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


class Engine(abc.ABC):
    """A container engine that answers. Every failure raises EngineError."""

    info: EngineInfo

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection to the engine."""

    @abc.abstractmethod
    def build_command(self, arguments: Sequence[str], *, classic: bool = False) -> list[str]:
        """Return the command that builds an image with `arguments`, which Docker and podman share.

        Raises:
            EngineError: the engine has no classic builder.
        """

    @abc.abstractmethod
    def run(self, container: ContainerRun) -> tuple[int, str]:
        """Run a container, remove it in any case, and return its exit code and standard output.

        Raises:
            PrewarmError: the exit code is not allowed. The class of the error belongs to the exit code.
        """

    @abc.abstractmethod
    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """Load `image`, which is the engine's image `base` plus `layers`, as `tag`. Only the new layers are copied."""

    @abc.abstractmethod
    def exists(self, reference: str) -> bool:
        """Return whether the engine has an image of this name."""

    @abc.abstractmethod
    def tag(self, reference: str, tag: str) -> None:
        """Give an image an additional name."""

    @abc.abstractmethod
    def untag(self, tag: str) -> None:
        """Remove a name, and the image if it has no other name. A missing name is not an error."""

    @abc.abstractmethod
    def _gpu_options(self, device: str) -> list[Any]:
        """Return the options that give a container the GPUs; empty for a CPU.

        Raises:
            EngineError: `device` is a CUDA device, but the engine cannot give a container a GPU.
        """

    @abc.abstractmethod
    def _inspect(self, reference: str) -> Mapping[str, Any]:
        """Return the description of an existing image, as `image inspect` prints it, plus its `History`."""

    def check_device(self, device: str) -> None:
        """Check that a container can use a torch device.

        Raises:
            EngineError: it is a CUDA device, but the engine cannot give a container a GPU.
        """
        self._gpu_options(device)

    def image(self, reference: str) -> Image:
        """Read the configuration of an image. Of its layers, only the diff ids are known.

        Raises:
            EngineError: the engine has no such image.
        """
        self._require_image(reference)
        inspected = self._inspect(reference)
        diff_ids = inspected["RootFS"].get("Layers") or []
        config: dict[str, Any] = {
            "architecture": inspected["Architecture"],
            "os": inspected["Os"],
            "config": dict(inspected["Config"]),
            "created": inspected["Created"],
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": inspected.get("History") or [],
        }
        config |= {name.lower(): inspected[name] for name in ("Author", "Variant") if inspected.get(name)}
        if inspected.get("Healthcheck"):  # podman reports it outside the configuration
            config["config"]["Healthcheck"] = inspected["Healthcheck"]
        layers = tuple(Descriptor(media_type=OCI_LAYER, digest=diff_id, size=0) for diff_id in diff_ids)
        return Image(config=config, layers=layers, annotations=inspected.get("Annotations") or {})

    def _require_image(self, reference: str) -> None:
        if not self.exists(reference):
            raise EngineError(f"{self.info.name} has no image {reference!r}", next_step="build or pull it")


def prove(engine: Engine, image: str, *, device: str, variant: str | None = None, converts: bool = False) -> Evidence:
    """Run `prove` in an isolated container of `image`.

    Args:
        engine: has the image.
        image: its name.
        device: of the start.
        variant: of the model to prove, if the image has several.
        converts: prove a start that converts speech.

    Raises:
        EngineError: there is no such image, or the container did not print evidence.
    """
    command = ["prove", "--here", "--device", device, "--evidence", "-"]
    command += [*(["--variant", variant] if variant else []), *(["--convert"] if converts else [])]
    container = ContainerRun(image=image, command=command, device=device, allowed=(0, NotWarmError.exit_code))
    _, output = engine.run(container)
    try:
        raw: dict[str, Any] = json.loads(output)
        return Evidence(**{**raw, "checks": tuple(Check(**check) for check in raw["checks"])})
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(
            f"the container of {image!r} did not print evidence but {output[:200]!r}",
            next_step="check that the image is one of this project, and that its version is not newer than this one",
        ) from error


def run_build(engine: Engine, arguments: Sequence[str], *, dockerfile: str | None = None) -> None:
    """Build an image. The lines of its log are details of the present work.

    Args:
        engine: engine to build with.
        arguments: arguments of the build.
        dockerfile: text of the Dockerfile for the classic builder, which reads it from standard input.

    Raises:
        EngineError: the build failed.
    """
    command = engine.build_command(arguments, classic=dockerfile is not None)
    finished = run_process(command, follow=True, input=dockerfile)
    if finished.returncode != 0:
        raise EngineError(
            f"the build ended with status {finished.returncode}", next_step="see the end of its log above"
        )


def parse_version(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def version_error(name: str, version: str, oldest: tuple[int, int]) -> EngineError:
    """Return the error for an engine that is older than `oldest`, which the Dockerfile needs."""
    other = next(engine for engine in ENGINES if engine != name.lower())
    return EngineError(
        f"{name} {version} is too old: the Dockerfile needs {'.'.join(map(str, oldest))} or newer",
        next_step=f"upgrade {name}, or use --engine {other}",
    )


def check_status(status: int, allowed: Sequence[int], stderr: str) -> None:
    """Raise the error that belongs to a container's exit code, unless the code is allowed."""
    if status not in allowed:
        raise error_with_code(
            status if status in EXIT_CODES else EngineError.exit_code,
            f"the container ended with status {status}: {stderr[-2000:].strip()}",
            "see its output above, or run it by hand with the flags of the README",
        )


def free_bytes(folder: Path) -> int | None:
    """Return the free space of the disk that has `folder`, or None if the folder cannot be read."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
