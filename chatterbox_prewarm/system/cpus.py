"""The number of CPUs that this process should use: its affinity, the limit of its control groups, the pod's request.

A container with a CPU limit sees all CPUs of its node. With a thread on each of them, the container uses up its limit
in a fraction of each period, and then the kernel stops all its threads until the next period. A pod without a limit
has that problem on a busy node: it gets only the CPUs that it requests, and its threads wait for each other.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Environment variable with the CPU request of the pod in whole CPUs; 0 or absent without a request. The manifests set
#: it, because the control groups show only a weight.
REQUEST = "CHATTERBOX_PREWARM_CPU_REQUEST"

_MOUNT = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")


def usable_cpus(mount: Path = _MOUNT, groups: Path = _GROUPS) -> int:
    """Return the number of CPUs that this process should use, at least 1. A limit of 2.5 CPUs counts as 2.

    Args:
        mount: where the control groups are mounted, version 1 or 2.
        groups: the list of the control groups of this process.
    """
    limits = [quota // period for quota, period in _limits(mount, groups) if quota > 0 and period > 0]
    request = os.environ.get(REQUEST, "")
    if request.isdecimal() and int(request) > 0:
        limits.append(int(request))
    return max(1, min([len(os.sched_getaffinity(0)), *limits]))


def _limits(mount: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """Yield quota and period, in microseconds, of each control group of this process and of the groups above it."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / controllers  # version 2 has one tree without a name
        # A container may see the path of its group on the node, which is not mounted here. The top is its group then.
        for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if not folder.is_relative_to(top):
                break
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
