"""Adaptive warm-up: choose how much of the warm-up after readiness pays off for an expected load.

A start is ready when every stage has run once. Requests of other lengths then still meet cold parts: kernels that
convolutions choose by length, and memory pools that must grow. Each cold part delays one request by some tenths of a
second. So a server with few requests needs no further warm-up, and a busy one should warm up everything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.model.synthesis import Synthesizer

#: Requests per minute: below the first number, level 1 is enough; above the second, everything is warmed up.
_QUIET, _BUSY = 1.0, 10.0
#: The lengths that each level warms up, in speech tokens (25 per second).
_LENGTHS: dict[int, tuple[int, ...]] = {1: (), 2: (50, 100, 200), 3: (25, 50, 75, 100, 150, 200, 300)}


@dataclass(frozen=True, kw_only=True)
class WarmupStep:
    """A step of a warm-up that can be interrupted and repeated.

    Attributes:
        name: for the log.
        run: runs the step. Its argument is called regularly and may raise an exception to interrupt the step.
    """

    name: str
    run: Callable[[Callable[[], None]], None]


@dataclass(frozen=True, kw_only=True)
class WarmupPlan:
    """The warm-up that an expected load needs.

    Attributes:
        level: 1 needs nothing after the start; 2 adds lengths; 3 adds the lengths for which memory pools grow.
        tokens: the lengths, in speech tokens.
    """

    level: int
    tokens: tuple[int, ...]

    def steps(self, synthesizer: Synthesizer) -> list[WarmupStep]:
        """Return the steps of the plan, shortest first."""
        return [
            WarmupStep(name=f"{count} speech tokens", run=functools.partial(_render, synthesizer, count))
            for count in self.tokens
        ]


def plan_for(requests_per_minute: float) -> WarmupPlan:
    """Choose level and lengths for a load.

    Raises:
        BadInputError: the load is negative or not a number.
    """
    if not isinstance(requests_per_minute, int | float) or not requests_per_minute >= 0:
        raise BadInputError(f"the load is {requests_per_minute} requests per minute", next_step="give 0 or more")
    level = 1 if requests_per_minute < _QUIET else 3 if requests_per_minute > _BUSY else 2
    return WarmupPlan(level=level, tokens=_LENGTHS[level])


def _render(synthesizer: Synthesizer, count: int, on_step: Callable[[], None]) -> None:
    """Run flow and vocoder for `count` arbitrary tokens."""
    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE

    model = synthesizer.model
    with torch.inference_mode():
        tokens = torch.arange(count, device=model.device)
        mel = model.flow(tokens, synthesizer.voice(DEFAULT_VOICE).gen, on_step=on_step)
        model.vocoder(mel)
