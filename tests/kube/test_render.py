"""A rendering says of an image's labels where it runs, how long it may take to start, and what it gets."""

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
from chatterbox_prewarm.image.labels import STATES, FamilyLabel, StateLabel, labels_of
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.stores import storing
from chatterbox_prewarm.kube.budgets import Measured
from chatterbox_prewarm.kube.nodes import Cluster, product_label
from chatterbox_prewarm.kube.render import NAME, Request, render
from chatterbox_prewarm.state.manifest import Measurements
from tests.helpers.images import make_base
from tests.helpers.manifests import K8S, VERSIONS, Document, kustomize, pods, the, validate, violations
from tests.helpers.registry_server import serve
from tests.helpers.states import make_state_for

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.kube.documents import Rendering

IMAGE = "registry.example.com/speech@sha256:" + "a" * 64
MIB = 1 << 20


def state(
    gpu: str, capability: str, *, device: str = "cuda", driver: str = "", arch: str = "x86_64", size: int = 60 * MIB
) -> StateLabel:
    requires = {"arch": arch, **({"gpu": gpu, "compute_capability": capability} if device == "cuda" else {})}
    if driver:
        requires["driver"] = driver
    return StateLabel(
        key=f"{device}-{gpu}-{arch}".lower().replace(" ", "-"),
        set_digest="0" * 64,
        variant="english",
        profile="aot",
        device=device,
        created="2025-01-02T03:04:05+00:00",
        gpu=gpu,
        compute_capability=capability,
        driver=driver or "550.54.15",
        torch="2.6.0",
        families=(FamilyLabel(name="aot", size=size, requires=requires),),
    )


H100 = state("NVIDIA H100 80GB HBM3", "9.0")
H200 = state("NVIDIA H200", "9.0")
L4 = state("NVIDIA L4", "8.9")
CPU = state("none", "none", device="cpu")
SLICE = state("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9.0")


def render_for(states: list[StateLabel], **fields: Any) -> Rendering:
    return render(Request(image=IMAGE, states=tuple(states), **fields))


def pod_of(rendering: Rendering) -> Document:
    ((_, pod),) = pods(rendering.documents)
    return pod


def affinity_of(rendering: Rendering) -> Document:
    found: Document = pod_of(rendering)["affinity"]["nodeAffinity"]
    return found


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
    (found,) = pod_of(rendering)["containers"]
    server: Document = found
    return server


