"""Test `bench report` with real processes: an interrupted run continues, and the state is as good as the baseline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm import benchmark_warmup_effectiveness, run_warmup_benchmarks
from chatterbox_prewarm.bench.report.quality import compare_audio
from chatterbox_prewarm.bench.report.quality_process import QualityOptions
from chatterbox_prewarm.bench.report.states import without_family
from chatterbox_prewarm.errors import BadInputError
from tests.conftest import ROOT, interrupt_cli, run_cli

if TYPE_CHECKING:
    from pathlib import Path

#: The results of the first test below at the last accepted change.
BASELINE = ROOT / "benchmarks" / "results" / "baseline-mini-cpu.json"


@pytest.mark.slow
def test_an_interrupted_report_continues_and_has_no_regression(baked: Path, mini: Path, tmp_path: Path) -> None:
    """Only figures that do not depend on the machine are compared: bytes and misses."""
    output = tmp_path / "report"
    paths: list[str | Path] = ["--weights", mini, "--warm", baked, "--output", output]
    arguments = ["bench", "report", *paths, "--parts", "state,growth"]
    interrupt_cli("growth: text of 89", *arguments)
    interrupted = json.loads((output / "results.json").read_text())
    assert not interrupted["complete"]
    assert list(interrupted["steps"]) == ["state", "growth: text of 13 characters"]

    finished = run_cli("--progress", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "growth: text of 13" not in finished.stderr, "that step was measured before the interrupt"
    results = json.loads((output / "results.json").read_text())
    assert results["steps"]["growth: text of 13 characters"] == interrupted["steps"]["growth: text of 13 characters"]
    assert results["steps"]["growth: 64 voices"]["misses"] == {}
    assert "This report is not complete" in (output / "report.html").read_text(), "the other parts are missing"
    assert not (output / "states").exists()

    compared = run_cli("bench", "compare", BASELINE, output / "results.json", "--force")
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "bytes of the family bytecode" in compared.stdout
    assert "misses of a warm start" in compared.stdout


@pytest.mark.slow
def test_a_warm_start_gives_the_audio_of_upstream_and_its_watermark(baked: Path, mini: Path, tmp_path: Path) -> None:
    from chatterbox_prewarm.bench.report.parts import QUALITY
    from chatterbox_prewarm.bench.speak_process import UPSTREAM, WARM, run_with_cache

    found = {}
    for system in (UPSTREAM, WARM):
        options = QualityOptions(
            system=system,
            weights=str(mini),
            warm=str(baked),
            max_new_tokens=12,
            audio=str(tmp_path / f"{system}.wav"),
            reference=str(tmp_path / "upstream.pt"),
        )
        found[system] = run_with_cache(QUALITY, vars(options))
        assert found[system]["watermark"] > 0.9
    assert found[WARM]["greedy_tokens_equal"] == 200
    pair = compare_audio(tmp_path / "upstream.npz", tmp_path / "warm.npz")
    assert pair["tokens_equal"] is None
    assert pair["mel_distance"] is not None
    assert pair["mel_distance"] < 0.01
    assert pair["decibels"] is None or pair["decibels"] > 50


def test_a_state_without_a_family_is_valid(baked: Path, mini: Path, tmp_path: Path) -> None:
    state = without_family(baked, "numba", tmp_path / "state")
    verified = run_cli("verify", "--warm", state, "--weights", mini)
    assert verified.returncode == 0, verified.stderr
    assert not (state / "numba").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("starts", "songs")}, "there is no part 'songs'"),
        ({"profiles": ("fast",)}, "there is no profile 'fast'"),
        ({"rounds": "3"}, "'3' is not a number of rounds"),
        ({"clients": (1, 0)}, "0 is not a number of rounds"),
        ({"device": "tpu"}, "tpu"),
        ({"warm": "/nowhere"}, "/nowhere"),
        ({"weights": "/nowhere"}, "/nowhere"),
    ],
)
def test_an_invalid_report_is_refused_before_it_starts(
    options: dict[str, object], message: str, baked: Path, mini: Path, tmp_path: Path
) -> None:
    arguments: dict[str, object] = {"weights": mini, "warm": baked, **options}
    with pytest.raises(Exception, match=message) as caught:
        run_warmup_benchmarks(tmp_path / "report", **arguments)  # type: ignore[arg-type]
    assert caught.type.__module__ == "chatterbox_prewarm.errors"
    assert not (tmp_path / "report" / "results.json").exists()


def test_too_little_disk_or_memory_is_reported_before_the_start(
    baked: Path, mini: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a state, this is said before one is baked."""
    steps: list[str] = []
    monkeypatch.setattr("chatterbox_prewarm.bench.room.usable_memory", lambda: 10**12)
    for warm in (baked, None):
        with pytest.raises(BadInputError, match=r"has 0\.0 GB of free space, and a report needs 0\.7"):
            run_warmup_benchmarks(small_disk / "report", weights=mini, warm=warm, say=steps.append)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(BadInputError, match=r"has 0\.0 GB of free space, and a bake needs 0\.4"):
        benchmark_warmup_effectiveness(weights=mini, say=steps.append)
    monkeypatch.setattr("chatterbox_prewarm.bench.room.usable_memory", lambda: 10**9)
    for warm in (baked, None):
        with pytest.raises(BadInputError, match=r"1\.0 GB of memory are available, and a report .* needs 5\.\d"):
            run_warmup_benchmarks(tmp_path / "report", weights=mini, warm=warm, say=steps.append)
        with pytest.raises(BadInputError, match=r"1\.0 GB of memory are available, and a (start|bake) needs 2\.\d"):
            benchmark_warmup_effectiveness(weights=mini, warm=warm, say=steps.append)
    assert steps == []
    assert not (tmp_path / "report").exists()


def test_an_invalid_part_is_refused_before_a_state_is_baked(mini: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(BadInputError, match="there is no part 'songs'"):
        run_warmup_benchmarks(tmp_path / "report", weights=mini, parts=("songs",), say=steps.append)
    assert steps == []


@pytest.mark.slow
def test_a_start_of_the_ablation_uses_the_bytecode_of_the_state_only(baked: Path, mini: Path) -> None:
    from chatterbox_prewarm.bench.speak_process import WARM, SpeakOptions, speak_in_fresh_process

    options = SpeakOptions(
        system=WARM,
        weights=str(mini),
        warm=str(baked),
        text="Hi.",
        max_new_tokens=12,
        policy="fallback",
        speak_once=False,
    )
    found = speak_in_fresh_process(options, bytecode=False)
    assert found["misses"] == {}
    assert found["hits"]["bytecode"] > 100
    assert len(found["requests"]) == 1
