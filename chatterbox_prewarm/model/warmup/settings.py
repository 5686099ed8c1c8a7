"""Settings of a warm-up: its levels, its texts, and the environment variable that switches it off."""

from __future__ import annotations

import os
from collections.abc import Collection

from chatterbox_prewarm.errors import BadInputError

#: Level 1 runs each model, level 2 the kernels that real use needs, level 3 the memory pools of a GPU.
LEVELS = (1, 2, 3)
#: If this environment variable is "off", every warm-up returns immediately.
SWITCH = "CHATTERBOX_PREWARM_WARMUP"

SHORT_TEXT = "Hello, world."
MEDIUM_TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not seem to mind it at all."
LONG_TEXT = (
    "A container that has to compile before it can speak keeps its listener waiting. This one did its compiling when "
    "the image was built, so that what remains to be done at its start is to read, to check, and to begin. "
    "Everything else was finished long before anybody asked, on a machine just like the one that it is running on now."
)
TEXTS = (SHORT_TEXT, MEDIUM_TEXT, LONG_TEXT)


def switched_off() -> bool:
    """Return whether the environment switches warm-ups off."""
    return os.environ.get(SWITCH, "").lower() in {"off", "0", "false", "no"}


def check_levels(levels: Collection[int]) -> tuple[int, ...]:
    """Return the levels in the order in which they run.

    Raises:
        BadInputError: the collection is empty, or one of its levels does not exist.
    """
    given = list(levels) if isinstance(levels, Collection) else []
    if not given or not all(level in LEVELS for level in given):
        raise BadInputError(
            f"the warm-up levels {given or levels} are not among 1, 2, 3",
            next_step="choose from the levels 1, 2 and 3, such as [1, 2]",
        )
    return tuple(sorted(set(levels)))
