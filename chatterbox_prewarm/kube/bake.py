"""Render bakes on a cluster: an Indexed Job for each type of GPU in a matrix.

A Job has only one pod template and therefore one affinity. With a single Job for all types, a pod could start on a node
with the wrong GPU and would have to fail and retry. So each type of GPU has its own Job. Its matrix contains only the
bakes of that type, so `JOB_COMPLETION_INDEX` is the index that `publish` needs.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.image.matrix import MATRIX_NAME, Matrix, to_toml
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
from chatterbox_prewarm.kube.nodes import Cluster, gpu_fields, product_affinity
from chatterbox_prewarm.system.paths import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.image.matrix import Bake
    from chatterbox_prewarm.kube.documents import Document

_BAKE = "bake"
_FOLDER = "/etc/chatterbox-prewarm"
#: Maximum size of a ConfigMap in Kubernetes.
_MAP_BYTES = 1 << 20
#: MiB of the volumes. /tmp holds the state, its packed layer and temporary files of compilers.
_CACHE_MIB, _TMP_MIB = 8192, 8192
_RENDERED = (
    "Rendered by chatterbox-prewarm k8s render-bake. A Job cannot be changed. To run it again, use:\n"
    "kubectl replace --force -f FILE"
)
NO_FEATURE_DISCOVERY = (
    "Nodes are not selected by GPU, so a bake may start on another GPU than it is for. It then ends with 11.\n"
    "Install GPU Feature Discovery, or render one type at a time with --node-label."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of the bakes.

    Attributes:
        matrix: the bakes. Voice clips are read from the paths in it.
        image: image of the stage `tools`.
        name: prefix of the names of all documents.
        registry_secret: name of a secret with the login of the registry; empty if no login is needed.
        signing_secret: secret with the private key that signs the results of the proofs; empty for no signature.
        pull_secret: secret with the login to pull the image of the stage `tools`; empty for `registry_secret`.
        parallelism: concurrent pods of a Job. They may add their states to the same image concurrently.
        cpu: CPU request.
        memory_mib: memory request and limit.
        deadline: time limit of a Job in seconds, including retries.
        insecure: use plain HTTP for the registries; None for the default of `publish`.
        cluster: the cluster.
    """

    matrix: Matrix
    image: str
    name: str = NAME
    registry_secret: str = ""
    signing_secret: str = ""
    pull_secret: str = ""
    parallelism: int = 1
    cpu: int = 4
    memory_mib: int = 16384
    deadline: int = 7200
    insecure: bool | None = None
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def component(self) -> Component:
        """The component of the bakes."""
        return Component(instance=self.name, kind=_BAKE)


def render_bakes(request: Request) -> Rendering:
    """Render a service account, a network policy, and for each type of GPU a ConfigMap and a Job.

    Raises:
        BadInputError: a clip cannot be read, or the clips of a type are too large for a ConfigMap.
    """
    by_gpu: dict[str, list[Bake]] = {}
    for bake in request.matrix.bakes:
        by_gpu.setdefault(bake.gpu, []).append(bake)
    names = job_names(request.component.name, by_gpu)
    documents: list[Document] = [
        service_account(request.component),
        network_policy(request.component, [], registry_egress((request.matrix.base, request.matrix.target))),
    ]
    for gpu, bakes in by_gpu.items():
        documents += [_config_map(request, names[gpu], bakes), _job(request, names[gpu], gpu, len(bakes))]
    notes = [_RENDERED]
    if len(by_gpu) > 1 and not request.cluster.feature_discovery and not request.cluster.labels:
        notes.append(NO_FEATURE_DISCOVERY)
    return Rendering(documents=tuple(documents), notes=tuple(notes))


def _config_map(request: Request, name: str, bakes: Sequence[Bake]) -> Document:
    """Return the ConfigMap with the matrix of one type and the clips of its voices."""
    clips: dict[str, bytes] = {}

    def add_clip(clip: Path) -> Path:
        try:
            content = clip.read_bytes()
        except OSError as error:
            raise from_os_error(error, "reading a voice clip") from error
        key = f"clip-{hashlib.sha256(content).hexdigest()[:16]}{clip.suffix.lower()}"
        clips[key] = content
        return Path(key)

    bakes_in_map = [
        replace(bake, voices={voice: add_clip(clip) for voice, clip in bake.voices.items()}) for bake in bakes
    ]
    text = to_toml(replace(request.matrix, bakes=tuple(bakes_in_map)))
    if (size := len(text.encode()) + sum(map(len, clips.values()))) > _MAP_BYTES:
        raise BadInputError(
            f"the clips for {bakes[0].gpu or 'the CPU'} have {size} bytes, more than the {_MAP_BYTES} of a ConfigMap",
            next_step="use mono clips of 5 to 10 s, or copy them into the tools image and use their paths there",
        )
    config_map = request.component.document("v1", "ConfigMap", name, data={MATRIX_NAME: text})
    if clips:
        config_map["binaryData"] = {key: base64.b64encode(clips[key]).decode() for key in sorted(clips)}
    return config_map


def _job(request: Request, name: str, gpu: str, bakes: int) -> Document:
    spec = {
        "completionMode": "Indexed",
        "completions": bakes,
        "parallelism": min(request.parallelism, bakes),
        "backoffLimitPerIndex": RETRIES,
        "activeDeadlineSeconds": request.deadline,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "podFailurePolicy": failure_policy(_BAKE, "FailIndex"),
        "template": {"metadata": {"labels": request.component.labels}, "spec": _pod(request, name, gpu)},
    }
    job = request.component.document("batch/v1", "Job", name, spec=spec)
    if gpu:
        job["metadata"]["annotations"] = {"chatterbox-prewarm/gpu": gpu}
    return job


def _pod(request: Request, name: str, gpu: str) -> Document:
    # The image of the stage `tools` runs as root, for builds on an engine. A bake needs only the two writable volumes.
    pod = {**pod_base(request.component.name, request.pull_secret or request.registry_secret), "restartPolicy": "Never"}
    pod["securityContext"]["fsGroup"] = USER
    fields, gpu_resource = gpu_fields([gpu], request.cluster) if gpu else ({}, "")
    pod |= product_affinity(gpu, request.cluster) | fields
    volumes = [
        {"name": "matrix", "configMap": {"name": name}},
        empty_dir("cache", _CACHE_MIB),
        empty_dir("tmp", _TMP_MIB),
        *registry_login(request.registry_secret)[0],
        *signing_key(request.signing_secret)[0],
    ]
    return {**pod, "containers": [_container(request, name, gpu_resource)], "volumes": volumes}


def _container(request: Request, name: str, gpu_resource: str) -> Document:
    _, key_mounts, passphrase, key = signing_key(request.signing_secret)
    arguments = ["publish", "--matrix", f"{_FOLDER}/{MATRIX_NAME}", "--warm", "/tmp/warm", *key]  # noqa: S108 - an emptyDir
    if request.insecure is not None:
        arguments.append("--insecure" if request.insecure else "--secure")
    _, login_mounts, login = registry_login(request.registry_secret)
    environment = [{"name": "CHATTERBOX_PREWARM_BUILDER", "value": f"kubernetes job/{name}"}, *login, *passphrase]
    mounts = [
        {"name": "matrix", "mountPath": _FOLDER, "readOnly": True},
        {"name": "cache", "mountPath": str(CACHE)},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
        *login_mounts,
        *key_mounts,
    ]
    return container(
        _BAKE,
        request.image,
        args=arguments,
        env=environment,
        resources=resources(request.cpu, request.memory_mib, request.memory_mib, gpu_resource),
        volumeMounts=mounts,
    )
