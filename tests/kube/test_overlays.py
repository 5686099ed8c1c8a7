"""Every overlay, component and bake is valid on every supported Kubernetes version and restricted."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from chatterbox_prewarm.kube.nodes import product_label
from tests.helpers.manifests import (
    FOREIGN,
    K8S,
    VERSIONS,
    Document,
    conflicts,
    document_of,
    kustomize,
    pods,
    references,
    validate,
    violations,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.programs

OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
ON_GPU = [name for name in OVERLAYS if name != "cpu-demo"]
#: The first minor version whose schema has the fields that a component needs.
SINCE = {"weights-image-volume": (1, 31)}


def with_components(folder: Path, *names: str, overlay: str = "../k8s/base", **fields: Any) -> list[Document]:
    """Render an overlay of a user with these components."""
    if not (folder / "k8s").exists():
        shutil.copytree(K8S, folder / "k8s")
    user = folder / f"user-{'-'.join(names)}"
    user.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [overlay],
        "components": [f"../k8s/components/{name}" for name in names],
        **fields,
    }
    (user / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(user)


def ours(documents: list[Document]) -> list[Document]:
    return [document for document in documents if not document["apiVersion"].startswith(FOREIGN)]


def test_there_is_an_overlay_for_each_kind_of_machine() -> None:
    products = ["a10", "a100", "b200", "h100", "h200", "l4", "l40s", "t4"]
    assert set(OVERLAYS) == {"cpu-demo", "multi-gpu-node", *(f"gpu-{product}" for product in products)}


@pytest.mark.parametrize("path", [*(f"overlays/{name}" for name in OVERLAYS), "bake"])
def test_every_overlay_is_valid_and_restricted_on_every_version(path: str) -> None:
    documents = kustomize(K8S / path)
    for document in documents:
        for version in VERSIONS:
            validate(document, version)
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}
    assert not any("namespace" in document["metadata"] for document in documents)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_is_valid_and_restricted_on_the_base(name: str, tmp_path: Path) -> None:
    documents = with_components(tmp_path, name)
    since = SINCE.get(name, (1, 29))
    for document in ours(documents):
        for version in VERSIONS:
            if tuple(map(int, version.split("."))) >= since or document["kind"] != "Deployment":
                validate(document, version)
            else:
                with pytest.raises(kubernetes_validate.ValidationError):
                    validate(document, version)
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}


def test_components_can_be_combined_with_an_overlay_and_settings_of_a_user(tmp_path: Path) -> None:
    documents = with_components(
        tmp_path,
        *("signature-key", "hpa", "monitor", "alerts"),
        overlay="../k8s/overlays/gpu-l4",
        images=[{"name": "chatterbox", "newName": "registry.example.com/speech", "digest": "sha256:" + "a" * 64}],
        configMapGenerator=[
            {"name": "chatterbox", "behavior": "merge", "literals": ["CHATTERBOX_PREWARM_POLICY=require"]}
        ],
    )
    assert document_of(documents, "ConfigMap")["data"] == {
        "CHATTERBOX_PREWARM_DEVICE": "cuda",
        "CHATTERBOX_PREWARM_DRAIN_SECONDS": "100",
        "CHATTERBOX_PREWARM_KEY": "/etc/chatterbox-prewarm/public.pem",
        "CHATTERBOX_PREWARM_POLICY": "require",
    }
    images = {container["image"] for _, pod in pods(documents) for container in pod["containers"]}
    assert images == {"registry.example.com/speech@sha256:" + "a" * 64}, "the DaemonSet pulls the image of the pods"
    (server,) = document_of(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    key = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}["signature-key"]
    assert f"{key}/public.pem" == "/etc/chatterbox-prewarm/public.pem"


@pytest.mark.parametrize("name", ON_GPU)
def test_an_overlay_for_a_gpu_requests_one_and_selects_the_nodes(name: str) -> None:
    documents = kustomize(K8S / "overlays" / name)
    pod = document_of(documents, "Deployment")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == server["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    affinity = pod["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    arch, *others = term["matchExpressions"]
    assert arch == {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}
    assert all(one["key"].startswith("nvidia.com/gpu.") for one in others)
    pre_pull = document_of(documents, "DaemonSet")["spec"]["template"]["spec"]
    assert pre_pull["affinity"] == pod["affinity"], "the image is pulled on the nodes of the pods"
    assert "nvidia.com/gpu" not in pre_pull["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    ("name", "capability", "product"),
    [
        ("gpu-l4", "8.9", "NVIDIA L4"),
        ("gpu-a10", "8.6", "NVIDIA A10"),
        ("gpu-h100", "9.0", "NVIDIA H100 80GB HBM3"),
        ("gpu-h200", "9.0", "NVIDIA H200"),
        ("gpu-a100", "8.0", "NVIDIA A100 80GB PCIe"),
        ("gpu-t4", "7.5", "Tesla T4"),
        ("gpu-l40s", "8.9", "NVIDIA L40S"),
        ("gpu-b200", "10.0", "NVIDIA B200"),
    ],
)
def test_an_overlay_uses_the_product_label_of_its_nodes(name: str, capability: str, product: str) -> None:
    affinity = document_of(kustomize(K8S / "overlays" / name), "Deployment")["spec"]["template"]["spec"]["affinity"]
    (term,) = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert ".".join(one["values"][0] for one in term["matchExpressions"][1:]) == capability
    (preferred,) = affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = preferred["preference"]["matchExpressions"]
    assert expression["key"] == "nvidia.com/gpu.product"
    assert product_label(product) in expression["values"]


def test_an_update_of_a_full_node_has_a_free_gpu_for_an_additional_pod() -> None:
    spec = document_of(kustomize(K8S / "overlays" / "multi-gpu-node"), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert spec["replicas"] == 8 - spec["strategy"]["rollingUpdate"]["maxSurge"]


def test_the_component_no_surge_updates_a_node_without_a_free_gpu(tmp_path: Path) -> None:
    documents = with_components(
        tmp_path,
        "no-surge",
        overlay="../k8s/overlays/multi-gpu-node",
        replicas=[{"name": "chatterbox", "count": 8}],
    )
    spec = document_of(documents, "Deployment")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}}
    assert spec["replicas"] == 8


def test_only_the_overlay_for_a_multi_gpu_node_sets_the_number_of_pods() -> None:
    fixed = {
        name for name in OVERLAYS if "replicas" in document_of(kustomize(K8S / "overlays" / name), "Deployment")["spec"]
    }
    assert fixed == {"multi-gpu-node"}


def test_weights_from_an_image_are_mounted_at_the_path_of_the_server(tmp_path: Path) -> None:
    pod = document_of(with_components(tmp_path, "weights-image-volume"), "Deployment")["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["weights"] == {"name": "weights", "mountPath": "/opt/chatterbox-prewarm/weights", "readOnly": True}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["weights"]["image"]["pullPolicy"] == "IfNotPresent"


def test_resources_of_other_projects_refer_to_our_documents(tmp_path: Path) -> None:
    documents = with_components(tmp_path, "keda", "monitor", "alerts")
    foreign = {document["kind"]: document for document in documents if document not in ours(documents)}
    assert foreign.keys() == {"ScaledObject", "InterceptorRoute", "PodMonitor", "PrometheusRule"}
    scaled, route = foreign["ScaledObject"], foreign["InterceptorRoute"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == document_of(documents, "Deployment")["metadata"]["name"]
    assert scaled["spec"]["minReplicaCount"] == 0
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["metadata"]["interceptorRoute"] == route["metadata"]["name"]
    service = document_of(documents, "Service")
    assert route["spec"]["target"] == {
        "service": service["metadata"]["name"],
        "portName": service["spec"]["ports"][0]["name"],
    }
    monitor = foreign["PodMonitor"]["spec"]
    template = document_of(documents, "Deployment")["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert (endpoint["path"], endpoint["port"]) == ("/metrics", "http")
    rules = foreign["PrometheusRule"]["spec"]["groups"][0]["rules"]
    assert all({"summary", "description", "why", "mend"} == rule["annotations"].keys() for rule in rules)
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_two_overlays_with_different_prefixes_are_separate(tmp_path: Path) -> None:
    """`labels` distinguishes the pods, and every reference follows the prefix."""
    one, two = (
        with_components(
            tmp_path / name,
            *("keda", "hpa", "monitor", "voices"),
            overlay="../k8s/overlays/gpu-l4",
            namePrefix=f"{name}-",
            labels=[{"pairs": {"app.kubernetes.io/instance": name}, "includeSelectors": True}],
        )
        for name in ("one", "two")
    )
    assert conflicts(one, two) == []
    assert len(references(one, "one-chatterbox")) > len(one), "each document has a name, and some refer to others"
    assert references(one, "chatterbox") == []


def test_a_pull_secret_is_used_by_every_pod(tmp_path: Path) -> None:
    documents = with_components(tmp_path, "pull-secret", overlay="../k8s/overlays/gpu-l4")
    assert [pod["imagePullSecrets"] for _, pod in pods(documents)] == [[{"name": "registry-login"}]] * 2


def test_an_autoscaler_scales_the_deployment(tmp_path: Path) -> None:
    documents = with_components(tmp_path, "hpa")
    spec = document_of(documents, "HorizontalPodAutoscaler")["spec"]
    deployment = document_of(documents, "Deployment")
    assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    assert spec["minReplicas"] < spec["maxReplicas"]


def test_violations_of_a_pod_are_found() -> None:
    pod = next(pod for _, pod in pods(kustomize(K8S / "base")))
    assert violations(pod) == []
    pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    pod["containers"][0]["env"] = [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"}]
    pod["volumes"] = [{"name": "host", "hostPath": {"path": "/"}}, {"name": "tmp", "emptyDir": {}}]
    pod["hostPID"] = True
    del pod["securityContext"]
    assert violations(pod) == [
        "hostPID",
        "runs as root",
        "no seccomp profile",
        "the volume host is a hostPath",
        "the volume tmp has no size limit",
        "the container server has more permissions",
        "a variable of the NVIDIA runtime",
    ]


def test_no_manifest_sets_a_variable_of_the_nvidia_runtime() -> None:
    texts = [path.read_text() for path in K8S.rglob("*.yaml")]
    assert not any(re.search(r"^\s*(- name: )?NVIDIA_\w+", text, re.MULTILINE) for text in texts)
