"""What the tests of manifests share: kustomize, the strict schemas, and the restricted Pod Security Standard."""

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

#: The oldest minor version that we promise to work with.
OLDEST = (1, 29)
#: Groups of other projects' resources, which the schemas do not have.
FOREIGN = ("monitoring.coreos.com/", "keda.sh/", "http.keda.sh/")
#: What the restricted profile allows; `image` since Kubernetes 1.33.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected"}


def _minor_versions() -> list[str]:
    """Each minor version once, oldest first; the package lists its loose and its strict schemas apart."""
    minors = {tuple(int(part) for part in major_minor(version).split(".")) for version in all_versions()}
    return [".".join(map(str, minor)) for minor in sorted(minors) if minor >= OLDEST]


VERSIONS = _minor_versions()


def kustomize(directory: Path) -> list[Document]:
    """The documents of a kustomization."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing: install it to render the manifests")
    result = run(["kubectl", "kustomize", str(directory)], timeout=60)
    assert result.returncode == 0, "kubectl kustomize failed; its message is on standard error"
    return list(yaml.safe_load_all(result.stdout))


def the(documents: Iterable[Document], kind: str) -> Document:
    """The one document of a kind."""
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def validate(document: Document, version: str) -> None:
    """Against the strict schema, which knows no other fields."""
    # It takes the nearest older schema if it lacks one: then the check would not be the one asked for.
    assert kubernetes_validate.validate(document, version, strict=True) == version


def pods(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """The specifications of all pods, with the kind and name of what makes them."""
    for document in documents:
        if "template" in document.get("spec", {}):
            yield f"{document['kind']}/{document['metadata']['name']}", document["spec"]["template"]["spec"]


def violations(pod: Document) -> list[str]:
    """What the restricted Pod Security Standard has against a pod, by its page; and what we promise beyond it."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    security = pod.get("securityContext", {})
    if not (security.get("runAsNonRoot") and security.get("runAsUser", 0) > 0):
        found.append("runs as root")
    if security.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        found.append("no seccomp profile")
    for volume in pod.get("volumes", []):
        (kind,) = volume.keys() - {"name"}
        if kind not in _VOLUMES | {"secret"}:
            found.append(f"the volume {volume['name']} is a {kind}")
        if kind == "emptyDir" and not volume[kind].get("sizeLimit"):
            found.append(f"the volume {volume['name']} has no size limit")
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        found += _violations_of_a_container(container)
    if pod.get("automountServiceAccountToken") is not False or pod.get("enableServiceLinks") is not False:
        found.append("told of the cluster")
    return found


def _violations_of_a_container(container: Document) -> list[str]:
    found = []
    # The container's own settings win over the pod's, so it must have none besides these.
    if container.get("securityContext") != {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }:
        found.append(f"the container {container['name']} may do more")
    if any("hostPort" in port for port in container.get("ports", [])):
        found.append("a host port")
    if any(variable["name"].startswith("NVIDIA_") for variable in container.get("env", [])):
        found.append("a variable of NVIDIA's")
    if "memory" not in container["resources"]["limits"]:
        found.append("no limit of memory")
    return found
