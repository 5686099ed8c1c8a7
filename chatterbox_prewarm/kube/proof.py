"""Render proofs on a cluster: a Job for each state of an image that was compiled without its GPU.

The Job runs the image on a node with that GPU, before a deployment does. If the proof passes, it attaches the evidence
to the image in the registry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.kube.budgets import Measured, budgets
from chatterbox_prewarm.kube.documents import (
    NAME,
    USER,
    Component,
    Rendering,
    container,
    empty_dir,
    network_policy,
    pod_base,
    resources,
    service_account,
)
from chatterbox_prewarm.kube.jobs import (
    KEPT_SECONDS,
    RETRIES,
    failure_policy,
    job_names,
    registry_egress,
    registry_login,
    signing_key,
)
from chatterbox_prewarm.kube.nodes import Cluster, gpu_fields, gpu_product, state_affinity
from chatterbox_prewarm.system.paths import CACHE

if TYPE_CHECKING:
    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Document

_PROOF = "proof"
_CPUS = 2
#: MiB of /tmp, which holds the evidence and another copy of the cache.
_TMP_MIB = 1024
_NOTES = (
    "Rendered by chatterbox-prewarm k8s render-proof. A Job cannot be changed. To run it again, use:\n"
    "kubectl replace --force -f FILE"
)
NO_FEATURE_DISCOVERY = (
    "Nodes are not selected by GPU, so a proof may start on another GPU than its state is for. It then fails.\n"
    "Install GPU Feature Discovery, or pass the label of such nodes with --node-label."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of the proofs.

    Attributes:
        image: image of the pods, with its digest, in a registry.
        states: states of the image, from its labels.
        name: prefix of the names of all documents.
        registry_secret: name of a secret with a login that may write to the registry; empty if no login is needed.
        signing_secret: secret with the private key that signs the results of the proofs; empty for no signature.
        pull_secret: secret with the login to pull the image; empty for `registry_secret`.
        deadline: time limit of a Job in seconds, including retries.
        insecure: use plain HTTP for the registry; None for the default of `publish`.
        cluster: the cluster.
    """

    image: str
    states: tuple[StateLabel, ...]
    name: str = NAME
    registry_secret: str = ""
    signing_secret: str = ""
    pull_secret: str = ""
    deadline: int = 3600
    insecure: bool | None = None
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def component(self) -> Component:
        """The component of the proofs."""
        return Component(instance=self.name, kind=_PROOF)


def render_proofs(request: Request) -> Rendering:
    """Render a service account, a network policy, and a Job for each state that was compiled without its GPU.

    Raises:
        BadInputError: the image has no such state, or is not in a registry.
    """
    states = {state.key: state for state in request.states if state.cross_compiled}
    if not states:
        raise BadInputError(
            "no state of the image was compiled without its GPU, so its bake or its build has proven it",
            next_step="render the deployment with `chatterbox-prewarm k8s render`",
        )
    names = job_names(request.component.name, states)
    documents = [
        service_account(request.component),
        network_policy(request.component, [], registry_egress([request.image])),
        *(_job(request, names[key], state) for key, state in states.items()),
    ]
    notes = [_NOTES] if request.cluster.feature_discovery else [_NOTES, NO_FEATURE_DISCOVERY]
    return Rendering(documents=tuple(documents), notes=tuple(notes))


def _job(request: Request, name: str, state: StateLabel) -> Document:
    spec = {
        "backoffLimit": RETRIES,
        "activeDeadlineSeconds": request.deadline,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "podFailurePolicy": failure_policy(_PROOF, "FailJob"),
        "template": {"metadata": {"labels": request.component.labels}, "spec": _pod(request, state)},
    }
    job = request.component.document("batch/v1", "Job", name, spec=spec)
    job["metadata"]["annotations"] = {"chatterbox-prewarm/states": state.key}
    return job


def _pod(request: Request, state: StateLabel) -> Document:
    pod = {**pod_base(request.component.name, request.pull_secret or request.registry_secret), "restartPolicy": "Never"}
    pod["securityContext"]["fsGroup"] = USER  # the login is readable for this group
    fields, gpu_resource = gpu_fields([product] if (product := gpu_product(state)) else [], request.cluster)
    pod |= state_affinity([state], request.cluster, require_product=True) | fields
    volumes, mounts, environment = registry_login(request.registry_secret)
    key_volumes, key_mounts, passphrase, key = signing_key(request.signing_secret)
    arguments = ["publish", "--prove-only", request.image, "--state", state.key, *key]
    if request.insecure is not None:
        arguments.append("--insecure" if request.insecure else "--secure")
    sizes = budgets([state], Measured())
    proof = container(
        _PROOF,
        request.image,
        args=arguments,
        env=[*environment, *passphrase],
        resources=resources(_CPUS, sizes.memory_request_mib, sizes.memory_limit_mib, gpu_resource),
        volumeMounts=[
            {"name": "cache", "mountPath": str(CACHE)},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
            *mounts,
            *key_mounts,
        ],
    )
    volumes = [empty_dir("cache", sizes.cache_mib), empty_dir("tmp", _TMP_MIB), *volumes, *key_volumes]
    return {**pod, "containers": [proof], "volumes": volumes}
