"""Recognize errors after which a worker process must be replaced."""

from __future__ import annotations

from chatterbox_prewarm.errors import is_out_of_memory


def is_fatal(error: BaseException) -> bool:
    """Return whether this error, or an error that caused it, makes the process unusable.

    A CUDA kernel fault stays in the CUDA context and makes every later call fail. A failed allocation leaves the
    allocator's memory fragmented, which a new process repairs.
    """
    if error.__cause__ is not None and is_fatal(error.__cause__):
        return True
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
