"""`AdaptiveWarmup`: warm a model up for an expected load."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from chatterbox_prewarm.model.streaming import synthesizer_of
from chatterbox_prewarm.model.warmup.adaptive import plan_for
from chatterbox_prewarm.model.warmup.settings import switched_off
from chatterbox_prewarm.start.defaults import default_device
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from chatterbox_prewarm.model.streaming import HasSynthesizer
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.model.warmup.adaptive import WarmupPlan

logger = logging.getLogger(__name__)


class AdaptiveWarmup:
    """Warms a model up for an expected load. The random generators keep their state.

    Example:
        >>> model = from_pretrained_with_warmup("cuda")
        >>> AdaptiveWarmup(model).warm_up_for_workload(30)
        WarmupPlan(level=3, tokens=(25, 50, 75, 100, 150, 200, 300))

    Args:
        model: a model that this project loaded: a `PrewarmedChatterbox`, the result of `load_warmup_cache`, or a
            `Synthesizer`. By default one is loaded at the first warm-up, on a GPU if there is one.
        metrics: records the phases; by default a new object.

    Attributes:
        model: the model.
    """

    def __init__(
        self, model: HasSynthesizer | Synthesizer | None = None, *, metrics: StartMetrics | None = None
    ) -> None:
        self.model = model
        self._metrics = metrics or StartMetrics()

    def warm_up_for_workload(self, expected_requests_per_minute: float) -> WarmupPlan:
        """Run the warm-up for a load now and return its plan.

        Raises:
            BadInputError: the load is negative or not a number.
            PrewarmError: no model was given, and none could be loaded.
        """
        plan = plan_for(expected_requests_per_minute)
        if switched_off():
            logger.info("warm-up is switched off")
            return plan
        if self.model is None:
            self.model = PrewarmedChatterbox.from_pretrained_with_warmup(default_device())
        from chatterbox_prewarm.model.synthesis import preserved_generators

        synthesizer = synthesizer_of(self.model)
        for step in plan.steps(synthesizer):
            logger.info("warm-up: %s", step.name)
            with preserved_generators(str(synthesizer.model.device)), self._metrics.phase(f"warm-up of {step.name}"):
                step.run(lambda: None)
        return plan

    def enable_aggressive_warmup(self) -> WarmupPlan:
        """Warm up everything that a busy service uses, as for more than 10 requests per minute."""
        return self.warm_up_for_workload(math.inf)

    def enable_conservative_warmup(self) -> WarmupPlan:
        """Warm up only what the first request needs: load the model, which runs every region once."""
        return self.warm_up_for_workload(0)
