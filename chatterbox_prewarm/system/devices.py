"""Names of devices, checked without importing torch, so that a device that cannot be used is refused immediately."""

from __future__ import annotations

import re
from pathlib import Path

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.system.fingerprint import visible_gpus

#: Exists on every machine and in every container that has a GPU, even if NVML is not available there.
_DRIVER = Path("/dev/nvidiactl")
#: Device name that stands for each GPU of the machine.
ALL_GPUS = "cuda:all"


def check_device_name(name: str) -> int | None:
    """Return the number of a GPU, 0 for "cuda" without a number, or None for the CPU.

    Raises:
        BadInputError: Chatterbox does not run on this kind of device.
    """
    if name == "mps":
        raise BadInputError("the device 'mps' needs macOS, and this project needs Linux", next_step="use cpu or cuda")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise BadInputError(f"there is no device {name!r}", next_step="use the device cpu, cuda, or cuda:NUMBER")
    return None if name == "cpu" else int(match[1] or 0)


def check_device_names(text: str) -> list[str]:
    """Split a comma-separated list of devices. Each is a device as in `check_device_name`, or `ALL_GPUS`.

    Raises:
        BadInputError: the list is empty, or as `check_device_name`.
    """
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise BadInputError(
            f"{text!r} names no device", next_step="name devices as cpu, cuda, cuda:0,cuda:1 or cuda:all"
        )
    for name in names:
        if name != ALL_GPUS:
            check_device_name(name)
    return names


def check_device(device: object) -> str:
    """Return `device` if it is a device of this machine, in the form that upstream takes: "cpu", "cuda" or "cuda:1".

    Raises:
        BadInputError: Chatterbox does not run on this kind of device, or there is no GPU with this number.
        ModelError: this machine has no GPU.
    """
    name = str(device)  # also a torch.device
    number = check_device_name(name)
    if number is None:
        return name
    count = visible_gpus()
    if count == 0 and not _DRIVER.exists():
        raise ModelError(f"the device {name!r} cannot be used: this machine has no GPU", next_step="use the device cpu")
    if count and number >= count:
        raise BadInputError(
            f"there is no device {name!r}: this process sees {count} GPU(s), numbered from 0",
            next_step="use one of these numbers",
        )
    return name
