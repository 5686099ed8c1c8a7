"""The metrics of `/metrics`: counters of requests, and the state of the workers at the time of a scrape."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chatterbox_prewarm.serve.http.admission import Admission
    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.pools import Pools

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
    "prefixes": "Voices whose keys and values the worker holds in memory; Turbo and Nano use them.",
    "prefix_bytes": "Memory used by the keys and values of voices.",
    "prefix_hits": "Texts whose voice had its keys and values in memory, since the worker's start.",
    "prefix_misses": "Texts whose voice had to be computed, since the worker's start.",
    "prefix_evictions": "Voices whose keys and values were removed for others, since the worker's start.",
}


class HttpMetrics(Collector):
    """Counters and histograms of requests, and a collector that reads the pools at each scrape.

    The label `model` of all of them is the variant, or `CONVERSION_MODEL`; it is empty for a request that was refused
    before its model was known.

    Attributes:
        responses: requests for speech and for conversions by the status of their response.
        abandoned: requests whose client disconnected.
        first_chunk: seconds from a request to its first audio.
        real_time_factor: a worker's seconds per second of audio, for each part of a text or of recorded speech.
        audio: seconds of generated audio.
        truncated: parts of texts whose speech ended at the token limit.
        skipped: parts of texts that could not be spoken.
    """

    def __init__(self, pools: Pools, admission: Admission) -> None:
        self._pools = pools
        self._admission = admission
        self._registry = CollectorRegistry()
        self.responses = self._counter("speech_answers", "Requests for speech and conversions by status.", "status")
        self.abandoned = self._counter("speech_abandoned", "Requests whose client disconnected.")
        self.audio = self._counter("audio_seconds", "Seconds of generated audio.")
        self.truncated = self._counter("truncated_parts", "Parts of texts whose speech ended at the token limit.")
        self.skipped = self._counter("skipped_parts", "Parts of texts that could not be spoken.")
        self.first_chunk = self._histogram("first_chunk_seconds", "Time from a request to its first audio.", _SECONDS)
        self.real_time_factor = self._histogram("real_time_factor", "Seconds of work per second of audio.", _FACTORS)
        for pool in pools:
            for metric in (self.abandoned, self.audio, self.truncated, self.skipped):
                metric.labels(pool.model)  # so that a counter is 0 before it is missing
            self.first_chunk.labels(pool.model)
            self.real_time_factor.labels(pool.model)
            pool.on_part = functools.partial(self._count_part, pool.model)
            pool.on_skipped = self.skipped.labels(pool.model).inc
        self._registry.register(self)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics of the pools. The registry calls this method at each scrape."""
        pools, admission = self._pools, self._admission
        for name, text, value in (
            ("requests_in_flight", "Accepted requests that still need a worker.", admission.in_flight),
            ("queue_limit", "Limit on requests in flight. Further requests get status 429.", admission.limit),
            ("buffered_bytes", "Audio that clients have not read yet.", pools.backlog.size),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=float(value))
        for name, text, value_of in _POOL_GAUGES:
            yield _family(GaugeMetricFamily, name, text, [({}, pool.model, value_of(pool)) for pool in pools])
        for name, text, label, values_of in _START_GAUGES:
            rows = [
                ({label: key}, pool.model, value)
                for pool in pools
                for key, value in values_of(pool.leading.log).items()
            ]
            yield _family(GaugeMetricFamily, name, text, rows, label)
        restarts: list[_Row] = [({}, pool.model, sum(worker.restarts for worker in pool.workers)) for pool in pools]
        yield _family(CounterMetricFamily, "worker_restarts", "Workers that died and were replaced.", restarts)
        yield from self._cache_counters()
        yield from self._worker_gauges()

    def _count_part(self, model: str, seconds: float, audio_seconds: float) -> None:
        """Record that a worker took `seconds` to speak a part of a text of `audio_seconds`."""
        self.audio.labels(model).inc(audio_seconds)
        if audio_seconds:
            self.real_time_factor.labels(model).observe(seconds / audio_seconds)

    def _cache_counters(self) -> Iterable[Metric]:
        for kind, text in (
            ("loaded", "Baked artifacts made available."),
            ("hits", "Baked artifacts used."),
            ("misses", "Artifacts rebuilt or skipped."),
        ):
            rows = []
            for pool in self._pools:
                sums: collections.Counter[str] = collections.Counter()
                for worker in pool.workers:
                    sums.update(worker.log.get(kind, {}))
                rows += [({"family": family}, pool.model, count) for family, count in sums.items()]
            yield _family(CounterMetricFamily, f"cache_{kind}", text, rows, "family")

    def _worker_gauges(self) -> Iterable[Metric]:
        for name, text in _WORKER_GAUGES.items():
            rows = []
            # The number identifies the worker, because several workers can share a device.
            for number, (model, worker) in enumerate(self._pools.workers):
                source = worker if name in {"ready", "busy"} else worker.usage
                labels = {"worker": str(number), "device": worker.config.device}
                rows.append((labels, model, getattr(source, name)))
            yield _family(GaugeMetricFamily, f"worker_{name}", text, rows, "worker", "device")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, ("model",), buckets=buckets, registry=self._registry)


def _phases(log: Mapping[str, Any]) -> Mapping[str, float]:
    seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    for phase in log.get("phases", []):
        seconds[phase["name"]] += phase["seconds"]
    return seconds


#: Name, help and value of the gauges of a model.
_POOL_GAUGES: tuple[tuple[str, str, Callable[[Pool], float]], ...] = (
    ("attached", "1 if the model and the warm state are loaded, otherwise 0.", lambda pool: pool.attached),
    ("ready", "1 if the model can speak, otherwise 0.", lambda pool: pool.ready),
    ("queue_parts", "Parts of texts that wait for a worker.", lambda pool: pool.waiting),
)
#: Name, help, label and values of the gauges of a model's start.
_START_GAUGES: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], Mapping[str, float]]], ...] = (
    ("state", "The key of the warm state in use.", "key", lambda log: {log["state"]: 1} if log.get("state") else {}),
    ("phase_seconds", "Duration of a phase of the start.", "phase", _phases),
    (
        "since_exec_seconds",
        "Seconds since exec at which the start reached a mark.",
        "moment",
        lambda log: log.get("marks", {}),
    ),
)


#: A sample: its labels except `model`, the model, and the value.
_Row = tuple[Mapping[str, str], str, float]


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    rows: Iterable[_Row],
    *labels: str,
) -> Metric:
    """Make a metric from its samples. `labels` are their labels except `model`."""
    metric = kind(f"{_PREFIX}_{name}", text, labels=["model", *labels])
    for values, model, value in rows:
        metric.add_metric([model, *(values[label] for label in labels)], float(value))
    return metric
