"""The base is valid on every supported Kubernetes version and has the properties in docs/kubernetes.md."""

from __future__ import annotations

import copy
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from chatterbox_prewarm.kube.budgets import EXIT_SECONDS, PRE_STOP_SECONDS
from chatterbox_prewarm.system.cpus import REQUEST
from chatterbox_prewarm.system.paths import CACHE
from chatterbox_prewarm.system.process import run
from tests.helpers.manifests import K8S, OLDEST, ROOT, VERSIONS, document_of, kustomize, validate, violations

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.programs

#: Health routes of the server.
HEALTH_ROUTES = {"/livez", "/startupz", "/readyz"}
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    rendered = kustomize(K8S / "base")
    by_kind = {document["kind"]: document for document in rendered}
    assert len(by_kind) == len(rendered), "two documents have the same kind"
    return by_kind


@pytest.fixture
def deployment(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(documents["Deployment"])


@pytest.fixture
def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def server(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any]
    (container,) = pod["containers"]
    return container


@pytest.fixture
def environment(documents: dict[str, dict[str, Any]], server: dict[str, Any]) -> dict[str, str]:
    (source,) = server["envFrom"]
    assert source == {"configMapRef": {"name": documents["ConfigMap"]["metadata"]["name"]}}
    settings: dict[str, str] = documents["ConfigMap"]["data"]
    return settings


def test_the_base_contains_the_documents_of_every_deployment(documents: dict[str, dict[str, Any]]) -> None:
    assert documents.keys() == {
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "ServiceAccount",
    }


def test_the_validator_has_the_oldest_version_and_newer_ones() -> None:
    assert VERSIONS[0] == ".".join(map(str, OLDEST))
    assert len(VERSIONS) > 1


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid(documents: dict[str, dict[str, Any]], version: str) -> None:
    for document in documents.values():
        validate(document, version)


def _unknown_field(deployment: dict[str, Any]) -> None:
    deployment["spec"]["replica"] = 1


def _misspelt_probe(deployment: dict[str, Any]) -> None:
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")


def _number_as_text(deployment: dict[str, Any]) -> None:
    deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = "120"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("damage", [_unknown_field, _misspelt_probe, _number_as_text])
def test_a_broken_deployment_is_refused(
    deployment: dict[str, Any], damage: Callable[[dict[str, Any]], None], version: str
) -> None:
    damage(deployment)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment, version)


def test_no_document_has_a_namespace(documents: dict[str, dict[str, Any]]) -> None:
    assert not any("namespace" in document["metadata"] for document in documents.values())


def test_each_probe_uses_its_own_health_route_on_a_named_port(server: dict[str, Any]) -> None:
    gets = [server[probe]["httpGet"] for probe in PROBES]
    assert [get["path"] for get in gets] == ["/startupz", "/livez", "/readyz"]
    assert {get["path"] for get in gets} == HEALTH_ROUTES
    assert {get["port"] for get in gets} <= {port["name"] for port in server["ports"]}


