"""Warming up for a load: how much of what comes after ready is worth doing before somebody asks for it.

A start is ready after one synthesis. What remains cold is what a request of another length meets first: kernels that
convolutions choose by length, memory pools that grow, and the making of a voice. Each costs a request some tenths of a
second, once. So a server that is asked once in a while needs none of it, and a busy one wants all of it done.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.warmup.levels import switched_off

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.system.metrics import WarmupMetrics

logger = logging.getLogger(__name__)

#: Requests a minute from which a level pays, and the speech tokens (25 a second) of the lengths that are then warmed.
_PLANS = (
    (0.0, 1, ()),
    (1.0, 2, (50, 100, 200)),
    (10.0, 3, (25, 50, 75, 100, 150, 200, 300)),
)


@dataclass(frozen=True, kw_only=True)
class WarmupStep:
    """A piece of a warm-up that can be left and begun anew.

    Attributes:
        name: for the log.
        run: does it; its argument is called in between and may raise to leave.
    """

    name: str
    run: Callable[[Callable[[], None]], None]


@dataclass(frozen=True, kw_only=True)
class WarmupPlan:
    """What to warm up.

    Attributes:
        level: as in `ChatterboxWarmupStrategy`: 1 is what a start does anyhow, 2 adds lengths, 3 a voice and
            the lengths that memory pools grow for.
        tokens: the lengths, in speech tokens.
    """

    level: int
    tokens: tuple[int, ...]

    def steps(self, synthesizer: Synthesizer) -> list[WarmupStep]:
        """The plan as steps, shortest first."""
        steps = [
            WarmupStep(name=f"{count} speech tokens", run=functools.partial(_render, synthesizer, count))
            for count in self.tokens
        ]
        if self.level >= 3:
            steps.append(WarmupStep(name="a voice from a clip", run=functools.partial(_make_voice, synthesizer)))
        return steps


class AdaptiveWarmup:
    """Warms a model up for a load.

    Args:
        synthesizer: the loaded model with its voices, as `Attached.synthesizer`.
        metrics: where the phases are recorded, if anywhere.
    """

    def __init__(self, synthesizer: Synthesizer, *, metrics: WarmupMetrics | None = None) -> None:
        self._synthesizer = synthesizer
        self._metrics = metrics

    @staticmethod
    def plan_for(requests_per_minute: float) -> WarmupPlan:
        """Choose level and lengths for a load.

        Raises:
            BadInputError: the load is negative or no number.
        """
        if not requests_per_minute >= 0:
            raise BadInputError(f"{requests_per_minute} requests a minute", next_step="give 0 or more")
        _, level, tokens = max(plan for plan in _PLANS if plan[0] <= requests_per_minute)
        return WarmupPlan(level=level, tokens=tokens)

    def warm_up_for_workload(self, requests_per_minute: float) -> WarmupPlan:
        """Do now what the load makes worth doing; returns what that was.

        The model's random generators are left as they were.

        Raises:
            BadInputError: as `plan_for`.
        """
        plan = self.plan_for(requests_per_minute)
        if switched_off():
            logger.info("warm-up is switched off")
            return plan
        from chatterbox_prewarm.model.synthesis import preserved_generators

        for step in plan.steps(self._synthesizer):
            logger.info("warm-up: %s", step.name)
            with preserved_generators(str(self._synthesizer.model.device)):
                if self._metrics is None:
                    step.run(_go_on)
                else:
                    with self._metrics.phase(f"warm-up of {step.name}"):
                        step.run(_go_on)
        return plan


def _go_on() -> None:
    """Never leave."""


def _render(synthesizer: Synthesizer, count: int, on_step: Callable[[], None]) -> None:
    """Make the sound of so many tokens, whatever they say."""
    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.regions.pipeline import bound

    stages = bound(synthesizer.model)
    with torch.inference_mode():
        tokens = torch.arange(count, device=synthesizer.model.device)
        mel = stages.flow(tokens, synthesizer.voice(DEFAULT_VOICE).gen, on_step=on_step)
        stages.vocoder(mel)


def _make_voice(synthesizer: Synthesizer, _on_step: Callable[[], None]) -> None:
    """Make a voice as an upload does; it cannot be left halfway."""
    from chatterbox_prewarm.model.voices import prepare_voice
    from chatterbox_prewarm.model.warmup.inputs import reference_clip

    with reference_clip() as clip:
        prepare_voice(synthesizer.model, clip)
