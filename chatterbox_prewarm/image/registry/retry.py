"""The retry policy for registries.

After each `TransientError` the caller waits and tries again, until there are more failures in a row than delays. A
transfer resumes where it stopped; progress since the last failure resets the count.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_prewarm.image.registry.registry_errors import TransientError

logger = logging.getLogger(__name__)

#: Seconds to wait before each retry.
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)


def retry_policy(
    delays: Sequence[float], doing: str, *, min_progress: int = 1
) -> Callable[[TransientError, int], None]:
    """Return a function that the caller calls with each transient error and the number of bytes transferred so far.

    The function waits before the next attempt, for at least as long as the registry asks. It raises EngineError when
    no attempt is left.

    Args:
        delays: seconds before each retry.
        doing: the operation, for messages, e.g. "GET manifest 1.0 of example/voice".
        min_progress: bytes since the last failure that reset the count. A connection that always breaks still
            transfers some bytes, so a download needs more than one.
    """
    failures, last_position = 0, 0

    def wait_before_retry(error: TransientError, position: int) -> None:
        nonlocal failures, last_position
        if position - last_position >= min_progress:
            failures = 0
        last_position = position
        failures += 1
        if failures > len(delays):
            at = f" at byte {position}" if position else ""
            raise EngineError(
                f"{doing} failed {failures} times in a row{at}: {error.message}", next_step=error.next_step
            ) from error
        delay = max(delays[failures - 1], error.retry_after)
        logger.warning("%s; retrying in %.1f s", error.message, delay)
        time.sleep(delay)

    return wait_before_retry
