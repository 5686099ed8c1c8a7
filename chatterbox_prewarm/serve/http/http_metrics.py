"""The metrics of `/metrics`: counters of requests, and the state of the workers at the time of a scrape."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.workers.pool import Pool

_PREFIX = "chatterbox_prewarm"
_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 50, 100)
_FACTORS = (0.02, 0.05, 0.08, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
_WORKER_GAUGES = {
    "ready": "1 if the worker can speak, otherwise 0.",
    "busy": "1 if the worker processes a request, otherwise 0.",
    "rss_bytes": "Resident memory of the worker process at its last response.",
    "vram_bytes": "Device memory held by the allocator at the worker's last response.",
    "vram_peak_bytes": "Peak device memory in use.",
    "voices": "Added voices that the worker holds in memory.",
    "voice_bytes": "Memory used by the added voices.",
}


class HttpMetrics(Collector):
    """Counters and histograms of requests, and a collector that reads the pool at each scrape.

    Attributes:
        responses: speech requests by the status of their response.
        abandoned: requests whose client disconnected.
        first_chunk: seconds from a request to its first audio.
        real_time_factor: a worker's seconds per second of audio, for each part of a text.
        audio: seconds of generated audio.
        truncated: parts of texts whose speech ended at the token limit.
        skipped: parts of texts that could not be spoken.
    """

    def __init__(self, pool: Pool, admission: Admission) -> None:
        self._pool = pool
        self._admission = admission
        self._registry = CollectorRegistry()
        self.responses = self._counter("speech_answers", "Speech requests by status.", "status")
        self.abandoned = self._counter("speech_abandoned", "Speech requests whose client disconnected.")
        self.audio = self._counter("audio_seconds", "Seconds of generated audio.")
        self.truncated = self._counter("truncated_parts", "Parts of texts whose speech ended at the token limit.")
        self.skipped = self._counter("skipped_parts", "Parts of texts that could not be spoken.")
        self.first_chunk = self._histogram("first_chunk_seconds", "Time from a request to its first audio.", _SECONDS)
        self.real_time_factor = self._histogram("real_time_factor", "Seconds of work per second of audio.", _FACTORS)
        self._registry.register(self)

    def count_part(self, seconds: float, audio_seconds: float) -> None:
        """Record that a worker took `seconds` to speak a part of a text of `audio_seconds`."""
        self.audio.inc(audio_seconds)
        if audio_seconds:
            self.real_time_factor.observe(seconds / audio_seconds)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of the pool. The registry calls this method at each scrape."""
        pool, admission, log = self._pool, self._admission, self._pool.leading.log
        for name, text, value in (
            ("attached", "1 if the model and the warm state are loaded, otherwise 0.", pool.attached),
            ("ready", "1 if every stage of a synthesis has run, otherwise 0.", pool.ready),
            ("requests_in_flight", "Accepted requests that still need a worker.", admission.in_flight),
            ("queue_limit", "Limit on requests in flight. Further requests get status 429.", admission.limit),
            ("buffered_bytes", "Audio that clients have not read yet.", pool.backlog.size),
            ("queue_parts", "Parts of texts that wait for a worker.", pool.waiting),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(value))
        state = {log["state"]: 1} if log.get("state") else {}
        yield _gauge("state", "The key of the warm state in use.", "key", state)
        restarts = sum(worker.restarts for worker in pool.workers)
        yield CounterMetricFamily(f"{_PREFIX}_worker_restarts", "Workers that died and were replaced.", restarts)
        yield from self._cache_counters()
        phases: collections.defaultdict[str, float] = collections.defaultdict(float)
        for phase in log.get("phases", []):
            phases[phase["name"]] += phase["seconds"]
        yield _gauge("phase_seconds", "Duration of a phase of the start.", "phase", phases)
        marks = log.get("marks", {})
        yield _gauge("since_exec_seconds", "Seconds since exec at which the start reached a mark.", "moment", marks)
        yield from self._worker_gauges()

    def _cache_counters(self) -> Iterable[Metric]:
        for kind, text in (
            ("loaded", "Baked artifacts made available."),
            ("hits", "Baked artifacts used."),
            ("misses", "Artifacts rebuilt or skipped."),
        ):
            counter = CounterMetricFamily(f"{_PREFIX}_cache_{kind}", text, labels=["family"])
            sums: collections.Counter[str] = collections.Counter()
            for worker in self._pool.workers:
                sums.update(worker.log.get(kind, {}))
            for family, count in sums.items():
                counter.add_metric([family], count)
            yield counter

    def _worker_gauges(self) -> Iterable[Metric]:
        for name, text in _WORKER_GAUGES.items():
            # The number identifies the worker, because several workers can share a device.
            gauge = GaugeMetricFamily(f"{_PREFIX}_worker_{name}", text, labels=["worker", "device"])
            for number, worker in enumerate(self._pool.workers):
                source = worker if name in {"ready", "busy"} else worker.usage
                gauge.add_metric([str(number), worker.config.device], float(getattr(source, name)))
            yield gauge

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, buckets=buckets, registry=self._registry)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        gauge.add_metric([key], value)
    return gauge
