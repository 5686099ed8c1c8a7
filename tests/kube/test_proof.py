"""Proofs on a cluster: each state that was compiled without its GPU has a Job on a node with that GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner

from chatterbox_prewarm.commands.images import publish
from chatterbox_prewarm.commands.kube import k8s
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.append import append
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.state_layers import pack_states
from chatterbox_prewarm.kube.nodes import Cluster
from chatterbox_prewarm.kube.proof import Request, render_proofs
from chatterbox_prewarm.state.keys import PASSPHRASE
from chatterbox_prewarm.system.paths import CACHE
from tests.helpers.images import make_base
from tests.helpers.manifests import VERSIONS, Document, conflicts, document_of, pods, validate, violations
from tests.helpers.registry_server import serve
from tests.helpers.renderings import CPU, H100, H200, IMAGE, L4, state
from tests.helpers.states import make_state_for, mark_cross_compiled

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.kube.documents import Rendering

CROSSED = replace(H200, cross_compiled=True)
ARCHITECTURE = replace(state("absent", "8.9"), cross_compiled=True)


def rendering_of(*states: StateLabel, **fields: Any) -> Rendering:
    return render_proofs(Request(image=IMAGE, states=states, **fields))


def jobs(rendering: Rendering) -> list[Document]:
    return [one for one in rendering.documents if one["kind"] == "Job"]


def pod_of(job: Document) -> Document:
    pod: Document = job["spec"]["template"]["spec"]
    return pod


def test_only_states_that_were_compiled_without_their_gpu_are_proven() -> None:
    rendering = rendering_of(H100, CROSSED, CPU, ARCHITECTURE)
    assert [job["metadata"]["annotations"]["chatterbox-prewarm/states"] for job in jobs(rendering)] == [
        CROSSED.key,
        ARCHITECTURE.key,
    ]
    with pytest.raises(BadInputError, match="no state of the image was compiled without its GPU"):
        rendering_of(H100, L4, CPU)


def test_a_proof_requires_a_node_with_the_gpu_of_its_state() -> None:
    product, architecture = map(pod_of, jobs(rendering_of(CROSSED, ARCHITECTURE)))
    for pod, expected in (
        (product, {"compute.major": "9", "compute.minor": "0", "product": "NVIDIA-H200"}),
        (architecture, {"compute.major": "8", "compute.minor": "9"}),
    ):
        affinity = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (term,) = affinity["nodeSelectorTerms"]
        found = {one["key"]: one["values"][0] for one in term["matchExpressions"]}
        assert found == {"kubernetes.io/arch": "amd64"} | {f"nvidia.com/gpu.{key}": expected[key] for key in expected}
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    rendering = rendering_of(CROSSED, cluster=Cluster(feature_discovery=False))
    assert any("on another GPU than its state is for" in note for note in rendering.notes)


def test_a_proof_runs_the_image_with_existing_options_and_writes_only_to_volumes() -> None:
    (job,) = jobs(rendering_of(CROSSED, registry_secret="login", insecure=True))
    (container,) = pod_of(job)["containers"]
    assert container["image"] == IMAGE
    assert container["args"] == ["publish", "--prove-only", IMAGE, "--state", CROSSED.key, "--insecure"]
    assert {"--prove-only", "--state", "--insecure"} <= {name for one in publish.params for name in one.opts}
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {path for path, name in mounts.items() if "emptyDir" in volumes[name]} == {str(CACHE), "/tmp"}
    assert [{"name": "DOCKER_CONFIG", "value": path} for path in mounts if "secret" in volumes[mounts[path]]] == (
        container["env"]
    )
    assert pod_of(job)["imagePullSecrets"] == [{"name": "login"}]


def test_a_proof_signs_its_result_with_the_key_of_a_secret() -> None:
    (job,) = jobs(rendering_of(CROSSED, signing_secret="signing"))
    (container,) = pod_of(job)["containers"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert container["args"][-2:] == ["--key", f"{mounts['signing-key']['mountPath']}/private.pem"]
    assert mounts["signing-key"]["readOnly"] is True
    (volume,) = (volume["secret"] for volume in pod_of(job)["volumes"] if volume["name"] == "signing-key")
    assert volume == {
        "secretName": "signing",
        "defaultMode": 0o440,
        "items": [{"key": "private.pem", "path": "private.pem"}],
    }
    passphrase = {"secretKeyRef": {"name": "signing", "key": "passphrase", "optional": True}}
    assert container["env"] == [{"name": PASSPHRASE, "valueFrom": passphrase}]


def test_a_failed_proof_is_final_and_a_lost_registry_is_retried() -> None:
    spec = jobs(rendering_of(CROSSED))[0]["spec"]
    _, final = spec["podFailurePolicy"]["rules"]
    assert final["action"] == "FailJob"
    assert {11, 12, 13} <= set(final["onExitCodes"]["values"])
    assert 14 not in final["onExitCodes"]["values"]
    assert final["onExitCodes"]["containerName"] == pod_of(jobs(rendering_of(CROSSED))[0])["containers"][0]["name"]


def test_every_proof_is_valid_and_restricted_on_every_version() -> None:
    rendering = rendering_of(CROSSED, ARCHITECTURE, registry_secret="login", signing_secret="signing")
    documents = list(yaml.safe_load_all(rendering.to_yaml()))
    assert documents == list(rendering.documents)
    for document in documents:
        for version in VERSIONS:
            validate(document, version)
    assert {name: problems for name, pod in pods(documents) if (problems := violations(pod))} == {}
    assert conflicts(documents, list(rendering_of(CROSSED, name="other").documents)) == []
    (rule,) = document_of(documents, "NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for port in rule["ports"]} == {53, 5353, 443}


@pytest.mark.programs
def test_the_image_must_be_in_a_registry_and_is_named_by_its_digest(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    make_base(layout, "cold", Labels={"io.chatterbox-prewarm.torch": "torch-2.6"})
    facts = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9", "torch": "2.6.0"}
    make_state_for(tmp_path / "warm", facts)
    mark_cross_compiled(tmp_path / "warm")
    with serve(tmp_path / "registry") as registry, pack_states([tmp_path / "warm"]) as states:
        image = f"{registry.address}/speech:1"
        made = append(parse(f"oci:{layout.path}:cold"), parse(image), states)
        rendered = CliRunner().invoke(k8s, ["render-proof", "--image", image])
        assert rendered.exit_code == 0, rendered.output
        refused = CliRunner().invoke(k8s, ["render-proof", "--image", f"oci:{layout.path}:cold"])
    assert (
        f"args:\n        - publish\n        - --prove-only\n        - {image}@{made.document.digest}" in rendered.output
    )
    assert f"port: {registry.address.rpartition(':')[2]}\n" in rendered.output
    assert isinstance(refused.exception, BadInputError)