def test_the_startup_probe_allows_a_cold_start(server: dict[str, Any]) -> None:
    probe = server["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 300


def test_a_warm_start_is_noticed_within_a_second(server: dict[str, Any]) -> None:
    assert server["startupProbe"]["periodSeconds"] == 1
    assert server["readinessProbe"]["periodSeconds"] == 1
    assert not any("initialDelaySeconds" in server[probe] for probe in PROBES)


def test_a_busy_pod_is_not_killed(server: dict[str, Any]) -> None:
    liveness = server["livenessProbe"]
    assert liveness["httpGet"]["path"] != server["readinessProbe"]["httpGet"]["path"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 15


def test_a_hung_server_gets_no_time_to_drain(pod: dict[str, Any], server: dict[str, Any]) -> None:
    grace = server["livenessProbe"]["terminationGracePeriodSeconds"]
    assert grace == PRE_STOP_SECONDS + EXIT_SECONDS < pod["terminationGracePeriodSeconds"]
    assert "terminationGracePeriodSeconds" not in server["startupProbe"]


def test_the_grace_period_covers_pre_stop_drain_and_exit(
    pod: dict[str, Any], server: dict[str, Any], environment: dict[str, str]
) -> None:
    command, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = int(environment["CHATTERBOX_PREWARM_DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] == int(seconds) + drain + EXIT_SECONDS


def test_settings_are_only_options_of_the_server(environment: dict[str, str]) -> None:
    assert environment
    assert all(name.startswith("CHATTERBOX_PREWARM_") for name in environment)


def test_a_changed_setting_restarts_the_pods(documents: dict[str, dict[str, Any]]) -> None:
    """The name of the ConfigMap ends with a digest of its content."""
    assert re.fullmatch(r"chatterbox-[a-z0-9]{10}", documents["ConfigMap"]["metadata"]["name"])


def test_only_connections_to_the_http_port_are_allowed(
    documents: dict[str, dict[str, Any]], pod: dict[str, Any]
) -> None:
    spec = documents["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == []
    assert spec["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    assert pod["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
    assert documents["ServiceAccount"]["automountServiceAccountToken"] is False


def test_a_single_pod_can_be_evicted(documents: dict[str, dict[str, Any]]) -> None:
    spec = documents["PodDisruptionBudget"]["spec"]
    assert (spec["maxUnavailable"], "minAvailable" in spec) == (1, False)
    assert spec["selector"] == documents["Deployment"]["spec"]["selector"]


def test_an_update_always_keeps_a_ready_pod(deployment: dict[str, Any]) -> None:
    assert deployment["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }


def test_the_pod_complies_with_the_restricted_profile(pod: dict[str, Any]) -> None:
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 12345,
        "runAsGroup": 12345,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert violations(pod) == []
    assert not pod.keys() & {"initContainers", "ephemeralContainers"}


def test_the_pod_has_no_access_to_the_cluster(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False


def test_the_cache_is_an_empty_dir_with_a_size_limit_at_its_fixed_path(
    pod: dict[str, Any], server: dict[str, Any]
) -> None:
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert not mounts[str(CACHE)].get("readOnly", False)
    assert "subPath" not in mounts[str(CACHE)]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts[str(CACHE)]["name"]]["emptyDir"] == {"sizeLimit": "1Gi"}


def test_every_mount_has_a_volume_with_a_size_limit(pod: dict[str, Any], server: dict[str, Any]) -> None:
    assert {mount["mountPath"] for mount in server["volumeMounts"]} == {str(CACHE), "/tmp"}
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"])


def test_a_pod_without_a_gpu_request_sees_no_gpu(server: dict[str, Any], environment: dict[str, str]) -> None:
    assert "NVIDIA_VISIBLE_DEVICES" not in environment
    assert server["resources"] == {"requests": {"cpu": "2", "memory": "6Gi"}, "limits": {"memory": "8Gi"}}


def test_the_container_knows_its_cpu_request(server: dict[str, Any]) -> None:
    (variable,) = server["env"]
    assert variable["name"] == REQUEST
    source = variable["valueFrom"]["resourceFieldRef"]
    assert source == {"containerName": server["name"], "resource": "requests.cpu"}


def test_the_container_runs_the_entrypoint_of_the_image(server: dict[str, Any]) -> None:
    assert not server.keys() & {"command", "args"}
    assert server["imagePullPolicy"] == "IfNotPresent"


def test_the_service_selects_the_pods(
    documents: dict[str, dict[str, Any]], deployment: dict[str, Any], server: dict[str, Any]
) -> None:
    service = documents["Service"]["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"] == service["selector"]
    (port,) = service["ports"]
    assert {"name": port["targetPort"], "containerPort": 8000, "protocol": "TCP"} in server["ports"]


def test_the_overlay_in_the_docs_replaces_the_image(tmp_path: Path) -> None:
    version = json.loads(run(["kubectl", "version", "--client", "--output=json"], timeout=60).stdout)["clientVersion"]
    if int(re.sub(r"\D", "", version["minor"])) < 21:
        pytest.skip(f"kubectl {version['gitVersion']} is too old for a kustomization with a folder (1.21)")
    shutil.copytree(K8S / "base", tmp_path / "base")
    overlay = tmp_path / "overlays" / "mine"
    overlay.mkdir(parents=True)
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    (overlay / "kustomization.yaml").write_text(example[1], encoding="utf-8")

    (image,) = yaml.safe_load(example[1])["images"]
    (container,) = document_of(kustomize(overlay), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"{image['newName']}:{image['newTag']}"
