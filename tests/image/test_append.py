"""`append`, `attest` and `verify --image` with small images in registries, layouts and archives."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.image.oci import digest_of, image_index
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.referrers import EVIDENCE_TYPE
from chatterbox_prewarm.image.stores import open_store
from chatterbox_prewarm.state.signing import sign
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.weights.record import read_record, record
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.conftest import run_benchmark, run_cli
from tests.helpers.images import make_base, make_bases
from tests.helpers.keys import make_keys
from tests.helpers.registry_server import serve
from tests.helpers.states import make_checkpoint, make_state_for, rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chatterbox_prewarm.image.oci import Descriptor, Image
    from tests.helpers.registry_server import Registry

LABELS = {"io.chatterbox-prewarm.torch": "torch-2.6", "io.chatterbox-prewarm.variant": "english"}
H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "550.54.15", "torch": "2.6.0"}
L4 = {**H100, "gpu": "NVIDIA L4", "compute_capability": "8.9"}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with serve(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A layout with a base image under the tag `base`."""
    layout = Layout(tmp_path / "layout")
    make_base(layout, "base", Labels=LABELS)
    return layout


@pytest.fixture
def h100(tmp_path: Path) -> Path:
    make_state_for(tmp_path / "h100", H100, code=b"for an H100")
    return tmp_path / "h100"


@pytest.fixture
def l4(tmp_path: Path) -> Path:
    make_state_for(tmp_path / "l4", L4, code=b"for an L4")
    return tmp_path / "l4"


def read(reference: str) -> Image:
    with open_store(parse(reference)) as (store, name):
        return resolve(store, name, platform="linux/amd64")


@contextlib.contextmanager
def read_layer(layout: Layout, descriptor: Descriptor) -> Iterator[tarfile.TarFile]:
    with layout.open_blob(descriptor) as stream, tarfile.open(fileobj=stream) as tar:
        yield tar


@pytest.mark.programs
def test_a_state_becomes_the_same_layer_in_a_registry_and_in_layouts(
    layout: Layout, registry: Registry, h100: Path, tmp_path: Path
) -> None:
    targets = [f"oci:{layout.path}:warm", f"{registry.address}/speech:warm", f"oci:{tmp_path / 'new'}:warm"]
    for target in targets:
        appended = run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
        assert appended.returncode == 0, appended.stderr
    images = [read(target) for target in targets]
    assert images[0] == images[1] == images[2]
    assert images[0].labels["io.chatterbox-prewarm.gpu"] == "NVIDIA H100"
    assert images[0].labels["org.opencontainers.image.base.name"] == f"oci:{layout.path}:base"
    assert "CHATTERBOX_PREWARM_DEVICE=cuda" in images[0].config["config"]["Env"]
    packed = run_cli("pack", "--warm", h100, "--output", tmp_path / "layer.tar.gz")
    assert images[0].layers[-1].digest in packed.stdout
    assert images[0].diff_ids[-1] in packed.stdout


@pytest.mark.programs
def test_skopeo_reads_an_appended_image(layout: Layout, registry: Registry, h100: Path, tmp_path: Path) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is missing (Debian: apt-get install skopeo)")
    target = f"{registry.address}/speech:warm"
    run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    copy = ["skopeo", "--policy", str(policy), "copy", "--src-tls-verify=false", f"docker://{target}"]
    copied = subprocess.run([*copy, f"oci:{tmp_path / 'copy'}:warm"], capture_output=True, text=True)
    assert copied.returncode == 0, copied.stderr
    # skopeo compresses the layer of the base, so its descriptor changes, but its diff id does not.
    assert read(f"oci:{tmp_path / 'copy'}:warm").config == read(target).config


