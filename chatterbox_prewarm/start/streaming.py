"""Stream speech from a loaded model, after a check that the model is warm."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import NotWarmError
from chatterbox_prewarm.model.streaming import generate_stream
from chatterbox_prewarm.start.options import check_policy

if TYPE_CHECKING:
    from collections.abc import Generator

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.start.attach import Attached

logger = logging.getLogger(__name__)


def generate_stream_with_warmup_check(
    attached: Attached, text: str, *, policy: str | None = None, **arguments: Any
) -> Generator[Chunk]:
    """Stream speech like `generate_stream`, if the model is warm. After a miss the first request is slower.

    Example:
        >>> for chunk in generate_stream_with_warmup_check(attached, "Hello.", policy="require"):
        ...     play(chunk.samples)

    Args:
        attached: the loaded model with its warm state.
        text: the text to speak.
        policy: on misses "require" raises an error, "fallback" warns and "off" does nothing; by default the policy of
            the start.
        **arguments: of `generate_stream`.

    Raises:
        NotWarmError: under "require", there were misses.
        BadInputError, ModelError: as `generate_stream`.
    """
    check_warm(attached, policy)
    return generate_stream(attached, text, **arguments)


def check_warm(attached: Attached, policy: str | None = None) -> None:
    """Judge whether a start was warm, by its misses until the model was attached.

    Args:
        attached: the loaded model with its warm state.
        policy: see `generate_stream_with_warmup_check`.

    Raises:
        NotWarmError: under "require", there were misses.
        BadInputError: there is no such policy.
    """
    policy = policy or attached.prepared.options.policy
    check_policy(policy)
    if attached.misses and policy != "off":
        counts = ", ".join(f"{count} in {family}" for family, count in attached.misses.items())
        message = f"the model is not warm: expected no misses, found {counts}; {'; '.join(attached.reasons)}"
        if policy == "require":
            raise NotWarmError(message, next_step="bake a state for this machine, or stream with policy='fallback'")
        logger.warning(message)
