"""`benchmark_warmup_effectiveness`: measure the savings of a warm state in fresh processes."""

from __future__ import annotations

import logging
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.executions import bake_if_missing, choose_state, token_limit
from chatterbox_prewarm.bench.report.figures import first_chunk, peak_memory
from chatterbox_prewarm.bench.room import check_memory
from chatterbox_prewarm.bench.speak_process import COLD, WARM, SpeakOptions, speak_in_fresh_process
from chatterbox_prewarm.bench.starts import SCRATCH, settle
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import check_text
from chatterbox_prewarm.model.warmup.settings import MEDIUM_TEXT
from chatterbox_prewarm.start.defaults import default_weights
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.paths import as_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

#: Limit of the speech tokens of random weights, which never stop: two seconds of audio.
RANDOM_WEIGHTS_TOKENS = 50


@dataclass(frozen=True)
class WarmupMetrics:
    """The savings of a warm start. A cold start has no warm state and no warm-up.

    Example:
        >>> metrics = benchmark_warmup_effectiveness("Hello, world.", iterations=3)
        >>> metrics.latency_improvement_ratio
        2.4
        >>> print(metrics.report())

    Attributes:
        cold_start_latency: seconds from the exec of a process to the complete audio of its first request, cold.
        warm_start_latency: the same with the warm state.
        warmup_duration: seconds of the warm-up within the warm start.
        memory_overhead_mb: difference of the peak resident memory of the warm and the cold process, after the first
            request, in MB; on a GPU, of the peak memory of torch's allocator. Negative if the warm process needs less.
        first_chunk_improvement_ms: milliseconds by which the first chunk of the first request comes earlier after the
            warm start. The load is not counted.
        second_model_latency: seconds to load a second model in the cold process and to speak. It is not a cold start,
            because the process already has its imports, kernels and buffers. None if it was not measured.
    """

    cold_start_latency: float
    warm_start_latency: float
    warmup_duration: float
    memory_overhead_mb: float
    first_chunk_improvement_ms: float
    second_model_latency: float | None = None

    @property
    def latency_improvement_ratio(self) -> float:
        """Cold divided by warm latency: 2.0 means that the first audio comes in half the time."""
        return self.cold_start_latency / self.warm_start_latency

    def report(self) -> str:
        """Return the figures as text, one line each."""
        saved = 1 - self.warm_start_latency / self.cold_start_latency
        lines = [
            f"cold start to first audio:  {self.cold_start_latency:8.2f} s",
            (
                f"warm start to first audio:  {self.warm_start_latency:8.2f} s "
                f"({self.latency_improvement_ratio:.2f} times as fast, {saved:.0%} less)"
            ),
            f"  of which warm-up:         {self.warmup_duration:8.2f} s",
            f"first chunk comes earlier:  {self.first_chunk_improvement_ms:8.0f} ms",
            f"additional peak memory:     {self.memory_overhead_mb:8.0f} MB",
        ]
        if self.second_model_latency is not None:
            lines.append(
                f"second model, same process: {self.second_model_latency:8.2f} s "
                "(not a cold start: imports and kernels are there already)"
            )
        return "\n".join(lines)


def benchmark_warmup_effectiveness(
    test_text: str = MEDIUM_TEXT,
    iterations: int = 3,
    *,
    device: str = "cpu",
    weights: str | Path | None = None,
    warm: str | Path | None = None,
    say: Callable[[str], None] = logger.info,
) -> WarmupMetrics:
    """Measure cold and warm starts in fresh processes that alternate, and return the medians.

    Example:
        >>> metrics = benchmark_warmup_effectiveness("Hello, world.", iterations=3, device="cuda")
        >>> print(metrics.report())

    Args:
        test_text: text of the first request. With random weights, its speech is limited to two seconds.
        iterations: number of fresh processes, cold and warm each.
        device: torch device.
        weights: the directory of a checkpoint; by default as `from_pretrained_with_warmup`.
        warm: a warm state for this machine; by default the one in an image. Without one, a state is baked first,
            and removed at the end. The bake can take minutes.
        say: called with one line before each step.

    Raises:
        BadInputError: an argument is invalid, or there is too little disk space or memory.
        PrewarmError: a process failed, or the state does not fit this machine.
    """
    check_text(test_text)
    if not isinstance(iterations, int) or iterations < 1:
        raise BadInputError(f"{iterations!r} iterations", next_step="give a whole number from 1")
    device = check_device(device)
    weights = as_path(weights, "the checkpoint") if weights is not None else default_weights()
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        state = choose_state(warm, Path(scratch))
        if warm is None:
            bake_if_missing(state, weights, device, Path(scratch), say=say)
        State.read(state)  # report a damaged state before the first start
        check_memory(weights, purpose="a start")
        limit = token_limit(weights, RANDOM_WEIGHTS_TOKENS)
        runs: dict[str, list[dict[str, Any]]] = {COLD: [], WARM: []}
        for number in range(1, iterations + 1):
            for system, results in runs.items():
                say(f"{system} start, {number} of {iterations}")
                settle(weights, state)
                options = SpeakOptions(
                    system=system,
                    weights=str(weights),
                    warm=str(state),
                    device=device,
                    text=test_text,
                    max_new_tokens=limit,
                    second_model=system == COLD and number == 1,
                )
                results.append(speak_in_fresh_process(options))
    return summarize(runs[COLD], runs[WARM])


def summarize(cold: Sequence[dict[str, Any]], warm: Sequence[dict[str, Any]]) -> WarmupMetrics:
    """Compute the medians of results of `speak_process.run`."""

    def median(runs: Sequence[dict[str, Any]], figure: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(figure(run) for run in runs)

    return WarmupMetrics(
        cold_start_latency=median(cold, lambda run: run["first_audio"]),
        warm_start_latency=median(warm, lambda run: run["first_audio"]),
        warmup_duration=median(warm, lambda run: run["ready"] - run["attached"]),
        memory_overhead_mb=(median(warm, peak_memory) - median(cold, peak_memory)) / 1e6,
        first_chunk_improvement_ms=1000 * (median(cold, first_chunk) - median(warm, first_chunk)),
        second_model_latency=next((run["second_model"] for run in cold if "second_model" in run), None),
    )