@pytest.mark.containers
def test_an_engine_loads_an_appended_archive(docker: str, layout: Layout, h100: Path, tmp_path: Path) -> None:
    tag = "chatterbox-prewarm-test:appended"
    archive = tmp_path / "image.tar"
    arguments = ("--base", f"oci:{layout.path}:base", "--to", f"docker-archive:{archive}:{tag}", "--warm", h100)
    appended = run_cli("append", *arguments)
    assert appended.returncode == 0, appended.stderr
    run_cli("append", "--base", f"oci:{layout.path}:base", "--to", f"oci:{layout.path}:warm", "--warm", h100)
    try:
        subprocess.run([docker, "load", "--input", str(archive)], check=True, capture_output=True)
        (loaded,) = json.loads(subprocess.run([docker, "inspect", tag], check=True, capture_output=True).stdout)
        assert tuple(loaded["RootFS"]["Layers"]) == read(f"oci:{layout.path}:warm").diff_ids
        assert loaded["Config"]["Labels"] == read(f"oci:{layout.path}:warm").labels
    finally:
        subprocess.run([docker, "rmi", "--force", tag], capture_output=True)
    refused = run_cli("append", *arguments)
    assert refused.returncode == 16
    assert "exists" in refused.stderr
    assert run_cli("append", *arguments, "--replace").returncode == 0


def test_an_archive_can_be_a_base(layout: Layout, h100: Path, l4: Path, tmp_path: Path) -> None:
    archive = f"docker-archive:{tmp_path / 'image.tar'}:speech:1"
    appended = run_cli("append", "--base", f"oci:{layout.path}:base", "--to", archive, "--warm", h100)
    assert appended.returncode == 0, appended.stderr
    target = f"oci:{tmp_path / 'new'}:warm"
    appended = run_cli("append", "--base", archive, "--to", target, "--warm", l4)
    assert appended.returncode == 0, appended.stderr
    image = read(target)
    assert len(read_states(image.labels)) == 2
    direct = run_cli("append", "--base", f"oci:{layout.path}:base", "--to", f"oci:{layout.path}:warm", "--warm", h100)
    assert direct.returncode == 0, direct.stderr
    assert [one.digest for one in image.layers[:-1]] == [one.digest for one in read(f"oci:{layout.path}:warm").layers]
    for descriptor, diff_id in zip(image.layers[1:], image.diff_ids[1:], strict=True):
        with Layout(tmp_path / "new").open_blob(descriptor) as stream:
            assert digest_of(gzip.decompress(stream.read())) == diff_id


@pytest.mark.programs
def test_adding_a_gpu_type_to_a_published_image_sends_only_its_layer(
    layout: Layout, registry: Registry, h100: Path, l4: Path
) -> None:
    first, second = (f"{registry.address}/speech:{tag}" for tag in ("1", "2"))
    run_cli("append", "--base", f"oci:{layout.path}:base", "--to", first, "--warm", h100)
    added = run_cli("append", "--base", first, "--to", second, "--warm", l4)
    assert added.returncode == 0, added.stderr
    assert "2 blobs sent" in added.stdout, "the new layer and the configuration"
    image = read(second)
    assert {state.key for state in read_states(image.labels)} == {State.read(one).key for one in (h100, l4)}
    assert image.labels["io.chatterbox-prewarm.gpu"] == "NVIDIA H100, NVIDIA L4"
    assert image.layers[:-1] == read(first).layers
    repeated = run_cli("append", "--base", second, "--to", f"{registry.address}/speech:3", "--warm", l4)
    assert repeated.returncode == 16
    assert "for the same machine" in repeated.stderr


def test_adding_a_state_removes_the_label_of_the_proof(layout: Layout, h100: Path) -> None:
    make_base(layout, "proven", Labels={**LABELS, "io.chatterbox-prewarm.evidence": f"sha256:{'0' * 64}", "own": "1"})
    target = f"oci:{layout.path}:warm"
    appended = run_cli("append", "--base", f"oci:{layout.path}:proven", "--to", target, "--warm", h100)
    assert appended.returncode == 0, appended.stderr
    labels = read(target).labels
    assert "io.chatterbox-prewarm.evidence" not in labels
    assert labels["own"] == "1"


@pytest.mark.programs
def test_layers_of_another_repository_are_mounted_and_not_sent(registry: Registry, h100: Path) -> None:
    base = f"{registry.address}/base:1"
    with open_store(parse(base)) as (store, _):
        make_base(store, "1", Labels=LABELS)
    appended = run_cli("append", "--base", base, "--to", f"{registry.address}/other:1", "--warm", h100)
    assert appended.returncode == 0, appended.stderr
    assert "2 blobs sent" in appended.stdout
    assert read(f"{registry.address}/other:1").layers[0] == read(base).layers[0]


