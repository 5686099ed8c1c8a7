"""Errors after which a worker's process can do no more work."""

from __future__ import annotations

import sys


def is_broken(error: BaseException) -> bool:
    """Whether an error leaves this process without use.

    A fault of a CUDA kernel stays with its context, so that every later call fails too. After a failed allocation the
    allocator's pools are in pieces, which a fresh process is not. What an error was raised from is looked at as well.
    """
    if error.__cause__ is not None and is_broken(error.__cause__):
        return True
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # whose errors there are none of before it is imported
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # The last is what oneDNN says, PyTorch's library for CPUs, when it gets no memory.
    signs = ("CUDA error", "can't allocate memory", "could not create a")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
