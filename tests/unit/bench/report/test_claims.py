"""Test that the table of claims follows from the results."""

from __future__ import annotations

import pytest

from chatterbox_prewarm.bench.report.claims import MET, NOT_MEASURED, NOT_MET, Claim, budgets, claims
from tests.helpers.reports import pair, results, speech, start, t3_calls


def claim(name: str, **steps: object) -> Claim:
    """Return a claim, judged by results in which some steps are others."""
    found = {**results()["steps"], **steps}
    return next(row for row in claims(found) if row.claim == name)


def test_every_claim_is_judged() -> None:
    assert [row.claim for row in claims(results()["steps"])] == [
        "cold start, model loaded",
        "cold start, first audio",
        "first chunk",
        "first chunk, T3's first 8 tokens",
        "chunk times",
        "peak memory of the first run",
        "quality",
    ]
    assert {row.verdict for row in claims(results()["steps"])} == {MET}
    assert {row.verdict for row in claims({})} == {NOT_MEASURED}


def test_a_value_has_its_median_and_its_range() -> None:
    row = claim("cold start, first audio")
    assert row.measured == "68% less (67% to 69% less)"
    assert row.claimed == "50 to 70 % less"


@pytest.mark.parametrize(
    ("name", "step", "worse"),
    [
        ("cold start, first audio", "starts: upstream, 1", start(5.0, 11.0)),
        ("cold start, model loaded", "starts: upstream, 1", start(5.0, 11.0)),
        ("first chunk", "requests: cold, 1", speech(4.4, 4.0, gaps=(0.5, 1.5))),
        ("first chunk, T3's first 8 tokens", "calls", t3_calls(upstream=0.6)),
        ("chunk times", "requests: warm, 1", speech(4.2, 4.0, gaps=(0.1, 3.1))),
        ("peak memory of the first run", "requests: upstream, 1", speech(9.0, 4.0, gaps=())),
        ("quality", "quality: cold / warm", pair(0.99)),
        ("quality", "quality: cold / warm", pair(1.0, 30.0)),
        ("quality", "quality: warm", {"watermark": 0.5, "seconds": 2.0}),
    ],
)
def test_a_claim_that_does_not_hold_is_not_met(name: str, step: str, worse: object) -> None:
    steps = {step: worse}
    if name.startswith("cold start"):
        steps["starts: upstream, 2"] = worse
    assert claim(name, **steps).verdict == NOT_MET


def test_more_memory_is_called_more() -> None:
    row = claim("peak memory of the first run", **{"requests: upstream, 1": speech(9.0, peak_bytes=1_000_000_000)})
    assert row.measured == "100% more"


def test_on_a_gpu_the_memory_is_that_of_its_allocator() -> None:
    steps = {
        "requests: upstream, 1": speech(9.0, peak_gpu_bytes=4_000_000_000),
        "requests: warm, 1": speech(4.0, peak_gpu_bytes=3_000_000_000),
    }
    assert claim("peak memory of the first run", **steps).measured == "25% less"


_WITHIN = {"first_to_sum": 1.1, "first_to_steady": 1.0, "first_chunk_to_steady": 1.05, "ready_to_steady": 0.1}


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({}, []),
        ({"attached": 1.5}, ["exec to attached"]),
        ({"first_to_sum": 1.2}, ["exec to first audio"]),
        ({"first_to_steady": 1.2}, ["first request"]),
        ({"first_chunk_to_steady": 1.2}, ["first chunk of the first stream"]),
        ({"ready_to_steady": 0.2}, ["check before ready"]),
        ({"misses": {"numba": 1}}, ["misses"]),
    ],
)
def test_a_start_is_compared_with_every_budget(worse: dict[str, object], missed: list[str]) -> None:
    warm = {**start(1.2, 10.0), **_WITHIN, **worse}
    found = budgets({"starts: torch, 1": {"imported": 1.0}, "starts: warm, 1": warm})
    assert len(found) == 6
    assert [row.claim for row in found if row.verdict == NOT_MET] == missed
    assert {row.verdict for row in found} <= {MET, NOT_MET}
    assert {row.verdict for row in budgets({})} == {NOT_MEASURED}


def test_a_single_miss_in_any_warm_start_is_over_the_budget() -> None:
    steps = {f"starts: {name}, {one}": start(1.2, 10.0) for name in ("warm", "warm again") for one in (1, 2)}
    steps["starts: warm again, 2"] = start(1.2, 10.0, misses=1)
    row = budgets(steps)[-1]
    assert (row.claim, row.measured, row.verdict) == ("misses", "1", NOT_MET)
