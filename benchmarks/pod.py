"""Run a pod of a Deployment without a cluster.

Podman applies the image, settings, user, read-only root, limits and volumes of the manifest. This module does the rest
as
the kubelet does it: probes (`Pod.watch`), restarts (`Pod.restart`), preStop and the grace period (`Pod.end`). It needs
podman's default network.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import secrets
import subprocess
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

#: Kinds of documents that `podman kube play` uses.
_PLAYED = ("ConfigMap", "Deployment")
#: Seconds that the kubelet leaves a container after SIGTERM even if its preStop hook used the whole grace period.
_LEAST_GRACE = 2


class Pod:
    """Context manager that starts the pod of a Deployment with podman and removes it with its volumes.

    Args:
        documents: manifests as `kubectl kustomize` or `k8s render` writes them.
        name: name of the pod and prefix of its volumes; a random suffix is added.
        port: local port that is connected to the port `http` of the server.
        image: image to run instead of the one in the manifest.
        settings: entries to add to each ConfigMap or to replace in it.
        folders: folders of this machine by the path in the container at which they are mounted.

    Attributes:
        container: podman's name of the server's container.
        target: address of the server for clients on this machine.

    Raises:
        BadInputError: the manifests do not contain exactly one Deployment with exactly one container.
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
        self.target = Target(port=port)
        try:
            (deployment,) = [document for document in played if document["kind"] == "Deployment"]
            self._spec: Document = deployment["spec"]["template"]["spec"]
            (server,) = self._spec["containers"]
            self.container = f"{name}-pod-0-{server['name']}"
            (self._inside,) = [entry["containerPort"] for entry in server["ports"] if entry["name"] == "http"]
        except (ValueError, LookupError, TypeError) as error:
            raise BadInputError(
                "the manifests must contain one Deployment with one container that has a port `http`",
                next_step="pass the output of `kubectl kustomize k8s/overlays/cpu-demo`",
            ) from error
        self.probes = read_probes(server)
        self._hook: list[str] = server.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        self._grace = float(self._spec.get("terminationGracePeriodSeconds", 30))
        deployment["metadata"]["name"] = name
        server["image"] = image or server["image"]
        # Publish the port on this machine, where the clients run. Each pod gets another port.
        server["ports"] = [{"name": "http", "containerPort": self._inside, "hostPort": port, "hostIP": "127.0.0.1"}]
        self._adapt_volumes(name, server, folders or {})
        for document in played:
            if document["kind"] == "ConfigMap":
                document["data"] = {**document.get("data", {}), **(settings or {})}
        self._yaml = Rendering(documents=tuple(played)).to_yaml()

    def _adapt_volumes(self, name: str, server: Document, folders: Mapping[str, Path]) -> None:
        """Make the names of the volumes unique, because pods with equal names would share podman's volumes."""
        for volume in self._spec.get("volumes", []):
            volume["name"] = f"{name}-{volume['name']}"
        for mount in server.get("volumeMounts", []):
            mount["name"] = f"{name}-{mount['name']}"
        for number, (path, folder) in enumerate(folders.items()):
            volume = {"name": f"{name}-folder-{number}", "hostPath": {"path": str(folder), "type": "Directory"}}
            self._spec.setdefault("volumes", []).append(volume)
            server.setdefault("volumeMounts", []).append({"name": volume["name"], "mountPath": path})

    def __enter__(self) -> Pod:
        """Start the pod and wait until its process runs.

        Raises:
            EngineError: podman failed.
        """
        try:
            self._podman("kube", "play", "-", stdin=self._yaml)
        except EngineError:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the pod with its volumes in any state."""
        self._remove()

    def watch(self) -> Watch:
        """Start the kubelet's probes for the current life of the container."""
        return Watch(self.probes, published={self._inside: self.port})

    def since_start(self) -> float:
        """Return the seconds since the process of the container was started."""
        milliseconds = self._podman("container", "inspect", "--format={{.State.StartedAt.UnixMilli}}", self.container)
        return time.time() - int(milliseconds) / 1000

    def process(self) -> int:
        """Return the process ID of the server on this machine."""
        pid: int = self._state()["Pid"]
        return pid

    def workers(self) -> list[int]:
        """Return the process IDs of the running workers on this machine."""
        return children(self.process())

    def restarts(self) -> int:
        """Return how often podman restarted the container because its process had ended."""
        count: int = self._inspect()["RestartCount"]
        return count

    def log(self) -> str:
        """Return the log of the server."""
        return run_process(["podman", "logs", self.container], stderr=subprocess.STDOUT).stdout

    def restart(self, killed: Event) -> None:
        """End and restart the container, as the kubelet does after a failed probe.

        Args:
            killed: last event of the watch.

        Raises:
            EngineError: podman failed.
        """
        self._stop(self._grace if killed.probe.grace is None else killed.probe.grace)
        self._podman("start", self.container)

    def end(self) -> int:
        """End the pod as the kubelet does when it is deleted; return the exit code of the server.

        Raises:
            EngineError: podman failed.
        """
        self._stop(self._grace)
        code: int = self._state()["ExitCode"]
        return code

    def _stop(self, grace: float) -> None:
        """Run the preStop hook, send SIGTERM, and SIGKILL when the grace period of both (seconds) is over."""
        begun = time.monotonic()
        if self._hook:
            with contextlib.suppress(EngineError):  # a failed hook is only recorded as an event of the pod
                self._podman("exec", self.container, *self._hook, timeout=grace)
        left = max(_LEAST_GRACE, round(grace - (time.monotonic() - begun)))
        self._podman("stop", f"--time={left}", self.container, timeout=left + 60)

    def _remove(self) -> None:
        """Remove the pod and its volumes. A failure is only logged, so that it does not hide an earlier error."""
        run_process(["podman", "kill", "--signal=KILL", self.container], stderr=subprocess.STDOUT)  # or `down` waits
        try:
            self._podman("kube", "down", "-", stdin=self._yaml)
        except EngineError as error:
            logger.warning("a pod was not removed: %s", error)

    def _inspect(self) -> dict[str, Any]:
        details: dict[str, Any] = json.loads(self._podman("container", "inspect", self.container))[0]
        return details

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._inspect()["State"]
        return state

    def _podman(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        """Run podman; return its output.

        Raises:
            EngineError: podman failed. The message contains the end of its standard error.
        """
        with tempfile.TemporaryFile() as messages:
            finished = run_process(["podman", *arguments], input=stdin, timeout=timeout, stderr=messages)
            if finished.returncode == 0:
                return finished.stdout
            messages.seek(0)
            message = messages.read().decode(errors="replace").strip()
        raise EngineError(
            f"podman {arguments[0]} ended with status {finished.returncode}: {message[-500:]}",
            next_step="see its message; for pods, podman needs netavark and catatonit",
        )
