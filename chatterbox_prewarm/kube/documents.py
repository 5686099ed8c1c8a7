"""Parts that all rendered Kubernetes documents share, and their YAML format.

Pods and containers comply with the restricted Pod Security Standard
(https://kubernetes.io/docs/concepts/security/pod-security-standards/).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Document = dict[str, Any]

#: UID and GID of every container. They are numbers because the kubelet cannot check that a user name is not root.
USER = 12345
#: Default name of a deployment.
NAME = "chatterbox"
#: A name of a Service (https://kubernetes.io/docs/concepts/overview/working-with-objects/names). It is short enough
#: for the suffixes that this package and Kubernetes add for a Job and its pods: these names have at most 63 characters.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")


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


def check_name(text: str) -> None:
    """Check the name of a deployment.

    Raises:
        BadInputError: Kubernetes, or a name that begins with it, does not allow it.
    """
    if not _NAME.fullmatch(text):
        raise BadInputError(
            f"{text!r} cannot be the name of a deployment",
            next_step="use at most 32 lower-case letters, digits and hyphens, with a letter at the start and no "
            "hyphen at the end",
        )


@dataclass(frozen=True, kw_only=True)
class Component:
    """A component of a deployment. It determines the labels and the usual name of its documents.

    Attributes:
        instance: name of the deployment. Deployments in the same namespace need different names.
        kind: kind of the component: "server", "pre-pull" or "bake".

    Raises:
        BadInputError: the name of the deployment is invalid.
    """

    instance: str
    kind: str

    def __post_init__(self) -> None:
        """Check the name."""
        check_name(self.instance)

    @property
    def name(self) -> str:
        """Name of the documents of the component."""
        return self.instance if self.kind == "server" else f"{self.instance}-{self.kind}"

    @property
    def selector(self) -> dict[str, str]:
        """The labels that select the pods of the component."""
        return {
            "app.kubernetes.io/name": "chatterbox",
            "app.kubernetes.io/instance": self.instance,
            "app.kubernetes.io/component": self.kind,
        }

    @property
    def labels(self) -> dict[str, str]:
        """The labels of all documents and pods of the component."""
        return {**self.selector, "app.kubernetes.io/part-of": "chatterbox-prewarm"}

    def document(self, api: str, kind: str, name: str = "", /, **fields: Any) -> Document:
        """Return a document with its metadata. Users and tools add the namespace."""
        metadata = {"name": name or self.name, "labels": self.labels}
        return {"apiVersion": api, "kind": kind, "metadata": metadata, **fields}


def service_account(component: Component) -> Document:
    """Return a service account without a token."""
    return component.document("v1", "ServiceAccount", automountServiceAccountToken=False)


def network_policy(component: Component, ingress: Sequence[Document], egress: Sequence[Document]) -> Document:
    """Return a policy that allows only the given traffic."""
    spec = {
        "podSelector": {"matchLabels": component.selector},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": list(ingress),
        "egress": list(egress),
    }
    return component.document("networking.k8s.io/v1", "NetworkPolicy", spec=spec)


def pod_base(account: str, pull_secret: str) -> Document:
    """Return the fields that every pod has: no access to the API of the cluster, and the restricted profile.

    Args:
        account: name of its service account.
        pull_secret: secret with the login to pull its image, or "". The pod names it, and not the service account,
            because a changed service account does not replace a pod that cannot pull.
    """
    return {
        "serviceAccountName": account,
        **({"imagePullSecrets": [{"name": pull_secret}]} if pull_secret else {}),
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
