"""Write the values of the Helm chart charts/chatterbox that render the same documents as `render`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.kube.documents import NAME, Rendering

if TYPE_CHECKING:
    from chatterbox_prewarm.kube.documents import Document

_DRAIN, _DEVICE = "CHATTERBOX_PREWARM_DRAIN_SECONDS", "CHATTERBOX_PREWARM_DEVICE"


def to_values(rendering: Rendering) -> Rendering:
    """Return the values that render the documents of a deployment with the chart.

    A test renders the chart with them and compares the documents.

    Args:
        rendering: result of `kube.render.render`.
    """
    by_kind = {document["kind"]: document for document in rendering.documents}
    deployment, settings = by_kind["Deployment"], dict(by_kind["ConfigMap"]["data"])
    pod = deployment["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    cache = next(volume for volume in pod["volumes"] if volume["name"] == "cache")
    name = deployment["metadata"]["name"]
    values: Document = {
        **({} if name == NAME else {"fullnameOverride": name}),
        "image": _image(server["image"]),
        "annotations": deployment["metadata"]["annotations"],
        "seconds": {
            "startup": server["startupProbe"]["failureThreshold"],
            "preStop": int(server["lifecycle"]["preStop"]["exec"]["command"][-1]),
            "drain": int(settings.pop(_DRAIN)),
        },
        **_resources(server["resources"]),
        "volumes": {"cache": cache["emptyDir"]["sizeLimit"]},
        **{field: pod[field] for field in ("imagePullSecrets", "runtimeClassName", "affinity") if field in pod},
    }
    if "gpu" in values:
        del settings[_DEVICE]  # the chart sets it for a pod with a GPU
    if settings:
        values["config"] = settings
    if "replicas" in deployment["spec"]:
        values["replicas"] = deployment["spec"]["replicas"]
    if "DaemonSet" in by_kind:
        values["prePull"] = {"enabled": True}
    return Rendering(documents=(values,), notes=rendering.notes)


def _image(reference: str) -> Document:
    name, _, digest = reference.partition("@")
    repository, _, tag = name.rpartition(":")
    if not repository or "/" in tag:  # there is no colon, or it precedes a port
        repository, tag = name, ""
    return {"repository": repository, "tag": tag, "digest": digest}


def _resources(resources: Document) -> Document:
    """Separate the GPU, which the chart adds to the requests and the limits."""
    gpus = [name for name in resources["limits"] if "/" in name]
    others = {
        kind: {name: amount for name, amount in amounts.items() if name not in gpus}
        for kind, amounts in resources.items()
    }
    if not gpus:
        return {"resources": others}
    (gpu,) = gpus
    return {"resources": others, "gpu": {"count": int(resources["limits"][gpu]), "resource": gpu}}
