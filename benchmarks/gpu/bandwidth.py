"""Measure the memory bandwidth of the device with a copy. It limits the time per token."""

from __future__ import annotations

import statistics
import time
from typing import Any

from chatterbox_prewarm.system.json_subprocess import report

_BYTES = {"cpu": 2**28, "cuda": 2**32}
_REPEATS = 10


def run(*, device: str) -> dict[str, Any]:
    """Copy a tensor that is several times larger than any cache.

    Returns:
        `bytes_per_second`, the median of bytes read and written; on a GPU also its properties from torch.
    """
    import torch

    from benchmarks.stages import clock_of

    source = torch.ones(_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = clock_of(device)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first copy maps the pages
        started = clock()
        target.copy_(source)
        seconds.append(clock() - started)
    result: dict[str, Any] = {"bytes_per_second": 2 * source.nbytes / statistics.median(seconds[1:])}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        result["name"], result["multiprocessors"] = properties.name, properties.multi_processor_count
        result["cuda"] = str(torch.version.cuda)
        result["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {**result, "measured": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    report(run)