def test_weights_and_signatures_are_added_as_layers(layout: Layout, h100: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights")
    record(checkpoint, variant=ENGLISH, repository="own", revision="1")
    arguments = ("--base", f"oci:{layout.path}:base", "--to", f"oci:{layout.path}:warm", "--weights", checkpoint)
    refused = run_cli("append", *arguments, "--warm", h100)
    assert refused.returncode == 16
    assert "baked with other weights" in refused.stderr
    digest = read_record(checkpoint).set_digest
    rewrite(h100, lambda raw: raw["weights"].update(set_digest=digest))
    key, _ = make_keys(tmp_path)
    signature = sign(State.read(h100), key)
    appended = run_cli("append", *arguments, "--warm", h100)
    assert appended.returncode == 0, appended.stderr
    with read_layer(layout, read(arguments[3]).layers[-1]) as tar:
        (name,) = (member.name for member in tar.getmembers() if member.isfile())
        assert name == f"opt/chatterbox-prewarm/warm/{State.read(h100).key}.sig"
        shipped = tar.extractfile(name)
        assert shipped is not None
        assert shipped.read() == signature.read_bytes()
    titles = [layer.annotations.get("org.opencontainers.image.title", "") for layer in read(arguments[3]).layers]
    assert [title.split()[0] for title in titles[1:]] == ["weights", "warm", "signature"]


def test_a_signature_of_another_state_is_refused_and_nothing_is_sent(layout: Layout, h100: Path, l4: Path) -> None:
    key, _ = make_keys(h100.parent)
    arguments = ("append", "--base", f"oci:{layout.path}:base", "--to", f"oci:{layout.path}:warm", "--warm", h100)
    signature = sign(State.read(l4), key, h100.with_name("h100.sig"))
    refused = run_cli(*arguments)
    assert refused.returncode == 12, refused.stderr
    assert "is of another manifest than" in refused.stderr
    assert State.read(l4).manifest.set_digest in refused.stderr
    assert f"or remove {signature}" in refused.stderr
    signature.write_text("{}")
    refused = run_cli(*arguments)
    assert refused.returncode == 12, refused.stderr
    assert "is not the signature of a warm state" in refused.stderr
    assert not layout.has_manifest("warm")
    sign(State.read(h100), key)
    assert run_cli(*arguments).returncode == 0


def test_the_base_for_the_platform_of_the_state_is_chosen_from_an_index(layout: Layout, h100: Path) -> None:
    entries = make_bases(layout, "amd64", "arm64", Labels=LABELS)
    for name, listed in (("both", entries), ("arm", entries[1:])):
        layout.put_manifest(image_index(listed), name)
    to = ("--to", f"oci:{layout.path}:warm", "--warm", h100)
    assert run_cli("append", "--base", f"oci:{layout.path}:both", *to).returncode == 0
    assert read(f"oci:{layout.path}:warm").platform == "linux/amd64"
    refused = run_cli("append", "--base", f"oci:{layout.path}:arm", *to, "--replace")
    assert refused.returncode == 14
    assert "only for: linux/arm64" in refused.stderr


@pytest.mark.programs
def test_an_index_is_not_replaced_by_an_image_for_one_platform(layout: Layout, registry: Registry, h100: Path) -> None:
    with open_store(parse(f"{registry.address}/speech:both")) as (store, name):
        store.put_manifest(image_index(make_bases(store, "amd64", "arm64", Labels=LABELS)), name)
        before = store.read_manifest(name)
        target = ("--to", f"{registry.address}/speech:both", "--warm", h100, "--replace")
        for base in (f"oci:{layout.path}:base", f"{registry.address}/speech:both"):
            refused = run_cli("append", "--base", base, *target)
            assert refused.returncode == 16, refused.stderr
            assert "is an index of images for several platforms" in refused.stderr
            assert "choose another tag" in refused.stderr
        assert store.read_manifest(name) == before


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        ({"Labels": {}}, 16, "not an image of this project"),
        ({"Labels": {**LABELS, "io.chatterbox-prewarm.torch": "torch-2.11"}}, 16, "the base has torch 2.11"),
        ({"Labels": {**LABELS, "io.chatterbox-prewarm.variant": "turbo"}}, 16, "for the model variant turbo"),
        ({"Labels": {**LABELS, "io.chatterbox-prewarm.states": "{"}}, 14, "is malformed"),
        ({"Labels": LABELS, "architecture": "arm64"}, 14, "not for linux/amd64"),
    ],
)
def test_a_base_that_does_not_suit_the_state_is_refused(
    settings: dict[str, Any], code: int, expected: str, tmp_path: Path, h100: Path
) -> None:
    layout = Layout(tmp_path / "other")
    make_base(layout, "base", **settings)
    target = f"oci:{layout.path}:warm"
    refused = run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    assert refused.returncode == code, refused.stderr
    assert expected in refused.stderr
    assert not layout.has_manifest("warm")


