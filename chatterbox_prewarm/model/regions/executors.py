"""How regions run: one executor for each profile, and one way to call what it made."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Protocol

from chatterbox_prewarm.errors import IntegrityError, ModelError, first_line
from chatterbox_prewarm.model.regions.region import IN_GRAPHS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from chatterbox_prewarm.model.regions.packages import Package
    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.system.metrics import WarmupMetrics

    BoundRegion = Callable[..., tuple[torch.Tensor, ...]]

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Makes a region callable over given weights."""

    def __call__(self, region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        """Bind `weights` as the region's first arguments; what is returned takes the inputs."""


def eager(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
    """Run a region as it is written."""
    return _bind(region.function, weights)


class Compiled:
    """Regions through `torch.compile`, each compiled at its first call and shared by all its instances.

    A region that cannot be compiled runs as it is written, and counts as a miss: an image has no compiler.

    Args:
        metrics: where the seconds of first calls are added up.
        strict: raise instead of running as written.
    """

    def __init__(self, metrics: WarmupMetrics, *, strict: bool = False) -> None:
        self._metrics = metrics
        self._strict = strict
        self._compiled: dict[str, BoundRegion] = {}

    def __call__(self, region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        """As `Executor`."""
        if region.name not in self._compiled:
            self._compiled[region.name] = self._compile(region)
        return _bind(self._compiled[region.name], weights)

    def _compile(self, region: Region) -> BoundRegion:
        import torch
        from torch._dynamo import mark_dynamic
        from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

        # As many threads as the process has been given, not as many as the bake had.
        settings: dict[str, str | int | bool] = {"cpp.dynamic_threads": True}
        if hasattr(torch._inductor.config, "cpp_cache_precompile_headers"):
            # Torch 2.11 would preprocess its headers in every process, to see whether a compiled one is still right.
            settings["cpp_cache_precompile_headers"] = False
        compiled: Any = torch.compile(region.function, fullgraph=True, dynamic=False, options=settings)
        first = True

        def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nonlocal compiled, first
            found: tuple[torch.Tensor, ...]
            # Lengths that differ are symbols in every call: a later one may be of a class that is compiled apart, and
            # would be compiled for its very length.
            for tensor, given in zip(arguments[-len(region.inputs) :], region.inputs, strict=True):
                for place in given.dynamic:
                    mark_dynamic(tensor, place)
            started = time.perf_counter()
            try:
                found = compiled(*arguments)
            except (BackendCompilerFailed, FailOnRecompileLimitHit) as error:  # later calls may be of another class
                if self._strict:
                    raise ModelError(
                        f"the region {region.name} cannot be compiled: {first_line(error)}",
                        next_step="a compiler is needed where the cache misses; or start with --profile eager",
                    ) from error
                self._metrics.miss("inductor", f"{first_line(error)}; {region.name} runs as written")
                compiled = region.function
                found = compiled(*arguments)
            if first:
                first = False
                self._metrics.add_seconds("compile", time.perf_counter() - started)
            return found

        return call


class AheadOfTime:
    """Regions from baked packages; one that is missing or does not load runs as it is written, and counts as a miss.

    Args:
        directory: of the packages, or None when there is none that fits.
        device: of the model.
        metrics: where hits and misses are counted, a hit when a package is first called.
        in_graphs: T3's step will be captured as a CUDA graph. Where this torch cannot have packages in one, its regions
            run as written: the graph spares them what a package would.
        strict: raise instead of running as written.
    """

    def __init__(
        self,
        directory: Path | None,
        device: torch.device,
        metrics: WarmupMetrics,
        *,
        in_graphs: bool = False,
        strict: bool = False,
    ) -> None:
        self._directory = directory
        self._device = device
        self._metrics = metrics
        self._in_graphs = in_graphs
        self._strict = strict
        self._packages: dict[str, BoundRegion] = {}

    def __call__(self, region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        """As `Executor`.

        Raises:
            IntegrityError: under `strict`, the package is missing or cannot be loaded.
        """
        if region.name not in self._packages:
            self._packages[region.name] = self._load(region)
        return _bind(self._packages[region.name], weights)

    def _load(self, region: Region) -> BoundRegion:
        from chatterbox_prewarm.model.regions.packages import Package, has_single_threaded_mode

        if self._directory is None:
            return region.function  # the family said why
        if self._in_graphs and region.name in IN_GRAPHS and not has_single_threaded_mode():
            logger.info("%s runs as written: this torch cannot have a package in a CUDA graph", region.name)
            return region.function
        try:
            loaded = Package(self._directory / region.name, self._device)
        except IntegrityError as error:
            if self._strict:
                raise
            self._metrics.miss("aot", f"{error.message}; {region.name} runs as written")
            return region.function
        return self._counted(loaded)

    def _counted(self, package: Package) -> BoundRegion:
        """A package that counts as a hit once."""
        counted = False

        def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nonlocal counted
            if not counted:
                counted = True
                self._metrics.hit("aot")
            return package(*arguments)

        return call


def _bind(function: BoundRegion, weights: Sequence[torch.Tensor]) -> BoundRegion:
    bound = tuple(weights)
    return lambda *inputs: function(*bound, *inputs)
