"""Bakes on a cluster: an Indexed Job for each type of GPU in a matrix.

A Job has one pod template, and so one affinity: a single Job for all types could only let a pod land anywhere, look,
fail and try again, which holds GPUs for nothing and ends in chance. So each type has a Job of its own, whose indices
are that type's bakes. Its matrix holds just those, which makes `JOB_COMPLETION_INDEX` the number that `publish` wants.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import (
    BadInputError,
    FingerprintMismatchError,
    IntegrityError,
    NotWarmError,
    PrewarmError,
    WeightsError,
    from_os_error,
)
from chatterbox_prewarm.image.matrix import FILE, Matrix, to_toml
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.kube.budgets import quantity
from chatterbox_prewarm.kube.documents import (
    USER,
    Rendering,
    container_security,
    document,
    empty_dir,
    gpu_tolerations,
    labels,
    network_policy,
    pod_security,
    service_account,
)
from chatterbox_prewarm.kube.nodes import Cluster, Wanted, affinity, gpu_resource
from chatterbox_prewarm.system.paths import CACHE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.image.matrix import Bake
    from chatterbox_prewarm.kube.documents import Document

_BAKE = "bake"
_NAME = "chatterbox-bake"
_FOLDER = "/etc/chatterbox-prewarm"
_LOGIN = "/etc/registry-login"
#: Of a ConfigMap's values; Kubernetes takes no more.
_MAP_BYTES = 1 << 20
#: MiB: the cache has what compilers write, /tmp the state, its packed layer and a compiler's own files.
_CACHE_MIB, _TMP_MIB = 8192, 8192
#: An attempt more would end the same way: usage, weights, another GPU, a damaged state, a miss, bad input, a fault.
#: What is left are the registry (14), the model (15: memory may have been short), and signals.
_FINAL = sorted(
    {2, *(kind.exit_code for kind in (WeightsError, FingerprintMismatchError, IntegrityError, NotWarmError))}
    | {BadInputError.exit_code, PrewarmError.exit_code}
)
_RETRIES = 3
_RENDERED = (
    "Rendered by chatterbox-prewarm k8s render-bake. A Job cannot be changed: kubectl replace --force -f FILE\n"
    "begins anew."
)
NO_FEATURE_DISCOVERY = (
    "Nodes are not told apart by their GPU, so a bake may find another one than it is for, and ends with 11.\n"
    "Install GPU Feature Discovery, or render one type at a time with --node-label."
)
#: Seconds that a finished Job stays, for its log.
_KEPT_SECONDS = 86400


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be baked, and with what.

    Attributes:
        matrix: the bakes; clips are read from where it names them.
        image: of the stage `tools`.
        registry_secret: name of a secret with the registry's login; empty for a registry that wants none.
        parallelism: pods of a Job at a time. They may add to one image at once.
        cpu: CPUs requested.
        memory_mib: requested, and the limit.
        deadline: seconds that a Job may take, tries included.
        insecure: of the registries; None to leave it to `publish`.
    """

    matrix: Matrix
    image: str
    registry_secret: str = ""
    parallelism: int = 1
    cpu: int = 4
    memory_mib: int = 16384
    deadline: int = 7200
    insecure: bool | None = None
    cluster: Cluster = field(default_factory=Cluster)


def render_bakes(request: Request) -> Rendering:
    """An account, a network policy, and a map and a Job for each type of GPU.

    Raises:
        BadInputError: a clip cannot be read, or those of a type are too large for a ConfigMap.
    """
    by_gpu: dict[str, list[Bake]] = {}
    for bake in request.matrix.bakes:
        by_gpu.setdefault(bake.gpu, []).append(bake)
    names = _names(by_gpu)
    documents: list[Document] = [
        service_account(_BAKE, _NAME),
        network_policy(_BAKE, _NAME, [], _egress(request.matrix)),
    ]
    for gpu, bakes in by_gpu.items():
        documents += [_map(names[gpu], request.matrix, bakes), _job(request, names[gpu], gpu, len(bakes))]
    notes = [_RENDERED]
    if len(by_gpu) > 1 and not request.cluster.feature_discovery and not request.cluster.labels:
        notes.append(NO_FEATURE_DISCOVERY)
    return Rendering(documents=tuple(documents), notes=tuple(notes))


def _names(gpus: Mapping[str, Any]) -> dict[str, str]:
    """A name for each type's documents; at most 63 characters, with room for what a Job adds for its pods."""
    found: dict[str, str] = {}
    for gpu in gpus:
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "cpu"
        if len(slug) > 32 or f"{_NAME}-{slug}" in found.values():
            slug = f"{slug[:24].strip('-')}-{hashlib.sha256(gpu.encode()).hexdigest()[:7]}"
        found[gpu] = f"{_NAME}-{slug}"
    return found


