"""Stream speech from a loaded model, after a check that it is warm."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, NotWarmError
from chatterbox_prewarm.model.streaming import Chunk, generate_stream
from chatterbox_prewarm.start.prepared import POLICIES

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

    from chatterbox_prewarm.start.attach import Attached

    Piece = tuple[torch.Tensor, torch.Tensor, bool]  # tokens, their mel spectrogram, whether it is the last

logger = logging.getLogger(__name__)


def generate_stream_with_warmup_check(
    attached: Attached, text: str, *, policy: str | None = None, **arguments: Any
) -> Generator[Chunk]:
    """As `generate_stream`, of a model that is warm: what a start missed makes its first request slower.

    Args:
        attached: the loaded model with its warm state.
        text: what to say.
        policy: what to do about misses: "require" raises, "fallback" warns, "off" goes on; the start's by default.
        **arguments: of `generate_stream`.

    Raises:
        NotWarmError: under "require", there were misses.
        BadInputError, ModelError: as `generate_stream`.
    """
    policy = policy or attached.prepared.policy
    if policy not in POLICIES:
        raise BadInputError(f"there is no policy {policy!r}", next_step=f"choose one of: {', '.join(POLICIES)}")
    found = attached.metrics.to_dict()
    if found["misses"] and policy != "off":
        counts = ", ".join(f"{count} in {family}" for family, count in found["misses"].items())
        message = f"the model is not warm: misses are {counts}, none was expected; {'; '.join(found['reasons'])}"
        if policy == "require":
            raise NotWarmError(message, next_step="bake a state for this machine, or stream with policy='fallback'")
        logger.warning(message)
    return generate_stream(attached, text, **arguments)