def test_without_a_gpu_and_without_figures_it_is_the_base() -> None:
    """But for the image, the processor, the map's name, and what says where the rendering comes from."""
    rendered = list(yaml.safe_load_all(render_for([CPU]).to_yaml()))
    base = kustomize(K8S / "base")
    the(base, "ConfigMap")["metadata"]["name"] = "chatterbox"
    deployment, pod = the(base, "Deployment"), the(base, "Deployment")["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = IMAGE
    pod["containers"][0]["envFrom"][0]["configMapRef"]["name"] = "chatterbox"
    ours = the(rendered, "Deployment")
    assert ours["metadata"].pop("annotations") == {"chatterbox-prewarm/states": CPU.key}
    assert ours["spec"]["template"]["metadata"].pop("annotations").keys() == {"checksum/config"}
    assert ours["spec"]["template"]["spec"].pop("affinity")["nodeAffinity"].keys() == {
        "requiredDuringSchedulingIgnoredDuringExecution"
    }
    assert ours == deployment
    for document in base:
        assert the(rendered, document["kind"]) == document
    assert len(rendered) == len(base)


def test_what_pulls_before_is_the_component_and_goes_where_the_pods_go() -> None:
    rendered = list(yaml.safe_load_all(render_for([CPU], pre_pull=True).to_yaml()))
    assert rendered[:-2] == list(yaml.safe_load_all(render_for([CPU]).to_yaml()))
    component = [yaml.safe_load((K8S / "components" / "pre-pull" / name).read_text()) for name in PRE_PULL]
    pod = component[0]["spec"]["template"]["spec"]
    pod["containers"][0]["image"] = IMAGE
    del pod["tolerations"]  # of GPUs
    assert rendered[-2]["spec"]["template"]["spec"].pop("affinity") == pod_of(render_for([CPU]))["affinity"]
    assert rendered[-2:] == component
    for documents in ([H100, L4], [L4]):
        (_, server), (_, before) = pods(render_for(documents, pre_pull=True).documents)
        assert (before["affinity"], before["tolerations"]) == (server["affinity"], server["tolerations"])


def test_components_go_on_top_of_a_rendering(tmp_path: Path) -> None:
    shutil.copytree(K8S / "components", tmp_path / "components")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "rendered.yaml").write_text(render_for([L4], queue_limit=4).to_yaml())
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["rendered.yaml"],
        "components": [f"../components/{name}" for name in ("token", "voices", "signature-key", "hpa", "monitor")],
    }
    (mine / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    documents = kustomize(mine)
    deployment, settings = the(documents, "Deployment"), the(documents, "ConfigMap")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert server["image"] == IMAGE
    assert server["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    assert settings["data"].items() >= {"CHATTERBOX_PREWARM_QUEUE_LIMIT": "4"}.items()
    assert settings["data"].keys() >= {"CHATTERBOX_PREWARM_TOKEN_FILE", "CHATTERBOX_PREWARM_KEY"}
    mounts = {mount["name"] for mount in server["volumeMounts"]}
    assert mounts == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert len(mounts) == 5, "the cache, the temporary folder, and one of each of three components"
    assert the(documents, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == NAME
    assert {where: found for where, pod in pods(documents) if (found := violations(pod))} == {}


#: In the order of a rendering.
PRE_PULL = ("daemon-set.yaml", "network-policy.yaml")

RENDERINGS = {
    "cpu": render_for([CPU]),
    "one": render_for([L4]),
    "several": render_for([H100, L4, CPU], replicas=2, policy="require", queue_limit=4),
    "slice": render_for([SLICE], cluster=Cluster(mig_strategy="mixed", runtime_class="nvidia")),
    "unlabelled": render_for([L4], cluster=Cluster(feature_discovery=False, labels={"gpu": "l4"})),
    "pulled before": render_for([H100, L4], pre_pull=True),
    "measured": render_for(
        [H100], measured=Measured(cold_seconds=200.5, request_seconds=7.5, rss_mib=5000, gpu_memory_mib=7000)
    ),
}


@pytest.mark.parametrize("name", RENDERINGS)
def test_every_rendering_is_valid_on_every_version_and_restricted(name: str) -> None:
    documents = list(yaml.safe_load_all(RENDERINGS[name].to_yaml()))
    assert documents == list(RENDERINGS[name].documents)
    for document in documents:
        for version in VERSIONS:
            validate(document, version)
    assert {where: found for where, pod in pods(documents) if (found := violations(pod))} == {}


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


def test_several_states_are_several_terms_and_those_of_one_capability_are_one() -> None:
    rendering = render_for([H100, H200, L4])
    assert [term["nvidia.com/gpu.compute.major"] for term in terms(rendering)] == [("9",), ("8",)]
    assert [found["nvidia.com/gpu.product"][0] for _, found in preferences(rendering)] == [
        "NVIDIA-H100-80GB-HBM3",
        "NVIDIA-H200",
        "NVIDIA-L4",
    ]


def test_only_the_gpus_that_are_named_count() -> None:
    rendering = render_for([H100, L4], gpus=("NVIDIA L4",))
    assert [term["nvidia.com/gpu.compute.major"] for term in terms(rendering)] == [("8",)]
    with pytest.raises(BadInputError, match=r"no state of the image is for the GPU 'NVIDIA A10'.*NVIDIA L4"):
        render_for([H100, L4], gpus=("NVIDIA A10",))


def test_a_start_that_may_not_miss_goes_only_where_a_state_fits() -> None:
    """Elsewhere it would end with 11, and be started again and again."""
    rendering = render_for([H100, H200], policy="require")
    (term,) = terms(rendering)
    assert term["nvidia.com/gpu.product"] == (
        *("NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-80GB-HBM3-SHARED"),
        *("NVIDIA-H200", "NVIDIA-H200-SHARED"),
    )
    assert the(rendering.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_POLICY"] == "require"


def test_a_driver_is_preferred_if_something_depends_on_it() -> None:
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
def test_a_product_is_named_as_its_label(product: str, label: str) -> None:
    assert product_label(product) == label


def test_a_part_of_a_gpu_is_the_gpu_of_its_node_or_a_resource_of_its_own() -> None:
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


def test_one_pod_cannot_request_two_kinds_of_gpu() -> None:
    with pytest.raises(BadInputError, match=r"requested as nvidia\.com/gpu and nvidia\.com/mig-1g\.10gb"):
        render_for([SLICE, H100], cluster=Cluster(mig_strategy="mixed"))
    assert render_for([SLICE, H100]).documents, "under the strategy single both are nvidia.com/gpu"


def test_a_gpu_that_is_too_small_is_no_node_of_ours() -> None:
    rendering = render_for([L4], measured=Measured(gpu_memory_mib=9000))
    raw = affinity_of(rendering)["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["8999"]} in raw[0]["matchExpressions"]


def test_without_feature_discovery_it_still_runs_and_says_what_may_happen() -> None:
    rendering = render_for([L4], cluster=Cluster(feature_discovery=False))
    assert terms(rendering) == [{"kubernetes.io/arch": ("amd64",)}]
    assert preferences(rendering) == []
    assert server_of(rendering)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert any("it misses, is slow" in note for note in rendering.notes)
    assert "# and works. Install GPU Feature Discovery" in rendering.to_yaml()
    chosen = render_for([L4], cluster=Cluster(feature_discovery=False, labels={"gpu": "l4"}))
    assert terms(chosen) == [{"kubernetes.io/arch": ("amd64",), "gpu": ("l4",)}]


def test_a_state_that_saw_no_gpu_is_at_home_on_any() -> None:
    for rendering in (render_for([state("absent", "absent")]), render_for([CPU], device="cuda")):
        assert terms(rendering) == [{"kubernetes.io/arch": ("amd64",)}]
        assert server_of(rendering)["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert any("misses in part" in note for note in rendering.notes)


def test_an_image_for_both_uses_the_gpu_unless_told_otherwise() -> None:
    both = render_for([CPU, L4])
    assert the(both.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_DEVICE"] == "cuda"
    cpu = render_for([CPU, L4], device="cpu")
    assert the(cpu.documents, "ConfigMap")["data"]["CHATTERBOX_PREWARM_DEVICE"] == "cpu"
    assert server_of(cpu)["resources"]["limits"] == {"memory": "8Gi"}
    assert "tolerations" not in pod_of(cpu)
    with pytest.raises(BadInputError, match="no state for the device 'cpu', only for cuda"):
        render_for([L4], device="cpu")


def test_the_startup_probe_covers_a_cold_start_with_margin() -> None:
    assert server_of(render_for([L4]))["startupProbe"]["failureThreshold"] == 360
    short = server_of(render_for([L4], measured=Measured(cold_seconds=20)))["startupProbe"]
    assert short["failureThreshold"] == 360, "never less than what holds without figures"
    long = render_for([L4], measured=Measured(cold_seconds=400.2))
    assert (
        server_of(long)["startupProbe"]["failureThreshold"] * server_of(long)["startupProbe"]["periodSeconds"] == 1201
    )
    assert the(long.documents, "Deployment")["spec"]["progressDeadlineSeconds"] > 1201


def test_the_last_request_of_a_full_queue_is_not_cut_off() -> None:
    rendering = render_for([L4], queue_limit=8, measured=Measured(request_seconds=12.5))
    settings = the(rendering.documents, "ConfigMap")["data"]
    assert settings["CHATTERBOX_PREWARM_DRAIN_SECONDS"] == "100"
    assert settings["CHATTERBOX_PREWARM_QUEUE_LIMIT"] == "8"
    assert pod_of(rendering)["terminationGracePeriodSeconds"] == 5 + 100 + 15


def test_memory_follows_what_was_measured() -> None:
    resources = server_of(render_for([L4], measured=Measured(rss_mib=5000)))["resources"]
    assert resources["requests"]["memory"] == "5632Mi"
    assert resources["limits"]["memory"] == "7680Mi"


def test_the_cache_holds_the_largest_state_several_times() -> None:
    def size(**fields: Any) -> str:
        found: str = pod_of(render_for([L4, replace(H100, families=())], **fields))["volumes"][0]["emptyDir"][
            "sizeLimit"
        ]
        return found

    assert size() == "1Gi"
    large = state("NVIDIA L4", "8.9", size=500 * MIB)
    assert pod_of(render_for([large]))["volumes"][0]["emptyDir"]["sizeLimit"] == "2Gi"
    with pytest.raises(BadInputError, match="a cache of 64 MiB is too small: a state has 60 MiB"):
        size(cache_mib=64)


def test_what_was_not_measured_is_said() -> None:
    assert "--cold-seconds, --request-seconds, --rss (docs" in render_for([CPU]).notes[-1]
    assert not any("not measured" in note for note in RENDERINGS["measured"].notes)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    facts = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(labels_of([make_state_for(tmp_path / "warm", facts)])))
    return path


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(k8s, [*map(str, arguments)])


def test_the_command_reads_labels_and_writes_documents(labels: Path, tmp_path: Path) -> None:
    done = call(
        "render", "--image", IMAGE, "--labels", labels, "--output", tmp_path / "out.yaml", "--node-label", "a=b"
    )
    assert done.exit_code == 0, done.output
    documents = list(yaml.safe_load_all((tmp_path / "out.yaml").read_text()))
    (server,) = the(documents, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["image"] == IMAGE
    assert "Defaults stand for what was not measured" in done.stderr


def test_what_the_bakes_measured_sizes_a_pod_unless_somebody_measured_pods() -> None:
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
    ("content", "kind", "says"),
    [
        ("{", BadInputError, "is not JSON"),
        ("[]", BadInputError, "holds no labels"),
        ('{"a": 1}', BadInputError, "holds no labels"),
        ("{}", EngineError, "has no label"),
        (json.dumps({STATES: '{"schema": 2, "states": []}'}), EngineError, "is of schema 2"),
    ],
)
def test_labels_that_say_nothing_are_refused(content: str, kind: type[Exception], says: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    refused = call("render", "--image", IMAGE, "--labels", tmp_path / "labels.json")
    assert isinstance(refused.exception, kind)
    assert says in str(refused.exception)


def test_an_image_in_a_registry_is_named_by_the_digest_that_was_looked_at(labels: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "registry") as registry:
        reference = parse(f"{registry.address}/speech:1")
        with storing(reference) as (store, tag):
            make_base(store, tag, Labels=json.loads(labels.read_text()))
            digest = store.read_manifest(tag).digest
        done = call("render", "--image", str(reference))
    assert done.exit_code == 0, done.output
    (server,) = the(yaml.safe_load_all(done.stdout), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["image"] == f"{registry.address}/speech:1@{digest}"


def test_an_image_that_no_node_can_pull_is_refused(tmp_path: Path) -> None:
    make_base(Layout(tmp_path / "layout"), "1")
    refused = call("render", "--image", f"oci:{tmp_path}/layout:1")
    assert isinstance(refused.exception, BadInputError)
    assert "no node can pull it" in str(refused.exception)
    wrong = call("render", "--image", IMAGE, "--labels", tmp_path / "none.json")
    assert "No such file" in str(wrong.exception)
    assert "has no value" in str(call("render", "--image", IMAGE, "--node-label", "x").exception)
