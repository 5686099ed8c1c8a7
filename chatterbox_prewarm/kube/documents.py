"""Parts that all rendered Kubernetes documents share, and their YAML format.

Pods and containers comply with the restricted Pod Security Standard
(https://kubernetes.io/docs/concepts/security/pod-security-standards/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Document = dict[str, Any]

#: UID and GID of every container. They are numbers because the kubelet cannot check that a user name is not root.
USER = 12345


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Documents in the order in which they are applied, and notes for the user."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """Return all documents as one YAML file, with the notes as comments at the top."""
        comments = "".join(f"# {line}\n" for note in self.notes for line in note.splitlines())
        return comments + "".join(f"---\n{_dump(document)}" for document in self.documents)


def _dump(content: Document) -> str:
    """Return YAML that people can read: text of several lines as a block, and no aliases for repeated values."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, represent_text)
    Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, width=120))


def document(api: str, kind: str, name: str, labels: Mapping[str, str], /, **fields: Any) -> Document:
    """Return a document with its metadata. Users and tools add the namespace."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": dict(labels)}, **fields}


def labels(component: str) -> dict[str, str]:
    """Return the labels of all documents of a component, such as "server"."""
    return {**selector(component), "app.kubernetes.io/part-of": "chatterbox-prewarm"}


def selector(component: str) -> dict[str, str]:
    """Return the labels that select the pods of a component."""
    return {"app.kubernetes.io/name": "chatterbox", "app.kubernetes.io/component": component}


def service_account(component: str, name: str) -> Document:
    """Return a service account without a token."""
    return document("v1", "ServiceAccount", name, labels(component), automountServiceAccountToken=False)


def network_policy(component: str, name: str, ingress: Sequence[Document], egress: Sequence[Document]) -> Document:
    """Return a policy that allows only the given traffic."""
    spec = {
        "podSelector": {"matchLabels": selector(component)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": list(ingress),
        "egress": list(egress),
    }
    return document("networking.k8s.io/v1", "NetworkPolicy", name, labels(component), spec=spec)


def pod_base(account: str) -> Document:
    """Return the fields that every pod has: no access to the API of the cluster, and the restricted profile."""
    return {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def container(name: str, image: str, **fields: Any) -> Document:
    """Return a container with the container part of the restricted profile."""
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    return {"name": name, "image": image, "imagePullPolicy": "IfNotPresent", "securityContext": security, **fields}


def empty_dir(name: str, mib: int) -> Document:
    """Return a volume with a size limit. A pod that exceeds the limit is evicted.

    Libraries are loaded from the cache volume, so nodes must not mount the folder of the kubelet with `noexec`.
    """
    return {"name": name, "emptyDir": {"sizeLimit": quantity(mib)}}


def resources(cpu: int, request_mib: int, limit_mib: int, gpu: str = "") -> Document:
    """Return the resources of a container: CPUs, memory, and one GPU if `gpu` names a resource."""
    gpus = {gpu: "1"} if gpu else {}
    return {
        "requests": {"cpu": str(cpu), "memory": quantity(request_mib), **gpus},
        "limits": {"memory": quantity(limit_mib), **gpus},
    }


def quantity(mib: int) -> str:
    """Return an amount of memory in the notation of Kubernetes, such as "1Gi" or "1280Mi"."""
    return f"{mib // 1024}Gi" if mib % 1024 == 0 else f"{mib}Mi"
