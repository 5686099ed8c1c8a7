"""What `/metrics` exposes, in Prometheus' text format: the worker's own counters and this process's view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chatterbox_prewarm.serve.supervisor import Supervisor

_PREFIX = "chatterbox_prewarm"


class Exposition(Collector):
    """Turns a supervisor's state into metrics at the moment of a scrape; nothing is kept twice."""

    def __init__(self, supervisor: Supervisor, in_flight: Callable[[], int]) -> None:
        self._supervisor = supervisor
        self._in_flight = in_flight
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The metrics as text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        supervisor, log = self._supervisor, self._supervisor.log
        for name, text, value in (
            ("attached", "Whether model and warm state are in place.", supervisor.attached),
            ("ready", "Whether a real synthesis has passed.", supervisor.ready),
            ("requests_in_flight", "Requests accepted and not yet answered.", self._in_flight()),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(value))
        state = GaugeMetricFamily(f"{_PREFIX}_state", "The warm state in use, by its key.", labels=["key"])
        if log.get("state"):
            state.add_metric([log["state"]], 1)
        yield state
        restarts = CounterMetricFamily(f"{_PREFIX}_worker_restarts", "Workers that died and were replaced.")
        restarts.add_metric([], supervisor.restarts)
        yield restarts
        for kind, text in (
            ("loaded", "Baked artifacts in place for use on demand."),
            ("hits", "Baked artifacts that were used."),
            ("misses", "Artifacts rebuilt or left out."),
        ):
            counter = CounterMetricFamily(f"{_PREFIX}_cache_{kind}", text, labels=["family"])
            for family, count in log.get(kind, {}).items():
                counter.add_metric([family], count)
            yield counter
        phases = GaugeMetricFamily(f"{_PREFIX}_phase_seconds", "Length of a phase of the start.", labels=["phase"])
        totals: dict[str, float] = {}
        for phase in log.get("phases", []):
            totals[phase["name"]] = totals.get(phase["name"], 0.0) + phase["seconds"]
        for name, seconds in totals.items():
            phases.add_metric([name], seconds)
        yield phases
        marks = GaugeMetricFamily(
            f"{_PREFIX}_since_exec_seconds", "When a moment of the start was reached.", labels=["moment"]
        )
        for name, seconds in log.get("marks", {}).items():
            marks.add_metric([name], seconds)
        yield marks
