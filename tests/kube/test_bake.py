"""Bakes on a cluster: each type of GPU has a Job with retries and minimal permissions."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner

from chatterbox_prewarm.commands.images import publish
from chatterbox_prewarm.commands.kube import k8s
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image import matrix as matrices
from chatterbox_prewarm.kube.bake import Request, render_bakes
from chatterbox_prewarm.kube.nodes import Cluster
from chatterbox_prewarm.system.paths import CACHE
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

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.kube.documents import Rendering

MATRIX = """
[image]
base = "registry.example.com:5000/speech:cold"
target = "registry.example.com:5000/speech:1"

[[bake]]
gpus = ["NVIDIA L4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
profiles = ["aot", "compiled"]
voices = { fox = "clips/fox.wav", wolf = "clips/wolf.wav" }

[[bake]]
profiles = ["eager"]
t3_dtype = "bfloat16"
levels = "1"
"""


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "fox.wav").write_bytes(b"RIFF fox")
    (tmp_path / "clips" / "wolf.wav").write_bytes(b"RIFF wolf")
    path = tmp_path / "prewarm.toml"
    path.write_text(MATRIX)
    return path


def rendering_of(matrix: Path, **fields: Any) -> Rendering:
    return render_bakes(
        Request(matrix=matrices.read_matrix(matrix), image="registry.example.com/speech:tools", **fields)
    )


def jobs(rendering: Rendering) -> dict[str, Document]:
    return {one["metadata"]["name"]: one for one in rendering.documents if one["kind"] == "Job"}


def container_of(job: Document) -> Document:
    container: Document
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def test_a_written_matrix_reads_the_same(matrix: Path, tmp_path: Path) -> None:
    original = matrices.read_matrix(matrix)
    (tmp_path / "copy.toml").write_text(matrices.to_toml(original))
    assert matrices.read_matrix(tmp_path / "copy.toml") == original


def test_each_type_of_gpu_has_a_job_whose_indices_are_its_bakes(matrix: Path, tmp_path: Path) -> None:
    rendering = rendering_of(matrix)
    by_name = jobs(rendering)
    assert [job["spec"]["completions"] for job in by_name.values()] == [2, 2, 1]
    assert {job["spec"]["completionMode"] for job in by_name.values()} == {"Indexed"}
    expected = iter(matrices.read_matrix(matrix).bakes)
    for name in by_name:
        (content,) = [
            one for one in rendering.documents if one["kind"] == "ConfigMap" and one["metadata"]["name"] == name
        ]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "prewarm.toml").write_text(content["data"]["prewarm.toml"])
        for key, value in content.get("binaryData", {}).items():
            (folder / key).write_bytes(base64.b64decode(value))
        mounted = matrices.read_matrix(folder / "prewarm.toml")
        assert (mounted.base, mounted.target) == (
            "registry.example.com:5000/speech:cold",
            "registry.example.com:5000/speech:1",
        )
        for bake in mounted.bakes:
            original = next(expected)
            assert (bake.gpu, bake.profile, bake.t3_dtype) == (original.gpu, original.profile, original.t3_dtype)
            clips = {voice: clip.read_bytes() for voice, clip in bake.voices.items()}
            assert clips == {voice: clip.read_bytes() for voice, clip in original.voices.items()}
    assert next(expected, None) is None


def test_a_job_requires_nodes_with_its_gpu(matrix: Path) -> None:
    l4, mig_slice, cpu = jobs(rendering_of(matrix, cluster=Cluster(mig_strategy="mixed"))).values()
    expected = [("nvidia.com/gpu", "NVIDIA-L4"), ("nvidia.com/mig-1g.10gb", "NVIDIA-H100-80GB-HBM3-MIG-1g.10gb")]
    for job, (resource, product) in zip((l4, mig_slice), expected, strict=True):
        pod = job["spec"]["template"]["spec"]
        assert container_of(job)["resources"]["limits"][resource] == "1"
        assert pod["affinity"] == {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {
                                    "key": f"{resource}.product",
                                    "operator": "In",
                                    "values": [product, f"{product}-SHARED"],
                                }
                            ]
                        }
                    ]
                }
            }
        }
    assert "affinity" not in cpu["spec"]["template"]["spec"]
    assert "tolerations" not in cpu["spec"]["template"]["spec"]
    assert container_of(cpu)["resources"]["limits"].keys() == {"memory"}


def test_only_failures_that_may_be_temporary_are_retried(matrix: Path) -> None:
    spec = next(iter(jobs(rendering_of(matrix)).values()))["spec"]
    ignored, final = spec["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    codes = final["onExitCodes"]["values"]
    assert codes == sorted(set(codes)) == [2, 10, 11, 12, 13, 16, 70]
    assert not {0, 14, 15, 137, 143} & set(codes), "an unreachable registry, too little memory, a removed node"
    assert (final["action"], ignored["action"], spec["backoffLimitPerIndex"]) == ("FailIndex", "Ignore", 3)
    assert final["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_every_bake_is_valid_and_restricted_on_every_version(matrix: Path) -> None:
    rendering = rendering_of(matrix, registry_secret="login", signing_secret="signing", parallelism=2, insecure=True)
    documents = list(yaml.safe_load_all(rendering.to_yaml()))
    assert documents == list(rendering.documents)
    for document in documents:
        for version in VERSIONS:
            validate(document, version)
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}


def test_a_bake_writes_only_to_volumes_and_uses_existing_options(matrix: Path) -> None:
    rendering = rendering_of(matrix, registry_secret="login", signing_secret="signing")
    job = next(iter(jobs(rendering).values()))
    container, pod = container_of(job), job["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if "emptyDir" in volumes[mount["name"]]}
    assert writable == {str(CACHE), "/tmp"}
    options = {name for parameter in publish.params for name in parameter.opts}
    arguments = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
    assert container["args"][0] == publish.name
    assert arguments.keys() <= options
    assert arguments["--warm"].startswith("/tmp/")
    assert "--index" not in arguments, "the Job sets JOB_COMPLETION_INDEX"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert arguments["--matrix"] == f"{mounts['matrix']}/prewarm.toml"
    assert arguments["--key"] == f"{mounts['signing-key']}/private.pem"
    assert volumes["signing-key"]["secret"]["secretName"] == "signing"
    assert {"name": "DOCKER_CONFIG", "value": mounts["registry-login"]} in container["env"]
    assert volumes["registry-login"]["secret"]["items"] == [{"key": ".dockerconfigjson", "path": "config.json"}]


def test_only_dns_and_the_registries_can_be_reached(matrix: Path) -> None:
    policy = document_of(rendering_of(matrix).documents, "NetworkPolicy")["spec"]
    assert policy["ingress"] == []
    (rule,) = policy["egress"]
    assert {(port["port"], port["protocol"]) for port in rule["ports"]} == {
        (53, "UDP"),
        (53, "TCP"),
        (5353, "UDP"),
        (5353, "TCP"),
        (443, "TCP"),
        (5000, "TCP"),
    }


@pytest.mark.programs
def test_the_example_equals_the_rendering_of_its_matrix(tmp_path: Path) -> None:
    arguments = ["--matrix", K8S / "bake" / "prewarm.toml", "--image", "registry.example.com/speech:tools"]
    arguments += ["--registry-secret", "registry-login", "--output", tmp_path / "bake.yaml"]
    finished = CliRunner().invoke(k8s, ["render-bake", *map(str, arguments)])
    assert finished.exit_code == 0, finished.output
    assert (tmp_path / "bake.yaml").read_text() == (K8S / "bake" / "bake.yaml").read_text(), (
        "run the command in k8s/bake/kustomization.yaml"
    )
    assert [one["metadata"]["name"] for one in kustomize(K8S / "bake") if one["kind"] == "Job"] == [
        "chatterbox-bake-nvidia-h100-80gb-hbm3",
        "chatterbox-bake-nvidia-l4",
    ]


def test_without_feature_discovery_a_note_warns_about_the_wrong_gpu(matrix: Path) -> None:
    rendering = rendering_of(matrix, cluster=Cluster(feature_discovery=False))
    assert not any("affinity" in job["spec"]["template"]["spec"] for job in jobs(rendering).values())
    assert any("ends with 11" in note for note in rendering.notes)


def test_a_job_can_pull_its_image_with_the_login_of_the_registry(matrix: Path) -> None:
    for fields, secret in ({"registry_secret": "login"}, "login"), ({"registry_secret": "a", "pull_secret": "b"}, "b"):
        rendering = rendering_of(matrix, **fields)
        assert all(pod["imagePullSecrets"] == [{"name": secret}] for _, pod in pods(rendering.documents))


def test_bakes_of_two_projects_in_a_namespace_are_separate(matrix: Path) -> None:
    one, two = (rendering_of(matrix, name=name).documents for name in ("one", "two"))
    assert conflicts(one, two) == []
    assert all(name.startswith("one-bake") for name in references(one, "one"))
    assert references(one, "chatterbox") == []


def test_long_and_similar_products_get_unique_names(tmp_path: Path) -> None:
    products = ["NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "NVIDIA L4", "NVIDIA L4+"]
    (tmp_path / "prewarm.toml").write_text(
        MATRIX.replace("[[bake]]\ngpus", f"[[bake]]\ngpus = {products}\n#", 1).replace("voices", "# voices")
    )
    for project in ("chatterbox", "a" * 32):
        names = list(jobs(rendering_of(tmp_path / "prewarm.toml", name=project)))
        assert len(set(names)) == 4
        assert all(len(name) <= 52 for name in names)


def test_clips_that_do_not_fit_into_a_config_map_are_refused(matrix: Path, tmp_path: Path) -> None:
    (tmp_path / "clips" / "fox.wav").write_bytes(bytes(1 << 20))
    with pytest.raises(BadInputError, match=r"clips for NVIDIA L4 have \d+ bytes, more than the 1048576"):
        rendering_of(matrix)
    (tmp_path / "clips" / "fox.wav").unlink()
    with pytest.raises(BadInputError, match="reading a voice clip: No such file"):
        rendering_of(matrix)


def test_an_image_outside_a_registry_is_refused(matrix: Path) -> None:
    matrix.write_text(MATRIX.replace("registry.example.com:5000/speech:1", "oci:/somewhere:1"))
    with pytest.raises(BadInputError, match="oci:/somewhere:1 is not in a registry"):
        rendering_of(matrix)
