"""Render the deployment of an image from the states in its labels.

The result without a GPU and without measurements equals k8s/base; a test compares them.
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
    with_baked_values,
)
from chatterbox_prewarm.kube.documents import (
    NAME,
    Component,
    Rendering,
    container,
    empty_dir,
    network_policy,
    pod_base,
    resources,
    service_account,
)
from chatterbox_prewarm.kube.nodes import Cluster, gpu_fields, gpu_product, state_affinity
from chatterbox_prewarm.kube.pre_pull import pre_pull
from chatterbox_prewarm.system.cpus import REQUEST
from chatterbox_prewarm.system.gpu_names import nvml_name
from chatterbox_prewarm.system.paths import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Document

_SERVER = "server"
_PORT = 8000
_CPUS = 2
#: MiB for temporary files, such as uploads.
_TMP_MIB = 256
#: An image pull of several GB plus a cold start may take longer than the default of Kubernetes, 600 s.
_PROGRESS_SECONDS = 1800
NO_FEATURE_DISCOVERY = (
    "Nodes are not selected by GPU, so a pod may run on a GPU that no state was baked for. It then has misses and is\n"
    "slow, but works. Install GPU Feature Discovery, or label the nodes and pass the label with --node-label."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of a deployment.

    Attributes:
        image: image of the pods, with its digest if that is known.
        states: states of the image, from its labels.
        name: name of the deployment. Deployments in the same namespace need different names.
        pull_secret: secret with the login to pull the image; empty if no login is needed.
        device: "cuda" or "cpu"; empty for "cuda" if there is a state for it.
        gpus: use only the states for these products; empty for all.
        converts: the pods also convert speech.
        policy: policy of a start. With "require", pods run only on nodes that fit a state, because others fail to
            start.
        replicas: number of pods; None leaves it to an autoscaler.
        queue_limit: maximum number of requests in a pod.
        pre_stop: seconds in which the proxies learn that a pod ends, before it drains.
        cache_mib: size of the cache volume in MiB; None to compute it.
        pre_pull: pull the image on all matching nodes before a pod starts there.
        cluster: the cluster.
        measured: measurements of pods. Missing values are taken from the states.
    """

    image: str
    states: tuple[StateLabel, ...]
    name: str = NAME
    pull_secret: str = ""
    device: str = ""
    gpus: tuple[str, ...] = ()
    converts: bool = False
    policy: str = "fallback"
    replicas: int | None = None
    queue_limit: int = QUEUE_LIMIT
    pre_stop: int = PRE_STOP_SECONDS
    cache_mib: int | None = None
    pre_pull: bool = False
    cluster: Cluster = field(default_factory=Cluster)
    measured: Measured = field(default_factory=Measured)

    @property
    def server(self) -> Component:
        """The component of the servers."""
        return Component(instance=self.name, kind=_SERVER)


def render(request: Request) -> Rendering:
    """Render the documents of a deployment.

    Raises:
        BadInputError: no state is for the requested device or GPUs, the states need different resources, or the cache
            is too small.
    """
    device, states = _choose(request)
    request = replace(request, measured=with_baked_values(request.measured, states, converts=request.converts))
    sizes = budgets(
        states,
        request.measured,
        queue_limit=request.queue_limit,
        pre_stop=request.pre_stop,
        cache_mib=request.cache_mib,
        converts=request.converts,
    )
    settings = _settings(request, device, sizes)
    deployment = _deployment(request, device, states, sizes, settings)
    documents = [
        service_account(request.server),
        request.server.document("v1", "ConfigMap", data=settings),
        network_policy(request.server, [{"ports": [{"port": "http", "protocol": "TCP"}]}], []),
        _service(request.server),
        deployment,
        _disruption_budget(request.server),
    ]
    if request.pre_pull:
        pod = deployment["spec"]["template"]["spec"]
        node_fields = {field: pod[field] for field in ("affinity", "tolerations") if field in pod}
        documents += pre_pull(request.image, request.name, request.pull_secret, node_fields)
    return Rendering(documents=tuple(documents), notes=tuple(_notes(request, device, states)))


def _choose(request: Request) -> tuple[str, list[StateLabel]]:
    """Choose the device and the states for it."""
    kinds = {state.device for state in request.states}
    device = request.device or ("cuda" if "cuda" in kinds else "cpu")
    states = [state for state in request.states if state.device == device]
    # Families that do not depend on a GPU can be used on a GPU, too.
    if not states and device == "cuda":
        states = list(request.states)
    if not states:
        raise BadInputError(
            f"the image has no state for the device {device!r}, only for {', '.join(sorted(kinds))}",
            next_step="leave out --device, or bake a state for that device and append it",
        )
    known = {gpu_product(state) or state.compute_capability for state in states}
    gpus = {gpu if gpu in known else nvml_name(gpu) for gpu in request.gpus}
    if unknown := sorted(gpus - known):
        raise BadInputError(
            f"no state of the image is for the GPU {unknown[0]!r}; the states are for: {', '.join(sorted(known))}",
            next_step="choose one of those, or bake on a node with that GPU: `chatterbox-prewarm k8s render-bake`",
        )
    return device, [state for state in states if not gpus or gpus & {state.gpu, state.compute_capability}]


