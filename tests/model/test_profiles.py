"""The profiles that compile: at bake once, in a start never; and what a start makes of artifacts that are not right."""

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

from chatterbox_prewarm.model.regions.region import REGIONS
from chatterbox_prewarm.proof import probes
from chatterbox_prewarm.state.manifest import read_manifest
from tests.conftest import ROOT, run_cli, writable_copy
from tests.helpers.states import rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached

#: Regions that the reference synthesis runs; sampling with top-p is not among them.
_REFERENCE_REGIONS = len(REGIONS) - 1
#: The caches that `torch.compile` looks into for a region: Inductor's, and since some torch AOTAutograd's before it.
_CACHES = 2 if torch._functorch.config.enable_autograd_cache else 1

#: Starts from a state and speaks two lengths; prints what it did as JSON, the samples as a list.
_START = """
import json, os, sys
from pathlib import Path
warm, weights, cache, policy, seed = sys.argv[1:6]
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
prepared = prepare(
    Path(warm), Path(weights), cache=Path(cache), policy=policy, profile=os.environ.get("PROFILE")
)
attached = attach(prepared)
from chatterbox_prewarm.model.sampling import Sampling
speak = attached.synthesizer.synthesize
first = speak("Hello, world.", seed=int(seed), max_new_tokens=12)
speak("A longer text, and with it another prompt.", seed=1, max_new_tokens=31, sampling=Sampling(top_p=0.8))
out = {"metrics": attached.metrics.to_dict(), "samples": first.samples.tolist(), "tokens": first.tokens.tolist(),
       "compiler": [name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules]}
print("JSON" + json.dumps(out))
"""


