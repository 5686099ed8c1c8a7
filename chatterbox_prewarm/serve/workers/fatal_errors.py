"""Recognize errors after which a worker process must be replaced."""

from __future__ import annotations

import sys

#: How CUDA and PyTorch's CPU allocator report such errors. The last one is oneDNN's message when memory runs out.
_FATAL_MESSAGES = ("CUDA error", "can't allocate memory", "could not create a")


def is_fatal(error: BaseException) -> bool:
    """Return whether this error, or an error that caused it, makes the process unusable.

    A CUDA kernel fault stays in the CUDA context and makes every later call fail. A failed allocation leaves the
    allocator's memory fragmented, which a new process repairs.
    """
    if error.__cause__ is not None and is_fatal(error.__cause__):
        return True
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # before torch is imported, it cannot have raised an error
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _FATAL_MESSAGES)