def _settings(request: Request, device: str, sizes: Budgets) -> dict[str, str]:
    """Return the options of `serve` that differ from its defaults, as environment variables."""
    settings = {"DRAIN_SECONDS": str(sizes.drain_seconds)}
    if device == "cuda" or len({state.device for state in request.states}) > 1:
        settings["DEVICE"] = device
    if request.converts:
        settings["CONVERT"] = "true"
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
        "labels": request.server.labels,
        # The name of the ConfigMap is fixed, so that users can patch it. The checksum makes a change restart the pods.
        "annotations": {"checksum/config": checksum},
    }
    spec: dict[str, Any] = {
        "progressDeadlineSeconds": max(_PROGRESS_SECONDS, 2 * sizes.startup_seconds),
        "selector": {"matchLabels": request.server.selector},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": metadata, "spec": _pod(request, device, states, sizes)},
    }
    if request.replicas is not None:
        spec = {"replicas": request.replicas, **spec}
    deployment = request.server.document("apps/v1", "Deployment", spec=spec)
    deployment["metadata"]["annotations"] = {"chatterbox-prewarm/states": ", ".join(state.key for state in states)}
    return deployment


def _pod(request: Request, device: str, states: Sequence[StateLabel], sizes: Budgets) -> Document:
    pod = {**pod_base(request.name, request.pull_secret), "terminationGracePeriodSeconds": sizes.grace_seconds}
    pod |= state_affinity(
        states,
        request.cluster,
        require_product=request.policy == "require",
        gpu_memory_mib=request.measured.gpu_memory_mib or 0,
    )
    products = [product for state in states if (product := gpu_product(state))]
    fields, gpu_resource = gpu_fields(products, request.cluster) if device == "cuda" else ({}, "")
    pod |= fields
    pod["containers"] = [_container(request, sizes, gpu_resource)]
    pod["volumes"] = [empty_dir("cache", sizes.cache_mib), empty_dir("tmp", _TMP_MIB)]
    return pod


def _container(request: Request, sizes: Budgets, gpu_resource: str) -> Document:
    liveness = _probe(
        "/livez",
        periodSeconds=5,
        timeoutSeconds=5,
        failureThreshold=3,
        terminationGracePeriodSeconds=sizes.pre_stop_seconds + EXIT_SECONDS,  # a hung server does not drain
    )
    return container(
        _SERVER,
        request.image,
        ports=[{"name": "http", "containerPort": _PORT, "protocol": "TCP"}],
        envFrom=[{"configMapRef": {"name": request.name}}],
        env=[
            {
                "name": REQUEST,
                "valueFrom": {"resourceFieldRef": {"containerName": _SERVER, "resource": "requests.cpu"}},
            }
        ],
        # The `sleep` action of Kubernetes is disabled by default in version 1.29.
        lifecycle={"preStop": {"exec": {"command": ["sleep", str(sizes.pre_stop_seconds)]}}},
        resources=resources(_CPUS, sizes.memory_request_mib, sizes.memory_limit_mib, gpu_resource),
        startupProbe=_probe("/startupz", periodSeconds=1, failureThreshold=sizes.startup_seconds),
        livenessProbe=liveness,
        readinessProbe=_probe("/readyz", periodSeconds=1),
        volumeMounts=[{"name": "cache", "mountPath": str(CACHE)}, {"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    )


def _probe(path: str, **fields: int) -> Document:
    return {"httpGet": {"path": path, "port": "http"}, **fields}


def _service(server: Component) -> Document:
    ports = [{"name": "http", "port": _PORT, "targetPort": "http", "protocol": "TCP"}]
    spec = {"type": "ClusterIP", "selector": server.selector, "ports": ports}
    return server.document("v1", "Service", spec=spec)


def _disruption_budget(server: Component) -> Document:
    spec = {
        "selector": {"matchLabels": server.selector},
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return server.document("policy/v1", "PodDisruptionBudget", spec=spec)


def _notes(request: Request, device: str, states: Sequence[StateLabel]) -> list[str]:
    measured, notes = request.measured, [f"Rendered by chatterbox-prewarm k8s render for {request.image}"]
    if device == "cuda":
        if not request.cluster.feature_discovery:
            notes.append(NO_FEATURE_DISCOVERY)
        elif not all(gpu_product(state) or state.cross_compiled for state in states):
            notes.append("A state was baked without a GPU. It fits any node, but nothing of it is compiled for a GPU.")
        if any(state.cross_compiled and not state.proven for state in states):
            notes.append("A state was compiled without its GPU: run the Job of `k8s render-proof` first.")
    measurements = {
        "--cold-seconds": measured.cold_seconds,
        "--request-seconds": measured.request_seconds,
        "--rss": measured.rss_mib,
        **({"--gpu-memory": measured.gpu_memory_mib} if device == "cuda" else {}),
    }
    if missing := [name for name, value in measurements.items() if value is None]:
        notes.append(
            f"Defaults are used, because these were not measured: {', '.join(missing)} (docs/kubernetes.md, Sizing)."
        )
    return notes
