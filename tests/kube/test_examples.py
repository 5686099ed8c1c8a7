"""The examples for Ray and KServe are pods that Kubernetes accepts, with the probes and restrictions of k8s/base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from tests.helpers.manifests import ROOT, VERSIONS, Document, document_of, kustomize, validate, violations

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = ROOT / "docs" / "examples"


def ray_pods() -> Iterator[tuple[str, Document]]:
    cluster = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group.get("groupName", "head"), group["template"]["spec"]


def kserve_pod() -> Document:
    """Return the pod that KServe makes from both documents: the service adds fields to those of the runtime."""
    runtime, service = yaml.safe_load_all((EXAMPLES / "kserve.yaml").read_text())
    own = {"minReplicas", "maxReplicas", "model"}
    of_service = {name: value for name, value in service["spec"]["predictor"].items() if name not in own}
    of_runtime = {name: runtime["spec"][name] for name in ("containers", "volumes")}
    assert not of_service.keys() & of_runtime.keys()
    return {**of_runtime, **of_service}


@pytest.mark.parametrize(("name", "pod"), [*ray_pods(), ("kserve", kserve_pod())])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_pod_is_valid_and_restricted(name: str, pod: Document, version: str) -> None:
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}, version)
    # Ray's autoscaler runs in the head and asks the API for nodes.
    assert violations(pod) == (["has access to the cluster"] if name == "head" else [])


def test_only_the_workers_of_ray_have_a_gpu() -> None:
    pods = dict(ray_pods())
    assert pods.keys() == {"head", "gpu"}
    assert "nvidia.com/gpu" not in pods["head"]["containers"][0]["resources"]["limits"]
    assert pods["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pods["gpu"]["containers"][0]["image"] == pods["head"]["containers"][0]["image"]


def test_ray_does_not_scale_beyond_the_nodes() -> None:
    spec = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text())["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    scaling = deployment["autoscaling_config"]
    assert scaling["max_replicas"] == group["maxReplicas"]
    assert scaling["target_ongoing_requests"] < deployment["max_ongoing_requests"]
    assert deployment["ray_actor_options"]["num_gpus"] == 1


@pytest.mark.programs
def test_the_runtime_of_kserve_has_the_probes_and_limits_of_the_base() -> None:
    (server,) = kserve_pod()["containers"]
    base = document_of(kustomize(ROOT / "k8s" / "base"), "Deployment")["spec"]["template"]["spec"]
    (of_base,) = base["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        expected = {**of_base[probe], "httpGet": {**of_base[probe]["httpGet"], "port": 8000}}
        # KServe's own grace period is that of the pod.
        expected.pop("terminationGracePeriodSeconds", None)
        assert server[probe] == expected
    assert server["lifecycle"] == of_base["lifecycle"]
    assert server["volumeMounts"] == of_base["volumeMounts"]
    assert kserve_pod()["volumes"] == base["volumes"]
    assert kserve_pod()["terminationGracePeriodSeconds"] == base["terminationGracePeriodSeconds"]
    gpu = {"nvidia.com/gpu": "1"}
    assert server["resources"]["requests"] == of_base["resources"]["requests"] | gpu
    assert server["resources"]["limits"] == of_base["resources"]["limits"] | gpu
