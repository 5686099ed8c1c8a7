"""The results of a measurement on a GPU are kept if the machine is lost in the middle of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.record import Plan, Record, is_complete
from chatterbox_prewarm.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


PLAN = Plan(out="/out", device="cpu", size="mini", rounds=1)


def content(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_a_recorded_step_is_not_repeated(tmp_path: Path) -> None:
    path, calls = tmp_path / "decode.json", []

    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"of": name}

    first = Record(path, PLAN, lambda _: None)
    assert first.step("one", measure, "one") == {"of": "one"}
    assert content(path) == {"plan": asdict(PLAN), "complete": False, "failed": {}, "steps": {"one": {"of": "one"}}}
    second = Record(path, PLAN, lambda _: None)  # the first was interrupted
    assert second.step("one", measure, "one") == {"of": "one"}
    second.step("two", measure, "two")
    second.write(complete=True)
    assert calls == ["one", "two"]
    assert content(path)["complete"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_step_does_not_prevent_others_and_is_retried(tmp_path: Path) -> None:
    path, lines = tmp_path / "start.json", list[str]()

    def fail() -> dict[str, Any]:
        raise ModelError("no speech", next_step="none")

    record = Record(path, PLAN, lines.append)
    assert record.step("bad", fail) is None
    record.step("good", dict)
    record.write(complete=True)
    assert content(path) == {
        "plan": asdict(PLAN),
        "complete": False,
        "failed": {"bad": "no speech"},
        "steps": {"good": {}},
    }
    assert "bad failed: no speech" in lines
    second = Record(path, PLAN, lines.append)
    second.step("bad", dict)
    second.write(complete=True)
    assert content(path) == {"plan": asdict(PLAN), "complete": True, "failed": {}, "steps": {"bad": {}, "good": {}}}


def test_results_of_another_plan_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    rehearsal = Record(path, PLAN, lambda _: None)
    rehearsal.step("one", dict)
    rehearsal.write(complete=True)
    assert is_complete(path, PLAN)
    assert not is_complete(path, replace(PLAN, device="cuda"))
    assert Record(path, replace(PLAN, rounds=3), lambda _: None).steps == {}
    assert not is_complete(tmp_path / "missing.json", PLAN)


def test_the_parts_and_the_executions_on_a_gpu() -> None:
    assert list(PARTS) == ["env", "bake", "prove", "start", "decode", "profiles", "memory", "serve"]
    plan = Plan(out="/out", device="cuda", size="full", rounds=3)
    assert [(name, how.profile, how.graphs, how.t3_dtype) for name, how in plan.executions().items()] == [
        ("eager", "eager", False, "float32"),
        ("eager, graphs", "eager", True, "float32"),
        ("compiled, graphs", "compiled", True, "float32"),
        ("aot, graphs", "aot", True, "float32"),
        ("aot, graphs, bf16", "aot", True, "bfloat16"),
    ]
    assert len({plan.state(name) for name in plan.executions()}) == 5
