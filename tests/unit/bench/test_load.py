"""What `bench load` counts as a fault."""

from __future__ import annotations

from typing import Any

import pytest

from chatterbox_prewarm.bench.load import faults

NONE = {"lost": 0, "failed": 0, "cut": 0, "wrong": 0}
LEVEL = {"clients": 4, **NONE, "livez": {"count": 9, "failed": 0}}
KILL = {**NONE, "whole_cut": 0, "ready_again": 4.0, "livez_failed": 0, "misses": {}}


@pytest.mark.parametrize(
    ("level", "kill", "found"),
    [
        ({}, {}, []),
        ({}, {"cut": 2}, []),  # a stream that had begun
        ({"lost": 1}, {}, ["4 client(s): 1 lost"]),
        ({"livez": {"count": 9, "failed": 2}}, {}, ["4 client(s): 2 probes of /livez failed"]),
        ({}, {"livez_failed": 3}, ["a killed worker: 3 probes of /livez failed"]),
        (
            {},
            {"misses": {"numba": 2, "aot": 1}},
            ["a killed worker: misses of the new start: 1 of aot, 2 of numba"],
        ),
        ({}, {"ready_again": None}, ["a killed worker: not ready again"]),
        ({}, {"whole_cut": 1, "wrong": 1}, ["a killed worker: 1 wrong", "a killed worker: 1 whole answers cut"]),
    ],
)
def test_what_must_not_happen_under_load_is_a_fault(
    level: dict[str, Any], kill: dict[str, Any], found: list[str]
) -> None:
    assert faults({"levels": [{**LEVEL, **level}], "kill": {**KILL, **kill}}) == found
    assert faults({"levels": [LEVEL]}) == []
