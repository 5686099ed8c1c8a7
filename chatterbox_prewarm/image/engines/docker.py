"""The Docker engine, through docker-py."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.docker_archive import write_archive
from chatterbox_prewarm.image.engines.engine import (
    USER,
    ContainerRun,
    Engine,
    EngineInfo,
    check_status,
    free_bytes,
    parse_version,
    version_error,
)
from chatterbox_prewarm.image.engines.transfer import packed, unpack
from chatterbox_prewarm.system.paths import CACHE
from chatterbox_prewarm.system.process import deferred_interrupts
from chatterbox_prewarm.system.progress import detail

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import PurePosixPath

    from docker import DockerClient
    from docker.models.containers import Container

    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image

logger = logging.getLogger(__name__)

#: The oldest engine whose BuildKit understands the Dockerfile.
_OLDEST = (20, 10)
#: Settings of an isolated container.
_ISOLATED: Mapping[str, Any] = {
    "read_only": True,
    "user": USER,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "", str(CACHE): "exec,mode=1777"},  # noqa: S108 - a path in the container
}


class DockerEngine(Engine):
    """Docker as an `Engine`.

    Args:
        timeout: seconds that one call may take. Waiting for a bake is one call.

    Raises:
        EngineError: no engine answers, or it is too old.
    """

    def __init__(self, *, timeout: float = 7200.0) -> None:
        import docker
        import docker.errors

        with _engine_errors("reach the Docker engine", "start the engine, or set DOCKER_HOST"):
            try:
                self._client: DockerClient = docker.from_env(timeout=int(timeout))
            except docker.errors.InvalidVersion as error:
                raise version_error("Docker", f"({error})", _OLDEST) from error
            self.info = _info(self._client.info())
        if parse_version(self.info.version) < _OLDEST:
            self.close()
            raise version_error("Docker", self.info.version, _OLDEST)

    def close(self) -> None:
        """Close the connections of docker-py."""
        self._client.close()

    def build_command(self, arguments: Sequence[str], *, classic: bool = False) -> list[str]:
        """Return a command of the Docker client (`$DOCKER`, or `docker`), because docker-py cannot use BuildKit."""
        client = os.environ.get("DOCKER", "docker")
        if classic:
            # Without --force-rm, a step that fails leaves its container behind.
            return ["env", "DOCKER_BUILDKIT=0", client, "build", "--force-rm", *arguments]
        return ["env", "DOCKER_BUILDKIT=1", client, "build", "--progress=plain", *arguments]

    def run(self, container: ContainerRun) -> tuple[int, str]:
        """See `Engine.run`."""
        with self._created(container) as created:
            for path, source in container.files.items():
                with packed(source, path.name) as tar, _engine_errors(f"copy {source} into the container"):
                    created.put_archive(str(path.parent), tar)
            with _engine_errors("run the container"):
                created.start()
                if container.follow:
                    for line in created.logs(stdout=False, stream=True, follow=True):
                        detail(line.decode(errors="replace").rstrip())
                status = int(created.wait()["StatusCode"])
                output = created.logs(stdout=True, stderr=False).decode(errors="replace")
                stderr = created.logs(stdout=False).decode(errors="replace")
            check_status(status, container.allowed, stderr)
            if container.export:
                _copy_out(created, *container.export)
        return status, output

    @contextlib.contextmanager
    def _created(self, container: ContainerRun) -> Iterator[Container]:
        """Create a container, and remove it at the end in any case."""
        import docker.errors

        self._require_image(container.image)
        settings: dict[str, Any] = {
            "network_mode": "none",
            "environment": dict(container.environment),
            "device_requests": self._gpu_options(container.device),
            **(_ISOLATED if container.isolated else {}),
        }
        created: Container | None = None
        try:
            # An interrupted call would not return the container's ID, but the engine would still create it.
            with deferred_interrupts(), _engine_errors(f"run {container.image!r}"):
                created = self._client.containers.create(container.image, list(container.command), **settings)
            logger.info("container %s of %s: %s", created.short_id, container.image, " ".join(container.command))
            yield created
        finally:
            if created is not None:
                with deferred_interrupts(), contextlib.suppress(docker.errors.NotFound):
                    created.remove(force=True, v=True)

    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """See `Engine.load`. The archive does not contain the base's layers, because Docker skips known layers."""
        failing = f"load {tag!r}, which is {base!r} with more layers"
        with tempfile.TemporaryFile() as archive:
            write_archive(image, tag, {layer.descriptor.digest: layer.open for layer in layers}, archive)
            archive.seek(0)
            with _engine_errors(failing):
                # Read to the end even after an error: the connection cannot be closed earlier.
                lines: list[dict[str, Any]] = list(self._client.api.load_image(archive))  # type: ignore[no-untyped-call]
        if failures := [line["errorDetail"]["message"] for line in lines if "errorDetail" in line]:
            raise EngineError(f"cannot {failing}: {'; '.join(failures)}", next_step="see the engine's log")
        loaded = self.image(tag).diff_ids
        if loaded != image.diff_ids:
            raise EngineError(
                f"the engine loaded {tag!r} with other layers: {len(loaded)} instead of {len(image.diff_ids)}, or "
                "other digests",
                next_step="append in a registry instead",
            )

    def exists(self, reference: str) -> bool:
        """See `Engine.exists`."""
        import docker.errors

        with _engine_errors(f"look for {reference!r}"):
            try:
                self._client.images.get(reference)
            except docker.errors.ImageNotFound:
                return False
        return True

    def tag(self, reference: str, tag: str) -> None:
        """See `Engine.tag`."""
        name, _, label = tag.rpartition(":") if ":" in tag.rpartition("/")[2] else (tag, "", "latest")
        with _engine_errors(f"tag {tag!r}"):
            self._client.images.get(reference).tag(name, label)

    def untag(self, tag: str) -> None:
        """See `Engine.untag`."""
        import docker.errors

        with _engine_errors(f"remove {tag!r}", "remove it by hand"), contextlib.suppress(docker.errors.ImageNotFound):
            self._client.images.remove(tag, force=True)

    def _gpu_options(self, device: str) -> list[Any]:
        import docker.types

        if not device.startswith("cuda"):
            return []
        if self.info.gpu == "cdi":
            return [docker.types.DeviceRequest(driver="cdi", device_ids=["nvidia.com/gpu=all"])]
        if self.info.gpu == "nvidia":
            return [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]
        raise EngineError(
            "the Docker engine gives containers no GPU: it has no runtime `nvidia` and no CDI device",
            next_step="install the NVIDIA Container Toolkit (`nvidia-ctk runtime configure`), or use --device cpu",
        )

    def _inspect(self, reference: str) -> Mapping[str, Any]:
        with _engine_errors(f"read {reference!r}"):
            image = self._client.images.get(reference)
            history = image.history()
        return {**image.attrs, "History": _history(history, len(image.attrs["RootFS"].get("Layers") or []))}


