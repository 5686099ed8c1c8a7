"""The sections of the page of a report: a text, a chart and a table each, made from the recorded steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.report.figures import (
    TITLES,
    chunk_spread,
    extra_seconds,
    first_chunk,
    first_request,
    length_points,
    load_levels,
    median,
    peak_memory,
    rounds,
    slope,
    steady_request,
    voice_points,
)
from chatterbox_prewarm.bench.speak_process import UPSTREAM
from chatterbox_prewarm.bench.t3_calls import TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Steps = Mapping[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the page.

    Attributes:
        title: heading.
        text: description of the measurement.
        chart: name of the chart, or "".
        head: titles of the columns of the table.
        rows: cells of the table; the first cell of a row is its title.
    """

    title: str
    text: str
    chart: str = ""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def sections(steps: Steps) -> list[Section]:
    """Return the sections that have rows, in the order of the page."""
    return [section for make in _SECTIONS if (section := make(steps)).rows]


def _starts(steps: Steps) -> Section:
    columns = (
        ("imports", itemgetter("imported")),
        ("attached", itemgetter("attached")),
        ("ready", itemgetter("ready")),
        ("first audio", itemgetter("first_audio")),
        ("later request", itemgetter("steady_request")),
    )
    return Section(
        title="Start of a server",
        text="Seconds since the exec of a fresh process; medians. Upstream is a Python process without a server. "
        "“Warm, again” is the same as “warm”: the difference between both is the noise of the machine.",
        chart="starts",
        head=("system", *(title for title, _ in columns)),
        rows=_rows(steps, "starts", TITLES, [figure for _, figure in columns]),
    )


def _requests(steps: Steps) -> Section:
    rows = _rows(
        steps,
        "requests",
        TITLES,
        [
            first_chunk,
            chunk_spread,
            first_request,
            steady_request,
            lambda step: peak_memory(step) / 1e6,
            itemgetter("second_model"),
        ],
    )
    batch = steps.get("requests: batch in sequence")
    text = (
        "The Python API in fresh processes, seconds; medians. Upstream returns no chunks. A second model in the same "
        "process is not a cold start: imports, kernels and buffers are there already."
    )
    if batch is not None:
        seconds = [request["seconds"] for request in batch["requests"]]
        audio = sum(request["audio"] for request in batch["requests"])
        text += f" {len(seconds)} requests in sequence took {sum(seconds):.1f} s for {audio:.1f} s of audio; "
        text += f"the slowest took {max(seconds) / statistics.median(seconds):.2f} times the median."
    return Section(
        title="Requests",
        text=text,
        chart="chunks",
        head=("system", "first chunk", "spread of chunks", "first request", "later request", "peak MB", "second model"),
        rows=rows,
    )


def _calls(steps: Steps) -> Section:
    rows = []
    if (step := steps.get("calls")) is not None:
        for system in (UPSTREAM, "ours"):
            first, last = step["first"][system], step["last"][system]
            rows.append((system, *map(_cell, (1000 * first, 1000 * last, last / first))))
    return Section(
        title="Calls of T3",
        text=f"Milliseconds until T3 has drawn {TOKENS} speech tokens, upstream's and ours in turn in one warm "
        "process; medians of the calls 2 to 6 and of the last five.",
        head=("system", "first calls", "last calls", "last / first"),
        rows=rows,
    )


def _memory(steps: Steps) -> Section:
    rows = []
    unlimited = steps.get("memory: unlimited", {}).get("allocated_bytes", 0)
    for name, step in steps.items():
        if not name.startswith("memory: "):
            continue
        limit = name.removeprefix("memory: ")
        if limit.endswith("%"):
            limit += f", {int(limit.split()[0]) * unlimited / 1e8:.0f} MB"
        spoken = f"spoke {len(step['requests'])} requests" if "requests" in step else ""
        rows.append((limit, spoken or f"ended with exit code {step['exit_code']}: {step['error'][:100]}"))
    return Section(
        title="Memory pressure",
        text="A limit on the memory that a warm process may allocate (RLIMIT_DATA), in percent of the memory of an "
        f"unlimited process after its first request ({unlimited / 1e6:.0f} MB), lowered until it is too little.",
        head=("limit", "result"),
        rows=rows,
    )


def _levels(steps: Steps) -> Section:
    rows = []
    for level in range(4):
        if (step := steps.get(f"levels: {level}")) is not None:
            warmup = step["ready"] - step["attached"]
            figures = (warmup, first_request(step), steady_request(step), peak_memory(step) / 1e6)
            rows.append((str(level), *map(_cell, figures)))
    return Section(
        title="Levels of the warm-up",
        text="Cold loads without a warm state, and a warm-up up to each level; 0 is no warm-up. Seconds.",
        chart="levels",
        head=("level", "warm-up", "first request", "later request", "peak MB"),
        rows=rows,
    )


