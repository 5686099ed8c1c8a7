"""`bench load` reports each kind of fault."""

from __future__ import annotations

from typing import Any

import pytest

from chatterbox_prewarm.bench.load import faults

LEVEL = {"clients": 4, "lost": 0, "failed": 0, "cut": 0, "wrong": 0, "livez": {"count": 9, "failed": 0}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"lost": 1}, ["4 client(s): 1 lost"]),
        ({"cut": 1, "wrong": 2}, ["4 client(s): 1 cut", "4 client(s): 2 wrong"]),
        ({"livez": {"count": 9, "failed": 2}}, ["4 client(s): 2 probes of /livez failed"]),
    ],
)
def test_faults_under_load_are_reported(changes: dict[str, Any], expected: list[str]) -> None:
    assert faults({"levels": [{**LEVEL, **changes}, LEVEL]}) == expected
