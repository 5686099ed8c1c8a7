"""Test what `doctor` says about this machine, and that it fails only for what was asked for."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import EngineError, WeightsError
from chatterbox_prewarm.image import doctor
from chatterbox_prewarm.image.doctor import USES, Finding, gpu_problem, require
from chatterbox_prewarm.system.memory import usable_memory
from chatterbox_prewarm.weights.record import RECORD_NAME
from tests.conftest import run_cli
from tests.helpers.states import record_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("chatterbox", reason="without the model's packages, nothing works here")

NO_ENGINE = {**os.environ, "DOCKER_HOST": "unix:///nonexistent/docker.sock"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Write the record of a checkpoint."""
    record_weights(tmp_path / "weights")
    return tmp_path / "weights"


def _examine(folder: Path, *arguments: str, code: int = 0, env: dict[str, str] = NO_ENGINE) -> dict[str, Any]:
    """Run `doctor --json` with the paths of a folder, and return its findings by subject, and what works."""
    places = [word for name in ("weights", "warm", "cache") for word in (f"--{name}", str(folder / name))]
    done = run_cli("doctor", "--json", *places, *arguments, env=env)
    assert done.returncode == code, done.stderr
    document = json.loads(done.stdout)
    return {"works": document["works"], **{each["subject"]: each for each in document["findings"]}}


def test_a_machine_with_all_parts_but_an_engine_can_bake_and_serve(weights: Path) -> None:
    found = _examine(weights.parent, "--for", "bake", "--for", "serve", "--device", "cpu")
    assert found["works"] == {"bake": True, "serve": True, "build": False}
    assert found["container engine docker"]["blocks"] == ["build"]
    assert not (weights.parent / "cache").exists(), "it changes nothing"


def test_a_machine_with_several_checkpoints_can_serve_them(tmp_path: Path) -> None:
    for variant in ("english", "multilingual"):
        (tmp_path / "weights" / variant).mkdir(parents=True)
        record_weights(tmp_path / "weights" / variant)
        path = tmp_path / "weights" / variant / RECORD_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "variant": variant}))
    found = _examine(tmp_path, "--for", "serve", "--device", "cpu")
    assert {"weights of english", "weights of multilingual"} <= found.keys()


def test_the_exit_code_is_of_what_was_asked_for(weights: Path, tmp_path: Path) -> None:
    _examine(weights.parent, code=0)
    _examine(weights.parent, "--for", "build", code=14)
    _examine(tmp_path / "empty", "--for", "serve", code=10)
    _examine(tmp_path / "empty", code=0)


def test_missing_weights_come_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    found = _examine(tmp_path)
    assert found["weights"]["blocks"] == ["bake", "serve"]
    assert found["weights"]["next_step"] == f"chatterbox-prewarm weights fetch {tmp_path / 'weights'}"


def test_without_a_compiler_a_bake_is_blocked_and_a_server_is_not(weights: Path) -> None:
    found = _examine(weights.parent, "--for", "serve", env={**NO_ENGINE, "CXX": "no-such-compiler"})
    assert found["works"]["bake"] is False
    assert found["works"]["serve"] is True
    assert "apt-get install g++" in found["compiler"]["next_step"]


@pytest.mark.parametrize("place", ["/proc/cache", "/sys/cache"])
def test_a_cache_path_that_cannot_be_written_blocks_both(weights: Path, place: str) -> None:
    found = _examine(weights.parent, "--cache", place, "--for", "serve", code=16)
    assert found["cache path"]["blocks"] == ["bake", "serve"]


def test_a_cache_path_without_execution_blocks_both(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class NoExec:
        f_flag = os.ST_NOEXEC | real("/").f_flag

    monkeypatch.setattr(os, "statvfs", lambda _: NoExec)
    request = doctor.Request(device="cpu", weights=weights, warm=weights, cache=weights, engine="docker")
    (found,) = list(doctor._cache(request))
    assert found.blocks == ("bake", "serve")
    assert "exec" in found.next_step


def test_a_device_that_this_machine_lacks_blocks_both(weights: Path) -> None:
    found = _examine(weights.parent, "--device", "cuda:99", "--for", "bake", code=found_code())
    assert found["GPU"]["blocks"] == ["bake", "serve"]


def found_code() -> int:
    """Return 15 on a machine without a GPU, and 16 where the number of the GPU is too high."""
    from chatterbox_prewarm.system.fingerprint import visible_gpus

    return 16 if visible_gpus() else 15


@pytest.mark.parametrize(
    ("driver", "capability", "advice"),
    [
        ("550.54.14", "9.0", ""),
        ("525.60.13", "8.9", ""),
        ("470.82.01", "7.5", "upgrade the driver to 525.60 or newer"),
        ("570.00.00", "12.0", "install the stack torch-2.11"),
    ],
)
def test_a_gpu_needs_a_driver_for_cuda_and_kernels_in_torch(
    driver: str, capability: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": "2.6.0", "nvidia-cuda-runtime-cu12": "12.4.127"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "absent"))
    assert gpu_problem(driver, capability).startswith(advice)
    assert bool(gpu_problem(driver, capability)) == bool(advice)


def _findings() -> Iterator[Finding]:
    yield Finding(subject="weights", seen="none", blocks=("serve",), next_step="fetch them", error=WeightsError)
    yield Finding(subject="engine", seen="none", blocks=("build",), next_step="start it", error=EngineError)
    yield Finding(subject="GPU", seen="none", next_step="use --target")


def test_an_error_names_every_finding_that_blocks_and_what_to_do() -> None:
    findings = list(_findings())
    require(findings, ["bake"])
    with pytest.raises(EngineError, match="cannot build: engine: none"):
        require(findings, ["build", "bake"])
    with pytest.raises(WeightsError) as caught:
        require(findings, USES)
    assert caught.value.next_step == "fetch them; start it"


@pytest.mark.parametrize(
    ("line", "folder", "name"),
    [("0::/pod/a", "pod", "memory.max"), ("5:memory:/pod/a", "memory/pod/a", "memory.limit_in_bytes")],
)
def test_the_memory_is_that_of_the_machine_or_the_lowest_limit_of_the_groups(
    tmp_path: Path, line: str, folder: str, name: str
) -> None:
    groups, meminfo = tmp_path / "groups", tmp_path / "meminfo"
    groups.write_text(f"{line}\n")
    meminfo.write_text("MemTotal:        9000 kB\nMemAvailable:        4000 kB\n")
    assert usable_memory(tmp_path, groups, meminfo) == 4000 * 1024
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / name).write_text("max\n")
    assert usable_memory(tmp_path, groups, meminfo) == 4000 * 1024
    (tmp_path / folder / name).write_text("1000000\n")
    assert usable_memory(tmp_path, groups, meminfo) == 1_000_000
