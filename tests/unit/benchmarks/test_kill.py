"""`benchmarks kill` reports each kind of fault."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kill import faults

COUNTS = dict.fromkeys(("lost", "failed", "cut", "wrong", "whole_cut", "livez_failed"), 0)
KILL = {**COUNTS, "ready_again": 4.0, "misses": {}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"cut": 2}, []),  # a stream that had begun
        ({"livez_failed": 3}, ["3 probes of /livez failed"]),
        ({"misses": {"numba": 2, "aot": 1}}, ["the new start had misses: 1 of aot, 2 of numba"]),
        ({"ready_again": None}, ["the server was not ready again"]),
        ({"whole_cut": 1, "wrong": 1}, ["1 wrong", "1 complete responses cut"]),
    ],
)
def test_faults_after_a_killed_worker_are_reported(changes: dict[str, Any], expected: list[str]) -> None:
    assert faults({"kill": {**KILL, **changes}}) == expected
