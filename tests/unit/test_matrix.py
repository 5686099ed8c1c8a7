"""`prewarm.toml`: what a matrix of bakes means, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.matrix import read
from tests.conftest import run_cli

if TYPE_CHECKING:
    from pathlib import Path

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
