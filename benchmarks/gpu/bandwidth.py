"""What the device's memory can do: a copy, in bytes read and written per second. The floor under every token."""

from __future__ import annotations

import statistics
import time
from typing import Any

from chatterbox_prewarm.system.json_subprocess import report

_BYTES = {"cpu": 2**28, "cuda": 2**32}
_REPEATS = 10


def run(*, device: str) -> dict[str, Any]:
    """Copy a tensor several times the size of any cache.

    Returns:
        `bytes_per_second`, the median, and on a GPU what torch knows of it.
    """
    import torch

    from benchmarks.stages import clock_of

    source = torch.ones(_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = clock_of(device)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one maps the pages
        started = clock()
        target.copy_(source)
        seconds.append(clock() - started)
    found: dict[str, Any] = {"bytes_per_second": 2 * source.nbytes / statistics.median(seconds[1:])}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["name"], found["multiprocessors"] = properties.name, properties.multi_processor_count
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {**found, "measured": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    report(run)
