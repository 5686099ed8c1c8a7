"""The podman engine, through its program: no daemon runs, and what was asked is done when a command has ended."""

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
from chatterbox_prewarm.image.engines.engine import USER, Facts, Run, check_status, parse_version
from chatterbox_prewarm.image.engines.transfer import unpack
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image, to_documents
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.system.paths import CACHE
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.system.process import undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import PurePosixPath

    from chatterbox_prewarm.image.layer import Layer

logger = logging.getLogger(__name__)

_PROGRAM = "podman"
#: The oldest that skips the stages that a build does not need (4.2), and removes a name without the layers that the
#: next build takes again (4.3).
_OLDEST = (4, 3)
#: Seconds that a command may take that waits for no container; most of them nothing interrupts.
_SHORT = 1800.0
#: Seconds before each attempt to remove a container: podman fails at one that ends by itself at that moment.
_ATTEMPTS = (0.0, 0.5, 1.0, 2.0)
#: Bytes: with less room than this, podman cannot even note that a container ended.
_FULL = 1 << 20
#: What takes what a command prints and nobody reads.
_NOWHERE = subprocess.DEVNULL
#: Of every container: no network, and nothing that podman or its configuration would add on its own.
_ALWAYS = (
    *("--pull=never", "--network=none", "--http-proxy=false", "--no-healthcheck"),
    *("--log-driver=k8s-file", "--log-opt=max-size=1gb"),
)
#: How an image is meant to be run. Podman mounts more than what is named on its own, and lets a tmpfs execute.
_ISOLATED = (
    *("--read-only", "--read-only-tmpfs=false", f"--user={USER}"),
    *("--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *("--tmpfs=/tmp:noexec,mode=1777,notmpcopyup", f"--tmpfs={CACHE}:exec,mode=1777,notmpcopyup"),
)
_GPU = "nvidia.com/gpu"
_CDI = (Path("/etc/cdi"), Path("/var/run/cdi"))
_CDI_KIND = re.compile(rf"""^[^#\n]*\bkind["']?\s*:\s*["']?{re.escape(_GPU)}(?![\w.-])""", re.MULTILINE)


class PodmanEngine:
    """Podman as an `Engine`.

    Args:
        timeout: seconds that a container may run, a whole bake among them.

    Raises:
        EngineError: it is not installed, too old, or on another machine.
    """

    def __init__(self, *, timeout: float = 7200.0) -> None:
        self._timeout = timeout
        printed = self._podman("info", "--format=json", failing="cannot ask podman what it can do")
        try:
            info: dict[str, Any] = json.loads(printed)
            self.facts = _facts(info)
            remote = bool(info["host"].get("serviceIsRemote"))
            self._scratch: str | None = info["store"].get("imageCopyTmpDir")
            self._root = str(info["store"]["graphRoot"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                f"`podman info` printed something else than facts: {error!r}", next_step="run it and see what it says"
            ) from error
        if remote:
            raise EngineError(
                "podman works on another machine, and images are loaded from folders of this one",
                next_step="run this where podman works, or use --engine docker",
            )
        if parse_version(self.facts.version) < _OLDEST:
            raise EngineError(
                f"podman is {self.facts.version}; {'.'.join(map(str, _OLDEST))} is the oldest that builds the "
                "Dockerfile as it is meant",
                next_step="upgrade podman, or use --engine docker",
            )

    def close(self) -> None:
        """As `Engine`; there is no connection."""

    def check_device(self, device: str) -> None:
        """As `Engine`."""
        self._gpus(device)

    def build_command(self, arguments: Sequence[str], *, classic: bool = False) -> list[str]:
        """As `Engine`; podman has a default network, but no name "default" for it."""
        if classic:
            raise EngineError("podman has no classic builder", next_step="leave --builder out, or use --engine docker")
        return [_PROGRAM, "build", *(word for word in arguments if word != "--network=default")]

    def run(self, container: Run) -> tuple[int, str]:
        """As `Engine`."""
        gpus = self._gpus(container.device)
        if not self.exists(container.image):
            raise EngineError(f"there is no image {container.image!r}", next_step="build it: make image")
        name = _new_name()
        variables = [f"--env={variable}={value}" for variable, value in container.environment.items()]
        options = [f"--name={name}", *_ALWAYS, *(_ISOLATED if container.isolated else ()), *gpus, *variables]
        with self._removing(name), tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as said:
            self._start(name, options, container)
            if container.follow:
                self._ask("logs", "--follow", name, stdout=_NOWHERE)
            status = int(self._podman("wait", name, failing=f"cannot wait for the end of {container.image!r}"))
            if self._ask("logs", name, stdout=output, stderr=said).returncode != 0:
                raise EngineError(
                    f"cannot read what the container of {container.image!r} printed: {_end(said)}",
                    next_step="see what podman said; its option --log-level=debug tells more",
                )
            check_status(status, container.allowed, _end(said))
            if container.export:
                self._copy_out(name, *container.export)
            return status, _read(output)

    def _start(self, name: str, options: Sequence[str], container: Run) -> None:
        """Start a container in the background, so that whoever waits for it may be interrupted.

        Podman that is interrupted while it starts one leaves processes and mounts behind.
        """
        failing = f"podman could not run {container.image!r}"
        made = [*options, container.image, *container.command]
        with undisturbed():
            if not container.files:
                # `create` has no --passwd: only so is the user one that nobody knows.
                self._podman("run", "--detach", "--passwd=false", *made, failing=failing)
                return
            self._podman("create", *made, failing=failing)
            for place, source in container.files.items():
                self._copy_in(name, source, place)
            self._podman("start", name, failing=failing)

    def _gpus(self, device: str) -> list[str]:
        """The options of a container for a torch device; none for a CPU."""
        if not device.startswith("cuda"):
            return []
        if self.facts.gpu:
            return [f"--device={_GPU}=all"]
        raise EngineError(
            f"podman gives containers no GPU: no CDI specification in {' or '.join(map(str, _CDI))} names {_GPU}",
            next_step="make one: `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`; or use --device cpu",
        )

    @contextlib.contextmanager
    def _removing(self, name: str) -> Iterator[None]:
        """Remove a container at the end, whatever happens: its name is known before it is made."""
        try:
            yield
        finally:
            with undisturbed():
                for wait in _ATTEMPTS:
                    time.sleep(wait)
                    removed = self._ask("rm", "--force", "--ignore", "--volumes", "--time=0", name, with_stderr=True)
                    if removed.returncode == 0:
                        break
                else:  # not raised: what ended the container says more
                    logger.error("container %s stays: %s", name, removed.stdout.strip())

    def _copy_in(self, name: str, source: Path, target: PurePosixPath) -> None:
        """Copy a file into a container that has not run yet.

        Raises:
            BadInputError: the file cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-") as scratch:
            copy = Path(scratch) / "file"  # not as a tar through standard input, which podman leaves behind
            try:
                shutil.copyfile(source, copy)
            except OSError as error:
                raise from_os_error(error, f"reading {source}") from error
            copy.chmod(0o444)
            self._podman(
                *("cp", "--archive=false", str(copy), f"{name}:{target}"),
                failing=f"cannot copy {source} into the container",
            )

    def _copy_out(self, name: str, source: PurePosixPath, target: Path) -> None:
        """Copy a folder of a container that has ended into the folder `target`.

        Raises:
            EngineError: it is not there, or holds a link or a special file.
            BadInputError: the target cannot be written.
        """
        with tempfile.TemporaryFile() as spool:
            self._podman(
                *("cp", f"{name}:{source}", "-"), failing=f"cannot copy {source} out of the container", stdout=spool
            )
            unpack(spool, target)

    def load(self, base: str, layers: Sequence[Layer], image: Image, tag: str) -> None:
        """As `Engine`: of a layout, podman reads only the layers that it has not, by the digests of their tars."""
        name = _new_name()
        failing = f"cannot load {tag!r}, which is {base!r} with more layers"
        document, config, raw = to_documents(image)
        scratch = Path(tempfile.mkdtemp(prefix="chatterbox-prewarm-", dir=self._scratch))
        try:
            layout = Layout(scratch / name)
            layout.put_blob(config, lambda: BytesIO(raw))
            for layer in layers:
                layout.put_blob(layer.descriptor, layer.opened)
            layout.put_manifest(document, "latest")
            # Podman calls an image after the path of its layout; a relative one is a name that we know. Interrupted, it
            # may leave an image without a manifest, and then fails at all that it is asked.
            with undisturbed():
                self._podman("pull", "--quiet", f"oci:{name}", failing=failing, scratch=scratch)
            found = self._inspect(name)
            if f"sha256:{found['Id']}" != config.digest or tuple(found["RootFS"]["Layers"]) != image.diff_ids:
                raise EngineError(
                    f"podman made something else of {tag!r}: {found['Id']} with {len(found['RootFS']['Layers'])} "
                    f"layers, not {config.digest}",
                    next_step="append in a registry instead",
                )
            self.tag(name, tag)
        finally:
            with undisturbed():
                shutil.rmtree(scratch)
                self.forget(name)

    def image(self, reference: str) -> Image:
        """As `Engine`."""
        found = self._inspect(reference)
        diff_ids = found["RootFS"].get("Layers") or []
        config: dict[str, Any] = {
            "architecture": found["Architecture"],
            "os": found["Os"],
            "config": dict(found["Config"]),
            "created": found["Created"],
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": found.get("History") or [],
        }
        if found.get("Author"):
            config["author"] = found["Author"]
        if found.get("Healthcheck"):  # of Docker's images, beside their configuration
            config["config"]["Healthcheck"] = found["Healthcheck"]
        layers = tuple(Descriptor(media_type=OCI_LAYER, digest=diff_id, size=0) for diff_id in diff_ids)
        return Image(config=config, layers=layers, annotations=found.get("Annotations") or {})

    def _inspect(self, reference: str) -> dict[str, Any]:
        """What podman knows of an image.

        Raises:
            EngineError: there is none of that name.
        """
        if not self.exists(reference):
            raise EngineError(f"podman has no image {reference!r}", next_step="build or pull it")
        found: list[dict[str, Any]] = json.loads(
            self._podman("image", "inspect", reference, failing=f"cannot read {reference!r}")
        )
        return found[0]

    def exists(self, reference: str) -> bool:
        """As `Engine`."""
        found = self._ask("image", "exists", reference, with_stderr=True)
        if found.returncode not in {0, 1}:
            raise EngineError(f"cannot look for {reference!r}: {found.stdout.strip()}", next_step="check the name")
        return found.returncode == 0

    def tag(self, reference: str, tag: str) -> None:
        """As `Engine`."""
        with undisturbed():
            self._podman("tag", reference, tag, failing=f"cannot tag {tag!r}")

    def forget(self, tag: str) -> None:
        """As `Engine`; without --no-prune, the next build would find nothing of this one's to start from."""
        with undisturbed():
            if not self.exists(tag):
                return
            removed = self._ask("rmi", "--no-prune", tag, with_stderr=True)
            if removed.returncode == 2:  # a container uses it, and is not ours to remove
                self._podman("untag", tag, tag, failing=f"cannot remove the name {tag!r}")
            elif removed.returncode != 0 and self.exists(tag):
                raise EngineError(f"cannot remove {tag!r}: {removed.stdout.strip()}", next_step="remove it by hand")

    def _ask(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of podman to its end."""
        timeout = self._timeout if arguments[0] in {"wait", "logs"} else _SHORT
        return run_process([_PROGRAM, *arguments], timeout=timeout, **settings)

    def _podman(
        self,
        *arguments: str,
        failing: str,
        scratch: Path | None = None,
        stdout: IO[bytes] | None = None,
    ) -> str:
        """Run a command of podman; what it printed.

        With a folder `scratch`, in it; and what podman spools lies there as well.

        Raises:
            EngineError: it failed, with `failing` and what it said.
        """
        with tempfile.TemporaryFile() as said:
            env = {**os.environ, "TMPDIR": str(scratch)} if scratch else None
            finished = self._ask(*arguments, env=env, cwd=scratch, stdout=stdout, stderr=said)
            if finished.returncode != 0:
                raise self._failure(f"{failing}: {_end(said)}")
        return finished.stdout or ""

    def _failure(self, problem: str) -> EngineError:
        """What a command's failure means; podman without room for its own notes speaks of something else."""
        with contextlib.suppress(OSError, AttributeError):  # it is not known before `podman info`
            if shutil.disk_usage(self._root).free < _FULL:
                return EngineError(
                    f"{problem}; no space left on device: the disk of podman's storage, {self._root}, is full",
                    next_step="make room, with `podman image prune` for example",
                )
        return EngineError(problem, next_step="see what podman said; its option --log-level=debug tells more")


def _facts(info: Mapping[str, Any]) -> Facts:
    try:
        free = shutil.disk_usage(info["store"]["graphRoot"]).free
    except OSError:
        free = None
    return Facts(
        name="podman",
        version=str(info["version"]["Version"]),
        gpu="cdi" if _has_gpus() else "",
        default_runtime=str((info["host"].get("ociRuntime") or {}).get("name", "")),
        free=free,
    )


def _has_gpus() -> bool:
    """Whether a CDI specification, YAML or JSON, names NVIDIA's GPUs."""
    for folder in _CDI:
        for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.json"))):
            with contextlib.suppress(OSError):
                if _CDI_KIND.search(path.read_text(encoding="utf-8", errors="replace")):
                    return True
    return False


def _new_name() -> str:
    return f"chatterbox-prewarm-{secrets.token_hex(8)}"


def _read(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _end(stream: IO[bytes]) -> str:
    return _read(stream)[-2000:].strip()