@contextlib.contextmanager
def _engine_errors(failing: str, next_step: str = "see the engine's log") -> Iterator[None]:
    """Turn the exceptions of docker-py into EngineError."""
    import docker.errors
    import requests.exceptions

    try:
        yield
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise EngineError(f"cannot {failing}: {error}", next_step=next_step) from error


def _copy_out(container: Container, source: PurePosixPath, target: Path) -> None:
    """Copy the content of a container's folder to the folder `target`."""
    with tempfile.TemporaryFile() as archive:
        with _engine_errors(f"copy {source} out of the container", "see the container's output"):
            stream, _ = container.get_archive(str(source))
            for chunk in stream:
                archive.write(chunk)
        unpack(archive, target)


def _info(info: Mapping[str, Any]) -> EngineInfo:
    """Read the properties of the engine from the answer of `GET /info`."""
    devices = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or []]
    gpu = "nvidia" if "nvidia" in (info.get("Runtimes") or {}) else ""
    if any(device.startswith("nvidia.com/gpu") for device in devices):
        gpu = "cdi"
    local = info.get("Name") == Path("/proc/sys/kernel/hostname").read_text(encoding="utf-8").strip()
    return EngineInfo(
        name="Docker",
        version=str(info.get("ServerVersion", "0")),
        gpu=gpu,
        default_runtime=str(info.get("DefaultRuntime", "")),
        free_bytes=free_bytes(Path(info.get("DockerRootDir") or "/nonexistent")) if local else None,
    )


def _history(entries: Sequence[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Return an image's history in the format of its configuration, oldest entry first.

    The engine does not report which entries have a layer, so those with a size count. If their number differs from the
    number of layers, the result is one placeholder for each layer.
    """
    history = [
        {"created_by": entry["CreatedBy"], **({} if entry["Size"] else {"empty_layer": True})}
        for entry in reversed(entries)
    ]
    if sum("empty_layer" not in entry for entry in history) == layers:
        return history
    return [{"created_by": "a layer of the base"}] * layers
