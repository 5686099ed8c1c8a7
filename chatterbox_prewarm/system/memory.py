"""The memory that this process and its children may use."""

from __future__ import annotations

import contextlib
from pathlib import Path

from chatterbox_prewarm.system.control_groups import GROUPS, MOUNT, control_groups

_MEMINFO = Path("/proc/meminfo")


def usable_memory(mount: Path = MOUNT, groups: Path = GROUPS, meminfo: Path = _MEMINFO) -> int:
    """Return the bytes of memory that are available to this process: on the machine, and below its groups' limits.

    The page cache counts as available. The present use of the groups is ignored, because it is small at a start.

    Args:
        mount: see `control_groups`.
        groups: see `control_groups`.
        meminfo: the kernel's table of the machine's memory.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    limits = [1024 * int(fields["MemAvailable"].split()[0])]
    for folder in control_groups("memory", mount, groups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text(encoding="ascii")))
    return min(limits)
