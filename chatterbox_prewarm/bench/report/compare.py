"""`bench compare`: compare the figures of two reports, with intervals and with the noise of their A/A runs."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.recorded_steps import differences, read_results
from chatterbox_prewarm.bench.report.figures import figures, noise
from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.bench.report.figures import Figure

SAME, BETTER, REGRESSION, UNKNOWN = "same", "better", "REGRESSION", "no A/A run"
#: Fields of the plan that must be equal, because the figures depend on them.
_CONDITIONS = ("machine", "versions", "device", "weights")
#: Change of a figure without noise that is still the same: paths in compiled files have different lengths.
_TOLERANCE = 0.01
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a figure changed.

    Attributes:
        figure: name of the figure.
        old, new: its medians.
        interval: 95 % interval of new divided by old; both ends are equal if each report has a single round.
        allowed: natural logarithm of the ratio up to which a change counts as noise.
        verdict: `SAME`, `BETTER`, `REGRESSION` or `UNKNOWN`.
    """

    figure: str
    old: float
    new: float
    interval: tuple[float, float]
    allowed: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The changes between two reports.

    Attributes:
        changes: the figures that both reports have.
        conditions: a phrase for each condition in which the reports differ.
    """

    changes: tuple[Change, ...]
    conditions: tuple[str, ...]

    @property
    def regressions(self) -> list[str]:
        """Names of the figures that became worse beyond the noise."""
        return [change.figure for change in self.changes if change.verdict == REGRESSION]

    def table(self) -> str:
        """Format the comparison."""
        width = max(len(change.figure) for change in self.changes)
        lines = [f"different conditions: {condition}" for condition in self.conditions]
        lines.append(f"{'':{width}}  {'old':>12}  {'new':>12}  {'new / old':>9}  95 % interval")
        for change in self.changes:
            low, high = change.interval
            ratio = f"{_ratio(change.new, change.old):9.3f}"
            lines.append(
                f"{change.figure:{width}}  {change.old:12.5g}  {change.new:12.5g}  {ratio}  "
                f"{low:.3f} to {high:.3f}  {change.verdict}"
            )
        return "\n".join(lines)


def compare(old: Path, new: Path, *, force: bool = False) -> Comparison:
    """Compare two files `results.json`.

    Args:
        old: the file to compare with.
        new: the file to judge.
        force: compare also results of different machines, versions or checkpoints.

    Raises:
        BadInputError: a file is missing or of another kind, the conditions differ, or the files have no common figure.
    """
    reports = [_read(path) for path in (old, new)]
    plans = [{name: report["plan"].get(name) for name in _CONDITIONS} for report in reports]
    conditions = [
        f"{name} {phrase}"
        for name in _CONDITIONS
        for phrase in differences(_as_dict(plans[0][name]), _as_dict(plans[1][name]))
    ]
    if conditions and not force:
        raise BadInputError(
            f"the reports were made under different conditions ({'; '.join(conditions)})",
            next_step="compare reports of one machine and one set of versions, or add --force",
        )
    found = [figures(report["steps"]) for report in reports]
    noises = [noise(report["steps"]) for report in reports]
    allowed = max((value for value in noises if value is not None), default=None)
    names = [name for name in found[0] if name in found[1]]
    if not names:
        raise BadInputError("the reports have no common figure", next_step="measure the same parts in both")
    changes = tuple(judge(name, found[0][name], found[1][name], allowed) for name in names)
    return Comparison(changes=changes, conditions=tuple(conditions))


def judge(name: str, old: Figure, new: Figure, noise_of_machine: float | None) -> Change:
    """Judge how a figure changed.

    A timed figure is a regression only if its whole interval lies beyond the noise.
    """
    allowed = noise_of_machine if new.timed else math.log1p(_TOLERANCE)
    low, high = interval(old.values, new.values)
    verdict = UNKNOWN
    if allowed is not None:
        limit = math.exp(allowed)
        worse, better = (high < 1 / limit, low > limit) if new.higher_is_better else (low > limit, high < 1 / limit)
        verdict = REGRESSION if worse else BETTER if better else SAME
    return Change(figure=name, old=old.median, new=new.median, interval=(low, high), allowed=allowed, verdict=verdict)


def interval(old: tuple[float, ...], new: tuple[float, ...]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of the medians, new divided by old."""
    from scipy.stats import bootstrap

    point = _ratio(statistics.median(new), statistics.median(old))
    if len(set(old)) == len(set(new)) == 1:
        return point, point
    values = [old * 2 if len(old) == 1 else old, new * 2 if len(new) == 1 else new]  # bootstrap needs two of each
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few values
        result = bootstrap(
            values,
            lambda first, second: _ratio(statistics.median(second), statistics.median(first)),
            vectorized=False,
            confidence_level=_CONFIDENCE,
            method="percentile",
            random_state=0,
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _ratio(new: float, old: float) -> float:
    """Return new divided by old; infinity if the old value is 0 and the new one is not."""
    if old:
        return new / old
    return math.inf if new else 1.0


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInputError(f"there is no file {path}", next_step="name the results.json of a report")
    return read_results(path)


def _as_dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {"": value}
