"""Which devices a server uses, and what is divided between their workers."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.fingerprint import visible_gpus

if TYPE_CHECKING:
    from chatterbox_prewarm.serve.workers.worker import WorkerConfig

#: Stands for a worker on each GPU.
ALL_GPUS = "cuda:all"


def parse_devices(text: str) -> list[str]:
    """The devices that an option names, with commas between them; the same one twice gives it two workers.

    Raises:
        BadInputError: none is named, or all GPUs are and there is none.
    """
    devices: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name != ALL_GPUS:
            devices.append(name)
        elif count := visible_gpus():
            devices += [f"cuda:{number}" for number in range(count)]
        else:
            raise BadInputError("there is no GPU here", next_step="give --device cpu, or start where there is one")
    if not devices:
        raise BadInputError(f"{text!r} names no device", next_step="give --device cpu, cuda, cuda:0,cuda:1 or cuda:all")
    return devices


def for_devices(devices: list[str], worker: WorkerConfig) -> list[WorkerConfig]:
    """A worker for each device. Those on the CPU divide its cores among them, unless their number is given."""
    on_cpu = sum(device.startswith("cpu") for device in devices)
    share = max(1, len(os.sched_getaffinity(0)) // on_cpu) if on_cpu > 1 else None
    return [
        replace(worker, device=device, threads=worker.threads or (share if device.startswith("cpu") else None))
        for device in devices
    ]
