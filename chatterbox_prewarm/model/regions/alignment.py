"""Follow the text in T3's attention, and decide when the speech must end and when it must not.

Some heads of the Multilingual T3 attend to the part of the text that is spoken. Upstream's `AlignmentStreamAnalyzer`
keeps the complete attention map of these heads on the CPU. The same decisions need only a few running sums, which stay
on the device, so that a step needs no host sync and a CUDA graph can contain it.
"""

from __future__ import annotations

import torch

#: The values of a decision: draw any token; any token except the stop token; the stop token.
FREE, CONTINUE, STOP = 0, 1, 2
#: The number of values in `progress`: the position in the text, whether its end was reached, the attention to each of
#: the last three text tokens since then, and the attention to earlier text since then.
PROGRESS = 6
#: Upstream's constants. A jump in the text further than this is noise.
_BACK, _AHEAD = -4, 7
#: The number of text tokens that count as the end of the text, and as the text before it.
_END, _BEFORE_END = 3, 5
#: The attention in steps (40 ms) after which the end, or a repetition, lasts too long.
_TOO_LONG = 5.0


def analyze(
    attention: torch.Tensor, text: torch.Tensor, step: torch.Tensor, recent: torch.Tensor, progress: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide about the next token, as upstream's `AlignmentStreamAnalyzer.step`.

    Args:
        attention: float32 (positions,), the attention of the last token, averaged over the heads. The first call of an
            utterance, after the prompt, does not use it.
        text: int64 (2,), the position of the first text token and the number of text tokens, with start and stop token.
        step: int64 (1,), the number of the next token among the speech tokens.
        recent: int64 (2,), the last two tokens; negative and different if there are none.
        progress: float32 (6,), see `PROGRESS`; zeros at the first call of an utterance.

    Returns:
        `progress` after this step, and the decision, int64 (1,): `FREE`, `CONTINUE` or `STOP`.
    """
    start, count = text[:1], text[1:]
    columns = torch.arange(attention.size(0), device=attention.device) - start
    # Upstream ignores text that is further ahead than speech tokens were drawn.
    row = torch.where((columns >= 0) & (columns < count) & (columns <= step), attention, 0.0)
    current = (row.argmax(0, keepdim=True) - start).clamp(min=0)
    position, was_complete = progress[:1], progress[1:2]
    jump = current - position
    position = torch.where((jump > _BACK) & (jump < _AHEAD), current.to(position.dtype), position)
    complete = torch.maximum(was_complete, (position >= count - _END).to(position.dtype))
    last = row.index_select(0, start + count - _END + torch.arange(_END, device=row.device))
    ends = progress[2:5] + was_complete * last
    before = torch.where(columns < count - _BEFORE_END, row, 0.0).amax(0, keepdim=True)
    repeated = progress[5:] + was_complete * before
    too_long = (ends.amax(0, keepdim=True) >= _TOO_LONG) | (repeated > _TOO_LONG)
    stuck = recent[:1] == recent[1:]
    early = (current < count - _END) & (count > _BEFORE_END)
    decision = torch.where(too_long | stuck, STOP, torch.where(early, CONTINUE, FREE))
    return torch.cat([position, complete, ends, repeated]), decision
