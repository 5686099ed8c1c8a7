"""`prewarm.toml`: the bakes of a matrix, the builds on one machine, and invalid files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError
from chatterbox_prewarm.image.build_request import BuildRequest
from chatterbox_prewarm.image.matrix import read_matrix, select_builds
from tests.conftest import ROOT, run_cli

IMAGE = """
[image]
base = "registry.example.com/speech:cold"
target = "registry.example.com/speech:1"
"""
MATRIX = f"""{IMAGE}
[[bake]]
gpus = ["NVIDIA H100 80GB HBM3", "L4"]
profiles = ["aot", "compiled"]
voices = {{ fox = "clips/fox.wav" }}

[[bake]]
profiles = ["eager"]
t3_dtype = "bfloat16"
levels = "1"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "prewarm.toml"
    path.write_text(text)
    return path


def test_each_combination_is_a_bake_in_the_order_of_the_file(tmp_path: Path) -> None:
    matrix = read_matrix(write(tmp_path, MATRIX))
    assert (matrix.base, matrix.target) == ("registry.example.com/speech:cold", "registry.example.com/speech:1")
    assert [(bake.gpu, bake.profile, bake.device) for bake in matrix.bakes] == [
        ("NVIDIA H100 80GB HBM3", "aot", "cuda"),
        ("NVIDIA H100 80GB HBM3", "compiled", "cuda"),
        ("NVIDIA L4", "aot", "cuda"),
        ("NVIDIA L4", "compiled", "cuda"),
        ("", "eager", "cpu"),
    ]
    assert matrix.bakes[0].voices == {"fox": tmp_path / "clips" / "fox.wav"}
    assert (matrix.bakes[-1].t3_dtype, matrix.bakes[-1].levels, matrix.bakes[-1].voices) == ("bfloat16", "1", {})
    assert {bake.variant for bake in matrix.bakes} == {"english"}


def test_the_bakes_are_listed_with_their_numbers(tmp_path: Path) -> None:
    listed = run_cli("publish", "--list", "--matrix", write(tmp_path, MATRIX))
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.splitlines()[1] == "1: english, NVIDIA H100 80GB HBM3, compiled, float32, fox"
    assert listed.stdout.splitlines()[4] == "4: english, CPU, eager, bfloat16, no added voices"
    document = json.loads(run_cli("publish", "--list", "--json", "--matrix", tmp_path / "prewarm.toml").stdout)
    assert [bake["index"] for bake in document["bakes"]] == [0, 1, 2, 3, 4]
    titles = {"index": 1, "title": "english, NVIDIA H100 80GB HBM3, compiled, float32", "voices": ["fox"]}
    assert document["bakes"][1] == titles
    refused = run_cli("publish", "--matrix", tmp_path / "prewarm.toml", "--index", "5")
    assert refused.returncode == 2
    assert "has 5 bakes" in refused.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image = ", "not TOML"),
        ("[[bake]]", r"\[image\]"),
        (IMAGE, r"no table \[\[bake\]\]"),
        (f"bake = 1{IMAGE}", r"no table \[\[bake\]\]"),
        (f"{IMAGE}tag = 'x'\n[[bake]]", "exactly the keys `base` and `target`"),
        (f"{IMAGE}[[bake]]\ngpu = 'L4'", "the unknown key 'gpu'"),
        (f"{IMAGE}[[bake]]\nvariants = ['klingon']", "'klingon'; choose from: english"),
        (f"{IMAGE}[[bake]]\nprofiles = 'aot'", "must be a list of texts"),
        (f"{IMAGE}[[bake]]\ngpus = [1]", "must be a list of texts"),
        (f"{IMAGE}[[bake]]\ngpus = ['H100']", "the name of several GPUs"),
        (f"{IMAGE}[[bake]]\nlevels = 1", "must be text"),
        (f"{IMAGE}[[bake]]\nvoices = ['fox.wav']", "must be a table of names and clips"),
        (f"{IMAGE}[[bake]]\nvoices = {{ 'a/b' = 'fox.wav' }}", "a/b"),
        (f"{IMAGE}[[bake]]\n[[bake]]", "two of its bakes have the same variant, GPU and profile"),
        (f"{IMAGE}[[bake]]\n[more]", "an unknown table 'more'"),
        ("[image]\nbase = 1\ntarget = ''\n[[bake]]", "must be names of images"),
    ],
)
def test_an_invalid_matrix_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        read_matrix(write(tmp_path, text))


