"""What is measured of requests as they are answered; `exposition` adds what is known of the workers at a scrape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "chatterbox_prewarm"
_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 20, 50, 100)
_FACTORS = (0.02, 0.05, 0.08, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


class Measures:
    """Counters and histograms, in a registry of their own.

    Attributes:
        answers: requests for speech by the status of their answer.
        abandoned: requests whose client went away.
        first_chunk: seconds from a request to its first sound.
        real_time_factor: a worker's seconds for a second of audio, for each part of a text.
        audio: seconds of audio that were made.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            f"{PREFIX}_speech_answers", "Requests for speech, by status.", ["status"], registry=self.registry
        )
        self.abandoned = Counter(
            f"{PREFIX}_speech_abandoned", "Requests whose client went away.", registry=self.registry
        )
        self.first_chunk = self._histogram("first_chunk_seconds", "From a request to its first sound.", _SECONDS)
        self.real_time_factor = self._histogram("real_time_factor", "Seconds of work for one of audio.", _FACTORS)
        self.audio = Counter(f"{PREFIX}_audio_seconds", "Audio that was made.", registry=self.registry)

    def part(self, seconds: float, audio_seconds: float) -> None:
        """A worker has spoken a part of a text."""
        self.audio.inc(audio_seconds)
        if audio_seconds:
            self.real_time_factor.observe(seconds / audio_seconds)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=buckets, registry=self.registry)
