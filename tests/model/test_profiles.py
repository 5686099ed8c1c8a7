"""Test the compiling profiles: only a bake compiles, and a start handles missing, damaged or foreign artifacts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch._functorch.config

from chatterbox_prewarm.model.regions.region import COMMON_REGIONS
from chatterbox_prewarm.proof import probes
from chatterbox_prewarm.state.state import State
from tests.conftest import ROOT, run_cli, writable_copy
from tests.helpers.states import rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached

# The first test that needs a compiled state waits for its bake.
pytestmark = pytest.mark.timeout(1800)

#: Number of regions that the reference synthesis runs: all except sampling with top-p.
_REFERENCE_REGIONS = len(COMMON_REGIONS) - 1
#: Number of caches that `torch.compile` uses for a region: Inductor's and, in newer versions, AOTAutograd's.
_CACHES = 2 if torch._functorch.config.enable_autograd_cache else 1

#: Starts from a state, synthesizes two lengths and two streams, and prints metrics, samples and tokens as JSON.
_START = """
import json, os, sys
from pathlib import Path
warm, weights, cache, policy, seed = sys.argv[1:6]
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
options = StartOptions(
    warm=Path(warm), weights=Path(weights), cache=Path(cache), policy=policy, profile=os.environ.get("PROFILE")
)
attached = attach(prepare(options))
from chatterbox_prewarm.model.sampling import Sampling
speak = attached.synthesizer.synthesize
first = speak("Hello, world.", seed=int(seed), max_new_tokens=12)
speak("A longer text, and with it another prompt.", seed=1, max_new_tokens=31, sampling=Sampling(top_p=0.8))
from chatterbox_prewarm.model.streaming import generate_stream
for look_ahead in (None, 3):
    list(generate_stream(attached, "Hello, world.", seed=1, max_new_tokens=31, look_ahead=look_ahead))
out = {"metrics": attached.metrics.to_dict(), "samples": first.samples.tolist(), "tokens": first.tokens.tolist(),
       "compiler": [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]}
print("JSON" + json.dumps(out))
"""


def start(
    warm: Path, weights: Path, cache: Path, *, policy: str = "fallback", env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Start in a fresh process and synthesize."""
    ran = subprocess.run(
        [sys.executable, "-c", _START, str(warm), str(weights), str(cache), policy, "7"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **(env or {})},
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.rpartition("JSON")[2])
    return found


def signal_to_noise(signal: Any, other: Any) -> float:
    """Return the ratio of signal to difference in dB."""
    signal, other = np.asarray(signal), np.asarray(other)
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(signal - other).sum(), 1e-30)))


def requirement(state: Path, family: str, fact: str, value: str) -> None:
    """Change a value that a family requires."""

    def change(raw: dict[str, Any]) -> None:
        next(entry for entry in raw["families"] if entry["name"] == family)["requires"][fact] = value

    rewrite(state, change)