def test_a_missing_matrix_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file"):
        read_matrix(tmp_path / "prewarm.toml")


def template(**fields: Any) -> BuildRequest:
    settings: dict[str, Any] = {
        "checkout": Path(),
        "tag": "",
        "warm": Path("out"),
        "device": "cpu",
        "route": "export",
        "builder": "buildkit",
        "profile": "aot",
        "t3_dtype": "float32",
        "levels": "1,2,3",
        "voices": {},
        "arguments": {"STACK": "torch-2.6"},
        "secrets": (),
        "network": "default",
        "replacing": False,
        "rebake": False,
    }
    return BuildRequest(**{**settings, **fields})


def test_a_machine_builds_the_bakes_for_its_gpu_and_for_the_cpu_and_reports_the_others(tmp_path: Path) -> None:
    matrix = read_matrix(write(tmp_path, MATRIX))
    requests, skipped = select_builds(matrix, template(), gpu="NVIDIA L4")
    assert [request.tag for request in requests] == [
        "registry.example.com/speech:1-english-nvidia-l4-aot-float32",
        "registry.example.com/speech:1-english-nvidia-l4-compiled-float32",
        "registry.example.com/speech:1-english-cpu-eager-bfloat16",
    ]
    first, _, last = requests
    assert (first.device, first.profile, first.voices) == ("cuda", "aot", {"fox": tmp_path / "clips" / "fox.wav"})
    assert (last.device, last.t3_dtype, last.levels, last.voices) == ("cpu", "bfloat16", "1", {})
    assert first.warm == Path("out/english-nvidia-l4-aot-float32")
    assert first.arguments == {"STACK": "torch-2.6", "VARIANT": "english"}
    assert skipped == [
        "0: english, NVIDIA H100 80GB HBM3, aot, float32: this machine has the GPU NVIDIA L4",
        "1: english, NVIDIA H100 80GB HBM3, compiled, float32: this machine has the GPU NVIDIA L4",
    ]


def test_a_machine_without_a_gpu_skips_the_bakes_for_gpus_unless_the_route_needs_none(tmp_path: Path) -> None:
    matrix = read_matrix(write(tmp_path, MATRIX))
    requests, skipped = select_builds(matrix, template(tag="127.0.0.1:5000/speech"), gpu="absent")
    assert [request.tag for request in requests] == ["127.0.0.1:5000/speech:english-cpu-eager-bfloat16"]
    assert len(skipped) == 4
    assert all(line.endswith(": this machine has no GPU") for line in skipped)
    requests, skipped = select_builds(matrix, template(route="no-gpu"), gpu="absent")
    assert [request.device for request in requests] == ["cuda"] * 4
    assert skipped == ["4: english, CPU, eager, bfloat16: --route no-gpu is only for images for a GPU"]
    l4_only = read_matrix(write(tmp_path, f'{IMAGE}[[bake]]\ngpus = ["NVIDIA L4"]\n'))
    with pytest.raises(FingerprintMismatchError, match="can do no bake of the matrix: 0: english, NVIDIA L4"):
        select_builds(l4_only, template(), gpu="absent")


def test_options_that_the_matrix_sets_are_refused_together_with_it(tmp_path: Path) -> None:
    matrix = write(tmp_path, MATRIX)
    for option, value in (("--profile", "eager"), ("--voice", "fox=fox.wav"), ("--evidence", str(tmp_path / "e.json"))):
        refused = run_cli("build", "--matrix", matrix, option, value, "--checkout", ROOT)
        assert refused.returncode == 2, refused.stderr
        assert f"{option} cannot be used with --matrix" in refused.stderr
    missing = run_cli("build", "--checkout", ROOT)
    assert missing.returncode == 2
    assert "--tag" in missing.stderr
