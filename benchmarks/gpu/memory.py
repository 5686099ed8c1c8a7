"""Measure each step of a start in a fresh process: seconds, and bytes of the memory of the device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.stages import clock_of
from chatterbox_prewarm.model.warmup.settings import TEXTS
from chatterbox_prewarm.system.json_subprocess import report

if TYPE_CHECKING:
    from collections.abc import Callable

_LONG = 500
_SHORT = 25


def run(*, warm: str, weights: str, cache: str, device: str) -> dict[str, Any]:
    """Run a start step by step.

    Returns:
        for each step in order its seconds and, in bytes, the memory that torch has allocated and reserved, its peak
        allocation, and the used memory of the device. On a CPU, the resident memory of the process instead.
    """
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.start.prepare import prepare

    options = StartOptions(warm=Path(warm), weights=Path(weights), cache=Path(cache), device=device, policy="require")
    prepared = prepare(options)

    import torch

    clock = clock_of(device)
    steps: dict[str, dict[str, float]] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        # The first use of the clock of the device would create the context.
        started = clock() if steps else time.perf_counter()
        result = work()
        steps[name] = {"seconds": clock() - started, **_used(device)}
        return result

    step("context", lambda: torch.zeros(1, device=device))
    matrix = torch.ones(256, 256, device=device)
    step("first matrix product", lambda: matrix @ matrix)
    image = torch.ones(1, 4, 256, device=device)
    step("first convolution", lambda: torch.nn.functional.conv1d(image, torch.ones(4, 4, 3, device=device)))
    attached = step("attach", lambda: attach(prepared))
    speak = attached.synthesizer.synthesize
    length = _LONG if device.startswith("cuda") else _SHORT

    step("first synthesis", lambda: speak(TEXTS[0], seed=1, max_new_tokens=_SHORT))
    step("second synthesis", lambda: speak(TEXTS[0], seed=1, max_new_tokens=_SHORT))
    step("long synthesis", lambda: speak(TEXTS[2], seed=1, max_new_tokens=length))
    step("synthesis after it", lambda: speak(TEXTS[0], seed=1, max_new_tokens=_SHORT))
    captured = attached.synthesizer.model.decoder.capture_seconds
    return {"steps": steps, "capture_seconds": captured, "misses": attached.metrics.to_dict()["misses"]}


def _used(device: str) -> dict[str, float]:
    import torch

    if not device.startswith("cuda"):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return {"resident_bytes": pages * 4096}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "most_allocated_bytes": torch.cuda.max_memory_allocated(),
        "used_bytes": total - free,
    }


if __name__ == "__main__":
    report(run)
