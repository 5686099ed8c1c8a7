"""Test the event log: counters, reasons with their next steps, phases and timers."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.system.metrics import StartMetrics, exec_time, now
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_hits_and_misses_are_counted_by_family_with_their_reasons() -> None:
    metrics = StartMetrics(origin=0.0)
    metrics.hit("numba")
    metrics.hit("numba", 4)
    metrics.miss("numba", "compiled f", next_step="bake again")
    metrics.miss("signal", "computed g", 2, next_step="")
    assert metrics.hits == {"numba": 5}
    assert metrics.misses == {"numba": 1, "signal": 2}
    assert metrics.reasons == ["numba: compiled f", "signal: computed g"]
    assert metrics.next_steps == {"numba: compiled f": "bake again"}


def test_a_miss_is_logged_once_with_its_next_step(caplog: pytest.LogCaptureFixture) -> None:
    metrics = StartMetrics(origin=0.0)
    for _ in range(2):
        metrics.miss("numba", "compiled f", next_step="bake again")
        metrics.miss("signal", "computed g", next_step="")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["miss in numba: compiled f; next: bake again", "miss in signal: computed g"]


def test_every_miss_names_a_next_step_unless_there_is_nothing_to_do() -> None:
    """`next_step` is a required argument; only `bytecode` gives an empty one, for imports after the start."""
    given: dict[str, list[ast.expr]] = {}
    for path in sorted((ROOT / "chatterbox_prewarm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "miss":
                values = [keyword.value for keyword in node.keywords if keyword.arg == "next_step"]
                assert len(values) == 1, f"{path}:{node.lineno}"
                given.setdefault(path.stem, []).extend(values)
    assert {"prepare", "usable", "attach", "executors", "numba_cache"} <= set(given)
    empty = [
        module
        for module, values in given.items()
        for value in values
        for part in ast.walk(value)
        if isinstance(part, ast.Constant) and not part.value
    ]
    assert empty == ["bytecode"]


def test_phases_are_in_the_order_of_their_starts_even_after_an_error() -> None:
    metrics = StartMetrics(origin=0.0)
    with metrics.phase("outer"), metrics.phase("inner"):
        pass
    with pytest.raises(KeyError), metrics.phase("failing"):
        raise KeyError
    assert [phase["name"] for phase in metrics.phases] == ["outer", "inner", "failing"]
    outer, inner, _ = metrics.phases
    assert outer["start"] <= inner["start"]
    assert outer["seconds"] >= inner["seconds"] >= 0


def test_a_timer_adds_up() -> None:
    metrics = StartMetrics(origin=0.0)
    metrics.add_seconds("compile", 2.0)
    metrics.add_seconds("compile", 0.5)
    assert metrics.timers == {"compile": 2.5}


def test_the_log_can_be_written_as_json_with_every_field() -> None:
    metrics = StartMetrics(origin=0.0)
    with metrics.phase("prepare"):
        metrics.hit("numba")
    metrics.miss("signal", "not found", next_step="bake again")
    metrics.add_seconds("numba load", 0.25)
    assert metrics.mark("attached") == metrics.marks["attached"]
    log = json.loads(json.dumps(metrics.to_dict()))
    counters = {"loaded", "hits", "misses", "reasons", "next_steps", "modules"}
    assert set(log) == {"phases", "marks", "profile", "state", "cross_compiled", "timers"} | counters
    assert 0 < log["modules"] <= len(sys.modules)
    assert log["hits"] == {"numba": 1}
    assert log["misses"] == {"signal": 1}
    assert log["reasons"] == ["signal: not found"]
    assert log["next_steps"] == {"signal: not found": "bake again"}
    assert log["timers"] == {"numba load": 0.25}
    assert [phase["name"] for phase in log["phases"]] == ["prepare"]
    assert list(log["marks"]) == ["attached"]


def test_the_clock_is_shared_with_child_processes_with_any_name(tmp_path: Path) -> None:
    program = tmp_path / "a ) 1 2 (b"  # /proc/PID/stat contains the name without quotes
    program.symlink_to(shutil.which("sleep") or "sleep")
    with subprocess.Popen([str(program), "30"]) as child:
        started = exec_time(child.pid)
        child.kill()
    assert exec_time() == exec_time(os.getpid())
    assert exec_time() <= started <= now()