def start(
    warm: Path, weights: Path, cache: Path, *, policy: str = "fallback", env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Start in a fresh process and speak."""
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
    """In dB."""
    signal, other = np.asarray(signal), np.asarray(other)
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(signal - other).sum(), 1e-30)))


def requirement(state: Path, family: str, fact: str, value: str) -> None:
    """Have a family require something else."""

    def change(raw: dict[str, Any]) -> None:
        next(entry for entry in raw["families"] if entry["name"] == family)["requires"][fact] = value

    rewrite(state, change)


def test_a_bake_packs_every_region_within_the_budget(baked_aot: Path) -> None:
    manifest = read_manifest(baked_aot)
    assert manifest.execution.profile == "aot"
    family = manifest.family("aot")
    assert family is not None
    assert sorted(entry.path for entry in family.files) == sorted(f"aot/{name}/region.so" for name in REGIONS)
    assert family.seconds_saved > 10 * 0.2
    assert sum(entry.size for entry in manifest.families) <= 64 * 2**20


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("profile", "family", "count"),
    [("aot", "aot", _REFERENCE_REGIONS), ("compiled", "inductor", _REFERENCE_REGIONS * _CACHES)],
)
def test_a_fresh_process_compiles_nothing(
    profile: str, family: str, count: int, mini: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Another host name, user and HOME, no network; every region of the reference synthesis is a hit."""
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


def test_packages_speak_as_the_regions_are_written(
    baked_aot: Path, mini: Path, tmp_path: Path, attached: Attached
) -> None:
    found = start(baked_aot, mini, tmp_path / "cache", policy="require")
    assert found["metrics"]["hits"]["aot"] == len(REGIONS), "top-p too"
    assert found["metrics"]["misses"] == {}
    assert found["compiler"] == [], "a start from packages does not import a compiler"
    written = attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
    assert found["tokens"] == written.tokens.tolist()
    assert signal_to_noise(written.samples, found["samples"]) >= 50


def test_one_set_of_packages_serves_another_checkpoint(baked_aot: Path, tmp_path: Path) -> None:
    """Weights are arguments, so a fine-tune needs no compile; its voice is another, and is made."""
    other = tmp_path / "other"
    made = run_cli("weights", "synthesize", other, "--size", "mini", "--seed", "1")
    assert made.returncode == 0, made.stderr
    found = start(baked_aot, other, tmp_path / "cache")
    assert found["metrics"]["hits"]["aot"] == len(REGIONS)
    assert set(found["metrics"]["misses"]) == {"conditionals"}
    written = start(baked_aot, other, tmp_path / "cache-off", policy="off")
    assert "aot" not in written["metrics"]["hits"]
    assert found["tokens"] == written["tokens"]
    assert signal_to_noise(written["samples"], found["samples"]) >= 50


def test_a_cold_start_is_said_to_take_what_it_would_compile(baked_compiled: Path, baked_aot: Path) -> None:
    compiled, packages = read_manifest(baked_compiled), read_manifest(baked_aot)
    inductor, aot = compiled.family("inductor"), packages.family("aot")
    assert inductor is not None
    assert aot is not None
    assert compiled.measured.cold_seconds > inductor.seconds_spent
    assert packages.measured.cold_seconds < aot.seconds_spent, "which a start never makes"


def test_a_cache_of_inductors_serves_any_length(baked_compiled: Path, mini: Path) -> None:
    found = start(baked_compiled, mini, baked_compiled.parent / "cache", policy="require")
    assert found["metrics"]["hits"]["inductor"] >= len(REGIONS) * _CACHES, "more where lengths have classes"
    assert found["metrics"]["misses"] == {}


def test_processes_that_start_at_once_from_one_cache_all_hit(baked_compiled: Path, mini: Path) -> None:
    cache = baked_compiled.parent / "cache"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: start(baked_compiled, mini, cache, policy="require"), range(3)))
    for one in found:
        assert one["metrics"]["hits"]["inductor"] >= len(REGIONS) * _CACHES
        assert one["metrics"]["misses"] == {}
        assert one["samples"] == found[0]["samples"]
    kept = {path.relative_to(baked_compiled) for path in (baked_compiled / "inductor").rglob("*") if path.is_file()}
    there = {path.relative_to(cache) for path in (cache / "inductor").rglob("*") if path.is_file()}
    assert {path for path in there if path.suffix != ".lock"} == kept


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
def test_packages_for_something_else_are_not_used(
    baked_aot: Path, mini: Path, tmp_path: Path, family: str, fact: str, value: str, words: str
) -> None:
    state = writable_copy(baked_aot, tmp_path / "warm")
    requirement(state, family, fact, value)
    refused = run_cli("verify", "--warm", state, "--weights", mini)
    assert refused.returncode == 11
    assert words in refused.stderr
    if fact in {"torch", "device"}:
        return  # as the others
    found = start(state, mini, tmp_path / "cache")
    assert found["metrics"]["profile"] == "eager"
    assert found["metrics"]["misses"] == {"aot": 1}
    assert words in found["metrics"]["reasons"][0]
    served = run_cli("serve", "--policy", "require", "--warm", state, "--weights", mini, "--cache", tmp_path / "c")
    assert served.returncode == 11, served.stderr


