"""The Helm chart renders the documents of k8s/ and of `k8s render`, and refuses invalid values."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner

from chatterbox_prewarm.commands.kube import k8s
from chatterbox_prewarm.image.labels import image_labels
from chatterbox_prewarm.kube.values import to_values
from chatterbox_prewarm.version import __version__
from tests.helpers.helm import CHART, helm, refusal, run_helm
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
from tests.helpers.renderings import IMAGE, L4, RENDERINGS, render_for
from tests.helpers.states import make_state_for
from tests.kube.test_overlays import with_components

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.programs

#: Values that correspond to a component of k8s/, with the component.
COMPONENTS: dict[str, Document] = {
    "gpu": {"gpu": {"count": 1}},
    "pull-secret": {"imagePullSecrets": [{"name": "registry-login"}]},
    "no-surge": {"strategy": {"maxUnavailable": 1, "maxSurge": 0}},
    "signature-key": {"signatureKey": {"configMap": "chatterbox-signature-key"}},
    "token": {"token": {"secret": "chatterbox-token"}},
    "voices": {"voices": {"enabled": True}},
    "weights-image-volume": {"weightsImage": {"reference": "chatterbox-weights:english"}},
    "hpa": {"hpa": {"enabled": True}},
    "keda": {"keda": {"enabled": True}},
    "monitor": {"monitor": {"enabled": True}},
    "alerts": {"alerts": {"enabled": True}},
    "dashboard": {"dashboard": {"enabled": True}},
}
#: Values that no component has.
SELECTION = {
    "nodeSelector": {"pool": "speech"},
    "tolerations": [{"key": "speech", "operator": "Exists"}],
    "runtimeClassName": "nvidia",
    "priorityClassName": "speech",
    "topologySpreadConstraints": [
        {"topologyKey": "kubernetes.io/hostname", "maxSkew": 1, "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "gpu": {"count": 2},
    "prePull": {"enabled": True},
}
ROUTES = {
    "ingress": {"enabled": True, "className": "nginx", "host": "tts.example.com", "tlsSecret": "tts-tls"},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["tts.example.com"]},
}
EVERYTHING: Document = {key: value for one in COMPONENTS.values() for key, value in one.items() if key != "keda"}
EVERYTHING = {**EVERYTHING, **SELECTION, **ROUTES, "alerts": {"enabled": True, "labels": {"release": "prometheus"}}}
del EVERYTHING["weightsImage"]


def by_identity(documents: list[Document]) -> dict[str, Document]:
    """Index documents by kind and name, without what the two ways name differently: the ConfigMap and its checksum."""
    index = {}
    for original in documents:
        document = copy.deepcopy(original)
        if "CHATTERBOX_PREWARM_DRAIN_SECONDS" in document.get("data", {}):
            document["metadata"]["name"] = "settings"
        if document["kind"] == "Deployment":
            template = document["spec"]["template"]
            template["metadata"].pop("annotations", None)
            template["spec"]["containers"][0]["envFrom"][0]["configMapRef"]["name"] = "settings"
            # The order of volumes and mounts means nothing.
            template["spec"]["volumes"].sort(key=lambda volume: volume["name"])
            template["spec"]["containers"][0]["volumeMounts"].sort(key=lambda mount: mount["name"])
        index[f"{document['kind']}/{document['metadata']['name']}"] = document
    assert len(index) == len(documents)
    return index


def test_the_defaults_render_the_base() -> None:
    assert by_identity(helm()) == by_identity(kustomize(K8S / "base"))


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_value_does_what_the_component_of_that_name_does(name: str, tmp_path: Path) -> None:
    rendered = by_identity(helm(COMPONENTS[name]))
    expected = by_identity(with_components(tmp_path, name))
    if name == "voices":
        claim = rendered["PersistentVolumeClaim/chatterbox-voices"]["metadata"]
        assert claim.pop("annotations") == {"helm.sh/resource-policy": "keep"}
        del claim["labels"]
    assert rendered == expected


def test_pre_pull_equals_the_component(tmp_path: Path) -> None:
    values = {"gpu": {"count": 1}, "prePull": {"enabled": True}}
    assert by_identity(helm(values)) == by_identity(with_components(tmp_path, "gpu", "pre-pull"))


@pytest.mark.parametrize("name", RENDERINGS)
def test_the_values_for_an_image_render_its_deployment(name: str) -> None:
    rendering = RENDERINGS[name]
    values = yaml.safe_load(to_values(rendering).to_yaml())
    assert by_identity(helm(values)) == by_identity(list(rendering.documents))


@pytest.mark.parametrize(
    ("image", "repository", "tag"),
    [("localhost:5000/speech", "localhost:5000/speech", ""), ("localhost:5000/speech:1", "localhost:5000/speech", "1")],
)
def test_an_image_of_a_registry_with_a_port_is_split(image: str, repository: str, tag: str) -> None:
    rendering = render_for([L4])
    for _, pod in pods(rendering.documents):
        pod["containers"][0]["image"] = image
    (values,) = to_values(rendering).documents
    assert values["image"] == {"repository": repository, "tag": tag, "digest": ""}
    assert document_of(helm(values), "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"] == image


def test_the_command_writes_values(tmp_path: Path) -> None:
    facts = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(image_labels([make_state_for(tmp_path / "warm", facts)])))
    arguments = ["render", "--image", IMAGE, "--labels", str(labels), "--helm-values", "--policy", "require"]
    finished = CliRunner().invoke(k8s, arguments)
    assert finished.exit_code == 0, finished.output
    values = yaml.safe_load(finished.stdout)
    assert finished.stdout.startswith(f"# Rendered by chatterbox-prewarm k8s render for {IMAGE}")
    assert values["config"] == {"CHATTERBOX_PREWARM_POLICY": "require"}
    manifests = CliRunner().invoke(k8s, [one for one in arguments if one != "--helm-values"]).stdout
    assert by_identity(helm(values)) == by_identity(list(yaml.safe_load_all(manifests)))


@pytest.mark.parametrize("values", [EVERYTHING, SELECTION, COMPONENTS["keda"]], ids=["everything", "nodes", "keda"])
def test_every_rendering_is_valid_and_restricted_on_every_version(values: Document) -> None:
    documents = helm(values)
    ours = [one for one in documents if not one["apiVersion"].startswith((*FOREIGN, "gateway.networking.k8s.io/"))]
    for document in ours:
        for version in VERSIONS:
            validate(document, version)
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}
    assert not any("namespace" in document["metadata"] for document in documents)


def test_two_releases_in_a_namespace_are_separate() -> None:
    one, two = (helm(EVERYTHING, name=name) for name in ("one", "two"))
    assert conflicts(one, two) == []
    assert len(references(one, "one")) > len(one), "each document has a name, and some refer to others"
    one = [document for document in one if document["kind"] != "PrometheusRule"]  # its texts name our commands
    shared = {"chatterbox-token", "chatterbox-signature-key"}
    assert set(references(one, "chatterbox")) == shared, "only what the user made is shared"
    named = helm({"fullnameOverride": "two"}, name="one")
    assert {document["metadata"]["name"] for document in named} == {"two"}


def test_the_pods_are_placed_as_the_values_say() -> None:
    documents = helm(SELECTION)
    deployment = document_of(documents, "Deployment")["spec"]
    pod = deployment["template"]["spec"]
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for one in (pod, document_of(documents, "DaemonSet")["spec"]["template"]["spec"]):
        assert one["nodeSelector"] == SELECTION["nodeSelector"]
        assert one["tolerations"] == [gpu, *SELECTION["tolerations"]]
    assert (pod["runtimeClassName"], pod["priorityClassName"]) == ("nvidia", "speech")
    (constraint,) = pod["topologySpreadConstraints"]
    assert constraint["labelSelector"] == deployment["selector"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert document_of(documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_DEVICE"] == "cuda:all"


def test_the_routes_reach_the_service_and_let_streams_pass() -> None:
    documents = helm(ROUTES)
    service = document_of(documents, "Service")
    (port,) = service["spec"]["ports"]
    ingress = document_of(documents, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {
        "name": service["metadata"]["name"],
        "port": {"name": port["name"]},
    }
    assert ingress["spec"]["tls"] == [{"hosts": [rule["host"]], "secretName": "tts-tls"}]
    annotations = {key.partition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    assert annotations["proxy-buffering"] == "off"
    assert int(annotations["proxy-read-timeout"]) > 120, "the default of --queue-seconds"
    route = document_of(documents, "HTTPRoute")["spec"]
    assert route["rules"][0]["backendRefs"] == [{"name": service["metadata"]["name"], "port": port["port"]}]
    assert route["rules"][0]["timeouts"] == {"request": "0s", "backendRequest": "0s"}


def test_options_of_the_values_have_priority_and_restart_the_pods() -> None:
    def checksum(values: Document) -> str:
        annotations = document_of(helm(values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        digest: str = annotations["checksum/config"]
        return digest

    values = {"gpu": {"count": 1}, "config": {"CHATTERBOX_PREWARM_DEVICE": "cuda:0,cuda:0"}}
    assert document_of(helm(values), "ConfigMap")["data"]["CHATTERBOX_PREWARM_DEVICE"] == "cuda:0,cuda:0"
    assert checksum(values) != checksum({"gpu": {"count": 1}})


def test_an_existing_claim_is_used() -> None:
    documents = helm({"voices": {"enabled": True, "claim": "shared"}})
    volumes = document_of(documents, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert volumes[-1] == {"name": "voices", "persistentVolumeClaim": {"claimName": "shared"}}
    assert "PersistentVolumeClaim" not in {document["kind"] for document in documents}


def test_a_monitor_sends_the_token() -> None:
    (endpoint,) = document_of(helm(EVERYTHING), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "chatterbox-token", "key": "token"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"config": {"QUEUE_LIMIT": "8"}}, "QUEUE_LIMIT"),
        ({"config": {"CHATTERBOX_PREWARM_QUEUE_LIMIT": 8}}, "CHATTERBOX_PREWARM_QUEUE_LIMIT"),
        ({"image": {"digest": "sha256:1"}}, "digest"),
        ({"resources": {"limits": {"memory": None}}}, "memory"),
        ({"gpu": {"count": "1"}}, "count"),
        ({"fullnameOverride": "Speech"}, "fullnameOverride"),
        ({"hpa": {"enabled": True}, "keda": {"enabled": True}}, "set only one of"),
        ({"hpa": {"enabled": True}, "replicas": 2}, "leave out replicas"),
        ({"httpRoute": {"enabled": True}}, "must name a gateway"),
    ],
)
def test_invalid_values_are_refused(values: Document, message: str) -> None:
    assert message in refusal(values)


def test_every_default_has_a_schema() -> None:
    schema: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())

    def missing(values: Any, rules: dict[str, Any], path: str) -> list[str]:
        if not isinstance(values, dict) or "properties" not in rules:
            return []
        found = [f"{path}{key}" for key in values if key not in rules["properties"]]
        for key in values.keys() & rules["properties"].keys():
            found += missing(values[key], rules["properties"][key], f"{path}{key}.")
        return found + [f"{path}{key}" for key in rules["properties"].keys() - values.keys() - {"global"}]

    assert missing(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "") == []


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_linter_finds_a_broken_template(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "chatterbox")
    service = tmp_path / "chatterbox" / "templates" / "service.yaml"
    service.write_text(service.read_text().replace("{{ .Values.service.port }}", "{{ .Values.service.port"))
    result = run_helm(chart=tmp_path / "chatterbox")
    assert result["lint"]["errors"] or "error" in result
    assert result["lint"]["errors"]


def test_the_notes_name_the_release() -> None:
    notes = run_helm({"token": {"secret": "a"}}, name="english")["rendered"]["chatterbox/templates/NOTES.txt"]
    assert "deployment/english" in notes
    assert '-H "Authorization: Bearer $TOKEN" -d' in notes
