"""The Docker engine, through docker-py: what it can do, containers that leave nothing behind, images with more in."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import (
    EXIT_CODES,
    BadInputError,
    EngineError,
    NotWarmError,
    error_with_code,
    from_os_error,
)
from chatterbox_prewarm.image.archive import write_archive
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image
from chatterbox_prewarm.places import CACHE
from chatterbox_prewarm.prove import Check, Evidence

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from docker import DockerClient
    from docker.models.containers import Container

    from chatterbox_prewarm.image.layer import Layer

logger = logging.getLogger(__name__)

#: The oldest engine whose BuildKit understands the Dockerfile.
_OLDEST = (20, 10)
_USER = "12345:12345"
#: How an image is meant to be run: read-only, without network and capabilities, as a user that nobody knows.
ISOLATED: Mapping[str, Any] = {
    "read_only": True,
    "network_mode": "none",
    "user": _USER,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "", str(CACHE): "exec,mode=1777"},  # noqa: S108 - a path in the container
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an engine says of itself. `gpu` is how a container gets a GPU, "nvidia" or "cdi", or empty.

    `free` are the bytes left where it keeps images, or None when that is another machine.
    """

    version: str
    gpu: str
    default_runtime: str
    free: int | None


class Engine:
    """A Docker engine that answers.

    Args:
        timeout: seconds that a single call may take, a whole bake among them.

    Raises:
        EngineError: none answers, or it is too old.
    """

    def __init__(self, *, timeout: float = 7200.0) -> None:
        import docker

        with _failing("reach the Docker engine", "start the engine, or set DOCKER_HOST"):
            self.client: DockerClient = docker.from_env(timeout=int(timeout))
            info: dict[str, Any] = self.client.info()
        self.facts = _facts(info)
        if _version(self.facts.version) < _OLDEST:
            raise EngineError(
                f"the Docker engine is {self.facts.version}; {'.'.join(map(str, _OLDEST))} is the oldest with BuildKit",
                next_step="upgrade the engine",
            )

    def close(self) -> None:
        """Give its connections back."""
        self.client.close()

    def gpus(self, device: str) -> list[Any]:
        """The device requests of a container for a torch device; none for a CPU.

        Raises:
            EngineError: the engine gives containers no GPU.
        """
        import docker.types

        if not device.startswith("cuda"):
            return []
        if self.facts.gpu == "cdi":
            return [docker.types.DeviceRequest(driver="cdi", device_ids=["nvidia.com/gpu=all"])]
        if self.facts.gpu == "nvidia":
            return [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
        raise EngineError(
            "the Docker engine gives containers no GPU: it knows no runtime `nvidia` and no CDI device",
            next_step="install the NVIDIA Container Toolkit (`nvidia-ctk runtime configure`), or use --device cpu",
        )

    @contextlib.contextmanager
    def container(self, image: str, command: Sequence[str], **settings: Any) -> Iterator[Container]:
        """A container that is removed at the end, whatever happens.

        Raises:
            EngineError: it cannot be made; there is no such image.
        """
        import docker.errors

        with _failing(f"run {image!r}", "see the engine's log"):
            try:
                made = self.client.containers.create(image, list(command), **settings)
            except docker.errors.ImageNotFound as error:
                raise EngineError(f"there is no image {image!r}", next_step="build it: make image") from error
        logger.info("container %s of %s: %s", made.short_id, image, " ".join(command))
        try:
            yield made
        finally:
            with contextlib.suppress(docker.errors.NotFound):
                made.remove(force=True, v=True)

    def run(self, container: Container, *, allowed: Sequence[int] = (0,), follow: bool = False) -> tuple[int, str]:
        """Run a container to its end; its status and standard output.

        Args:
            container: that was made.
            allowed: the statuses that are no failure.
            follow: log what it says on the way.

        Raises:
            PrewarmError: it ended with another status: the error that the status stands for.
        """
        with _failing("run the container", "see the engine's log"):
            container.start()
            if follow:
                for line in container.logs(stdout=False, stream=True, follow=True):
                    logger.info("%s", line.decode(errors="replace").rstrip())
            status = int(container.wait()["StatusCode"])
            output = container.logs(stdout=True, stderr=False).decode(errors="replace")
            if status not in allowed:
                said = container.logs(stdout=False).decode(errors="replace")[-2000:].strip()
        if status not in allowed:
            raise error_with_code(
                status if status in EXIT_CODES else EngineError.exit_code,
                f"the container ended with status {status}: {said}",
                "see what it said above; or run it by hand with the flags of the README",
            )
        return status, output

    def copy_in(self, container: Container, source: Path, target: PurePosixPath) -> None:
        """Copy a file into a container that has not run yet.

        Raises:
            BadInputError: the file cannot be read.
        """
        with tempfile.TemporaryFile() as spool:
            try:
                with tarfile.open(fileobj=spool, mode="w") as tar, source.open("rb") as stream:
                    info = tarfile.TarInfo(target.name)
                    info.size, info.mode = source.stat().st_size, 0o444
                    tar.addfile(info, stream)
            except OSError as error:
                raise from_os_error(error, f"reading {source}") from error
            spool.seek(0)
            with _failing(f"copy {source} into the container", "see the engine's log"):
                container.put_archive(str(target.parent), spool)

    def copy_out(self, container: Container, source: PurePosixPath, target: Path) -> None:
        """Copy a folder of a container, running or ended, into the folder `target`.

        Raises:
            EngineError: it is not there, or holds a link or a special file.
            BadInputError: the target cannot be written.
        """
        with tempfile.TemporaryFile() as spool:
            with _failing(f"copy {source} out of the container", "see what the container said"):
                stream, _ = container.get_archive(str(source))
                for chunk in stream:
                    spool.write(chunk)
            spool.seek(0)
            try:
                with tarfile.open(fileobj=spool) as tar:
                    for member in tar:
                        _extract(tar, member, target)
            except OSError as error:
                raise from_os_error(error, f"writing {target}") from error

    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """Give the engine an image that is one of its own with more layers; those alone travel.

        Args:
            base: that the engine has.
            layers: the new ones.
            image: what they make together.
            tag: "name:tag" that it gets.

        Raises:
            EngineError: the engine does not take it.
        """
        with tempfile.TemporaryFile() as spool:
            write_archive(image, tag, {layer.descriptor.digest: layer.opened for layer in layers}, spool)
            spool.seek(0)
            with _failing(f"load {tag!r}, which is {base!r} with more layers", "see the engine's log"):
                self.client.images.load(spool)
                found = self.client.images.get(tag).attrs["RootFS"]["Layers"]
        if tuple(found) != image.diff_ids:
            raise EngineError(
                f"the engine made something else of {tag!r}: {len(found)} layers",
                next_step="append in a registry instead",
            )

    def image(self, reference: str) -> Image:
        """An image of the engine's; of its layers the diff ids alone are known.

        Raises:
            EngineError: there is none.
        """
        import docker.errors

        with _failing(f"read {reference!r}", "see the engine's log"):
            try:
                found = self.client.images.get(reference)
            except docker.errors.ImageNotFound as error:
                raise EngineError(f"the engine has no image {reference!r}", next_step="build or pull it") from error
            history = found.history()
        attributes: dict[str, Any] = found.attrs
        diff_ids = attributes["RootFS"].get("Layers") or []
        config: dict[str, Any] = {
            "architecture": attributes["Architecture"],
            "os": attributes["Os"],
            "config": attributes["Config"],
            "created": attributes["Created"],
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": _history(history, len(diff_ids)),
        }
        if attributes.get("Variant"):
            config["variant"] = attributes["Variant"]
        layers = tuple(Descriptor(media_type=OCI_LAYER, digest=diff_id, size=0) for diff_id in diff_ids)
        return Image(config=config, layers=layers)

    def exists(self, reference: str) -> bool:
        """Whether the engine has an image of that name."""
        import docker.errors

        with _failing(f"look for {reference!r}", "see the engine's log"):
            try:
                self.client.images.get(reference)
            except docker.errors.ImageNotFound:
                return False
        return True

    def tag(self, reference: str, tag: str) -> None:
        """Give an image one more name."""
        name, _, label = tag.rpartition(":") if ":" in tag.rpartition("/")[2] else (tag, "", "latest")
        with _failing(f"tag {tag!r}", "see the engine's log"):
            self.client.images.get(reference).tag(name, label)

    def forget(self, tag: str) -> None:
        """Remove a name, and the image that has no other."""
        import docker.errors

        with contextlib.suppress(docker.errors.ImageNotFound), _failing(f"remove {tag!r}", "remove it by hand"):
            self.client.images.remove(tag, force=True)

    def prove(self, image: str, *, device: str = "cpu") -> Evidence:
        """Run `prove` in a container of `image`: read-only, no network, no capabilities, a user that nobody knows.

        Raises:
            EngineError: there is no such image, or the container could not report.
        """
        command = ["prove", "--here", "--evidence", "-"]
        with self.container(image, command, device_requests=self.gpus(device), **ISOLATED) as container:
            _, output = self.run(container, allowed=(0, NotWarmError.exit_code))
        try:
            raw: dict[str, Any] = json.loads(output)
            return Evidence(**{**raw, "checks": tuple(Check(**check) for check in raw["checks"])})
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(
                f"the container of {image!r} printed something else than evidence: {output[:200]!r}",
                next_step="check that it is an image of this project, of a version that this one knows",
            ) from error


def prove_image(image: str) -> Evidence:
    """Prove an image of the engine's, with the device that it is made for; see `Engine.prove`."""
    with contextlib.closing(Engine(timeout=900.0)) as engine:
        environment = engine.image(image).config["config"].get("Env") or []
        device = dict(line.partition("=")[::2] for line in environment).get("CHATTERBOX_PREWARM_DEVICE", "cpu")
        return engine.prove(image, device=device)


@contextlib.contextmanager
def _failing(doing: str, next_step: str) -> Iterator[None]:
    """Put what docker-py raises into the tree of errors."""
    import docker.errors
    import requests.exceptions

    try:
        yield
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise EngineError(f"cannot {doing}: {error}", next_step=next_step) from error


def _facts(info: Mapping[str, Any]) -> Facts:
    runtimes = info.get("Runtimes") or {}
    devices = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or []]
    gpu = "nvidia" if "nvidia" in runtimes else ""
    if any(device.startswith("nvidia.com/gpu") for device in devices):
        gpu = "cdi"
    root = Path(info.get("DockerRootDir") or "/nonexistent")
    try:
        free = (
            shutil.disk_usage(root).free
            if info.get("Name") == Path("/proc/sys/kernel/hostname").read_text().strip()
            else None
        )
    except OSError:
        free = None
    return Facts(
        version=str(info.get("ServerVersion", "0")),
        gpu=gpu,
        default_runtime=str(info.get("DefaultRuntime", "")),
        free=free,
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _history(entries: Sequence[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """An image's history as its configuration has it, the oldest first; the engine does not say which made a layer.

    Those that are larger than nothing did; where that does not add up, one line for each layer stands for all.
    """
    found = [
        {"created_by": entry["CreatedBy"], **({} if entry["Size"] else {"empty_layer": True})}
        for entry in reversed(entries)
    ]
    if sum("empty_layer" not in entry for entry in found) == layers:
        return found
    return [{"created_by": "a layer of the base"}] * layers


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write a member of a container's folder below `target`, without the folder's own name.

    A container may hold anything: nothing of it may lie outside of the target.
    """
    parts = PurePosixPath(member.name).parts[1:]
    if ".." in parts or not (member.isdir() or member.isfile()):
        raise EngineError(
            f"{member.name} of the container is neither a file nor a folder", next_step="bake the warm state again"
        )
    path = target.joinpath(*parts)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    stream = tar.extractfile(member)
    if stream is None or not parts:
        raise BadInputError(f"{member.name} of the container is no folder", next_step="name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with stream, path.open("wb") as copy:
        shutil.copyfileobj(stream, copy)
