"""What a start or a bake did: phases on one clock, and the hits and misses of every cache family.

Warmth is proven by the counters; the phases say where the time went. All times are seconds since the process was
executed, so a phase of a worker and one of its parent can stand in one table.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of work: its name, when it began and how long it took, both in seconds."""

    name: str
    start: float
    seconds: float


def now() -> float:
    """Seconds since boot, on a clock that all processes of a machine share and that suspend does not stop."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def exec_time(pid: int | None = None) -> float:
    """When a process was executed, in seconds since boot, from `/proc/PID/stat` (10 ms steps).

    Args:
        pid: which process; this one by default.
    """
    # The second field is the program's name in parentheses and may hold spaces; starttime is the 22nd field.
    text = Path(f"/proc/{pid or os.getpid()}/stat").read_text(encoding="ascii", errors="replace")
    ticks = int(text.rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


class WarmupMetrics:
    """The event log of one process.

    Attributes:
        origin: seconds since boot that count as zero, by default the moment this process was executed.
        phases: what was done, in the order in which it ended.
        marks: moments such as "attached" and "ready", in seconds since the origin.
        loaded: artifacts of each family that were put in place for use on demand.
        hits, misses: how often each family's persisted artifacts were used, and how often something was rebuilt.
        reasons: one sentence for each miss that has one.
        timers: seconds spent in work that is scattered over a phase, by name.
        profile: how the model executes.
        state: the key of the warm state in use, as `states.key_of` names it, or "".

    `on_phase`, when given, is called with the name of each phase as it begins.
    """

    def __init__(self, origin: float | None = None, on_phase: Callable[[str], None] | None = None) -> None:
        self.origin = exec_time() if origin is None else origin
        self._on_phase = on_phase
        self.phases: list[Phase] = []
        self.marks: dict[str, float] = {}
        self.loaded: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.timers: dict[str, float] = {}
        self.profile = ""
        self.state = ""
        self._before_reading: list[Callable[[], None]] = []

    def before_reading(self, update: Callable[[], None]) -> None:
        """Have `update` called before each `to_dict`: for what others count and this log only takes over."""
        self._before_reading.append(update)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the block as a phase, also when it raises."""
        if self._on_phase is not None:
            self._on_phase(name)
        start = now()
        try:
            yield
        finally:
            self.phases.append(Phase(name=name, start=start - self.origin, seconds=now() - start))
            logger.info("%-24s %8.3f s", name, self.phases[-1].seconds)

    def mark(self, name: str) -> float:
        """Record that a moment was reached; returns its time in seconds since the origin."""
        self.marks[name] = now() - self.origin
        return self.marks[name]

    def add_seconds(self, name: str, seconds: float) -> None:
        """Add to a timer."""
        self.timers[name] = self.timers.get(name, 0.0) + seconds

    def hit(self, family: str, count: int = 1) -> None:
        """Count artifacts that were used as baked."""
        self.hits[family] += count

    def miss(self, family: str, reason: str = "", count: int = 1) -> None:
        """Count artifacts that were rebuilt or not consulted, and log why, the same reason once."""
        self.misses[family] += count
        if reason:
            if f"{family}: {reason}" not in self.reasons:
                logger.warning("miss in %s: %s", family, reason)
            self.reasons.append(f"{family}: {reason}")

    def to_dict(self) -> dict[str, Any]:
        """The log as JSON-ready values."""
        for update in self._before_reading:
            update()
        return {
            "phases": [
                {"name": phase.name, "start": round(phase.start, 4), "seconds": round(phase.seconds, 4)}
                for phase in self.phases
            ],
            "marks": {name: round(value, 4) for name, value in self.marks.items()},
            "loaded": dict(self.loaded),
            "hits": dict(self.hits),
            "misses": dict(self.misses),
            "reasons": list(self.reasons),
            "profile": self.profile,
            "state": self.state,
            "timers": {name: round(value, 4) for name, value in self.timers.items()},
        }
