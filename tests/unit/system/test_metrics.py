"""Test the event log: counters, reasons, phases and timers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.system.metrics import StartMetrics, exec_time, now

if TYPE_CHECKING:
    from pathlib import Path


def test_hits_and_misses_are_counted_by_family_with_their_reasons() -> None:
    metrics = StartMetrics(origin=0.0)
    metrics.hit("numba")
    metrics.hit("numba", 4)
    metrics.miss("numba", "compiled f")
    metrics.miss("signal")
    assert metrics.hits == {"numba": 5}
    assert metrics.misses == {"numba": 1, "signal": 1}
    assert metrics.reasons == ["numba: compiled f"]


def test_a_miss_with_a_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    StartMetrics(origin=0.0).miss("numba", "compiled f")
    assert "miss in numba: compiled f" in caplog.text


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
    metrics.miss("signal", "not found")
    metrics.add_seconds("numba load", 0.25)
    assert metrics.mark("attached") == metrics.marks["attached"]
    log = json.loads(json.dumps(metrics.to_dict()))
    counters = {"loaded", "hits", "misses", "reasons", "modules"}
    assert set(log) == {"phases", "marks", "profile", "state", "cross_compiled", "timers"} | counters
    assert 0 < log["modules"] <= len(sys.modules)
    assert log["hits"] == {"numba": 1}
    assert log["misses"] == {"signal": 1}
    assert log["reasons"] == ["signal: not found"]
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
