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


class Package:
    """A compiled region: takes weights and inputs, gives a tuple of tensors.

    Args:
        directory: of the package.
        device: that it was compiled for.
        in_graph: it will run inside a CUDA graph. The library then leaves out its own bookkeeping of threads, which a
            capture does not allow; torch can do that since 2.7.

    Raises:
        IntegrityError: the library cannot be loaded.
    """

    def __init__(self, directory: Path, device: torch.device, *, in_graph: bool = False) -> None:
        library = str(directory / LIBRARY)
        runners: Any = torch._C._aoti
        try:
            if device.type == "cuda":
                arguments = (library, 1, str(device), str(directory))
                single_threaded = (True,) if in_graph else ()
                self._runner = runners.AOTIModelContainerRunnerCuda(*arguments, *single_threaded)
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


def can_run_in_graphs() -> bool:
    """Whether this torch can run a package inside a CUDA graph."""
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda
    return "arg4: bool" in (inspect.getdoc(runner.__init__) or "")
