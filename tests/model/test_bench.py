"""The benchmarks measure the right things in the right order. The durations do not matter here."""

from __future__ import annotations

import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

import chatterbox_prewarm
from benchmarks.leak import growth
from benchmarks.profiles import summarize, table
from chatterbox_prewarm.bench.load import FAULTS
from chatterbox_prewarm.model.profiles import Execution
from tests.conftest import ROOT, interrupt_cli, run_benchmark, run_cli
from tests.helpers.stages import measure_both

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_starts_are_measured_from_exec(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    paths = ("--weights", mini, "--warm", baked, "--output", output)
    finished = run_cli("bench", "startup", *paths, "--rounds", "1", "--systems", "torch,upstream,warm")
    assert finished.returncode == 0, finished.stderr
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
    assert "warm attached / upstream attached" in finished.stdout


def test_interrupted_starts_stay_in_the_report(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    paths = ("--weights", mini, "--warm", baked, "--output", output)
    output.write_text('{"complete": true}')
    interrupt_cli("1 of 9", "bench", "startup", *paths, "--rounds", "9", "--systems", "torch")
    assert not json.loads(output.read_text())["complete"], "the older report is replaced"
    interrupt_cli("3 of 9", "bench", "startup", *paths, "--rounds", "9", "--systems", "torch")
    report = json.loads(output.read_text())
    assert not report["complete"]
    assert [run["system"] for run in report["runs"]] == ["torch", "torch"]
    assert report["medians"]["hot"]["torch"]["imported"] > 0
    finished = run_cli("bench", "startup", *paths, "--rounds", "1", "--systems", "torch")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(output.read_text())["complete"]


@pytest.mark.slow
def test_the_levels_of_an_interrupted_load_stay_in_the_report(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    paths = ("--weights", mini, "--warm", baked, "--output", output)
    size = ("--clients", "1,2", "--requests", "1", "--tokens", "6,6,6", "--seeds", "1")
    interrupt_cli("2 client(s)", "bench", "load", *paths, *size)
    report = json.loads(output.read_text())
    assert not report["complete"]
    assert [level["clients"] for level in report["levels"]] == [1]


@pytest.mark.slow
def test_the_effect_of_the_warm_up_is_measured_in_fresh_processes(baked: Path, mini: Path) -> None:
    steps: list[str] = []
    metrics = chatterbox_prewarm.benchmark_warmup_effectiveness(
        "Hello, world.", iterations=1, weights=str(mini), warm=str(baked), say=steps.append
    )
    assert steps == ["cold start, 1 of 1", "warm start, 1 of 1"]
    assert 0 < metrics.warmup_duration < metrics.warm_start_latency
    assert metrics.latency_improvement_ratio == metrics.cold_start_latency / metrics.warm_start_latency
    assert math.isfinite(metrics.first_chunk_improvement_ms)
    assert metrics.second_model_latency is not None
    assert metrics.second_model_latency > 0


@pytest.mark.slow
def test_a_profile_is_compared_with_upstream(baked: Path, mini: Path, tmp_path: Path) -> None:
    upstream, ours = measure_both(mini, baked, tmp_path, tokens=12)
    assert ours["greedy_tokens_equal"] == 200
    assert ours["mel_difference"] < 1e-4
    assert ours["misses"] == {}
    assert len(ours["t3_speeds"]) == len(ours["s3gen_speeds"]) == 5
    runs = [{"system": name, "round": 1, **run} for name, run in (("upstream", upstream), ("eager", ours))]
    report = summarize(runs, {}, {"eager": Execution()}, weights=mini, device="cpu")
    speed = report["ratios"]["T3 speed, eager / upstream"]
    assert speed["least"] <= speed["median"] <= speed["most"]
    assert speed["count"] == 5
    assert "greedy as upstream" in table(report)


@pytest.mark.slow
def test_load_is_measured_for_each_number_of_clients(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    paths = ("--weights", mini, "--warm", baked, "--output", output)
    size = ("--clients", "1,3", "--requests", "2", "--tokens", "6,9,12", "--seeds", "1")
    finished = run_cli("bench", "load", *paths, *size)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(output.read_text())
    assert report["complete"]
    one, three = report["levels"]
    assert (one["statuses"], three["statuses"]) == ({"200": 2}, {"200": 6})
    for level in (one, three):
        assert 0 < level["first_chunk"]["p50"] <= level["latency"]["p50"] <= level["latency"]["p99"]
        assert level["throughput"] == pytest.approx(level["sound_seconds"] / level["seconds"], rel=0.01)
        assert not any(level[name] for name in FAULTS)
        assert level["livez"]["count"] > 0
        assert level["livez"]["failed"] == 0
    assert report["start"]["misses"] == {}
    assert "no request was lost" in finished.stdout


@pytest.mark.slow
def test_a_worker_is_killed_under_load_and_the_server_becomes_ready_again(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    paths = ("--weights", mini, "--warm", baked, "--output", output)
    size = ("--clients", "3", "--requests", "2", "--tokens", "6,9,12", "--seeds", "1")
    finished = run_benchmark("kill", *paths, *size, "--after", "0.5")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(output.read_text())
    kill = report["kill"]
    assert set(kill["statuses"]) <= {"200", "503"}
    assert kill["sound"] >= 6
    assert not any(kill[name] for name in ("lost", "failed", "wrong", "whole_cut"))
    assert kill["ready_again"] > 0
    assert kill["misses"] == {}
    assert report["start"]["misses"] == {}
    assert "no request was lost" in finished.stdout


def test_a_server_with_wrong_audio_is_a_failure(tmp_path: Path) -> None:
    class Wrong(http.server.BaseHTTPRequestHandler):
        """Returns different audio each time, breaks off one response, and fails once without a message."""

        count = 0

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ready": true, "restarts": 0}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            Wrong.count += 1
            if Wrong.count == 5:
                self.send_error(500)
                return
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"\0\0" if Wrong.count == 6 else Wrong.count.to_bytes(4, "little"))

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        output = tmp_path / "report.json"
        url = ("--url", f"http://127.0.0.1:{server.server_port}", "--output", output)
        finished = run_cli("bench", "load", *url, "--clients", "1", "--requests", "4", "--seeds", "1")
        server.shutdown()
    assert finished.returncode == 15
    assert "1 client(s): 1 failed; 1 client(s): 1 cut; 1 client(s): 2 wrong" in finished.stderr
    level = json.loads(output.read_text())["levels"][0]
    assert level["statuses"] == {"200": 3, "500": 1}


@pytest.mark.slow
def test_the_resources_of_a_server_are_sampled_and_judged(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    paths = ("--weights", mini, "--warm", baked, "--output", output)
    finished = run_benchmark("leak", *paths, "--requests", "10", "--tokens", "6,9,12", "--seeds", "1")
    report = json.loads(output.read_text())
    assert finished.returncode == (0 if report["flat"] else 15), finished.stderr
    assert [sample["requests"] for sample in report["samples"]] == list(range(1, 11))
    held = report["held"]
    assert {
        f"{process} {name}" for process in ("front", "workers") for name in ("rss_bytes", "handles", "threads")
    } <= set(held)
    assert held["workers rss_bytes"]["first"] > 2e8
    assert held["workers handles"]["growth"] == 0
    assert held["front handles"]["growth"] == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([900, *[1000] * 99], 0),
        ([1000] * 60 + [1009] * 40, 0.009),
        ([1000] * 60 + [1011] * 40, 0.011),
        ([20] * 95 + [21] * 5, 0.05),
        ([0] * 50 + [1] * 50, 1),
        ([1000] * 50 + [900] * 50, -0.1),
    ],
)
def test_growth_is_measured_after_the_warm_up(values: list[int], expected: float) -> None:
    assert growth(values)["growth"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_an_interrupted_measurement_for_a_gpu_continues(baked: Path, mini: Path, tmp_path: Path) -> None:
    """In a rehearsal on a CPU, a part exceeds its time limit, and the next call completes it."""
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
    assert "not complete: env; run the same command again" in cut.stderr
    complete = run("env")
    assert complete.returncode == 0, complete.stderr
    report = json.loads((out / "env.json").read_text())
    assert report["complete"]
    assert report["steps"]["memory bandwidth"]["bytes_per_second"] > 1e8
    assert report["steps"]["machine"]["versions"]["torch"]
    assert "env: complete" in run("env").stdout
    # Only one of four states was baked. It is measured, and the missing ones are reported as failed.
    incomplete = run("decode")
    assert incomplete.returncode == 14
    decode = json.loads((out / "decode.json").read_text())
    assert set(decode["steps"]) == {"eager"}
    assert set(decode["failed"]) == {"compiled", "aot", "aot, bf16"}
    assert decode["steps"]["eager"]["seconds_per_token"] > 0
    assert set(decode["steps"]["eager"]["rendering"]) == {"12", "25"}
