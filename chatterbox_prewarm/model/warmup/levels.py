"""Warming a model up: what is exercised, on which inputs, and what came of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Collection

#: 1 runs each model, 2 the kernels that real use needs, 3 memory pools and caches.
LEVELS = (1, 2, 3)
#: "off" in this variable of the environment makes every warm-up return at once.
SWITCH = "CHATTERBOX_PREWARM_WARMUP"


def switched_off() -> bool:
    """Whether the environment switches warm-ups off."""
    return os.environ.get(SWITCH, "").lower() in {"off", "0", "false", "no"}


def check_levels(levels: Collection[int]) -> tuple[int, ...]:
    """Return the levels in the order in which they run.

    Raises:
        BadInputError: there are none, or one of them does not exist.
    """
    if not levels or not set(levels) <= set(LEVELS):
        raise BadInputError(f"the warm-up levels {list(levels)} are not among 1, 2, 3", next_step="use --levels 1,2,3")
    return tuple(sorted(set(levels)))
