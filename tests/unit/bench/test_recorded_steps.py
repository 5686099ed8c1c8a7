"""The results of a measurement are kept if it is interrupted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.bench.recorded_steps import RecordedSteps, is_complete
from chatterbox_prewarm.errors import BadInputError, ModelError

if TYPE_CHECKING:
    from pathlib import Path


PLAN = {"device": "cpu", "rounds": 1, "clients": (1, 4)}
WRITTEN = {"device": "cpu", "rounds": 1, "clients": [1, 4]}


def content(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_a_recorded_step_is_not_repeated(tmp_path: Path) -> None:
    path, calls = tmp_path / "decode.json", []

    def measure(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"of": name}

    first = RecordedSteps(path, PLAN, lambda _: None)
    assert first.step("one", measure, "one") == {"of": "one"}
    assert content(path) == {"plan": WRITTEN, "complete": False, "failed": {}, "steps": {"one": {"of": "one"}}}
    second = RecordedSteps(path, PLAN, lambda _: None)  # the first was interrupted
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

    record = RecordedSteps(path, PLAN, lines.append)
    assert record.step("bad", fail) is None
    record.step("good", dict)
    record.write(complete=True)
    assert content(path) == {
        "plan": WRITTEN,
        "complete": False,
        "failed": {"bad": "no speech"},
        "steps": {"good": {}},
    }
    assert "bad failed: no speech" in lines
    second = RecordedSteps(path, PLAN, lines.append)
    second.step("bad", dict)
    second.write(complete=True)
    assert content(path) == {"plan": WRITTEN, "complete": True, "failed": {}, "steps": {"bad": {}, "good": {}}}


def test_results_of_another_plan_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    rehearsal = RecordedSteps(path, PLAN, lambda _: None)
    rehearsal.step("one", dict)
    rehearsal.write(complete=True)
    assert is_complete(path, PLAN)
    assert not is_complete(path, {**PLAN, "device": "cuda"})
    with pytest.raises(BadInputError, match="rounds: 1 there, 3 here"):
        RecordedSteps(path, {**PLAN, "rounds": 3}, lambda _: None)
    assert content(path)["steps"] == {"one": {}}
    assert not is_complete(tmp_path / "missing.json", PLAN)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": {}}'])
def test_a_file_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match="does not contain results"):
        RecordedSteps(path, PLAN, lambda _: None)
    assert path.read_text() == text
