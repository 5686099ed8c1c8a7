"""A deployment is rendered from the labels of an image: its nodes, its time limits and its resources."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner

from chatterbox_prewarm.commands.kube import k8s
from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.append import send
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.labels import STATES, image_labels
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.stores import open_store
from chatterbox_prewarm.kube.budgets import Measured
from chatterbox_prewarm.kube.documents import NAME
from chatterbox_prewarm.kube.nodes import Cluster, product_label
from chatterbox_prewarm.state.manifest import Measurements
from tests.helpers.images import layer_of, make_base
from tests.helpers.manifests import (
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
from tests.helpers.registry_server import serve
from tests.helpers.renderings import CPU, H100, H200, IMAGE, L4, MIB, RENDERINGS, SLICE, render_for, state
from tests.helpers.states import make_state_for

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Rendering


def pod_of(rendering: Rendering) -> Document:
    ((_, pod),) = pods(rendering.documents)
    return pod


def affinity_of(rendering: Rendering) -> Document:
    affinity: Document = pod_of(rendering)["affinity"]["nodeAffinity"]
    return affinity


def terms(rendering: Rendering) -> list[dict[str, tuple[str, ...]]]:
    raw = affinity_of(rendering)["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return [{one["key"]: tuple(one["values"]) for one in term["matchExpressions"]} for term in raw]


def preferences(rendering: Rendering) -> list[tuple[int, dict[str, tuple[str, ...]]]]:
    raw = affinity_of(rendering).get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return [
        (one["weight"], {part["key"]: tuple(part["values"]) for part in one["preference"]["matchExpressions"]})
        for one in raw
    ]


def server_of(rendering: Rendering) -> Document:
    server: Document
    (server,) = pod_of(rendering)["containers"]
    return server


@pytest.mark.programs
def test_a_rendering_for_a_cpu_without_measurements_equals_the_base() -> None:
    """The image, the architecture, the name of the ConfigMap, and the annotations differ."""
    rendered = list(yaml.safe_load_all(render_for([CPU]).to_yaml()))
    base = kustomize(K8S / "base")
    document_of(base, "ConfigMap")["metadata"]["name"] = "chatterbox"
    deployment, pod = document_of(base, "Deployment"), document_of(base, "Deployment")["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = IMAGE
    pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] = "chatterbox"
    rendered_deployment = document_of(rendered, "Deployment")
    assert rendered_deployment["metadata"].pop("annotations") == {"chatterbox-prewarm/states": CPU.key}
    assert rendered_deployment["spec"]["template"]["metadata"].pop("annotations").keys() == {"checksum/config"}
    assert rendered_deployment["spec"]["template"]["spec"].pop("affinity")["nodeAffinity"].keys() == {
        "requiredDuringSchedulingIgnoredDuringExecution"
    }
    assert rendered_deployment == deployment
    for document in base:
        assert document_of(rendered, document["kind"]) == document
    assert len(rendered) == len(base)


def test_pre_pull_equals_the_component_and_selects_the_nodes_of_the_pods() -> None:
    rendered = list(yaml.safe_load_all(render_for([CPU], pre_pull=True).to_yaml()))
    assert rendered[:-2] == list(yaml.safe_load_all(render_for([CPU]).to_yaml()))
    component = [yaml.safe_load((K8S / "components" / "pre-pull" / name).read_text()) for name in PRE_PULL]
    pod = component[0]["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = IMAGE
    del pod["tolerations"]  # only for GPUs
    assert rendered[-2]["spec"]["template"]["spec"].pop("affinity") == pod_of(render_for([CPU]))["affinity"]
    assert rendered[-2:] == component
    for states in ([H100, L4], [L4]):
        (_, server), (_, pre_pull) = pods(render_for(states, pre_pull=True).documents)
        assert (pre_pull["affinity"], pre_pull["tolerations"]) == (server["affinity"], server["tolerations"])


@pytest.mark.programs
def test_components_can_be_added_to_a_rendering(tmp_path: Path) -> None:
    shutil.copytree(K8S / "components", tmp_path / "components")
    user = tmp_path / "user"
    user.mkdir()
    (user / "rendered.yaml").write_text(render_for([L4], queue_limit=4).to_yaml())
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["rendered.yaml"],
        "components": [f"../components/{name}" for name in ("token", "voices", "signature-key", "hpa", "monitor")],
    }
    (user / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    documents = kustomize(user)
    deployment, settings = document_of(documents, "Deployment"), document_of(documents, "ConfigMap")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert server["image"] == IMAGE
    assert server["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    assert settings["data"].items() >= {"CHATTERBOX_PREWARM_QUEUE_LIMIT": "4"}.items()
    assert settings["data"].keys() >= {"CHATTERBOX_PREWARM_TOKEN_FILE", "CHATTERBOX_PREWARM_KEY"}
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert mounts == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert len(mounts) == 5, "the cache, the temporary folder, and one for each of three components"
    assert document_of(documents, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == NAME
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}


#: Files of the component in the order of a rendering.
PRE_PULL = ("daemon-set.yaml", "network-policy.yaml")


@pytest.mark.parametrize("name", RENDERINGS)
def test_every_rendering_is_valid_and_restricted_on_every_version(name: str) -> None:
    documents = list(yaml.safe_load_all(RENDERINGS[name].to_yaml()))
    assert documents == list(RENDERINGS[name].documents)
    for document in documents:
        for version in VERSIONS:
            validate(document, version)
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}


def test_two_deployments_in_a_namespace_are_separate() -> None:
    one, two = (render_for([L4], name=name, pre_pull=True).documents for name in (NAME, "two"))
    assert conflicts(one, two) == []
    assert references(one, NAME), "the search finds names"
    assert references(two, NAME) == []
    assert len(conflicts(one, one)) > len(one), "each document overwrites itself, and each selector selects its pods"


def test_every_pod_pulls_with_the_given_secret() -> None:
    rendered = [pod for _, pod in pods(render_for([L4], pull_secret="login", pre_pull=True).documents)]
    assert [pod["imagePullSecrets"] for pod in rendered] == [[{"name": "login"}]] * 2
    assert not any("imagePullSecrets" in pod for _, pod in pods(render_for([L4], pre_pull=True).documents))


@pytest.mark.parametrize("name", ["", "Speech", "1st", "a_b", "a-", "a" * 33])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="cannot be the name of a deployment"):
        render_for([CPU], name=name)


def test_a_compute_capability_is_required_and_a_product_preferred() -> None:
    rendering = render_for([L4])
    assert terms(rendering) == [
        {
            "kubernetes.io/arch": ("amd64",),
            "nvidia.com/gpu.compute.major": ("8",),
            "nvidia.com/gpu.compute.minor": ("9",),
        }
    ]
    assert preferences(rendering) == [(100, {"nvidia.com/gpu.product": ("NVIDIA-L4", "NVIDIA-L4-SHARED")})]


def test_states_with_the_same_capability_share_a_term() -> None:
    rendering = render_for([H100, H200, L4])
    assert [term["nvidia.com/gpu.compute.major"] for term in terms(rendering)] == [("9",), ("8",)]
    assert [labels["nvidia.com/gpu.product"][0] for _, labels in preferences(rendering)] == [
        "NVIDIA-H100-80GB-HBM3",
        "NVIDIA-H200",
        "NVIDIA-L4",
    ]


def test_only_states_for_the_selected_gpus_are_used() -> None:
    rendering = render_for([H100, L4], gpus=("L4",))
    assert [term["nvidia.com/gpu.compute.major"] for term in terms(rendering)] == [("8",)]
    with pytest.raises(BadInputError, match=r"no state of the image is for the GPU 'NVIDIA A10'.*NVIDIA L4"):
        render_for([H100, L4], gpus=("A10",))


def test_the_policy_require_requires_the_product() -> None:
    """On another product, the container would exit with 11 and restart in a loop."""
    rendering = render_for([H100, H200], policy="require")
    (term,) = terms(rendering)
    assert term["nvidia.com/gpu.product"] == (
        *("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3-SHARED"),
        *("NVIDIA-H200", "NVIDIA-H200-SHARED"),
    )
    assert document_of(rendering.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_POLICY"] == "require"


def test_a_driver_is_preferred_if_a_family_depends_on_it() -> None:
    rendering = render_for([state("NVIDIA L4", "8.9", driver="550.54.15")])
    assert [weight for weight, _ in preferences(rendering)] == [100, 50]
    driver = preferences(rendering)[1][1]
    assert driver.pop("nvidia.com/gpu.product") == ("NVIDIA-L4", "NVIDIA-L4-SHARED")
    assert driver == {
        "nvidia.com/cuda.driver.major": ("550",),
        "nvidia.com/cuda.driver.minor": ("54",),
        "nvidia.com/cuda.driver.rev": ("15",),
    }


@pytest.mark.parametrize(
    ("product", "label"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me", "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb.me"),
        ("NVIDIA  RTX (TM) 6000", "NVIDIA-RTX-TM-6000"),
    ],
)
def test_a_product_has_the_label_of_gpu_feature_discovery(product: str, label: str) -> None:
    assert product_label(product) == label


def test_a_mig_slice_is_requested_as_a_gpu_or_as_its_own_resource() -> None:
    single = render_for([SLICE])
    assert server_of(single)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert preferences(single)[0][1] == {
        "nvidia.com/gpu.product": (
            "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb",
            "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb-SHARED",
        )
    }
    mixed = render_for([SLICE], cluster=Cluster(mig_strategy="mixed"), measured=Measured(gpu_memory_mib=7000))
    assert server_of(mixed)["resources"]["limits"].keys() == {"memory", "nvidia.com/mig-1g.10gb"}
    assert [*preferences(mixed)[0][1]] == ["nvidia.com/mig-1g.10gb.product"]
    assert terms(mixed)[0]["nvidia.com/mig-1g.10gb.memory"] == ("6999",)


def test_a_pod_cannot_request_two_kinds_of_gpu() -> None:
    with pytest.raises(BadInputError, match=r"requested as nvidia\.com/gpu and nvidia\.com/mig-1g\.10gb"):
        render_for([SLICE, H100], cluster=Cluster(mig_strategy="mixed"))
    assert render_for([SLICE, H100]).documents, "with the strategy single, both are nvidia.com/gpu"


def test_a_gpu_with_too_little_memory_is_excluded() -> None:
    rendering = render_for([L4], measured=Measured(gpu_memory_mib=9000))
    raw = affinity_of(rendering)["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["8999"]} in raw[0]["matchExpressions"]


def test_without_feature_discovery_a_note_warns_about_other_gpus() -> None:
    rendering = render_for([L4], cluster=Cluster(feature_discovery=False))
    assert terms(rendering) == [{"kubernetes.io/arch": ("amd64",)}]
    assert preferences(rendering) == []
    assert server_of(rendering)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert any("It then has misses" in note for note in rendering.notes)
    assert "# slow, but works. Install GPU Feature Discovery" in rendering.to_yaml()
    labelled = render_for([L4], cluster=Cluster(feature_discovery=False, labels={"gpu": "l4"}))
    assert terms(labelled) == [{"kubernetes.io/arch": ("amd64",), "gpu": ("l4",)}]


def test_a_state_that_was_baked_without_a_gpu_fits_every_gpu() -> None:
    for rendering in (render_for([state("absent", "absent")]), render_for([CPU], device="cuda")):
        assert terms(rendering) == [{"kubernetes.io/arch": ("amd64",)}]
        assert server_of(rendering)["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert any("nothing of it is compiled for a GPU" in note for note in rendering.notes)


def test_a_state_for_an_architecture_requires_the_capability_and_no_product() -> None:
    architecture = replace(state("absent", "8.9"), cross_compiled=True)
    for states in ([architecture], [architecture, L4]):
        rendering = render_for(states, policy="require")
        (term,) = terms(rendering)
        assert term["nvidia.com/gpu.compute.major"] == ("8",)
        assert "nvidia.com/gpu.product" not in term
    assert any("compiled without its GPU" in note for note in rendering.notes)
    assert not any("baked without a GPU" in note for note in rendering.notes)
    proven = render_for([replace(architecture, proven=True)])
    assert not any("compiled without its GPU" in note for note in proven.notes)


def test_an_image_with_states_for_both_devices_uses_the_gpu_by_default() -> None:
    both = render_for([CPU, L4])
    assert document_of(both.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_DEVICE"] == "cuda"
    cpu = render_for([CPU, L4], device="cpu")
    assert document_of(cpu.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_DEVICE"] == "cpu"
    assert server_of(cpu)["resources"]["limits"] == {"memory": "8Gi"}
    assert "tolerations" not in pod_of(cpu)
    with pytest.raises(BadInputError, match="no state for the device 'cpu', only for cuda"):
        render_for([L4], device="cpu")


def test_the_startup_probe_covers_a_cold_start_with_margin() -> None:
    assert server_of(render_for([L4]))["startupProbe"]["failureThreshold"] == 360
    short = server_of(render_for([L4], measured=Measured(cold_seconds=20)))["startupProbe"]
    assert short["failureThreshold"] == 360, "the default is the minimum"
    long = render_for([L4], measured=Measured(cold_seconds=400.2))
    assert (
        server_of(long)["startupProbe"]["failureThreshold"] * server_of(long)["startupProbe"]["periodSeconds"] == 1201
    )
    assert document_of(long.documents, "Deployment")["spec"]["progressDeadlineSeconds"] > 1201


def test_the_drain_time_covers_a_full_queue() -> None:
    rendering = render_for([L4], queue_limit=8, measured=Measured(request_seconds=12.5))
    settings = document_of(rendering.documents, "ConfigMap")["data"]
    assert settings["CHATTERBOX_PREWARM_DRAIN_SECONDS"] == "100"
    assert settings["CHATTERBOX_PREWARM_QUEUE_LIMIT"] == "8"
    assert pod_of(rendering)["terminationGracePeriodSeconds"] == 5 + 100 + 15


def test_the_grace_periods_contain_the_time_before_the_drain() -> None:
    rendering = render_for([L4], pre_stop=30)
    assert server_of(rendering)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "30"]
    assert pod_of(rendering)["terminationGracePeriodSeconds"] == 30 + 100 + 15
    assert server_of(rendering)["livenessProbe"]["terminationGracePeriodSeconds"] == 30 + 15


def test_memory_is_computed_from_the_measured_resident_memory() -> None:
    resources = server_of(render_for([L4], measured=Measured(rss_mib=5000)))["resources"]
    assert resources["requests"]["memory"] == "5632Mi"
    assert resources["limits"]["memory"] == "7680Mi"


def test_a_pod_holds_a_model_of_each_variant() -> None:
    def measured(variant: str, gigabytes: int) -> StateLabel:
        measurements = Measurements(cold_seconds=1, ready_seconds=1, resident_bytes=gigabytes << 30)
        return replace(L4, key=f"{variant}-{gigabytes}", variant=variant, measured=measurements)

    states = [measured("english", 3), measured("english", 2), measured("multilingual", 4)]
    resources = server_of(render_for(states))["resources"]
    assert resources["requests"]["memory"] == "8Gi", "3 and 4 GiB and the front, with a tenth more"
    assert server_of(render_for(states[:2]))["resources"]["requests"]["memory"] == "3840Mi"


def test_a_pod_that_converts_speech_has_memory_for_one_more_worker() -> None:
    measurements = Measurements(cold_seconds=1, ready_seconds=1, resident_bytes=3 << 30, device_bytes=4 << 30)
    label = replace(L4, measured=measurements)
    rendering = render_for([label], converts=True)
    assert document_of(rendering.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_CONVERT"] == "true"
    assert server_of(rendering)["resources"]["requests"]["memory"] == "6Gi", "3 and 2 GiB and the front, and a tenth"
    assert server_of(render_for([label]))["resources"]["requests"]["memory"] == "3840Mi"
    assert "'8191'" in str(terms(rendering)), "4 GiB, 2 GiB, and two contexts"
    measured = render_for([label], converts=True, measured=Measured(rss_mib=5000))
    assert server_of(measured)["resources"]["requests"]["memory"] == "5632Mi", "the measured pod converts, too"


def test_a_node_must_fit_a_state_of_each_model() -> None:
    def turbo(label: StateLabel) -> StateLabel:
        return replace(label, key=f"turbo-{label.key}", variant="turbo")

    with_both = terms(render_for([L4, H100, turbo(H100)]))
    assert with_both == terms(render_for([H100])), "no pod on an L4, where Turbo would run cold"
    assert terms(render_for([L4, H100, turbo(H100), turbo(L4)])) == terms(render_for([L4, H100]))
    with pytest.raises(BadInputError, match="no type of node fits a state of each of the models english, turbo"):
        render_for([L4, turbo(H100)])


def test_the_cache_has_four_times_the_size_of_the_largest_state() -> None:
    def size(**fields: Any) -> str:
        cache = pod_of(render_for([L4, replace(H100, families=())], **fields))["volumes"][0]
        limit: str = cache["emptyDir"]["sizeLimit"]
        return limit

    assert size() == "1Gi"
    large = state("NVIDIA L4", "8.9", size=500 * MIB)
    assert pod_of(render_for([large]))["volumes"][0]["emptyDir"]["sizeLimit"] == "2Gi"
    with pytest.raises(BadInputError, match="a cache of 64 MiB is too small: the states of a pod have 60 MiB"):
        size(cache_mib=64)


def test_a_note_names_missing_measurements() -> None:
    assert "--cold-seconds, --request-seconds, --rss (docs" in render_for([CPU]).notes[-1]
    assert not any("not measured" in note for note in RENDERINGS["measured"].notes)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    facts = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(image_labels([make_state_for(tmp_path / "warm", facts)])))
    return path


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(k8s, [*map(str, arguments)])


def test_the_command_reads_labels_and_writes_documents(labels: Path, tmp_path: Path) -> None:
    finished = call(
        "render", "--image", IMAGE, "--labels", labels, "--output", tmp_path / "out.yaml", "--node-label", "a=b"
    )
    assert finished.exit_code == 0, finished.output
    documents = list(yaml.safe_load_all((tmp_path / "out.yaml").read_text()))
    (server,) = document_of(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["image"] == IMAGE
    assert "Defaults are used, because these were not measured" in finished.stderr


def test_measurements_of_the_bake_are_used_unless_pods_were_measured() -> None:
    small = replace(L4, measured=Measurements(cold_seconds=20.0, resident_bytes=3000 * MIB, device_bytes=4000 * MIB))
    large = replace(
        H100, measured=Measurements(cold_seconds=400.2, resident_bytes=4744 * MIB, device_bytes=5976 * MIB + 1)
    )
    rendering = render_for([small, large, CPU])
    assert server_of(rendering)["startupProbe"]["failureThreshold"] == 1201
    assert server_of(rendering)["resources"] == {
        "requests": {"cpu": "2", "memory": "5632Mi", "nvidia.com/gpu": "1"},
        "limits": {"memory": "7680Mi", "nvidia.com/gpu": "1"},
    }
    assert all(term["nvidia.com/gpu.memory"] == ("7000",) for term in terms(rendering))
    assert "not measured: --request-seconds (docs" in rendering.notes[-1]
    assert server_of(render_for([small, large], gpus=("NVIDIA L4",)))["startupProbe"]["failureThreshold"] == 360
    measured = Measured(cold_seconds=200.5, rss_mib=2000, gpu_memory_mib=500)
    given = render_for([large], measured=measured)
    assert server_of(given)["startupProbe"]["failureThreshold"] == 602
    assert server_of(given)["resources"]["limits"]["memory"] == "3Gi"
    assert terms(given)[0]["nvidia.com/gpu.memory"] == ("499",)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", BadInputError, "is not JSON"),
        ("[]", BadInputError, "does not contain labels"),
        ('{"a": 1}', BadInputError, "does not contain labels"),
        ("{}", EngineError, "has no label"),
        (json.dumps({STATES: '{"schema": 2, "states": []}'}), EngineError, "has schema 2"),
    ],
)
def test_invalid_labels_are_refused(content: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    refused = call("render", "--image", IMAGE, "--labels", tmp_path / "labels.json")
    assert isinstance(refused.exception, error)
    assert message in str(refused.exception)


@pytest.mark.programs
def test_the_digest_of_an_image_in_a_registry_is_rendered(labels: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "registry") as registry:
        reference = parse(f"{registry.address}/speech:1")
        with open_store(reference) as (store, tag):
            make_base(store, tag, Labels=json.loads(labels.read_text()))
            digest = store.read_manifest(tag).digest
        finished = call("render", "--image", str(reference))
    assert finished.exit_code == 0, finished.output
    (server,) = document_of(yaml.safe_load_all(finished.stdout), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["image"] == f"{registry.address}/speech:1@{digest}"


@pytest.mark.programs
def test_the_image_of_a_plain_docker_build_is_rendered_from_its_layer(tmp_path: Path) -> None:
    make_state_for(tmp_path / "warm", {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"})
    content = (tmp_path / "warm" / "manifest.json").read_bytes()
    layer = layer_of({"opt/chatterbox-prewarm/warm/manifest.json": content})
    with serve(tmp_path / "registry") as registry:
        reference = parse(f"{registry.address}/speech:1")
        with open_store(reference) as (store, tag):
            base = make_base(store, "base", Labels={"io.chatterbox-prewarm.profile": "aot"})
            send(add_layers(base, [layer], Change(), created="2025-01-02T03:04:05+00:00"), store, [layer], store, tag)
        finished = call("render", "--image", str(reference))
    assert finished.exit_code == 0, finished.output
    assert "NVIDIA-L4" in finished.stdout


def test_an_image_outside_a_registry_is_refused(tmp_path: Path) -> None:
    make_base(Layout(tmp_path / "layout"), "1")
    refused = call("render", "--image", f"oci:{tmp_path}/layout:1")
    assert isinstance(refused.exception, BadInputError)
    assert "no node can pull it" in str(refused.exception)
    wrong = call("render", "--image", IMAGE, "--labels", tmp_path / "missing.json")
    assert "No such file" in str(wrong.exception)


@pytest.mark.parametrize("label", ["x", "=x", "a b=c", "a=b c", "/a=b", "a=" + "b" * 64])
def test_an_invalid_node_label_is_refused(label: str) -> None:
    refused = call("render", "--image", IMAGE, "--node-label", label)
    assert refused.exit_code == 2
    assert "is not a label" in refused.output


@pytest.mark.parametrize("image", ["oci:layout:1", "Speech:1", "registry.example.com/speech:a b"])
def test_an_image_that_no_node_can_pull_is_refused_before_its_labels_are_used(image: str, labels: Path) -> None:
    refused = call("render", "--image", image, "--labels", labels)
    assert isinstance(refused.exception, BadInputError)