def _ablation(steps: Steps) -> Section:
    complete = median(rounds(steps, "ablation", "none"), itemgetter("first_audio"))
    rows = [(name, _cell(seconds), f"{size / 1e6:.1f}") for name, (seconds, size) in extra_seconds(steps).items()]
    text = "One family of the warm state left out in turn, without a warm-up: how much later the first audio comes."
    if complete is not None:
        text += f" With all families it comes after {complete:.1f} s."
    return Section(
        title="What each family saves", text=text, chart="ablation", head=("family", "seconds", "MB"), rows=rows
    )


def _profiles(steps: Steps) -> Section:
    rows = []
    for name in [name.removeprefix("profiles: bake ") for name in steps if name.startswith("profiles: bake ")]:
        bake, runs = steps[f"profiles: bake {name}"], rounds(steps, "profiles", name)
        figures = [median(runs, figure) for figure in (itemgetter("attached"), first_request, steady_request)]
        rows.append((name, _cell(bake["bake_seconds"]), _cell(bake["state_megabytes"]), *map(_cell, figures)))
    return Section(
        title="Profiles",
        text="How the model runs: uncompiled, from AOTInductor packages, or with torch.compile. Seconds; medians.",
        chart="profiles",
        head=("profile", "bake", "MB of the state", "attached", "first request", "later request"),
        rows=rows,
    )


def _growth(steps: Steps) -> Section:
    workers = [(int(name.split()[1]), step["resident_bytes"]) for name, step in steps.items() if "load: " in name]
    slopes = (
        ("seconds of a request for each second of audio", slope(length_points(steps)), 1.0, "s"),
        ("state for each additional voice", slope(voice_points(steps)), 1e6, "MB"),
        ("resident memory for each additional worker", slope(workers), 1e6, "MB"),
    )
    return Section(
        title="Growth",
        text="Slopes of least-squares lines. Resident memory counts shared pages, such as the weights, in each worker.",
        chart="growth",
        head=("growth", "slope"),
        rows=[(title, f"{value / unit:.2f} {name}") for title, value, unit, name in slopes if value is not None],
    )


def _load(steps: Steps) -> Section:
    rows = [
        (
            workers,
            str(level["clients"]),
            *(_cell(level["latency"].get(name)) for name in ("p50", "p99")),
            _cell(level["first_chunk"].get("p50")),
            f"{level['throughput']:.2f}",
            f"{level['spoken']} of {level['clients'] * level['requests']}",
        )
        for workers, levels in load_levels(steps).items()
        for level in levels
    ]
    return Section(
        title="Concurrent load",
        text="Clients that send requests without a pause to a warm server. Latency in seconds; every audio was "
        "compared with the same request without load.",
        chart="load",
        head=("workers", "clients", "p50", "p99", "chunk p50", "audio/s", "correct"),
        rows=rows,
    )


def _quality_pairs(steps: Steps) -> Section:
    rows = []
    for name, step in steps.items():
        part, _, pair = name.partition(": ")
        if part == "quality" and " / " in pair:
            tokens = "" if step["tokens_equal"] is None else f"{step['tokens_equal']:.0%}"
            decibels = "all equal" if step["decibels"] is None else f"{step['decibels']:.0f}"
            rows.append((pair, tokens, f"{step['mel_distance']:.4f}", decibels))
    return Section(
        title="Quality in pairs",
        text="The same text with the same random numbers by two systems: equal speech tokens, mean distance of the "
        "logarithmic mel spectrograms, and the ratio of the audio to the difference in dB.",
        head=("pair", "tokens equal", "mel distance", "dB"),
        rows=rows,
    )


def _quality(steps: Steps) -> Section:
    rows = []
    for name, step in steps.items():
        part, _, system = name.partition(": ")
        if part == "quality" and " / " not in system:
            stages = ("greedy_tokens_equal", "next_tokens_equal", "mel_difference", "sound_decibels")
            cells = ["" if step.get(stage) is None else f"{step[stage]:.4g}" for stage in stages]
            rows.append((TITLES.get(system, system), f"{step['watermark']:.2f}", *cells))
    return Section(
        title="Quality of each stage",
        text="Confidence of upstream's detector that there is a watermark (0 to 1). Each stage gets upstream's result "
        "of the stage before: greedy tokens equal to upstream's, up to the first difference, of 200; share of equal "
        "next tokens; largest relative difference of the mel spectrogram; dB of the audio to the difference.",
        head=("system", "watermark", "greedy", "next", "mel", "dB"),
        rows=rows,
    )


def _rows(
    steps: Steps, part: str, titles: Mapping[str, str], columns: Sequence[Callable[[dict[str, Any]], float]]
) -> list[tuple[str, ...]]:
    """Return a row of medians for each system that was measured; a figure that a system lacks stays empty."""
    return [
        (title, *(_cell(median(runs, figure)) for figure in columns))
        for system, title in titles.items()
        if (runs := rounds(steps, part, system))
    ]


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"


_SECTIONS: Sequence[Callable[[Steps], Section]] = (
    _starts,
    _requests,
    _calls,
    _memory,
    _levels,
    _ablation,
    _profiles,
    _growth,
    _load,
    _quality_pairs,
    _quality,
)
