"""Metrics of a start or a bake: phases on one clock, and the hits and misses of every cache family.

The counters prove that a start is warm; the phases show where it spends its time. All times are seconds since the
process was executed, so phases of a worker and of its parent can be compared.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import operator
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)


def now() -> float:
    """Return the seconds since boot. All processes of a machine share this clock, and it runs during suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def exec_time(pid: int | None = None) -> float:
    """Return when a process was executed, in seconds since boot, in steps of 10 ms (from `/proc/PID/stat`).

    Args:
        pid: the process; by default this one.
    """
    # The second field is the name of the program in parentheses and may contain spaces; starttime is the 22nd field.
    text = Path(f"/proc/{pid or os.getpid()}/stat").read_text(encoding="ascii", errors="replace")
    ticks = int(text.rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


class StartMetrics:
    """The event log of one process.

    Example:
        >>> model = from_pretrained_with_warmup("cuda")
        >>> model.metrics.to_dict()["misses"]
        {}

    Attributes:
        origin: the time that counts as zero, in seconds since boot; by default the time when this process was executed.
        phases: name, start and seconds of each phase, in the order in which they ended.
        marks: points in time such as "attached" and "ready", in seconds since the origin.
        loaded: artifacts of each family that were loaded for use on demand.
        hits, misses: artifacts of each family that were used, and artifacts that were rebuilt or not looked up.
        reasons: a sentence for each miss with a known reason.
        next_steps: for each sentence of `reasons` the command or action that mends it, if there is one.
        timers: seconds of work that is spread over a phase, by name.
        profile: how the model runs.
        state: the key of the warm state in use (see `state_key`), or "".
        cross_compiled: that state was compiled on a machine without its GPU.
        modules: number of imported modules at the last mark.

    `on_phase` is called with the name of each phase when it begins.
    """

    def __init__(self, origin: float | None = None, on_phase: Callable[[str], None] | None = None) -> None:
        self.origin = exec_time() if origin is None else origin
        self._on_phase = on_phase
        self.phases: list[dict[str, Any]] = []
        self.marks: dict[str, float] = {}
        self.loaded: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.next_steps: dict[str, str] = {}
        self.timers: dict[str, float] = {}
        self.profile = ""
        self.state = ""
        self.cross_compiled = False
        self.modules = 0
        self._before_reading: list[Callable[[], None]] = []

    def before_reading(self, update: Callable[[], None]) -> None:
        """Call `update` before each `to_dict`, to copy counters that other code keeps."""
        self._before_reading.append(update)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the block as a phase, even if it raises."""
        if self._on_phase is not None:
            self._on_phase(name)
        start = now()
        try:
            yield
        finally:
            self.add_phase(name, start, now())

    def add_phase(self, name: str, start: float, end: float) -> None:
        """Record a phase that has ended, such as the work of another thread. Its times are seconds since boot.

        The phases are in the order of their starts.
        """
        phase = {"name": name, "start": start - self.origin, "seconds": end - start}
        bisect.insort(self.phases, phase, key=operator.itemgetter("start"))
        logger.info("%-24s %8.3f s", name, end - start)

    def mark(self, name: str) -> float:
        """Record the present time under a name, and return it in seconds since the origin."""
        self.marks[name] = now() - self.origin
        self.modules = len(sys.modules)
        return self.marks[name]

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add seconds to a timer."""
        self.timers[name] = self.timers.get(name, 0.0) + seconds

    def hit(self, family: str, count: int = 1) -> None:
        """Count artifacts that were used."""
        self.hits[family] += count

    def miss(self, family: str, reason: str, count: int = 1, *, next_step: str, level: int = logging.WARNING) -> None:
        """Count artifacts that were rebuilt or not looked up, and log each reason once with its next step.

        Args:
            family: of the artifacts; "all" if there is no usable state.
            reason: why they were not used.
            count: the number of artifacts.
            next_step: the command or action that mends this; "" only if there is nothing to do.
            level: of the log line.
        """
        self.misses[family] += count
        sentence = f"{family}: {reason}"
        if sentence not in self.reasons:
            logger.log(level, "miss in %s%s", sentence, f"; next: {next_step}" if next_step else "")
        self.reasons.append(sentence)
        if next_step:
            self.next_steps[sentence] = next_step

    def to_dict(self) -> dict[str, Any]:
        """Return the log as a JSON object."""
        for update in self._before_reading:
            update()
        return {
            "phases": [
                {"name": phase["name"], "start": round(phase["start"], 4), "seconds": round(phase["seconds"], 4)}
                for phase in self.phases
            ],
            "marks": {name: round(value, 4) for name, value in self.marks.items()},
            "loaded": dict(self.loaded),
            "hits": dict(self.hits),
            "misses": dict(self.misses),
            "reasons": list(self.reasons),
            "next_steps": dict(self.next_steps),
            "profile": self.profile,
            "state": self.state,
            "cross_compiled": self.cross_compiled,
            "modules": self.modules,
            "timers": {name: round(value, 4) for name, value in self.timers.items()},
        }
