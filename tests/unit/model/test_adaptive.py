"""Test the plan of the adaptive warm-up."""

from __future__ import annotations

import math

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.warmup.adaptive import plan_for


def test_higher_load_gives_a_larger_plan() -> None:
    plans = [plan_for(load) for load in (0, 0.9, 1, 10, 10.1, math.inf)]
    assert [plan.level for plan in plans] == [1, 1, 2, 2, 3, 3]
    assert plans[0].tokens == ()
    assert set(plans[2].tokens) < set(plans[4].tokens)


@pytest.mark.parametrize("load", [-1, math.nan, "many"])
def test_invalid_load_is_refused(load: float) -> None:
    with pytest.raises(BadInputError, match="requests per minute"):
        plan_for(load)
