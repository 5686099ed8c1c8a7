"""What a run on a GPU has measured outlives a machine that is lost in the middle of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.gpu.parts import PARTS
from chatterbox_prewarm.bench.gpu.record import Plan, Record
from chatterbox_prewarm.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_each_step_is_written_when_it_is_done_and_not_done_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "decode.json", []

    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"of": name}

    first = Record(path, lambda _: None)
    assert first.step("one", measure, "one") == {"of": "one"}
    assert content(path) == {"complete": False, "failed": {}, "steps": {"one": {"of": "one"}}}
    again = Record(path, lambda _: None)  # the first was cut off
    assert again.step("one", measure, "one") == {"of": "one"}
    again.step("two", measure, "two")
    again.write(complete=True)
    assert calls == ["one", "two"]
    assert content(path)["complete"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_step_that_fails_loses_no_other_and_is_tried_again(tmp_path: Path) -> None:
    path, said = tmp_path / "start.json", list[str]()

    def fail() -> dict[str, Any]:
        raise ModelError("no speech", next_step="none")

    record = Record(path, said.append)
    assert record.step("bad", fail) is None
    record.step("good", dict)
    record.write(complete=True)
    assert content(path) == {"complete": False, "failed": {"bad": "no speech"}, "steps": {"good": {}}}
    assert "bad failed: no speech" in said
    again = Record(path, said.append)
    again.step("bad", dict)
    again.write(complete=True)
    assert content(path) == {"complete": True, "failed": {}, "steps": {"bad": {}, "good": {}}}


def test_the_parts_and_what_is_compared_on_a_gpu() -> None:
    assert list(PARTS) == ["env", "bake", "prove", "start", "decode", "profiles", "memory"]
    plan = Plan(out="/out", device="cuda", size="full", rounds=3)
    assert [(name, made.profile, made.graphs, made.t3_dtype) for name, made in plan.executions().items()] == [
        ("eager", "eager", False, "float32"),
        ("eager, graphs", "eager", True, "float32"),
        ("compiled, graphs", "compiled", True, "float32"),
        ("aot, graphs", "aot", True, "float32"),
        ("aot, graphs, bf16", "aot", True, "bfloat16"),
    ]
    assert len({plan.state(name) for name in plan.executions()}) == 5
