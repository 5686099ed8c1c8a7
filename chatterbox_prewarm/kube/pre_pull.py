"""Render a DaemonSet that pulls the image on every node that may run a pod, before a pod starts there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.kube.documents import Component, container, network_policy, pod_base

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.kube.documents import Document

#: Checks of checkov that do not apply, with the reason.
_SKIPPED = {
    "checkov.io/skip1": "CKV_K8S_8=the container only sleeps",
    "checkov.io/skip2": "CKV_K8S_9=the container receives no requests",
}


def pre_pull(image: str, instance: str, pull_secret: str, node_fields: Mapping[str, Any]) -> list[Document]:
    """Render the DaemonSet and its network policy. A test compares them with the component `pre-pull` in k8s/.

    Args:
        image: image to pull.
        instance: name of the deployment, and of the service account of the pods.
        pull_secret: secret with the login to pull the image, or "".
        node_fields: fields of a pod that select its node: `affinity`, `tolerations`.
    """
    component = Component(instance=instance, kind="pre-pull")
    resources = {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "16Mi"}}
    pod = {
        **pod_base(instance, pull_secret),
        "terminationGracePeriodSeconds": 1,  # `sleep` as PID 1 ignores SIGTERM
        **node_fields,
        "containers": [container("hold", image, command=["sleep", "infinity"], resources=resources)],
    }
    spec = {
        "selector": {"matchLabels": component.selector},
        # The pods serve no requests, so all nodes may pull at once.
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
        "template": {"metadata": {"labels": component.labels}, "spec": pod},
    }
    daemon_set = component.document("apps/v1", "DaemonSet", spec=spec)
    daemon_set["metadata"]["annotations"] = dict(_SKIPPED)
    return [daemon_set, network_policy(component, [], [])]
