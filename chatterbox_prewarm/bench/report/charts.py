"""Draw the results of a report with matplotlib. A chart whose steps were not measured is left out."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")  # no display

from matplotlib.figure import Figure

from chatterbox_prewarm.bench.report.figures import (
    TITLES,
    extra_seconds,
    first_request,
    length_points,
    load_levels,
    median,
    rounds,
    steady_request,
    voice_points,
)
from chatterbox_prewarm.bench.speak_process import COLD, UPSTREAM, WARM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

#: Width of a chart in inches, and the height of one bar. At 180 dots per inch, text stays readable on a phone.
_WIDTH, _BAR = 5.6, 0.5
_DPI = 180
_COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
#: Phases of a start: the mark that ends each one, and its title.
_PHASES = (
    ("imported", "Python, imports"),
    ("loaded", "weights"),
    ("attached", "voice, regions"),
    ("ready", "warm-up"),
    ("first_audio", "first request"),
)


def draw(steps: Mapping[str, dict[str, Any]]) -> dict[str, Figure]:
    """Draw every chart that the recorded steps allow; return them by name."""
    charts = {
        "starts": _starts(steps),
        "chunks": _chunks(steps),
        "levels": _levels(steps),
        "ablation": _ablation(steps),
        "profiles": _profiles(steps),
        "growth": _growth(steps),
        "load": _load(steps),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def save(chart: Figure, path: Any) -> None:
    """Write a chart as PNG without the date, so that the same results give the same file."""
    chart.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _canvas(height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _starts(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the phases from exec to the first audio as a waterfall."""
    systems = {name: rounds(steps, "starts", name) for name in (UPSTREAM, COLD, WARM)}
    systems = {name: runs for name, runs in systems.items() if runs}
    if not systems:
        return None
    figure, axes = _canvas(1.2 + _BAR * len(systems))
    for row, runs in enumerate(systems.values()):
        begin = 0.0
        for color, (mark, _) in zip(_COLORS, _PHASES, strict=False):
            end = median(runs, itemgetter(mark))
            if end is not None:
                axes.barh(row, end - begin, left=begin, color=color, height=0.6)
                begin = end
        axes.text(begin, row, f" {begin:.1f} s", va="center")
    for color, (_, title) in zip(_COLORS, _PHASES, strict=False):
        axes.barh(0, 0, color=color, label=title)
    axes.set_yticks(range(len(systems)), [TITLES[name] for name in systems])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds since exec")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _chunks(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw when each chunk of the first request arrives, cold and warm."""
    figure, axes = _canvas(2.2)
    drawn = False
    for row, name in enumerate((COLD, WARM)):
        for run in rounds(steps, "requests", name).values():
            request = run["requests"][0]
            arrivals = [request["first_chunk"]]
            for gap in request["gaps"]:
                arrivals.append(arrivals[-1] + gap)
            axes.plot(arrivals, [row] * len(arrivals), "|", color=_COLORS[row * 2], markersize=22, markeredgewidth=2)
            drawn = True
    axes.set_yticks((0, 1), [TITLES[COLD], TITLES[WARM]])
    axes.set_ylim(1.6, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the first request: each line is a chunk")
    return figure if drawn else None


def _levels(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the seconds of the warm-up and of the first and a later request by the level of the warm-up."""
    runs = {name.removeprefix("levels: "): run for name, run in steps.items() if name.startswith("levels: ")}
    values = {
        "warm-up": [run["ready"] - run["attached"] for run in runs.values()],
        "first request": [first_request(run) for run in runs.values()],
        "later request": [steady_request(run) for run in runs.values()],
    }
    return _grouped(list(runs), values, "level of the warm-up", "seconds")


def _profiles(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the start and the requests of each profile."""
    names = [name.removeprefix("profiles: bake ") for name in steps if name.startswith("profiles: bake ")]
    runs = {name: found for name in names if (found := rounds(steps, "profiles", name))}
    values = {
        "attached": [median(found, itemgetter("attached")) or 0.0 for found in runs.values()],
        "first request": [median(found, first_request) or 0.0 for found in runs.values()],
        "later request": [median(found, steady_request) or 0.0 for found in runs.values()],
    }
    return _grouped(list(runs), values, "profile", "seconds")


def _ablation(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the seconds that each family saves up to the first audio, with its size."""
    extra = extra_seconds(steps)
    if not extra:
        return None
    figure, axes = _canvas(1.0 + _BAR * len(extra))
    for row, (seconds, size) in enumerate(extra.values()):
        axes.barh(row, seconds, color=_COLORS[0], height=0.6)
        axes.text(max(seconds, 0), row, f" {seconds:.1f} s, {size / 1e6:.1f} MB", va="center")
    axes.set_yticks(range(len(extra)), list(extra))
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("seconds to the first audio that the family saves")
    return figure


def _growth(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the seconds of a request by the length of the audio, and the size of the state by the number of voices."""
    lengths, voices = length_points(steps), voice_points(steps)
    if not lengths or not voices:
        return None
    figure, (left, right) = _canvas(2.8, columns=2)
    _line(left, lengths, "seconds of audio", "seconds of a request")
    _line(right, [(count, size / 1e6) for count, size in voices], "voices", "MB of the state")
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], x: str, y: str) -> None:
    axes.plot(*zip(*sorted(points), strict=True), "o-", color=_COLORS[0])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.1 * max(value for _, value in points))


def _load(steps: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Draw the latency and the throughput by the number of clients, for each number of workers."""
    servers = load_levels(steps)
    if not servers:
        return None
    figure, (left, right) = _canvas(2.8, columns=2)
    for color, (workers, found) in zip(_COLORS[::2], servers.items(), strict=False):
        clients = [level["clients"] for level in found]
        left.plot(clients, [level["latency"]["p50"] for level in found], "o-", color=color, label=workers)
        left.plot(clients, [level["latency"]["p99"] for level in found], "o:", color=color)
        right.plot(clients, [level["throughput"] for level in found], "o-", color=color)
    left.set_ylabel("latency, s (dotted: p99)")
    right.set_ylabel("audio per second, s")
    for axes in (left, right):
        axes.set_xlabel("concurrent clients")
        axes.set_xticks([level["clients"] for level in next(iter(servers.values()))])
        axes.set_ylim(bottom=0)
    left.legend(frameon=False)
    return figure


def _grouped(names: Sequence[str], values: Mapping[str, Sequence[float]], x: str, y: str) -> Figure | None:
    """Draw bars in groups: a group for each name, a bar for each value."""
    if not names:
        return None
    figure, axes = _canvas(3.2)
    width = 0.8 / len(values)
    for number, (title, heights) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(names))]
        bars = axes.bar(places, heights, width, label=title, color=_COLORS[number * 2])
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
