"""Test which changes between two reports are regressions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.bench.report.compare import BETTER, REGRESSION, SAME, UNKNOWN, compare, interval, judge
from chatterbox_prewarm.bench.report.figures import Figure, figures, noise, slope
from chatterbox_prewarm.errors import BadInputError
from tests.conftest import run_cli
from tests.helpers.reports import pair, results, start

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), SAME),
        ((1.0, 1.02, 0.98), (1.09, 1.1, 1.08), SAME),
        ((1.0, 1.02, 0.98), (1.3, 1.31, 1.29), REGRESSION),
        ((1.0, 1.02, 0.98), (0.7, 0.71, 0.69), BETTER),
        ((1.0, 1.6, 0.9), (1.3, 1.31, 1.0), SAME),
        ((1.0,), (1.3,), REGRESSION),
    ],
)
def test_a_timed_figure_is_a_regression_if_its_interval_lies_beyond_the_noise(
    old: tuple[float, ...], new: tuple[float, ...], verdict: str
) -> None:
    change = judge("start", Figure(values=old, timed=True), Figure(values=new, timed=True), 0.1)
    assert change.verdict == verdict
    assert change.interval[0] <= change.new / change.old <= change.interval[1]


def test_a_timed_figure_without_an_a_a_run_is_not_judged() -> None:
    figure = Figure(values=(1.0,), timed=True)
    assert judge("start", figure, Figure(values=(9.0,), timed=True), None).verdict == UNKNOWN


@pytest.mark.parametrize(
    ("old", "new", "higher_is_better", "verdict"),
    [
        (100.0, 100.5, False, SAME),
        (100.0, 102.0, False, REGRESSION),
        (100.0, 90.0, False, BETTER),
        (0.0, 0.0, False, SAME),
        (0.0, 1.0, False, REGRESSION),
        (1.0, 0.9, True, REGRESSION),
        (0.9, 1.0, True, BETTER),
    ],
)
def test_an_exact_figure_needs_no_a_a_run(old: float, new: float, higher_is_better: bool, verdict: str) -> None:
    before, after = (Figure(values=(value,), higher_is_better=higher_is_better) for value in (old, new))
    assert judge("bytes", before, after, None).verdict == verdict


def test_the_interval_contains_the_ratio_and_narrows_with_more_rounds() -> None:
    few = interval((1.0, 1.2, 0.8), (2.0, 2.4, 1.6))
    many = interval((1.0, 1.2, 0.8) * 5, (2.0, 2.4, 1.6) * 5)
    assert few[0] <= many[0] <= 2.0 <= many[1] <= few[1]


def test_the_noise_is_the_largest_change_between_two_equal_starts() -> None:
    steps = results()["steps"]
    assert noise(steps) == pytest.approx(0.0328, abs=1e-4)
    assert noise({name: step for name, step in steps.items() if "again" not in name}) is None


def test_the_figures_of_a_report() -> None:
    found = figures(results()["steps"])
    assert found["exec to attached, warm / upstream"].values == pytest.approx((0.15, 3.1 / 22))
    assert found["exec to attached, warm / import torch"].values == pytest.approx((3.0, 3.1 / 1.1))
    assert found["misses of a warm start"].values == (0.0,)
    assert found["bytes of the family numba"].values == (2_300_000.0,)
    assert found["tokens equal, cold / warm"].higher_is_better
    assert "tokens equal, upstream / warm" not in found, "upstream's tokens are not recorded"


def test_equal_reports_have_no_regression(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", results())
    comparison = compare(old, old)
    assert comparison.regressions == []
    assert {change.verdict for change in comparison.changes} == {SAME}
    assert comparison.conditions == ()


def test_the_command_fails_on_a_regression_and_names_it(tmp_path: Path) -> None:
    worse = results()
    worse["steps"] |= {f"starts: warm, {number}": start(3.0, 10.0, misses=1) for number in (1, 2)}
    worse["steps"]["quality: cold / warm"] = pair(0.5)
    old, new = write(tmp_path / "old.json", results()), write(tmp_path / "new.json", worse)
    failed = run_cli("bench", "compare", old, new)
    assert failed.returncode == 15, failed.stderr
    assert "worse than before: misses of a warm start; tokens equal, cold / warm" in failed.stderr
    assert "REGRESSION" in failed.stdout
    assert run_cli("bench", "compare", new, old).returncode == 0, "an improvement is no error"


def test_reports_of_different_machines_are_compared_only_if_forced(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", results())
    other = results(machine={**results()["plan"]["machine"], "gpu": "NVIDIA L4"}, versions={"torch": "2.11.0"})
    new = write(tmp_path / "new.json", other)
    with pytest.raises(BadInputError, match="machine gpu:  there, NVIDIA L4 here"):
        compare(old, new)
    comparison = compare(old, new, force=True)
    assert comparison.conditions == ("machine gpu:  there, NVIDIA L4 here", "versions torch: 2.6.0 there, 2.11.0 here")
    assert comparison.table().startswith("different conditions: machine gpu")


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    old = write(tmp_path / "old.json", results())
    with pytest.raises(BadInputError, match="there is no file"):
        compare(old, tmp_path / "missing.json")
    with pytest.raises(BadInputError, match="does not contain results"):
        compare(old, write(tmp_path / "other.json", {"steps": {}}))
    with pytest.raises(BadInputError, match="no common figure"):
        compare(old, write(tmp_path / "empty.json", results(steps={})))


def test_the_slope_of_points() -> None:
    assert slope([(1, 10), (2, 12), (3, 14)]) == pytest.approx(2)
    assert slope([(1, 10)]) is None
    assert slope([(1, 10), (1, 12)]) is None
