"""Documents: what manifests of this project have in common, and how they are written as YAML.

Everything here holds under the restricted Pod Security Standard
(https://kubernetes.io/docs/concepts/security/pod-security-standards/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Document = dict[str, Any]

#: The UID and GID of every container: a number, since the kubelet cannot check a name.
USER = 12345


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Documents in the order in which they are applied, and what a person should know of them, a sentence each."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """One file of documents, the notes above them as comments."""
        comments = "".join(f"# {line}\n" for note in self.notes for line in note.splitlines())
        return comments + "".join(f"---\n{_dump(document)}" for document in self.documents)


def _dump(content: Document) -> str:
    """YAML in which a text of several lines reads as such."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    # A list that stands twice would be an alias the second time, which people stumble over.
    Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False, width=120))


def document(api: str, kind: str, name: str, labels: Mapping[str, str], /, **rest: Any) -> Document:
    """A document with its metadata; `namespace` and `annotations` stay out, since users and tools add them."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "labels": dict(labels)}, **rest}


def labels(component: str) -> dict[str, str]:
    """The labels of all that belongs to a component, such as "server"."""
    return {**selector(component), "app.kubernetes.io/part-of": "chatterbox-prewarm"}


def selector(component: str) -> dict[str, str]:
    """The labels that tell a component's pods from others."""
    return {"app.kubernetes.io/name": "chatterbox", "app.kubernetes.io/component": component}


def service_account(component: str, name: str) -> Document:
    """An account without a token."""
    return document("v1", "ServiceAccount", name, labels(component), automountServiceAccountToken=False)


def network_policy(component: str, name: str, ingress: Sequence[Document], egress: Sequence[Document]) -> Document:
    """Lets through what it names, and nothing else, both ways."""
    spec = {
        "podSelector": {"matchLabels": selector(component)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": list(ingress),
        "egress": list(egress),
    }
    return document("networking.k8s.io/v1", "NetworkPolicy", name, labels(component), spec=spec)


def pod_security() -> Document:
    """The pod's half of the restricted profile."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Document:
    """The container's half."""
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def empty_dir(name: str, size: str) -> Document:
    """A volume that holds at most `size`: a pod that goes beyond is evicted.

    It allows execution unless the node mounts the kubelet's directory otherwise; a manifest has no word for either.
    """
    return {"name": name, "emptyDir": {"sizeLimit": size}}


def gpu_tolerations() -> list[Document]:
    """Nodes with GPUs are often kept for pods that need one."""
    return [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
