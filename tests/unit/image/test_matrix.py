"""`prewarm.toml`: what a matrix of bakes means, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError
from chatterbox_prewarm.image.build_request import Request
from chatterbox_prewarm.image.matrix import read
from chatterbox_prewarm.image.matrix_builds import series
from tests.conftest import ROOT, run_cli

IMAGE = """
[image]
base = "registry.example.com/speech:cold"
target = "registry.example.com/speech:1"
"""
MATRIX = f"""{IMAGE}
[[bake]]
gpus = ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
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


def test_every_combination_is_a_bake_in_the_order_of_the_file(tmp_path: Path) -> None:
    matrix = read(write(tmp_path, MATRIX))
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
    assert listed.stdout.splitlines()[4] == "4: english, CPU, eager, bfloat16, no more voices"
    refused = run_cli("publish", "--matrix", tmp_path / "prewarm.toml", "--index", "5")
    assert refused.returncode == 16
    assert "has 5 bakes" in refused.stderr


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("image = ", "not TOML"),
        ("[[bake]]", r"\[image\]"),
        (IMAGE, r"no table \[\[bake\]\]"),
        (f"bake = 1{IMAGE}", r"no table \[\[bake\]\]"),
        (f"{IMAGE}tag = 'x'\n[[bake]]", "just `base` and `target`"),
        (f"{IMAGE}[[bake]]\ngpu = 'L4'", "the key 'gpu'"),
        (f"{IMAGE}[[bake]]\nvariants = ['klingon']", "'klingon'; there are: english"),
        (f"{IMAGE}[[bake]]\nprofiles = 'aot'", "no list of texts"),
        (f"{IMAGE}[[bake]]\ngpus = [1]", "no list of texts"),
        (f"{IMAGE}[[bake]]\nlevels = 1", "no text"),
        (f"{IMAGE}[[bake]]\nvoices = ['fox.wav']", "no table of names and clips"),
        (f"{IMAGE}[[bake]]\nvoices = {{ 'a/b' = 'fox.wav' }}", "a/b"),
        (f"{IMAGE}[[bake]]\n[[bake]]", "two of its bakes"),
        (f"{IMAGE}[[bake]]\n[more]", "a table 'more'"),
        ("[image]\nbase = 1\ntarget = ''\n[[bake]]", "names of images"),
    ],
)
def test_what_is_no_matrix_is_refused(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=word):
        read(write(tmp_path, text))


def test_a_matrix_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file"):
        read(tmp_path / "prewarm.toml")


def template(**fields: Any) -> Request:
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
    return Request(**{**settings, **fields})


def test_of_a_matrix_a_machine_builds_what_it_has_the_gpu_for_and_says_what_is_left(tmp_path: Path) -> None:
    matrix = read(write(tmp_path, MATRIX))
    found = series(matrix, template(), gpu="NVIDIA L4")
    assert [request.tag for request in found.requests] == [
        "registry.example.com/speech:1-english-nvidia-l4-aot-float32",
        "registry.example.com/speech:1-english-nvidia-l4-compiled-float32",
        "registry.example.com/speech:1-english-cpu-eager-bfloat16",
    ]
    first, _, last = found.requests
    assert (first.device, first.profile, first.voices) == ("cuda", "aot", {"fox": tmp_path / "clips" / "fox.wav"})
    assert (last.device, last.t3_dtype, last.levels, last.voices) == ("cpu", "bfloat16", "1", {})
    assert first.warm == Path("out/english-nvidia-l4-aot-float32")
    assert first.arguments == {"STACK": "torch-2.6", "VARIANT": "english"}
    assert found.left == (
        "0: english, NVIDIA H100 80GB HBM3, aot, float32: this machine has the GPU NVIDIA L4",
        "1: english, NVIDIA H100 80GB HBM3, compiled, float32: this machine has the GPU NVIDIA L4",
    )


def test_without_a_gpu_the_bakes_for_one_are_left_unless_they_are_to_do_without(tmp_path: Path) -> None:
    matrix = read(write(tmp_path, MATRIX))
    found = series(matrix, template(tag="127.0.0.1:5000/speech"), gpu="absent")
    assert [request.tag for request in found.requests] == ["127.0.0.1:5000/speech:english-cpu-eager-bfloat16"]
    assert len(found.left) == 4
    assert all(line.endswith(": this machine has no GPU") for line in found.left)
    without = series(matrix, template(route="no-gpu"), gpu="absent")
    assert [request.device for request in without.requests] == ["cuda"] * 4
    assert without.left == ("4: english, CPU, eager, bfloat16: --route no-gpu is for images for a GPU",)
    only = read(write(tmp_path, f'{IMAGE}[[bake]]\ngpus = ["NVIDIA L4"]\n'))
    with pytest.raises(FingerprintMismatchError, match="none of the bakes can be made here: 0: english, NVIDIA L4"):
        series(only, template(), gpu="absent")


def test_what_a_matrix_says_itself_is_not_said_beside_it(tmp_path: Path) -> None:
    matrix = write(tmp_path, MATRIX)
    for option, value in (("--profile", "eager"), ("--voice", "fox=fox.wav"), ("--evidence", str(tmp_path / "e.json"))):
        refused = run_cli("build", "--matrix", matrix, option, value, "--checkout", ROOT)
        assert refused.returncode == 2, refused.stderr
        assert f"{option} does not go with --matrix" in refused.stderr
    missing = run_cli("build", "--checkout", ROOT)
    assert missing.returncode == 2
    assert "--tag" in missing.stderr
