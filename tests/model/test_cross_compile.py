"""Test bakes for a GPU on a machine without one: the contents of the packages, starts from them, and their proof.

No test runs a kernel. A stand-in for the GPU takes the place of CUDA's libraries; it records what would run.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import launches
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.regions.region import COMMON_REGIONS
from chatterbox_prewarm.start import attach as attaching
from chatterbox_prewarm.start.attach import checked, load_warmup_cache
from chatterbox_prewarm.start.pretrained import from_pretrained_with_warmup
from chatterbox_prewarm.state.compatibility import compare_families
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.gpu_stand_in import READS_ZEROS, cuda_headers, make_stand_in
from chatterbox_prewarm.system.gpu_targets import find_target
from tests.conftest import ROOT, run_cli, writable_copy
from tests.helpers.newest_target import NEWEST_TARGET
from tests.helpers.states import mark_cross_compiled, rewrite

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.start.prepare import Prepared
    from chatterbox_prewarm.weights.mapped import MappedWeights

# The first test that needs a compiled state waits for its bake.
pytestmark = pytest.mark.timeout(1800)

#: The number of the machine "NVIDIA CUDA" in ELF files, and the offsets of machine and flags in a 64-bit header.
_EM_CUDA, _MACHINE, _FLAGS = 190, 18, 48
#: The offset of the ABI's version, and the first version that has the architecture in the second byte of the flags.
_ABI, _NEWER_ABI = 8, 8
CAPABILITY = find_target(NEWEST_TARGET).capability
#: Symbols of the C and C++ libraries, which every machine has.
_SYSTEM = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_.*|__gmon_start__|_ITM_.*|__cxa_finalize.*")


def in_stand_in(
    program: str, *arguments: str | Path, target: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process that sees a GPU."""
    folder.mkdir(parents=True)
    variables: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        **make_stand_in(find_target(target), folder),
        **environment,
    }
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=600)


_PROPERTIES = """
from chatterbox_prewarm.start.ahead import create_context
create_context(0)  # as a start does, before torch is imported
import json, torch
from chatterbox_prewarm.system.fingerprint import read_fingerprint
properties, found = torch.cuda.get_device_properties(0), read_fingerprint("cuda")
numbers = [properties.multi_processor_count, properties.total_memory >> 30, properties.L2_cache_size >> 20]
try:
    value = torch.ones(3, device="cuda").sum().item()
except RuntimeError as error:
    value = str(error).partition("\\n")[0]
print(json.dumps([properties.name, numbers, found.gpu, found.compute_capability, value]))
"""


@pytest.mark.parametrize(
    ("target", "reads", "expected"),
    [
        ("L4", {}, ["NVIDIA L4", [58, 24, 48], "NVIDIA L4", "8.9", "CUDA error: operation not supported"]),
        ("sm_80", READS_ZEROS, ["absent", [108, 40, 40], "absent", "8.0", 0.0]),
    ],
)
def test_the_driver_torch_and_nvml_see_the_target_and_read_nothing_from_it(
    target: str,
    reads: Mapping[str, str],
    expected: list[object],
    tmp_path: Path,
    compiler: None,  # noqa: ARG001 - may skip
) -> None:
    found = in_stand_in(_PROPERTIES, target=target, folder=tmp_path / "stand-in", **reads)
    assert json.loads(found.stdout) == expected, found.stderr


@pytest.mark.slow
def test_a_bake_without_the_gpu_makes_a_package_of_every_region(cross_compiled: Path) -> None:
    manifest = State.read(cross_compiled).manifest
    assert manifest.cross_compiled
    assert (manifest.execution.profile, manifest.reference.device, manifest.levels) == ("aot", "cuda", ())
    assert manifest.fingerprint["gpu"] == NEWEST_TARGET
    assert manifest.fingerprint["compute_capability"] == "{}.{}".format(*CAPABILITY)
    assert {family.name for family in manifest.families} == {"bytecode", "numba", "signal", "conditionals", "aot"}
    aot = manifest.family("aot")
    assert aot is not None
    assert "instruction_set" not in aot.requires, "the node has another processor than this machine"
    libraries = {entry.path for entry in aot.files if entry.path.endswith(".so")}
    assert libraries == {f"aot/{name}/region.so" for name in COMMON_REGIONS}
    assert sum(family.size for family in manifest.families) <= 64 * 2**20
    shown = run_cli("inspect", "--warm", cross_compiled)
    assert "compiled without the GPU: not tuned, and unproven" in shown.stdout