def _map(name: str, matrix: Matrix, bakes: Sequence[Bake]) -> Document:
    """The matrix of one type, and the clips of its voices under names that a map can have."""
    clips: dict[str, bytes] = {}

    def keep(clip: Path) -> Path:
        try:
            content = clip.read_bytes()
        except OSError as error:
            raise from_os_error(error, "reading a voice's clip") from error
        key = f"clip-{hashlib.sha256(content).hexdigest()[:16]}{clip.suffix.lower()}"
        clips[key] = content
        return Path(key)

    own = [replace(bake, voices={voice: keep(clip) for voice, clip in bake.voices.items()}) for bake in bakes]
    text = to_toml(replace(matrix, bakes=tuple(own)))
    if (size := len(text.encode()) + sum(map(len, clips.values()))) > _MAP_BYTES:
        raise BadInputError(
            f"the clips for {bakes[0].gpu or 'the CPU'} have {size} bytes, more than the {_MAP_BYTES} of a ConfigMap",
            next_step="shorten them to 5 to 10 s, mono; or copy them into the tools image and name them there",
        )
    made = document("v1", "ConfigMap", name, labels(_BAKE), data={FILE: text})
    if clips:
        made["binaryData"] = {key: base64.b64encode(clips[key]).decode() for key in sorted(clips)}
    return made


def _job(request: Request, name: str, gpu: str, bakes: int) -> Document:
    spec = {
        "completionMode": "Indexed",
        "completions": bakes,
        "parallelism": min(request.parallelism, bakes),
        "backoffLimitPerIndex": _RETRIES,
        "activeDeadlineSeconds": request.deadline,
        "ttlSecondsAfterFinished": _KEPT_SECONDS,
        "podFailurePolicy": {
            "rules": [
                # A node that is drained, or a pod that makes room, is no failure of the bake.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailIndex",
                    "onExitCodes": {"containerName": _BAKE, "operator": "In", "values": _FINAL},
                },
            ]
        },
        "template": {"metadata": {"labels": labels(_BAKE)}, "spec": _pod(request, name, gpu)},
    }
    made = document("batch/v1", "Job", name, labels(_BAKE), spec=spec)
    if gpu:
        made["metadata"]["annotations"] = {"chatterbox-prewarm/gpu": gpu}
    return made


def _pod(request: Request, name: str, gpu: str) -> Document:
    resources: dict[str, Any] = {
        "requests": {"cpu": str(request.cpu), "memory": quantity(request.memory_mib)},
        "limits": {"memory": quantity(request.memory_mib)},
    }
    pod: dict[str, Any] = {
        "serviceAccountName": _NAME,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        # The stage `tools` is root's, for builds on an engine; a bake needs no more than two places to write.
        "securityContext": {**pod_security(), "fsGroup": USER},
    }
    at_home = affinity([Wanted(product=gpu)], request.cluster, require_product=True)
    if at_home is not None and "requiredDuringSchedulingIgnoredDuringExecution" in at_home["nodeAffinity"]:
        at_home["nodeAffinity"].pop("preferredDuringSchedulingIgnoredDuringExecution", None)
        pod["affinity"] = at_home
    if gpu:
        pod["tolerations"] = gpu_tolerations()
        if request.cluster.runtime_class:
            pod["runtimeClassName"] = request.cluster.runtime_class
        resource = gpu_resource([gpu], request.cluster)
        resources["requests"][resource] = resources["limits"][resource] = "1"
    volumes = [
        {"name": "matrix", "configMap": {"name": name}},
        empty_dir("cache", quantity(_CACHE_MIB)),
        empty_dir("tmp", quantity(_TMP_MIB)),
    ]
    if request.registry_secret:
        login = [{"key": ".dockerconfigjson", "path": "config.json"}]
        secret = {"secretName": request.registry_secret, "defaultMode": 0o440, "items": login}
        volumes.append({"name": "registry-login", "secret": secret})
    return {**pod, "containers": [_container(request, name, resources)], "volumes": volumes}


def _container(request: Request, name: str, resources: Document) -> Document:
    arguments = ["publish", "--matrix", f"{_FOLDER}/{FILE}", "--warm", "/tmp/warm"]  # noqa: S108 - an emptyDir
    if request.insecure is not None:
        arguments.append("--insecure" if request.insecure else "--secure")
    environment = [{"name": "CHATTERBOX_PREWARM_BUILDER", "value": f"kubernetes job/{name}"}]
    mounts = [
        {"name": "matrix", "mountPath": _FOLDER, "readOnly": True},
        {"name": "cache", "mountPath": str(CACHE)},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir
    ]
    if request.registry_secret:
        environment.append({"name": "DOCKER_CONFIG", "value": _LOGIN})
        mounts.append({"name": "registry-login", "mountPath": _LOGIN, "readOnly": True})
    return {
        "name": _BAKE,
        "image": request.image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments,
        "env": environment,
        "resources": resources,
        "securityContext": container_security(),
        "volumeMounts": mounts,
    }


def _egress(matrix: Matrix) -> list[Document]:
    """Names, and the registries' ports: a policy knows no host names."""
    ports = {_port(reference) for reference in (matrix.base, matrix.target)}
    dns = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    return [{"ports": [*dns, *({"port": port, "protocol": "TCP"} for port in sorted({443, *ports}))]}]


def _port(reference: str) -> int:
    found = parse(reference)
    if found.kind != "registry":
        raise BadInputError(
            f"{reference} is in no registry, and a pod has no other place to keep an image",
            next_step="name a registry's repository in prewarm.toml",
        )
    number = re.search(r":(\d+)$", found.api_host)
    return int(number[1]) if number else 443
