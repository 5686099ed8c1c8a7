"""The podman engine, through its command line. Podman has no daemon: when a command has ended, its work is done."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError, from_os_error
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
from chatterbox_prewarm.image.engines.transfer import unpack
from chatterbox_prewarm.image.oci import Image, to_documents
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.system.paths import CACHE
from chatterbox_prewarm.system.process import deferred_interrupts, logged_output
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import PurePosixPath

    from chatterbox_prewarm.image.layer import Layer

logger = logging.getLogger(__name__)

#: Podman 4.2 skips stages that a build does not need; 4.3 can remove a name and keep its layers for the next build.
_OLDEST = (4, 3)
#: Seconds that a command may take if it does not wait for a container. Most of these commands cannot be interrupted.
_SHORT_TIMEOUT = 1800.0
#: Seconds that `podman logs --follow` may take after the container has ended.
_FOLLOW_SECONDS = 10
#: Seconds before each attempt to remove a container. Podman fails if the container exits at the same moment.
_REMOVAL_DELAYS = (0.0, 0.5, 1.0, 2.0)
#: If fewer bytes than this are free, podman cannot even record that a container exited.
_FULL = 1 << 20
#: Options of every container: no network, and nothing that podman or its configuration adds by default.
_ALWAYS = (
    *("--pull=never", "--network=none", "--http-proxy=false", "--no-healthcheck"),
    *("--log-driver=k8s-file", "--log-opt=max-size=1gb"),
)
#: Options of an isolated container. By default, podman mounts more than these folders and makes a tmpfs executable.
_ISOLATED = (
    *("--read-only", "--read-only-tmpfs=false", f"--user={USER}"),
    *("--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--tmpfs=/tmp:noexec,mode=1777,notmpcopyup", f"--tmpfs={CACHE}:exec,mode=1777,notmpcopyup"),
)
_GPU = "nvidia.com/gpu"
_CDI = (Path("/etc/cdi"), Path("/var/run/cdi"))
_CDI_KIND = re.compile(rf"""^[^#\n]*\bkind["']?\s*:\s*["']?{re.escape(_GPU)}(?![\w.-])""", re.MULTILINE)
_SEE_PODMAN = "see podman's message; its option --log-level=debug prints more"


class PodmanEngine(Engine):
    """Podman as an `Engine`.

    Args:
        timeout: seconds that a container may run, also for a bake.

    Raises:
        EngineError: Podman is not installed, is too old, or controls another machine.
    """

    def __init__(self, *, timeout: float = 7200.0) -> None:
        self._timeout = timeout
        printed = self._podman("info", "--format=json", failing="cannot read the properties of podman")
        try:
            info: dict[str, Any] = json.loads(printed)
            self._storage = Path(info["store"]["graphRoot"])
            self._scratch: str | None = info["store"].get("imageCopyTmpDir")
            remote = bool(info["host"].get("serviceIsRemote"))
            self.info = EngineInfo(
                name="podman",
                version=str(info["version"]["Version"]),
                gpu="cdi" if _has_gpus() else "",
                default_runtime=str((info["host"].get("ociRuntime") or {}).get("name", "")),
                free_bytes=free_bytes(self._storage),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"`podman info` printed an unknown format: {error!r}", next_step="run it and check its output"
            ) from error
        if remote:
            raise EngineError(
                "podman controls another machine, but images are loaded from folders of this one",
                next_step="run this command on the machine of podman, or use --engine docker",
            )
        if parse_version(self.info.version) < _OLDEST:
            raise version_error("podman", self.info.version, _OLDEST)

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def build_command(self, arguments: Sequence[str], *, classic: bool = False) -> list[str]:
        """See `Engine.build_command`. Podman has a default network, but does not accept the name "default"."""
        if classic:
            raise EngineError("podman has no classic builder", next_step="leave --builder out, or use --engine docker")
        return ["podman", "build", *(word for word in arguments if word != "--network=default")]

    def run(self, container: ContainerRun) -> tuple[int, str]:
        """See `Engine.run`."""
        options = [*_ALWAYS, *(_ISOLATED if container.isolated else ()), *self._gpu_options(container.device)]
        self._require_image(container.image)
        name = _new_name()
        with self._removed_at_end(name), tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as stderr:
            self._start(name, options, container)
            with _logs_followed(name) if container.follow else contextlib.nullcontext():
                failing = f"cannot wait for the container of {container.image!r}"
                status = int(self._podman("wait", name, failing=failing))
            if self._call("logs", name, stdout=output, stderr=stderr).returncode != 0:
                raise EngineError(
                    f"cannot read the output of the container of {container.image!r}: {_read(stderr)[-2000:].strip()}",
                    next_step=_SEE_PODMAN,
                )
            check_status(status, container.allowed, _read(stderr))
            if container.export:
                source, target = container.export
                failing = f"cannot copy {source} out of the container"
                with tempfile.TemporaryFile() as archive:
                    self._podman("cp", f"{name}:{source}", "-", failing=failing, stdout=archive)
                    unpack(archive, target)
            return status, _read(output)

    def _start(self, name: str, options: Sequence[str], container: ContainerRun) -> None:
        """Start a container in the background, because an interrupted start leaves processes and mounts behind."""
        failing = f"podman could not run {container.image!r}"
        variables = [f"--env={variable}={value}" for variable, value in container.environment.items()]
        arguments = [f"--name={name}", *options, *variables, container.image, *container.command]
        with deferred_interrupts():
            if not container.files:
                # Only `run` has --passwd=false, which leaves the user out of the container's /etc/passwd.
                self._podman("run", "--detach", "--passwd=false", *arguments, failing=failing)
                return
            self._podman("create", *arguments, failing=failing)
            for path, source in container.files.items():
                self._copy_in(name, source, path)
            self._podman("start", name, failing=failing)

    @contextlib.contextmanager
    def _removed_at_end(self, name: str) -> Iterator[None]:
        """Remove the container `name` at the end, even if its creation was interrupted."""
        try:
            yield
        finally:
            with deferred_interrupts():
                for delay in _REMOVAL_DELAYS:
                    time.sleep(delay)
                    removed = self._call(
                        *("rm", "--force", "--ignore", "--volumes", "--time=0", name), stderr=subprocess.STDOUT
                    )
                    if removed.returncode == 0:
                        break
                else:  # only logged, because an error that is being raised is more important
                    logger.error("cannot remove the container %s: %s", name, removed.stdout.strip())

    def _copy_in(self, name: str, source: Path, target: PurePosixPath) -> None:
        """Copy a file into a container that has not started yet."""
        with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-") as scratch:
            copy = Path(scratch) / "file"  # from a tar on standard input, podman leaves a temporary file behind
            try:
                shutil.copyfile(source, copy)
            except OSError as error:
                raise from_os_error(error, f"reading {source}") from error
            copy.chmod(0o444)
            failing = f"cannot copy {source} into the container"
            self._podman("cp", "--archive=false", str(copy), f"{name}:{target}", failing=failing)

    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """See `Engine.load`. Podman compares diff ids, so it reads only the new layers from an OCI layout."""
        name = _new_name()
        document, config, raw = to_documents(image)
        scratch = Path(tempfile.mkdtemp(prefix="chatterbox-prewarm-", dir=self._scratch))
        try:
            layout = Layout(scratch / name)
            layout.put_blob(config, lambda: BytesIO(raw))
            for layer in layers:
                layout.put_blob(layer.descriptor, layer.open)
            layout.put_manifest(document, "latest")
            # Podman derives the name of an image from the path of its layout. With a relative path, the name is known.
            # An interrupt may leave an image without a manifest, and after that every podman command fails.
            with deferred_interrupts():
                failing = f"cannot load {tag!r}, which is {base!r} with more layers"
                self._podman("pull", "--quiet", f"oci:{name}", failing=failing, scratch=scratch)
            loaded = self._inspect(name)
            if f"sha256:{loaded['Id']}" != config.digest or tuple(loaded["RootFS"]["Layers"]) != image.diff_ids:
                raise EngineError(
                    f"podman loaded {tag!r} as another image: {loaded['Id']} with {len(loaded['RootFS']['Layers'])} "
                    f"layers, not {config.digest}",
                    next_step="append in a registry instead",
                )
            self.tag(name, tag)
        finally:
            with deferred_interrupts():
                shutil.rmtree(scratch)
                self.untag(name)

    def exists(self, reference: str) -> bool:
        """See `Engine.exists`."""
        finished = self._call("image", "exists", reference, stderr=subprocess.STDOUT)
        if finished.returncode not in {0, 1}:
            raise EngineError(f"cannot look for {reference!r}: {finished.stdout.strip()}", next_step="check the name")
        return finished.returncode == 0

    def tag(self, reference: str, tag: str) -> None:
        """See `Engine.tag`."""
        with deferred_interrupts():
            self._podman("tag", reference, tag, failing=f"cannot tag {tag!r}")

    def untag(self, tag: str) -> None:
        """See `Engine.untag`. With --no-prune, the layers that the next build reuses stay."""
        with deferred_interrupts():
            if not self.exists(tag):
                return
            removed = self._call("rmi", "--no-prune", tag, stderr=subprocess.STDOUT)
            if removed.returncode == 2:  # a container uses the image, and that container is not ours
                self._podman("untag", tag, tag, failing=f"cannot remove the name {tag!r}")
            elif removed.returncode != 0 and self.exists(tag):
                raise EngineError(f"cannot remove {tag!r}: {removed.stdout.strip()}", next_step="remove it by hand")

    def _gpu_options(self, device: str) -> list[str]:
        if not device.startswith("cuda"):
            return []
        if self.info.gpu:
            return [f"--device={_GPU}=all"]
        raise EngineError(
            f"podman gives containers no GPU: no CDI specification in {' or '.join(map(str, _CDI))} names {_GPU}",
            next_step="make one: `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`; or use --device cpu",
        )

    def _inspect(self, reference: str) -> dict[str, Any]:
        printed = self._podman("image", "inspect", reference, failing=f"cannot read {reference!r}")
        inspected: list[dict[str, Any]] = json.loads(printed)
        return inspected[0]

    def _call(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a podman command to its end. The caller checks the exit code."""
        timeout = self._timeout if arguments[0] in {"wait", "logs"} else _SHORT_TIMEOUT
        return run_process(["podman", *arguments], timeout=timeout, **settings)

    def _podman(
        self, *arguments: str, failing: str, scratch: Path | None = None, stdout: IO[bytes] | int = subprocess.PIPE
    ) -> str:
        """Run a podman command and return its output.

        The command runs in the folder `scratch`, if given, and also writes its temporary files there.

        Raises:
            EngineError: the command failed. The message begins with `failing`.
        """
        with tempfile.TemporaryFile() as stderr:
            env = {**os.environ, "TMPDIR": str(scratch)} if scratch else None
            finished = self._call(*arguments, env=env, cwd=scratch, stdout=stdout, stderr=stderr)
            if finished.returncode == 0:
                return finished.stdout or ""
            problem, next_step = f"{failing}: {_read(stderr)[-2000:].strip()}", _SEE_PODMAN
        # Podman reports misleading errors if it has no space for its own records.
        storage = getattr(self, "_storage", None)  # unknown until `podman info` has succeeded
        free = free_bytes(storage) if storage is not None else None
        if free is not None and free < _FULL:
            problem += f"; no space left on device: the disk of podman's storage, {storage}, is full"
            next_step = "free some space, for example with `podman image prune`"
        raise EngineError(problem, next_step=next_step)


def _has_gpus() -> bool:
    """Return whether a CDI specification (YAML or JSON) has NVIDIA GPUs."""
    for folder in _CDI:
        for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.json"))):
            with contextlib.suppress(OSError):
                if _CDI_KIND.search(path.read_text(encoding="utf-8", errors="replace")):
                    return True
    return False


@contextlib.contextmanager
def _logs_followed(name: str) -> Iterator[None]:
    """Show the standard error of a container. Podman 4.3 may never stop following an ended container."""
    command = ["podman", "logs", "--follow", name]
    with (
        logged_output(follow=True) as output,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output.pipe) as follower,
    ):
        try:
            yield
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.wait(_FOLLOW_SECONDS)
        finally:
            follower.terminate()


def _new_name() -> str:
    return f"chatterbox-prewarm-{secrets.token_hex(8)}"


def _read(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