@pytest.mark.slow
def test_every_kernel_is_for_the_target(cross_compiled: Path) -> None:
    kernels = list((cross_compiled / "aot").rglob("*.cubin"))
    assert {path.parent.name for path in kernels} == set(COMMON_REGIONS)
    for path in kernels:
        header = path.read_bytes()[:64]
        (machine,) = struct.unpack_from("<H", header, _MACHINE)
        (flags,) = struct.unpack_from("<I", header, _FLAGS)
        architecture = flags & 0xFF if header[_ABI] < _NEWER_ABI else flags >> 8 & 0xFF
        assert (header[:4], machine) == (b"\x7fELF", _EM_CUDA), path
        assert architecture == 10 * CAPABILITY[0] + CAPABILITY[1], path


@pytest.mark.slow
def test_every_symbol_of_a_package_exists_in_torch_or_cuda(cross_compiled: Path) -> None:
    import torch

    libraries = [*(Path(torch.__file__).parent / "lib").glob("*.so"), *cuda_headers()[0].parent.glob("lib/*.so.*")]
    exported = {
        line.split()[-1].partition("@")[0]
        for path in libraries
        for line in _symbols(path, "--defined-only")
        if len(line.split()) == 3
    }
    driver = set(re.findall(r"\bcu[A-Z]\w+", (cuda_headers()[1] / "cuda.h").read_text()))
    assert len(exported) > 10_000
    for package in (cross_compiled / "aot").rglob("*.so"):
        needed = {line.split()[-1] for line in _symbols(package, "--undefined-only")}
        needed = {name for name in needed if not _SYSTEM.fullmatch(name)}
        assert "cuLaunchKernel" in needed
        assert needed - exported - driver == set(), package


def _symbols(path: Path, which: str) -> list[str]:
    listed = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.mark.slow
def test_a_start_with_the_packages_launches_fewer_kernels_than_eager_mode(cross_compiled: Path, mini: Path) -> None:
    found = launches.count(mini, cross_compiled)
    assert found["metrics"]["misses"] == {}
    assert found["metrics"]["hits"]["aot"] == 2, "T3's step has two regions"
    counted = launches.summary(found)
    packages, eager = counted["packages"], counted["eager"]
    assert packages["gemm"] == eager["gemm"] > 0, "both compute the same matrix products"
    assert eager["launch"] == 0
    assert 0 < packages["launch"] + packages["torch"] < eager["torch"] / 2
    grids = [list(map(int, line.split()[-3:])) for line in found["packages"] if line.startswith("launch")]
    assert all(x >= 1 and y >= 1 and z >= 1 for x, y, z in grids)
    bandwidth = {"NVIDIA H200": 4.8e12, "NVIDIA B200": 8e12}[NEWEST_TARGET]
    assert counted["seconds_to_read_weights"] == pytest.approx(counted["weight_bytes"] / bandwidth)


@pytest.mark.slow
def test_launches_are_counted_only_for_a_state_that_was_compiled_without_its_gpu(baked_aot: Path, mini: Path) -> None:
    with pytest.raises(BadInputError, match="was not compiled for a GPU that the machine lacks"):
        launches.count(mini, baked_aot)


@pytest.mark.slow
def test_a_state_for_another_gpu_is_not_used(cross_compiled: Path, mini: Path, tmp_path: Path) -> None:
    manifest = State.read(cross_compiled).manifest
    aot = manifest.family("aot")
    assert aot is not None
    here = {**aot.requires, "gpu": "NVIDIA L4", "compute_capability": "8.9"}
    assert compare_families(manifest, aot.requires)["aot"] == []
    assert compare_families(manifest, here)["aot"] == [
        "GPU compute capability: baked with {}.{}, here 8.9".format(*CAPABILITY),
        f"GPU: baked with {NEWEST_TARGET}, here NVIDIA L4",
    ]
    refused = run_cli("prove", "--here", "--warm", cross_compiled, "--weights", mini, "--cache", tmp_path / "cache")
    assert refused.returncode == 15, refused.stderr
    assert "this machine has no GPU" in refused.stderr


@pytest.fixture
def untried(baked_aot: Path, tmp_path: Path) -> Path:
    """Return a state for this CPU that says that it was compiled elsewhere, so that a test can run its code."""
    mark_cross_compiled(state := writable_copy(baked_aot, tmp_path / "warm"))
    return state


