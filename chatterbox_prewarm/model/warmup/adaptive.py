"""Adaptive warm-up: choose how much of the warm-up after readiness pays off for an expected load.

A start is ready after one synthesis. Requests of other lengths then still meet cold parts: kernels that convolutions
choose by length, memory pools that must grow, and the computation of a voice. Each cold part delays one request by some
tenths of a second. So a server with few requests needs no further warm-up, and a busy one should warm up everything.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.warmup.settings import switched_off

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.system.metrics import WarmupMetrics

logger = logging.getLogger(__name__)

#: Minimum requests per minute for a level, the level, and the lengths to warm up, in speech tokens (25 per second).
_PLANS = (
    (0.0, 1, ()),
    (1.0, 2, (50, 100, 200)),
    (10.0, 3, (25, 50, 75, 100, 150, 200, 300)),
)


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
        level: 1 needs nothing after the start; 2 adds lengths; 3 adds a voice and the lengths for which memory pools
            grow.
        tokens: the lengths, in speech tokens.
    """

    level: int
    tokens: tuple[int, ...]

    def steps(self, synthesizer: Synthesizer) -> list[WarmupStep]:
        """Return the steps of the plan, shortest first."""
        steps = [
            WarmupStep(name=f"{count} speech tokens", run=functools.partial(_render, synthesizer, count))
            for count in self.tokens
        ]
        if self.level >= 3:
            steps.append(WarmupStep(name="a voice from a clip", run=functools.partial(_compute_voice, synthesizer)))
        return steps


class AdaptiveWarmup:
    """Warms up a model for an expected load.

    Args:
        synthesizer: the loaded model with its voices, such as `Attached.synthesizer`.
        metrics: records the phases; optional.
    """

    def __init__(self, synthesizer: Synthesizer, *, metrics: WarmupMetrics | None = None) -> None:
        self._synthesizer = synthesizer
        self._metrics = metrics

    @staticmethod
    def plan_for(requests_per_minute: float) -> WarmupPlan:
        """Choose level and lengths for a load.

        Raises:
            BadInputError: the load is negative or NaN.
        """
        if not requests_per_minute >= 0:
            raise BadInputError(f"the load is {requests_per_minute} requests per minute", next_step="give 0 or more")
        _, level, tokens = max(plan for plan in _PLANS if plan[0] <= requests_per_minute)
        return WarmupPlan(level=level, tokens=tokens)

    def warm_up_for_workload(self, requests_per_minute: float) -> WarmupPlan:
        """Run the warm-up for a load now and return its plan. The random generators keep their state.

        Raises:
            BadInputError: the load is negative or NaN.
        """
        plan = self.plan_for(requests_per_minute)
        if switched_off():
            logger.info("warm-up is switched off")
            return plan
        from chatterbox_prewarm.model.synthesis import preserved_generators

        for step in plan.steps(self._synthesizer):
            logger.info("warm-up: %s", step.name)
            with preserved_generators(str(self._synthesizer.model.device)):
                phase = self._metrics.phase(f"warm-up of {step.name}") if self._metrics else contextlib.nullcontext()
                with phase:
                    step.run(lambda: None)
        return plan


def _render(synthesizer: Synthesizer, count: int, on_step: Callable[[], None]) -> None:
    """Run flow and vocoder for `count` arbitrary tokens."""
    import torch

    from chatterbox_prewarm.model.clips import DEFAULT_VOICE
    from chatterbox_prewarm.model.regions.pipeline import pipeline_of

    pipeline = pipeline_of(synthesizer.model)
    with torch.inference_mode():
        tokens = torch.arange(count, device=synthesizer.model.device)
        mel = pipeline.flow(tokens, synthesizer.voice(DEFAULT_VOICE).gen, on_step=on_step)
        pipeline.vocoder(mel)


def _compute_voice(synthesizer: Synthesizer, _on_step: Callable[[], None]) -> None:
    """Compute a voice, as for an upload. This step cannot be interrupted."""
    from chatterbox_prewarm.model.reference_clip import reference_clip
    from chatterbox_prewarm.model.voices import prepare_voice

    with reference_clip() as clip:
        prepare_voice(synthesizer.model, clip)
