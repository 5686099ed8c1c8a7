"""Pre-pull: a DaemonSet that has the image on every node that may get a pod, before one comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.kube.documents import (
    container_security,
    document,
    labels,
    network_policy,
    pod_security,
    selector,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.kube.documents import Document

COMPONENT = "pre-pull"
_NAME = "chatterbox-pre-pull"
#: Reasons for checkov, why two of its findings are none.
_SKIPPED = {
    "checkov.io/skip1": "CKV_K8S_8=it does nothing that could hang",
    "checkov.io/skip2": "CKV_K8S_9=nobody asks it anything",
}


def pre_pull(image: str, account: str, where: Mapping[str, Any]) -> list[Document]:
    """The documents; the component `pre-pull` of k8s/ has the same, a test compares them.

    Args:
        image: to pull.
        account: the service account of its pods.
        where: fields of a pod that choose its node: `affinity`, `tolerations`.
    """
    hold = {
        "name": "hold",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sleep", "infinity"],
        "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "16Mi"}},
        "securityContext": container_security(),
    }
    pod = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # What runs ignores SIGTERM, and has nothing to finish.
        "terminationGracePeriodSeconds": 1,
        "securityContext": pod_security(),
        **where,
        "containers": [hold],
    }
    spec = {
        "selector": {"matchLabels": selector(COMPONENT)},
        # It serves nobody: all nodes may pull at once.
        "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
        "template": {"metadata": {"labels": labels(COMPONENT)}, "spec": pod},
    }
    made = document("apps/v1", "DaemonSet", _NAME, labels(COMPONENT), spec=spec)
    made["metadata"]["annotations"] = dict(_SKIPPED)
    return [made, network_policy(COMPONENT, _NAME, [], [])]
