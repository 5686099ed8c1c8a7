"""`publish`: bake, prove, append and attach the evidence in one process, without an engine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.image.append import AppendOptions, TagMovedError, append, send
from chatterbox_prewarm.image.attest import attach_evidence
from chatterbox_prewarm.image.compose import Change, add_layers, resolve
from chatterbox_prewarm.image.image_states import image_with_states
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.image.node_fit import compare_with_node
from chatterbox_prewarm.image.oci import image_index
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.publish import add_to_image
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.state_layers import pack_states
from chatterbox_prewarm.proof.checks import default_evidence
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.state.state import State
from tests.conftest import run_cli
from tests.helpers.images import layer_of, make_base
from tests.helpers.states import make_state_for, mark_cross_compiled, rewrite

if TYPE_CHECKING:
    from chatterbox_prewarm.image.append import AppendResult
    from chatterbox_prewarm.image.oci import Image

STACK = ".".join(version("torch").split(".")[:2])
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "550.54.15"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    labels = {"io.chatterbox-prewarm.torch": f"torch-{STACK}", "io.chatterbox-prewarm.variant": "english"}
    # A state is baked in a container of the base, so the base has the Python of the bake.
    make_base(layout, "cold", Labels=labels, Env=[f"PATH={Path(sys.executable).parent}:/bin"])
    return layout


def write_matrix(layout: Layout, folder: Path, bake: str) -> Path:
    matrix = folder / "prewarm.toml"
    image = f'[image]\nbase = "oci:{layout.path}:cold"\ntarget = "oci:{layout.path}:warm"\n'
    matrix.write_text(f'{image}[[bake]]\nlevels = "1"\n{bake}')
    return matrix


def write_evidence(warm: Path, **change: Any) -> Path:
    """Write the evidence of a proof of this state that passed."""
    path = default_evidence(warm)
    evidence = {"passed": True, "set_digest": State.read(warm).manifest.set_digest, "checks": [], "observed": {}}
    path.write_text(json.dumps({**evidence, **change}))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_state_is_baked_proven_and_added_to_an_image(layout: Layout, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    assert run_cli("weights", "synthesize", weights, "--size", "mini").returncode == 0
    matrix = write_matrix(layout, tmp_path, 'profiles = ["eager"]')
    arguments: list[str | Path] = ["publish", "--matrix", matrix, "--index", "0", "--weights", weights]
    arguments += ["--warm", tmp_path / "warm", "--cache", tmp_path / "cache"]
    published = run_cli(*arguments)
    assert published.returncode == 0, published.stderr
    image = resolve(layout, "warm", platform="linux/amd64")
    (state,) = read_states(image.labels)
    assert state.profile == "eager"
    evidence = json.loads((tmp_path / "warm.evidence.json").read_text())
    assert evidence["passed"]
    assert evidence["set_digest"] == state.set_digest
    subject = layout.read_manifest("warm").digest
    assert layout.has_manifest(subject.replace(":", "-")), "the evidence is listed as a referrer of the image"
    proven = run_cli("publish", "--prove-only", f"oci:{layout.path}:warm", *arguments[5:])
    assert proven.returncode == 0, proven.stderr
    assert "ok   the audio is identical to the bake" in proven.stderr
    assert layout.read_manifest("warm").digest == subject, "the image does not change"
    listed = json.loads(layout.read_manifest(subject.replace(":", "-")).raw)["manifests"]
    assert len(listed) == 2
    assert f"evidence attached as {listed[1]['digest']}" in proven.stdout


def test_an_image_is_proven_only_where_its_evidence_can_be_attached(layout: Layout, tmp_path: Path) -> None:
    for name in ("here", "elsewhere"):
        make_state_for(tmp_path / name, {**L4, "torch": f"{STACK}.0"}, code=name.encode())
    with pack_states([tmp_path / "elsewhere"]) as states:
        append(parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm"), states)
    layout.put_manifest(image_index([]), "several")
    here = ("--warm", tmp_path / "here")
    for image, code, words in (
        (f"oci:{layout.path}:warm", 12, "does not have any state of"),
        (f"oci:{layout.path}:cold", 14, "the image has no label"),
        (f"oci:{layout.path}:several", 14, "is an index of several images"),
        (f"docker-archive:{tmp_path}/image.tar", 16, "an archive, which cannot have evidence"),
    ):
        refused = run_cli("publish", "--prove-only", image, *here)
        assert refused.returncode == code, refused.stderr
        assert words in refused.stderr
        assert "prove in a fresh process" not in refused.stderr
    for arguments, words in (
        (("--prove-only", f"oci:{layout.path}:warm", "--index", "0"), "--index cannot be used with --prove-only"),
        (("--state", "here"), "--state needs --prove-only"),
    ):
        refused = run_cli("publish", *arguments, *here)
        assert refused.returncode == 2, refused.stderr
        assert words in refused.stderr


def test_a_state_that_was_compiled_without_its_gpu_is_proven_when_its_image_has_the_evidence(
    layout: Layout, tmp_path: Path
) -> None:
    """Uses the image of a plain `docker build`, whose labels do not describe its states."""
    for name in ("l4", "h100"):
        make_state_for(tmp_path / name, {**L4, "gpu": f"NVIDIA {name.upper()}"})
        mark_cross_compiled(tmp_path / name)
    folder = "opt/chatterbox-prewarm/warm"
    manifests = {name: (tmp_path / name / MANIFEST_NAME).read_bytes() for name in ("l4", "h100")}
    layer = layer_of({f"{folder}/{name}/manifest.json": content for name, content in manifests.items()})
    base = make_base(layout, "base", Labels={"io.chatterbox-prewarm.profile": "aot"})
    send(add_layers(base, [layer], Change(), created=""), layout, [layer], layout, "plain")

    def read() -> Image:
        return image_with_states(parse(f"oci:{layout.path}:plain"), platform="linux/amd64", insecure=None)[1]

    assert [state.proven for state in read_states(read().labels)] == [False, False]
    attach_evidence(layout, "plain", write_evidence(tmp_path / "h100"))  # of an unknown state
    observed = {"metrics": {"state": State.read(tmp_path / "l4").key}}
    digest = attach_evidence(layout, "plain", write_evidence(tmp_path / "l4", observed=observed))
    assert json.loads(layout.read_manifest(digest).raw)["subject"]["digest"] == layout.read_manifest("plain").digest
    proven = {state.gpu: state.proven for state in read_states(read().labels)}
    assert proven == {"NVIDIA L4": True, "NVIDIA H100": False}, "both have the same files"
    host = {**L4, "device": "cuda", "torch": "2.6.0"}
    assert "  compiled without the GPU, and proven since then" in compare_with_node(read(), host).lines()
    assert "  compiled without the GPU, unproven" in compare_with_node(read(), {**host, "gpu": "NVIDIA H100"}).lines()
    assert "proven" not in "".join(resolve(layout, "plain").labels.values())


def test_another_gpu_is_refused_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    matrix = write_matrix(layout, tmp_path, 'gpus = ["NVIDIA H100 80GB HBM3"]')
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 11
    assert "the bake is for 'NVIDIA H100 80GB HBM3'" in refused.stderr
    assert not (tmp_path / "warm").exists()
    assert not layout.has_manifest("warm")


def test_a_missing_base_is_reported_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    matrix = write_matrix(layout, tmp_path, 'profiles = ["eager"]')
    matrix.write_text(matrix.read_text().replace(":cold", ":none"))
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 14
    assert not (tmp_path / "warm").exists()


def test_a_target_for_several_platforms_is_refused_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    layout.put_manifest(image_index([]), "warm")
    matrix = write_matrix(layout, tmp_path, 'profiles = ["eager"]')
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 16, refused.stderr
    assert "is an index of images for several platforms" in refused.stderr
    assert not (tmp_path / "warm").exists()


def test_an_archive_as_the_target_is_refused_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    matrix = write_matrix(layout, tmp_path, 'profiles = ["eager"]')
    matrix.write_text(matrix.read_text().replace(f"oci:{layout.path}:warm", f"docker-archive:{tmp_path}/image.tar:a:1"))
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 16, refused.stderr
    assert "is not a tag that states can be added to" in refused.stderr
    assert not (tmp_path / "warm").exists()


def test_a_tag_that_moved_during_the_append_is_not_replaced(layout: Layout, tmp_path: Path) -> None:
    make_state_for(tmp_path / "l4", {**L4, "torch": f"{STACK}.0"})
    base, target = parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm")
    with pack_states([tmp_path / "l4"]) as states:
        first = append(base, target, states)
        with pytest.raises(TagMovedError, match="has moved from sha256:0000"):
            append(base, target, states, AppendOptions(expected=f"sha256:{'0' * 64}"))
        with pytest.raises(TagMovedError, match="has moved from nothing"):
            append(base, target, states, AppendOptions(expected=""))
        assert layout.read_manifest("warm").digest == first.document.digest
        append(base, target, states, AppendOptions(expected=first.document.digest))
        with pytest.raises(BadInputError, match="already"):
            append(base, target, states)


def test_evidence_is_attached_before_the_tag_is_set(layout: Layout, tmp_path: Path) -> None:
    make_state_for(tmp_path / "l4", {**L4, "torch": f"{STACK}.0"})
    base, target = parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm")
    with pack_states([tmp_path / "l4"]) as states:
        other = write_evidence(tmp_path / "l4", set_digest="0" * 64)
        with pytest.raises(IntegrityError, match="does not have"):
            add_to_image(base, target, states, AppendOptions(evidence=other))
        assert not layout.has_manifest("warm"), "no tag is set without evidence"
        published = add_to_image(base, target, states, AppendOptions(evidence=write_evidence(tmp_path / "l4")))
    assert layout.read_manifest("warm").digest == published.document.digest
    (listed,) = json.loads(layout.read_manifest(published.document.digest.replace(":", "-")).raw)["manifests"]
    assert json.loads(layout.read_manifest(listed["digest"]).raw)["subject"]["digest"] == published.document.digest


def test_another_state_for_the_same_machine_is_refused(layout: Layout, tmp_path: Path) -> None:
    base, target = parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm")
    facts = {**L4, "torch": f"{STACK}.0"}
    make_state_for(tmp_path / "first", facts)
    make_state_for(tmp_path / "repeated", facts, code=b"other bytes")  # compilers are not deterministic
    make_state_for(tmp_path / "other weights", facts)
    rewrite(tmp_path / "other weights", lambda raw: raw["weights"].update(set_digest="e" * 64))
    make_state_for(tmp_path / "other voice", facts, code=b"with a voice")
    rewrite(tmp_path / "other voice", lambda raw: raw["provenance"]["parameters"].update({"voice:fox": "sha256:1"}))

    def add(name: str) -> AppendResult:
        with pack_states([tmp_path / name]) as states:
            return add_to_image(base, target, states, AppendOptions(evidence=write_evidence(tmp_path / name)))

    assert add("first").blobs_sent > 0
    before = layout.read_manifest("warm").digest
    for name in ("first", "repeated"):
        again = add(name)
        assert (again.document.digest, again.blobs_sent, again.bytes_sent) == (before, 0, 0)
    for name in ("other weights", "other voice"):
        with pytest.raises(BadInputError, match="another state for this machine and software") as caught:
            add(name)
        assert "name a new target" in caught.value.next_step
    assert layout.read_manifest("warm").digest == before


def test_concurrent_publishers_all_add_their_state_to_one_image(layout: Layout, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from chatterbox_prewarm.image.append import AppendOptions\n"
        "from chatterbox_prewarm.image.state_layers import pack_states\n"
        "from chatterbox_prewarm.image.publish import add_to_image\n"
        "from chatterbox_prewarm.image.references import parse\n"
        "from chatterbox_prewarm.proof.checks import default_evidence\n"
        "state, base, target = Path(sys.argv[1]), parse(sys.argv[2]), parse(sys.argv[3])\n"
        "with pack_states([state]) as states:\n"
        "    add_to_image(base, target, states, AppendOptions(evidence=default_evidence(state)))\n"
    )
    gpus = [f"NVIDIA L{number}" for number in range(4)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number, gpu in enumerate(gpus):
            make_state_for(tmp_path / str(number), {**L4, "gpu": gpu, "torch": f"{STACK}.0"})
            write_evidence(tmp_path / str(number))
            command = [sys.executable, "-c", program, str(tmp_path / str(number))]
            command += [f"oci:{layout.path}:cold", f"oci:{layout.path}:warm"]
            processes.append(stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for process in processes:
            assert process.wait(60) == 0, process.communicate()[1]
    image = resolve(layout, "warm", platform="linux/amd64")
    assert len(read_states(image.labels)) == len(gpus)
    assert image.labels["io.chatterbox-prewarm.gpu"] == ", ".join(gpus)
