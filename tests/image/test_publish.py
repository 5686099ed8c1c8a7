"""`publish`: bake, prove, add to an image and attach the evidence, in one process without an engine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.image.append import TagMovedError, append
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.labels import read_states
from chatterbox_prewarm.image.oci import OCI_INDEX, Document, dump
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.publish import _add
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.state_layers import gather
from chatterbox_prewarm.proof.checks import default_evidence
from chatterbox_prewarm.state.manifest import read_manifest
from tests.conftest import run_cli
from tests.helpers.images import make_base
from tests.helpers.states import make_state_for, rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.append import Appended

STACK = ".".join(version("torch").split(".")[:2])
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "550.54.15"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "layout")
    labels = {"io.chatterbox-prewarm.torch": f"torch-{STACK}", "io.chatterbox-prewarm.variant": "english"}
    make_base(made, "cold", Labels=labels)
    return made


def write(layout: Layout, folder: Path, bake: str) -> Path:
    matrix = folder / "prewarm.toml"
    image = f'[image]\nbase = "oci:{layout.path}:cold"\ntarget = "oci:{layout.path}:warm"\n'
    matrix.write_text(f'{image}[[bake]]\nlevels = "1"\n{bake}')
    return matrix


def evidence_of(warm: Path, **change: Any) -> Path:
    """Evidence as a proof of the state that passed would write it."""
    path = default_evidence(warm)
    found = {"passed": True, "set_digest": read_manifest(warm).set_digest, "checks": [], "observed": {}}
    path.write_text(json.dumps({**found, **change}))
    return path


def test_a_node_bakes_proves_and_adds_its_state_to_an_image(layout: Layout, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    assert run_cli("weights", "synthesize", weights, "--size", "mini").returncode == 0
    matrix = write(layout, tmp_path, 'profiles = ["eager"]')
    arguments: list[str | Path] = ["publish", "--matrix", matrix, "--index", "0", "--weights", weights]
    arguments += ["--warm", tmp_path / "warm", "--cache", tmp_path / "cache"]
    made = run_cli(*arguments)
    assert made.returncode == 0, made.stderr
    image = resolve(layout, "warm", platform="linux/amd64")
    (state,) = read_states(image.labels)
    assert state.profile == "eager"
    evidence = json.loads((tmp_path / "warm.evidence.json").read_text())
    assert evidence["passed"]
    assert evidence["set_digest"] == state.set_digest
    subject = layout.read_manifest("warm").digest
    assert layout.has_manifest(subject.replace(":", "-")), "the evidence is listed beside the image"
    again = run_cli(*arguments)
    assert again.returncode == 0, again.stderr
    assert "already, from an earlier attempt" in again.stderr
    assert layout.read_manifest("warm").digest == subject


def test_another_gpu_than_the_one_asked_for_is_refused_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    matrix = write(layout, tmp_path, 'gpus = ["NVIDIA H100 80GB HBM3"]')
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 11
    assert "the bake is for 'NVIDIA H100 80GB HBM3'" in refused.stderr
    assert not (tmp_path / "warm").exists()
    assert not layout.has_manifest("warm")


def test_a_base_that_cannot_be_read_is_said_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    matrix = write(layout, tmp_path, 'profiles = ["eager"]')
    matrix.write_text(matrix.read_text().replace(":cold", ":none"))
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 14
    assert not (tmp_path / "warm").exists()


def test_a_target_of_several_platforms_is_refused_before_the_bake(layout: Layout, tmp_path: Path) -> None:
    index = dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})
    layout.put_manifest(Document(media_type=OCI_INDEX, raw=index), "warm")
    matrix = write(layout, tmp_path, 'profiles = ["eager"]')
    refused = run_cli("publish", "--matrix", matrix, "--index", "0", "--warm", tmp_path / "warm")
    assert refused.returncode == 16, refused.stderr
    assert "an index, of images for several platforms" in refused.stderr
    assert not (tmp_path / "warm").exists()


def test_a_tag_that_moved_meanwhile_is_not_taken(layout: Layout, tmp_path: Path) -> None:
    make_state_for(tmp_path / "l4", {**L4, "torch": f"{STACK}.0"})
    base, target = parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm")
    with gather([tmp_path / "l4"]) as addition:
        first = append(base, target, addition)
        with pytest.raises(TagMovedError, match="has moved from sha256:0000"):
            append(base, target, addition, expected=f"sha256:{'0' * 64}")
        with pytest.raises(TagMovedError, match="has moved from nothing"):
            append(base, target, addition, expected="")
        assert layout.read_manifest("warm").digest == first.document.digest
        append(base, target, addition, expected=first.document.digest)
        with pytest.raises(BadInputError, match="already"):
            append(base, target, addition)


def test_an_image_has_its_evidence_before_its_tag(layout: Layout, tmp_path: Path) -> None:
    make_state_for(tmp_path / "l4", {**L4, "torch": f"{STACK}.0"})
    base, target = parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm")
    with gather([tmp_path / "l4"]) as addition:
        other = evidence_of(tmp_path / "l4", set_digest="0" * 64)
        with pytest.raises(IntegrityError, match="does not have"):
            _add(base, target, addition, other, insecure=None, say=print)
        assert not layout.has_manifest("warm"), "what cannot be attached leaves no tag"
        made = _add(base, target, addition, evidence_of(tmp_path / "l4"), insecure=None, say=print)
    assert made is not None
    assert layout.read_manifest("warm").digest == made.document.digest
    (listed,) = json.loads(layout.read_manifest(made.document.digest.replace(":", "-")).raw)["manifests"]
    assert json.loads(layout.read_manifest(listed["digest"]).raw)["subject"]["digest"] == made.document.digest


def test_another_state_for_the_same_machine_is_not_taken_for_the_one_that_was_baked(
    layout: Layout, tmp_path: Path
) -> None:
    base, target = parse(f"oci:{layout.path}:cold"), parse(f"oci:{layout.path}:warm")
    facts = {**L4, "torch": f"{STACK}.0"}
    make_state_for(tmp_path / "first", facts)
    make_state_for(tmp_path / "again", facts, code=b"other bytes")  # a compiler need not give the same twice
    make_state_for(tmp_path / "later", facts)
    rewrite(tmp_path / "later", lambda raw: raw["weights"].update(set_digest="e" * 64))
    make_state_for(tmp_path / "voice", facts, code=b"with a voice")
    rewrite(tmp_path / "voice", lambda raw: raw["provenance"]["parameters"].update({"voice:fox": "sha256:1"}))

    def add(name: str) -> Appended | None:
        with gather([tmp_path / name]) as addition:
            return _add(base, target, addition, evidence_of(tmp_path / name), insecure=None, say=print)

    assert add("first") is not None
    before = layout.read_manifest("warm").digest
    assert add("first") is None
    assert add("again") is None
    for name in ("later", "voice"):
        with pytest.raises(BadInputError, match="another state for this machine and software") as caught:
            add(name)
        assert "name a new target" in caught.value.next_step
    assert layout.read_manifest("warm").digest == before


def test_nodes_that_add_to_one_image_at_once_all_end_in_it(layout: Layout, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from chatterbox_prewarm.image.state_layers import gather\n"
        "from chatterbox_prewarm.image.publish import _add\n"
        "from chatterbox_prewarm.image.references import parse\n"
        "from chatterbox_prewarm.proof.checks import default_evidence\n"
        "state, base, target = Path(sys.argv[1]), parse(sys.argv[2]), parse(sys.argv[3])\n"
        "with gather([state]) as addition:\n"
        "    _add(base, target, addition, default_evidence(state), insecure=None, say=print)\n"
    )
    gpus = [f"NVIDIA L{number}" for number in range(4)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number, gpu in enumerate(gpus):
            make_state_for(tmp_path / str(number), {**L4, "gpu": gpu, "torch": f"{STACK}.0"})
            evidence_of(tmp_path / str(number))
            command = [sys.executable, "-c", program, str(tmp_path / str(number))]
            command += [f"oci:{layout.path}:cold", f"oci:{layout.path}:warm"]
            processes.append(stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for process in processes:
            assert process.wait(60) == 0, process.communicate()[1]
    image = resolve(layout, "warm", platform="linux/amd64")
    assert len(read_states(image.labels)) == len(gpus)
    assert image.labels["io.chatterbox-prewarm.gpu"] == ", ".join(gpus)
