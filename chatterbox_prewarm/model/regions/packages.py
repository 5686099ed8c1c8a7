"""Ahead-of-time packages: a region as a shared library that AOTInductor made; `make_packages` makes them.

A package is a folder with `region.so` and, for a GPU, its kernels. The library is loaded where it lies, and its runner
is the one inside the loader of PyTorch's `.pt2`, in C++: neither `torch._inductor` nor `torch._dynamo` is imported.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from chatterbox_prewarm.errors import IntegrityError, first_line

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = "region.so"
#: How many calls of one package may be under way on a GPU where its runtime keeps count of them: with one, each call
#: would wait for the one before it to end there.
_CALLS_UNDER_WAY = 4


class Package:
    """A compiled region: takes weights and inputs, gives a tuple of tensors.

    Args:
        directory: of the package.
        device: that it was compiled for.

    Raises:
        IntegrityError: the library cannot be loaded.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        library = str(directory / LIBRARY)
        runners: Any = torch._C._aoti
        try:
            if device.type == "cuda" and has_single_threaded_mode():
                # One thread calls a model here. Without the runtime's bookkeeping for several, a call neither waits
                # for the one before it nor breaks the capture of a CUDA graph.
                self._runner = runners.AOTIModelContainerRunnerCuda(library, 1, str(device), str(directory), True)
            elif device.type == "cuda":
                self._runner = runners.AOTIModelContainerRunnerCuda(
                    library, _CALLS_UNDER_WAY, str(device), str(directory)
                )
            else:
                self._runner = runners.AOTIModelContainerRunnerCpu(library, 1)
        except (RuntimeError, OSError) as error:
            raise IntegrityError(
                f"{library} cannot be loaded: {first_line(error)}",
                next_step="the folder must allow execution (no `noexec`); else bake the warm state again",
            ) from error

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the region."""
        return tuple(self._runner.run(arguments))


def has_single_threaded_mode() -> bool:
    """Whether this torch can leave out the runtime's bookkeeping of threads, without which no graph holds a package."""
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda
    return "arg4: bool" in (inspect.getdoc(runner.__init__) or "")
