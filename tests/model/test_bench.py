"""The benchmarks measure what they say, on a shortened checkpoint: not how long, but what, of whom, in which order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.profiles import measure_one, summarize, table, voice_of
from chatterbox_prewarm.profiles import Execution
from tests.conftest import ROOT, run_cli

if TYPE_CHECKING:
    from pathlib import Path


def test_starts_are_measured_in_turn_from_exec_on(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    places = ("--weights", mini, "--warm", baked, "--output", output)
    done = run_cli("bench", "startup", *places, "--rounds", "1", "--systems", "torch,upstream,warm")
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    torch, upstream, warm = report["runs"]
    assert [run["system"] for run in report["runs"]] == ["torch", "upstream", "warm"]
    assert 0 < torch["imported"] < upstream["attached"]
    assert upstream["imported"] < upstream["loaded"] < upstream["attached"] < upstream["first_audio"]
    assert warm["imported"] < warm["attached"] < warm["ready"] < warm["first_audio"]
    assert warm["misses"] == {}
    assert warm["livez_failed"] == 0
    ratio = report["ratios"]["hot"]["warm attached / upstream attached"]
    assert abs(ratio - warm["attached"] / upstream["attached"]) < 0.01
    assert report["weights"] == {"repository": "synthetic", "revision": "mini-seed-0", "synthetic": "mini"}
    assert "warm attached / upstream attached" in done.stdout


def test_a_profile_is_compared_with_upstream_in_pairs_and_by_its_results(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    places: dict[str, Any] = {"cache": tmp_path / "cache", "device": "cpu", "voice": voice_of(baked), "tokens": 12}
    reference = tmp_path / "reference.pt"
    theirs = measure_one(mini, None, reference=reference, **places)
    ours = measure_one(mini, baked, reference=reference, **places)
    assert ours["greedy_tokens_equal"] == 200
    assert ours["mel_difference"] < 1e-4
    assert ours["misses"] == {}
    assert len(ours["t3_speeds"]) == len(ours["s3gen_speeds"]) == 5
    runs = [{"system": name, "round": 1, **run} for name, run in (("upstream", theirs), ("eager", ours))]
    report = summarize(runs, {}, {"eager": Execution()}, weights=mini, device="cpu")
    speed = report["ratios"]["T3 speed, eager / upstream"]
    assert speed["least"] <= speed["median"] <= speed["most"]
    assert speed["count"] == 5
    assert "greedy as upstream" in table(report)


def test_the_run_for_a_gpu_is_cut_off_and_goes_on(baked: Path, mini: Path, tmp_path: Path) -> None:
    """Its rehearsal on a CPU: a part that ran out of time says so, and the next call does what is left."""
    out = tmp_path / "out"
    shutil.copytree(mini, out / "weights-mini")
    (out / "states").mkdir()
    (out / "states" / "eager").symlink_to(baked)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "benchmarks" / "gpu" / "run"), "--out", str(out), "--device", "cpu", "--size", "mini"]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)

    cut = run("--seconds", "1", "env")
    assert cut.returncode == 14, cut.stderr
    assert "did not end within 1 s" in cut.stderr
    assert "not complete: env; the same command goes on" in cut.stderr
    whole = run("env")
    assert whole.returncode == 0, whole.stderr
    found = json.loads((out / "env.json").read_text())
    assert found["complete"]
    assert found["steps"]["memory bandwidth"]["bytes_per_second"] > 1e8
    assert found["steps"]["machine"]["versions"]["torch"]
    assert "env: complete" in run("env").stdout
    # Only one of four states was baked; what can be measured is, and the rest is named.
    partly = run("decode", "memory")
    assert partly.returncode == 14
    decode, memory = (json.loads((out / f"{part}.json").read_text()) for part in ("decode", "memory"))
    assert set(decode["steps"]) == set(memory["steps"]) == {"eager"}
    assert set(decode["failed"]) == {"compiled", "aot", "aot, bf16"}
    assert decode["steps"]["eager"]["seconds_per_token"] > 0
    assert set(decode["steps"]["eager"]["rendering"]) == {"12", "25"}
    assert next(iter(memory["steps"]["eager"]["steps"])) == "context"