@pytest.mark.slow
def test_a_proof_compares_packages_that_never_ran_with_eager_mode(untried: Path, mini: Path, tmp_path: Path) -> None:
    proven = run_cli("prove", "--here", "--warm", untried, "--weights", mini, "--cache", tmp_path / "cache")
    assert "ok   the audio is like that of eager mode: the same speech tokens" in proven.stdout, proven.stderr
    assert "FAIL aot" not in proven.stdout


def with_a_wrong_package(state: Path, folder: Path) -> Path:
    """Copy a state, and put the package of one region in the place of a region with other arguments."""
    copy = writable_copy(state, folder)
    shutil.copy(copy / "aot" / "flow_euler" / "region.so", copy / "aot" / "vocoder_pitch" / "region.so")
    rewrite(copy, rescan=True)
    return copy


@pytest.mark.slow
def test_eager_mode_replaces_packages_that_fail_at_their_first_run(
    untried: Path, baked_aot: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = with_a_wrong_package(untried, tmp_path / "failing")
    places: dict[str, Any] = {"weights": mini, "cache": tmp_path / "cache"}
    models: list[weakref.ref[object]] = []
    load = attaching._load

    def load_alone(prepared: Prepared, mapped: MappedWeights | None = None) -> Model:
        assert [model for model in models if model() is not None] == [], "two models are in memory"
        loaded = load(prepared, mapped)
        models.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(attaching, "_load", load_alone)
    found = load_warmup_cache(failing, **places)
    assert found.prepared.execution.profile == found.metrics.profile == "eager"
    assert found.misses["aot"] == 1
    assert any("the model runs in eager mode" in reason for reason in found.reasons)
    assert len(found.synthesizer.synthesize("Hello.", seed=1, max_new_tokens=12).samples) > 0
    assert len(models) == 2
    del found
    upstream = from_pretrained_with_warmup(warm=failing, warmup=False, **places)
    assert upstream.attached.misses["aot"] == 1
    assert upstream.lean is upstream.synthesizer.model
    del upstream
    gc.collect()
    with pytest.raises(RuntimeError):
        load_warmup_cache(failing, policy="require", **places)
    models.clear()
    proven = with_a_wrong_package(baked_aot, tmp_path / "proven")
    with pytest.raises(RuntimeError):
        checked(load_warmup_cache(proven, **places))


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (["--target", "L4"], {}, 16, "use --device cuda"),
        (["--target", "H2000", "--device", "cuda"], {}, 16, "perhaps NVIDIA H200"),
        (["--target", "sm_100a", "--device", "cuda"], {}, 16, "sm_89, sm_90"),
        (["--target", "L4", "--device", "cuda", "--profile", "eager"], {}, 16, "leave out --target"),
        (
            ["--target", "L4", "--device", "cuda", "--without", "conditionals"],
            {},
            16,
            "leave out --without conditionals",
        ),
        (["--target", "L4", "--target", "H2000", "--device", "cuda"], {}, 16, "perhaps NVIDIA H200"),
        (["--target", "L4", "--target", "nvidia-l4", "--device", "cuda"], {}, 16, "NVIDIA L4 is given twice"),
        (["--target", "L4", "--device", "cuda", "--levels", "1"], {}, 2, "--levels cannot be used with --target"),
        pytest.param(
            *(["--target", "B200", "--device", "cuda"], {}, 15, "runs on GPUs up to sm_90, and NVIDIA B200 is sm_100"),
            marks=pytest.mark.skipif(CAPABILITY > (9, 0), reason="this torch runs on every GPU that can be a target"),
        ),
        (["--target", "L4", "--device", "cuda"], {"CXX": "/nonexistent/g++"}, 15, "apt-get install g++"),
    ],
)
def test_a_target_that_cannot_be_compiled_for_is_refused_before_anything_is_written(
    arguments: list[str], environment: dict[str, str], code: int, words: str, mini: Path, tmp_path: Path
) -> None:
    paths = ("--weights", mini, "--warm", tmp_path / "warm", "--cache", tmp_path / "cache")
    refused = run_cli("bake", *paths, *arguments, env={**os.environ, **environment})
    assert refused.returncode == code, refused.stderr
    assert words in refused.stderr
    assert not (tmp_path / "warm").exists()
