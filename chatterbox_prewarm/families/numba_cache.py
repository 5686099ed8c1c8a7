"""Family `numba`: the machine code that Numba compiles from librosa's functions.

Upstream's code uses librosa for every voice. The first calls of librosa spend 11 to 16 s on compiling. Numba's own
on-disk cache stores the result. Numba compiles for a generic processor of the architecture, so that the code does not
depend on the machine of the bake. A start copies the cache to a writable folder, because Numba tests whether it can
write to its cache even when it only reads.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import BAKE_AGAIN, Family
from chatterbox_prewarm.families.cache_folders import collect, seed

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import FamilyContext
    from chatterbox_prewarm.system.metrics import StartMetrics

COMPILE_TIMER = "numba compile"
LOAD_TIMER = "numba load"
#: Part of the name of a temporary file. Numba renames the file when it is complete, and never reads it before that.
_NUMBA_TEMPORARY = ".tmp."


class NumbaFamily(Family):
    """See the module's docstring."""

    name = "numba"
    for_upstream = True
    timers = (COMPILE_TIMER, LOAD_TIMER)

    def __init__(self) -> None:
        self._sources: set[str] = set()

    def environment(self, cache: Path) -> dict[str, str]:
        """Set Numba's cache folder and processor. `generic` also clears the list of extra CPU features."""
        return {"NUMBA_CACHE_DIR": str(cache / "numba"), "NUMBA_CPU_NAME": "generic"}

    def prepare(self, directory: Path | None, cache: Path, metrics: StartMetrics) -> None:  # noqa: ARG002
        """Copy the baked cache to a folder that Numba may write to."""
        seed(cache / "numba", directory, in_use=lambda path: _NUMBA_TEMPORARY in path.name)

    def watch(self, metrics: StartMetrics) -> None:
        """Count a hit for each overload that Numba loads, and a miss for each one that it compiles and saves."""
        from numba.core import event
        from numba.core.caching import Cache

        load, save = Cache.load_overload, Cache.save_overload

        def load_overload(cache: Any, *arguments: Any) -> Any:
            started = time.perf_counter()
            data = load(cache, *arguments)
            metrics.add_seconds(LOAD_TIMER, time.perf_counter() - started)
            self._sources.add(cache._py_func.__code__.co_filename)
            if data is not None:
                metrics.hit("numba")
            return data

        def save_overload(cache: Any, *arguments: Any) -> Any:
            function = cache._py_func
            metrics.miss("numba", f"compiled {function.__module__}.{function.__qualname__}", next_step=BAKE_AGAIN)
            return save(cache, *arguments)

        Cache.load_overload, Cache.save_overload = load_overload, save_overload
        # While Numba compiles a function, it also compiles the functions that it calls. The listener measures only
        # the outermost pass, so no time counts twice.
        compiler = event.TimingListener()
        event.register("numba:run_pass", compiler)

        def read() -> None:
            if compiler.done:
                metrics.timers[COMPILE_TIMER] = compiler.duration

        metrics.before_reading(read)

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Copy Numba's cache of this process."""
        collect(context.cache / "numba", directory)
        sources = sorted(f"source:{path}" for path in self._sources)
        return ("arch", "python", "numba", "llvmlite", "site_packages", *sources)
