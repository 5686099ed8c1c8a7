"""Render: the deployment of an image, from what its labels say that it was baked for.

What it renders without a GPU and without figures is k8s/base; a test compares them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.kube.budgets import (
    EXIT_SECONDS,
    PRE_STOP_SECONDS,
    QUEUE_LIMIT,
    Budgets,
    Measured,
    budgets,
    or_baked,
    quantity,
)
from chatterbox_prewarm.kube.documents import (
    Rendering,
    container_security,
    document,
    empty_dir,
    gpu_tolerations,
    labels,
    network_policy,
    pod_security,
    selector,
    service_account,
)
from chatterbox_prewarm.kube.nodes import Cluster, affinity, gpu_resource, wanted_of
from chatterbox_prewarm.kube.pre_pull import pre_pull
from chatterbox_prewarm.system.paths import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Document

NAME = "chatterbox"
_SERVER = "server"
_PORT = 8000
#: MiB for short-lived files: uploads, and what a library unpacks.
_TMP_MIB = 256
#: A pull of some GB and a cold start together may take longer than Kubernetes' default of 600 s.
_PROGRESS_SECONDS = 1800
NO_FEATURE_DISCOVERY = (
    "Nodes are not told apart by their GPU, so a pod may run on one that no state was baked for: it misses, is slow\n"
    "and works. Install GPU Feature Discovery, or label such nodes and name the label with --node-label."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be deployed.

    Attributes:
        image: that pods run, by a digest where it is known.
        states: of the image, as its labels tell.
        device: "cuda" or "cpu"; empty for "cuda" if a state is for it.
        gpus: products of the states that matter; all if empty.
        policy: of a start; under "require" a pod runs only where a state fits, since any other would not start.
        replicas: None leaves the number to an autoscaler.
        queue_limit: most requests that a pod has at a time.
        cache_mib: of the cache's volume; None to derive it.
        pre_pull: have the image on all those nodes before a pod comes.
        cluster: and how it labels its nodes.
        measured: of pods; what nobody measured is taken from the states.
    """

    image: str
    states: tuple[StateLabel, ...]
    device: str = ""
    gpus: tuple[str, ...] = ()
    policy: str = "fallback"
    replicas: int | None = None
    queue_limit: int = QUEUE_LIMIT
    cache_mib: int | None = None
    pre_pull: bool = False
    cluster: Cluster = field(default_factory=Cluster)
    measured: Measured = field(default_factory=Measured)


def render(request: Request) -> Rendering:
    """The documents of a deployment.

    Raises:
        BadInputError: no state is for the device or the GPUs asked for, they need different resources, or the cache is
            too small.
    """
    device, states = _choose(request)
    request = replace(request, measured=or_baked(request.measured, states))
    sizes = budgets(states, request.measured, queue_limit=request.queue_limit, cache_mib=request.cache_mib)
    settings = _settings(request, device, sizes)
    deployment = _deployment(request, device, states, sizes, settings)
    documents = [
        service_account(_SERVER, NAME),
        document("v1", "ConfigMap", NAME, labels(_SERVER), data=settings),
        network_policy(_SERVER, NAME, [{"ports": [{"port": "http", "protocol": "TCP"}]}], []),
        _service(),
        deployment,
        _disruption_budget(),
    ]
    if request.pre_pull:
        pod = deployment["spec"]["template"]["spec"]
        where = {field: pod[field] for field in ("affinity", "tolerations") if field in pod}
        documents += pre_pull(request.image, NAME, where)
    return Rendering(documents=tuple(documents), notes=tuple(_notes(request, device, states)))


def _choose(request: Request) -> tuple[str, list[StateLabel]]:
    """The device, and the states that matter on it."""
    kinds = {state.device for state in request.states}
    device = request.device or ("cuda" if "cuda" in kinds else "cpu")
    states = [state for state in request.states if state.device == device]
    if not states and device == "cuda":  # an image that was baked without a GPU, for one: what depends on none is warm
        states = list(request.states)
    if not states:
        raise BadInputError(
            f"the image has no state for the device {device!r}, only for {', '.join(sorted(kinds))}",
            next_step="leave out --device, or bake such a state and add it",
        )
    if unknown := [gpu for gpu in request.gpus if gpu not in {state.gpu for state in states}]:
        known = ", ".join(sorted({state.gpu for state in states}))
        raise BadInputError(
            f"no state of the image is for the GPU {unknown[0]!r}; they are for: {known}",
            next_step="name one of those, or bake on such a node with `chatterbox-prewarm k8s render-bake`",
        )
    return device, [state for state in states if not request.gpus or state.gpu in request.gpus]


def _settings(request: Request, device: str, sizes: Budgets) -> dict[str, str]:
    """Options of `serve`; those that are as the server has them anyway stay out."""
    settings = {"DRAIN_SECONDS": str(sizes.drain_seconds)}
    if device == "cuda" or len({state.device for state in request.states}) > 1:
        settings["DEVICE"] = device
    if request.policy != "fallback":
        settings["POLICY"] = request.policy
    if request.queue_limit != QUEUE_LIMIT:
        settings["QUEUE_LIMIT"] = str(request.queue_limit)
    return {f"CHATTERBOX_PREWARM_{name}": settings[name] for name in sorted(settings)}


