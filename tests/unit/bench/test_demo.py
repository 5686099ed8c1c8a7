"""The demo compiles the model only on a machine that can compile it, and compares with an upstream that can load it."""

from __future__ import annotations

import sysconfig
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bench import demo as demo_module
from chatterbox_prewarm.bench.demo import _execution, _systems, demo
from chatterbox_prewarm.bench.startup import SYSTEMS
from chatterbox_prewarm.model import upstream_source
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.system.compiler import missing_packages
from chatterbox_prewarm.weights.variants import MULTILINGUAL_V3, NANO, VARIANTS

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


#: The parameters of upstream's `from_local` in each module, of the wheel and of the main branch.
_WHEEL = {"tts": "ckpt_dir, device", "mtl_tts": "ckpt_dir, device", "tts_turbo": "ckpt_dir, device"}
_MAIN = {**_WHEEL, "mtl_tts": "ckpt_dir, device, t3_model=None", "tts_turbo": "ckpt_dir, device, nano=False"}


@pytest.mark.parametrize(
    ("modules", "missing"), [(_WHEEL, {NANO.name, MULTILINGUAL_V3.name}), (_MAIN, set()), (None, set(VARIANTS))]
)
def test_upstream_is_left_out_if_the_installed_one_cannot_load_the_variant(
    modules: dict[str, str] | None,
    missing: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, parameters in (modules or {}).items():
        source = f"class Model:\n    @classmethod\n    def from_local(cls, {parameters}):\n        pass\n"
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(upstream_source, "installed_package", lambda: tmp_path if modules else None)
    for name, variant in VARIANTS.items():
        systems, shown = _systems(variant), capsys.readouterr().out
        if name in missing:
            assert systems == ("torch", "cold", "warm")
            assert f"leaves out upstream: the installed chatterbox-tts cannot load {name}" in shown
        else:
            assert systems == SYSTEMS
            assert shown == ""


def test_the_demo_says_that_it_leaves_out_upstream_before_its_long_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FirstStepError(Exception):
        """The demo has reached its first step."""

    def first_step(*_: object) -> None:
        raise FirstStepError

    monkeypatch.setattr(upstream_source, "installed_package", lambda: None)
    monkeypatch.setattr(demo_module, "_create_checkpoint", first_step)
    with pytest.raises(FirstStepError):
        demo(tmp_path / "out", tmp_path / "dist", NANO.name)
    assert "leaves out upstream" in capsys.readouterr().out
