"""Every overlay, component and bake renders, is valid for every Kubernetes that we can check, and safe."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from chatterbox_prewarm.kube.nodes import product_label
from tests.helpers.manifests import FOREIGN, K8S, VERSIONS, Document, kustomize, pods, the, validate, violations

if TYPE_CHECKING:
    from pathlib import Path

OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
ON_GPU = [name for name in OVERLAYS if name != "cpu-demo"]
#: The first minor version whose schema has what a component needs.
SINCE = {"weights-image-volume": (1, 31)}


def with_components(folder: Path, *names: str, overlay: str = "../k8s/base", **more: Any) -> list[Document]:
    """What an overlay of a user's gives, of the base and these components."""
    if not (folder / "k8s").exists():
        shutil.copytree(K8S, folder / "k8s")
    mine = folder / f"mine-{'-'.join(names)}"
    mine.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [overlay],
        "components": [f"../k8s/components/{name}" for name in names],
        **more,
    }
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(mine)


def ours(documents: list[Document]) -> list[Document]:
    return [document for document in documents if not document["apiVersion"].startswith(FOREIGN)]


def test_there_is_an_overlay_for_each_kind_of_machine() -> None:
    assert OVERLAYS == ["cpu-demo", "gpu-a10", "gpu-h100", "gpu-h200", "gpu-l4", "multi-gpu-node"]


@pytest.mark.parametrize("place", [*(f"overlays/{name}" for name in OVERLAYS), "bake"])
def test_every_document_of_an_overlay_is_valid_on_every_version_and_restricted(place: str) -> None:
    documents = kustomize(K8S / place)
    for document in documents:
        for version in VERSIONS:
            validate(document, version)
    assert {name: found for name, pod in pods(documents) if (found := violations(pod))} == {}
    assert not any("namespace" in document["metadata"] for document in documents)


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_is_valid_on_the_base_and_restricted(name: str, tmp_path: Path) -> None:
    documents = with_components(tmp_path, name)
    since = SINCE.get(name, (1, 29))
    for document in ours(documents):
        for version in VERSIONS:
            if tuple(map(int, version.split("."))) >= since or document["kind"] != "Deployment":
                validate(document, version)
            else:
                with pytest.raises(kubernetes_validate.ValidationError):
                    validate(document, version)
    assert {where: found for where, pod in pods(documents) if (found := violations(pod))} == {}


def test_components_go_together_on_an_overlay_and_with_a_users_settings(tmp_path: Path) -> None:
    documents = with_components(
        tmp_path,
        *("signature-key", "hpa", "monitor", "alerts"),
        overlay="../k8s/overlays/gpu-l4",
        images=[{"name": "chatterbox", "newName": "registry.example.com/speech", "digest": "sha256:" + "a" * 64}],
        configMapGenerator=[
            {"name": "chatterbox", "behavior": "merge", "literals": ["CHATTERBOX_PREWARM_POLICY=require"]}
        ],
    )
    assert the(documents, "ConfigMap")["data"] == {
        "CHATTERBOX_PREWARM_DEVICE": "cuda",
        "CHATTERBOX_PREWARM_DRAIN_SECONDS": "100",
        "CHATTERBOX_PREWARM_KEY": "/etc/chatterbox-prewarm/public.pem",
        "CHATTERBOX_PREWARM_POLICY": "require",
    }
    images = {container["image"] for _, pod in pods(documents) for container in pod["containers"]}
    assert images == {"registry.example.com/speech@sha256:" + "a" * 64}, "what is pulled before is what runs"
    (server,) = the(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    key = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}["signature-key"]
    assert f"{key}/public.pem" == "/etc/chatterbox-prewarm/public.pem"