def _deployment(
    request: Request, device: str, states: Sequence[StateLabel], sizes: Budgets, settings: dict[str, str]
) -> Document:
    checksum = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    metadata = {
        "labels": labels(_SERVER),
        # The map's name stays, so that it can be patched; its content gives new pods.
        "annotations": {"checksum/config": checksum},
    }
    spec: dict[str, Any] = {
        "progressDeadlineSeconds": max(_PROGRESS_SECONDS, 2 * sizes.startup_seconds),
        "selector": {"matchLabels": selector(_SERVER)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": metadata, "spec": _pod(request, device, states, sizes)},
    }
    if request.replicas is not None:
        spec = {"replicas": request.replicas, **spec}
    made = document("apps/v1", "Deployment", NAME, labels(_SERVER), spec=spec)
    made["metadata"]["annotations"] = {"chatterbox-prewarm/states": ", ".join(state.key for state in states)}
    return made


def _pod(request: Request, device: str, states: Sequence[StateLabel], sizes: Budgets) -> Document:
    wanted = [wanted_of(state) for state in states]
    pod: dict[str, Any] = {
        "serviceAccountName": NAME,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": sizes.grace_seconds,
        "securityContext": pod_security(),
    }
    at_home = affinity(
        wanted,
        request.cluster,
        require_product=request.policy == "require",
        gpu_memory_mib=request.measured.gpu_memory_mib or 0,
    )
    if at_home is not None:
        pod["affinity"] = at_home
    resources: dict[str, Any] = {
        "requests": {"cpu": "2", "memory": quantity(sizes.memory_request_mib)},
        "limits": {"memory": quantity(sizes.memory_limit_mib)},
    }
    if device == "cuda":
        pod["tolerations"] = gpu_tolerations()
        if request.cluster.runtime_class:
            pod["runtimeClassName"] = request.cluster.runtime_class
        gpu = gpu_resource([one.product for one in wanted if one.product], request.cluster)
        resources["requests"][gpu] = resources["limits"][gpu] = "1"
    pod["containers"] = [_container(request.image, resources, sizes)]
    pod["volumes"] = [empty_dir("cache", quantity(sizes.cache_mib)), empty_dir("tmp", quantity(_TMP_MIB))]
    return pod


def _container(image: str, resources: Document, sizes: Budgets) -> Document:
    return {
        "name": _SERVER,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "http", "containerPort": _PORT, "protocol": "TCP"}],
        "envFrom": [{"configMapRef": {"name": NAME}}],
        # Not the `sleep` action: Kubernetes 1.29 has it switched off.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_SECONDS)]}}},
        "resources": resources,
        "startupProbe": {
            **_get("/startupz"),
            "periodSeconds": 1,
            "failureThreshold": sizes.startup_seconds,
        },
        "livenessProbe": {
            **_get("/livez"),
            "periodSeconds": 5,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
            "terminationGracePeriodSeconds": PRE_STOP_SECONDS + EXIT_SECONDS,  # a server that is hung drains nothing
        },
        "readinessProbe": {**_get("/readyz"), "periodSeconds": 1},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "cache", "mountPath": str(CACHE)}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }


def _get(path: str) -> Document:
    return {"httpGet": {"path": path, "port": "http"}}


def _service() -> Document:
    spec = {
        "type": "ClusterIP",
        "selector": selector(_SERVER),
        "ports": [{"name": "http", "port": _PORT, "targetPort": "http", "protocol": "TCP"}],
    }
    return document("v1", "Service", NAME, labels(_SERVER), spec=spec)


def _disruption_budget() -> Document:
    spec = {
        "selector": {"matchLabels": selector(_SERVER)},
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return document("policy/v1", "PodDisruptionBudget", NAME, labels(_SERVER), spec=spec)


def _notes(request: Request, device: str, states: Sequence[StateLabel]) -> list[str]:
    measured, notes = request.measured, [f"Rendered by chatterbox-prewarm k8s render for {request.image}"]
    if device == "cuda":
        if not request.cluster.feature_discovery:
            notes.append(NO_FEATURE_DISCOVERY)
        elif not all(wanted_of(state).product for state in states):
            notes.append("A state was baked without a GPU: any node will do, and on each a start misses in part.")
    given = {
        "--cold-seconds": measured.cold_seconds,
        "--request-seconds": measured.request_seconds,
        "--rss": measured.rss_mib,
        **({"--gpu-memory": measured.gpu_memory_mib} if device == "cuda" else {}),
    }
    if missing := [name for name, value in given.items() if value is None]:
        notes.append(f"Defaults stand for what was not measured: {', '.join(missing)} (docs/kubernetes.md, Sizing).")
    return notes
