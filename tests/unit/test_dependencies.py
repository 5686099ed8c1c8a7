"""Every dependency has an upper bound, and the locks are inside the bounds."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

tomllib: Any = pytest.importorskip("tomllib", reason="this Python has no tomllib; it comes with Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ROOT / "build" / "locks"


def _requirements() -> Iterator[Requirement]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in itertools.chain.from_iterable(groups):
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            yield requirement


def _locked(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", (LOCKS / name).read_text(), re.MULTILINE))


def test_every_dependency_has_an_upper_bound() -> None:
    for requirement in _requirements():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {"<", "=="}, f"{requirement} would accept versions that were never tested"


@pytest.mark.parametrize("stack", ["torch-2.6", "torch-2.11"])
def test_the_locked_versions_are_inside_the_bounds(stack: str) -> None:
    locked = _locked(f"{stack}.txt") | _locked("dev.txt")
    for requirement in _requirements():
        name = requirement.name.lower()
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(locked[name]), f"{requirement} is locked at {locked[name]}"


def test_packages_that_inference_never_imports_are_not_locked() -> None:
    excluded = {Requirement(text).name for text in PROJECT["tool"]["uv"]["override-dependencies"]}
    assert {"gradio", "pre-commit"} <= excluded
    for stack in ("torch-2.6.txt", "torch-2.11.txt"):
        assert not excluded & _locked(stack).keys()


@pytest.mark.parametrize("stack", ["torch-2.6", "torch-2.11"])
def test_the_lean_lock_has_the_versions_of_the_full_lock_and_neither_upstream_nor_triton(stack: str) -> None:
    """A bake with all packages serves an image with the lean ones."""
    lean, full = _locked(f"{stack}-lean.txt"), _locked(f"{stack}.txt")
    assert lean.items() < full.items()
    assert not {"chatterbox-tts", "librosa", "numba", "scipy", "torchaudio", "transformers", "triton"} & lean.keys()


def test_ray_and_the_tests_use_the_same_versions() -> None:
    tests = _locked("torch-2.6.txt") | _locked("dev.txt")
    different = {name for name, version in _locked("ray.txt").items() if tests.get(name, version) != version}
    assert different <= {"protobuf"}