@pytest.mark.parametrize("name", ON_GPU)
def test_an_overlay_for_gpus_requests_one_and_chooses_the_nodes(name: str) -> None:
    documents = kustomize(K8S / "overlays" / name)
    pod = the(documents, "Deployment")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == server["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    affinity = pod["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert all(one["key"].startswith("nvidia.com/gpu.") for one in term["matchExpressions"])
    before = the(documents, "DaemonSet")["spec"]["template"]["spec"]
    assert before["affinity"] == pod["affinity"], "the image is pulled where pods may run"
    assert "nvidia.com/gpu" not in before["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    ("name", "capability", "product"),
    [
        ("gpu-l4", "8.9", "NVIDIA L4"),
        ("gpu-a10", "8.6", "NVIDIA A10"),
        ("gpu-h100", "9.0", "NVIDIA H100 80GB HBM3"),
        ("gpu-h200", "9.0", "NVIDIA H200"),
    ],
)
def test_an_overlay_names_the_product_as_its_nodes_are_labelled(name: str, capability: str, product: str) -> None:
    affinity = the(kustomize(K8S / "overlays" / name), "Deployment")["spec"]["template"]["spec"]["affinity"]
    (term,) = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert ".".join(one["values"][0] for one in term["matchExpressions"]) == capability
    (preferred,) = affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = preferred["preference"]["matchExpressions"]
    assert expression["key"] == "nvidia.com/gpu.product"
    assert product_label(product) in expression["values"]


def test_an_update_of_a_full_node_has_a_gpu_left_for_one_pod_more() -> None:
    spec = the(kustomize(K8S / "overlays" / "multi-gpu-node"), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert spec["replicas"] == 8 - spec["strategy"]["rollingUpdate"]["maxSurge"]


def test_only_what_is_meant_to_sets_the_number_of_pods() -> None:
    fixed = {name for name in OVERLAYS if "replicas" in the(kustomize(K8S / "overlays" / name), "Deployment")["spec"]}
    assert fixed == {"multi-gpu-node"}


def test_weights_come_from_an_image_to_where_the_server_looks_for_them(tmp_path: Path) -> None:
    pod = the(with_components(tmp_path, "weights-image-volume"), "Deployment")["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["weights"] == {"name": "weights", "mountPath": "/opt/chatterbox-prewarm/weights", "readOnly": True}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["weights"]["image"]["pullPolicy"] == "IfNotPresent"


def test_resources_of_other_projects_point_at_ours(tmp_path: Path) -> None:
    documents = with_components(tmp_path, "keda", "monitor", "alerts")
    foreign = {document["kind"]: document for document in documents if document not in ours(documents)}
    assert foreign.keys() == {"ScaledObject", "HTTPScaledObject", "PodMonitor", "PrometheusRule"}
    scaled, http = foreign["ScaledObject"], foreign["HTTPScaledObject"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == http["spec"]["scaleTargetRef"]["name"] == "chatterbox"
    assert scaled["spec"]["minReplicaCount"] == http["spec"]["replicas"]["min"] == 0
    assert scaled["spec"]["maxReplicaCount"] == http["spec"]["replicas"]["max"]
    # The add-on's controller removes a ScaledObject of its own name.
    assert scaled["metadata"]["name"] != http["metadata"]["name"]
    assert http["metadata"]["annotations"] == {"httpscaledobject.keda.sh/skip-scaledobject-creation": "true"}
    triggers = {trigger["type"]: trigger["metadata"] for trigger in scaled["spec"]["triggers"]}
    assert triggers["external-push"]["httpScaledObject"] == http["metadata"]["name"]
    assert float(triggers["prometheus"]["threshold"]) > 0
    service = the(documents, "Service")["spec"]
    assert http["spec"]["scaleTargetRef"]["port"] == service["ports"][0]["port"]
    monitor = foreign["PodMonitor"]["spec"]
    template = the(documents, "Deployment")["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert (endpoint["path"], endpoint["port"]) == ("/metrics", "http")
    rules = foreign["PrometheusRule"]["spec"]["groups"][0]["rules"]
    assert all({"summary", "description", "why", "mend"} == rule["annotations"].keys() for rule in rules)
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_an_autoscaler_aims_at_the_deployment(tmp_path: Path) -> None:
    documents = with_components(tmp_path, "hpa")
    spec = the(documents, "HorizontalPodAutoscaler")["spec"]
    deployment = the(documents, "Deployment")
    assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    assert spec["minReplicas"] < spec["maxReplicas"]


def test_a_pod_that_may_do_more_is_noticed() -> None:
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
        "the container server may do more",
        "a variable of NVIDIA's",
    ]


def test_no_manifest_gives_a_container_a_variable_of_the_gpu_runtime() -> None:
    texts = [path.read_text() for path in K8S.rglob("*.yaml")]
    assert not any(re.search(r"^\s*(- name: )?NVIDIA_\w+", text, re.MULTILINE) for text in texts)
