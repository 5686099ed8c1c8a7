"""Compare the claims of this project with the results of a report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from operator import ge, itemgetter
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.report.figures import (
    chunk_spread,
    first_chunk,
    peak_memory,
    ratios,
    rounds,
)
from chatterbox_prewarm.bench.report.options import WARM_AGAIN
from chatterbox_prewarm.bench.speak_process import COLD, UPSTREAM, WARM
from chatterbox_prewarm.bench.t3_calls import TOKENS, saved_milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
#: Least ratio in dB of the audio to the difference between two renditions that sound the same.
_SAME_SOUND_DECIBELS = 50
#: Least confidence of upstream's detector that there is a watermark.
_WATERMARK = 0.9
#: Budgets of a warm start: title, figure of a start, greatest value, and divisor of the figure.
_BUDGETS = (
    ("exec to first audio", "first_to_sum", 1.15, "the sum of exec to attached and a steady request"),
    ("first request", "first_to_steady", 1.10, "a steady request of the same process"),
    ("first chunk of the first stream", "first_chunk_to_steady", 1.10, "the first chunk of later streams"),
    ("check before ready", "ready_to_steady", 0.15, "a steady request of the same process"),
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the table of claims.

    Attributes:
        claim: the property in question.
        claimed: the claimed value.
        measured: the measured value, with the range over the rounds.
        verdict: `MET`, `NOT_MET` or `NOT_MEASURED`.
        note: the value for comparison, and its conditions.
    """

    claim: str
    claimed: str
    measured: str
    verdict: str
    note: str


def claims(steps: Mapping[str, dict[str, Any]]) -> list[Claim]:
    """Evaluate every claim with the recorded steps."""
    start = {name: rounds(steps, "starts", name) for name in (UPSTREAM, WARM)}
    request = {name: rounds(steps, "requests", name) for name in (UPSTREAM, COLD, WARM)}
    pairs = sorted(request[COLD].keys() & request[WARM].keys())
    return [
        *(
            _row(
                f"cold start, {title}",
                "50 to 70 % less",
                [1 - ratio for ratio in ratios(start[WARM], start[UPSTREAM], itemgetter(mark))],
                lambda share: share >= 0.5,
                lambda share: f"{share:.0%} less",
                note,
            )
            for title, mark, note in (
                (
                    "model loaded",
                    "attached",
                    "from exec until model and voice are loaded, warm server and upstream",
                ),
                (
                    "first audio",
                    "first_audio",
                    "from exec to the first audio. Our server checks every stage first, and upstream does not",
                ),
            )
        ),
        _row(
            "first chunk",
            "300 to 500 ms less",
            [1000 * (first_chunk(request[COLD][one]) - first_chunk(request[WARM][one])) for one in pairs],
            lambda saved: saved >= 300,
            lambda saved: f"{saved:.0f} ms less",
            "first request after a cold and after a warm load, both with our code",
        ),
        _row(
            f"first chunk, T3's first {TOKENS} tokens",
            "300 to 500 ms less",
            [saved_milliseconds(steps["calls"]["seconds"])] if "calls" in steps else [],
            lambda saved: saved >= 300,
            lambda saved: f"{saved:.0f} ms less",
            "warm calls of upstream's T3 and our T3 in turn in one process. A stream with `look_ahead` sends its "
            "first chunk after such tokens. The claim names the alignment analyzer, which only the Multilingual model "
            "has",
        ),
        _row(
            "chunk times",
            "steadier",
            ratios(request[WARM], request[COLD], chunk_spread),
            lambda ratio: ratio < 1,
            lambda ratio: f"{ratio:.2f} of the spread",
            "standard deviation of the time between the chunks of the first request, warm and cold",
        ),
        _row(
            "peak memory of the first run",
            "10 to 15 % less",
            [1 - ratio for ratio in ratios(request[WARM], request[UPSTREAM], peak_memory)],
            lambda share: share >= 0.1,
            lambda share: f"{share:.0%} less" if share >= 0 else f"{-share:.0%} more",
            "peak resident memory, on a GPU the peak of torch's allocator; warm, and upstream without changes",
        ),
        _quality(steps),
    ]


def budgets(steps: Mapping[str, dict[str, Any]]) -> list[Claim]:
    """Compare all warm starts of a server with their budgets, also the second ones of each round."""
    torch = rounds(steps, "starts", "torch")
    starts = [(one, start) for name in (WARM, WARM_AGAIN) for one, start in rounds(steps, "starts", name).items()]
    warm = [start for _, start in starts]
    attached = [start["attached"] / torch[one]["imported"] for one, start in starts if one in torch]
    rows = [("exec to attached", attached, 1.3, "the import of torch in a bare process of the same round")]
    for title, figure, most, base in _BUDGETS:
        rows.append((title, [start[figure] for start in warm if figure in start], most, base))
    found = [
        _row(
            title,
            f"at most {most:.2f} times",
            values,
            partial(ge, most),
            lambda ratio: f"{ratio:.2f} times",
            base,
        )
        for title, values, most, base in rows
    ]
    misses = [max(float(sum(start["misses"].values())) for start in warm)] if warm else []
    note = "all families; the start with the most"
    return [*found, _row("misses", "none", misses, lambda count: count == 0, lambda count: f"{count:.0f}", note)]


def _row(
    claim: str,
    claimed: str,
    values: Sequence[float],
    holds: Callable[[float], bool],
    text: Callable[[float], str],
    note: str,
) -> Claim:
    """Judge a claim by the median of the rounds."""
    if not values:
        return Claim(claim=claim, claimed=claimed, measured="", verdict=NOT_MEASURED, note=note)
    median = statistics.median(values)
    measured = text(median)
    if (least := text(min(values))) != (most := text(max(values))):
        (low, _, unit), (_, _, other) = least.partition(" "), most.partition(" ")
        measured += f" ({low if unit == other else least} to {most})"
    return Claim(claim=claim, claimed=claimed, measured=measured, verdict=MET if holds(median) else NOT_MET, note=note)


def _quality(steps: Mapping[str, dict[str, Any]]) -> Claim:
    """Judge that a warm start changes nothing that can be heard: equal tokens, the same sound, the watermark."""
    pair = steps.get(f"quality: {COLD} / {WARM}")
    warm = steps.get(f"quality: {WARM}")
    note = "the same text and random numbers, cold and warm, and upstream's detector of the watermark"
    if pair is None or warm is None:
        return Claim(claim="quality", claimed="no effect", measured="", verdict=NOT_MEASURED, note=note)
    same = pair["decibels"] is None or pair["decibels"] >= _SAME_SOUND_DECIBELS
    sound = "every sample equal" if pair["decibels"] is None else f"difference {pair['decibels']:.0f} dB below"
    holds = pair["tokens_equal"] == 1 and same and warm["watermark"] >= _WATERMARK
    return Claim(
        claim="quality",
        claimed="no effect",
        measured=f"{pair['tokens_equal']:.0%} of the tokens equal, {sound}, watermark {warm['watermark']:.2f}",
        verdict=MET if holds else NOT_MET,
        note=note,
    )
