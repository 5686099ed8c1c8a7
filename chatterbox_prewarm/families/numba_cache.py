"""Family `numba`: the machine code that Numba makes of librosa's functions.

Every synthesis goes through librosa, since Perth's watermark does, and librosa's first calls compile for 11 to 16 s.
Numba's own on-disk cache holds the result. It is made for a generic processor of the architecture, so that it does
not depend on the machine of the bake, and copied to a writable place at start: Numba probes its cache for
writability even when it only reads.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.cache_folders import collect, seed

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

COMPILE_TIMER = "numba compile"
LOAD_TIMER = "numba load"
#: In the name of a file that Numba writes and then renames; it never reads one.
_NUMBA_TEMPORARY = ".tmp."


class NumbaFamily(Family):
    """See the module's docstring."""

    name = "numba"
    timers = (COMPILE_TIMER, LOAD_TIMER)

    def __init__(self) -> None:
        self._sources: set[str] = set()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """To all."""
        return True

    def environment(self, cache: Path) -> dict[str, str]:
        """Where Numba caches, and for which processor: `generic` also empties the list of extra features."""
        return {"NUMBA_CACHE_DIR": str(cache / "numba"), "NUMBA_CPU_NAME": "generic"}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:  # noqa: ARG002
        """Copy the baked cache to where Numba may open it for writing."""
        seed(cache / "numba", directory, in_use=lambda path: _NUMBA_TEMPORARY in path.name)

    def watch(self, metrics: WarmupMetrics) -> None:
        """Count at Numba's two doors: an overload that is loaded is a hit, one that is saved was compiled."""
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
            metrics.miss("numba", f"compiled {function.__module__}.{function.__qualname__}")
            return save(cache, *arguments)

        class CompilerTimer(event.Listener):  # type: ignore[misc]
            """Adds up the outermost compiler passes; a function that calls another compiles it within its own."""

            depth = 0
            started = 0.0

            def on_start(self, event: Any) -> None:  # noqa: ARG002
                if self.depth == 0:
                    self.started = time.perf_counter()
                self.depth += 1

            def on_end(self, event: Any) -> None:  # noqa: ARG002
                self.depth -= 1
                if self.depth == 0:
                    metrics.add_seconds(COMPILE_TIMER, time.perf_counter() - self.started)

        Cache.load_overload, Cache.save_overload = load_overload, save_overload
        event.register("numba:run_pass", CompilerTimer())

    def attach(self, directory: Path | None, session: Session) -> None:
        """Nothing to do: Numba reads its cache by itself."""

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Copy Numba's cache of this process."""
        collect(session.cache / "numba", directory)
        sources = sorted(f"source:{path}" for path in self._sources)
        return ("arch", "python", "numba", "llvmlite", "site_packages", *sources)