@pytest.mark.parametrize("profile", ["aot", "compiled"])
def test_a_changed_source_of_a_region_is_caught_by_a_proof(
    profile: str, mini: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = request.getfixturevalue(f"baked_{profile}")
    shutil.copytree(ROOT / "chatterbox_prewarm", tmp_path / "chatterbox_prewarm")
    with (tmp_path / "chatterbox_prewarm" / "regions" / "flow_blocks.py").open("a") as source:
        source.write("# a change\n")
    places = ("--warm", state, "--weights", mini, "--cache", state.parent / "cache")
    proven = run_cli("prove", "--here", *places, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert proven.returncode == 11, proven.stdout + proven.stderr
    assert "source of the regions: baked with" in proven.stderr


def test_a_state_that_is_bound_to_another_cache_path_is_refused_at_verify(baked_compiled: Path, mini: Path) -> None:
    places = ("--warm", baked_compiled, "--weights", mini)
    refused = run_cli("verify", *places, "--cache", "/elsewhere")
    assert refused.returncode == 11
    assert f"cache path: baked with {baked_compiled.parent / 'cache'}, here /elsewhere" in refused.stderr
    assert run_cli("verify", *places, "--cache", baked_compiled.parent / "cache").returncode == 0


def test_a_truncated_package_is_never_opened(baked_aot: Path, mini: Path, tmp_path: Path) -> None:
    state = writable_copy(baked_aot, tmp_path / "warm")
    package = state / "aot" / "t3_decode" / "region.so"
    size = package.stat().st_size
    package.write_bytes(package.read_bytes()[:1000])
    found = start(state, mini, tmp_path / "cache")
    assert found["metrics"]["profile"] == "eager"
    assert f"aot/t3_decode/region.so: {size} bytes expected, 1000 found" in found["metrics"]["reasons"][0]
    refused = run_cli("prove", "--here", "--warm", state, "--weights", mini, "--cache", tmp_path / "cache")
    assert refused.returncode == 12


def test_a_package_that_does_not_load_is_named_and_its_region_runs_as_written(
    baked_aot: Path, mini: Path, tmp_path: Path
) -> None:
    state = writable_copy(baked_aot, tmp_path / "warm")
    (state / "aot" / "t3_decode" / "region.so").write_text("no library at all")
    shutil.rmtree(state / "aot" / "flow_euler")
    rewrite(state, rescan=True)
    found = start(state, mini, tmp_path / "cache")
    assert found["metrics"]["misses"] == {"aot": 2}
    assert found["metrics"]["hits"]["aot"] == len(REGIONS) - 2
    assert any("t3_decode runs as written" in reason for reason in found["metrics"]["reasons"])
    assert any("flow_euler runs as written" in reason for reason in found["metrics"]["reasons"])
    refused = run_cli("prove", "--here", "--warm", state, "--weights", mini, "--cache", tmp_path / "cache")
    assert refused.returncode == 12
    assert "t3_decode/region.so cannot be loaded" in refused.stderr


@pytest.mark.usefixtures("namespaces")
def test_a_start_needs_no_temporary_folder_but_the_state_must_be_executable(
    baked_aot: Path, mini: Path, tmp_path: Path
) -> None:
    """PyTorch's own loader would unpack into /tmp; a container's /tmp is full or forbids execution."""
    place = tmp_path / "noexec"
    place.mkdir()
    script = (
        f"mount -t tmpfs -o size=200m,noexec tmpfs {place} && cp -r {baked_aot} {place}/warm && "
        f"mkdir {place}/tmp && mount -t tmpfs -o size=4k,noexec tmpfs {place}/tmp && export TMPDIR={place}/tmp && "
        f"head -c 4096 /dev/zero > {place}/tmp/full && "
    )
    trial = f"{sys.executable} -m chatterbox_prewarm prove --here --weights {mini} --cache {tmp_path}/cache --warm"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    full = subprocess.run([*alone, f"{script}{trial} {baked_aot}"], capture_output=True, text=True, check=False)
    assert f"ok   aot was used: {_REFERENCE_REGIONS} hits, 0 misses" in full.stdout, full.stdout + full.stderr
    forbidden = subprocess.run([*alone, f"{script}{trial} {place}/warm"], capture_output=True, text=True, check=False)
    assert forbidden.returncode == 12, forbidden.stdout + forbidden.stderr
    assert "failed to map segment" in forbidden.stderr
    assert "must allow execution" in forbidden.stderr


@pytest.mark.usefixtures("namespaces")
def test_a_cache_that_forbids_execution_is_said_before_anything_is_slow(baked_compiled: Path, mini: Path) -> None:
    cache = baked_compiled.parent / "cache"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o noexec tmpfs {cache} && exec "
    trial = [sys.executable, "-m", "chatterbox_prewarm", "prove", "--here", "--cache", str(cache)]
    trial += ["--warm", str(baked_compiled), "--weights", str(mini)]
    refused = subprocess.run([*alone, mount + shlex.join(trial)], capture_output=True, text=True, check=False)
    assert refused.returncode == 16, refused.stdout + refused.stderr
    assert f"{cache} lies on a file system that forbids execution" in refused.stderr
    speak = [sys.executable, "-c", _START, str(baked_compiled), str(mini), str(cache), "fallback", "7"]
    spoke = subprocess.run([*alone, mount + shlex.join(speak)], capture_output=True, text=True, check=False)
    assert spoke.returncode == 0, spoke.stderr
    metrics = json.loads(spoke.stdout.rpartition("JSON")[2])["metrics"]
    assert (metrics["profile"], metrics["misses"]) == ("eager", {"inductor": 1})
    assert "forbids execution" in metrics["reasons"][0]


def test_another_setting_of_torch_is_seen_as_a_miss(baked_compiled: Path, mini: Path) -> None:
    """Without a compiler, so that the test does not wait for a dozen regions to be compiled anew."""
    setting = {"TORCHINDUCTOR_SHAPE_PADDING": "0", "PATH": "/nonexistent"}
    found = start(baked_compiled, mini, baked_compiled.parent / "cache", env=setting)
    assert "inductor" not in found["metrics"]["hits"]
    assert found["metrics"]["misses"]["inductor"] >= len(REGIONS)
    assert any("inductor: compiled a graph" in reason for reason in found["metrics"]["reasons"])


def test_a_deleted_kernel_is_seen_as_a_miss(baked_compiled: Path, mini: Path, tmp_path: Path) -> None:
    state = writable_copy(baked_compiled, tmp_path / "warm")
    min((state / "inductor").rglob("*.so"), key=lambda library: library.stat().st_size).unlink()
    rewrite(state, rescan=True)
    cache = baked_compiled.parent / "cache"
    proven = run_cli("prove", "--here", "--warm", state, "--weights", mini, "--cache", cache)
    assert proven.returncode == 13, proven.stdout + proven.stderr
    assert "FAIL no compiler started" in proven.stdout
    assert "g++" in proven.stdout
    assert "FAIL no write into a cache" in proven.stdout


def test_whoever_asks_for_the_regions_as_written_gets_them(baked_aot: Path, mini: Path, tmp_path: Path) -> None:
    found = start(baked_aot, mini, tmp_path / "cache", policy="require", env={"PROFILE": "eager"})
    assert found["metrics"]["profile"] == "eager"
    assert "aot" not in found["metrics"]["hits"]
    assert found["metrics"]["misses"] == {}


def test_a_profile_that_a_state_was_not_baked_for_is_refused_or_left(baked: Path, mini: Path, tmp_path: Path) -> None:
    places = ("--warm", baked, "--weights", mini, "--cache", tmp_path / "c")
    refused = run_cli("serve", *places, "--profile", "aot", "--policy", "require")
    assert refused.returncode == 11, refused.stderr
    assert "no family 'aot'" in refused.stderr
    found = start(baked, mini, tmp_path / "cache", env={"PROFILE": "aot"})
    assert found["metrics"]["profile"] == "eager"
    assert found["metrics"]["misses"] == {"aot": 1}


def test_without_a_compiler_a_region_that_misses_runs_as_written(
    baked_compiled: Path, mini: Path, tmp_path: Path
) -> None:
    """An image has no compiler, and a start that misses still speaks."""
    state = writable_copy(baked_compiled, tmp_path / "warm")
    for library in (state / "inductor").rglob("*.so"):
        library.unlink()
    rewrite(state, rescan=True)
    found = start(state, mini, baked_compiled.parent / "cache", env={"PATH": "/nonexistent"})
    assert len(found["samples"]) > 0
    assert found["metrics"]["misses"]["inductor"] >= len(REGIONS)
    assert any("t3_decode runs as written" in reason for reason in found["metrics"]["reasons"])


_LATER_CLASS = """
import os
import torch
from chatterbox_prewarm.model.regions.region import Input, Region, Size
from chatterbox_prewarm.model.regions.executors import Compiled
from chatterbox_prewarm.system.metrics import WarmupMetrics

def double(weight, x):
    return (torch.sin(x) * weight,)

metrics = WarmupMetrics()
lengths = Size(name="length", example=4, least=2, most=64)
region = Region(name="double", function=double, inputs=(Input(shape=(lengths,)),))
call = Compiled(metrics)(region, [torch.ones(1)])
assert torch.allclose(call(torch.ones(8))[0], torch.sin(torch.ones(8)))
assert not metrics.misses
os.environ["PATH"] = "/nonexistent"
wide = torch.ones(8, dtype=torch.float64)
assert torch.allclose(call(wide)[0], torch.sin(wide))
print(metrics.misses["inductor"], metrics.reasons)
"""


def test_a_class_of_inputs_that_comes_later_and_cannot_be_compiled_runs_as_written(tmp_path: Path) -> None:
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
    assert "double runs as written" in ran.stdout
