"""A pod of a Deployment without a cluster: podman runs what it knows of a manifest, the rest of the kubelet is here.

podman takes image, settings, user, read-only root, limits and volumes. Probes (`Pod.watch`), the start of a container
anew (`Pod.restart`), preStop and the grace period (`Pod.end`) are the kubelet's, and done here as it does them. A
network of the machine's own is needed, as podman makes one by default.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import secrets
import tempfile
import time
from typing import TYPE_CHECKING, Any

from benchmarks.kubelet import Watch, read_probes
from chatterbox_prewarm.bench.clients import Target
from chatterbox_prewarm.bench.server import children
from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.kube.documents import Rendering
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from benchmarks.kubelet import Event
    from chatterbox_prewarm.kube.documents import Document

logger = logging.getLogger(__name__)

#: What podman makes of the others is nothing.
_PLAYED = ("ConfigMap", "Deployment")
#: Seconds that the kubelet gives a container for SIGTERM however long its hook took.
_LEAST_GRACE = 2


class Pod:
    """A pod of the one Deployment of some manifests; a context manager that starts it, and removes all of it.

    Args:
        documents: the manifests, as `kubectl kustomize` or `k8s render` writes them.
        name: of the pod, its volumes and containers on podman; a random end makes it one of its own.
        port: of loopback where the server's port `http` is reached.
        image: in the place of the manifest's.
        settings: put into each ConfigMap, over what is there.
        folders: of this machine, mounted at paths of the server's container.

    Attributes:
        container: the server's, by its name on podman.
        target: the server, for clients on this machine.

    Raises:
        BadInputError: there is not one Deployment of one container.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        *,
        name: str,
        port: int,
        image: str | None = None,
        settings: Mapping[str, str] | None = None,
        folders: Mapping[str, Path] | None = None,
    ) -> None:
        played = [copy.deepcopy(document) for document in documents if document.get("kind") in _PLAYED]
        name = f"{name}-{secrets.token_hex(4)}"
        self.port = port
        self.target = Target(secure=False, host="127.0.0.1", port=port)
        try:
            (deployment,) = [document for document in played if document["kind"] == "Deployment"]
            self._spec: Document = deployment["spec"]["template"]["spec"]
            (server,) = self._spec["containers"]
            self.container = f"{name}-pod-0-{server['name']}"
            (self._inside,) = [entry["containerPort"] for entry in server["ports"] if entry["name"] == "http"]
        except (ValueError, LookupError, TypeError) as error:
            raise BadInputError(
                "these manifests have not one Deployment of one container with a port `http`",
                next_step="give what `kubectl kustomize k8s/overlays/cpu-demo` prints",
            ) from error
        self.probes = read_probes(server)
        self._hook: list[str] = server.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        self._grace = float(self._spec.get("terminationGracePeriodSeconds", 30))
        deployment["metadata"]["name"] = name
        server["image"] = image or server["image"]
        # As a service would: two pods have one port each, and it is this machine that reaches them.
        server["ports"] = [{"name": "http", "containerPort": self._inside, "hostPort": port, "hostIP": "127.0.0.1"}]
        self._adapt_volumes(name, server, folders or {})
        for document in played:
            if document["kind"] == "ConfigMap":
                document["data"] = {**document.get("data", {}), **(settings or {})}
        self._yaml = Rendering(documents=tuple(played)).to_yaml()

    def _adapt_volumes(self, name: str, server: Document, folders: Mapping[str, Path]) -> None:
        """An emptyDir is a volume of podman's, and pods that call theirs by one name would share it."""
        for volume in self._spec.get("volumes", []):
            volume["name"] = f"{name}-{volume['name']}"
        for mount in server.get("volumeMounts", []):
            mount["name"] = f"{name}-{mount['name']}"
        for number, (path, folder) in enumerate(folders.items()):
            volume = {"name": f"{name}-folder-{number}", "hostPath": {"path": str(folder), "type": "Directory"}}
            self._spec.setdefault("volumes", []).append(volume)
            server.setdefault("volumeMounts", []).append({"name": volume["name"], "mountPath": path})

    def __enter__(self) -> Pod:
        """Start it; returns when its process runs.

        Raises:
            EngineError: podman could not.
        """
        try:
            self._ask("kube", "play", "-", given=self._yaml)
        except EngineError:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it with its volumes, whatever state it is in."""
        self._remove()

    def watch(self) -> Watch:
        """The kubelet's probes of the container's present life."""
        return Watch(self.probes, published={self._inside: self.port})

    def since_start(self) -> float:
        """Seconds since the process of the container was started."""
        asked = self._ask("container", "inspect", "--format={{.State.StartedAt.UnixMilli}}", self.container)
        return time.time() - int(asked) / 1000

    def process(self) -> int:
        """The server's process, by its id on this machine."""
        found: int = self._state()["Pid"]
        return found

    def workers(self) -> list[int]:
        """The server's workers that run, by their ids on this machine."""
        return children(self.process())

    def restarts(self) -> int:
        """How often podman started the container again because its process had ended."""
        count: int = self._inspect()["RestartCount"]
        return count

    def log(self) -> str:
        """What the server wrote."""
        return run_process(["podman", "logs", self.container], with_stderr=True).stdout

    def restart(self, killed: Event) -> None:
        """What the kubelet does with a container that has failed a probe: it ends it, and starts it again.

        Args:
            killed: the watch's last event.

        Raises:
            EngineError: podman could not.
        """
        self._stop(self._grace if killed.probe.grace is None else killed.probe.grace)
        self._ask("start", self.container)

    def end(self) -> int:
        """What the kubelet does with a pod that is deleted; returns the exit code of the server.

        Raises:
            EngineError: podman could not.
        """
        self._stop(self._grace)
        code: int = self._state()["ExitCode"]
        return code

    def _stop(self, grace: float) -> None:
        """The hook and SIGTERM, and SIGKILL when the grace period of both is over, in seconds."""
        begun = time.monotonic()
        if self._hook:
            with contextlib.suppress(EngineError):  # one that fails is an event of the pod's, and no more
                self._ask("exec", self.container, *self._hook, timeout=grace)
        left = max(_LEAST_GRACE, round(grace - (time.monotonic() - begun)))
        self._ask("stop", f"--time={left}", self.container, timeout=left + 60)

    def _remove(self) -> None:
        """Remove the pod and its volumes; what cannot be removed is said, since what came before matters more."""
        run_process(["podman", "kill", "--signal=KILL", self.container], with_stderr=True)  # or `down` waits for it
        try:
            self._ask("kube", "down", "-", given=self._yaml)
        except EngineError as error:
            logger.warning("a pod is left: %s", error)

    def _inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._ask("container", "inspect", self.container))[0]
        return found

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = self._inspect()["State"]
        return found

    def _ask(self, *arguments: str, given: str | None = None, timeout: float = 120) -> str:
        """Have podman do something; returns what it printed.

        Raises:
            EngineError: it could not, with what it said.
        """
        with tempfile.TemporaryFile() as said:
            finished = run_process(["podman", *arguments], given=given, timeout=timeout, stderr=said)
            if finished.returncode == 0:
                return finished.stdout
            said.seek(0)
            message = said.read().decode(errors="replace").strip()
        raise EngineError(
            f"podman {arguments[0]} ended with status {finished.returncode}: {message[-500:]}",
            next_step="see what it said; for pods it needs netavark and catatonit",
        )
