"""Errors after which a worker's process can do no more work."""

from __future__ import annotations


def is_broken(error: BaseException) -> bool:
    """Whether an error leaves this process without use.

    A fault of a CUDA kernel stays with its context, so that every later call fails too. After a failed allocation the
    allocator's pools are in pieces, which a fresh process is not.
    """
    import torch  # when there is an error, a model was there before

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The last is what oneDNN says, PyTorch's library for CPUs, when it gets no memory.
    signs = ("CUDA error", "can't allocate memory", "could not create a")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
