"""`build`: bake in a container, export, append, prove and tag, and clean up after an interrupt."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.image import copy_context
from chatterbox_prewarm.families.bytecode import PACK_NAME, read_pack, write_pack
from chatterbox_prewarm.image.labels import EVIDENCE, read_states
from chatterbox_prewarm.state.signature import default_signature
from chatterbox_prewarm.state.signing import sign
from chatterbox_prewarm.state.state import State
from tests.conftest import ROOT, run_cli, writable_copy
from tests.helpers.keys import make_keys
from tests.helpers.states import make_state, rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The first test waits for the installation of the packages and a bake.
pytestmark = pytest.mark.timeout(900)

TAG = "chatterbox-prewarm-test:built"
#: A small random checkpoint, and a profile without compilation, which other tests cover.
ARGUMENTS = [
    *("--network", "host", "--profile", "eager"),
    *("--build-arg", "WEIGHTS=synthetic", "--build-arg", "SIZE=mini"),
    *("--build-arg", f"SOURCE_REVISION={'a' * 40}", "--build-arg", "BUILDER=a test"),
    *(("--secret", f"id=ca,src={os.environ['SSL_CERT_FILE']}") if os.environ.get("SSL_CERT_FILE") else ()),
]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the build context, so that a test can change a file."""
    return copy_context(ROOT, tmp_path_factory.mktemp("context") / "copy")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for the warm state and the evidence."""
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def built(docker: str, context: Path, place: Path) -> Iterator[subprocess.CompletedProcess[str]]:
    """The first build, which bakes, and replaces a signed state of another recipe."""
    names = [TAG, f"{TAG}-gpu"]
    make_state(place / "warm", {"numba": {"librosa/filters.nbi": b"index"}})
    sign(State.read(place / "warm"), make_keys(place)[0])
    subprocess.run([docker, "rmi", "--force", *names], capture_output=True, check=False)  # left by a killed run
    first = _build(context, place, "--evidence", place / "evidence.json")
    assert first.returncode == 0, first.stderr
    yield first
    subprocess.run([docker, "rmi", "--force", *names], capture_output=True, check=False)


def _build(
    context: Path, place: Path, *more: str | Path, tag: str = TAG, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = [*ARGUMENTS, *(() if "--target" in more else ("--levels", "1")), *more]
    return run_cli(
        "--progress", "build", "--tag", tag, "--checkout", context, "--warm", place / "warm", *arguments, env=env
    )


def _copy_state(place: Path, folder: Path) -> Path:
    """Copy the state of the first build to `folder`, where a build reuses it and a test may change it."""
    shutil.copy(place / "warm.recipe.json", folder)
    return writable_copy(place / "warm", folder / "warm")


def _ask(docker: str, *arguments: str) -> str:
    return subprocess.run([docker, *arguments], capture_output=True, text=True, check=True).stdout


def _config(docker: str, tag: str) -> dict[str, Any]:
    inspected: list[dict[str, Any]] = json.loads(_ask(docker, "inspect", tag))
    return inspected[0]


def _layers(docker: str, tag: str, output: str) -> list[str]:
    """Return the layers of an image, and check that the topmost is the one that the build printed."""
    (diff_id,) = re.findall(r"diff id (sha256:[0-9a-f]{64})", output)
    layers: list[str] = _config(docker, tag)["RootFS"]["Layers"]
    assert layers[-1] == diff_id
    return layers


def _leftovers(docker: str) -> list[str]:
    unproven = _ask(docker, "images", "--quiet", "chatterbox-prewarm-unproven").split()
    return unproven + _ask(docker, "ps", "--all", "--quiet").split()


def test_an_image_is_baked_in_a_container_proven_and_tagged(
    docker: str, built: subprocess.CompletedProcess[str], place: Path
) -> None:
    assert "proven" in built.stdout
    assert not default_signature(place / "warm").exists(), "it belongs to the replaced state"
    assert "the signature of the replaced state: sign the new one" in built.stderr
    evidence = (place / "evidence.json").read_text()
    assert json.loads(evidence)["passed"]
    assert json.loads(evidence)["observed"]["metrics"]["misses"] == {}
    assert json.loads(evidence)["observed"]["isolation"]["uid"] == 12345
    config = _config(docker, TAG)["Config"]
    digest = hashlib.sha256(evidence.encode()).hexdigest()
    assert config["Labels"]["io.chatterbox-prewarm.evidence"] == f"sha256:{digest}"
    (state,) = read_states(config["Labels"])
    assert state.profile == "eager"
    assert "CHATTERBOX_PREWARM_DEVICE=cpu" in config["Env"]
    assert config["User"] == "12345:12345"
    assert config["Entrypoint"] == ["python", "-m", "chatterbox_prewarm"]
    _layers(docker, TAG, built.stdout)
    assert _leftovers(docker) == []


def test_the_provenance_of_the_state_has_the_build_arguments(
    built: subprocess.CompletedProcess[str], place: Path
) -> None:
    assert built.returncode == 0
    provenance = State.read(place / "warm").manifest.provenance
    assert (provenance.revision, provenance.builder) == ("a" * 40, "a test")


def test_a_change_of_the_server_reuses_the_stored_state(
    docker: str, built: subprocess.CompletedProcess[str], context: Path, place: Path
) -> None:
    before = _layers(docker, TAG, built.stdout)
    changed = context / "chatterbox_prewarm" / "serve" / "http" / "server.py"
    changed.write_text(changed.read_text() + f"\n# {os.urandom(20).hex()}\n")
    rebuilt = _build(context, place, "--replace")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert "the stored state fits the image: no bake is needed" in rebuilt.stderr
    after = _layers(docker, TAG, rebuilt.stdout)
    assert after[-1] == before[-1], "the same state gives the same layer"
    assert after != before


@pytest.mark.usefixtures("built")
def test_an_image_for_a_gpu_that_is_baked_without_one_has_the_families_that_need_none(
    docker: str, context: Path, place: Path
) -> None:
    finished = _build(context, place, "--device", "cuda", "--route", "no-gpu", tag=f"{TAG}-gpu")
    assert finished.returncode == 0, finished.stderr
    assert "no bake is needed" in finished.stderr, "the recipe is the same as for a CPU"
    config = _config(docker, f"{TAG}-gpu")["Config"]
    assert "CHATTERBOX_PREWARM_DEVICE=cuda" in config["Env"]
    assert config["Labels"]["io.chatterbox-prewarm.gpu"] == "none"
    (state,) = read_states(config["Labels"])
    assert {family.name for family in state.families} == {"bytecode", "numba", "signal", "conditionals"}


@pytest.mark.usefixtures("built")
def test_a_matrix_builds_the_bakes_for_this_machine_and_reports_the_others(
    docker: str, context: Path, place: Path, tmp_path: Path
) -> None:
    matrix = tmp_path / "prewarm.toml"
    matrix.write_text(
        f'[image]\nbase = "unused:1"\ntarget = "{TAG}"\n'
        '[[bake]]\ngpus = ["NVIDIA L4"]\n[[bake]]\nprofiles = ["eager"]\nlevels = "1"\n'
    )
    name = "english-cpu-eager-float32"
    (tmp_path / "states").mkdir()
    shutil.copytree(place / "warm", tmp_path / "states" / name)  # has the same recipe
    shutil.copy(place / "warm.recipe.json", tmp_path / "states" / f"{name}.recipe.json")
    arguments = [word for word in ARGUMENTS if word not in {"--profile", "eager", "--levels", "1"}]
    finished = run_cli(
        *("--progress", "build", "--matrix", matrix, "--checkout", context, "--warm", tmp_path / "states", *arguments),
    )
    try:
        assert finished.returncode == 0, finished.stderr
        assert (
            "skipped, because it needs another machine: 0: english, NVIDIA L4, aot, float32: this machine has"
            in finished.stderr
        )
        assert f"{TAG}-{name}: proven" in finished.stdout
        (state,) = read_states(_config(docker, f"{TAG}-{name}")["Config"]["Labels"])
        assert state.profile == "eager"
        evidence = json.loads((tmp_path / "states" / f"{name}.evidence.json").read_text())
        assert evidence["set_digest"] == state.set_digest
    finally:
        subprocess.run([docker, "rmi", "--force", f"{TAG}-{name}"], capture_output=True, check=False)


@pytest.mark.usefixtures("built")
def test_an_image_with_a_miss_gets_no_tag(docker: str, context: Path, place: Path, tmp_path: Path) -> None:
    warm = _copy_state(place, tmp_path)
    pack = warm / "bytecode" / PACK_NAME
    modules = {source: bytes(code) for source, code in read_pack(pack).items()}
    del modules[next(source for source in modules if source.endswith("/torch/nn/functional.py"))]
    write_pack(pack, modules)
    rewrite(warm, rescan=True)  # the state is valid and fits, so `verify` finds no problem
    private, _ = make_keys(tmp_path)
    signature = sign(State.read(warm), private)
    tag = f"{TAG}-missed"
    try:
        before = {path: path.read_bytes() for path in warm.rglob("*") if path.is_file()}
        missed = _build(context, tmp_path, tag=tag)
        assert missed.returncode == 13, missed.stderr
        assert "the stored state fits the image: no bake is needed" in missed.stderr
        assert "bytecode was used (seen: " in missed.stderr
        assert "build with --rebake" in missed.stderr
        assert f"see every detail in {tmp_path / 'warm.evidence.json'}" in missed.stderr
        evidence = json.loads((tmp_path / "warm.evidence.json").read_text())
        assert not evidence["passed"]
        assert evidence["observed"]["metrics"]["misses"] == {"bytecode": 1}
        assert {path: path.read_bytes() for path in warm.rglob("*") if path.is_file()} == before
        assert signature.exists()
        assert _ask(docker, "images", "--quiet", tag) == ""
        assert _leftovers(docker) == []
    finally:
        subprocess.run([docker, "rmi", "--force", tag], capture_output=True, check=False)


@pytest.mark.usefixtures("built")
def test_a_state_with_the_signature_of_another_state_is_neither_shipped_nor_overwritten(
    docker: str, context: Path, place: Path, tmp_path: Path
) -> None:
    warm = _copy_state(place, tmp_path)
    private, _ = make_keys(tmp_path)
    signature = sign(State.read(warm), private)
    rewrite(warm, lambda raw: raw.update(created="2030-01-01T00:00:00+00:00"))
    refused = _build(context, tmp_path, tag=f"{TAG}-signed")
    assert refused.returncode == 12, refused.stderr
    assert "is of another manifest than" in refused.stderr
    assert signature.exists()
    assert _ask(docker, "images", "--quiet", f"{TAG}-signed") == ""
    assert _leftovers(docker) == []


@pytest.mark.usefixtures("built")
def test_an_existing_tag_is_refused_before_the_build_starts(context: Path, place: Path) -> None:
    refused = _build(context, place)
    assert refused.returncode == 16
    assert "exists already" in refused.stderr
    assert "docker build" not in refused.stderr


def test_a_dry_run_prints_the_plan_and_builds_nothing(docker: str, context: Path, tmp_path: Path) -> None:
    shown = _build(context, tmp_path, "--dry-run", tag=f"{TAG}-dry")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[:2] == ["route export: possible", "route dockerfile: possible"]
    assert lines[2].startswith("route no-gpu: not possible: --route no-gpu is for an image for a GPU")
    for word in ("engine: Docker", "--target cold", "--target tools", "bake --device cpu", f"tag: {TAG}-dry"):
        assert word in shown.stdout
    assert _ask(docker, "images", "--quiet", f"{TAG}-dry") == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--device", "cuda"], 14, "gives containers no GPU"),
        (["--device", "cuda", "--route", "dockerfile"], 14, "default runtime"),
        (["--route", "no-gpu"], 16, "for an image for a GPU"),
        (["--voice", "fox=/nowhere/fox.wav"], 16, "there is no clip"),
        (["--build-arg", "WEIGHTS"], 2, "has no value"),
        (["--build-arg", "BASE_DIGEST=debian:12"], 16, "is not the digest of an image"),
        (["--checkout", "/nowhere"], 16, "has no Dockerfile"),
    ],
)
def test_an_impossible_build_is_refused_before_it_starts(
    docker: str, arguments: list[str], code: int, message: str, context: Path, tmp_path: Path
) -> None:
    assert docker
    refused = _build(context, tmp_path, *arguments, tag=f"{TAG}-never")
    assert refused.returncode == code, refused.stderr
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_engine_is_reported(context: Path, tmp_path: Path) -> None:
    refused = _build(context, tmp_path, env={**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"})
    assert refused.returncode == 14
    assert "start the engine, or set DOCKER_HOST" in refused.stderr


def test_a_build_without_enough_disk_space_is_refused(context: Path, small_engine: str, tmp_path: Path) -> None:
    refused = _build(context, tmp_path, env={**os.environ, "DOCKER_HOST": small_engine})
    assert refused.returncode == 14, refused.stderr
    assert "GB left for images" in refused.stderr


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("sent", "step", "options"),
    [
        (signal.SIGINT, "--target cold", []),
        (signal.SIGINT, "cold start, warm-up and save", ["--rebake"]),
        (signal.SIGTERM, "cold start, warm-up and save", []),
        (signal.SIGTERM, "prove the image", []),
    ],
)
def test_an_interrupted_build_leaves_nothing_new(
    docker: str, context: Path, place: Path, tmp_path: Path, sent: int, step: str, options: list[str]
) -> None:
    """With `--rebake`, a stored state that fits is baked again; until the bake is done, it stays."""
    command = [sys.executable, "-m", "chatterbox_prewarm", "--progress", "build", "--tag", f"{TAG}-interrupted"]
    command += ["--checkout", str(context), "--warm", str(tmp_path / "warm"), *ARGUMENTS, *options]
    kept = {".warm.lock"}
    if step.startswith("prove") or options:
        shutil.copytree(place / "warm", tmp_path / "warm")
        shutil.copy(place / "warm.recipe.json", tmp_path)
        kept |= {"warm", "warm.recipe.json"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if step in line:
                    break
            time.sleep(1)
            process.send_signal(sent)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode in {130, 143}
    if step.startswith("--target"):
        time.sleep(5)  # BuildKit in Docker 20.10 can panic if it is still cancelling a build when the next one begins
    assert _leftovers(docker) == []
    assert _ask(docker, "images", "--quiet", f"{TAG}-interrupted") == ""
    left = {path.name for path in tmp_path.iterdir()}
    assert kept - {".warm.lock"} <= left <= kept


def test_an_image_for_gpus_that_the_engine_lacks_gets_its_tag_without_a_proof(
    docker: str,
    context: Path,
    built: subprocess.CompletedProcess[str],
    tmp_path: Path,
) -> None:
    assert built.returncode == 0, "its stages are in the builder's cache"
    tag, gpu = f"{TAG}-h200", ("--device", "cuda", "--profile", "aot", "--t3-dtype", "bfloat16", "--target")
    for arguments, code, words in (
        (["l4", "--target", "H2000"], 16, "perhaps NVIDIA H200"),
        (["l4", "--evidence", tmp_path / "evidence.json"], 2, "--evidence cannot be used with --target"),
    ):
        refused = _build(context, tmp_path, *gpu, *arguments, tag=tag)
        assert refused.returncode == code, refused.stderr
        assert words in refused.stderr
    try:
        made = _build(context, tmp_path, *gpu, "h200", "--target", "sm_90", tag=tag)
        assert made.returncode == 0, made.stderr
        assert f"{tag}: unproven. On a machine with the GPU: prove --image {tag}" in made.stdout
        config = _config(docker, tag)["Config"]
        assert "CHATTERBOX_PREWARM_DEVICE=cuda" in config["Env"]
        states = read_states(config["Labels"])
        found = [(state.gpu, state.compute_capability, state.cross_compiled) for state in states]
        assert found == [("absent", "9.0", True), ("NVIDIA H200", "9.0", True)]
        assert {path.name for path in (tmp_path / "warm").iterdir()} == {state.key for state in states}
        assert all("bfloat16" in state.key for state in states)
        assert "target sm_90, with the same packages" in made.stderr
        one, other = (State.read(tmp_path / "warm" / state.key).manifest.files for state in states)
        assert {file for file in one if file.path[:4] == "aot/"} == {file for file in other if file.path[:4] == "aot/"}
        assert EVIDENCE not in config["Labels"]
        assert not (tmp_path / "warm.evidence.json").exists()
        plan = _build(context, tmp_path, *gpu, "h200", "--target", "sm_90", "--replace", "--dry-run", tag=tag)
        assert "state: a new bake" in plan.stdout, "whether the stored state still fits cannot be checked here"
        assert "no proof, which needs the GPU" in plan.stdout
    finally:
        subprocess.run([docker, "rmi", "--force", tag], capture_output=True, check=False)
    assert _leftovers(docker) == []
