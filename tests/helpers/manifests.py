"""Render manifests, and check them against the schemas of Kubernetes and the restricted Pod Security Standard."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor

from chatterbox_prewarm.system.process import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
Document = dict[str, Any]

#: The oldest minor version that is supported.
OLDEST = (1, 29)
#: API groups of other projects, for which there is no schema.
FOREIGN = ("monitoring.coreos.com/", "keda.sh/", "http.keda.sh/")
#: Kinds of volumes that the restricted profile allows (`image` since Kubernetes 1.33).
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected"}


def _minor_versions() -> list[str]:
    """Return each supported minor version once, oldest first. The package lists loose and strict schemas separately."""
    minors = {tuple(int(part) for part in major_minor(version).split(".")) for version in all_versions()}
    return [".".join(map(str, minor)) for minor in sorted(minors) if minor >= OLDEST]


VERSIONS = _minor_versions()


def kustomize(directory: Path) -> list[Document]:
    """Render a kustomization."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    result = run(["kubectl", "kustomize", str(directory)], timeout=60)
    assert result.returncode == 0, "kubectl kustomize failed; its message is on standard error"
    return list(yaml.safe_load_all(result.stdout))


def document_of(documents: Iterable[Document], kind: str) -> Document:
    """Return the only document of a kind."""
    (match,) = [document for document in documents if document["kind"] == kind]
    return match


def validate(document: Document, version: str) -> None:
    """Validate a document with the strict schema, which does not allow unknown fields."""
    # The package silently uses an older schema if it does not have that of the version, and returns its version.
    assert kubernetes_validate.validate(document, version, strict=True) == version


def pods(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Yield the specification of each pod, and the kind and name of the document that creates it."""
    for document in documents:
        if "template" in document.get("spec", {}):
            yield f"{document['kind']}/{document['metadata']['name']}", document["spec"]["template"]["spec"]


def references(documents: Iterable[Document], name: str) -> list[str]:
    """List the texts in the documents that are a name or begin with a name and a hyphen, outside labels and hosts."""

    def search(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key not in {"labels", "matchLabels", "selector", "hosts", "image"}:
                    yield from search(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from search(inner)
        elif isinstance(value, str) and (value == name or value.startswith(f"{name}-")):
            yield value

    return [text for document in documents for text in search(document)]


def conflicts(first: Iterable[Document], second: Iterable[Document]) -> list[str]:
    """List the documents of two deployments that overwrite each other, and selectors that select pods of the other."""
    first, second = list(first), list(second)
    problems = [f"both have {one}" for one in {*map(_identity, first)} & {*map(_identity, second)}]
    for ours, others in ((first, second), (second, first)):
        templates = [
            one["spec"]["template"]["metadata"]["labels"] for one in others if "template" in one.get("spec", {})
        ]
        for document in ours:
            spec = document.get("spec", {})
            for field in ("selector", "podSelector"):
                selector = spec.get(field, {})
                labels = selector.get("matchLabels", selector)
                if labels and any(labels.items() <= template.items() for template in templates):
                    problems.append(f"{_identity(document)} selects pods of the other deployment")
    return problems


def _identity(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def violations(pod: Document) -> list[str]:
    """List how a pod violates the restricted Pod Security Standard and the additional rules of this project."""
    problems = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    security = pod.get("securityContext", {})
    if not (security.get("runAsNonRoot") and security.get("runAsUser", 0) > 0):
        problems.append("runs as root")
    if security.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        problems.append("no seccomp profile")
    for volume in pod.get("volumes", []):
        (kind,) = volume.keys() - {"name"}
        if kind not in _VOLUMES | {"secret"}:
            problems.append(f"the volume {volume['name']} is a {kind}")
        if kind == "emptyDir" and not volume[kind].get("sizeLimit"):
            problems.append(f"the volume {volume['name']} has no size limit")
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        problems += _container_violations(container)
    if pod.get("automountServiceAccountToken") is not False or pod.get("enableServiceLinks") is not False:
        problems.append("has access to the cluster")
    return problems


def _container_violations(container: Document) -> list[str]:
    problems = []
    # The settings of the container override those of the pod, so it must have only these.
    if container.get("securityContext") != {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }:
        problems.append(f"the container {container['name']} has more permissions")
    if any("hostPort" in port for port in container.get("ports", [])):
        problems.append("a host port")
    if any(variable["name"].startswith("NVIDIA_") for variable in container.get("env", [])):
        problems.append("a variable of the NVIDIA runtime")
    if "memory" not in container["resources"]["limits"]:
        problems.append("no memory limit")
    return problems
