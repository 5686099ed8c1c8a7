"""`benchmarks profiles`: bake each execution, then start it in fresh processes in turn with upstream.

The default profile of a device is chosen from these figures (docs/profiles.md).
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.stages import StageOptions
from chatterbox_prewarm.bench.executions import bake_one, select_executions, voice_of
from chatterbox_prewarm.bench.speak_process import UPSTREAM
from chatterbox_prewarm.bench.starts import SCRATCH, checkpoint, machine, settle, versions
from chatterbox_prewarm.model.profiles import PROFILES, Execution
from chatterbox_prewarm.system.json_subprocess import run_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Rows of the table: key of the figure and its title.
_ROWS = (
    ("bake_seconds", "bake, s"),
    ("state_megabytes", "warm state, MB"),
    ("compiled_megabytes", "  compiled, MB"),
    ("compile_seconds", "  compiled in, s"),
    ("attached", "attached, s"),
    ("ready", "ready, s"),
    ("capture_seconds", "graph capture, s"),
    ("first_request", "first request, s"),
    ("steady_request", "steady request, s"),
    ("tokens_per_second", "T3, tokens/s"),
    ("flow_seconds", "flow, s"),
    ("vocoder_seconds", "vocoder, s"),
    ("real_time_factor", "real-time factor"),
    ("peak_gpu_megabytes", "peak GPU memory, MB"),
    ("greedy_tokens_equal", "greedy as upstream"),
    ("next_tokens_equal", "next as upstream"),
    ("mel_difference", "mel difference"),
    ("sound_decibels", "sound, dB"),
)


def run(
    weights: Path,
    *,
    cache: Path,
    device: str = "cpu",
    profiles: Sequence[str] = PROFILES,
    rounds: int = 3,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Bake and measure.

    Args:
        weights: checkpoint.
        cache: cache directory. A bake removes the content of the cache families from it.
        device: torch device.
        profiles: profiles to measure.
        rounds: fresh processes of each execution with a hot page cache. The executions alternate.
        say: called with one line for each step.

    Returns:
        the report: machine, versions, figures of each bake, all runs, medians and ratios.

    Raises:
        BadInputError: a profile is unknown.
    """
    executions = select_executions(device, profiles)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        states = {name: Path(scratch) / str(number) for number, name in enumerate(executions)}
        baked = {}
        for name, execution in executions.items():
            say(f"bake: {name}")
            baked[name] = bake_one(weights, states[name], cache, device, execution)
        for number in range(1, rounds + 1):
            for name in (UPSTREAM, *executions):
                say(f"{name}, {number} of {rounds}")
                options = StageOptions(
                    weights=str(weights),
                    warm=str(states[name]) if name in states else None,
                    voice=str(voice_of(next(iter(states.values())))),
                    cache=str(cache),
                    device=device,
                    reference=f"{scratch}/reference.pt" if number == 1 else None,
                )
                result = measure_one(options)
                runs.append({"system": name, "round": number, **result})
    return summarize(runs, baked, executions, weights=weights, device=device)


def measure_one(options: StageOptions) -> dict[str, Any]:
    """Start one system in a fresh process with a hot page cache."""
    settle(Path(options.weights), Path(options.warm) if options.warm else None)
    return run_module("benchmarks.stages", asdict(options))


def summarize(
    runs: Sequence[dict[str, Any]],
    baked: Mapping[str, dict[str, float]],
    executions: Mapping[str, Execution],
    *,
    weights: Path,
    device: str,
) -> dict[str, Any]:
    """Make the report: medians over the rounds, and ratios within one process or one round."""
    medians = {name: {**baked.get(name, {}), **_medians(runs, name)} for name in (UPSTREAM, *executions)}
    return {
        "machine": machine(),
        "versions": versions(),
        "weights": checkpoint(weights),
        "device": device,
        "tokens": StageOptions.tokens,
        "executions": {name: asdict(execution) for name, execution in executions.items()},
        "runs": list(runs),
        "medians": medians,
        "ratios": _ratios(runs, medians),
    }


def _medians(runs: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    matching = [run for run in runs if run["system"] == name]
    figures = {key for run in matching for key, value in run.items() if isinstance(value, float)}
    return {key: _rounded(statistics.median(run[key] for run in matching if key in run)) for key in sorted(figures)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _ratios(runs: Sequence[dict[str, Any]], medians: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return median and range of the figures that are compared only within one process or one round."""
    ratios: dict[str, dict[str, float]] = {}
    for name in medians:
        if name == UPSTREAM:
            continue
        for key, part in (("t3_speeds", "T3"), ("s3gen_speeds", "S3Gen")):
            if pairs := [pair for run in runs if run["system"] == name for pair in run.get(key, ())]:
                ratios[f"{part} speed, {name} / upstream"] = _spread(pairs)
        if "eager" in medians and name != "eager":
            ratios[f"attached, {name} - eager, s"] = _spread(_attached_differences(runs, name, "eager"))
    return ratios


def _attached_differences(runs: Sequence[dict[str, Any]], name: str, base: str) -> list[float]:
    """Return how much later than `base` a system was attached, in seconds, in each round."""
    values = {(run["system"], run["round"]): run["attached"] for run in runs}
    return [value - values[base, number] for (system, number), value in values.items() if system == name]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
        "count": len(values),
    }


def table(report: dict[str, Any]) -> str:
    """Format the report; `fidelity.compare` describes its last rows."""
    medians = report["medians"]
    width = max(len(name) for name in medians) + 3
    lines = [" " * 20 + "".join(f"{name:>{width}}" for name in medians)]
    for key, title in _ROWS:
        cells = [row.get(key) for row in medians.values()]
        if any(cell is not None for cell in cells):
            lines.append(
                f"{title:<20}" + "".join(f"{'' if cell is None else _format(cell):>{width}}" for cell in cells)
            )
    lines.extend(
        f"{title}: {ratio['median']} ({ratio['least']} to {ratio['most']}, {ratio['count']} times)"
        for title, ratio in report["ratios"].items()
    )
    return "\n".join(lines)


def _format(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.005 else f"{value:.2f}"