@pytest.mark.slow
def test_bake_packages_every_region_within_the_size_budget(baked_aot: Path) -> None:
    manifest = State.read(baked_aot).manifest
    assert manifest.execution.profile == "aot"
    family = manifest.family("aot")
    assert family is not None
    assert sorted(entry.path for entry in family.files) == sorted(f"aot/{name}/region.so" for name in COMMON_REGIONS)
    assert family.seconds_saved > 10 * 0.2
    assert sum(entry.size for entry in manifest.families) <= 64 * 2**20


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("profile", "family", "count"),
    [
        ("aot", "aot", _REFERENCE_REGIONS),
        ("compiled", "inductor", _REFERENCE_REGIONS * _CACHES),
    ],
)
def test_fresh_process_compiles_nothing(
    profile: str, family: str, count: int, mini: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every region is a hit with another host name, user and HOME and without network."""
    evidence = tmp_path / "evidence.json"
    state = request.getfixturevalue(f"baked_{profile}")
    proven = run_cli("prove", "--warm", state, "--weights", mini, "--evidence", evidence)
    assert proven.returncode == 0, proven.stdout + proven.stderr
    observed = json.loads(evidence.read_text())["observed"]
    assert observed["metrics"]["hits"][family] == count
    assert observed["metrics"]["profile"] == profile
    assert observed["metrics"]["misses"] == {}
    assert observed["cache_writes"] == []
    assert [event for event in observed["programs"] if probes.names_a_compiler(event)] == []


@pytest.mark.slow
def test_packages_give_the_audio_of_eager_mode(baked_aot: Path, mini: Path, tmp_path: Path, attached: Attached) -> None:
    found = start(baked_aot, mini, tmp_path / "cache", policy="require")
    assert found["metrics"]["hits"]["aot"] == len(COMMON_REGIONS), "top-p too"
    assert found["metrics"]["misses"] == {}
    assert found["compiler"] == [], "a start from packages does not import a compiler"
    written = attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
    assert found["tokens"] == written.tokens.tolist()
    assert signal_to_noise(written.samples, found["samples"]) >= 50


@pytest.mark.slow
def test_packages_work_with_another_checkpoint(baked_aot: Path, tmp_path: Path) -> None:
    """Weights are arguments, so a fine-tuned model needs no compilation. Only its voice must be computed."""
    other = tmp_path / "other"
    made = run_cli("weights", "synthesize", other, "--size", "mini", "--seed", "1")
    assert made.returncode == 0, made.stderr
    found = start(baked_aot, other, tmp_path / "cache")
    assert found["metrics"]["hits"]["aot"] == len(COMMON_REGIONS)
    assert set(found["metrics"]["misses"]) == {"conditionals"}
    written = start(baked_aot, other, tmp_path / "cache-off", policy="off")
    assert "aot" not in written["metrics"]["hits"]
    assert found["tokens"] == written["tokens"]
    assert signal_to_noise(written["samples"], found["samples"]) >= 50


@pytest.mark.slow
def test_cold_start_time_includes_compilation_only_if_a_start_can_compile(
    baked_compiled: Path, baked_aot: Path
) -> None:
    compiled, packages = State.read(baked_compiled).manifest, State.read(baked_aot).manifest
    inductor, aot = compiled.family("inductor"), packages.family("aot")
    assert inductor is not None
    assert aot is not None
    assert compiled.measured.cold_seconds > inductor.seconds_spent
    assert packages.measured.cold_seconds < aot.seconds_spent, "a start never compiles packages"


@pytest.mark.slow
def test_concurrent_starts_with_one_cache_only_hit_and_need_no_compiler(baked_compiled: Path, mini: Path) -> None:
    """Each start speaks texts of two lengths; one cache serves both. An image has no compiler."""
    cache, no_compiler = baked_compiled.parent / "cache", {"PATH": "/nonexistent"}
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda _: start(baked_compiled, mini, cache, policy="require", env=no_compiler), range(3))
        )
    for one in found:
        assert one["metrics"]["hits"]["inductor"] >= len(COMMON_REGIONS) * _CACHES
        assert one["metrics"]["misses"] == {}
        assert one["samples"] == found[0]["samples"]
    kept = {path.relative_to(baked_compiled) for path in (baked_compiled / "inductor").rglob("*") if path.is_file()}
    there = {path.relative_to(cache) for path in (cache / "inductor").rglob("*") if path.is_file()}
    assert {path for path in there if path.suffix != ".lock"} == kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fact", "value", "words"),
    [
        ("aot", "instruction_set", "avx2", "CPU instruction set: baked with avx2"),
        ("aot", "torch", "2.0.0", "torch: baked with 2.0.0"),
        ("aot", "gpu", "NVIDIA L4", "GPU: baked with NVIDIA L4, here"),
        ("aot", "device", "cuda", "device: baked with cuda, here cpu"),
        ("aot", "regions", "0" * 64, "source of the regions: baked with 0000"),
    ],
)
def test_incompatible_packages_are_not_used(
    baked_aot: Path, mini: Path, tmp_path: Path, family: str, fact: str, value: str, words: str
) -> None:
    state = writable_copy(baked_aot, tmp_path / "warm")
    requirement(state, family, fact, value)
    refused = run_cli("verify", "--warm", state, "--weights", mini)
    assert refused.returncode == 11
    assert words in refused.stderr
    if fact != "regions":
        return  # a start treats every fact alike
    found = start(state, mini, tmp_path / "cache")
    assert found["metrics"]["profile"] == "eager"
    assert found["metrics"]["misses"] == {"aot": 1}
    assert words in found["metrics"]["reasons"][0]
    served = run_cli("serve", "--policy", "require", "--warm", state, "--weights", mini, "--cache", tmp_path / "c")
    assert served.returncode == 11, served.stderr


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["aot", "compiled"])
def test_prove_detects_a_changed_source_of_a_region(
    profile: str, mini: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = request.getfixturevalue(f"baked_{profile}")
    shutil.copytree(ROOT / "chatterbox_prewarm", tmp_path / "chatterbox_prewarm")
    with (tmp_path / "chatterbox_prewarm" / "model" / "regions" / "flow_blocks.py").open("a") as source:
        source.write("# a change\n")
    paths = ("--warm", state, "--weights", mini, "--cache", state.parent / "cache")
    proven = run_cli("prove", "--here", *paths, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert proven.returncode == 11, proven.stdout + proven.stderr
    assert "source of the regions: baked with" in proven.stderr


@pytest.mark.slow
def test_verify_refuses_a_state_for_another_cache_path(baked_compiled: Path, mini: Path) -> None:
    paths = ("--warm", baked_compiled, "--weights", mini)
    refused = run_cli("verify", *paths, "--cache", "/elsewhere")
    assert refused.returncode == 11
    assert f"cache path: baked with {baked_compiled.parent / 'cache'}, here /elsewhere" in refused.stderr
    assert run_cli("verify", *paths, "--cache", baked_compiled.parent / "cache").returncode == 0


@pytest.mark.slow
def test_truncated_package_is_never_opened(baked_aot: Path, mini: Path, tmp_path: Path) -> None:
    state = writable_copy(baked_aot, tmp_path / "warm")
    package = state / "aot" / "t3_decode" / "region.so"
    size = package.stat().st_size
    package.write_bytes(package.read_bytes()[:1000])
    found = start(state, mini, tmp_path / "cache")
    assert found["metrics"]["profile"] == "eager"
    assert f"aot/t3_decode/region.so: {size} bytes expected, 1000 found" in found["metrics"]["reasons"][0]
    refused = run_cli("prove", "--here", "--warm", state, "--weights", mini, "--cache", tmp_path / "cache")
    assert refused.returncode == 12


@pytest.mark.slow
def test_region_of_an_unloadable_package_runs_in_eager_mode(baked_aot: Path, mini: Path, tmp_path: Path) -> None:
    state = writable_copy(baked_aot, tmp_path / "warm")
    (state / "aot" / "t3_decode" / "region.so").write_text("no library at all")
    shutil.rmtree(state / "aot" / "flow_euler")
    rewrite(state, rescan=True)
    found = start(state, mini, tmp_path / "cache")
    assert found["metrics"]["misses"] == {"aot": 2}
    assert found["metrics"]["hits"]["aot"] == len(COMMON_REGIONS) - 2
    assert any("t3_decode runs in eager mode" in reason for reason in found["metrics"]["reasons"])
    assert any("flow_euler runs in eager mode" in reason for reason in found["metrics"]["reasons"])
    assert set(found["metrics"]["next_steps"]) == set(found["metrics"]["reasons"])
    refused = run_cli("prove", "--here", "--warm", state, "--weights", mini, "--cache", tmp_path / "cache")
    assert refused.returncode == 12
    assert "t3_decode/region.so cannot be loaded" in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_start_works_without_temporary_folder_and_needs_an_executable_state(
    baked_aot: Path, mini: Path, tmp_path: Path
) -> None:
    """PyTorch's own loader unpacks into /tmp, which may be full or forbid execution in a container."""
    noexec = tmp_path / "noexec"
    noexec.mkdir()
    script = (
        f"mount -t tmpfs -o size=200m,noexec tmpfs {noexec} && cp -r {baked_aot} {noexec}/warm && "
        f"mkdir {noexec}/tmp && mount -t tmpfs -o size=4k,noexec tmpfs {noexec}/tmp && export TMPDIR={noexec}/tmp && "
        f"head -c 4096 /dev/zero > {noexec}/tmp/full && "
    )
    trial = f"{sys.executable} -m chatterbox_prewarm prove --here --weights {mini} --cache {tmp_path}/cache --warm"
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    full = subprocess.run([*isolated, f"{script}{trial} {baked_aot}"], capture_output=True, text=True, check=False)
    assert f"ok   aot was used: {_REFERENCE_REGIONS} hits, 0 misses" in full.stdout, full.stdout + full.stderr
    forbidden = subprocess.run(
        [*isolated, f"{script}{trial} {noexec}/warm"], capture_output=True, text=True, check=False
    )
    assert forbidden.returncode == 12, forbidden.stdout + forbidden.stderr
    assert "failed to map segment" in forbidden.stderr
    assert "must allow execution" in forbidden.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_cache_that_forbids_execution_is_reported_early(baked_compiled: Path, mini: Path) -> None:
    cache = baked_compiled.parent / "cache"
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o noexec tmpfs {cache} && exec "
    trial = [sys.executable, "-m", "chatterbox_prewarm", "prove", "--here", "--cache", str(cache)]
    trial += ["--warm", str(baked_compiled), "--weights", str(mini)]
    refused = subprocess.run([*isolated, mount + shlex.join(trial)], capture_output=True, text=True, check=False)
    assert refused.returncode == 16, refused.stdout + refused.stderr
    assert f"{cache} is on a file system that forbids execution" in refused.stderr
    speak = [sys.executable, "-c", _START, str(baked_compiled), str(mini), str(cache), "fallback", "7"]
    spoke = subprocess.run([*isolated, mount + shlex.join(speak)], capture_output=True, text=True, check=False)
    assert spoke.returncode == 0, spoke.stderr
    metrics = json.loads(spoke.stdout.rpartition("JSON")[2])["metrics"]
    assert (metrics["profile"], metrics["misses"]) == ("eager", {"inductor": 1})
    assert "forbids execution" in metrics["reasons"][0]


@pytest.mark.slow
def test_a_changed_setting_of_torch_is_a_miss_in_every_region(baked_compiled: Path, mini: Path) -> None:
    """The libraries of the state still serve, because the setting does not change their source: no compiler starts."""
    setting = {"TORCHINDUCTOR_SHAPE_PADDING": "0", "PATH": "/nonexistent"}
    found = start(baked_compiled, mini, baked_compiled.parent / "cache", env=setting)
    assert len(found["samples"]) > 0
    assert "inductor" not in found["metrics"]["hits"]
    assert found["metrics"]["misses"]["inductor"] >= len(COMMON_REGIONS)
    assert any("inductor: compiled a graph" in reason for reason in found["metrics"]["reasons"])
    assert not any("runs in eager mode" in reason for reason in found["metrics"]["reasons"])


@pytest.mark.slow
def test_regions_without_libraries_run_in_eager_mode_where_there_is_no_compiler(
    baked_compiled: Path, mini: Path, tmp_path: Path
) -> None:
    """An image has no compiler."""
    state = writable_copy(baked_compiled, tmp_path / "warm")
    for library in (state / "inductor").rglob("*.so"):
        library.unlink()
    rewrite(state, rescan=True)
    found = start(state, mini, baked_compiled.parent / "cache", env={"PATH": "/nonexistent"})
    assert len(found["samples"]) > 0
    assert "inductor" not in found["metrics"]["hits"]
    reasons = [reason for reason in found["metrics"]["reasons"] if "runs in eager mode" in reason]
    assert len(reasons) == len(COMMON_REGIONS)
    assert all("g++" in reason for reason in reasons)


@pytest.mark.slow
def test_prove_detects_a_deleted_kernel(baked_compiled: Path, mini: Path, tmp_path: Path) -> None:
    state = writable_copy(baked_compiled, tmp_path / "warm")
    min((state / "inductor").rglob("*.so"), key=lambda library: library.stat().st_size).unlink()
    rewrite(state, rescan=True)
    cache = baked_compiled.parent / "cache"
    proven = run_cli("prove", "--here", "--warm", state, "--weights", mini, "--cache", cache)
    assert proven.returncode == 13, proven.stdout + proven.stderr
    assert "FAIL no compiler started" in proven.stdout
    assert "g++" in proven.stdout
    assert "FAIL no write into a cache" in proven.stdout


@pytest.mark.slow
def test_eager_mode_can_be_requested_for_a_state_with_packages(baked_aot: Path, mini: Path, tmp_path: Path) -> None:
    found = start(baked_aot, mini, tmp_path / "cache", policy="require", env={"PROFILE": "eager"})
    assert found["metrics"]["profile"] == "eager"
    assert "aot" not in found["metrics"]["hits"]
    assert found["metrics"]["misses"] == {}


def test_profile_missing_in_the_state_is_refused_or_replaced_by_eager_mode(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    paths = ("--warm", baked, "--weights", mini, "--cache", tmp_path / "c")
    refused = run_cli("serve", *paths, "--profile", "aot", "--policy", "require")
    assert refused.returncode == 11, refused.stderr
    assert "no family 'aot'" in refused.stderr
    found = start(baked, mini, tmp_path / "cache", env={"PROFILE": "aot"})
    assert found["metrics"]["profile"] == "eager"
    assert found["metrics"]["misses"] == {"aot": 1}


_LATER_CLASS = """
import os
import torch
from chatterbox_prewarm.model.regions.region import Input, Region, Size
from chatterbox_prewarm.model.regions.executors import compiled_executor
from chatterbox_prewarm.system.metrics import StartMetrics

def double(weight, x):
    return (torch.sin(x) * weight,)

metrics = StartMetrics()
lengths = Size(name="length", example=4, minimum=2, maximum=64)
region = Region(name="double", function=double, inputs=(Input(shape=(lengths,)),))
call = compiled_executor(metrics)(region, [torch.ones(1)])
assert torch.allclose(call(torch.ones(8))[0], torch.sin(torch.ones(8)))
assert not metrics.misses
os.environ["PATH"] = "/nonexistent"
wide = torch.ones(8, dtype=torch.float64)
assert torch.allclose(call(wide)[0], torch.sin(wide))
print(metrics.misses["inductor"], metrics.reasons)
"""


@pytest.mark.slow
def test_region_runs_in_eager_mode_if_a_later_class_of_inputs_cannot_be_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LATER_CLASS],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("1 ")
    assert "double runs in eager mode" in ran.stdout
