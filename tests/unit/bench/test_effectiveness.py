"""Test `WarmupMetrics` and how it is computed from the results of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm import WarmupMetrics, benchmark_warmup_effectiveness
from chatterbox_prewarm.bench.effectiveness import summarize
from chatterbox_prewarm.errors import PrewarmError

if TYPE_CHECKING:
    from pathlib import Path


def run(first_audio: float, first_chunk: float, peak: int, **more: Any) -> dict[str, Any]:
    """Return a result of `speak_process`."""
    request = {"seconds": first_chunk + 0.1, "first_chunk": first_chunk, "gaps": [0.1]}
    marks = {"attached": first_audio - 3.0, "ready": first_audio - 2.0, "first_audio": first_audio}
    return {**marks, "requests": [request], "peak_bytes": peak, "peak_gpu_bytes": 0, **more}


def test_the_metrics_are_medians_of_the_processes() -> None:
    cold = [run(20.0, 5.0, 3_000_000, second_model=4.0), run(30.0, 6.0, 3_000_000), run(22.0, 5.5, 3_000_000)]
    warm = [run(10.0, 2.0, 2_000_000), run(11.0, 2.5, 2_000_000), run(90.0, 9.0, 2_000_000)]
    metrics = summarize(cold, warm)
    assert metrics == WarmupMetrics(
        cold_start_latency=22.0,
        warm_start_latency=11.0,
        warmup_duration=1.0,
        memory_overhead_mb=-1.0,
        first_chunk_improvement_ms=3000.0,
        second_model_latency=4.0,
    )
    assert metrics.latency_improvement_ratio == 2.0


def test_on_a_gpu_the_memory_is_that_of_torchs_allocator() -> None:
    cold, warm = run(9.0, 1.0, 5, peak_gpu_bytes=4_000_000), run(3.0, 1.0, 9, peak_gpu_bytes=3_000_000)
    assert summarize([cold], [warm]).memory_overhead_mb == -1.0


def test_the_report_has_every_figure() -> None:
    metrics = WarmupMetrics(
        cold_start_latency=20.0,
        warm_start_latency=8.0,
        warmup_duration=1.25,
        memory_overhead_mb=-40.0,
        first_chunk_improvement_ms=420.0,
        second_model_latency=5.5,
    )
    report = metrics.report()
    for words in (
        "20.00 s",
        "8.00 s (2.50 times as fast, 60% less)",
        "1.25 s",
        "-40 MB",
        "420 ms",
        "5.50 s (not a cold",
    ):
        assert words in report
    assert "second model" not in WarmupMetrics(20.0, 8.0, 1.25, -40.0, 420.0).report()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (7, {}, "text"),
        ("", {}, "text"),
        ("Hello.", {"iterations": 0}, "0 iterations"),
        ("Hello.", {"iterations": "3"}, "'3' iterations"),
        ("Hello.", {"device": "tpu"}, "tpu"),
        ("Hello.", {"warm": "/nowhere"}, "/nowhere"),
    ],
)
def test_invalid_arguments_are_refused_at_once(
    text: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PrewarmError, match=message):
        benchmark_warmup_effectiveness(text, **{"weights": tmp_path, **arguments})
