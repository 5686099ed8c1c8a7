"""The demo compiles the model only on a machine that can compile it."""

from __future__ import annotations

import sysconfig
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bench.demo import _execution
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.system.compiler import missing_packages

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a compiler `bin/g++` and headers `include/Python.h`."""
    for name in ("bin/g++", "include/Python.h"):
        path = tmp_path / name
        path.parent.mkdir()
        path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    return tmp_path


def test_a_machine_with_compiler_and_headers_bakes_the_default_profile(machine: Path) -> None:
    assert machine.is_dir()
    assert missing_packages() == []
    assert _execution() is None


@pytest.mark.parametrize(
    ("removed", "packages"),
    [
        (["bin/g++"], ["g++"]),
        (["include/Python.h"], ["python3-dev"]),
        (["bin/g++", "include/Python.h"], ["g++", "python3-dev"]),
    ],
)
def test_a_machine_that_cannot_compile_bakes_eager_and_names_the_packages(
    machine: Path, removed: list[str], packages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in removed:
        (machine / name).unlink()
    assert missing_packages() == packages
    assert _execution() == Execution(profile="eager")
    assert f"apt-get install {' '.join(packages)}" in capsys.readouterr().out


def test_another_compiler_can_be_set_as_cxx(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "bin/g++").rename(machine / "bin/clang++")
    monkeypatch.setenv("CXX", "clang++")
    assert missing_packages() == []
