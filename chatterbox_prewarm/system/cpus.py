"""The number of CPUs that this process should use: its affinity, the limit of its control groups, the pod's request.

A container with a CPU limit sees all CPUs of its node. With a thread on each of them, the container uses up its limit
in a fraction of each period, and then the kernel stops all its threads until the next period. A pod without a limit
has that problem on a busy node: it gets only the CPUs that it requests, and its threads wait for each other.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.control_groups import GROUPS, MOUNT, control_groups

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Environment variable with the CPU request of the pod in whole CPUs; 0 or absent without a request. The manifests set
#: it, because the control groups show only a weight.
REQUEST = "CHATTERBOX_PREWARM_CPU_REQUEST"


def usable_cpus(mount: Path = MOUNT, groups: Path = GROUPS) -> int:
    """Return the number of CPUs that this process should use, at least 1. A limit of 2.5 CPUs counts as 2.

    Args:
        mount: see `control_groups`.
        groups: see `control_groups`.
    """
    limits = [quota // period for quota, period in _limits(mount, groups) if quota > 0 and period > 0]
    request = os.environ.get(REQUEST, "")
    if request.isdecimal() and int(request) > 0:
        limits.append(int(request))
    return max(1, min([len(os.sched_getaffinity(0)), *limits]))


def _limits(mount: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Yield quota and period, in microseconds, of each control group of this process and of the groups above it."""
    for folder in control_groups("cpu", mount, groups):
        with contextlib.suppress(OSError, ValueError):
            yield _read_limit(folder)


def _read_limit(folder: Path) -> tuple[int, int]:
    """Read the limit of one control group.

    Raises:
        OSError: there is no such group.
        ValueError: it has no limit.
    """
    combined = folder / "cpu.max"
    if combined.exists():
        quota, period = combined.read_text(encoding="ascii").split()
    else:
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period")
        )
    return int(quota), int(period)
