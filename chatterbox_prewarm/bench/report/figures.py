"""Read figures out of the results of a report.

No figure compares two rounds, because the speed of a shared machine changes.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.report.options import WARM_AGAIN
from chatterbox_prewarm.bench.speak_process import COLD, UPSTREAM, WARM
from chatterbox_prewarm.bench.t3_calls import later_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Step = dict[str, Any]
#: Titles of the systems.
TITLES = {"torch": "import torch", UPSTREAM: "upstream", COLD: "ours, cold", WARM: "ours, warm"}
TITLES[WARM_AGAIN] = "ours, warm, again"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure by which two reports are compared.

    Attributes:
        values: the figure in each round.
        timed: whether it depends on the speed of the machine, so that it needs an A/A run to be compared.
        higher_is_better: the direction of an improvement.
    """

    values: tuple[float, ...]
    timed: bool = False
    higher_is_better: bool = False

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)


def rounds(steps: Mapping[str, Step], part: str, system: str) -> dict[int, Step]:
    """Return the results of a system in a part by the number of the round."""
    prefix = f"{part}: {system}, "
    return {
        int(name.removeprefix(prefix)): step
        for name, step in steps.items()
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
    }


def median(steps: Mapping[int, Step], figure: Callable[[Step], float]) -> float | None:
    """Return the median of a figure over the rounds that have it, or None without any."""
    values = []
    for step in steps.values():
        with contextlib.suppress(KeyError, statistics.StatisticsError):  # upstream has no "ready" and no gaps
            values.append(figure(step))
    return statistics.median(values) if values else None


def ratios(first: Mapping[int, Step], second: Mapping[int, Step], figure: Callable[[Step], float]) -> tuple[float, ...]:
    """Divide the figure of one system by the figure of a second system, in each round that has both."""
    return tuple(figure(first[number]) / figure(second[number]) for number in sorted(first.keys() & second.keys()))


def first_request(step: Step) -> float:
    """Seconds of the first request."""
    return float(step["requests"][0]["seconds"])


def steady_request(step: Step) -> float:
    """Median of the seconds of the later requests."""
    return float(statistics.median(request["seconds"] for request in step["requests"][1:]))


def first_chunk(step: Step) -> float:
    """Seconds from the first request to its first chunk."""
    return float(step["requests"][0]["first_chunk"])


def chunk_spread(step: Step) -> float:
    """Standard deviation of the seconds between the chunks of the first request."""
    return float(statistics.pstdev(step["requests"][0]["gaps"]))


def peak_memory(step: Step) -> float:
    """Peak memory in bytes after the first request: of torch's allocator on a GPU, and resident on a CPU."""
    return float(step["peak_gpu_bytes"] or step["peak_bytes"])


def figures(steps: Mapping[str, Step]) -> dict[str, Figure]:
    """Return all figures of a report that `bench compare` compares."""
    return {name: figure for name, figure in {**_timed(steps), **_exact(steps)}.items() if figure.values}


def _timed(steps: Mapping[str, Step]) -> dict[str, Figure]:
    start = {name: rounds(steps, "starts", name) for name in ("torch", UPSTREAM, COLD, WARM)}
    request = {name: rounds(steps, "requests", name) for name in (UPSTREAM, COLD, WARM)}
    torch_import = tuple(
        start[WARM][number]["attached"] / start["torch"][number]["imported"]
        for number in sorted(start[WARM].keys() & start["torch"].keys())
    )
    calls = later_pairs(steps["calls"]["seconds"]) if "calls" in steps else []
    found = {
        "exec to attached, warm / import torch": torch_import,
        "first request / steady request, warm": tuple(
            first_request(step) / steady_request(step) for step in request[WARM].values()
        ),
        "first chunk, warm / cold": ratios(request[WARM], request[COLD], first_chunk),
        "T3's first tokens, ours / upstream": tuple(ours / upstream for ours, upstream in calls),
        "peak memory, warm / upstream": ratios(request[WARM], request[UPSTREAM], peak_memory),
    }
    for title, figure in (("exec to attached", "attached"), ("exec to first audio", "first_audio")):
        for other in (UPSTREAM, COLD):
            found[f"{title}, warm / {other}"] = ratios(start[WARM], start[other], itemgetter(figure))
    return {name: Figure(values=values, timed=True) for name, values in found.items()}


def _exact(steps: Mapping[str, Step]) -> dict[str, Figure]:
    warm = [
        step
        for name, step in steps.items()
        if name.startswith((f"starts: {WARM}", f"requests: {WARM}", "growth: ", "profiles: ")) and "misses" in step
    ]
    sizes = steps.get("state", {})
    found = {f"bytes of the family {family}": Figure(values=(float(size),)) for family, size in sizes.items()}
    if warm:
        most = max(sum(step["misses"].values()) for step in warm)
        found["misses of a warm start"] = Figure(values=(float(most),))
    for name, step in steps.items():
        part, _, detail = name.partition(": ")
        if part == "quality" and " / " in detail:
            if step["tokens_equal"] is not None:
                found[f"tokens equal, {detail}"] = Figure(values=(step["tokens_equal"],), higher_is_better=True)
        elif part == "quality":
            found[f"watermark, {detail}"] = Figure(values=(step["watermark"],), higher_is_better=True)
    return found


def noise(steps: Mapping[str, Step]) -> float | None:
    """Return the noise of the machine: the largest change between two equal starts in one round.

    Returns:
        the absolute natural logarithm of the ratio, so 0.05 is about 5 %; None without such a pair.
    """
    again, warm = rounds(steps, "starts", WARM_AGAIN), rounds(steps, "starts", WARM)
    pairs = [ratio for figure in ("attached", "first_audio") for ratio in ratios(again, warm, itemgetter(figure))]
    return max((abs(math.log(ratio)) for ratio in pairs), default=None)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of the least-squares line through the points; None if all have the same abscissa."""
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope


def extra_seconds(steps: Mapping[str, Step]) -> dict[str, tuple[float, int]]:
    """Return for each family the additional seconds to the first audio without it, and its size in bytes."""
    sizes = steps.get("state", {})
    complete = rounds(steps, "ablation", "none")
    names = {name.removeprefix("ablation: ").rpartition(", ")[0] for name in steps if name.startswith("ablation: ")}
    found = {}
    for family in sorted(names - {"none"}):
        without = rounds(steps, "ablation", family)
        if common := sorted(without.keys() & complete.keys()):
            extra = [without[number]["first_audio"] - complete[number]["first_audio"] for number in common]
            found[family] = (statistics.median(extra), int(sizes.get(family, 0)))
    return found


def length_points(steps: Mapping[str, Step]) -> list[tuple[float, float]]:
    """Return the seconds of audio and of a later request for each length of text."""
    found = [step for name, step in steps.items() if name.startswith("growth: text ")]
    return [(step["requests"][0]["audio"], steady_request(step)) for step in found]


def voice_points(steps: Mapping[str, Step]) -> list[tuple[float, float]]:
    """Return the number of voices and the bytes of the state."""
    found = [step for name, step in steps.items() if name.startswith("growth: ") and name.endswith(" voices")]
    return [(step["voices"], step["bytes"]) for step in found]


def load_levels(steps: Mapping[str, Step]) -> dict[str, list[Step]]:
    """Return the levels of load for each number of workers."""
    return {name.removeprefix("load: "): step["levels"] for name, step in steps.items() if name.startswith("load: ")}
