"""The benchmarks measure what they say, on a shortened checkpoint: not how long, but what, of whom, in which order."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.leak import growth
from benchmarks.profiles import measure_one, summarize, table, voice_of
from chatterbox_prewarm.bench.load import FAULTS
from chatterbox_prewarm.model.profiles import Execution
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


def test_load_is_measured_by_level_and_every_sound_is_the_right_one(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    places = ("--weights", mini, "--warm", baked, "--output", output)
    size = ("--clients", "1,3", "--requests", "2", "--tokens", "6,9,12", "--seeds", "1")
    done = run_cli("bench", "load", *places, *size, "--kill-worker-after", "0.5")
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    one, three = report["levels"]
    assert (one["statuses"], three["statuses"]) == ({"200": 2}, {"200": 6})
    for level in (one, three):
        assert 0 < level["first_chunk"]["p50"] <= level["latency"]["p50"] <= level["latency"]["p99"]
        assert level["throughput"] == pytest.approx(level["sound_seconds"] / level["seconds"], rel=0.01)
        assert not any(level[name] for name in FAULTS)
        assert level["livez"]["count"] > 0
        assert level["livez"]["failed"] == 0
    kill = report["kill"]
    assert set(kill["statuses"]) <= {"200", "503"}
    assert kill["sound"] >= 6
    assert not any(kill[name] for name in ("lost", "failed", "wrong", "whole_cut"))
    assert kill["ready_again"] > 0
    assert kill["misses"] == {}
    assert report["start"]["misses"] == {}
    assert "no request lost" in done.stdout


def test_load_of_a_server_that_answers_otherwise_is_a_failure(tmp_path: Path) -> None:
    class Wrong(http.server.BaseHTTPRequestHandler):
        """Gives another sound each time, breaks one off, and refuses one without a word."""

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
            """Nothing: the test knows what was asked."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        output = tmp_path / "report.json"
        url = ("--url", f"http://127.0.0.1:{server.server_port}", "--output", output)
        done = run_cli("bench", "load", *url, "--clients", "1", "--requests", "4", "--seeds", "1")
        server.shutdown()
    assert done.returncode == 15
    assert "1 client(s): 1 failed; 1 client(s): 1 cut; 1 client(s): 2 wrong" in done.stderr
    level = json.loads(output.read_text())["levels"][0]
    assert level["statuses"] == {"200": 3, "500": 1}


def test_what_a_server_holds_is_sampled_and_judged(baked: Path, mini: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    places = ("--weights", mini, "--warm", baked, "--output", output)
    done = run_cli("bench", "leak", *places, "--requests", "10", "--tokens", "6,9,12", "--seeds", "1")
    report = json.loads(output.read_text())
    assert done.returncode == (0 if report["flat"] else 15), done.stderr
    assert [sample["requests"] for sample in report["samples"]] == list(range(1, 11))
    held = report["held"]
    assert {f"{who} {what}" for who in ("front", "workers") for what in ("rss_bytes", "handles", "threads")} <= set(
        held
    )
    assert held["workers rss_bytes"]["first"] > 2e8
    assert held["workers handles"]["growth"] == 0
    assert held["front handles"]["growth"] == 0


@pytest.mark.parametrize(
    ("values", "grown"),
    [
        ([900, *[1000] * 99], 0),
        ([1000] * 60 + [1009] * 40, 0.009),
        ([1000] * 60 + [1011] * 40, 0.011),
        ([20] * 95 + [21] * 5, 0.05),
        ([0] * 50 + [1] * 50, 1),
        ([1000] * 50 + [900] * 50, -0.1),
    ],
)
def test_a_growth_is_that_after_the_warm_up(values: list[int], grown: float) -> None:
    assert growth(values)["growth"] == pytest.approx(grown, abs=1e-5)


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