def test_entrypoint_command_environment_and_labels_are_set(layout: Layout, h100: Path) -> None:
    target = f"oci:{layout.path}:warm"
    arguments = ("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    words = ("--entrypoint", "python -m 'my server'", "--cmd", "serve --port 80", "--env", "A=2=3", "--env", "EMPTY=")
    labels = ("--label", "own=1", "--label", "org.opencontainers.image.title=speech")
    appended = run_cli(*arguments, *words, *labels)
    assert appended.returncode == 0, appended.stderr
    settings = read(target).config["config"]
    assert (settings["Entrypoint"], settings["Cmd"]) == (["python", "-m", "my server"], ["serve", "--port", "80"])
    assert settings["Env"] == ["PATH=/bin", "A=2=3", "CHATTERBOX_PREWARM_DEVICE=cuda", "EMPTY="]
    assert settings["Labels"]["own"] == "1"
    assert settings["Labels"]["org.opencontainers.image.title"] == "speech"
    assert len(read_states(settings["Labels"])) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("--label", "own"), 2, "--label 'own' has no value"),
        (("--env", "=1"), 2, "--env '=1' has no value"),
        (("--entrypoint", "python 'open"), 2, "cannot be parsed: No closing quotation"),
        (("--label", "io.chatterbox-prewarm.gpu=NVIDIA L4"), 16, "is reserved"),
    ],
)
def test_an_invalid_setting_is_refused(
    arguments: tuple[str, ...], code: int, expected: str, layout: Layout, h100: Path
) -> None:
    to = ("--to", f"oci:{layout.path}:warm", "--warm", h100)
    refused = run_cli("append", "--base", f"oci:{layout.path}:base", *to, *arguments)
    assert refused.returncode == code, refused.stderr
    assert expected in refused.stderr
    assert not layout.has_manifest("warm")


@pytest.mark.programs
def test_a_damaged_state_or_a_missing_base_is_refused_and_nothing_is_sent(
    layout: Layout, registry: Registry, h100: Path
) -> None:
    target = f"{registry.address}/speech:warm"
    missing = run_cli("append", "--base", f"oci:{layout.path}:none", "--to", target, "--warm", h100)
    assert missing.returncode == 14
    assert "choose a tag that it has: base" in missing.stderr
    next(path for path in h100.rglob("*") if path.is_file() and path.name != "manifest.json").write_bytes(b"changed")
    broken = run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    assert broken.returncode == 12
    assert list(registry.storage.rglob("data")) == []


@pytest.mark.programs
def test_an_existing_tag_is_only_replaced_on_request(layout: Layout, registry: Registry, h100: Path, l4: Path) -> None:
    target = f"{registry.address}/speech:warm"
    run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    before = read(target)
    arguments = ("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", l4)
    refused = run_cli(*arguments)
    assert refused.returncode == 16
    assert "already" in refused.stderr
    assert read(target) == before
    assert run_cli(*arguments, "--replace").returncode == 0
    assert read(target) != before


