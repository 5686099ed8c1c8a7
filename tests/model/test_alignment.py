"""Test the decisions by T3's attention against upstream's `AlignmentStreamAnalyzer`, on scripted attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

analyzer_module = pytest.importorskip(
    "chatterbox.models.t3.inference.alignment_stream_analyzer", reason="the installed upstream has no analyzer"
)

from chatterbox_prewarm.model.regions.alignment import CONTINUE, FREE, PROGRESS, STOP, analyze  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The conditioning of T3 before the text, the text tokens, and the logit of the stop token that upstream reads back.
START, STOP_TOKEN = 34, 6562


class Spy(torch.nn.Module):
    """Takes the place of a transformer, on whose layers upstream registers hooks."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Identity()
        self.layers = torch.nn.ModuleList([layer] * 14)


def upstreams_decisions(maps: Sequence[Any], tokens: Sequence[int], count: int) -> list[int]:
    """Run upstream's analyzer on the attention of each step, (positions,), and read its decisions from the logits."""
    analyzer = analyzer_module.AlignmentStreamAnalyzer(Spy(), None, (START, START + count), eos_idx=STOP_TOKEN)
    decisions = []
    last = 6561
    for step, attention in enumerate(maps):
        # The first call has the rows of the complete prompt; the last two belong to the start tokens.
        rows = START + count + 2 if step == 0 else 1
        analyzer.last_aligned_attns = [attention.expand(rows, -1)] * 3
        logits = analyzer.step(torch.zeros(1, 8194), next_token=last)
        stop, others = float(logits[0, STOP_TOKEN]), float(logits[0, 0])
        decisions.append(STOP if stop > 0 else CONTINUE if stop < others else FREE)
        last = tokens[step]
    return decisions


def our_decisions(maps: Sequence[Any], tokens: Sequence[int], count: int) -> list[int]:
    progress, recent = torch.zeros(PROGRESS), torch.tensor([-1, -2])
    decisions = []
    for step, attention in enumerate(maps):
        progress, decision = analyze(attention, torch.tensor([START, count]), torch.tensor([step]), recent, progress)
        decisions.append(int(decision))
        recent = torch.tensor([tokens[step], int(recent[0])])
    return decisions


def attention_at(columns: Sequence[float], *, strength: float = 0.9, count: int = 12) -> list[Any]:
    """Return the attention of a sequence of steps, each of which attends to one column of the text."""
    maps = []
    for column in columns:
        row = torch.full((START + count + 2 + len(columns),), 0.001)
        row[START + int(column)] = strength
        maps.append(row)
    return maps


#: The columns of the text, 12 tokens, to which the steps attend.
SCRIPTS = {
    "the text is read and ends": [0, 0, *range(12), 11, 11],
    "the end lasts too long": [0, 0, *range(12), *[11] * 9],
    "the text is repeated after its end": [0, 0, *range(12), *range(2, 7), *range(2, 7)],
    "the attention jumps ahead, which is noise": [0, 1, 2, 11, 3, 4, 11, 5, 6, 7, 8, 9, 10, 11],
    "the attention jumps back": [*range(9), 1, 2, 9, 10, 11, 11],
    "the attention stays at the beginning": [0] * 20,
    "the attention is ahead of the speech": [11, 11, 11, 11, 5, 6, 7, 8, 9, 10, 11],
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
def test_decisions_equal_those_of_upstream(script: list[int]) -> None:
    maps = attention_at(script)
    tokens = list(range(len(maps)))
    ours = our_decisions(maps, tokens, 12)
    assert ours == upstreams_decisions(maps, tokens, 12)
    assert CONTINUE in ours


def test_the_scripts_lead_to_each_decision() -> None:
    found = {decision for script in SCRIPTS.values() for decision in our_decisions(attention_at(script), range(99), 12)}
    assert found == {FREE, CONTINUE, STOP}


def test_a_repeated_token_ends_the_speech_as_in_upstream() -> None:
    maps, tokens = attention_at([0, 1, 2, 3, 4, 5]), [7, 7, 8, 9, 9, 10]
    assert our_decisions(maps, tokens, 12) == upstreams_decisions(maps, tokens, 12)
    assert our_decisions(maps, tokens, 12)[2] == STOP


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [6, 7, 12, 40])
def test_decisions_about_random_attention_equal_those_of_upstream(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    steps = 60
    sharp = torch.rand(()) * 8
    maps = list(torch.softmax(sharp * torch.randn(steps, START + count + 2 + steps), dim=1))
    path = (torch.arange(steps) * count / 40).long().clamp(max=count - 1) + torch.randint(-1, 2, (steps,))
    for row, column in zip(maps, path.clamp(0, count - 1).tolist(), strict=True):
        row[START + column] += 0.7
    tokens = torch.randint(0, 12, (steps,)).tolist()
    assert our_decisions(maps, tokens, count) == upstreams_decisions(maps, tokens, count)


def test_a_very_short_text_that_makes_upstream_fail_has_no_repetition() -> None:
    maps = attention_at([0, 0, 1, 2, 3, 4, 4, 4], count=5)
    tokens = range(8)
    with pytest.raises(IndexError):
        upstreams_decisions(maps, tokens, 5)
    assert set(our_decisions(maps, tokens, 5)) == {FREE}
