"""Executors: each profile has one, which makes a region callable with the weights of an instance."""

from __future__ import annotations

import inspect
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from chatterbox_prewarm.errors import IntegrityError, ModelError, first_line
from chatterbox_prewarm.model.regions.region import IN_GRAPHS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.system.metrics import StartMetrics

    #: Takes the inputs of a region and returns its outputs.
    BoundRegion = Callable[..., tuple[torch.Tensor, ...]]
    #: Takes a region and the weights of an instance, which become the region's first arguments.
    Executor = Callable[[Region, Sequence[torch.Tensor]], BoundRegion]

logger = logging.getLogger(__name__)

#: The shared library of an ahead-of-time package. A package is a folder with this file and, for a GPU, its kernels.
LIBRARY = "region.so"
#: The number of instances that a package loads on a GPU where its runtime tracks its calls. With one instance, each
#: call would wait until the GPU has finished the previous call.
_CONCURRENT_CALLS = 4


def eager(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
    """Run the region's Python function. This is the executor of the profile `eager`."""
    return _bind(region.function, weights)


def compiled_executor(metrics: StartMetrics, *, strict: bool = False) -> Executor:
    """Make the executor of the profile `compiled`: `torch.compile` compiles each region at its first call.

    A region that cannot be compiled runs in eager mode and counts as a miss, because an image has no compiler.

    Args:
        metrics: counts misses and adds up the seconds of first calls.
        strict: raise a `ModelError` instead of running in eager mode.
    """
    return _shared(lambda region: _compile(region, metrics, strict=strict))


def ahead_of_time_executor(
    directory: Path | None,
    device: torch.device,
    metrics: StartMetrics,
    *,
    in_graphs: bool = False,
    strict: bool = False,
) -> Executor:
    """Make the executor of the profile `aot`: it loads a baked package for each region.

    A region whose package is missing or cannot be loaded runs in eager mode and counts as a miss.

    Args:
        directory: contains the packages; None if no usable packages exist.
        device: of the model.
        metrics: counts misses, and a hit when a package is first called.
        in_graphs: T3's step will be captured as a CUDA graph. If this torch cannot capture packages, the regions of the
            step run in eager mode. The graph then saves the launch overhead that a package would save.
        strict: raise an `IntegrityError` instead of running in eager mode.
    """

    def load(region: Region) -> BoundRegion:
        if directory is None:
            return region.function  # the start has already logged the reason
        if in_graphs and region.name in IN_GRAPHS and not has_single_threaded_mode():
            logger.info("%s runs in eager mode: this torch cannot capture packages in a CUDA graph", region.name)
            return region.function
        try:
            package = load_package(directory / region.name, device)
        except IntegrityError as error:
            if strict:
                raise
            metrics.miss("aot", f"{error.message}; {region.name} runs in eager mode", next_step=error.next_step)
            return region.function
        called = False

        def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nonlocal called
            if not called:
                called = True
                metrics.hit("aot")
            return package(*arguments)

        return call

    return _shared(load)


def load_package(directory: Path, device: torch.device) -> BoundRegion:
    """Load an ahead-of-time package and return a function of its weights and inputs.

    The runner is the C++ class that the loader of PyTorch's `.pt2` archives uses internally. So neither
    `torch._inductor` nor `torch._dynamo` is imported, and nothing is unpacked.

    Args:
        directory: of the package.
        device: for which the package was compiled.

    Raises:
        IntegrityError: the library cannot be loaded.
    """
    library = str(directory / LIBRARY)
    runners: Any = torch._C._aoti
    try:
        if device.type != "cuda":
            runner = runners.AOTIModelContainerRunnerCpu(library, 1)
        elif has_single_threaded_mode():
            # Only one thread calls a model here. Without the runtime's tracking of threads, a call does not wait for
            # the previous one, and a CUDA graph can capture it.
            runner = runners.AOTIModelContainerRunnerCuda(library, 1, str(device), str(directory), True)
        else:
            runner = runners.AOTIModelContainerRunnerCuda(library, _CONCURRENT_CALLS, str(device), str(directory))
    except (RuntimeError, OSError) as error:
        raise IntegrityError(
            f"{library} cannot be loaded: {first_line(error)}",
            next_step="the file system must allow execution (no `noexec`); if it does, bake the warm state again",
        ) from error
    return lambda *arguments: tuple(runner.run(arguments))


def has_single_threaded_mode() -> bool:
    """Return whether this torch can run packages without tracking threads. Only then can a CUDA graph capture them."""
    runner: Any = torch._C._aoti.AOTIModelContainerRunnerCuda
    return "arg4: bool" in (inspect.getdoc(runner.__init__) or "")


def _shared(make: Callable[[Region], BoundRegion]) -> Executor:
    """Make an executor that calls `make` once for each region and shares the result between its instances."""
    functions: dict[str, BoundRegion] = {}

    def execute(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        if region.name not in functions:
            functions[region.name] = make(region)
        return _bind(functions[region.name], weights)

    return execute


def _bind(function: BoundRegion, weights: Sequence[torch.Tensor]) -> BoundRegion:
    bound = tuple(weights)
    return lambda *inputs: function(*bound, *inputs)


def _compile(region: Region, metrics: StartMetrics, *, strict: bool) -> BoundRegion:
    from torch._dynamo import mark_dynamic
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

    # Use the number of threads that the process has, not the number that the bake had.
    settings: dict[str, str | int | bool] = {"cpp.dynamic_threads": True}
    if hasattr(torch._inductor.config, "cpp_cache_precompile_headers"):
        # Torch 2.11 would run the preprocessor in every process to check its precompiled headers.
        settings["cpp_cache_precompile_headers"] = False
    function: Any = torch.compile(region.function, fullgraph=True, dynamic=False, options=settings)
    first = True

    def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal function, first
        outputs: tuple[torch.Tensor, ...]
        # Mark variable lengths as dynamic in every call: a later call may belong to a class of inputs that is compiled
        # separately, and would then be compiled for one length only.
        for tensor, given in zip(arguments[-len(region.inputs) :], region.inputs, strict=True):
            for dimension in given.dynamic:
                mark_dynamic(tensor, dimension)
        started = time.perf_counter()
        try:
            outputs = function(*arguments)
        except (BackendCompilerFailed, FailOnRecompileLimitHit) as error:  # also at a later call, for a new class
            cause = first_line(getattr(error, "inner_exception", error))
            next_step = "a cache miss needs a compiler; bake again, or start with --profile eager"
            if strict:
                raise ModelError(
                    f"the region {region.name} cannot be compiled: {cause}", next_step=next_step
                ) from error
            metrics.miss("inductor", f"{cause}; {region.name} runs in eager mode", next_step=next_step)
            function = region.function
            outputs = function(*arguments)
        if first:
            first = False
            metrics.add_seconds("compile", time.perf_counter() - started)
        return outputs

    return call