@pytest.mark.programs
def test_the_labels_of_an_image_show_whether_its_states_fit_a_node(
    layout: Layout, registry: Registry, h100: Path, tmp_path: Path
) -> None:
    target = f"{registry.address}/speech:warm"
    run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    facts = {"arch": "x86_64", "cpu_model": "any", "cpu_features": "avx", "instruction_set": "avx"}
    node = tmp_path / "node.json"
    for gpu, code, expected in (
        (L4, 11, "GPU: baked with NVIDIA H100, here NVIDIA L4"),
        (H100, 11, "not in the state"),
    ):
        machine = {name: gpu[name] for name in ("gpu", "compute_capability", "driver")}
        node.write_text(json.dumps({**facts, **machine}))
        judged = run_cli("verify", "--image", target, "--host-facts", node)
        assert judged.returncode == code, judged.stdout + judged.stderr
        assert expected in judged.stdout
    refused = run_cli("verify", "--host-facts", node)
    assert refused.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "env", "name"),
    [
        (("--signature", "warm.sig"), {}, "--signature"),
        (("--expect-digest", f"sha256:{'0' * 64}"), {}, "--expect-digest"),
        ((), {"CHATTERBOX_PREWARM_SIGNATURE": "warm.sig"}, "--signature"),
    ],
)
def test_options_for_the_manifest_are_refused_for_an_image(
    arguments: tuple[str, ...], env: dict[str, str], name: str, layout: Layout
) -> None:
    refused = run_cli("verify", "--image", f"oci:{layout.path}:base", *arguments, env={**os.environ, **env})
    assert refused.returncode == 2, refused.stderr
    assert f"{name} is checked against the manifest of a state" in refused.stderr
    assert "next:" in refused.stderr


@pytest.mark.programs
def test_evidence_is_only_attached_to_the_image_that_it_proves(
    layout: Layout, registry: Registry, h100: Path, tmp_path: Path
) -> None:
    target = f"{registry.address}/speech:warm"
    run_cli("append", "--base", f"oci:{layout.path}:base", "--to", target, "--warm", h100)
    evidence = tmp_path / "evidence.json"
    passed = {"passed": True, "set_digest": State.read(h100).manifest.set_digest, "checks": [], "observed": {}}
    for change, code in (({"passed": False}, 13), ({"set_digest": "0" * 64}, 12), ({"passed": None}, 13)):
        evidence.write_text(json.dumps({**passed, **change}))
        assert run_cli("attest", "--image", target, "--evidence", evidence).returncode == code
    evidence.write_text("{}")
    assert run_cli("attest", "--image", target, "--evidence", evidence).returncode == 16
    evidence.write_text(json.dumps(passed))
    for _ in range(2):  # attaching it again changes nothing
        attached = run_cli("attest", "--image", target, "--evidence", evidence)
        assert attached.returncode == 0, attached.stderr
    with open_store(parse(target)) as (store, name):
        subject = store.read_manifest(name)
        listed = json.loads(store.read_manifest(subject.digest.replace(":", "-")).raw)["manifests"]
        assert [entry["artifactType"] for entry in listed] == [EVIDENCE_TYPE]
        referrer = json.loads(store.read_manifest(listed[0]["digest"]).raw)
    assert referrer["subject"]["digest"] == subject.digest
    assert registry.blob(referrer["layers"][0]["digest"]).read_bytes() == evidence.read_bytes()


def test_a_registry_that_is_down_is_reported(layout: Layout, h100: Path) -> None:
    target = ("--to", "127.0.0.1:9/speech:warm", "--warm", h100)
    refused = run_cli("append", "--base", f"oci:{layout.path}:base", *target)
    assert refused.returncode == 14
    assert "127.0.0.1:9" in refused.stderr


@pytest.mark.programs
def test_the_benchmark_counts_the_blobs_that_an_append_sends(h100: Path, tmp_path: Path) -> None:
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is missing (Debian: apt-get install docker-registry)")
    output = tmp_path / "append.json"
    measured = run_benchmark("append", "--warm", h100, "--gigabytes", "1", "--rounds", "2", "--output", output)
    assert measured.returncode == 0, measured.stderr
    report = json.loads(output.read_text())
    assert report["base_bytes"] == 1_000_000_000
    for run in report["runs"]:
        assert run["blobs_sent"] == 2, "the new layer and the configuration"
        assert run["bytes_sent"] < 10_000
        assert run["peak_megabytes"] < 100
