"""The Docker engine, through docker-py: what it can do, containers that leave nothing behind, images with more in."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.docker_archive import write_archive
from chatterbox_prewarm.image.engines.engine import USER, Facts, Run, check_status, parse_version
from chatterbox_prewarm.image.engines.transfer import packed, unpack
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image
from chatterbox_prewarm.system.paths import CACHE
from chatterbox_prewarm.system.process import undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import PurePosixPath

    from docker import DockerClient
    from docker.models.containers import Container

    from chatterbox_prewarm.image.layer import Layer

logger = logging.getLogger(__name__)

#: The oldest engine whose BuildKit understands the Dockerfile.
_OLDEST = (20, 10)
#: How an image is meant to be run.
_ISOLATED: Mapping[str, Any] = {
    "read_only": True,
    "network_mode": "none",
    "user": USER,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "", str(CACHE): "exec,mode=1777"},  # noqa: S108 - a path in the container
}


class DockerEngine:
    """A Docker engine as an `Engine`.

    Args:
        timeout: seconds that a single call may take, a whole bake among them.

    Raises:
        EngineError: none answers, or it is too old.
    """

    def __init__(self, *, timeout: float = 7200.0) -> None:
        import docker
        import docker.errors

        with _failing("reach the Docker engine", "start the engine, or set DOCKER_HOST"):
            try:
                self._client: DockerClient = docker.from_env(timeout=int(timeout))
            except docker.errors.InvalidVersion as error:
                raise _too_old(f"so old that docker-py cannot talk to it ({error})") from error
            info: dict[str, Any] = self._client.info()
        self.facts = _facts(info)
        if parse_version(self.facts.version) < _OLDEST:
            self.close()
            raise _too_old(self.facts.version)

    def close(self) -> None:
        """As `Engine`."""
        self._client.close()

    def check_device(self, device: str) -> None:
        """As `Engine`."""
        self._gpus(device)

    def build_command(self, arguments: Sequence[str], *, classic: bool = False) -> list[str]:
        """As `Engine`; docker-py knows only the builder without mounts, so it is the client: `$DOCKER`, or `docker`."""
        client = os.environ.get("DOCKER", "docker")
        if classic:
            # A step that fails leaves its container otherwise.
            return ["env", "DOCKER_BUILDKIT=0", client, "build", "--force-rm", *arguments]
        return ["env", "DOCKER_BUILDKIT=1", client, "build", "--progress=plain", *arguments]

    def run(self, container: Run) -> tuple[int, str]:
        """As `Engine`."""
        settings = dict(_ISOLATED if container.isolated else {"network_mode": "none"})
        with self._container(
            container.image,
            container.command,
            device_requests=self._gpus(container.device),
            environment=dict(container.environment),
            **settings,
        ) as made:
            for place, source in container.files.items():
                self._copy_in(made, source, place)
            with _failing("run the container", "see the engine's log"):
                made.start()
                if container.follow:
                    for line in made.logs(stdout=False, stream=True, follow=True):
                        logger.info("%s", line.decode(errors="replace").rstrip())
                status = int(made.wait()["StatusCode"])
                output = made.logs(stdout=True, stderr=False).decode(errors="replace")
                said = made.logs(stdout=False).decode(errors="replace")
            check_status(status, container.allowed, said)
            if container.export:
                self._copy_out(made, *container.export)
        return status, output

    def _gpus(self, device: str) -> list[Any]:
        """The device requests of a container for a torch device; none for a CPU."""
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
    def _container(self, image: str, command: Sequence[str], **settings: Any) -> Iterator[Container]:
        """A container that is removed at the end, whatever happens."""
        import docker.errors

        made: Container | None = None
        try:
            # The engine makes it, whether anybody waits for the answer, which has the name that it is removed by.
            with undisturbed(), _failing(f"run {image!r}", "see the engine's log"):
                try:
                    made = self._client.containers.create(image, list(command), **settings)
                except docker.errors.ImageNotFound as error:
                    raise EngineError(f"there is no image {image!r}", next_step="build it: make image") from error
            logger.info("container %s of %s: %s", made.short_id, image, " ".join(command))
            yield made
        finally:
            if made is not None:
                with undisturbed(), contextlib.suppress(docker.errors.NotFound):
                    made.remove(force=True, v=True)

    def _copy_in(self, container: Container, source: Path, target: PurePosixPath) -> None:
        """Copy a file into a container that has not run yet.

        Raises:
            BadInputError: the file cannot be read.
        """
        with (
            packed(source, target.name) as spool,
            _failing(f"copy {source} into the container", "see the engine's log"),
        ):
            container.put_archive(str(target.parent), spool)

    def _copy_out(self, container: Container, source: PurePosixPath, target: Path) -> None:
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
            unpack(spool, target)

    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """As `Engine`: for a layer whose like it has above the same others, Docker does not look into the archive."""
        with tempfile.TemporaryFile() as spool:
            write_archive(image, tag, {layer.descriptor.digest: layer.opened for layer in layers}, spool)
            spool.seek(0)
            doing = f"load {tag!r}, which is {base!r} with more layers"
            with _failing(doing, "see the engine's log"):
                # To its end, even after an error: only then the connection can be closed.
                said: list[dict[str, Any]] = list(self._client.api.load_image(spool))  # type: ignore[no-untyped-call]
            if failures := [line["errorDetail"]["message"] for line in said if "errorDetail" in line]:
                raise EngineError(f"cannot {doing}: {'; '.join(failures)}", next_step="see the engine's log")
            with _failing(doing, "see the engine's log"):
                found = self._client.images.get(tag).attrs["RootFS"]["Layers"]
        if tuple(found) != image.diff_ids:
            raise EngineError(
                f"the engine made something else of {tag!r}: {len(found)} layers",
                next_step="append in a registry instead",
            )

    def image(self, reference: str) -> Image:
        """As `Engine`."""
        import docker.errors

        with _failing(f"read {reference!r}", "see the engine's log"):
            try:
                found = self._client.images.get(reference)
            except docker.errors.ImageNotFound as error:
                raise EngineError(f"there is no image {reference!r}", next_step="build or pull it") from error
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
        """As `Engine`."""
        import docker.errors

        with _failing(f"look for {reference!r}", "see the engine's log"):
            try:
                self._client.images.get(reference)
            except docker.errors.ImageNotFound:
                return False
        return True

    def tag(self, reference: str, tag: str) -> None:
        """As `Engine`."""
        name, _, label = tag.rpartition(":") if ":" in tag.rpartition("/")[2] else (tag, "", "latest")
        with _failing(f"tag {tag!r}", "see the engine's log"):
            self._client.images.get(reference).tag(name, label)

    def forget(self, tag: str) -> None:
        """As `Engine`."""
        import docker.errors

        with _failing(f"remove {tag!r}", "remove it by hand"), contextlib.suppress(docker.errors.ImageNotFound):
            self._client.images.remove(tag, force=True)


@contextlib.contextmanager
def _failing(doing: str, next_step: str) -> Iterator[None]:
    """Put what docker-py raises into the tree of errors."""
    import docker.errors
    import requests.exceptions

    try:
        yield
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise EngineError(f"cannot {doing}: {error}", next_step=next_step) from error


def _too_old(found: str) -> EngineError:
    return EngineError(
        f"the Docker engine is {found}; {'.'.join(map(str, _OLDEST))} is the oldest with BuildKit",
        next_step="upgrade the engine, or use --engine podman",
    )


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
        name="Docker",
        version=str(info.get("ServerVersion", "0")),
        gpu=gpu,
        default_runtime=str(info.get("DefaultRuntime", "")),
        free=free,
    )


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
