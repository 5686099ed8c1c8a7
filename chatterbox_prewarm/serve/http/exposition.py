"""What `/metrics` exposes, in Prometheus' text format: the workers' own counters and this process's view of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chatterbox_prewarm.serve.http.http_metrics import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.http.http_metrics import Measures
    from chatterbox_prewarm.serve.workers.pool import Pool


class Exposition(Collector):
    """Turns the pool's state into metrics at the moment of a scrape; nothing is kept twice."""

    def __init__(self, pool: Pool, admission: Admission, measures: Measures) -> None:
        self._pool = pool
        self._admission = admission
        self._registry = measures.registry
        self._registry.register(self)

    def render(self) -> bytes:
        """The metrics as text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        pool = self._pool
        for name, text, value in (
            ("attached", "Whether model and warm state are in place.", pool.attached),
            ("ready", "Whether a real synthesis has passed.", pool.ready),
            ("requests_in_flight", "Requests accepted and not yet answered.", self._admission.in_flight),
            ("queue_limit", "Most requests at a time; with so many in flight, others get 429.", self._admission.limit),
            ("queue_parts", "Parts of texts that wait for a worker.", pool.waiting),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=float(value))
        log = pool.leading.log
        state = GaugeMetricFamily(f"{PREFIX}_state", "The warm state in use, by its key.", labels=["key"])
        if log.get("state"):
            state.add_metric([log["state"]], 1)
        yield state
        restarts = CounterMetricFamily(f"{PREFIX}_worker_restarts", "Workers that died and were replaced.")
        restarts.add_metric([], sum(worker.restarts for worker in pool.workers))
        yield restarts
        yield from self._caches()
        phases = GaugeMetricFamily(f"{PREFIX}_phase_seconds", "Length of a phase of the start.", labels=["phase"])
        totals: dict[str, float] = {}
        for phase in log.get("phases", []):
            totals[phase["name"]] = totals.get(phase["name"], 0.0) + phase["seconds"]
        for name, seconds in totals.items():
            phases.add_metric([name], seconds)
        yield phases
        marks = GaugeMetricFamily(
            f"{PREFIX}_since_exec_seconds", "When a moment of the start was reached.", labels=["moment"]
        )
        for name, seconds in log.get("marks", {}).items():
            marks.add_metric([name], seconds)
        yield marks
        yield from self._workers()

    def _caches(self) -> Iterable[Metric]:
        """Counts by family, of all workers together."""
        for kind, text in (
            ("loaded", "Baked artifacts in place for use on demand."),
            ("hits", "Baked artifacts that were used."),
            ("misses", "Artifacts rebuilt or left out."),
        ):
            counter = CounterMetricFamily(f"{PREFIX}_cache_{kind}", text, labels=["family"])
            sums: Counter[str] = Counter()
            for worker in self._pool.workers:
                sums.update(worker.log.get(kind, {}))
            for family, count in sums.items():
                counter.add_metric([family], count)
            yield counter

    def _workers(self) -> Iterable[Metric]:
        """What is known of each worker, which a number tells from others on the same device."""
        labels = ["worker", "device"]
        gauges = {
            name: GaugeMetricFamily(f"{PREFIX}_worker_{name}", text, labels=labels)
            for name, text in (
                ("ready", "Whether the worker can speak."),
                ("busy", "Whether a request is with it."),
                ("rss_bytes", "Memory of its process, as of its last answer."),
                ("vram_bytes", "Memory of its device that its allocator holds, as of its last answer."),
                ("vram_peak_bytes", "The most of that which was in use at once."),
                ("voices", "Added voices that it holds in memory."),
                ("voice_bytes", "Memory of these."),
            )
        }
        for number, worker in enumerate(self._pool.workers):
            for name, gauge in gauges.items():
                source = worker if name in {"ready", "busy"} else worker.usage
                gauge.add_metric([str(number), worker.config.device], float(getattr(source, name)))
        yield from gauges.values()
